"""One Transformer (the Llama architecture), its KV cache, and open weights in and out.

RMSNorm -> attention with rotary positions and grouped queries -> RMSNorm -> SwiGLU, no biases, tied or
untied head. A folder that transformers wrote loads here; a folder written here loads there.

What is left out: dropout (nobody fine-tunes with it), attention masks for padding. Batches are padded on
the *right*, where causal attention cannot see it, and each caller knows the lengths; so there is no mask
to get wrong, and positions are simply 0, 1, 2, ...

    model, tokenizer = load_model("smollm2")          # a folder, or a name
    hidden = model(tokens)                            # [B,T] -> [B,T,D]
    logits = model.logits(hidden)                     # only for looking at; the scripts use kernels/

Legend: P prompts, G samples per prompt, B = P*G rows, T tokens, D width, V vocabulary, H heads, K key/value heads.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import UserError
from kernels import Linear, linear_logprob
from tokenizer import Tokenizer, load_tokenizer


@dataclass
class Config:
    """Names and meaning as in a transformers config.json of model_type "llama"."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True

    @classmethod
    def from_json(cls, path):
        """Read config.json; refuse what this model would compute wrongly rather than ignore it."""
        raw = _read_json(path)
        if raw.get("model_type") != "llama":
            raise UserError(f"{path}: model_type {raw.get('model_type')!r} is not supported (only 'llama' is)")
        rope = raw.get("rope_parameters") or {}  # where transformers >= 5 keeps rope_theta
        scaling = raw.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
        for name, value in [("rope_scaling", scaling), ("attention_bias", raw.get("attention_bias")),
                            ("mlp_bias", raw.get("mlp_bias"))]:
            if value:
                raise UserError(f"{path}: {name}={value} is not supported yet; use a model without it")
        if raw.get("hidden_act", "silu") != "silu":
            raise UserError(f"{path}: hidden_act={raw['hidden_act']!r} is not supported (only 'silu' is)")
        raw.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        raw.setdefault("tie_word_embeddings", False)
        try:
            raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
            return cls(**{name: raw[name] for name in cls.__dataclass_fields__ if name in raw})
        except (TypeError, KeyError) as e:
            raise UserError(f"{path}: {e}; is this the config.json of a language model?") from None

    def to_json(self, tokenizer=None):
        raw = asdict(self) | dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
                                  attention_bias=False, mlp_bias=False, torch_dtype="float32")
        if tokenizer is not None:
            raw |= dict(bos_token_id=tokenizer.bos_id, eos_token_id=list(tokenizer.eos_ids))
        return raw


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


def rope_tables(cfg, device):
    """cos and sin [max_position, head_dim] float32 of the angles position * theta^(-2i/head_dim), i = 0..head_dim/2-1,
    twice side by side; the first half of sin negated, which is what rotate wants."""
    freq = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2, device=device, dtype=torch.float32) / cfg.head_dim)
    angle = torch.outer(torch.arange(cfg.max_position_embeddings, device=device, dtype=torch.float32), freq)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Rotary embedding, "rotate half" layout. x [B,T,heads,head_dim]; cos, sin of rope_tables broadcast to
    [B,T,1,head_dim]. (a, b) -> (a cos - b sin, b cos + a sin), three operations instead of seven."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([b, a], -1), sin)


