"""What the experiments share: one verdict rule, exact best-of-n, cells computed once; and that
every committed claim is what the numbers of its file give, with a command that runs as it is
written."""

import importlib
import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch

from experiments import adam_epsilon, restate, toolkit
from infra.cli import parse
from infra.runs import mean

RESULTS = Path(__file__).parent.parent / "docs/results"


def test_a_verdict_needs_the_95_percent_interval():
    assert (
        toolkit.verdict([0.1, 0.12, 0.11]) is True
        and toolkit.verdict([-0.1, -0.12, -0.11]) is False
    )
    assert (
        toolkit.verdict([0.1, -0.1, 0.1])
        == "open"
        == toolkit.verdict([0.0, 0.0])
        == toolkit.verdict([0.5])
    )
    assert (
        toolkit.verdict([0.1, 0.12, 0.11], least=0.2) is False
        and toolkit.verdict([1.6, 1.7, 1.8], 1.4) is True
    )
    error = 0.5 / 3**0.5  # of four values half a unit from their mean
    # Student's t with three degrees of freedom: 3.182.
    assert toolkit.verdict([3.19 * error + x for x in (0.5, -0.5, 0.5, -0.5)]) is True
    assert toolkit.verdict([3.17 * error + x for x in (0.5, -0.5, 0.5, -0.5)]) == "open"


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 31, 60])
def test_noise_is_called_a_difference_in_one_case_of_twenty(seeds):
    """Whatever the number of seeds; two standard errors would do so in one of nine with five."""
    noise = torch.randn(4000, seeds, generator=torch.Generator().manual_seed(0)).tolist()
    shown = mean(toolkit.verdict(row) != "open" for row in noise)
    assert 0.038 < shown < 0.062


def test_a_claim_of_parts():
    assert toolkit.together([True, True]) is True and toolkit.together([False, False]) is False
    assert (
        toolkit.together([True, False])
        == toolkit.together([True, "open"])
        == "partly"
        == toolkit.together(["open", "partly"])
    )
    assert (
        toolkit.together(["open", False]) is False and toolkit.together(["open", "open"]) == "open"
    )
    assert [toolkit.opposite(v) for v in (True, False, "open")] == [False, True, "open"]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    g = torch.Generator().manual_seed(0)
    score = torch.randint(3, (4, 5), generator=g).float()  # with ties: the earlier sample
    value = torch.rand(4, 5, generator=g, dtype=torch.float64)
    for i in range(4):
        best = [
            max(s, key=lambda j: (score[i, j].item(), -j))
            for s in itertools.combinations(range(5), n)
        ]
        by_hand = mean(value[i, j].item() for j in best)
        assert toolkit.expected_best(score, value, n)[i].item() == pytest.approx(by_hand)


def test_a_vote_is_taken_group_by_group():
    answers = ["3", "5", "5", "7", "7", "5", "1"]
    right = [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert (
        toolkit.vote_accuracy(answers, right, 3) == 0.5
    )  # 5 wins the first group, 7 the second; the rest is no group
    assert toolkit.vote_accuracy(answers, right, 1) == pytest.approx(3 / 7)
    assert toolkit.vote_accuracy([None, None], [1.0, 1.0], 2) == 0.0  # nobody votes


def test_a_cell_is_computed_once_and_whole_or_absent(tmp_path):
    path = tmp_path / "below/cell.json"
    calls = []

    def make():
        calls.append(1)
        return dict(x=0.5, n={1: 2})

    first = toolkit.cached(path, make)
    second = toolkit.cached(path, make)
    assert first == second and first["n"] == {"1": 2} and "cpu_seconds" in first and len(calls) == 1

    def fail():
        raise ValueError

    with pytest.raises(ValueError):
        toolkit.cached(tmp_path / "other.json", fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["below"]
    assert toolkit.cached(tmp_path / "list.json", lambda: [1, 2]) == [1, 2]


def test_formats():
    assert (
        toolkit.mean_sd([0.1, 0.3]) == "0.200 (0.141)"
        and toolkit.mean_sd([1.0], 1, signed=True) == "+1.0 (0.0)"
    )


@pytest.mark.parametrize("name", restate.CLAIMS)
def test_a_committed_claim_is_what_its_numbers_give(name):
    path = RESULTS / name
    assert restate.restated(path, restate.CLAIMS[name]) == json.loads(path.read_text())


def test_every_file_with_claims_can_be_restated():
    def claims(path):
        content = json.loads(path.read_text())
        return content.get("claims") if isinstance(content, dict) else None

    found = {str(p.relative_to(RESULTS)) for p in RESULTS.rglob("*.json") if claims(p)}
    # Those of robustness/ are stated where they are measured, and by another rule (its common.py).
    robust = {f"{p.stem}/results.json" for p in (RESULTS.parent.parent / "robustness").glob("*.py")}
    assert len(found - robust) > 10
    assert found - robust <= set(restate.CLAIMS)


def commands(value):
    if isinstance(value, dict):
        return [v for k, v in value.items() if k == "command"] + [
            c for v in value.values() for c in commands(v)
        ]
    return [c for v in value for c in commands(v)] if isinstance(value, list) else []


def test_recorded_commands_run_as_they_are_written():
    found = {c for p in RESULTS.rglob("*.json") for c in commands(json.loads(p.read_text()))}
    assert len(found) > 10
    for command in found:
        python, minus_m, module, *argv = shlex.split(command)
        assert (python, minus_m) == ("python", "-m")
        if module == "report":  # its first argument needs no flag
            module, argv = "report.__main__", ["--run", *argv]
        script = importlib.import_module(module)
        config = script.Config if hasattr(script, "Config") else script.common.Config
        parse(config, argv)  # UserError: a flag that is gone
        assert not any(word.startswith("/") for word in argv), command  # a path of one machine


def test_a_step_is_silent_only_if_no_sample_is_right(monkeypatch):
    def step(outcome):
        return {
            "grad_norm": 0.5,
            "frac_reward_zero_std": 1,
            "rewards/outcome/mean": outcome,
            "entropy": 2.0,
            "eval/accuracy": 0.5,
        }

    rows = [step(0.0), step(0.0), step(1.0), step(0.25)]
    monkeypatch.setattr(adam_epsilon, "read_metrics", lambda run: rows)
    found = adam_epsilon.look("run")
    assert (found["with_gradient"], found["silent"], found["silent_norm"]) == (3, 1, 0.5)


def test_a_results_file_names_every_flag_that_was_typed(monkeypatch):
    assert toolkit.typed("x", ["--out", "two words"]) == "x --out 'two words'"
    monkeypatch.setattr("sys.argv", ["x.py", "--seeds", "3"])
    assert toolkit.typed("x", None) == "x --seeds 3"
