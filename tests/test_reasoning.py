"""experiments/reasoning_report.py: what its table and claims say of curves that can be counted by hand."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from toy import tiny_model

from experiments import exact_rl, reasoning, reasoning_report
from infra.cli import UserError, parse
from open_weights.tokenizer import alphabet_tokenizer
from verifier import Verifier, load_verifier, save_verifier, step_values

TOKENIZER = alphabet_tokenizer(list("0123456789="))


def curve(*accuracies):
    """Evaluations every 100 steps of 1000 tokens."""
    return [dict(step=100 * i, num_tokens=1000 * i, **{"eval/accuracy": a}) for i, a in enumerate(accuracies)]


def results(pav):
    """Two seeds; outcome-only runs for twice the steps; PAV's verifier cost as many tokens as its RL. pav: its ends."""
    rows = [dict(arm="outcome", seed=s, draw=0, curve=curve(0.1, 0.1, 0.2, 0.2 + 0.1 * s, 0.3), other_tokens=0)
            for s in range(2)]
    rows += [dict(arm="outcome", seed=s, draw=1, curve=curve(0.1, 0.1, 0.4, 0.4, 0.5), other_tokens=0) for s in range(2)]
    rows += [dict(arm=arm, seed=s, draw=0, curve=curve(0.1, a, 2 * a), other_tokens=2000)
             for arm, ends in pav.items() for s, a in enumerate(ends)]
    best = dict(outcome=dict(warmup_steps=0, entropy_coef=0.0), pav=dict(warmup_steps=30, entropy_coef=0.0))
    tuning = [dict(family=f, **best[f], accuracy=0.5, curve_mean=0.25) for f in best]
    return dict(settings=dict(task="grid", steps=200), rows=rows, best=best, tuning=tuning, command="c",
                provers=[dict(success_base=0.125), dict(success_base=0.375)])


def test_equal_samples_equal_tokens_and_the_share_of_steps():
    r = results({"pav-k4": [0.3, 0.25]})
    assert reasoning_report.by_seed(reasoning_report.at_end(r, "outcome")) == pytest.approx({0: 0.3, 1: 0.3})  # two draws a seed
    assert reasoning_report.by_seed(reasoning_report.at_end(r, "pav-k4")) == pytest.approx({0: 0.6, 1: 0.5})
    assert reasoning_report.equal_tokens(r, "pav-k4") == pytest.approx({0: 0.4, 1: 0.4})  # 2000 of RL and 2000 more
    assert reasoning_report.share_of_steps(r, "pav-k4") == pytest.approx({0: 2 / 3, 1: 0.8})
    assert reasoning_report.share_of_steps(results({"pav-k4": [0.3, 0.1]}), "pav-k4")[1] is None
    row = next(line for line in reasoning_report.table(r).splitlines() if "learned, K=4" in line)
    assert "0.550 (0.071)" in row and "| 2k | 4k |" in row and "+0.150 (0.071)" in row
    assert "* solved by the base: 0.250 (0.177)" in reasoning_report.table(r)


def test_arms_with_other_seeds_are_compared_over_those_that_both_have():
    """Two draws of two seeds, one of the third; K = 1 lacks the first seed."""
    r = results({"pav-k4": [0.3, 0.25, 0.2], "pav-k1": [0.0, 0.2, 0.1]})
    r["rows"] = [row for row in r["rows"] if (row["arm"], row["seed"]) != ("pav-k1", 0)]
    r["rows"].append(dict(arm="pav-k4", seed=1, draw=1, curve=curve(0.1, 0.3, 0.6), other_tokens=2000))
    ends = {arm: reasoning_report.by_seed(reasoning_report.at_end(r, arm)) for arm in ("pav-k4", "pav-k1")}
    assert ends["pav-k4"] == pytest.approx({0: 0.6, 1: 0.55, 2: 0.4})
    assert reasoning_report.minus(ends["pav-k4"], ends["pav-k1"]) == pytest.approx([0.15, 0.2])
    assert reasoning_report.equal_tokens(r, "pav-k4") == pytest.approx({0: 0.4, 1: 0.4})  # no outcome-only of seed 2
    text = reasoning_report.table(r)
    assert "| 3, 1 of them twice |" in text and "| 0.071 |" in text  # 0.5 and 0.6
    # Student's t of two values: 12.706 standard errors.
    assert "PAV, learned, K=4 minus PAV, learned, K=1 +0.175 (0.035, 95% +-0.318)" in text


@pytest.mark.parametrize("ends, holds", [([0.5, 0.51], True), ([0.05, 0.05], False), ([0.6, 0.01], "open")])
def test_the_verdict_follows_the_seeds(ends, holds):
    claims = reasoning_report.claims_of(results({"pav-k4": ends, "pav-k1": [0.1, 0.11]}))
    assert claims[0]["holds"] == holds and len(claims) == 2
    assert reasoning_report.claims_of(results({})) == []


def test_a_control_that_does_as_well_makes_the_claim_partly_true():
    r = results({"pav-k4": [0.5, 0.51]})
    r["rows"] += [dict(arm="constant", seed=s, draw=0, curve=curve(0.1, 0.2, 0.3, 0.9, 1.0 + 0.02 * s), other_tokens=0)
                  for s in range(2)]
    claim = reasoning_report.claims_of(r)[0]
    assert claim["holds"] == "partly" and "says 0.5 +0.710 (0.014, 95% +-0.127) at equal samples" in claim["measured"]


