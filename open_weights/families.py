"""The families of open weights: what differs from Llama, in one table; config.json by that table.

    llama    Llama 1-3.3, SmolLM 1-2 and every model in their shape (Llama 3.1 and later stretch
             the rotary angles: "llama3")
    qwen2    Qwen2, Qwen2.5 (also -Math, -Coder), DeepSeek-R1-Distill-Qwen: biases on q, k and v
    qwen3    Qwen3, dense: q and k are normalised head by head, head_dim is independent of the width
    gemma2   Gemma 2: embeddings times sqrt(D), four norms a block that multiply by 1 + w, GELU,
             soft caps on attention scores and logits, a scale for the scores that the file gives,
             every second layer looks back over a window only

model.py computes what this table says; nothing else in the code asks for a family's name. Reading
is strict: a field of config.json that would change the arithmetic and is not supported, or that is
not known at all, is refused by name, because a model that is computed slightly wrong talks well
enough to waste a week.

Left out: biases elsewhere, other stretched rotary angles (yarn, linear, dynamic), experts,
quantised weights, SmolLM3, Gemma 3.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from infra.cli import UserError


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    architecture: str  # the class in transformers
    qkv_bias: bool = False  # q, k and v add a bias
    qk_norm: bool = False  # RMSNorm over each head of q and of k, before the rotation
    # embeddings * sqrt(D); norms also behind attention and MLP; norms multiply by 1 + w
    gemma: bool = False
    activation: str = "silu"  # of the gate
    activation_field: str = "hidden_act"  # ... and the field that says so
    fields: tuple = ()  # fields of config.json that mean something in this family only
    defaults: tuple = ()  # what transformers takes where config.json is silent


QWEN = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
CAPS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
GEMMA = (*CAPS, "sliding_window", "layer_types")

FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family(
        "Qwen2ForCausalLM", qkv_bias=True, fields=QWEN, defaults=(("max_window_layers", 28),)),
    "qwen3": Family(
        "Qwen3ForCausalLM", qk_norm=True, fields=QWEN,
        defaults=(("max_window_layers", 28), ("head_dim", 128))),
    "gemma2": Family(
        "Gemma2ForCausalLM", gemma=True,
        activation="gelu_pytorch_tanh", activation_field="hidden_activation",
        # two more, which transformers does not look at
        fields=GEMMA + ("hidden_act", "sliding_window_size"),
        defaults=(("query_pre_attn_scalar", 256), ("attn_logit_softcapping", 50.0),
                  ("sliding_window", 4096), ("final_logit_softcapping", 30.0), ("head_dim", 256),
                  ("tie_word_embeddings", True), ("hidden_activation", "gelu_pytorch_tanh"))),
}

# Fields that say nothing about the arithmetic of a forward pass (dropout: see model.py).
HARMLESS = [
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version",
    "transformers.js_config", "_name_or_path", "name_or_path", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "use_cache", "cache_implementation", "initializer_range",
    "pretraining_tp", "attention_dropout", "hidden_dropout", "_attn_implementation",
    "attn_implementation", "_attn_implementation_autoset", "is_llama_config", "unsloth_fixed",
    "unsloth_version", "max_length", "return_dict", "task_specific_params", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "is_decoder", "chunk_size_feed_forward",
    "problem_type", "tokenizer_class", "neftune_noise_alpha"]
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class Config:
    """Names and meaning as in a transformers config.json. The defaults below num_key_value_heads'
    are those of a model made here from nothing; from_json takes transformers'."""

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
    model_type: str = "llama"
    rope_scaling: dict | None = None  # Llama 3.1's: see kernels.pointwise.rope_frequencies
    # tokens that a layer marked "sliding_attention" sees, itself included
    sliding_window: int | None = None
    # "full_attention" or "sliding_attention" for each layer; None: all full
    layer_types: list | None = None
    # scores are divided by its root; None: by the root of head_dim
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    @property
    def family(self):
        return FAMILIES[self.model_type]

    def window(self, layer):
        """Tokens that this layer sees, or None for all."""
        if self.layer_types and self.layer_types[layer] == "sliding_attention":
            return self.sliding_window
        return None

    @classmethod
    def from_json(cls, path):
        """Read config.json; refuse what this model would compute wrongly rather than ignore it."""
        raw = read_json(path)
        try:
            cfg = cls(**_fields(raw))
            _check(cfg)
            return cfg
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
        except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as e:
            what = f"{e} is missing" if isinstance(e, KeyError) else e
            raise UserError(
                f"{path}: {what}; is this the config.json of a language model?") from None

    def to_json(self, dtype="float32", tokenizer=None):
        """The config.json that transformers 4 and 5 and vLLM read. dtype: of the weights in the
        file."""
        family = self.family
        apart = (*QWEN, *GEMMA, "rope_scaling")
        raw = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in apart}
        raw |= dict(architectures=[family.architecture], torch_dtype=dtype)
        raw[family.activation_field] = family.activation
        if self.rope_scaling:
            raw["rope_scaling"] = dict(self.rope_scaling)
        if not family.qkv_bias:  # Qwen2 has no such field: there the biases are a matter of course
            raw["attention_bias"] = False
        if self.model_type == "llama":
            raw["mlp_bias"] = False
        types = self.layer_types or ["full_attention"] * self.num_hidden_layers
        windows = "sliding_attention" in types
        if family.gemma:  # transformers makes the window's mask whether a layer uses it or not
            raw |= {name: getattr(self, name) for name in GEMMA}
            raw |= dict(hidden_act=family.activation, layer_types=types)
            raw["sliding_window"] = self.sliding_window or self.max_position_embeddings
        elif "use_sliding_window" in family.fields:
            full = types.index("sliding_attention") if windows else self.num_hidden_layers
            raw |= dict(use_sliding_window=windows, max_window_layers=full, layer_types=types,
                        sliding_window=self.sliding_window if windows else None)
        if tokenizer is not None:
            raw |= dict(bos_token_id=tokenizer.bos_id, eos_token_id=list(tokenizer.eos_ids))
        return raw


