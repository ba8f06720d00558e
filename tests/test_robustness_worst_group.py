"""MTL for the worst group: both losses by hand, weights, what selection sees, published files."""

import json

import pytest
import torch

from infra.cli import UserError
from robustness import worst_group, worst_group_published
from robustness.worst_group import Arm

CFG = worst_group.Config(data="synthetic", steps=4, every=2, images=40)


def zero(x):
    return torch.zeros_like(x)


def test_the_average_image_has_a_reconstruction_loss_of_one():
    x = torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(0)
    variance = x.var(0, unbiased=False).mean()
    g = torch.Generator().manual_seed(1)
    loss = worst_group.masked_reconstruction_loss(zero, zero, x, variance, g)
    assert loss.item() == pytest.approx(1, abs=0.05)


def test_only_hidden_pixels_count_and_they_are_not_seen():
    """An identity sees the rest: its error is that of zero at the hidden ones."""
    x = torch.tensor([[3.0, 3.0, 3.0, 3.0]]).repeat(50, 1)
    seen = []

    def identity(v):
        seen.append(v)
        return v

    g = torch.Generator().manual_seed(0)
    loss = worst_group.masked_reconstruction_loss(identity, identity, x, torch.tensor(1.0), g, 0.5)
    assert loss.item() == pytest.approx(9)
    assert set(seen[0].unique().tolist()) == {0.0, 3.0}


def test_mtl_loss_by_hand():
    logits = torch.zeros(3, 2)
    h = torch.tensor([[1.0, -2.0], [0.0, 3.0], [0.0, 0.0]])
    y = torch.tensor([0, 1, 0])
    weight = torch.tensor([1.0, 0, 2])
    loss = worst_group.mtl_loss(logits, y, h, torch.tensor(0.5), 2.0, 0.1, weight)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item() + 2 * 0.5 + 0.1 * 1.0)


def test_every_arm_has_the_same_number_of_settings():
    assert {len(grid) for grid in worst_group.GRIDS.values()} == {4}
    for grid in worst_group.GRIDS.values():
        assert len({str(arm) for arm in grid}) == 4


def test_weights():
    train, *_ = worst_group.splits("marker", 0, CFG)
    assert torch.equal(worst_group.example_weights(Arm(), train, CFG, 0), torch.ones(40))
    weight = worst_group.example_weights(Arm(balanced=True), train, CFG, 0)
    groups = [weight[train.group == g].sum().item() for g in train.group.unique()]
    assert groups == pytest.approx([groups[0]] * len(groups), rel=1e-4)
    train = train._replace(y=torch.arange(40) % 2)  # no two steps can get all of these right
    weight = worst_group.example_weights(Arm(jtt_steps=2, jtt_factor=20.0), train, CFG, 0)
    assert weight.mean().item() == pytest.approx(1)
    assert weight.max() / weight.min() == pytest.approx(20)


def test_pixels_are_centred_by_training_images_alone():
    train, validation, test = worst_group.splits("photograph", 0, CFG)
    assert train.x.mean(0).abs().max() < 1e-5
    assert test.x.mean(0).abs().max() > 1e-3


def test_the_step_is_chosen_on_validation(monkeypatch):
    """The test set's own best step would be a higher number: it must not be what is reported."""
    values = iter([(0.5, 0.9), (0.5, 0.2), (0.6, 0.3), (0.7, 0.1)])  # looks, then last, then chosen

    def accuracies(net, split):
        return next(values)

    monkeypatch.setattr(worst_group.common, "accuracies", accuracies)
    found = worst_group.run(Arm(), worst_group.splits("marker", 0, CFG), 0, CFG)
    assert found == dict(worst=0.1, average=0.7, last=0.3, validation=0.9)


def result_file(folder, method, seed, worst):
    path = folder / "models_params" / "civilcomments_small" / method / f"{method}_{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    best = dict(min_acc_te=worst, avg_acc_te=0.8, epoch=3)
    path.write_text(json.dumps(dict(config=dict(seed=seed), best_results=best)))
    return path


def test_published_files_are_paired_by_seed(tmp_path):
    for seed in range(3):
        result_file(tmp_path, "erm", seed, 0.60 + seed / 100)
        result_file(tmp_path, "jtt", seed, 0.60 + seed / 100 + (0.05 if seed == 2 else 0))
        result_file(tmp_path, "erm_mt_l1", seed, 0.63 + seed / 100)
    found = worst_group_published.published(tmp_path)
    assert found["erm"][1] == pytest.approx((61, 80, 3))
    text, claim = worst_group_published.published_table(found)
    assert "| erm | +3.000 (0.000) * |" in text
    assert "In 2 of 3 seeds JTT's numbers are those of ERM" in claim["fails_when"]
    assert claim["holds"] == "partly"  # over JTT: 3, 3 and -2


def test_published_refuses_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="has no models_params"):
        worst_group_published.published(tmp_path)
    result_file(tmp_path, "erm", 0, 0.6).write_text("[]")
    with pytest.raises(UserError, match="not a result file"):
        worst_group_published.published(tmp_path)


def test_smoke(tmp_path):
    worst_group.main(["--smoke", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["claims"]) == 2
    assert {r["arm"] for r in content["rows"]} == set(worst_group.GRIDS)
