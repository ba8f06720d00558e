"""mrt.py and the task probe: episodes, J, progress, regret, what the STaR form keeps."""

import json
import shutil
from statistics import fmean

import pytest
import torch
from toy import make_rollouts, tiny_model

import tasks
import train_rl
from infra.cli import UserError
from model import save_model
from papers import mrt, mrt_star
from papers.mrt import (
    Config,
    answer_now,
    episode_ends,
    merge_episodes,
    meta_values,
    pooled,
    prefixes,
    random_cuts,
    split_episodes,
)
from papers.mrt_star import best_prefix, choose, curve, measure, regret
from rollouts import grades, step_ends
from tasks.base import split_of
from tasks.probe import CANDIDATES, FUNCTION, TEST, Probe

PROBE = Probe()
TOKENS = PROBE.tokenizer()

# ----------------------------------------------------------------------------------------------------
# Episodes


def cut(text, size, **options):
    """Episodes of a text in tokens of `size` bytes, as texts."""
    pieces = [text.encode()[i : i + size] for i in range(0, len(text), size)]
    ends = split_episodes(pieces, **options)
    assert ends == sorted(set(ends)) and (ends[-1] if ends else 0) == len(pieces)
    return [b"".join(pieces[a:b]).decode() for a, b in zip([0, *ends], ends)]


def test_a_marker_opens_an_episode_only_at_the_head_of_a_paragraph():
    a, b, c = "I add.\n\n", "Wait, no. Wait.\n\nSo 5.\n\n\n", "But wait, why\n\nAlternatively"
    text = a + b + c
    assert cut(text, 1, markers=["Wait", "But wait"]) == [a, b, c]
    assert cut(text, 1, markers=["But wait", "Alternatively"], paragraphs=3) == [a + b, c]
    assert cut(text, 1, markers=["So it"]) == [text]
    assert cut("", 1, markers=["Wait"]) == []


def test_thinking_ends_where_it_is_closed():
    text = "a\n\nWait b</think>\n\nWait: 5"
    assert cut(text, 1, markers=["Wait"], thinking_end="</think>") == ["a\n\n", "Wait b", "</think>\n\nWait: 5"]
    assert cut(text, 1, markers=["Wait"]) == ["a\n\n", "Wait b</think>\n\n", "Wait: 5"]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_token_across_a_boundary_begins_the_new_episode_and_none_is_lost(size):
    text = "one thing.\n\nWait, another.\n\nWait! a third"
    found = cut(text, size, markers=["Wait"])
    assert "".join(found) == text and len(found) == 3
    for part, clean in zip(found, ["one thing.\n\n", "Wait, another.\n\n", "Wait! a third"]):
        assert abs(len(part) - len(clean)) < 2 * size and clean[size:-size] in part


def test_merging_keeps_the_last_end():
    assert merge_episodes([1, 2, 3, 4, 5], 2) == [2, 5]
    assert merge_episodes([1, 2, 3, 4, 5], 5) == merge_episodes([1, 2, 3, 4, 5], 0) == [1, 2, 3, 4, 5]
    for n in range(1, 9):
        for most in range(1, 9):
            ends = merge_episodes(list(range(10, 10 + n)), most)
            assert len(ends) == min(n, most) == len(set(ends)) and ends[-1] == 9 + n


def rollouts_of(problems, texts, eos=True):
    ends = [TOKENS.eos_ids[0]] if eos else []
    return make_rollouts([PROBE.prompt_tokens(p, TOKENS) for p in problems], [TOKENS.encode(t) + ends for t in texts])


def test_episode_ends_are_step_ends_with_the_answer_apart():
    p = PROBE.problems("train", 1)[0]
    out = rollouts_of([p] * 3, ["~~,A=3n~~,B=4n!C", "!A", "~~,~~,~~,~~,~~,!B"])
    plain = episode_ends(PROBE, out, TOKENS, Config())
    assert torch.equal(plain, step_ends(PROBE, out, TOKENS))
    assert (plain - plain[:, :1]).tolist() == [[0, 3, 6, 9, 12, 15, 15], [0, 3, 3, 3, 3, 3, 3], [0, 3, 6, 9, 12, 15, 18]]
    merged = episode_ends(PROBE, out, TOKENS, Config(max_episodes=2))
    assert (merged - merged[:, :1]).tolist() == [[0, 6, 12, 15], [0, 3, 3, 3], [0, 6, 15, 18]]


