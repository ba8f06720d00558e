"""Accounting against constants and against two libraries where they are installed; what the private
learner promises; the script."""

import itertools
import json
import math

import pytest
import torch

from robustness import dp, local_heads, private_transfer

DELTA = 1e-5
# noise multiplier, steps: epsilon exact (loss distributions of dp-accounting 0.6), RDP, zCDP
KNOWN = [(10, 50, 2.9432, 3.1890, 3.6431), (50, 100, 0.7255, 0.7945, 0.9797),
         (20, 100, 1.9931, 2.1657, 2.5243)]


@pytest.mark.parametrize("noise, steps, exact, rdp, zcdp", KNOWN)
def test_epsilon(noise, steps, exact, rdp, zcdp):
    rho = dp.zcdp_rho(noise, steps)
    assert dp.gaussian_epsilon(rho, DELTA) == pytest.approx(exact, abs=2e-4)
    assert dp.rdp_epsilon(rho, DELTA) == pytest.approx(rdp, abs=2e-4)
    assert dp.zcdp_epsilon(rho, DELTA) == pytest.approx(zcdp, abs=2e-4)


def test_hundred_steps_at_fifty_are_one_at_five():
    assert dp.zcdp_rho(50, 100) == pytest.approx(dp.zcdp_rho(5, 1))


@pytest.mark.parametrize("epsilon", [0.1, 0.3, 1.0, 3.0, 10.0])
def test_rho_for_is_the_inverse(epsilon):
    rho = dp.rho_for(epsilon, DELTA)
    assert dp.gaussian_epsilon(rho, DELTA) == pytest.approx(epsilon, rel=1e-6)
    assert epsilon < dp.rdp_epsilon(rho, DELTA) < dp.zcdp_epsilon(rho, DELTA)


def test_infinite_epsilon_is_no_noise():
    assert math.isinf(dp.rho_for(math.inf, DELTA))


@pytest.mark.parametrize("noise, steps", [(10.0, 50), (5.0, 1)])
def test_against_dp_accounting(noise, steps):
    library = pytest.importorskip("dp_accounting")
    event = library.dp_event.SelfComposedDpEvent(library.dp_event.GaussianDpEvent(noise), steps)
    rho = dp.zcdp_rho(noise, steps)
    accountant = library.pld.PLDAccountant(value_discretization_interval=1e-3)
    exact = accountant.compose(event).get_epsilon(DELTA)
    assert dp.gaussian_epsilon(rho, DELTA) == pytest.approx(exact, rel=1e-3)
    renyi = library.rdp.RdpAccountant().compose(event).get_epsilon(DELTA)
    assert dp.rdp_epsilon(rho, DELTA) == pytest.approx(renyi, rel=2e-3)


@pytest.mark.parametrize("noise, steps", [(10.0, 50), (1.5, 40)])
def test_against_opacus(noise, steps):
    analysis = pytest.importorskip("opacus.accountants.analysis.rdp")
    orders = [1 + k / 10 for k in range(1, 100)] + list(range(12, 64))
    renyi = analysis.compute_rdp(q=1.0, noise_multiplier=noise, steps=steps, orders=orders)
    rho = dp.zcdp_rho(noise, steps)
    assert renyi == pytest.approx([rho * order for order in orders])  # which is what rho-zCDP says
    epsilon, _ = analysis.get_privacy_spent(orders=orders, rdp=renyi, delta=DELTA)
    assert dp.rdp_epsilon(rho, DELTA) == pytest.approx(epsilon, rel=2e-3)


@pytest.fixture
def rows():
    g = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(12, 5, generator=g), dim=1)
    one_hot = torch.eye(3)[torch.arange(12) % 3]
    weights = torch.randn(3, 6, generator=g)
    return weights, z, one_hot


@pytest.mark.parametrize("clip", [0.2, 1.0, 100.0])
def test_clipped_gradient_sum_is_autograds(rows, clip):
    weights, z, one_hot = rows
    total = torch.zeros_like(weights)
    for i in range(len(z)):
        w = weights.clone().requires_grad_()
        output = torch.cat([z[i], torch.ones(1)]) @ w.T
        (-(one_hot[i] * output.log_softmax(0)).sum()).backward()
        total += w.grad * min(1.0, clip / w.grad.norm().item())
    found = dp.clipped_gradient_sum(weights, z, one_hot, clip)
    assert torch.allclose(found, total, atol=1e-5)


def test_one_row_moves_the_sum_by_at_most_clip(rows):
    weights, z, one_hot = rows
    whole = dp.clipped_gradient_sum(weights, z, one_hot, 0.3)
    for i in range(len(z)):
        rest = torch.arange(len(z)) != i
        without = dp.clipped_gradient_sum(weights, z[rest], one_hot[rest], 0.3)
        assert (whole - without).norm() <= 0.3 + 1e-6


def test_noise_has_the_deviation_that_was_paid_for():
    """One step from zero on targets with no gradient: the weights are the noise alone."""
    z = torch.zeros(4, 300)
    target = torch.full((4, 2), 0.5)
    rho = dp.rho_for(1.0, DELTA)
    draws = [dp.dp_linear(z, target, rho, 1.0, 1, torch.Generator().manual_seed(s), clip=2.0)
             for s in range(4)]
    expected = 2.0 * math.sqrt(1 / (2 * rho)) / 4
    assert torch.stack(draws).std().item() == pytest.approx(expected, rel=0.05)


