"""One Transformer for every family of open weights, and its KV cache.

Llama: RMSNorm -> attention with rotary positions and grouped queries -> RMSNorm -> SwiGLU, no
biases, tied or untied head. Qwen2, Qwen3 and Gemma 2 differ from it by one line of the table in
open_weights/families.py; open_weights/files.py reads and writes the files.

What is left out: dropout (nobody fine-tunes with it), attention masks for padding. Batches are
padded on the *right*, where causal attention cannot see it, and each caller knows the lengths; so
there is no mask to get wrong, and positions are simply 0, 1, 2, ...

    model, tokenizer = load_model("smollm2")    # a folder, or a name
    hidden = model(tokens)                      # [B,T] -> [B,T,D]
    logits = model.logits(hidden)               # only for looking at; the scripts use kernels/

Legend: P prompts, G samples per prompt, B = P*G rows, T tokens, D width, V vocabulary, H heads, K
key/value heads.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from infra.cli import UserError, what_this_is
from infra.seeds import generator
from kernels import Linear, linear_logprob, linear_logprob_loss
from kernels.pointwise import apply_rotary, gated_gelu, gated_silu, rope_tables
from open_weights.families import Config
from open_weights.files import load_weights, resolve, save_model, write_model  # noqa: F401
from open_weights.load import load_tokenizer


class KVCache:
    """Keys and values of `rows` sequences side by side, [L, rows, K, max_len, head_dim] each.

    Every row has its own length; what lies beyond it is garbage that attention must not read.
    """

    def __init__(self, cfg, rows, max_len, device, dtype):
        shape = (cfg.num_hidden_layers, rows, cfg.num_key_value_heads, max_len, cfg.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def copy_rows(self, source, target, length):
        """Row source[i] -> row target[i], the first `length` positions."""
        for kv in (self.k, self.v):
            kv[:, target, :, :length] = kv[:, source, :, :length]


class OffsetNorm(nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, all of it in float32 (Gemma)."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(
            x.dtype
        )


class Layer(nn.Module):
    """One block. q, k and v are one matrix, gate and up another: fewer, larger products."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, family = cfg, cfg.family
        D, d, heads, kv = (
            cfg.hidden_size,
            cfg.head_dim,
            cfg.num_attention_heads,
            cfg.num_key_value_heads,
        )
        norm = OffsetNorm if family.gemma else nn.RMSNorm
        self.attn_norm = norm(D, eps=cfg.rms_norm_eps)
        self.qkv = Linear(D, (heads + 2 * kv) * d)
        self.qkv_bias = nn.Parameter(torch.zeros((heads + 2 * kv) * d)) if family.qkv_bias else None
        self.q_norm = norm(d, eps=cfg.rms_norm_eps) if family.qk_norm else None
        self.k_norm = norm(d, eps=cfg.rms_norm_eps) if family.qk_norm else None
        self.out = Linear(heads * d, D)
        self.post_attn_norm = norm(D, eps=cfg.rms_norm_eps) if family.gemma else None
        self.mlp_norm = norm(D, eps=cfg.rms_norm_eps)
        self.gate_up = Linear(D, 2 * cfg.intermediate_size)
        self.down = Linear(cfg.intermediate_size, D)
        self.post_mlp_norm = norm(D, eps=cfg.rms_norm_eps) if family.gemma else None
        self.gated = {"silu": gated_silu, "gelu_pytorch_tanh": gated_gelu}[family.activation]

    def forward(self, x, cos, sin, attend):
        """x [B,T,D] -> [B,T,D]; attend(q [B,T,H,d], k [B,T,K,d], v [B,T,K,d]) -> [B,T,H*d]."""
        B, T, _ = x.shape
        H, K, d = self.cfg.num_attention_heads, self.cfg.num_key_value_heads, self.cfg.head_dim
        qkv = self.qkv(self.attn_norm(x))
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias
        # A split's gradient is one cat; slices' are padded sums.
        qk, v = qkv.view(B, T, H + 2 * K, d).split([H + K, K], 2)
        if self.q_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])], 2)
        q, k = apply_rotary(qk, cos, sin).split([H, K], 2)
        attended = self.out(attend(q, k, v))
        x = x + (attended if self.post_attn_norm is None else self.post_attn_norm(attended))
        y = self.down(self.gated(self.gate_up(self.mlp_norm(x))))
        return x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y))


class Transformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = (OffsetNorm if cfg.family.gemma else nn.RMSNorm)(
            cfg.hidden_size, eps=cfg.rms_norm_eps
        )
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size)
        self.embed_scale = cfg.hidden_size**0.5 if cfg.family.gemma else None
        self.scoring = attention_options(cfg)
        self.causal = [
            partial(causal_attention, window=cfg.window(i), **self.scoring)
            for i in range(cfg.num_hidden_layers)
        ]
        self._rope = None

    @property
    def head(self):
        """The head's weight [V,D], which the kernels read directly."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens, length=None):
        """tokens [B,T] int64, padded on the right -> final hidden states [B,T,D].

        length [B] (real tokens of each row): what rows have in common at their beginning, as the
        samples of a prompt do, is computed once; the states of the padding are then anything.
        """
        B, T = tokens.shape
        positions = self._positions(T, tokens.device)
        prefixes = None if length is None else shared_prefixes(tokens, length)
        if prefixes is None:
            return self._run(tokens, positions, self.causal.__getitem__)
        node, first = prefixes

        def to_rows(x):  # [1,M,...] of the distinct prefixes -> [B,T,...]
            return x[0].index_select(0, node.view(-1)).view(B, T, *x.shape[2:])

        def attend(layer):  # the one operation that is not position by position needs whole rows
            def in_rows(q, k, v):
                attended = self.causal[layer](to_rows(q), to_rows(k), to_rows(v))
                return attended.view(B * T, -1).index_select(0, first)[None]

            return in_rows

        rope = tuple(table[first % T] for table in positions)  # (M, 1, d)
        return to_rows(self._run(tokens.reshape(-1)[first][None], rope, attend))

    def prefill(self, tokens, cache, rows):
        """As forward, and writes keys and values of tokens [B,T] to positions 0..T-1 of cache rows
        [B]."""
        T = tokens.shape[1]

        def attend(layer):
            def write_and_attend(q, k, v):
                cache.k[layer, rows, :, :T] = k.transpose(1, 2)
                cache.v[layer, rows, :, :T] = v.transpose(1, 2)
                return self.causal[layer](q, k, v)

            return write_and_attend

        return self._run(tokens, self._positions(T, tokens.device), attend)

    def decode(self, tokens, cache, length, longest):
        """One token for each of the cache's first B rows: tokens [B], length [B] (tokens already
        there), longest = length.max() as an int. Returns hidden [B,D]; the caller adds 1 to
        length."""
        B = tokens.shape[0]
        K, d, room = cache.k.shape[2], cache.k.shape[4], cache.k.shape[3]
        cos, sin = self._rope_tables(longest + 1, tokens.device)
        first = torch.arange(B * K, device=tokens.device) * room  # in a layer's [R*K*max_len,d]
        place = first + length.repeat_interleave(K)
        visible = near = None  # equal lengths see all of what there is
        window = self.cfg.sliding_window
        if window is not None or bool((length < longest).any()):
            t = torch.arange(longest + 1, device=tokens.device)
            visible = near = t <= length[:, None]  # (B, t)
            if window is not None:
                near = visible & (t > length[:, None] - window)

        def attend(layer):
            k_cache, v_cache = cache.k[layer], cache.v[layer]
            seen = visible if self.cfg.window(layer) is None else near

            def write_and_attend(q, k, v):
                k_cache.view(-1, d).index_copy_(0, place, k.reshape(B * K, d))
                v_cache.view(-1, d).index_copy_(0, place, v.reshape(B * K, d))
                return cached_attention(
                    q,
                    k_cache[:B, :, : longest + 1],
                    v_cache[:B, :, : longest + 1],
                    seen,
                    **self.scoring,
                )

            return write_and_attend

        here = tuple(t.index_select(0, length)[:, None, None] for t in (cos, sin))  # (B, 1, 1, d)
        return self._run(tokens[:, None], here, attend)[:, 0]

    def _run(self, tokens, rope, attend):
        x = self.embed(tokens)
        if self.embed_scale is not None:  # rounded to the weights' dtype first, as in training
            x = x * torch.tensor(self.embed_scale, dtype=x.dtype)
        cos, sin = rope
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend(i))
        return self.norm(x)

    def _rope_tables(self, length, device):
        """Tables of at least `length` rows, kept between calls; they grow, for a context of 131072
        would take 134 MB."""
        if self._rope is None or self._rope[0].device != device or len(self._rope[0]) < length:
            context = self.cfg.max_position_embeddings
            if length > context:
                raise UserError(
                    f"{length} tokens exceed the model's context of {context}; shorten the text"
                )
            self._rope = rope_tables(self.cfg, min(context, max(2048, 2 * length)), device)
        return self._rope

    def _positions(self, T, device):
        cos, sin = self._rope_tables(T, device)
        return cos[:T, None], sin[:T, None]  # (T, 1, d)

    def logits(self, hidden):
        """hidden [...,D] -> logits [...,V] float32. Whole: for tests and small looks."""
        z, cap = F.linear(hidden.float(), self.head.float()), self.cfg.final_logit_softcapping
        return z if cap is None else cap * torch.tanh(z / cap)


def attention_options(cfg):
    """Where the scores differ from q.k / sqrt(head_dim): {} for Llama; scale, softcap."""
    scale = None if cfg.query_pre_attn_scalar is None else cfg.query_pre_attn_scalar**-0.5
    options = dict(scale=scale, softcap=cfg.attn_logit_softcapping)
    return {name: value for name, value in options.items() if value is not None}


def repeats_keys(q):
    """float32 on CUDA: PyTorch's fused kernels share a key head among query heads in 16 bits only.
    Asked with enable_gqa in float32, it silently takes the one that stores all scores [B,H,T,T] for
    backward."""
    return q.is_cuda and q.dtype == torch.float32


def causal_attention(q, k, v, window=None, scale=None, softcap=None):
    """q [B,T,H,d], k, v [B,T,K,d] -> [B,T,H*d]; position t sees positions 0..t, or only the last
    `window` of them."""
    B, T, H, d = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    K, visible = k.shape[1], None
    if softcap is not None or (window is not None and window < T):
        t = torch.arange(T, device=q.device)
        visible = (t <= t[:, None]) & (t > t[:, None] - (window or T))
    if softcap is None:
        if K != H and repeats_keys(q):
            k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
        options = dict(is_causal=visible is None, scale=scale, enable_gqa=k.shape[1] != H)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, **options)
    else:
        grouped, visible = q.reshape(B, K, H // K * T, d), visible.repeat(H // K, 1)
        attend = (
            partial(checkpoint, capped_attention, use_reentrant=False)
            if torch.is_grad_enabled()
            else capped_attention
        )
        out = attend(grouped, k, v, visible, scale, softcap).view(B, H, T, d)
    return out.transpose(1, 2).reshape(B, T, H * d)


def cached_attention(q, k, v, visible, scale=None, softcap=None):
    """One query per row over its own past. q [B,1,H,d], k, v [B,K,t,d], visible [B,t] (None: all)
    -> [B,1,H*d].

    The H/K query heads that share a key head stand as so many queries of that head, so that grouped
    keys are read once and never repeated in memory.
    """
    B, _, H, d = q.shape
    K = k.shape[1]
    q = q.reshape(B, K, H // K, d)
    visible = None if visible is None else visible[:, None, None]
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    else:
        out = capped_attention(q, k, v, visible, scale, softcap)
    return out.reshape(B, 1, H * d)


def capped_attention(q, k, v, visible, scale, softcap):
    """softmax(softcap * tanh(scale q.k / softcap)) v, which no fused kernel of PyTorch computes
    (Gemma 2). q [B,K,n,d], k, v [B,K,t,d], visible broadcasts to [B,K,n,t] (None: all) ->
    [B,K,n,d]. The scores stand whole: [B,K,n,t] float32."""
    scores = (q @ k.transpose(2, 3)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores if visible is None else scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def shared_prefixes(tokens, length, worth=0.9):
    """What forward() need not compute twice. Equal rows need not be neighbours.

    tokens [B,T], length [B] -> node [B,T], the number of the distinct prefix tokens[b,:t+1]
    (padding: any), and first [M], where in tokens.view(-1) each of the M prefixes stands for the
    first time (M is rounded up). None where they are more than `worth` of the B*T positions.
    """
    device = tokens.device
    tokens, length = tokens.cpu(), length.cpu()
    B, T = tokens.shape
    rows = [row[:n] for row, n in zip(tokens.tolist(), length.tolist())]
    order = torch.tensor(sorted(range(B), key=rows.__getitem__))  # sharers are neighbours now
    tokens, length = tokens[order], length[order]
    t = torch.arange(T)
    common = tokens.new_zeros(B)  # positions that a row has in common with the one before it
    both = (t < length[1:, None]) & (t < length[:-1, None])
    common[1:] = ((tokens[1:] == tokens[:-1]) & both).cumprod(1).sum(1)
    new = (t >= common[:, None]) & (t < length[:, None])
    M = int(new.sum())
    if worth * B * T < M:
        return None
    number = torch.full((B, T), -1)
    number[new] = torch.arange(M)
    node = torch.empty_like(number)
    node[order] = number.cummax(0).values.clamp(min=0)  # the newest number above in the column
    # Rows that nobody reads round M up: oneDNN compiles a product for each M.
    first = F.pad((order[:, None] * T + t)[new], (0, -M % 32))
    return node.to(device), first.to(device)


def pad_right(rows):
    """Lists of token ids -> tokens [B,T] int64 with zeros on the right, length [B]. The zeros are
    never looked at: causal attention cannot see them and every mask is made from the lengths."""
    length = torch.tensor([len(r) for r in rows])
    tokens = torch.zeros(len(rows), int(length.max()), dtype=torch.int64)
    for i, r in enumerate(rows):
        tokens[i, : len(r)] = torch.tensor(r, dtype=torch.int64)
    return tokens, length


def token_logprobs(model, tokens, targets, temperature, length=None):
    """Log-probs of chosen tokens under the model: for whatever looks at them, or trains on whole
    sequences (DPO).

    tokens [B,T] int64 right-padded; targets [B,T] bool, True where tokens[b,t] is to be predicted
    (never at t=0). Returns logprob [N], entropy [N] in row-major order of targets; the head runs on
    those N positions only. length [B]: tokens of each row; see Transformer.forward.
    """
    hidden = model(tokens[:, :-1], None if length is None else length - 1)
    hidden = hidden[targets[:, 1:]]  # (N, D): the state before each target
    cap = model.cfg.final_logit_softcapping
    logprob, _, entropy = linear_logprob(hidden, model.head, tokens[targets], temperature, cap)
    return logprob, entropy


def token_loss(model, tokens, targets, temperature, loss_fn, *per_token, length=None):
    """The loss of SFT and RL, a sum over chosen tokens, with a quarter less arithmetic in the head
    than through token_logprobs, whose arguments these are. per_token: tensors [N,...], row-major as
    targets is; loss_fn(logprob [n], entropy [n], *per_token [n,...]) -> scalar sum over n of the N
    tokens: see kernels.linear_logprob_loss. Returns loss (call backward on it, once), and detached
    logprob [N], entropy [N].
    """
    hidden = model(tokens[:, :-1], None if length is None else length - 1)[targets[:, 1:]]  # (N, D)
    cap = model.cfg.final_logit_softcapping
    return linear_logprob_loss(
        hidden, model.head, tokens[targets], temperature, loss_fn, *per_token, softcap=cap
    )


def init_weights(model, generator):
    """Random weights for a model from nothing: std = 1/sqrt(fan_in), the two matrices that write to
    the residual stream scaled down by 1/sqrt(2L). (The usual fixed 0.02 learns far slower at width
    64.)"""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") or model.cfg.family.gemma else 1.0)
                continue
            std = p.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std *= (2 * model.cfg.num_hidden_layers) ** -0.5
            p.normal_(0.0, std, generator=generator)
    return model


def new_model(vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, seed=0):
    """A tiny model with random weights, for tasks with an alphabet of their own. UserError: odd
    rotary pairs."""
    if hidden_size % (2 * num_attention_heads):
        raise UserError(
            "--hidden-size must be a multiple of 2 * --num-attention-heads (rotary pairs)"
        )
    shape = Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        head_dim=hidden_size // num_attention_heads,
        max_position_embeddings=256,
    )
    return init_weights(Transformer(shape), generator(seed, "init"))


def load_model(name_or_dir, device="cpu", dtype=torch.float32, verifier=False):
    """(model, tokenizer) from a transformers-style folder, a run directory, "smollm2" or a hub id
    (open_weights/files.py). verifier: the folder is one's, whose backbone is wanted."""
    folder = resolve(str(name_or_dir), verifier)
    cfg = Config.from_json(folder / "config.json")
    tokenizer = load_tokenizer(folder)
    if tokenizer.n_vocab > cfg.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.n_vocab} tokens, the model {cfg.vocab_size}"
        )
    with torch.device(
        "meta"
    ):  # shapes without memory; load_weights allocates the parameters where they are to be
        model = Transformer(cfg).to(dtype)
    load_weights(model, folder, device)
    return model, tokenizer


if __name__ == "__main__":
    what_this_is(__doc__, "python train_sft.py", "python sample.py --model DIR --prompt TEXT")