# ----------------------------------------------------------------------------------------------------
# The task


def test_probe_problems_have_one_right_candidate():
    problems = [p for s in PROBE.by_split.values() for p in s]
    assert len(problems) == 24000 and sorted(FUNCTION) == list(range(10))
    for p in problems[:500]:
        goal, digits = p.data[0], dict(p.data[1])
        assert [c for c in CANDIDATES if FUNCTION[digits[c]] == goal] == [p.answer]
        assert {p.prompt[i : i + 2] for i in range(0, 12, 2)} == {f"{c}{d}" for c, d in digits.items()}
        assert p.prompt[12:] == f"?{goal}" and p in PROBE.by_split[split_of(p.key)]


def test_probe_grades_and_finds_mistakes():
    p = next(p for p in PROBE.problems("train") if p.answer == "B")
    wrong = PROBE.test(p, "B").replace("y", "n")
    assert PROBE.grade(p, "!B") == PROBE.grade(p, "~~,!B") == 1
    assert not any(PROBE.grade(p, t) for t in ("!A", "B", "", "!", "!B!B", "!BB", "~~,"))
    assert PROBE.first_illegal_step(p, "~~," + PROBE.test(p, "A") + PROBE.test(p, "B") + "!A") is None
    assert PROBE.first_illegal_step(p, PROBE.test(p, "A") + wrong + "~~,!B") == 1
    assert PROBE.first_illegal_step(p, "~~,~," + "!B") == 1


def test_probe_tokens_of_a_demonstration():
    for i, p in enumerate(PROBE.problems("train", 50)):
        text = PROBE.demonstration(p, 0.5, i)
        ids = TOKENS.encode(text)
        assert TOKENS.decode(ids) == text and len(ids) % 3 == 2 and len(ids) < PROBE.max_new_tokens
        assert len(PROBE.prompt_tokens(p, TOKENS)) == 7


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_probe_value_is_the_mean_outcome_of_the_demonstrator(strength):
    problems, n = PROBE.problems("train", 3000), 3000
    hits = fmean(PROBE.grade(p, PROBE.demonstration(p, strength, i)) for i, p in enumerate(problems))
    value = PROBE.exact_value(problems[0], "", strength)
    assert abs(hits - value) < 4 * (value * (1 - value) / n) ** 0.5


def test_probe_value_now_is_a_sixth_more_per_new_test_on_average():
    p = PROBE.problems("train", 1)[0]
    order = [c for c in CANDIDATES if c != p.answer]
    text = ""
    for k, c in enumerate(order):
        assert PROBE.value_now(p, text) == pytest.approx(1 / (6 - k))
        found = PROBE.value_now(p, text + PROBE.test(p, p.answer))
        assert found == 1.0
        fail = PROBE.value_now(p, text + PROBE.test(p, c))
        untested = 6 - k
        assert found / untested + fail * (untested - 1) / untested - PROBE.value_now(p, text) == pytest.approx(1 / untested * (
            1 if k < 5 else 0))
        assert PROBE.value_now(p, text + "~~,") == PROBE.value_now(p, text)
        text += PROBE.test(p, c)
        assert PROBE.value_now(p, text + PROBE.test(p, c)) == PROBE.value_now(p, text)
    assert PROBE.value_now(p, text) == 1.0 and PROBE.value_now(p, text + "!" + order[0]) == 0.0


# ----------------------------------------------------------------------------------------------------
# The meta-prover, with a stand-in for the model that believes the tests


def believer(monkeypatch):
    """generate() for prefixes closed with "!": the K answers to a prefix go round the candidates that are still possible."""
    seen = []

    def answer(model, prompts, **options):
        completions = []
        for i, tokens in enumerate(prompts):
            text = TOKENS.decode(tokens[7:])
            assert text.endswith("!")
            verdicts = {m[1]: m[3] for m in TEST.finditer(text)}
            left = [c for c, v in verdicts.items() if v == "y"] or [c for c in CANDIDATES if c not in verdicts]
            completions.append([TOKENS.encode(left[i % len(left)])[0], TOKENS.eos_ids[0]])
        seen.append((prompts, options))
        return make_rollouts(prompts, completions)

    monkeypatch.setattr(mrt, "generate", answer)
    return seen


