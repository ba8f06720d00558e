"""Rewards -> advantages -> losses, on toys small enough to be written out by hand."""

import itertools

import pytest
import torch
from toy import EOS, ToyTask, make_rollouts

from rollouts import first_illegal, grades, step_ends
from train_rl import (
    Config,
    advantages,
    center_by_step,
    credit_tokens,
    k2_loss,
    outcome_advantage,
    policy_loss,
    spread_credit,
    step_bonus,
    token_weights,
)


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------
# Rewards -> advantages


def test_a_step_pays_its_own_tokens_and_no_other():
    """Prompt of 2 tokens, steps of 2 and 3, then padding, whose bonus nobody may get."""
    ends = torch.tensor([[2, 4, 7, 7], [1, 2, 2, 2]])
    paid = credit_tokens(torch.tensor([[1.0, 2.0, 5.0], [3.0, 5.0, 5.0]]), ends, 8)
    assert paid.tolist() == [[0, 0, 1, 1, 2, 2, 2, 0], [0, 3, 0, 0, 0, 0, 0, 0]]


def test_progress_telescopes_and_q_does_not():
    values = torch.tensor([[0.2, 0.5, 0.4, 0.9, 0.9], [0.5, 0.1, 0.1, 0.1, 0.1]])  # padded by repeating
    progress = step_bonus(values, "pav")
    close(progress, torch.tensor([[0.3, -0.1, 0.5, 0.0], [-0.4, 0.0, 0.0, 0.0]]))
    close(progress.sum(1), values[:, -1] - values[:, 0])
    # Steps that lead nowhere, put in anywhere, earn nothing by progress, and are paid again and again by Q.
    padded = values[:, [0, 1, 1, 1, 2, 3, 4]]
    close(step_bonus(padded, "pav").sum(1), progress.sum(1))
    assert step_bonus(padded, "q")[0].sum() > step_bonus(values, "q")[0].sum() + 0.9


def test_return_to_go_over_progress_is_outcome_minus_a_baseline():
    """Two samples that end at 1 and 0: what each step gets is the outcome minus the value before the step, whatever the
    values between, so no step is told apart from the ones after it. Step credit leaves the bonus alone."""
    values = torch.tensor([[0.2, 0.5, 0.4, 1.0, 1.0], [0.5, 0.3, 0.0, 0.0, 0.0]])  # padded by repeating
    progress = step_bonus(values, "pav")
    assert spread_credit(progress, "pav") is progress
    close(spread_credit(progress, "pav-to-go"), values[:, -1:] - values[:, :-1])
    close(spread_credit(step_bonus(values, "q-to-go"), "q-to-go")[0], torch.tensor([2.9, 2.4, 2.0, 1.0]))  # pays for staying


def test_centring_leaves_the_sample_itself_out():
    g = torch.Generator().manual_seed(0)
    bonus, real = torch.randn(7, 5, generator=g), torch.rand(7, 5, generator=g) < 0.6
    real[:, 4] = False
    real[2, 4] = True  # alone at this step: no baseline
    out = center_by_step(bonus, real)
    for b, s in itertools.product(range(7), range(5)):
        others = [bonus[j, s].item() for j in range(7) if j != b and real[j, s]]
        baseline = sum(others) / len(others) if others else 0.0
        assert out[b, s].item() == pytest.approx((bonus[b, s].item() - baseline) if real[b, s] else 0.0, abs=1e-6)
    changed = bonus.clone()
    changed[3] += 10
    moved = center_by_step(changed, real)[3] - out[3]
    close(moved, 10.0 * real[3])  # its own bonus is not in its baseline


@pytest.mark.parametrize("scale", ["none", "group"])
def test_a_group_that_agrees_gets_exactly_nothing(scale):
    g = torch.Generator().manual_seed(0)
    for G in (2, 3, 7, 8, 16):
        for value in [0.0, 1.0, *torch.rand(50, generator=g).tolist()]:
            assert (outcome_advantage(torch.full((2, G), value), scale) == 0).all(), (G, value)


def test_the_group_baseline_and_its_scale():
    reward = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    close(outcome_advantage(reward), torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.25, 0.25, 0.25, -0.75]]))
    close(outcome_advantage(reward, "group"), outcome_advantage(reward) / torch.tensor([[3**-0.5], [0.5]]))
    near = torch.tensor([[0.5, 0.5 + 1e-5]])  # noise must not become an advantage of size 1
    assert outcome_advantage(near, "group").abs().max() < 0.01


def test_token_weights_of_the_three_losses():
    mask = torch.tensor([[False, True, True, True, True], [False, True, False, False, False]])
    m = mask.float()
    close(token_weights(mask, "dapo", 10), m / 5)
    close(token_weights(mask, "grpo", 10), m / torch.tensor([[8.0], [2.0]]))
    close(token_weights(mask, "dr_grpo", 10), m / 20)


VALUES = torch.tensor([[0.2, 0.5, 0.6, 0.6], [0.2, 0.1, 0.1, 0.1], [0.3, 0.7, 0.7, 0.7], [0.3, 0.4, 0.9, 0.9]])


