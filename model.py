"""One Transformer for every family of open weights, and its KV cache.

Llama: RMSNorm -> attention with rotary positions and grouped queries -> RMSNorm -> SwiGLU, no biases, tied or untied
head. Qwen2, Qwen3 and Gemma 2 differ from it by one line of the table in families.py; files are read and written by
weights.py.

What is left out: dropout (nobody fine-tunes with it), attention masks for padding. Batches are padded on
the *right*, where causal attention cannot see it, and each caller knows the lengths; so there is no mask
to get wrong, and positions are simply 0, 1, 2, ...

    model, tokenizer = load_model("smollm2")          # a folder, or a name
    hidden = model(tokens)                            # [B,T] -> [B,T,D]
    logits = model.logits(hidden)                     # only for looking at; the scripts use kernels/

Legend: P prompts, G samples per prompt, B = P*G rows, T tokens, D width, V vocabulary, H heads, K key/value heads.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from infra.cli import UserError
from open_weights.families import Config
from kernels import Linear, linear_logprob, linear_logprob_loss
from open_weights.tokenizer import load_tokenizer
from open_weights.files import load_weights, resolve, save_model, write_model

__all__ = ["Config", "KVCache", "Transformer", "init_weights", "load_model", "load_weights", "pad_right", "resolve",
           "save_model", "token_logprobs", "token_loss", "write_model"]


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


def rope_frequencies(cfg, device):
    """Angle per position [head_dim/2] float32: theta^(-2i/head_dim). Llama 3.1 and later divide the slow ones, which turn
    less than low_freq_factor times in the context of pre-training, by `factor`, leave those alone that turn more than
    high_freq_factor times, and blend between (rope_type "llama3")."""
    freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, device=device, dtype=torch.float32) / cfg.head_dim)
    if cfg.rope_scaling is None:
        return freq
    low, high = cfg.rope_scaling["low_freq_factor"], cfg.rope_scaling["high_freq_factor"]
    turns = cfg.rope_scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / cfg.rope_scaling["factor"]


def rope_tables(cfg, length, device):
    """cos and sin [length, head_dim] float32 of the angles position * rope_frequencies, twice side by side; the
    first half of sin negated, which is what rotate wants."""
    freq = rope_frequencies(cfg, device)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), freq)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def turn(x, cos, sin):
    """(a, b) -> (a cos - b sin, b cos + a sin) on the halves of the last axis, in three operations. In float32 whatever x is, as
    in kernels.rope_write: keys of one sequence must not be rounded differently by the prompt's pass and by decoding."""
    if x.dtype != torch.float32:
        return turn(x.float(), cos, sin).to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Rotate(torch.autograd.Function):
    """turn(), whose gradient is the turn back: two operations where autograd would make eight."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return turn(dy, cos, -sin), None, None


def rotate(x, cos, sin):
    """Rotary embedding, "rotate half" layout. x [B,T,heads,head_dim]; cos, sin of rope_tables broadcast to
    [B,T,1,head_dim]."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else turn(x, cos, sin)