def good_bad(p):
    a, b = [c for c in CANDIDATES if c != p.answer][:2]
    return PROBE.test(p, p.answer), PROBE.test(p, a), PROBE.test(p, b)


def test_sampled_values_are_the_exact_ones(monkeypatch):
    seen = believer(monkeypatch)
    p = PROBE.problems("train", 1)[0]
    yes, no, no2 = good_bad(p)
    texts = [no + no2 + yes + f"!{p.answer}", no + no + f"!{no[0]}", f"!{p.answer}"]
    out = rollouts_of([p] * 3, texts)
    cfg = mrt.Config(task="probe", mu_samples=60)  # 60 answers go round 6, 5, 4 candidates evenly
    ends, values, spent = meta_values(None, TOKENS, PROBE, cfg, 1, [p] * 3, out, grades(PROBE, [p] * 3, out, TOKENS))
    assert torch.equal(ends, step_ends(PROBE, out, TOKENS))
    expected = [[1 / 6, 1 / 5, 1 / 4, 1, 1], [1 / 6, 1 / 5, 1 / 5, 0, 0], [1 / 6, 1, 1, 1, 1]]
    torch.testing.assert_close(values, torch.tensor(expected))
    prompts, options = seen[0]
    assert len(prompts) == 60 * (4 + 3 + 1) and spent == 2 * len(prompts) and options["max_new_tokens"] == 2
    exact = [PROBE.value_now(p, TOKENS.decode(out.tokens[0, 7:e].tolist())) for e in ends[0].tolist()]
    torch.testing.assert_close(values[0], torch.tensor(exact))


def test_progress_pays_the_episode_that_made_it_and_no_other(monkeypatch):
    believer(monkeypatch)
    p = PROBE.problems("train", 1)[0]
    yes, no, _ = good_bad(p)
    out = rollouts_of([p, p], [f"~~,{yes}{yes}!{p.answer}", f"~~,{no}~~,!{no[0]}"])
    cfg = mrt.Config(task="probe", mu_samples=60, num_generations=2, alpha=2.0)
    cfg.guards = ("anchor",)
    outcome = grades(PROBE, [p, p], out, TOKENS)
    ends, values, spent = meta_values(None, TOKENS, PROBE, cfg, 1, [p, p], out, outcome)
    adv, _ = train_rl.advantages(cfg, out.mask(), outcome, ends, values)
    paid = adv[:, 7:] - torch.tensor([[0.5], [-0.5]]) * out.mask()[:, 7:]  # without the outcome's own advantage
    torch.testing.assert_close(paid[0], torch.tensor([0, 0, 0] + [2 * 5 / 6] * 3 + [0.0] * 6), atol=1e-6, rtol=0)
    torch.testing.assert_close(paid[1], torch.tensor([0, 0, 0] + [2 / 30] * 3 + [0.0] * 3 + [-2 / 5] * 3), atol=1e-6, rtol=0)
    assert spent == 60 * 8 * 2


def test_equal_prefixes_share_their_answers():
    asked = {(0, 5): ("p", [1, 2], 1), (1, 5): ("p", [1, 2], 1), (1, 6): ("p", [1, 2, 3], 1)}
    right = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert pooled(asked, right) == {(0, 5): 0.75, (1, 5): 0.75, (1, 6): 0.5}


def test_the_scalar_form_credits_what_follows_the_cut(monkeypatch):
    believer(monkeypatch)
    p = PROBE.problems("train", 1)[0]
    yes, no, no2 = good_bad(p)
    out = rollouts_of([p] * 40, [no + no2 + yes + f"!{p.answer}"] * 20 + [no + no2 + f"!{no[0]}"] * 20)
    cfg = mrt.Config(task="probe", mu_samples=60, mrt_credit="scalar")
    outcome = grades(PROBE, [p] * 40, out, TOKENS)
    ends, values, spent = meta_values(None, TOKENS, PROBE, cfg, 1, [p] * 40, out, outcome)
    assert spent == 40 * 60 * 2 and ends.shape == values.shape == (40, 3)
    table = {0: 1 / 6, 3: 1 / 5, 6: 1 / 4, 9: 1.0}
    for b in range(40):
        assert values[b, 0] == values[b, 1] and values[b, 1].item() == pytest.approx(table[int(ends[b, 1]) - 7])
        assert values[b, 2] == (b < 20) and ends[b, 2] == out.length[b]
    assert set((ends[:20, 1] - 7).tolist()) == {0, 3, 6, 9}  # every place is cut at, the end and the answer never
    assert torch.equal(ends, random_cuts(step_ends(PROBE, out, TOKENS, credit=True), mrt.derive(0, "cut", 1)))


