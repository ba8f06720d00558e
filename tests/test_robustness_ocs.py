"""OCS: constants that minimise their loss, rewards, shifts that keep the norm, and the script end
to end."""

import json

import pytest
import torch

from robustness import abstain, data, ocs, shifts

Y = torch.tensor([0, 0, 0, 2, 2, 7])


@pytest.mark.parametrize("loss", ocs.LOSSES)
def test_constant_solution_minimises_its_loss(loss):
    """The gradient at it is zero, and neighbours are worse."""
    constant = ocs.constant_solution(loss, Y)
    finite = torch.where(torch.isfinite(constant), constant, -50.0)  # ce: log 0 of unseen classes
    finite.requires_grad_()

    def value(c):
        return ocs.loss_of(loss, c.expand(len(Y), -1), Y)

    (gradient,) = torch.autograd.grad(value(finite), finite)
    assert gradient.abs().max() < 1e-5
    g = torch.Generator().manual_seed(0)
    best = value(finite.detach())
    for _ in range(20):
        assert value(finite.detach() + 0.1 * torch.randn(len(finite), generator=g)) >= best - 1e-6


def test_constant_solutions_by_hand():
    marginal = torch.tensor([3, 0, 2, 0, 0, 0, 0, 1, 0, 0]) / 6
    assert torch.allclose(ocs.constant_solution("ce", Y).exp(), marginal)
    assert torch.allclose(ocs.constant_solution("onehot", Y), marginal)
    assert ocs.constant_solution("mse", Y).item() == pytest.approx(10 + 11 / 6)
    reward = ocs.constant_solution("reward", Y)
    assert torch.allclose(reward[:-1], 5 * marginal - 4) and reward[-1] == 0


def test_reward_of_each_action():
    reward = ocs.reward_targets(torch.tensor([1]), classes=3)
    assert reward.tolist() == [[-4, 1, -4, 0]]


def test_at_the_constant_the_reward_network_abstains():
    constant = ocs.constant_solution("reward", torch.arange(10).repeat(3))
    assert abstain.act(constant[None]).item() == abstain.CLASSES
    assert abstain.policy_reward(torch.tensor([10, 10]), torch.tensor([1, 2])) == 0


def test_policies_earn_what_the_network_is_taught():
    y, action = torch.tensor([1, 1, 1]), torch.tensor([1, 3, abstain.CLASSES])
    taught = ocs.reward_targets(y).gather(1, action[:, None]).mean().item()
    assert abstain.policy_reward(action, y) == taught == -1


def test_probability_abstains_at_four_fifths():
    p = torch.tensor([[0.79, 0.21], [0.81, 0.19]])
    assert abstain.act_on_probability(p).tolist() == [2, 0]


@pytest.mark.parametrize("loss", ocs.LOSSES)
def test_relative_distance_is_zero_at_the_constant_and_one_for_perfect_answers(loss):
    y = torch.arange(10).repeat(2)
    constant = ocs.constant_solution(loss, y)
    at_it = ocs.relative_distance(loss, constant.expand(20, -1), constant, y)
    assert at_it == pytest.approx(0, abs=1e-6)
    perfect = ocs.ideal(loss, y)
    perfect = (perfect * 100 if loss == "ce" else perfect)  # logits that are sure
    assert ocs.relative_distance(loss, perfect, constant, y) == pytest.approx(1, abs=1e-4)


def test_noise_keeps_the_norm():
    x = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    for weight in (0.25, 1.0):
        mixed = shifts.mix_noise(x, weight, torch.Generator().manual_seed(1))
        assert torch.allclose(mixed.norm(dim=1), x.norm(dim=1), rtol=1e-5)
        assert not torch.allclose(mixed, x)


def test_rotation_by_quarter_turns_moves_pixels_exactly():
    image = torch.arange(16.0).view(1, 4, 4)
    turned = shifts.rotate(image.flatten(1), 90).view(1, 4, 4)
    assert torch.allclose(turned, torch.rot90(image, 1, (1, 2)), atol=1e-4)
    assert torch.allclose(shifts.rotate(image.flatten(1), 0), image.flatten(1), atol=1e-4)


def test_every_shift_is_measured_and_says_whether_it_keeps_the_norm():
    cfg = ocs.Config(data="synthetic")
    *_, pixels, _, average = shifts.unbalanced_digits(cfg.data, 0)
    found = shifts.shifted_images(pixels, average, data.photographs(cfg.data), 0)
    assert list(found) == list(shifts.SHIFTS)
    before = found[shifts.NO_SHIFT].norm(dim=1)
    for name, x in found.items():
        if not name.startswith("rotation"):  # a turn keeps it but for the corners
            assert torch.allclose(x.norm(dim=1), before, rtol=1e-3) == shifts.SHIFTS[name], name


def test_head_with_the_constant_starts_near_it():
    cfg = ocs.Config(data="synthetic", epochs=0)
    x, y, *_ = shifts.unbalanced_digits(cfg.data, 0)
    for head, near in (("constant", True), ("default", False)):
        net = ocs.train("mse", head, x, y, (1e-3, 0.0), cfg, 0)
        distance = ocs.relative_distance("mse", net(x), ocs.constant_solution("mse", y), y)
        assert (distance < 0.1) == near


def test_smoke(tmp_path):
    ocs.main(["--smoke", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "results.json").read_text())
    assert {"claims", "command", "tuned", "rows"} <= set(content)
    assert all(c["holds"] in (True, False, "partly") for c in content["claims"])
    table = (tmp_path / "table.md").read_text()
    assert all(shift in table for shift in shifts.SHIFTS)
