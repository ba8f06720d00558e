"""The Transformer against itself (cache, padding, grouped queries), and its files. test_families.py has transformers."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from toy import tiny_model

import model as model_file
from infra.cli import UserError
from model import (
    KVCache,
    load_model,
    load_weights,
    pad_right,
    resolve,
    save_model,
    shared_prefixes,
    token_logprobs,
    token_loss,
)
from sample import generate

ROWS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9], [7, 9, 3]]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


# ----------------------------------------------------------------------------------------------------
# The model against itself


@torch.no_grad()
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_decoding_with_the_cache_equals_one_forward_pass(heads, kv_heads):
    model = tiny_model(heads=heads, kv_heads=kv_heads)
    tokens, length = pad_right([row * 3 for row in ROWS])
    whole = model(tokens)
    cache = KVCache(model.cfg, len(ROWS) + 2, 32, "cpu", torch.float32)
    cache.k.fill_(1e4)  # what lies beyond a row's length must not be read
    cache.v.fill_(1e4)
    prompt_len = torch.tensor([4, 1, 6, 2])
    for b, n in enumerate(prompt_len.tolist()):
        states = model.prefill(tokens[b : b + 1, :n], cache, torch.tensor([b]))
        close(states[0], whole[b, :n])
    at = prompt_len.clone()
    for _ in range(int(length.max())):
        alive = at < length
        hidden = model.decode(tokens[torch.arange(len(at)), at.clamp(max=length - 1)], cache,
                              at.clamp(max=length - 1), int(at.clamp(max=length - 1).max()))
        close(hidden[alive], whole[alive.nonzero()[:, 0], at[alive]])
        at += alive


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it(model):
    tokens, length = pad_right(ROWS)
    filled = tokens.clone()
    filled[torch.arange(tokens.shape[1]) >= length[:, None]] = 11  # as if padding were EOS
    for b, row in enumerate(ROWS):
        alone = model(torch.tensor([row]))[0]
        for padded in (tokens, filled):
            close(model(padded)[b, : len(row)], alone)


def few_letters(seed):
    """Rows of up to nine tokens from an alphabet of three, 0 among them: many share how they begin. The padding is 0 too."""
    rng = torch.Generator().manual_seed(seed)
    B, T = (int(torch.randint(1, n, (1,), generator=rng)) for n in (12, 10))
    length = torch.randint(1, T + 1, (B,), generator=rng)
    return torch.randint(0, 3, (B, T), generator=rng) * (torch.arange(T) < length[:, None]), length


@pytest.mark.parametrize("seed", range(20))
def test_every_distinct_prefix_has_one_number(seed):
    tokens, length = few_letters(seed)
    node, first = shared_prefixes(tokens, length, worth=1.0)
    numbers = {}
    for b, n in enumerate(length.tolist()):
        for t in range(n):
            numbers.setdefault(tuple(tokens[b, : t + 1].tolist()), set()).add(int(node[b, t]))
    assert sorted(numbers.values(), key=min) == [{m} for m in range(len(numbers))] and len(first) - len(numbers) in range(32)
    for prefix, (m,) in ((p, tuple(n)) for p, n in numbers.items()):
        b, t = divmod(int(first[m]), tokens.shape[1])
        assert tuple(tokens[b, : t + 1].tolist()) == prefix


def test_rows_with_nothing_in_common_are_left_alone():
    tokens = torch.arange(12).view(3, 4)
    assert shared_prefixes(tokens, torch.tensor([4, 4, 4])) is None
    tokens[2, :3] = tokens[1, :3]
    assert shared_prefixes(tokens, torch.tensor([4, 4, 4]))[0].unique().tolist() == list(range(9))


def test_what_is_shared_gives_the_same_loss_and_gradients(model):
    tokens, length = few_letters(3)
    tokens, length = torch.cat([tokens, tokens]), torch.cat([length, length])  # whole rows twice, too
    targets = (torch.arange(tokens.shape[1]) < length[:, None]) & (torch.arange(tokens.shape[1]) > 0)
    weight, found = torch.randn(int(targets.sum()), generator=torch.Generator().manual_seed(0)), []
    node, _ = shared_prefixes(tokens[:, :-1], length - 1)
    for given in (None, length):
        model.zero_grad()
        loss, logprob, _ = token_loss(model, tokens, targets, 0.7, lambda lp, entropy, w: (lp * w).sum(), weight, length=given)
        loss.backward()
        again, _ = token_logprobs(model, tokens, targets, 0.7, given)
        found.append([loss, logprob, again, *[p.grad for p in model.parameters()]])
    assert len(node.unique()) < 0.6 * int(length.sum())
    for a, b in zip(*found):
        close(a, b.detach())


@torch.no_grad()
def test_no_state_sees_a_later_token(model):
    a, b = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[1, 2, 3, 9, 9]])
    assert torch.equal(model(a)[:, :3], model(b)[:, :3])
    assert not torch.allclose(model(a)[:, 3:], model(b)[:, 3:], atol=1e-3)


@torch.no_grad()
def test_grouped_queries_equal_repeated_keys_and_values():
    grouped, plain = tiny_model(heads=4, kv_heads=2), tiny_model(heads=4, kv_heads=4)
    state = grouped.state_dict()
    for name in [n for n in state if n.endswith("qkv.weight")]:
        q, k, v = state[name].split([16, 8, 8])
        k, v = (x.view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16) for x in (k, v))
        state[name] = torch.cat([q, k, v])
    plain.load_state_dict(state)
    tokens, _ = pad_right(ROWS)
    close(grouped(tokens), plain(tokens))


def test_float32_on_cuda_repeats_keys_for_pytorchs_fused_attention(monkeypatch):
    """There enable_gqa in float32 means the kernel that stores every score. Same numbers, other arguments."""
    q, (k, v) = torch.randn(2, 5, 6, 4), torch.randn(2, 2, 5, 2, 4)
    shared, seen, original = model_file.causal_attention(q, k, v), [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **o: (seen.append((k.shape[1], o["enable_gqa"])), original(q, k, v, **o))[1])
    assert not model_file.repeats_keys(q)  # a CPU
    for repeats in (False, True):
        monkeypatch.setattr(model_file, "repeats_keys", lambda q, repeats=repeats: repeats)
        torch.testing.assert_close(model_file.causal_attention(q, k, v), shared, atol=1e-6, rtol=1e-6)
    assert seen == [(2, True), (6, False)]


def test_training_mode_changes_nothing(model):
    tokens, _ = pad_right(ROWS)
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_token_logprobs_are_those_of_the_logits(model):
    tokens, length = pad_right(ROWS)
    t = torch.arange(tokens.shape[1])
    targets = (t >= 1) & (t < length[:, None]) & (t != 4)
    logprob, entropy = token_logprobs(model, tokens, targets, temperature=0.7)
    expected, expected_entropy = [], []
    for row in ROWS:
        logp = (model.logits(model(torch.tensor([row])))[0] / 0.7).log_softmax(-1)
        for i in range(1, len(row)):
            if i != 4:
                expected.append(logp[i - 1, row[i]])
                expected_entropy.append(-(logp[i - 1].exp() * logp[i - 1]).sum())
    close(logprob, torch.stack(expected))
    close(entropy, torch.stack(expected_entropy))


def test_a_text_longer_than_the_context_is_refused(model):
    model(torch.zeros(1, 32, dtype=torch.int64))
    with pytest.raises(UserError, match="context of 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(UserError, match="prompt 1 has 32 tokens"):
        generate(model, [[1], [1] * 32], max_new_tokens=1, temperature=1.0, seed=0, stop_ids=[11])


# ----------------------------------------------------------------------------------------------------
# Files


def same_weights(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def shard(folder):
    """model.safetensors -> two shards and an index, as large models are published."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in tensors if where[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_return_every_bit(tmp_path, tokenizer, tied):
    model = tiny_model(tied=tied)
    for _ in range(2):  # the second time over an existing folder
        save_model(tmp_path / "m", model, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]  # no temporary folder stays behind
    loaded, loaded_tokenizer = load_model(tmp_path / "m")
    assert loaded.cfg == model.cfg and same_weights(loaded, model)
    assert loaded_tokenizer.fingerprint == tokenizer.fingerprint
    assert ("lm_head.weight" in load_file(tmp_path / "m" / "model.safetensors")) == (not tied)
    shard(tmp_path / "m")
    assert same_weights(load_model(tmp_path / "m")[0], model)


