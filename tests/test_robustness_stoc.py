"""STOC: the contrastive loss by hand, self-training, the closed form of the toy, the script."""

import json
import math

import pytest
import torch

from robustness import self_training, stoc


def test_nt_xent_by_hand():
    """Two images, views on the axes: each view has one partner at similarity 1 and two at 0."""
    a = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # norms do not count
    expected = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 2))
    assert stoc.nt_xent(a, a.clone(), 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_nt_xent_is_least_for_partners():
    a = torch.eye(4)
    assert stoc.nt_xent(a, a) < stoc.nt_xent(a, a.roll(1, 0))


def test_softmax_head_is_stationary():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(40, 3, generator=g), torch.arange(40) % 4
    weight = torch.rand(40, generator=g)
    head = self_training.softmax_head(z, y, weight, torch.zeros(4, 4), l2=0.1).requires_grad_()
    logits = torch.nn.functional.pad(z, (0, 1), value=1.0) @ head
    loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    objective = (weight * loss).sum() / weight.sum() + 0.05 * head[:-1].square().sum()
    (gradient,) = torch.autograd.grad(objective, head)
    assert gradient.abs().max() < 1e-4


def test_confident_takes_the_same_share_of_every_predicted_class():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.45, 0.55]])
    rows, label = self_training.confident(p, 0.5)
    assert dict(zip(rows.tolist(), label.tolist())) == {0: 0, 2: 0, 4: 1}
    assert len(self_training.confident(p, 1.0)[0]) == 6


def test_self_training_follows_the_target_where_its_clusters_are_clear():
    """The target is the source moved along: the first border cuts a cluster, the last does not."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    centres = torch.stack([4.0 * y - 2, torch.zeros(200)], 1)
    source = centres + 0.3 * torch.randn(200, 2, generator=g)
    target = centres + torch.tensor([1.8, 0.0]) + 0.3 * torch.randn(200, 2, generator=g)
    before, after = stoc.self_train(source, y, target, classes=2)
    first = stoc.accuracy(target, y, before)
    assert 0.5 < first < 0.95 < stoc.accuracy(target, y, after)


def test_views_of_a_point_have_the_moments_of_the_closed_form():
    """M / 4 + diag(M) / 12 is the second moment of views, M / 4 that of two views of one point."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, 3, generator=g) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 2]])
    moment = x.T @ x / len(x)
    one, two = (x * torch.rand(x.shape, generator=g) for _ in range(2))
    assert torch.allclose(one.T @ two / len(x), moment / 4, atol=0.03)
    diagonal = moment.diagonal().diag()
    assert torch.allclose(one.T @ one / len(x), moment / 4 + diagonal / 12, atol=0.03)


def test_toy_needs_both_under_shift_and_neither_without():
    shifted = self_training.toy(0, True)
    assert shifted["ERM"] < 0.6 and shifted["ST"] < 0.6
    assert shifted["ERM"] + 0.05 < shifted["CL"] < shifted["STOC"] - 0.1
    assert min(self_training.toy(0, False).values()) > 0.99


def test_augmented_views_differ_and_keep_their_shape():
    x = torch.rand(5, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    one, two = stoc.augment(x, g), stoc.augment(x, g)
    assert one.shape == x.shape and torch.isfinite(one).all() and not torch.allclose(one, two)


def test_no_digit_is_in_two_parts():
    cfg = stoc.Config(data="synthetic", images=50)
    for pair in ("no shift: 100 labels", "MNIST to optdigits"):
        parts = stoc.domains(pair, 0, cfg)
        assert all(len(x) == len(y) > 0 for x, y in parts)
        seen = [tuple(image.flatten().tolist()) for x, _ in parts for image in x]
        assert len(set(seen)) == len(seen)


def test_smoke(tmp_path):
    stoc.main(["--smoke", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "results.json").read_text())
    assert {r["pair"] for r in content["rows"]} == set(stoc.PAIRS)
    assert content["claims"][0]["holds"] in (True, False, "partly")