def test_the_meta_prover_is_the_policy_and_its_draws_are_fixed(model, task, tokenizer):
    p = task.problems("train", 2, 0)
    starts = [(p[0], tokenizer.encode(p[0].prompt), 3), (p[1], tokenizer.encode(p[1].prompt + "12"), 3)]
    cfg = mrt.Config(mu_samples=3, mu_tokens=2, termination_text="==")
    right, answers, spent = answer_now(model, tokenizer, task, starts, cfg, 7)
    again = answer_now(model, tokenizer, task, starts, cfg, 7)
    other = answer_now(model, tokenizer, task, starts, cfg, 8)
    assert right.shape == (2, 3) and answers == again[1] != other[1]
    for row in answers:
        assert len(row) == 3 and all(a[:2] == [10, 10] and 3 <= len(a) <= 4 for a in row)
    assert spent == sum(len(a) - 2 for row in answers for a in row)
    for (problem, tokens, start), row, graded in zip(starts, answers, right.tolist()):
        assert graded == [task.grade(problem, tokenizer.decode(tokens[start:] + a)) for a in row]


def test_alpha_zero_asks_nobody_and_is_the_outcome_run(tmp_path, monkeypatch, tokenizer, task):
    save_model(tmp_path / "policy", tiny_model(), tokenizer)
    monkeypatch.setattr(train_rl, "get_task", lambda cfg: task)
    monkeypatch.setattr(mrt, "get_task", lambda cfg: task)

    def run(script, name, **options):
        small = dict(policy=str(tmp_path / "policy"), run_dir=str(tmp_path / name), steps=2, num_prompts=4, num_generations=4,
                     eval_problems=4, device="cpu", threads=1)
        summary = script.train(script.Config(**(small | options)))
        return (tmp_path / name / "step_000002" / "model.safetensors").read_bytes(), summary

    mu = dict(mu_tokens=2, termination_text="=")
    outcome = run(train_rl, "outcome", reward="outcome")
    zero = run(mrt, "zero", alpha=0.0, **mu)
    paid = run(mrt, "paid", **mu)
    assert outcome[0] == zero[0] != paid[0]
    assert zero[1]["mrt_tokens"] == 0 < paid[1]["mrt_tokens"]
    assert run(mrt, "short", alpha=0.0, length_penalty=0.5)[0] != outcome[0]


def test_the_rl_script_names_the_sibling():
    with pytest.raises(UserError, match="python -m papers.mrt"):
        train_rl.main(["--reward", "mrt", "--task", "probe"])


# ----------------------------------------------------------------------------------------------------
# Regret


def test_regret_by_hand():
    tokens, values = torch.tensor([[0, 4, 8, 8]]), torch.tensor([[0.0, 0.5, 1.0, 1.0]])
    assert curve(tokens[0], values[0], 10).tolist() == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1, 1]
    assert regret(tokens, values, 8) == pytest.approx(0.5)  # a straight line from 0 to 1
    assert regret(tokens, values, 16) == pytest.approx(0.25)  # ... and then it is held
    assert regret(tokens, values, 4) == pytest.approx(0.75)  # the budget cuts the curve
    assert regret(torch.tensor([[0, 0]]), torch.tensor([[1.0, 1.0]]), 5) == 0.0
    both = torch.cat([tokens, tokens]), torch.cat([values, 1 - values * 0])
    assert regret(*both, 8) == pytest.approx(0.25)


def test_progress_earlier_is_less_regret():
    tokens = torch.tensor([[0, 3, 6, 9]])
    early, late = torch.tensor([[0.2, 1.0, 1.0, 1.0]]), torch.tensor([[0.2, 0.2, 0.2, 1.0]])
    assert regret(tokens, early, 9) < regret(tokens, late, 9) < 1 - 0.2


# ----------------------------------------------------------------------------------------------------
# STaR