def test_a_run_directory_gives_its_newest_checkpoint(tmp_path, tokenizer):
    for seed, step in [(1, 5), (3, 1000), (2, 100)]:
        save_model(tmp_path / f"step_{step:06d}", tiny_model(seed), tokenizer)
    assert same_weights(load_model(tmp_path)[0], tiny_model(3))


@pytest.fixture
def folder(tmp_path, tokenizer, model):
    save_model(tmp_path / "m", model, tokenizer)
    return tmp_path / "m"


def refuse(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, match", [
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "needs low_freq_factor"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "rope_scaling"),
    (dict(attention_bias=True), "attention_bias"), (dict(mlp_bias=True), "mlp_bias"),
    (dict(model_type="mixtral"), "'mixtral'"), (dict(model_type=None), "None"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(model_type="qwen2"), "q_proj.bias is missing"),
    (dict(vocab_size=None), "config.json"), (dict(hidden_size=None, head_dim=None), "config.json"),
    (dict(num_attention_heads=None, head_dim=None), "config.json"),
    (dict(vocab_size=13), "shape"), (dict(vocab_size=11), "shape|tokenizer has 12"),
    (dict(intermediate_size=25), "shape"), (dict(num_hidden_layers=3), "missing"),
    (dict(num_key_value_heads=1), "shape"),
    (dict(tie_word_embeddings=False), "lm_head.weight is missing"),
])
def test_a_config_that_does_not_fit_is_refused(folder, change, match):
    raw = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None or k not in change}))
    refuse(folder, match)


def test_damaged_and_missing_weights_are_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:cut])
        refuse(folder, "truncated")
    (folder / "model.safetensors").unlink()
    refuse(folder, "model.safetensors is missing")
    for damaged in ("{", "[1]", ""):
        (folder / "config.json").write_text(damaged)
        refuse(folder, "config.json cannot be read")
    with pytest.raises(UserError, match="no model at"):
        resolve(str(folder / "nowhere"))


@pytest.mark.parametrize("outside", ["../m2/model.safetensors", "/tmp/model.safetensors", "sub/model.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(folder, outside):
    shutil.copytree(folder, folder.parent / "m2")
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = outside
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, "outside the folder")


def test_an_index_with_a_missing_shard_is_refused(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuse(folder, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    refuse(folder, "index.json")


def test_other_weights_than_the_config_says_do_not_load(folder):
    with pytest.raises(UserError, match="shape"):
        load_weights(tiny_model(kv_heads=4), folder)
    with pytest.raises(UserError, match="missing"):
        load_weights(tiny_model(layers=3), folder)