class OffsetNorm(nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, all of it in float32 (Gemma)."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up of one tensor [...,2F]; both gradients are written into one tensor, where autograd makes three."""

    @staticmethod
    def forward(ctx, gate_up):
        gate, up = gate_up.chunk(2, -1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx, dy):
        gate_up, silu = ctx.saved_tensors
        (gate, up), d_gate_up = gate_up.chunk(2, -1), torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        torch.mul(dy, silu, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return d_gate_up


def gated_silu(gate_up):
    """SwiGLU: gate_up [...,2F], gate first -> silu(gate) * up [...,F]."""
    if torch.is_grad_enabled():
        return _GatedSilu.apply(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gated_gelu(gate_up):
    """Gemma's: the same with GELU in its tanh form."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


class Layer(nn.Module):
    """One block. q, k and v are one matrix, gate and up another: fewer, larger products."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, family = cfg, cfg.family
        D, d, heads, kv = cfg.hidden_size, cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads
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
        qk, v = qkv.view(B, T, H + 2 * K, d).split([H + K, K], 2)  # a split's gradient is one cat; slices' are padded sums
        if self.q_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])], 2)
        q, k = rotate(qk, cos, sin).split([H, K], 2)
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
        self.norm = (OffsetNorm if cfg.family.gemma else nn.RMSNorm)(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size)
        self.embed_scale = cfg.hidden_size**0.5 if cfg.family.gemma else None
        self.scoring = attention_options(cfg)
        self.causal = [partial(causal_attention, window=cfg.window(i), **self.scoring) for i in range(cfg.num_hidden_layers)]
        self._rope = None

    @property
    def head(self):
        """The head's weight [V,D], which the kernels read directly."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens, share=None):
        """tokens [B,T] int64, padded on the right -> final hidden states [B,T,D]. share: shared_prefixes(tokens, length, device):
        what samples of a prompt have in common is computed once, and the states of the padding are anything."""
        (B, T), positions = tokens.shape, self._positions(tokens.shape[1], tokens.device)
        if share is None:
            return self._run(tokens, positions, self.causal.__getitem__)
        node, first = share
        back = lambda x: x[0].index_select(0, node.view(-1)).view(B, T, *x.shape[2:])  # noqa: E731  [1,M,...] -> [B,T,...]

        def attend(layer):  # the one operation that is not position by position, and so the one that needs whole rows
            return lambda q, k, v: self.causal[layer](back(q), back(k), back(v)).view(B * T, -1).index_select(0, first)[None]

        here = tuple(table[first % T] for table in positions)  # (M, 1, d)
        return back(self._run(tokens.reshape(-1)[first][None], here, attend))

    def prefill(self, tokens, cache, rows):
        """As forward, and writes keys and values of tokens [B,T] to positions 0..T-1 of cache rows [B]."""
        T = tokens.shape[1]

        def attend(layer):
            def write_and_attend(q, k, v):
                cache.k[layer, rows, :, :T] = k.transpose(1, 2)
                cache.v[layer, rows, :, :T] = v.transpose(1, 2)
                return self.causal[layer](q, k, v)

            return write_and_attend

        return self._run(tokens, self._positions(T, tokens.device), attend)

    def decode(self, tokens, cache, length, longest):
        """One token for each of the cache's first B rows: tokens [B], length [B] (tokens already there),
        longest = length.max() as an int. Returns hidden [B,D]; the caller adds 1 to length."""
        B = tokens.shape[0]
        K, d, room = cache.k.shape[2], cache.k.shape[4], cache.k.shape[3]
        cos, sin = self._rope_tables(longest + 1, tokens.device)
        place = torch.arange(B * K, device=tokens.device) * room + length.repeat_interleave(K)  # in a layer's [R*K*max_len,d]
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
                return cached_attention(q, k_cache[:B, :, : longest + 1], v_cache[:B, :, : longest + 1], seen, **self.scoring)

            return write_and_attend

        here = tuple(table.index_select(0, length)[:, None, None] for table in (cos, sin))  # (B, 1, 1, d)
        return self._run(tokens[:, None], here, attend)[:, 0]

    def _run(self, tokens, rope, attend):
        x = self.embed(tokens)
        if self.embed_scale is not None:  # rounded to the weights' dtype first, as Gemma was trained
            x = x * torch.tensor(self.embed_scale, dtype=x.dtype)
        cos, sin = rope
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend(i))
        return self.norm(x)

    def _rope_tables(self, length, device):
        """Tables of at least `length` rows, kept between calls; they grow, for a context of 131072 would take 134 MB."""
        if self._rope is None or self._rope[0].device != device or len(self._rope[0]) < length:
            context = self.cfg.max_position_embeddings
            if length > context:
                raise UserError(f"{length} tokens exceed the model's context of {context}; shorten the text")
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
    """float32 on CUDA: PyTorch's fused kernels share a key head among query heads in 16 bits only. Asked with enable_gqa in
    float32, it silently takes the one that stores all scores [B,H,T,T] for backward."""
    return q.is_cuda and q.dtype == torch.float32


def causal_attention(q, k, v, window=None, scale=None, softcap=None):
    """q [B,T,H,d], k, v [B,T,K,d] -> [B,T,H*d]; position t sees positions 0..t, or only the last `window` of them."""
    B, T, H, d = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    K, visible = k.shape[1], None
    if softcap is not None or (window is not None and window < T):
        t = torch.arange(T, device=q.device)
        visible = (t <= t[:, None]) & (t > t[:, None] - (window or T))
    if softcap is None:
        if K != H and repeats_keys(q):
            k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale,
                                             enable_gqa=k.shape[1] != H)
    else:
        grouped, visible = q.reshape(B, K, H // K * T, d), visible.repeat(H // K, 1)
        attend = partial(checkpoint, capped_attention, use_reentrant=False) if torch.is_grad_enabled() else capped_attention
        out = attend(grouped, k, v, visible, scale, softcap).view(B, H, T, d)
    return out.transpose(1, 2).reshape(B, T, H * d)


def cached_attention(q, k, v, visible, scale=None, softcap=None):
    """One query per row over its own past. q [B,1,H,d], k, v [B,K,t,d], visible [B,t] (None: all) -> [B,1,H*d].

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
    """softmax(softcap * tanh(scale q.k / softcap)) v, which no fused kernel of PyTorch computes (Gemma 2). q [B,K,n,d],
    k, v [B,K,t,d], visible broadcasts to [B,K,n,t] (None: all) -> [B,K,n,d]. The scores stand whole: [B,K,n,t] float32."""
    scores = (q @ k.transpose(2, 3)).float() * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores if visible is None else scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def shared_prefixes(tokens, length, device, worth=0.9):
    """What forward() need not compute twice. tokens [B,T] on the CPU, length [B] -> on device: node [B,T], the number of the
    distinct prefix tokens[b,:t+1] (padding: any), and first [M], where in tokens.view(-1) each stands for the first time.
    (M is rounded up.) None where the M prefixes are more than `worth` of the B*T positions. Equal rows need not be neighbours."""
    (B, T), rows = tokens.shape, [row[:n] for row, n in zip(tokens.tolist(), length.tolist())]
    order = torch.tensor(sorted(range(B), key=rows.__getitem__))  # who shares a prefix is next to each other now
    tokens, length, t = tokens[order], length[order], torch.arange(T)
    common = tokens.new_zeros(B)  # positions that a row has in common with the one before it
    equal = (tokens[1:] == tokens[:-1]) & (t < length[1:, None]) & (t < length[:-1, None])
    common[1:] = equal.cumprod(1).sum(1)
    new = (t >= common[:, None]) & (t < length[:, None])
    M = int(new.sum())
    if worth * B * T < M:
        return None
    number = torch.full((B, T), -1)
    number[new] = torch.arange(M)
    node = torch.empty_like(number)  # in a column the newest number above is that of the row one shares with
    node[order] = number.cummax(0).values.clamp(min=0)
    first = F.pad((order[:, None] * T + t)[new], (0, -M % 32))  # rows that nobody reads: oneDNN compiles a product for each M
    return node.to(device), first.to(device)


