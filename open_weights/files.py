"""Weights on disk: a folder as transformers writes it, read and written tensor by tensor.

    config.json
    model.safetensors     or  model-00001-of-00002.safetensors ... and model.safetensors.index.json
    tokenizer.json, tokenizer_config.json

Reading copies each tensor once, from the file's pages to its place in the model (its dtype, its
device); there is never a second copy of the model in memory. All headers are compared with
config.json before anything is copied.

Left out: pickled weights (pytorch_model.bin runs code when it is read), quantised weights, several
processes.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infra.cli import UserError
from infra.runs import by_step
from open_weights.families import file_names, read_json
from open_weights.tokenizer import Tokenizer

# A larger model is saved in several files, of which one at a time stands in memory twice.
SHARD_BYTES = 5_000_000_000
FLOATS = ("F64", "F32", "F16", "BF16")
# Rotary angles, which older files hold for each layer and some once for the model: they follow from
# config.json, and transformers does not read them either.
STALE = re.compile(r"(\w+\.)*rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


# ----------------------------------------------------------------------------------------------------
# Reading


def weight_files(folder):
    """The safetensors files of a folder: one, or those that an index names. UserError: a file is
    missing, or lies outside the folder."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists() or single.is_symlink():
        files = [single]
    elif index.exists():
        shards = read_json(inside(index, folder)).get("weight_map")
        names = shards.values() if isinstance(shards, dict) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{index} holds no weight_map; copy it again")
        files = [folder / shard for shard in sorted(set(shards.values()))]
    else:
        pickled = next(folder.glob("pytorch_model*.bin"), None)
        hint = "give a folder that holds config.json and model.safetensors"
        if pickled:
            hint = f"{pickled.name} is pickled and not read: take a safetensors release"
        raise UserError(f"{single} is missing; {hint}")
    for path in files:
        if path.parent != folder or path.name in ("", ".", ".."):
            raise UserError(f"{index}: shard {str(path)!r} lies outside the folder; do not trust "
                            "such a checkpoint")
        if not inside(path, folder).exists():
            raise UserError(f"{path} is missing; copy or download the folder again")
    return files


def inside(path, folder):
    """path itself, unless a symbolic link leads it out of the folder. The hub's cache is laid out
    in links to its blobs."""
    root = folder.resolve()
    target = path.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if target.parent not in (root, blobs):
        raise UserError(f"{path} links to {target}, which lies outside the folder; do not trust "
                        "such a checkpoint")
    return path


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(
            f"{path} is truncated or not safetensors ({e}); copy or build it again") from None


def check_headers(folder, files, want, tied):
    """Compare names, shapes and kinds of numbers in the files with want {name: shape}; copies
    nothing."""
    seen = set()
    for path in files:
        with open_safetensors(path) as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                header = f.get_slice(name)
                shape = tuple(header.get_shape())
                kind = header.get_dtype()
                if name in seen:
                    raise UserError(f"{folder}: tensor {name} stands in two files; download the "
                                    "folder again")
                if STALE.fullmatch(name) or (tied and name == "lm_head.weight"):
                    continue
                if name not in want:
                    raise UserError(f"{folder}: unexpected tensor {name}; config.json and weights "
                                    "do not match")
                if shape != want[name]:
                    raise UserError(
                        f"{folder}: {name} has shape {shape}, config.json says {want[name]}")
                if kind not in FLOATS:
                    raise UserError(f"{folder}: {name} is {kind}, a quantised model; take a "
                                    "release in bfloat16 or float32")
                seen.add(name)
    if missing := [name for name in want if name not in seen]:
        raise UserError(f"{folder}: tensor {missing[0]} is missing; config.json and weights do not "
                        "match")


@torch.no_grad()
def load_weights(model, folder, device=None):
    """Fill the model's parameters from a transformers-style folder. device: allocate them there
    first, once the headers are seen to fit (for a model built on torch.device("meta"), which has
    none yet)."""
    folder = Path(folder)
    tied = model.cfg.tie_word_embeddings
    files = weight_files(folder)
    ours = dict(model.named_parameters())
    want = {}  # name in the files -> shape
    place = {}  # name in the files -> (our name, first row, rows)
    for name, parts in file_names(model.cfg).items():
        start = 0
        for theirs, rows in parts:
            rows = len(ours[name]) if rows is None else rows
            want[theirs], place[theirs] = (rows, *ours[name].shape[1:]), (name, start, rows)
            start += rows
    check_headers(folder, files, want, tied)
    if device is not None:
        ours = dict(model.to_empty(device=device).named_parameters())
    for path in files:
        with open_safetensors(path) as f:
            for theirs in f.keys():  # noqa: SIM118
                if theirs in place:
                    name, start, rows = place[theirs]
                    ours[name].narrow(0, start, rows).copy_(f.get_tensor(theirs))
    for path in files if tied else ():
        require_same_head(folder, path, model.head.detach())


