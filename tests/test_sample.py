"""The engine: a completion depends on the prompt, the seed and its id, and on nothing else."""

import itertools
import math

import pytest
import torch
from toy import EOS, make_rollouts, tiny_model

import sample
from engines import batch
from infra.cli import UserError
from kernels import linear_sample
from model import token_logprobs
from rollouts import pass_at_k
from sample import generate

OPTIONS = dict(max_new_tokens=12, temperature=1.0, seed=5, stop_ids=[EOS])


def ragged_prompts(n=40):
    g = torch.Generator().manual_seed(3)
    return [torch.randint(10, (1 + (7 * i) % 9,), generator=g).tolist() for i in range(n)]


@torch.no_grad()
def one_by_one(model, prompt, sequence_id, max_new_tokens=12, temperature=1.0, seed=5, stop_ids=(EOS,)):
    """What generate() promises, without cache, batch or slots: (completion, log-probs, finish reason)."""
    tokens, logprobs = list(prompt), []
    for position in range(max_new_tokens):
        hidden = model(torch.tensor([tokens]))[:, -1]
        at = torch.tensor([sequence_id]), torch.tensor([position])
        token, logprob = linear_sample(hidden, model.head, temperature, seed, *at)
        tokens.append(int(token))
        logprobs.append(float(logprob))
        if tokens[-1] in stop_ids:
            return tokens[len(prompt) :], logprobs, "stop"
        if len(tokens) == model.cfg.max_position_embeddings:
            break
    return tokens[len(prompt) :], logprobs, "length"