def test_a_control_that_collapses_gives_nothing():
    r = results({"pav-k4": [0.05, 0.05]})
    r["rows"] += [dict(arm="constant", seed=s, draw=0, curve=curve(*[0.0] * 5), other_tokens=0) for s in range(2)]
    assert reasoning_report.claims_of(r)[0]["holds"] is False


def test_best_of_4_of_the_base_itself_and_the_outcome_alone_from_the_prover():
    r = results({"pav-k4": [0.5, 0.51], "base-k4": [0.3, 0.31]})
    r["rows"] += [dict(arm="outcome-prover", seed=s, draw=0, curve=curve(0.1, 0.6, 0.8), other_tokens=0) for s in range(2)]
    progress, own = reasoning_report.claims_of(r)
    assert "starts from the prover's weights" in progress["fails_when"] and "+0.210 (0.014, " in progress["fails_when"]
    assert own["holds"] is True and "+0.310 (0.014, 95% +-0.127) at equal samples" in own["measured"]  # 0.6 and 0.62 against 0.3
    assert "+0.210 (0.014, 95% +-0.127) at equal total tokens" in own["measured"]  # ... against 0.4
    assert "other policy (2 seeds) -0.400 (0.000, " in own["measured"]


def test_seeds_that_were_added_later_are_told_apart():
    r = results({"pav-k4": [0.5, 0.51, 0.3, 0.31]})
    r["rows"] += [dict(arm="outcome", seed=s, draw=0, curve=curve(0.1, 0.1, 0.2, 0.2, 0.3), other_tokens=0) for s in (2, 3)]
    r["settings"] |= dict(seeds=2)
    words = reasoning_report.claims_of(r)[0]["measured"]
    assert "4 seeds, each" in words and "added later +0.310 (0.014, 95% +-0.127)" in words  # 0.6 and 0.62 against 0.3
    assert "added later" not in reasoning_report.claims_of(r | dict(settings=dict(task="grid", steps=200)))[0]["measured"]


def test_whether_the_verifier_foretells_the_gain():
    r = results({"pav-k4": [0.3, 0.25, 0.2]})
    r["rows"].append(dict(arm="outcome", seed=2, draw=0, curve=curve(0.1, 0.1, 0.2, 0.2, 0.4), other_tokens=0))
    r["provers"] = [dict(corr_first_within=c) for c in (0.9, 0.8, 0.7)]  # gains 0.2, 0.1, 0.0
    lines = [line for line in reasoning_report.table(r).splitlines() if "foretell" in line]
    assert len(lines) == 1 and "with fresh rollouts" in lines[0] and lines[0].endswith("Over 3 seeds the two correlate 1.00")


def test_which_runs_are_made():
    words = "--arms outcome pav-k4 strong --seeds 2 --draws 2 --draws-of outcome exact --more-seeds 1 --more-of strong"
    assert sorted(reasoning.wanted(parse(reasoning.Config, words.split()))) == [
        ("outcome", 0, 0), ("outcome", 0, 1), ("outcome", 1, 0), ("outcome", 1, 1),
        ("pav-k4", 0, 0), ("pav-k4", 1, 0), ("strong", 0, 0), ("strong", 1, 0), ("strong", 2, 0)]


@pytest.mark.parametrize("folder", ["reasoning_countdown", "reasoning_grid", "reasoning_grid_base0.5"])
def test_a_committed_table_has_the_runs_of_its_command(folder):
    file = Path(__file__).parent.parent / "docs" / "results" / folder / "results.json"
    committed = json.loads(file.read_text())
    cfg = parse(reasoning.Config, shlex.split(committed["command"])[3:])
    assert sorted((r["arm"], r["seed"], r["draw"]) for r in committed["rows"]) == sorted(reasoning.wanted(cfg))


def test_the_same_verifier_is_read_as_best_of_k(tmp_path):
    verifier = Verifier(tiny_model(), fingerprint=TOKENIZER.fingerprint)
    torch.nn.init.normal_(verifier.head.weight)
    folder = tmp_path / "verifier"
    (folder / "step_000001").mkdir(parents=True)
    save_verifier(folder / "step_000001", verifier, TOKENIZER, dict(task="grid"))
    (folder / "summary.json").write_text("{}")
    (folder / "run_config.json").write_text(json.dumps(dict(prover_k=1)))
    assert reasoning.read_as(str(folder), 1) == str(folder)
    tokens, ends = torch.randint(10, (3, 6)), torch.tensor([[2, 4, 6]] * 3)
    values = step_values(load_verifier(reasoning.read_as(str(folder), 4), TOKENIZER), tokens, ends)
    torch.testing.assert_close(values, 1 - (1 - step_values(verifier, tokens, ends)) ** 4)


def test_exact_values_need_a_solver(tmp_path):
    with pytest.raises(UserError, match="chain has no solver"):
        exact_rl.main(["--task", "chain", "--policy", str(tmp_path), "--run-dir", str(tmp_path / "run")])