def read_json(path):
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; give a folder that holds config.json and model.safetensors"
        ) from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} cannot be read ({e}); copy it again") from None


def _fields(raw):
    """config.json -> the fields of Config. UserError names what is not supported."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is not supported (only {', '.join(FAMILIES)})")
    family = FAMILIES[kind]
    raw = dict(tie_word_embeddings=False, rms_norm_eps=1e-6) | dict(family.defaults) | raw
    if kind == "llama":  # the first Llama's files had no such field
        raw.setdefault("num_key_value_heads", None)
    raw["num_key_value_heads"] = raw["num_key_value_heads"] or raw["num_attention_heads"]
    raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    activation = raw.get(family.activation_field, "silu")
    if activation != family.activation:
        raise UserError(f"{family.activation_field}={activation!r} is not supported (in {kind} "
                        f"only {family.activation!r} is)")
    apart = (*QWEN, *GEMMA, "rope_scaling", "rope_theta")
    basic = [name for name in Config.__dataclass_fields__ if name not in apart]
    known = {*HARMLESS, *basic, *family.fields, family.activation_field, "layer_types",
             "rope_theta", "rope_scaling", "rope_parameters"}
    for name, value in raw.items():
        if name not in known and value and not (name == "partial_rotary_factor" and value == 1):
            raise UserError(f"{name}={value!r} is not supported, it may change what the model "
                            "computes (take the field out if you know that it does not)")
    theta, scaling = _rope(raw)
    window, types = _windows(raw, kind)
    caps = {name: raw.get(name) for name in CAPS if name in family.fields}
    more = dict(rope_theta=theta, rope_scaling=scaling, sliding_window=window, layer_types=types)
    return {name: raw[name] for name in basic} | caps | more


def _rope(raw):
    """rope_theta and rope_scaling, from where transformers 4 (rope_theta, rope_scaling) or 5
    (rope_parameters) keeps them."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_scaling of type {kind!r} is not supported (only 'llama3' is)")
    known = {"rope_theta", "rope_type", "type", *(LLAMA3 if kind == "llama3" else ())}
    strange = [n for n in rope if n not in known and rope[n] not in (None, False, 1.0)]
    if strange:
        raise UserError(f"rope_scaling with {strange[0]}={rope[strange[0]]!r} is not supported")
    if kind == "default":
        return theta, None
    if missing := [name for name in LLAMA3 if not isinstance(rope.get(name), (int, float))]:
        raise UserError(f"rope_scaling of type 'llama3' needs {missing[0]}")
    if not 0 < rope["low_freq_factor"] < rope["high_freq_factor"] or rope["factor"] <= 0:
        raise UserError(f"rope_scaling={rope!r}: it needs 0 < low_freq_factor < high_freq_factor "
                        "and factor > 0")
    return theta, dict(rope_type="llama3") | {name: rope[name] for name in LLAMA3}