def test_without_noise_it_is_gradient_descent(rows):
    _, z, one_hot = rows
    found = dp.dp_linear(z, one_hot, math.inf, 0.5, 3, torch.Generator(), clip=100.0, momentum=0.0)
    w = torch.zeros(3, 6, requires_grad=True)
    for _ in range(3):
        output = torch.nn.functional.pad(z, (0, 1), value=1.0) @ w.T
        loss = -(one_hot * output.log_softmax(1)).sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, w)
        w = (w - 0.5 * gradient).detach().requires_grad_()
    assert torch.allclose(found, w, atol=1e-6)


def test_public_subspace_is_orthonormal_and_finds_the_large_directions():
    g = torch.Generator().manual_seed(1)
    features = torch.randn(200, 6, generator=g) * torch.tensor([9.0, 0.1, 0.1, 5.0, 0.1, 0.1]) + 3
    mean, basis = dp.public_subspace(features, 2)
    assert torch.allclose(mean, features.mean(0))
    assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-5)
    assert basis[[0, 3]].norm() ** 2 == pytest.approx(2, abs=0.01)


def test_task_subspace_finds_what_public_tasks_share():
    g = torch.Generator().manual_seed(2)
    directions = torch.randn(2, 20, generator=g)
    heads = torch.randn(7, 2, generator=g) @ directions
    x = torch.randn(500, 20, generator=g)
    basis = dp.task_subspace(x, x @ heads.T, 2)
    outside = heads - heads @ basis @ basis.T
    assert outside.norm() < 0.05 * heads.norm()


def test_coordination_without_noise_is_the_shared_direction():
    g = torch.Generator().manual_seed(3)
    direction = torch.nn.functional.normalize(torch.randn(8, generator=g), dim=0)
    signs = torch.tensor([1.0, -1.0] * 10)
    users = signs[:, None] * direction
    found = dp.private_subspace(users, users, 1, math.inf, g)
    assert (found[:, 0] @ direction).abs().item() == pytest.approx(1, abs=1e-4)


def test_paid_tuning_spends_no_more_than_its_budget(monkeypatch):
    """Every candidate trains on the same rows: their rhos add up. Other rows choose."""
    spent = []
    train = dp.dp_linear

    def watched(z, target, rho, *rest, **more):
        spent.append((rho, len(z)))
        return train(z, target, rho, *rest, **more)

    monkeypatch.setattr(dp, "dp_linear", watched)
    z = torch.nn.functional.normalize(torch.randn(50, 4), dim=1)
    grid = list(itertools.product((0.5, 1.0), (5, 10)))
    dp.paid_tuning(z, torch.arange(50) % 2, 0.8, grid, 0)
    assert sum(rho for rho, _ in spent) == pytest.approx(0.8)
    assert {rows for _, rows in spent} == {40}


def test_local_heads_are_least_squares_in_the_subspace():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, generator=g)
    y = torch.randn(2, 6, generator=g)
    basis = torch.linalg.qr(torch.randn(4, 2, generator=g))[0]
    heads = dp.local_heads(basis, x, y, 1e-6)
    for u in range(2):
        expected = basis @ torch.linalg.lstsq(x[u] @ basis, y[u, :, None]).solution[:, 0]
        assert torch.allclose(heads[:, u], expected, atol=1e-4)


def test_a_labelling_splits_the_digits_in_half():
    label = local_heads.labellings(6, 0)
    assert (label.sum(1) == 0).all() and set(label.unique().tolist()) == {-1.0, 1.0}
    assert len({tuple(row) for row in label.tolist()}) > 1


def test_private_and_test_rows_are_disjoint_and_of_unit_norm():
    cfg = private_transfer.Config(data="synthetic")
    arms, labels = private_transfer.sentence_domain(50, 0, cfg)
    for parts in arms.values():
        assert [len(z) for z in parts] == [len(y) for y in labels]
        assert all(torch.allclose(z.norm(dim=1), torch.ones(len(z)), atol=1e-4) for z in parts)
    rows = [tuple(z.tolist()) for z in torch.cat(arms[private_transfer.FULL])]
    assert len(set(rows)) == len(rows)


def test_tuning_runs_with_the_noise_per_row_of_the_private_run(monkeypatch):
    """rho n^2 decides the noise of a mean gradient: the public run must have the private one's."""
    seen = []

    def watched(z, target, rho, lr, steps, g):
        seen.append((rho, len(z)))
        return torch.zeros(target.shape[1], z.shape[1] + 1)

    monkeypatch.setattr(dp, "dp_linear", watched)
    y = torch.arange(100) % 2
    private_transfer.tune(torch.ones(100, 3), y, 1000, 0.5, private_transfer.GRID)
    assert {n for _, n in seen} == {80}
    assert all(rho * n**2 == pytest.approx(0.5 * 1000**2) for rho, n in seen)


def test_smoke(tmp_path):
    private_transfer.main(["--smoke", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["claims"]) == 3
    assert {r["domain"] for r in content["rows"]} >= {"images", "local heads"}
