"""Weights on disk: shards, one copy in memory, and folders that are damaged, incomplete or lead elsewhere."""

import importlib.util
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import tiny_model

from infra.cli import UserError
from model import Transformer, load_model, save_model
from open_weights import files as weights
from open_weights.files import resolve


@pytest.fixture
def folder(tmp_path, tokenizer, model):
    save_model(tmp_path / "m", model, tokenizer)
    return tmp_path / "m"


def refuse(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def rewrite(folder, change):
    """Apply change(tensors) to model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_model_is_saved_in_shards_that_transformers_reads(tmp_path, tokenizer, tied):
    model = tiny_model(tied=tied)
    save_model(tmp_path / "m", model, tokenizer, shard_bytes=3000)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "m" / name).stat().st_size < 3000 + 2000 for name in files)  # a header on top
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert set(index["weight_map"].values()) == set(files)
    loaded, _ = load_model(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        tokens = torch.tensor([[3, 1, 4, 1, 5]])
        with torch.no_grad():
            torch.testing.assert_close(theirs(tokens).logits, model.logits(model(tokens)), atol=1e-5, rtol=1e-5)


MEASURE = """
import resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from model import load_model
torch.zeros(8) @ torch.zeros(8)
load_model(sys.argv[3])  # everything that loading imports and keeps is there before a limit is drawn
for extra, dtype in [(4 / 3, torch.float32), (1 / 2 + 1 / 3, torch.bfloat16), (1 / 2, torch.float32)]:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(extra * int(sys.argv[4])), resource.RLIM_INFINITY))
    try:
        model, _ = load_model(sys.argv[2], dtype=dtype)
        print(sum(p.nbytes for p in model.parameters()))
    except (RuntimeError, MemoryError) as e:
        print("no room")
    model = None
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures the address space as Linux counts it")
def test_loading_needs_the_memory_of_one_copy(tmp_path, tokenizer):
    """In a process whose address space may grow by the model and a third of it, no second copy finds room (the ten shards are
    mapped one at a time, which is address space too). Nor does a float32 copy when the model is wanted in bfloat16."""
    cfg = replace(tiny_model().cfg, intermediate_size=83_000, num_hidden_layers=6)  # 16 MB a layer
    model = Transformer(cfg)
    size = sum(p.nbytes for p in model.parameters())
    save_model(tmp_path / "big", model, tokenizer, shard_bytes=size // 10)
    save_model(tmp_path / "small", tiny_model(), tokenizer)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(Path(__file__).parent.parent), tmp_path / "big", tmp_path / "small",
                          str(size)], capture_output=True, text=True)  # fmt: skip
    assert run.stdout.splitlines() == [str(size), str(size // 2), "no room"], run.stderr  # the limit does bite


def test_tensors_that_do_not_belong_are_refused(folder):
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq",
                 "model.rotary_emb.original_inv_freq", "model.layers.1.self_attn.rotary_emb.cos_cached"):
        rewrite(folder, lambda t, name=name: t.update({name: torch.ones(2)}))
        load_model(folder)  # older files hold these
    rewrite(folder, lambda t: t.update({"model.rotary_emb.weight": torch.ones(2)}))
    refuse(folder, r"unexpected tensor model\.rotary_emb\.weight")
    rewrite(folder, lambda t: t.pop("model.rotary_emb.weight"))
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}))
    refuse(folder, r"unexpected tensor model\.layers\.0\.self_attn\.q_proj\.bias")


def test_a_tied_head_that_is_stored_must_be_the_embedding(folder):
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(folder, dtype=torch.bfloat16)
    rewrite(folder, lambda t: t["lm_head.weight"].mul_(1.01))
    refuse(folder, "lm_head.weight is not the embedding")


def test_quantised_weights_are_refused(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}))
    refuse(folder, "model.norm.weight is I8, a quantised model")


def test_nothing_is_allocated_before_the_headers_fit(folder, monkeypatch):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | dict(intermediate_size=10**9, num_hidden_layers=2)))
    refuse(folder, "config.json says")  # 100 GB, had they been allocated first


def test_a_tensor_in_two_shards_is_refused(tmp_path, tokenizer, model):
    save_model(tmp_path / "m", model, tokenizer, shard_bytes=3000)
    first, second, *_ = sorted((tmp_path / "m").glob("*.safetensors"))
    save_file(load_file(second) | dict([next(iter(load_file(first).items()))]), second)
    refuse(tmp_path / "m", "stands in two files")


def test_a_cut_or_emptied_shard_is_refused(tmp_path, tokenizer, model):
    save_model(tmp_path / "m", model, tokenizer, shard_bytes=3000)
    last = sorted((tmp_path / "m").glob("*.safetensors"))[-1]
    tensors, whole = load_file(last), last.read_bytes()
    last.write_bytes(whole[:-1])
    refuse(tmp_path / "m", f"{last.name} is truncated")
    gone = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != gone}, last)
    refuse(tmp_path / "m", f"tensor {gone} is missing")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refuse(folder, "outside the folder")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nothing")
    refuse(folder, "is missing")


def test_the_links_of_the_hub_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--me--mine" / "blobs", tmp_path / "models--me--mine" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list(folder.iterdir()):
        path.rename(blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"sha-{path.name}")
    load_model(snapshot)


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refuse(folder, "pickled and not read")


def test_names_of_the_hub(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(name, **options):
        asked.append(name)
        if name == "me/none":
            raise OSError("no network\nat all")
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert resolve("me/mine-0.5B") == folder
    with pytest.raises(UserError, match=r"no network\); by hand: hf download me/none --local-dir models/none"):
        resolve("me/none")
    for path in ("runs/nothing", "m/nothing", "nothing", "../a/b", "a/b/c", "/a/b"):  # a mistyped path asks nobody
        with pytest.raises(UserError, match="no model at"):
            resolve(path)
    assert asked == ["me/mine-0.5B", "me/none"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        resolve("me/mine-0.5B")
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="python -m open_weights.gguf x.gguf"):
        resolve("x.gguf")


def test_shards_are_written_one_at_a_time(tmp_path, tokenizer, model, monkeypatch):
    sizes = []
    monkeypatch.setattr(weights, "save_file", lambda tensors, path, **kw: (sizes.append(sum(t.nbytes for t in tensors.values())),
                                                                           save_file(tensors, path, **kw)))
    save_model(tmp_path / "m", model, tokenizer, shard_bytes=3000)
    assert len(sizes) > 2 and max(sizes) <= 3000