def _windows(raw, kind):
    """sliding_window and layer_types; both None if every layer sees everything."""
    layers = raw["num_hidden_layers"]
    window = raw.get("sliding_window")
    if kind == "gemma2":  # the even layers, in every release of transformers
        types = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    elif raw.get("use_sliding_window"):
        full = min(layers, raw["max_window_layers"])
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    else:
        window = None
        types = ["full_attention"] * layers
    types = raw.get("layer_types") or types
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UserError(f"layer_types={types!r} is not supported: one full_attention or "
                        "sliding_attention for each layer")
    if "sliding_attention" not in types:
        return None, None
    if not isinstance(window, int) or window < 1:
        raise UserError(f"sliding_window={window!r} with layers of sliding_attention; it must be "
                        "a number of tokens")
    return window, types


def _check(cfg):
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim",
                 "max_position_embeddings"):
        if type(getattr(cfg, name)) is not int or getattr(cfg, name) < 1:
            value = getattr(cfg, name)
            raise UserError(f"{name}={value!r} must be a whole number above 0 in config.json")
    for name in ("rms_norm_eps", "rope_theta", *CAPS):
        value = getattr(cfg, name)
        if value is None and name in CAPS:
            continue
        if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
            raise UserError(f"{name}={value!r} must be a number above 0")
    if cfg.num_attention_heads % cfg.num_key_value_heads or cfg.head_dim % 2:
        raise UserError(f"num_attention_heads={cfg.num_attention_heads}, "
                        f"num_key_value_heads={cfg.num_key_value_heads}, head_dim={cfg.head_dim}: "
                        "heads must divide evenly among key heads, and head_dim be even")


def file_names(cfg):
    """Our parameter name -> [(name in the file, rows)], stacked in that order; rows None: the whole
    parameter."""
    H, K, d = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    inner = cfg.intermediate_size
    family = cfg.family
    qkv = list(zip("qkv", (H * d, K * d, K * d)))
    table = {"embed.weight": [("model.embed_tokens.weight", None)],
             "norm.weight": [("model.norm.weight", None)]}
    if not cfg.tie_word_embeddings:
        table["lm_head.weight"] = [("lm_head.weight", None)]
    single = {"out": "self_attn.o_proj", "down": "mlp.down_proj", "attn_norm": "input_layernorm",
              "mlp_norm": "post_attention_layernorm"}
    if family.gemma:
        single |= {"post_attn_norm": "post_attention_layernorm",
                   "mlp_norm": "pre_feedforward_layernorm",
                   "post_mlp_norm": "post_feedforward_layernorm"}
    if family.qk_norm:
        single |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for i in range(cfg.num_hidden_layers):
        ours = f"layers.{i}."
        theirs = f"model.layers.{i}."
        attn = f"{theirs}self_attn."
        mlp = f"{theirs}mlp."
        table[ours + "qkv.weight"] = [(f"{attn}{x}_proj.weight", rows) for x, rows in qkv]
        table[ours + "gate_up.weight"] = [(f"{mlp}{x}_proj.weight", inner) for x in ("gate", "up")]
        if family.qkv_bias:
            table[ours + "qkv_bias"] = [(f"{attn}{x}_proj.bias", rows) for x, rows in qkv]
        table |= {f"{ours}{a}.weight": [(f"{theirs}{b}.weight", None)] for a, b in single.items()}
    return table