class Layer(nn.Module):
    """One block. q, k and v are one matrix, gate and up another: fewer, larger products."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D, heads, kv = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads
        self.attn_norm = nn.RMSNorm(D, eps=cfg.rms_norm_eps)
        self.qkv = Linear(D, (heads + 2 * kv) * cfg.head_dim)
        self.out = Linear(heads * cfg.head_dim, D)
        self.mlp_norm = nn.RMSNorm(D, eps=cfg.rms_norm_eps)
        self.gate_up = Linear(D, 2 * cfg.intermediate_size)
        self.down = Linear(cfg.intermediate_size, D)

    def forward(self, x, cos, sin, attend):
        """x [B,T,D] -> [B,T,D]; attend(q [B,T,H,d], k [B,T,K,d], v [B,T,K,d]) -> [B,T,H*d]."""
        B, T, _ = x.shape
        H, K, d = self.cfg.num_attention_heads, self.cfg.num_key_value_heads, self.cfg.head_dim
        qkv = self.qkv(self.attn_norm(x)).view(B, T, H + 2 * K, d)
        qk = rotate(qkv[:, :, : H + K], cos, sin)
        x = x + self.out(attend(qk[:, :, :H], qk[:, :, H:], qkv[:, :, H + K :]))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size)
        self._rope = None

    @property
    def head(self):
        """The head's weight [V,D], which the kernels read directly."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, tokens):
        """tokens [B,T] int64, padded on the right -> final hidden states [B,T,D]."""
        return self._run(tokens, self._positions(tokens.shape[1], tokens.device), lambda layer: causal_attention)

    def prefill(self, tokens, cache, rows):
        """As forward, and writes keys and values of tokens [B,T] to positions 0..T-1 of cache rows [B]."""
        T = tokens.shape[1]

        def attend(layer):
            def write_and_attend(q, k, v):
                cache.k[layer, rows, :, :T] = k.transpose(1, 2)
                cache.v[layer, rows, :, :T] = v.transpose(1, 2)
                return causal_attention(q, k, v)

            return write_and_attend

        return self._run(tokens, self._positions(T, tokens.device), attend)

    def decode(self, tokens, cache, length, longest):
        """One token for each of the cache's first B rows: tokens [B], length [B] (tokens already there),
        longest = length.max() as an int. Returns hidden [B,D]; the caller adds 1 to length."""
        B = tokens.shape[0]
        cos, sin = self._rope_tables(tokens.device)
        rows = torch.arange(B, device=tokens.device)
        visible = torch.arange(longest + 1, device=tokens.device) <= length[:, None]  # (B, t)

        def attend(layer):
            k_cache, v_cache = cache.k[layer], cache.v[layer]

            def write_and_attend(q, k, v):
                k_cache[rows, :, length] = k[:, 0]
                v_cache[rows, :, length] = v[:, 0]
                return cached_attention(q, k_cache[:B, :, : longest + 1], v_cache[:B, :, : longest + 1], visible)

            return write_and_attend

        here = (cos[length][:, None, None], sin[length][:, None, None])  # (B, 1, 1, d)
        return self._run(tokens[:, None], here, attend)[:, 0]

    def _run(self, tokens, rope, attend):
        x = self.embed(tokens)
        cos, sin = (table.to(x.dtype) for table in rope)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend(i))
        return self.norm(x)

    def _rope_tables(self, device):
        if self._rope is None or self._rope[0].device != device:
            self._rope = rope_tables(self.cfg, device)
        return self._rope

    def _positions(self, T, device):
        cos, sin = self._rope_tables(device)
        if len(cos) < T:
            raise UserError(f"{T} tokens exceed the model's context of {len(cos)}; shorten the text")
        return cos[:T, None], sin[:T, None]  # (T, 1, d)

    def logits(self, hidden):
        """hidden [...,D] -> logits [...,V] float32. Whole: for tests and small looks."""
        return F.linear(hidden.float(), self.head.float())


def causal_attention(q, k, v):
    """q [B,T,H,d], k, v [B,T,K,d] -> [B,T,H*d]; position t sees positions 0..t."""
    B, T, H, d = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != H)
    return out.transpose(1, 2).reshape(B, T, H * d)


