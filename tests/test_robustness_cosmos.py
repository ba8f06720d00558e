"""CosMoS: clusters, the choice in each, and when confidence chooses wrongly."""

import json

import pytest
import torch

from robustness import common, cosmos, data


def test_kmeans_finds_two_heaps():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=g) + 20 * (torch.arange(60) % 2).unsqueeze(1)
    cluster = cosmos.kmeans(x, 2, 0)
    assert len(cluster[::2].unique()) == 1 and len(cluster[1::2].unique()) == 1
    assert cluster[0] != cluster[1]
    assert torch.equal(cosmos.kmeans(x, 1, 0), torch.zeros(60).long())


def test_the_most_confident_classifier_of_each_cluster_is_used():
    sure, unsure = [0.1, 0.9], [0.4, 0.6]
    prob = torch.tensor([[sure, sure, unsure, sure], [unsure, unsure, sure, unsure]])
    assert cosmos.select(prob, torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 0, 0]  # a tie: first
    assert cosmos.select(prob, torch.tensor([0, 0, 1, 0])).tolist() == [0, 0, 1, 0]


def test_regret_is_against_the_best_single_classifier():
    correct = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert cosmos.regret(correct, torch.tensor([1, 0, 0, 0])) == 0.5
    assert cosmos.regret(correct, torch.tensor([1, 1, 1, 1])) == -0.25


@pytest.mark.parametrize("shortcut, right", [(1.0, True), (3.0, False)])
def test_a_shortcut_of_twice_the_core_is_chosen_where_it_is_wrong(shortcut, right):
    core = 1.0  # log-odds; on the conflicting inputs the two pull apart
    z = torch.tensor([core - shortcut, core]).reshape(2, 1, 1).expand(2, 6, 1)
    prob = torch.cat([torch.zeros_like(z), z], 2).softmax(2)
    chosen = cosmos.select(prob, torch.zeros(6).long())
    assert (chosen == 1).all() == right


def test_a_mix_has_its_agreement_and_no_row_twice():
    g = torch.Generator().manual_seed(0)
    y, a = torch.randint(0, 2, (2, 2000), generator=g)
    rows = data.draw_mix(y, a, (0.9, 0.2), 400, g)
    assert len(rows.unique()) == 400
    for attribute, share in ((0, 0.9), (1, 0.2)):
        chosen = rows[a[rows] == attribute]
        assert len(chosen) == 200
        assert (y[chosen] == attribute).float().mean() == pytest.approx(share)


def test_balanced_groups_weigh_alike():
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 2, (400,), generator=g)
    y = torch.where(torch.rand(400, generator=g) < 0.95, a, 1 - a)
    x = torch.stack([2.0 * a - 1, (2.0 * y - 1) + torch.randn(400, generator=g)], 1)
    train = data.Split(x, y, a)
    plain, balanced = (cosmos.classifier("text", train, b, 1e-3, 0)(x) for b in (False, True))
    assert common.worst_group(balanced, y, train.group) > common.worst_group(plain, y, train.group)


def test_smoke_run_leaves_claims(tmp_path):
    cosmos.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {c["paper"] for c in results["claims"]} == {"2306.11120"}
    assert "two in one" in results["rows"]["text 0.9"][0]
