"""Pre-memorization accuracy on arrays small enough to do by hand, snapshots of a real run, curation."""

import json
import random

import numpy as np
import pytest
import torch
from toy import tiny_model

from infra.cli import UserError
from model import resolve
from papers import memorization
from papers.memorization import choose_threshold, curate, held_out_r_squared, load_run, pre_memorization, r_squared, solution_nll
from tasks.base import Task
from tasks.worded import Worded


def test_premem_by_hand():
    """One example: right in half of the samples before its solution is likely (nll 1.0), then recited (nll 0.01)."""
    accuracy = np.array([[0.5], [0.25], [1.0], [0.2]])
    nll = np.array([[1.0], [0.5], [0.01], [0.01]])
    expected = [[0.5], [0.25], [0.5], [0.2]]  # the running maximum ignores the memorised 1.0; never above the current one
    np.testing.assert_array_equal(pre_memorization(accuracy, nll, 0.1), expected)
    np.testing.assert_array_equal(pre_memorization(accuracy, nll, 0.001), accuracy.clip(max=[[0.5], [0.25], [1.0], [0.2]]))
    np.testing.assert_array_equal(pre_memorization(accuracy, nll, 2.0), np.zeros((4, 1)))  # memorised from the start
    np.testing.assert_array_equal(pre_memorization(accuracy[:1], np.array([[0.1]]), 0.1), [[0.5]])  # at the threshold: not yet


def test_r_squared_is_of_the_line_y_equals_x():
    truth = [0.1, 0.5, 0.9]
    assert r_squared(truth, truth) == 1
    assert r_squared([0.5] * 3, truth) == 0
    assert r_squared([x + 1 for x in truth], truth) < 0  # perfectly correlated and far from the line
    assert np.isnan(r_squared([0.1], [0.2]))


def fake_runs(n, threshold, rng):
    """Runs in which accuracy before nll falls under `threshold` is the test accuracy, and 1 after."""
    runs = []
    for _ in range(n):
        truth, nll = rng.random(), np.linspace(1, 0, 6)[:, None] * np.ones((1, 50))
        accuracy = np.where(nll >= threshold, truth, 1.0)
        runs.append(dict(accuracy=accuracy, nll=nll, test=np.full(6, truth)))
    return runs


def test_the_threshold_is_found_and_scored_on_other_runs():
    runs = fake_runs(8, 0.5, np.random.default_rng(0))
    grid = [0.05, 0.3, 0.5, 0.9]
    assert choose_threshold(runs, grid) == 0.5
    scores, chosen = held_out_r_squared(runs, grid, 5, seed=0)
    assert len(scores) == 5 and (chosen == 0.5).all() and (scores > 0.999).all()


def test_a_threshold_chosen_on_the_same_runs_cannot_leak(monkeypatch):
    """Each split's threshold comes from runs that it is not scored on."""
    seen = []
    monkeypatch.setattr(memorization, "choose_threshold", lambda runs, grid: seen.append({id(r) for r in runs}) or grid[0])
    scored = []
    real = memorization.predicted
    monkeypatch.setattr(memorization, "predicted", lambda runs, t: scored.append({id(r) for r in runs}) or real(runs, t))
    held_out_r_squared(fake_runs(7, 0.5, np.random.default_rng(0)), [0.5], 4, seed=1)
    assert len(seen) == len(scored) == 4
    for a, b in zip(seen, scored):
        assert not a & b and len(a) == 3 and len(b) == 4


def test_solution_nll_is_the_mean_over_the_completion_alone():
    model = tiny_model()
    examples = [([1, 2, 10], [3, 11]), ([4], [5, 6, 7, 11])]
    got = solution_nll(model, examples, "cpu", batch_size=1)
    for (prompt, completion), nll in zip(examples, got):
        logits = model.logits(model(torch.tensor([prompt + completion])))[0].log_softmax(-1)
        by_hand = [-logits[len(prompt) + i - 1, t].item() for i, t in enumerate(completion)]
        assert nll == pytest.approx(np.mean(by_hand), abs=1e-5)
    np.testing.assert_allclose(solution_nll(model, examples, "cpu"), got, atol=1e-5)  # padding changes nothing


# ----------------------------------------------------------------------------------------------------
# The task and the runs


