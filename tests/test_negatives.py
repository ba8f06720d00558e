"""The arithmetic behind experiments/negatives.py: what a method's problems are worth, and where the cuts lie."""


import pytest
import torch

from experiments import negatives, negatives_report
from model import pad_right
from rollouts import write_tensors
from tasks import get_task


def test_worth_is_read_off_the_curve_of_sft():
    sizes, sft = [100, 200, 400], [0.2, 0.4, 0.8]
    assert negatives_report.worth(sizes, sft, 100, 0.4) == pytest.approx(2)
    assert negatives_report.worth(sizes, sft, 200, 0.2) == pytest.approx(0.5)
    assert negatives_report.worth(sizes, sft, 100, 0.6) == pytest.approx(2 * 2**0.5)  # half way in log(size)
    assert negatives_report.worth(sizes, sft, 400, 0.9) is None and negatives_report.worth(sizes, sft, 100, 0.1) is None


def test_gains_are_paired_by_seed():
    rows = lambda *test: [dict(test=t, test_sampled=t) for t in test]  # noqa: E731
    results = {"100": dict(sft=dict(setting={}, rows=rows(0.1, 0.3)),
                           rft=dict(setting={}, rows=rows(0.2, 0.4))), "200": dict(
                               sft=dict(setting={}, rows=rows(0.5, 0.5)))}
    found = negatives_report.chain_summary(results, [100, 200])
    assert [(r["size"], r["method"]) for r in found] == [(100, "sft"), (100, "rft"), (200, "sft")]
    rft = found[1]
    assert rft["gain"] == pytest.approx(0.1) and rft["gain_sd"] == pytest.approx(0, abs=1e-9)
    assert rft["sd"] == pytest.approx(0.02**0.5) and rft["worth"] == pytest.approx(2 ** (1 / 3))
    assert "| 100 | RFT, of SFT's best policy |" in negatives_report.chain_table(found)


def test_every_arm_gets_as_many_settings_and_rft_the_policy_that_sft_picked():
    cfg = negatives.Config()
    best = dict(sft=dict(steps=960), dpo_per_step=dict(policy=120, learning_rate=1.0, beta=2.0))
    grid = {name: negatives.grid_of(cfg, name, 384, best) for name in negatives.NAMES}
    assert {len(grid[name]) for name in grid if name not in negatives.UNTUNED} == {4}
    assert [s["steps"] for s in grid["sft"]] == [s["steps"] for s in grid["rft"]] == [s["steps"] for s in grid["rft_early"]]
    assert {s["policy"] for s in grid["rft"]} == {960} and {s["policy"] for s in grid["rft_early"]} == {120}
    assert {s["policy"] for s in grid["dpo_whole"]} == {120} and grid["dpo_random_cut"] == [best["dpo_per_step"]]


def test_cuts_are_held_against_the_first_wrong_step(tmp_path):
    task = get_task("chain")
    tokenizer, problem = task.tokenizer(), task.problems("train", 1, 0)[0]
    right = task.demonstration(problem, 1.0, 0)
    wrong = lambda i: right[: 2 * i + 1] + str((int(right[2 * i + 1]) + 1) % 10)  # noqa: E731 (steps before i right)
    cut = [wrong(0), wrong(2), right[:4], wrong(1) + "=0"]  # exact, exact, before any mistake, one step later
    if task.first_illegal_step(problem, cut[3]) != 1:
        pytest.fail("the toy is wrong")
    columns = {}
    for name, rows in (("prompt", [problem.prompt] * 4), ("chosen", [right] * 4), ("rejected", cut)):
        columns[name], columns[name + "_len"] = pad_right([tokenizer.encode(r) for r in rows])
    write_tensors(tmp_path / "pairs.safetensors", columns | dict(ref_chosen=torch.zeros(4), ref_rejected=torch.zeros(4)))
    (tmp_path / "pairs.json").write_text('{"counts": {}}')
    assert negatives.pit_quality(tmp_path) == dict(pit_exact=0.5, pit_early=0.25, pit_later=0.25)
