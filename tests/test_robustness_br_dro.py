"""BR-DRO: what each adversary can and cannot name."""

import json

import pytest
import torch

from robustness import br_dro, data


def test_cvar_is_the_best_response_of_all_functions():
    loss = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.8, 0.0, 0.4, 0.5])
    w = br_dro.cvar_adversary(loss, 0.25)
    assert w.tolist() == [0, 0, 1, 0, 1, 0, 0, 0]
    advantage = loss - loss.quantile(0.75)
    g = torch.Generator().manual_seed(0)
    others = torch.rand(200, 8, generator=g)
    assert (others @ advantage).max() <= w @ advantage


def test_group_dro_names_the_group_of_the_highest_mean_loss():
    loss, group = torch.tensor([1.0, 1.0, 3.0, 0.0, 2.5]), torch.tensor([0, 0, 1, 1, 2])
    assert br_dro.group_adversary(loss, group).tolist() == [0, 0, 0, 0, 1]


def test_a_simple_adversary_names_what_its_input_shows_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1, generator=g)
    label = torch.randint(0, 2, (2000,), generator=g)
    shown = (x[:, 0] > 1) & (label == 1)  # a group that is simple, given the label
    loss = torch.rand(2000, generator=g) + 2.0 * shown
    w = br_dro.simple_adversary(x, loss, label, 0.1, 1e-3)
    assert w[shown].mean() > w[~shown].mean() + 0.4
    wrong = torch.rand(2000, generator=g) < 0.1  # mislabelled points: no function of x
    loss = torch.rand(2000, generator=g) + 2.0 * wrong
    w = br_dro.simple_adversary(x, loss, label, 0.2, 1e-3)
    assert abs(w[wrong].mean() - w[~wrong].mean()) < 0.1


def test_weights_multiply_keep_mean_one_and_are_bounded():
    weight = br_dro.update_weights(torch.ones(4), torch.tensor([1.0, 0, 0, 0]), 0.5)
    assert weight.mean() == pytest.approx(1)
    assert (weight[0] / weight[1]).log() == pytest.approx(0.5)
    weight = torch.ones(1000)
    weight[0] = 200
    cut = br_dro.update_weights(weight, torch.zeros(1000), 1.0)
    assert cut.mean() == pytest.approx(1) and 50 < cut[0] < 60


def test_noise_is_of_the_rate_and_the_simple_kind_sits_on_bright_images():
    g = torch.Generator().manual_seed(0)
    n = 4000
    split = data.Split(torch.rand(n, 1, 2, 2, generator=g), torch.zeros(n).long(), torch.zeros(n))
    for kind in ("10%", br_dro.SIMPLE):
        y, flipped = br_dro.noisy(split, kind, 0.1, 0)
        assert flipped.float().mean() == pytest.approx(0.1, abs=0.02)
        assert torch.equal(y, flipped.long())
    brightness = split.x.mean((1, 2, 3))
    assert brightness[flipped].min() > brightness[~flipped].median()


def test_bitrate_inputs_are_few_and_of_unit_variance():
    g = torch.Generator().manual_seed(0)
    z = br_dro.bitrate_inputs(torch.randn(100, 3, 4, 4, generator=g), 5)
    assert z.shape == (100, 5)
    assert torch.allclose(z.T @ z / 99, torch.eye(5), atol=1e-3)


def test_smoke_run_leaves_claims(tmp_path):
    br_dro.main(["--smoke", "--seeds", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {c["paper"] for c in results["claims"]} == {"2302.02931"}
    assert set(results["rows"]["10%"]) == set(br_dro.GRIDS)
    assert "BR-DRO minus the other arm" in (tmp_path / "table.md").read_text()