def test_worded_solutions_are_right_and_their_letters_are_nobody_elses():
    task, words = Worded(pool=500), set()
    tokenizer = task.tokenizer()
    for p in task.problems("train", 200):
        text = task.demonstration(p, None, 0)
        assert task.grade(p, text) == 1 and task.demonstration(p, None, 7) == text
        assert tokenizer.decode(tokenizer.encode(p.prompt + text)) == p.prompt + text
        assert len(tokenizer.encode(text)) + 1 <= task.max_new_tokens
        words.add(text[4:6])
        wrong = text[:-4] + str((int(p.answer) + 1) % 10) + text[-3:]
        assert task.grade(p, wrong) == 0
    assert len(words) > 40  # of 64: not a function of the problem's arithmetic
    p = task.make(random.Random(0), "+*")
    for bad in ("", "\n", p.answer, f"={p.answer}", "1+1=" + p.answer + "z", "x" * 1000):
        assert task.grade(p, bad) == 0


def test_similar_problems_share_operations_and_stay_in_training():
    task = Worded(pool=500)
    for i, p in enumerate(task.problems("train", 30)):
        q = task.similar(p, i)
        assert q.data[0] == p.data[0]
        assert q.key not in {x.key for x in task.by_split["test"] + task.by_split["val"]}


def make_run(n):
    run = dict(accuracy=np.ones((2, n)), nll=np.full((2, n), 0.5))
    run["nll"][1] = 0.01
    run["accuracy"][0, n // 2 :] = 0.0  # the second half was never right before it was memorised
    return run


def test_curation_takes_the_examples_that_were_memorised_before_they_were_learned():
    task = Worded(pool=2000)
    problems = task.problems("train", 40, 0)
    new = curate(make_run(40), task, problems, 30, "premem", 0.1, seed=0)
    hard = {p.data[0] for p in problems[20:]}
    assert len({p.key for p in new} | {p.key for p in problems}) == 70
    assert {p.data[0] for p in new} <= hard
    assert not {p.data[0] for p in curate(make_run(40), task, problems, 30, "iid", 0.1, seed=0)} <= hard
    assert [p.key for p in new] == [p.key for p in curate(make_run(40), task, problems, 30, "premem", 0.1, seed=0)]
    with pytest.raises(UserError, match="similar"):
        curate(make_run(40), Task(), problems, 3, "premem", 0.1, seed=0)


SMALL = dict(task="worded", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, steps=6, batch_size=8, threads=1,
             num_examples=24, eval_problems=4, memorization_samples=2, memorization_problems=5)


def test_snapshots_of_a_run_and_a_curated_run_after_it(tmp_path):
    cfg = memorization.Config(run_dir=str(tmp_path / "a"), snapshots=3, **SMALL)
    memorization.train(cfg)
    run = load_run(tmp_path / "a")
    assert run["accuracy"].shape == run["nll"].shape == (3, 24) and run["test_each"].shape == (3, 5)
    assert run["step"].tolist() == [2, 4, 6]
    assert set(np.unique(run["accuracy"])) <= {0, 0.5, 1} and (run["nll"] > 0).all()
    assert run["nll"][2].mean() < run["nll"][0].mean()  # it learns something even in six steps
    memorization.train(memorization.Config(run_dir=str(tmp_path / "b"), curate=str(tmp_path / "a"), snapshots=1,
                                     **SMALL | dict(num_examples=30)))
    assert load_run(tmp_path / "b")["accuracy"].shape == (1, 30)
    assert json.loads((resolve(tmp_path / "b").parent / "summary.json").read_text())["examples"] == 30


def test_bad_settings_are_refused_before_work(tmp_path):
    def refused(match, **settings):
        with pytest.raises(UserError, match=match):
            memorization.train(memorization.Config(run_dir=str(tmp_path / match), **SMALL | settings))
        assert not list((tmp_path / match).glob("step_*"))

    refused("no snapshots", curate=str(tmp_path))
    memorization.train(memorization.Config(run_dir=str(tmp_path / "a"), snapshots=1, **SMALL))
    refused("larger --num-examples", curate=str(tmp_path / "a"))
    refused("give the same here", curate=str(tmp_path / "a"), seed=3, num_examples=30)