def cached_attention(q, k, v, visible):
    """One query per row over its own past. q [B,1,H,d], k, v [B,K,t,d], visible [B,t] -> [B,1,H*d].

    The H/K query heads that share a key head stand as so many queries of that head, so that grouped
    keys are read once and never repeated in memory.
    """
    B, _, H, d = q.shape
    K = k.shape[1]
    out = F.scaled_dot_product_attention(q.view(B, K, H // K, d), k, v, attn_mask=visible[:, None, None])
    return out.reshape(B, 1, H * d)


def pad_right(rows):
    """Lists of token ids -> tokens [B,T] int64 with zeros on the right, length [B]. The zeros are never
    looked at: causal attention cannot see them and every mask is made from the lengths."""
    length = torch.tensor([len(r) for r in rows])
    tokens = torch.zeros(len(rows), int(length.max()), dtype=torch.int64)
    for i, r in enumerate(rows):
        tokens[i, : len(r)] = torch.tensor(r, dtype=torch.int64)
    return tokens, length


def token_logprobs(model, tokens, targets, temperature):
    """Log-probs of chosen tokens under the model: the one path that sampler checks, SFT, RL and DPO share.

    tokens [B,T] int64 right-padded; targets [B,T] bool, True where tokens[b,t] is to be predicted (never
    at t=0). Returns logprob [N], entropy [N] in row-major order of targets; the head runs on those N
    positions only.
    """
    hidden = model(tokens[:, :-1])[targets[:, 1:]]  # (N, D): the state before each target
    logprob, _, entropy = linear_logprob(hidden, model.head, tokens[targets], temperature)
    return logprob, entropy


def init_weights(model, generator):
    """Random weights for a model from nothing: std = 1/sqrt(fan_in), the two matrices that write to the
    residual stream scaled down by 1/sqrt(2L). (The usual fixed 0.02 learns far slower at width 64.)"""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            std = p.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std *= (2 * model.cfg.num_hidden_layers) ** -0.5
            p.normal_(0.0, std, generator=generator)
    return model


# ----------------------------------------------------------------------------------------------------
# Files. Our names are fused and short; the file's names are transformers'.


def _file_names(cfg):
    """our parameter name -> (names in the file, their row counts): several names are stacked by rows."""
    H, K, d, inner = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.intermediate_size
    table = {"embed.weight": (["model.embed_tokens.weight"], None), "norm.weight": (["model.norm.weight"], None)}
    if not cfg.tie_word_embeddings:
        table["lm_head.weight"] = (["lm_head.weight"], None)
    for i in range(cfg.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        table[ours + "qkv.weight"] = ([theirs + f"self_attn.{x}_proj.weight" for x in "qkv"], [H * d, K * d, K * d])
        table[ours + "out.weight"] = ([theirs + "self_attn.o_proj.weight"], None)
        table[ours + "gate_up.weight"] = ([theirs + f"mlp.{x}_proj.weight" for x in ("gate", "up")], [inner, inner])
        table[ours + "down.weight"] = ([theirs + "mlp.down_proj.weight"], None)
        table[ours + "attn_norm.weight"] = ([theirs + "input_layernorm.weight"], None)
        table[ours + "mlp_norm.weight"] = ([theirs + "post_attention_layernorm.weight"], None)
    return table


def _read_json(path):
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give a folder that holds config.json and model.safetensors") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} cannot be read ({e}); copy it again") from None


def _weight_files(folder):
    """tensor name -> file, from one safetensors file or from the index of many shards."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index} holds no weight_map; copy it again")
        bad = [name for name in shards.values() if Path(name).name != name]
        if bad:
            raise UserError(f"{index}: shard {bad[0]!r} lies outside the folder; refuse such a checkpoint")
        return {tensor: folder / shard for tensor, shard in shards.items()}
    path = folder / "model.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing; give a folder that holds config.json and model.safetensors")
    with open_safetensors(path) as f:
        return dict.fromkeys(f.keys(), path)  # noqa: SIM118 (not a dict)


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is truncated or not safetensors ({e}); copy or build it again") from None


def load_weights(model, folder):
    """Fill the model's parameters from a transformers-style folder, one tensor at a time."""
    where = _weight_files(folder)
    ours = dict(model.named_parameters())
    for name, (names, rows) in _file_names(model.cfg).items():
        parts = []
        for file_name in names:
            if file_name not in where:
                raise UserError(f"{folder}: tensor {file_name} is missing; config.json and weights do not match")
            with open_safetensors(where[file_name]) as f:
                parts.append(f.get_tensor(file_name))
        want = ours[name].shape
        shapes = [tuple(p.shape) for p in parts]
        expected = [(r, *want[1:]) for r in rows] if rows else [tuple(want)]
        if shapes != expected:
            raise UserError(f"{folder}: {names[0]} has shape {shapes[0]}, config.json says {expected[0]}")
        with torch.no_grad():
            ours[name].copy_(torch.cat(parts) if rows else parts[0])


def resolve(name_or_dir):
    """A folder with a config.json: the path itself, the newest step_* inside it, or a known name."""
    path = Path(name_or_dir)
    if name_or_dir == "smollm2":
        path = Path("runs/models/smollm2")
        if not (path / "config.json").exists():
            from gguf_import import convert_gguf, find_smollm2

            source = find_smollm2()
            print(f"converting {source.name} to {path} (once)")
            convert_gguf(source, path)
    steps = sorted(p for p in path.glob("step_*") if (p / "config.json").exists()) if path.is_dir() else []
    if steps and not (path / "config.json").exists():
        path = steps[-1]
    if not (path / "config.json").exists():
        raise UserError(f"no model at {name_or_dir!r}: give a folder with config.json, or the name smollm2")
    return path


def load_model(name_or_dir, device="cpu", dtype=torch.float32):
    """(model, tokenizer) from a transformers-style folder, a run directory, or the name "smollm2"."""
    folder = resolve(str(name_or_dir))
    cfg = Config.from_json(folder / "config.json")
    with torch.device(device):
        model = Transformer(cfg).to(dtype)
    load_weights(model, folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.n_vocab > cfg.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.n_vocab} tokens, the model {cfg.vocab_size}")
    return model, tokenizer


def save_model(folder, model, tokenizer: Tokenizer):
    """Write a folder that transformers reads. Atomic: a temporary name first, then a rename."""
    folder = Path(folder)
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_model(temporary, model, tokenizer)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def write_model(folder, model, tokenizer):
    """config.json, model.safetensors and tokenizer files into an existing folder."""
    ours = dict(model.named_parameters())
    tensors = {}
    for name, (names, rows) in _file_names(model.cfg).items():
        parts = ours[name].detach().split(rows) if rows else [ours[name].detach()]
        tensors |= {n: p.contiguous().cpu() for n, p in zip(names, parts)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.cfg.to_json(tokenizer), indent=2) + "\n")
    tokenizer.save(folder)
