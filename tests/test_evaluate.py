"""evaluate.py: intervals, votes, and a file of completions that survives a kill."""

import json
import math
import random

import pytest
from toy import tiny_model

from infra.cli import UserError
from open_weights.tokenizer import alphabet_tokenizer
from report import evaluate
from report.evaluate import Config, main, summarize
from report.statistics import interval, vote
from tasks import get_task


def test_wilson_interval_against_its_definition():
    """The bounds are the p at which the observed share lies 1.96 standard errors away."""
    for k, n in ((0, 16), (1, 16), (5, 16), (16, 16), (30, 64)):
        p, low, high = interval([1.0] * k + [0.0] * (n - k))
        assert p == k / n and 0 <= low <= p <= high <= 1
        for bound in (low, high):
            if 0 < bound < 1:
                assert abs(p - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), rel=1e-6, abs=1e-12)
    assert interval([0.0] * 16)[2] > 0.15  # 0 of 16 is no proof of 0


def test_samples_of_one_problem_are_no_independent_draws():
    width = lambda x: interval(x, 4)[2] - interval(x, 4)[1]  # noqa: E731
    assert width([1.0, 0.0] * 8) > 1.8 * width([0.5] * 15 + [0.75])
    assert interval([0.25] * 16, 4) == interval([1.0] * 16 + [0.0] * 48)  # no surer than all 64 samples are, drawn apart
    rng, covered = random.Random(0), 0
    for _ in range(300):  # 30 problems x 4 samples, chances spread over problems around 0.4
        shares = []
        for _ in range(30):
            chance = rng.betavariate(2, 3)
            shares.append(sum(rng.random() < chance for _ in range(4)) / 4)
        _, low, high = interval(shares, 4)
        covered += low <= 0.4 <= high
    assert covered / 300 > 0.9


def test_vote():
    assert vote(["7", "8", "7.0"]) == 0 and vote(["8", "\\frac12", "0.5"]) == 1
    assert vote(["8", "7"]) == 0 and vote([None, None, "3"]) == 2 and vote([None]) is None


@pytest.fixture
def sums(tmp_path):
    """Five test problems of GSM8K's form, and a tiny random model that can spell them."""
    from model import save_model

    rows = [dict(question=f"{i}+1=", answer=f"{i}+1\n#### {i + 1}") for i in range(5)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tokenizer = alphabet_tokenizer(sorted(set("0123456789+=#\n Question:Answer")))
    save_model(tmp_path / "m", tiny_model(vocab=tokenizer.n_vocab, context=128), tokenizer)
    return ["--model", str(tmp_path / "m"), "--task", "gsm8k", "--data", str(tmp_path / "test.jsonl"), "--num-problems", "0",
            "--n", "2", "--max-new-tokens", "12", "--slots", "3", "--device", "cpu", "--out", str(tmp_path / "e.jsonl")]


def test_an_evaluation_goes_on_after_a_kill(sums, tmp_path, capsys, monkeypatch):
    out = tmp_path / "e.jsonl"
    main(sums)
    whole, result = out.read_bytes(), json.loads(out.with_suffix(".json").read_text())
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(r["problem"], r["sample"]) for r in rows] == [(i, s) for i in range(5) for s in range(2)]
    assert result["settings"]["seed"] == 0 and result["results"]["problems"] == 5 and result["results"]["n"] == 2
    printed = capsys.readouterr().out
    assert str(out) in printed and "unparsable" in printed and "majority@2" in printed and "pass@2" in printed
    for keep in (whole[:-20], b"".join(whole.splitlines(keepends=True)[:3]) + b'{"problem": 1, "sam', b"", whole[:5]):
        out.write_bytes(keep)  # as a kill leaves it
        main(sums)
        assert out.read_bytes() == whole and json.loads(out.with_suffix(".json").read_text()) == result
    calls = []
    monkeypatch.setattr(evaluate, "generate", lambda *a, **k: calls.append(a))
    main(sums)
    assert not calls and out.read_bytes() == whole  # complete: nothing is sampled again
    with pytest.raises(UserError, match="with seed 0, not 1"):
        main([*sums, "--seed", "1"])
    out.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="not the file of an evaluation"):
        main(sums)


def test_slots_do_not_change_a_completion(sums, tmp_path):
    main(sums)
    first = (tmp_path / "e.jsonl").read_bytes()
    main([*sums, "--slots", "7", "--out", str(tmp_path / "f.jsonl")])
    assert (tmp_path / "f.jsonl").read_bytes() == first


def test_eval_names_its_file_after_the_settings(sums, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*sums[:-2], "--greedy", "--n", "1"])
    assert [p.suffix for p in sorted((tmp_path / "runs" / "eval").iterdir())] == [".json", ".jsonl"]


def test_data_is_checked_before_the_weights_are_read(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(dict(question="1+1", answer="#### 2")) + "\n")
    with pytest.raises(UserError, match="split 'test'"):
        main(["--model", "nowhere", "--task", "gsm8k", "--data", str(tmp_path / "train.jsonl")])


def test_summary_counts_what_it_says(tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(dict(question=f"q{i}", answer=f"#### {i}")) + "\n" for i in range(2)))
    task = get_task("gsm8k", data=[str(tmp_path / "test.jsonl")])
    problems = sorted(task.problems("test"), key=lambda p: p.key)
    texts = ["#### 0", "#### 0 or", "it is 0", "#### 5", "#### 5", "it is 1"]
    rows = [evaluate.row_of(task, problems[i // 3], i, 3, t, 4, "length" if i == 0 else "stop") for i, t in enumerate(texts)]
    out = summarize(rows, 3, task, problems)
    assert out["accuracy"] == pytest.approx(1 / 6) and out["lenient"] == pytest.approx(3 / 6)
    assert out["unparsable"] == pytest.approx(2 / 6) and out["truncated"] == pytest.approx(1 / 6)
    assert out["majority"] == 0.5 and out["pass@2"] == pytest.approx(1 / 3)
    assert Config().task == ""


def test_an_evaluation_needs_a_task():
    with pytest.raises(UserError, match="--task is missing"):
        main([])
