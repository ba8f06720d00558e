"""The arithmetic behind experiments/pav_search.py and pav_data.py, on toys that can be counted by hand."""

import pytest
import torch

from experiments import pav_data, pav_search_report
from pav import bce_weights, value_loss


def test_tokens_to_reach_interpolates_in_log_tokens_and_marks_bounds():
    tokens, accuracy = [10, 40, 160], [0.2, 0.6, 0.8]
    assert pav_search_report.tokens_to_reach(tokens, accuracy, 0.4) == (pytest.approx(20), False)
    assert pav_search_report.tokens_to_reach(tokens, accuracy, 0.1) == (10, True)
    assert pav_search_report.tokens_to_reach(tokens, accuracy, 0.9) == (None, False)
    assert pav_search_report.tokens_to_reach(tokens, [0.2, 0.1, 0.8], 0.3)[0] < 160  # a dip is no crossing


def point(n, accuracy):
    return dict(n=n, accuracy=accuracy, tokens=10.0 * n, scored=20.0 * n)


def test_gains_are_paired_and_efficiency_is_read_at_the_accuracy_of_the_rival():
    rows = [dict(orm=[point(3, a), point(6, a + 0.1), point(12, a + 0.2)],
                 beam_q=[point(3, a + 0.1), point(6, a + 0.1), point(12, a + 0.15)]) for a in (0.2, 0.4)]
    found = pav_search_report.summarise(rows)
    assert found["orm"]["gain"] == [0, 0, 0] and found["orm"]["efficiency"][1] == (pytest.approx(1), "")
    beam = found["beam_q"]
    assert beam["gain"] == pytest.approx([0.1, 0, -0.05]) and beam["gain_sd"] == pytest.approx([0, 0, 0], abs=1e-9)
    assert [pav_search_report.times(*e) for e in beam["efficiency"]] == ["at least 1.0x", "at least 2.0x", "never"]
    for row in rows:
        row["orm"][1]["accuracy"] = 0.0  # where the ORM falls with N there is nothing to reach
    assert pav_search_report.times(*pav_search_report.summarise(rows)["beam_q"]["efficiency"][1]) == "no target"


def rollouts():
    """Two cuts of one seed with two continuations each, and one at the bare prompt: prompt 1 token, steps of 1 token."""
    return dict(tokens=torch.tensor([[9, 1, 2, 3], [9, 1, 4, 4], [9, 1, 2, 5], [9, 1, 2, 6], [8, 1, 1, 1]]),
                ends=torch.tensor([[1, 2, 3, 4]] * 5),
                target=torch.tensor([[0.0, 0.5, 1.0, 1.0], [0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.5, 0.0],
                                     [0.25, 0.0, 0.0, 0.0]]),
                weight=torch.tensor([[0.0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]))


def test_labels_at_cuts_keep_one_row_a_cut_and_nothing_beyond_it():
    found = pav_data.labels_at_cuts(rollouts())
    assert found["tokens"].tolist() == [[9, 1, 0, 0], [9, 1, 2, 0], [8, 0, 0, 0]]
    assert found["ends"].tolist() == [[2], [3], [1]] and found["target"].tolist() == [[0.5], [0.5], [0.25]]
    w1, w0, _ = bce_weights(found["target"], found["weight"])
    assert torch.isfinite(value_loss(torch.zeros(3, 1), found["target"], found["weight"], w1, w0))


def test_a_budget_takes_the_nearest_number_of_shards():
    assert [pav_data.shards_within([4, 4, 4], b) for b in (1, 5, 7, 100)] == [1, 1, 2, 3]


def test_differences_pair_the_seeds():
    rows = [dict(arm=a, budget=10, seed=s, corr_advantage_exact=v) for a, s, v in
            [("mc1", 0, 0.5), ("mc1", 1, 0.7), ("mc16", 1, 0.1), ("mc16", 0, 0.2)]]
    assert pav_data.gain(rows, "mc1", "mc16", 10) == pytest.approx([0.3, 0.6])