def require_same_head(folder, path, embedding):
    """Some write the tied head a second time; one that differs would be ignored. UserError then."""
    with open_safetensors(path) as f:
        if "lm_head.weight" not in f.keys():  # noqa: SIM118
            return
        if not torch.equal(f.get_tensor("lm_head.weight").to(embedding), embedding):
            raise UserError(f"{folder}: lm_head.weight is not the embedding; set "
                            "tie_word_embeddings to false in config.json")

# ----------------------------------------------------------------------------------------------------
# Writing


def save_model(folder, model, tokenizer: Tokenizer, shard_bytes=SHARD_BYTES):
    """Write a folder that transformers reads. Atomic: a temporary name first, then a rename."""
    folder = Path(folder)
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_model(temporary, model, tokenizer, shard_bytes)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def write_model(folder, model, tokenizer, shard_bytes=SHARD_BYTES):
    """config.json, the weights and tokenizer files into an existing folder."""
    ours = dict(model.named_parameters())
    pieces = []
    for name, parts in file_names(model.cfg).items():
        whole = ours[name].detach()
        rows = [len(whole) if r is None else r for _, r in parts]
        pieces += zip([theirs for theirs, _ in parts], whole.split(rows))
    shards = [{}]
    size = 0
    for name, piece in pieces:
        if shards[-1] and size + piece.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = piece
        size += piece.nbytes
    one = len(shards) == 1
    where = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if one else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: p.contiguous().cpu() for n, p in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    if not one:
        index = dict(metadata=dict(total_size=sum(p.nbytes for _, p in pieces)), weight_map=where)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    dtype = str(model.head.dtype).removeprefix("torch.")
    config = json.dumps(model.cfg.to_json(dtype, tokenizer), indent=2)
    (folder / "config.json").write_text(config + "\n")
    tokenizer.save(folder)


# ----------------------------------------------------------------------------------------------------
# Names


def resolve(name_or_dir, verifier=False):
    """A folder with a config.json: the path itself, the newest step_* inside it, smollm2, or a
    model of the hub. UserError: there is none, or it holds a verifier where a language model is
    wanted, or the other way round."""
    path = Path(name_or_dir)
    if name_or_dir == "smollm2":
        path = Path("runs/models/smollm2")
        if not (path / "config.json").exists():
            from open_weights.gguf import convert_gguf, find_smollm2

            source = find_smollm2()
            print(f"converting {source.name} to {path} (once)")
            convert_gguf(source, path)
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{path} must be converted first: python -m open_weights.gguf {path} FOLDER"
                        ", then --model FOLDER")
    steps = [p for p in by_step(path.glob("step_*")) if (p / "config.json").exists()]
    if steps and not (path / "config.json").exists():
        path = steps[-1]
    if HUB_ID.fullmatch(str(name_or_dir)) and not path.parent.exists() and path.parts[0] != "runs":
        path = download(name_or_dir)
    if not (path / "config.json").exists():
        raise UserError(f"no model at {name_or_dir!r}: give a folder with config.json, the name "
                        "smollm2, or a hub id (not looked up where its first part is a folder)")
    if verifier and not (path / "verifier.json").exists():
        raise UserError(f"{name_or_dir} holds a language model, not a verifier; train one with "
                        "pav.py")
    if not verifier and (path / "verifier.json").exists():
        raise UserError(f"{name_or_dir} holds a verifier, not a language model: its head says what "
                        "a text is worth; give the policy's folder")
    return path


def download(hub_id):
    """A model of the Hugging Face hub -> its folder in the cache, where a second call finds it
    without the network."""
    name = hub_id.split("/")[1]
    by_hand = f"hf download {hub_id} --local-dir models/{name}, then give that folder"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"no folder {hub_id}; if it is a model of the hub: pip install "
                        "huggingface_hub, or put the files of "
                        f"https://huggingface.co/{hub_id}/tree/main into a folder and give that"
                        ) from None
    files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=files, ignore_patterns=["*/*"]))
    except Exception as e:  # no network, no such model, a licence to accept: many exceptions
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"no folder {hub_id}, and the hub gave none ({reason}); by hand: {by_hand}") from None