def pad_right(rows):
    """Lists of token ids -> tokens [B,T] int64 with zeros on the right, length [B]. The zeros are never
    looked at: causal attention cannot see them and every mask is made from the lengths."""
    length = torch.tensor([len(r) for r in rows])
    tokens = torch.zeros(len(rows), int(length.max()), dtype=torch.int64)
    for i, r in enumerate(rows):
        tokens[i, : len(r)] = torch.tensor(r, dtype=torch.int64)
    return tokens, length


def token_logprobs(model, tokens, targets, temperature, share=None):
    """Log-probs of chosen tokens under the model: for whatever looks at them, or trains on whole sequences (DPO).

    tokens [B,T] int64 right-padded; targets [B,T] bool, True where tokens[b,t] is to be predicted (never
    at t=0). Returns logprob [N], entropy [N] in row-major order of targets; the head runs on those N
    positions only. share: shared_prefixes(tokens[:, :-1], length - 1, device).
    """
    hidden = model(tokens[:, :-1], share)[targets[:, 1:]]  # (N, D): the state before each target
    cap = model.cfg.final_logit_softcapping
    logprob, _, entropy = linear_logprob(hidden, model.head, tokens[targets], temperature, cap)
    return logprob, entropy


def token_loss(model, tokens, targets, temperature, loss_fn, *per_token, share=None):
    """The loss of SFT and RL, a sum over chosen tokens, with a quarter less arithmetic in the head than through
    token_logprobs, whose arguments these are. per_token: tensors [N,...], row-major as targets is; loss_fn(logprob [n],
    entropy [n], *per_token [n,...]) -> scalar sum over n of the N tokens: see kernels.linear_logprob_loss.
    Returns loss (call backward on it, once), and detached logprob [N], entropy [N].
    """
    hidden = model(tokens[:, :-1], share)[targets[:, 1:]]  # (N, D)
    cap = model.cfg.final_logit_softcapping
    return linear_logprob_loss(hidden, model.head, tokens[targets], temperature, loss_fn, *per_token, softcap=cap)


def init_weights(model, generator):
    """Random weights for a model from nothing: std = 1/sqrt(fan_in), the two matrices that write to the
    residual stream scaled down by 1/sqrt(2L). (The usual fixed 0.02 learns far slower at width 64.)"""
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


def load_model(name_or_dir, device="cpu", dtype=torch.float32):
    """(model, tokenizer) from a transformers-style folder, a run directory, "smollm2" or a hub id (weights.py)."""
    folder = resolve(str(name_or_dir))
    cfg = Config.from_json(folder / "config.json")
    tokenizer = load_tokenizer(folder)
    if tokenizer.n_vocab > cfg.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.n_vocab} tokens, the model {cfg.vocab_size}")
    with torch.device("meta"):  # shapes without memory; load_weights allocates the parameters where they are to be
        model = Transformer(cfg).to(dtype)
    load_weights(model, folder, device)
    return model, tokenizer