def toy_advantages(values=VALUES, **options):
    """Two prompts, two samples each; right, wrong, right, right but illegal in its first step."""
    task = ToyTask()
    problems = [p for p in task.problems("train", None, 0) if p.prompt in ("13=", "22=") for _ in range(2)]
    prompts = [[1, 3, 10]] * 2 + [[2, 2, 10]] * 2
    rollouts = make_rollouts(prompts, [[3, 0, 0, 0, EOS], [5, EOS], [2, EOS], [4, 10, 2, EOS]])
    cfg = Config(**(dict(num_generations=2, guards=[], reward="pav", alpha=2.0) | options))
    tokenizer = task.tokenizer()
    outcome = grades(task, problems, rollouts, tokenizer)
    ends = step_ends(task, rollouts, tokenizer)
    illegal = first_illegal(task, problems, rollouts, tokenizer, ends.shape[1])
    paid = (None, None) if cfg.reward == "outcome" else (ends, values)
    adv, logs = advantages(cfg, rollouts.mask(), outcome, *paid, illegal)
    assert logs["rewards/outcome/mean"] == 0.75 and logs["frac_reward_zero_std"] == 0.5
    assert (adv[~rollouts.mask()] == 0).all()
    steps = [adv[b, 3 : int(n)].tolist() for b, n in enumerate(rollouts.length)]
    assert steps[0][0] == steps[0][1] and steps[0][2] == steps[0][3]
    return [[row[0], *row[2::2]] for row in steps]  # one number per step


@pytest.mark.parametrize("options, expected", [
    (dict(reward="outcome"), [[0.5, 0.5, 0.5], [-0.5], [0], [0, 0]]),
    (dict(alpha=0.0), [[0.5, 0.5, 0.5], [-0.5], [0], [0, 0]]),
    (dict(), [[0.5 + 0.6, 0.5 + 0.2, 0.5], [-0.5 - 0.2], [0.8], [0.2, 1.0]]),
    (dict(reward="q"), [[0.5 + 1, 0.5 + 1.2, 0.5 + 1.2], [-0.5 + 0.2], [1.4], [0.8, 1.8]]),
    (dict(guards=["anchor"]), [[0.5 + 0.6, 0.5 + 0.2, 0.5 + 0.8], [-0.5 - 0.4], [1.4], [0.2, 1.2]]),
    (dict(guards=["outcome"]), [[0.5 + 0.6, 0.5 + 0.2, 0.5], [-0.5], [0.8], [0.2, 1.0]]),
    (dict(guards=["legal"]), [[0.5 + 0.6, 0.5 + 0.2, 0.5], [-0.5 - 0.2], [0.8], [-0.6, 0]]),
    (dict(guards=["legal", "anchor"]), [[0.5 + 0.6, 0.5 + 0.2, 0.5 + 0.8], [-0.5 - 0.4], [1.4], [-0.6, 0]]),
    (dict(values=torch.full((4, 4), 0.5)), [[0.5, 0.5, 0.5], [-0.5], [0], [0, 0]]),
    (dict(values=torch.full((4, 4), 0.5), guards=["anchor"]), [[0.5, 0.5, 1.5], [-1.5], [1], [0, 1]]),
    (dict(reward="orm"), [[0.25] * 3, [-0.25], [-0.1], [0.1, 0.1]]),
    (dict(guards=["center"]), [[0.5 + 2 * (0.3 - 0.4 / 3), 0.5 + 2 * (0.1 - 0.5), 0.5], [-0.5 + 2 * (-0.1 - 0.8 / 3)],
                               [2 * (0.4 - 0.3 / 3)], [2 * (0.1 - 0.6 / 3), 2 * (0.5 - 0.1)]]),
])
def test_advantages_written_out(options, expected):
    for row, want in zip(toy_advantages(**options), expected):
        assert row == pytest.approx(want, abs=1e-5)


# ----------------------------------------------------------------------------------------------------
# Losses


def test_on_policy_the_surrogate_is_reinforce():
    g = torch.Generator().manual_seed(0)
    logprob = (-torch.rand(20, generator=g)).requires_grad_()
    A, w = torch.randn(20, generator=g), torch.rand(20, generator=g)
    loss, silenced = policy_loss(logprob, logprob.detach(), A, w, 0.2, 0.28)
    loss.backward()
    close(logprob.grad, -A * w)
    assert silenced == 0 and loss.item() == pytest.approx(-float((A * w).sum()), abs=1e-5)


def test_the_clip_silences_only_what_moved_too_far_the_right_way():
    ratio = torch.tensor([1.5, 1.25, 0.5, 0.85, 1.5, 0.5, 1.25])
    A = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0])
    logprob = ratio.log().requires_grad_()
    loss, silenced = policy_loss(logprob, torch.zeros(7), A, torch.ones(7), 0.2, 0.28)
    loss.backward()
    assert (logprob.grad == 0).tolist() == [True, False, True, False, False, False, False]
    close(logprob.grad[[1, 3, 4, 5]], -(ratio * A)[[1, 3, 4, 5]])
    assert silenced == 2
    policy_loss(logprob, torch.zeros(7), A, torch.ones(7), 0.2, 0.2)[0].backward()  # low and high are two numbers
    assert policy_loss(logprob, torch.zeros(7), A, torch.ones(7), 0.2, 0.2)[1] == 4


def test_k2_has_the_gradient_of_kl_and_k1_in_a_loss_has_none():
    """Expectation over samples from pi by enumerating three symbols; the sampling itself carries no gradient."""
    theta = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([1.0, 0.2, -0.7], dtype=torch.float64).log_softmax(0)
    gradient = lambda loss: torch.autograd.grad(loss, theta)[0]  # noqa: E731
    logp = theta.log_softmax(0)
    pi = logp.exp()
    exact = gradient((pi * (logp - ref)).sum())
    logp = theta.log_softmax(0)
    weight = logp.exp().detach()
    assert exact.abs().max() > 0.1
    close(gradient(k2_loss(logp, ref, weight)), exact, atol=1e-12)
    assert gradient((weight * (theta.log_softmax(0) - ref)).sum()).abs().max() < 1e-12
    logp = theta.log_softmax(0)  # k1 as a reward of REINFORCE is the third way
    close(gradient((weight * (logp.detach() - ref) * logp).sum()), exact, atol=1e-12)
