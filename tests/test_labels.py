"""pav.py: first pits. The prover is a script, so that every value is known."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from toy import EOS, ToyTask, make_rollouts

import pav
from infra.cli import UserError
from pav import Config, check, collect, roll_out, walk_to_pits, wrong_walks
from tasks.countdown import Countdown


class Steps(ToyTask):
    """A step is one token; right if no 9 and the text ends with EOS: the first 9 is the pit, whatever follows."""

    def step_ends(self, tokens, prompt_len, length, tokenizer):
        return list(range(prompt_len + 1, length + 1))

    def grade(self, problem, completion):
        return float("9" not in completion)


def scripted(calls, fail_every=0):
    """Stands for generate(): every prefix is filled up with 1s, each fail_every-th of them with a 9 in second place."""
    def generate(model, prompts, max_new_tokens, **options):
        calls.append([list(p) for p in prompts])
        rows = []
        for i in range(len(prompts)):
            n = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[i]
            row = [1] * (n - 1) + [EOS]
            if fail_every and i % fail_every == 0 and n > 3:
                row[1] = 9
            rows.append(row)
        return make_rollouts([list(p) for p in prompts], rows)

    return generate


def test_a_walk_ends_with_the_first_prefix_that_nobody_survives(tokenizer):
    calls = []
    complete = partial(scripted(calls), None)
    task, problem = Steps(), SimpleNamespace(prompt="37=", answer="7")
    tokens = [3, 7, 10, 1, 1, 9, 1, 1, EOS]  # the pit is the step that ends at 6
    found, spent = walk_to_pits(complete, task, tokenizer, [(problem, tokens, 3, [4, 5, 6, 7, 8])], 4, 6, 0)
    assert [c[0] for c in calls] == [tokens[:4], tokens[:5], tokens[:6]]  # nothing beyond the pit is sampled
    assert all(len(c) == 4 for c in calls)
    at_cut = [float(d["target"][0][d["ends"][0] == 4 + i][0]) for i, d in enumerate(found)]
    assert at_cut == [1.0, 1.0, 0.0]
    assert spent == 4 * (5 + 4 + 3)
    assert all(float(d["weight"][:, 0].sum()) == 0 for d in found)  # the prompt was not estimated here


def test_a_continuation_that_is_eos_at_once_keeps_the_label_of_its_cut():
    """And a solution that ends with EOS is labelled in front of it too, where a beam ranks it before EOS is drawn."""
    task = Countdown()
    tokenizer = task.tokenizer()
    problem = task.problems("train", 1, 0)[0]
    prompt = task.prompt_tokens(problem, tokenizer)
    text = tokenizer.encode(task.demonstration(problem, 1.0, 0))
    first = 1 + text.index(tokenizer.encode("\n")[0])
    n, end, eos = len(prompt), len(prompt) + len(text), tokenizer.eos_ids[0]
    prefixes = [prompt + text, prompt + text[:first]]
    complete = lambda *a, **k: make_rollouts(prefixes, [[eos], text[first:] + [eos]])  # noqa: E731
    starts = [(problem, prefix, n) for prefix in prefixes]
    data, outcome, spent = roll_out(complete, task, tokenizer, starts, 1, task.max_new_tokens, 0)
    rows = zip(*(data[k].tolist() for k in ("ends", "target", "weight")))
    labelled = [[(e, t) for e, t, w in zip(*row) if w] for row in rows]
    assert labelled == [[(end, 1.0), (end + 1, 1.0)], [(n + first, 1.0), (end, 1.0), (end + 1, 1.0)]]
    assert outcome.tolist() == [[1.0], [1.0]] and spent == 1 + len(text) - first + 1


def test_no_solution_is_cut_in_front_of_its_eos(monkeypatch):
    task = Countdown()
    tokenizer = task.tokenizer()
    cuts = []

    def generate(model, prompts, max_new_tokens, **options):
        """Seeds are solved problems; what the prover is asked to continue is written down."""
        if isinstance(max_new_tokens, int):
            texts = [tokenizer.encode(task.demonstration(p, 1.0, 0)) for p in problems]
            return make_rollouts([list(p) for p in prompts], [[*t, tokenizer.eos_ids[0]] for t in texts])
        cuts.extend(len(p) for p in prompts)
        return make_rollouts([list(p) for p in prompts], [[tokenizer.eos_ids[0]]] * len(prompts))

    monkeypatch.setattr(pav, "generate", generate)
    problems = task.problems("train", 3, 0)
    collect(None, None, tokenizer, task, problems, Config(task="countdown", cuts=0), 0)
    prompt = len(task.prompt_tokens(problems[0], tokenizer))
    assert cuts == [prompt, prompt + 8] * 3


def test_walks_start_from_good_states_that_can_fail_and_go_past_the_cut():
    rolled = make_rollouts([[3, 7, 10, 1]] * 6, [[1, 1, EOS], [9, 1, EOS]] * 3)
    ends = torch.tensor([[3, 4, 5, 6, 7]] * 6)
    starts = [("a", [3, 7, 10, 1], 3), ("b", [3, 7, 10, 1], 3), ("c", [3, 7, 10, 1], 3)]
    outcome = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    data = dict(tokens=rolled.tokens, ends=ends)
    walks = wrong_walks(starts, data, outcome, 0.25)
    assert [w[0] for w in walks] == ["a"]  # b is no good state, c has no wrong continuation
    assert walks[0][1:] == ([3, 7, 10, 1, 9, 1, EOS], 3, [5, 6])  # the finished solution is no prefix to continue
    assert [w[0] for w in wrong_walks(starts, data, outcome, 0.6)] == []


def test_first_pit_keeps_the_uniform_data_and_adds_the_walks(monkeypatch, tokenizer):
    monkeypatch.setattr(pav, "generate", scripted([], fail_every=2))
    task = Steps()
    problems = task.problems("train", 4, 0)
    plain, cost = collect(None, None, tokenizer, task, problems, Config(n_mc=2, cuts=2), 0)
    more, dearer = collect(None, None, tokenizer, task, problems, Config(n_mc=2, cuts=2, coverage="first-pit", pit_mc=3), 0)
    N = len(plain["tokens"])
    assert len(more["tokens"]) > N and dearer > cost
    for key in ("tokens", "target", "weight"):
        assert torch.equal(more[key][:N, : plain[key].shape[1]], plain[key])
    assert dearer == cost + sum(  # every added row costs what lies after its cut
        int(more["ends"][i, -1] - more["ends"][i][more["weight"][i] > 0][0]) for i in range(N, len(more["tokens"])))


@pytest.mark.parametrize("flags", [dict(n_mc=1), dict(n_mc=2, label="outcome")])
def test_first_pit_without_siblings_or_steps_is_refused(task, flags):
    with pytest.raises(UserError, match="n-mc of at least 2"):
        check(Config(policy="p", coverage="first-pit", **flags), task)


def test_an_outcome_model_has_no_prover(task):
    """Best-of-K of a finished solution means nothing: its value would be 1 - (1-p)^K."""
    with pytest.raises(UserError, match="leave out --prover-k"):
        check(Config(policy="p", label="outcome", prover_k=4), task)


def test_too_few_continuations_to_judge_the_prover_are_refused_before_anything_is_sampled(task):
    with pytest.raises(UserError, match="eval-mc must be at least --prover-k 4"):
        check(Config(policy="p", eval_mc=3, prover_k=4), task)
    check(Config(policy="p", eval_mc=4, prover_k=4), task)