def same(a, i, b, j):
    """Row i of a and row j of b: tokens equal, log-probs close."""
    assert a.completion(i) == b.completion(j) and a.finish_reason[i] == b.finish_reason[j]
    torch.testing.assert_close(a.logprob[i][a.mask()[i]], b.logprob[j][b.mask()[j]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("slots", [1, 7, 64])
def test_batched_sampling_equals_one_sequence_at_a_time(model, slots):
    """More prompts than slots, ragged lengths: rows leave, others move into their places and new ones come."""
    prompts = ragged_prompts()
    out = generate(model, prompts, slots=slots, **OPTIONS)
    assert {"stop", "length"} == set(out.finish_reason)
    for i, prompt in enumerate(prompts):
        completion, logprobs, reason = one_by_one(model, prompt, i)
        assert out.completion(i) == completion and out.finish_reason[i] == reason
        assert out.tokens[i, : len(prompt)].tolist() == prompt and int(out.prompt_len[i]) == len(prompt)
        torch.testing.assert_close(out.logprob[i][out.mask()[i]], torch.tensor(logprobs), atol=1e-5, rtol=1e-5)
        assert (out.tokens[i, out.length[i] :] == 0).all() and (out.logprob[i][~out.mask()[i]] == 0).all()


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_order_and_company_do_not_change_a_completion(model, slots):
    prompts = ragged_prompts()
    whole = generate(model, prompts, slots=64, **OPTIONS)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()[:25]
    part = generate(model, [prompts[i] for i in order], sequence_ids=order, slots=slots, **OPTIONS)
    for row, i in enumerate(order):
        same(part, row, whole, i)


def test_seed_and_sequence_id_make_the_draw(model):
    prompts = [[1, 2, 3]] * 6
    a = generate(model, prompts, **OPTIONS)
    b = generate(model, prompts, sequence_ids=range(6, 12), **OPTIONS)
    c = generate(model, prompts, **(OPTIONS | dict(seed=6)))
    completions = [tuple(x.completion(i)) for x in (a, b, c) for i in range(6)]
    assert len(set(completions)) > 15  # of 18
    again = generate(model, prompts, **OPTIONS)
    assert torch.equal(again.tokens, a.tokens) and torch.equal(again.logprob, a.logprob)


def test_twins_share_a_prefill_and_get_their_own_draws(model, monkeypatch):
    rows = []
    prefill = type(model).prefill
    monkeypatch.setattr(type(model), "prefill", lambda self, t, c, r: rows.append(len(t)) or prefill(self, t, c, r))
    prompts = [p for p in ([4, 2], [9, 9, 1], [7]) for _ in range(8)]
    out = generate(model, prompts, **OPTIONS)
    assert sum(rows) == 3
    for first in (0, 8, 16):
        assert len({tuple(out.completion(i)) for i in range(first, first + 8)}) > 4


@pytest.mark.parametrize("slots", [3, 10, 64])
def test_sequences_with_equal_tokens_are_computed_once(model, monkeypatch, slots):
    """At a low temperature the samples of a prompt part late. Each is what it would be alone, and the rows of the steps
    are the distinct prefixes."""
    options = dict(max_new_tokens=10, temperature=0.3, seed=5, stop_ids=[EOS])
    decoded, decode = [], type(model).decode
    monkeypatch.setattr(type(model), "decode", lambda self, t, *a: decoded.append(len(t)) or decode(self, t, *a))
    monkeypatch.setattr(sample, "ROUND", 1)
    prompts = [p for p in ([4, 2], [9, 9, 1], [7], [4, 2, 5]) for _ in range(12)]
    out = generate(model, prompts, slots=slots, **options)
    for i in range(0, len(prompts), 5):
        completion, logprobs, reason = one_by_one(model, prompts[i], i, 10, 0.3)
        assert out.completion(i) == completion and out.finish_reason[i] == reason
        torch.testing.assert_close(out.logprob[i][out.mask()[i]], torch.tensor(logprobs), atol=1e-5, rtol=1e-5)
    assert out.completions() == [out.completion(i) for i in range(len(out))]
    if slots == 64:  # all are admitted at once; the last token of a completion is never an input
        rows = {tuple(out.tokens[i, :n].tolist()) + (i // 12,) for i in range(48)
                for n in range(int(out.prompt_len[i]) + 1, int(out.length[i]))}
        assert sum(decoded) == len(rows) < sum(map(len, out.completions())) // 2


def test_prefill_in_small_buckets_changes_nothing(model, monkeypatch):
    prompts = ragged_prompts()
    whole = generate(model, prompts, **OPTIONS)
    monkeypatch.setitem(batch.PREFILL_TOKENS, "cpu", 10)
    parts = generate(model, prompts, **OPTIONS)
    for i in range(len(prompts)):
        same(parts, i, whole, i)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("filters", [{}, dict(top_k=3), dict(top_p=0.5, min_p=0.01)])
def test_the_samplers_logprobs_are_the_trainers(model, temperature, filters):
    """The same temperature on both sides; a cut distribution still reports the uncut policy."""
    out = generate(model, ragged_prompts(), **(OPTIONS | dict(temperature=temperature)), **filters)
    logprob, _ = token_logprobs(model, out.tokens, out.mask(), temperature)
    torch.testing.assert_close(out.logprob[out.mask()], logprob, atol=1e-5, rtol=1e-5)
    if not filters:
        other, _ = token_logprobs(model, out.tokens, out.mask(), temperature * 1.1)
        assert not torch.allclose(out.logprob[out.mask()], other, atol=1e-2)


def test_top_k_keeps_to_the_k_likeliest(model):
    out = generate(model, ragged_prompts(), top_k=2, **OPTIONS)
    mask, logits = out.mask(), model.logits(model(out.tokens[:, :-1]))
    chosen = logits.gather(2, out.tokens[:, 1:, None])
    assert ((logits > chosen).sum(-1)[mask[:, 1:]] < 2).all()
    greedy = generate(model, ragged_prompts(), **(OPTIONS | dict(temperature=0)))
    one = generate(model, ragged_prompts(), top_k=1, **OPTIONS)
    assert torch.equal(one.tokens, greedy.tokens)


def scripted(monkeypatch, table):
    """generate() draws table[position] for every row."""
    counter = itertools.count()

    def draw(hidden, head, temperature, uniform, softcap=None):
        return torch.full((len(hidden),), table[next(counter)]), torch.full((len(hidden),), -0.5)

    monkeypatch.setattr(batch, "linear_draw", draw)


def test_eos_is_part_of_completion_and_mask(model, monkeypatch):
    scripted(monkeypatch, [3, 4, EOS])
    out = generate(model, [[1], [1, 2, 3]], **OPTIONS)
    assert [out.completion(i) for i in (0, 1)] == [[3, 4, EOS]] * 2 and out.finish_reason == ["stop"] * 2
    assert out.mask().sum(1).tolist() == [3, 3] and out.mask()[torch.arange(2), out.length - 1].all()
    assert out.logprob[out.mask()].tolist() == [-0.5] * 6


def test_a_stop_id_in_the_prompt_or_in_the_last_place(model, monkeypatch):
    scripted(monkeypatch, [3, EOS])
    out = generate(model, [[EOS, EOS]], **(OPTIONS | dict(max_new_tokens=2)))
    assert out.completion(0) == [3, EOS] and out.finish_reason == ["stop"]  # drawn, not cut off, though both are true
    scripted(monkeypatch, [3, 4])
    out = generate(model, [[EOS]], **(OPTIONS | dict(max_new_tokens=2)))
    assert out.completion(0) == [3, 4] and out.finish_reason == ["length"]


def test_every_stop_id_stops_and_none_never(model, monkeypatch):
    scripted(monkeypatch, [3, 8, EOS])
    assert generate(model, [[1]], **(OPTIONS | dict(stop_ids=[EOS, 8]))).completion(0) == [3, 8]
    scripted(monkeypatch, [3, EOS, 4])
    out = generate(model, [[1]], **(OPTIONS | dict(stop_ids=[], max_new_tokens=3)))
    assert out.completion(0) == [3, EOS, 4] and out.finish_reason == ["length"]


def test_limits_per_sequence_and_the_context(model):
    prompts = [[1], [1], [2] * 30, [3] * 31, [4, 4]]
    out = generate(model, prompts, **(OPTIONS | dict(max_new_tokens=[1, 5, 9, 9, 3], stop_ids=[])), slots=2)
    assert (out.length - out.prompt_len).tolist() == [1, 5, 2, 1, 3]  # the context holds 32
    assert out.finish_reason == ["length"] * 5
    for i, n in enumerate([1, 5, 9, 9, 3]):
        assert out.completion(i) == one_by_one(model, prompts[i], i, n, stop_ids=())[0]


@torch.no_grad()
def test_greedy_is_the_argmax_and_knows_no_seed(model):
    prompts = ragged_prompts(12)
    outs = [generate(model, prompts, **(OPTIONS | dict(temperature=0, seed=seed)), slots=5) for seed in (0, 1)]
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    for i, prompt in enumerate(prompts):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(model.logits(model(torch.tensor([tokens]))[0, -1]).argmax()))
            if tokens[-1] == EOS:
                break
        assert outs[0].completion(i) == tokens[len(prompt) :]


def test_weights_changed_between_calls_are_the_ones_used(model):
    """generate() keeps packed copies of the weights; none may outlive the call."""
    a = generate(model, ragged_prompts(), **OPTIONS)
    model.load_state_dict(tiny_model(seed=1).state_dict())
    b = generate(model, ragged_prompts(), **OPTIONS)
    fresh = generate(tiny_model(seed=1), ragged_prompts(), **OPTIONS)
    assert not torch.equal(a.tokens[:, :20], b.tokens[:, :20]) and torch.equal(b.tokens, fresh.tokens)


def test_bad_prompts_and_limits_are_refused(model):
    for prompts, change, match in [([[1], []], {}, "prompt 1 has 0 tokens"), ([[1] * 32], {}, "prompt 0 has 32"),
                                   ([[1]], dict(max_new_tokens=0), "max_new_tokens"),
                                   ([[1], [2]], dict(max_new_tokens=[3, 0]), "max_new_tokens")]:
        with pytest.raises(UserError, match=match):
            generate(model, prompts, **(OPTIONS | change))
    assert len(generate(model, [], **OPTIONS)) == 0


def test_mask_and_completion_come_from_the_lengths():
    """Token 0 is a digit as well as the padding, EOS stands in a prompt: neither may matter."""
    out = make_rollouts([[0, EOS], [0]], [[0, 0, EOS], [5]])
    assert out.mask().tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert out.completion(0) == [0, 0, EOS] and out.completion(1) == [5]


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_equals_enumeration(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(itertools.combinations(range(n), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(min(d) < c for d in draws) / len(draws))
    for k in (0, n + 1):
        with pytest.raises(UserError, match="pass@"):
            pass_at_k(n, 0, k)
    assert math.isclose(pass_at_k(10_000, 1, 100), 0.01)  # no overflow in the binomials


@pytest.mark.parametrize("temperature", [1e-31, 1e-38, 1e-40, 5e-324])
def test_next_to_zero_the_likeliest_token_is_drawn(model, temperature):
    """Logits divided by such a temperature are infinite in float32."""
    options = dict(max_new_tokens=4, seed=1, stop_ids=[EOS])
    for cut in ({}, dict(top_k=3), dict(top_p=0.5)):
        cold, greedy = (generate(model, [[1, 2], [3]], temperature=t, **options, **cut) for t in (temperature, 0))
        assert cold.completions() == greedy.completions() and torch.equal(cold.logprob, greedy.logprob)
        least = generate(model, [[1, 2], [3]], temperature=1e-30, **options, **cut)  # the least that is divided by
        assert least.completions() == greedy.completions() and least.logprob.isfinite().all()