def test_the_first_highest_prefix():
    assert best_prefix([7, 10, 13, 16], [0.25, 0.5, 1.0, 1.0]) == (13, 0.75)
    assert best_prefix([7, 10], [0.5, 0.25]) == (7, 0.0)


def test_star_keeps_short_traces_that_end_right(monkeypatch):
    believer(monkeypatch)
    problems = PROBE.problems("train", 2)
    (yes, no, _), (yes1, no1, _) = map(good_bad, problems)
    rows = [p for p in problems for _ in range(3)]
    texts = [f"~~,{no}{yes}~~,!{no[0]}", f"{yes}{no}~~,!{problems[0].answer}", "~~,~~,!A",
             f"{no1}!A", f"~~,~~,{yes1}!A", f"{no1}{yes1}!A"]
    out = rollouts_of(rows, texts)
    ends = episode_ends(PROBE, out, TOKENS, Config())
    asked = prefixes(rows, out, ends)
    right, answers, _ = answer_now(None, TOKENS, PROBE, list(asked.values()), Config(mu_samples=60), 0)
    good = {k: [a for a, r in zip(texts, row) if r] for k, texts, row in zip(asked, answers, right.tolist())}
    kept = choose(out, ends, pooled(asked, right), good, 3, 1, PROBE.max_new_tokens)
    assert [TOKENS.decode(p) for p, _ in kept] == [p.prompt for p in problems]
    assert [TOKENS.decode(c[:-1]) for _, c in kept] == [f"{yes}!{yes[0]}", f"{no1}{yes1}!{yes1[0]}"]
    assert all(c[-1] == TOKENS.eos_ids[0] for _, c in kept)
    both = choose(out, ends, pooled(asked, right), good, 3, 9, PROBE.max_new_tokens)
    assert len(both) == 5  # only the trace of mere filler makes no progress
    sure = choose(out, ends, pooled(asked, right), good, 3, 9, PROBE.max_new_tokens, min_value=0.9)
    assert len(sure) == 4 and all("y" in TOKENS.decode(c[:-1]) for _, c in sure)  # one that ended in a guess is gone
    assert kept[0] == both[0]


def test_star_resumes_and_measures(tmp_path, monkeypatch, task, tokenizer):
    monkeypatch.setattr(mrt_star, "get_task", lambda cfg: task)
    save_model(tmp_path / "policy", tiny_model(), tokenizer)
    small = dict(policy=str(tmp_path / "policy"), num_prompts=8, num_generations=4, steps=2, batch_size=8, eval_problems=6,
                 threads=1, device="cpu", mu_samples=2, mu_tokens=3, termination_text="=", min_value=0.0)
    before = mrt_star.train(mrt_star.Config(**small, rounds=0, run_dir=str(tmp_path / "measure")))
    assert len(before["curve"]) == task.max_new_tokens + 1 and 0 < before["regret"] < 1 and "curve_exact" not in before
    two = mrt_star.train(mrt_star.Config(**small, rounds=2, run_dir=str(tmp_path / "star")))
    weights = (tmp_path / "star" / "step_000002" / "model.safetensors").read_bytes()
    assert weights != (tmp_path / "star" / "step_000001" / "model.safetensors").read_bytes()
    (tmp_path / "star" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "star" / "step_000002")
    again = mrt_star.train(mrt_star.Config(**small, rounds=2, run_dir=str(tmp_path / "star")))
    assert again | dict(seconds=0) == two | dict(seconds=0)
    assert (tmp_path / "star" / "step_000002" / "model.safetensors").read_bytes() == weights
    rows = [json.loads(x) for x in (tmp_path / "star" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2] and rows[1]["num_tokens"] > rows[0]["num_tokens"] > 0


def test_the_exact_values_are_measured_beside_the_sampled_ones():
    model = tiny_model(vocab=TOKENS.n_vocab, context=96)
    found = measure(model, TOKENS, PROBE, PROBE.problems("val", 6), mrt_star.Config(mu_samples=2), 0)
    assert len(found["curve"]) == len(found["curve_exact"]) == PROBE.max_new_tokens + 1
    assert found["curve_exact"][0] == pytest.approx(1 / 6, abs=1e-4) and found["J_rms"] > 0


def test_the_task_is_known_by_name():
    assert isinstance(tasks.get_task("probe"), Probe)
