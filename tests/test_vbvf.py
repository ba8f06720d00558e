"""The task contextual against enumeration and sampling, and the arithmetic of experiments/vbvf.py."""

import itertools
from statistics import fmean

import numpy as np
import pytest
import torch

from experiments import vbvf, vbvf_exact, vbvf_report
from infra.cli import UserError
from tasks import get_task
from tasks.contextual import Contextual, solve_times

TOY = dict(symbols=3, planted=2, letters=3, length=5, mixture=(0.5, 6.0))


def test_prompts_name_the_letters_in_a_code_and_splits_share_none():
    task = get_task("contextual", 0)
    keys = {s: {p.key for p in task.problems(s)} for s in ("train", "val", "test")}
    assert all(keys.values()) and sum(map(len, keys.values())) == len(set.union(*keys.values()))
    assert len(set(task.g.values())) == len(task.g)
    assert get_task("contextual", 1).g != task.g
    p = task.problems("test", 1, 0)[0]
    assert p.answer == "".join(task.g[c] for c in p.prompt)
    with pytest.raises(UserError, match="planted <= length"):
        Contextual(planted=6, length=4)


def test_letters_count_in_order_and_not_in_a_row():
    task = Contextual(length=8)
    p = next(p for p in task.problems("train") if len(set(p.answer)) == 4)
    other = next(c for c in task.letters if c not in p.answer)
    a, b, c, d = p.answer
    for text, t in ((p.answer, 4), (a + other + b + c + other + d, 6), (b + a + c + d, None), ("", None),
                    (other * 8 + p.answer, None), (other * 4 + p.answer, 8), (p.answer + other, 4)):
        assert task.solve_time(p, text) == t
        assert task.grade(p, text) == (t is not None)
        assert task.trace_reward(p, text) == (0 if t is None else (8 - t) / 8)


def test_values_equal_enumeration_and_heterogeneity_is_the_variance_of_the_reward():
    """By recursion over all traces of a small world: Q is the mean over letters of the Q behind them, and the variances
    of Q over letters, summed along a trace, are the variance of the trace's reward (it is a martingale)."""
    task = Contextual(**TOY)
    p = task.problems("train")[0]

    def chances(prefix):
        """The mixture's next letter."""
        if task.grade(p, prefix):
            return dict.fromkeys(task.letters, 1 / 3)
        k = 0
        for c in prefix:
            k += c == p.answer[k]
        hit = sum(w * task._hit(s) for s, w in task.posterior(p, prefix, 0))
        return {c: hit if c == p.answer[k] else (1 - hit) / 2 for c in task.letters}

    def walk(prefix, chance):
        """-> (expected reward, summed variance weighted by the chance of the state)."""
        if len(prefix) == task.max_new_tokens:
            return task.trace_reward(p, prefix), 0.0
        q, below, total = {}, chances(prefix), 0.0
        for c, w in below.items():
            q[c], more = walk(prefix + c, chance * w)
            total += more
        mean = sum(below[c] * q[c] for c in q)
        assert mean == pytest.approx(task.exact_reward(p, prefix, 0), abs=1e-12)
        return mean, total + chance * sum(below[c] * (q[c] - mean) ** 2 for c in q)

    mean, variance = walk("", 1.0)
    reward, chance = task.reward_distribution(0)
    assert mean == pytest.approx(reward @ chance)
    assert variance == pytest.approx(reward**2 @ chance - mean**2)
    assert sum(chance) == pytest.approx(task.exact_value(p, "", 0))


def test_demonstrator_earns_what_the_solver_says():
    task, n = Contextual(length=12), 3000
    p = task.problems("val", 1, 0)[0]
    for strength in (0.0, 12.0):
        texts = [task.demonstration(p, strength, i) for i in range(n)]
        assert all(len(t) == 12 for t in texts)
        assert abs(fmean(task.grade(p, t) for t in texts) - task.exact_value(p, "", strength)) < 0.04
        assert abs(fmean(task.trace_reward(p, t) for t in texts) - task.exact_reward(p, "", strength)) < 0.025
    half = [t[:3] for t in texts]
    assert fmean(task.exact_reward(p, t, 12.0) for t in half) == pytest.approx(task.exact_reward(p, "", 12.0), abs=0.015)


def test_solve_times_are_negative_binomial():
    found = solve_times(0.3, 2, 6)
    want = [(t - 1) * 0.3**2 * 0.7 ** (t - 2) for t in range(1, 7)]
    assert found == pytest.approx(want)
    assert list(itertools.accumulate(solve_times(0.9, 1, 50)))[-1] == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------
# experiments/vbvf.py


def test_rewards_and_labels_of_a_trace_agree_at_every_budget():
    times = torch.tensor([2.0, 5.0, float("inf")])
    assert vbvf.rewards(times, 4).tolist() == [0.5, 0.0, 0.0]
    assert vbvf.labels(times, 4).tolist() == [[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    for H in (4, 8):  # a trace that is right at t earns the tokens after t: one less than it has labels of 1
        paid = (vbvf.labels(times, H).sum(1) - 1).clamp(min=0) / H
        assert paid.tolist() == vbvf.rewards(times, H).tolist()


def test_an_eos_is_a_token_like_any_other():
    """Ten EOS and then the letters: right at token 14, not at 4."""
    task = Contextual(length=16)
    tokenizer, problem = task.tokenizer(), task.problems("test", 1, 0)[0]
    row = [*task.prompt_tokens(problem, tokenizer), *[tokenizer.eos_ids[0]] * 10, *tokenizer.encode(problem.answer), 0, 0]
    assert vbvf.solve_times(task, tokenizer, [problem], torch.tensor([row])).tolist() == [[14]]


class Constant(torch.nn.Module):
    def __init__(self, logit):
        super().__init__()
        self.logit = torch.tensor(logit)

    def forward(self, tokens, share=None):
        return self.logit.expand(tokens.shape)


def test_score_is_pessimistic_where_verifiers_differ():
    tokens, half = torch.zeros(2, 5, dtype=torch.int64), Constant(0.0)
    assert vbvf.pessimistic(vbvf.predicted([half, half], tokens, 2), 1.0).tolist() == [[0.5] * 3] * 2
    far = vbvf.predicted([Constant(-20.0), half, Constant(20.0)], tokens, 2).mean(2)  # 0, 1/2, 1: standard deviation 1/2
    assert vbvf.pessimistic(far, 1.0) == pytest.approx([0.0, 0.0], abs=1e-6)
    assert vbvf.pessimistic(far, 0.0) == pytest.approx([0.5, 0.5], abs=1e-6)


def test_a_letter_is_paid_for_what_follows_it():
    found = vbvf.reward_to_go(torch.tensor([[0.0, 0, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]), 2, floor=1e-6)
    assert found[:2, 0] == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-4)  # one token more than its twin
    assert found[:2, 1:].abs().sum() == 0 and found[2:].abs().sum() == 0  # where a group earns alike nobody is paid


def test_heterogeneity_of_known_rewards():
    found = vbvf.spread_of_base(torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]))
    assert found["sigma"] == pytest.approx(0.5)  # the median prompt: mean 1/4, unbiased variance 1/4
    assert found["c_1"] == pytest.approx((0.25 + 0.25 + 1) / 3)  # a constant reward is at its mean, always


def test_fit_is_one_run_however_many_stops():
    """Plain regression to the mean of the rows; what is yielded at a stop is what a run of so many steps ends with."""
    want = torch.tensor([0.2, 0.4])

    def run(stops):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        loss = lambda rows: (model.weight[0, 0] - want[rows]).square().mean()  # noqa: E731
        return [(step, model.weight.item()) for step in vbvf.fit(model, loss, 2, stops, 0.02, 32, 3)]

    found = run([2, 60])
    assert [step for step, _ in found] == [2, 60]
    assert found[:1] == run([2]) and found[1:] == run([60])
    assert found[1][1] == pytest.approx(0.3, abs=0.03) and found[0][1] < 0.1


class Fixed:
    """A World that only has traces."""

    def __init__(self, times, tries):
        self.pool_times, self.k = times, 1
        self.cfg = type("cfg", (), dict(tries=tries))
        self.pool = torch.arange(times.numel() * 4).view(-1, 4)

    correct, annotated = vbvf.World.correct, vbvf.World.annotated


def test_both_arms_get_n_traces_and_vf_only_right_ones():
    inf = float("inf")
    world = Fixed(torch.tensor([[inf, 3.0], [1.0, 1.0], [inf, inf], [2.0, inf]]), 2)
    tokens, drawn = world.correct(3, 2)  # H = 2: problem 0 is right too late, problem 2 never
    assert tokens.tolist() == [[8, 9, 10]] and drawn == 2 + 1 + 2
    assert world.correct(4, 3)[0].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11], [24, 25, 26, 27]]
    tokens, label = world.annotated(3, 3)
    assert tokens.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]
    assert label.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_claims_follow_from_the_rows():
    """Gaps of 1 token at H = 8 and 5 at H = 32 hold the first claim; the same gap everywhere does not."""
    def rows(gap):
        out = []
        for seed, (mixture, H, n) in itertools.product(range(3), itertools.product(vbvf.MIXTURES, (8, 32), (10, 20))):
            J, each = 0.2 + seed / 100, dict.fromkeys(map(str, vbvf.BUDGETS), 0.1)
            arm = dict(J=J, accuracy=0.5, greedy=dict(J=0.5, accuracy=0.5), likeliest=each, traces=1, base_traces=1, kl=0.0)
            out.append(dict(seed=seed, mixture=mixture, H=H, n=n, vf=arm, rl=arm | dict(J=J + gap(H, mixture) / H + seed / 1e4),
                            bon=dict(J=each, J_mean=each, correlation=0.0),
                            base=arm | dict(sigma=0.1, c_1=0.2, oracle=each)))
        return out

    cfg = vbvf.Config(seeds=3, horizons=[8, 32], sizes=[10, 20])
    claims = lambda gap: vbvf_report.claims_of(dict(rows=rows(gap), settings=vars(cfg), command="x"))  # noqa: E731
    grows = claims(lambda H, m: (1 if H == 8 else 5) if m == "mixed" else -1)
    assert [c["holds"] for c in grows] == [True, "open", True, False]
    assert "concentrated base, n = 20, H = 32" in grows[0]["fails_when"]
    flat = claims(lambda H, m: -1)
    assert flat[0]["holds"] is False and set(flat[0]) == {
        "paper", "claim", "short", "measured", "holds", "command", "fails_when"}
    assert "| mixed | 10 | 8 |" in vbvf_report.tables(rows(lambda H, m: 1), cfg)


def test_a_gap_does_not_grow_because_verifier_free_training_gets_worse():
    """VB-RL as good at n = 20 as at n = 10, VF worse: whoever has 20 problems can train on 10."""
    out = []
    for seed, n in itertools.product(range(3), (10, 20)):
        J = 0.8 + seed / 1e3 + n * seed / 1e4
        out.append(dict(seed=seed, mixture="mixed", H=32, n=n, rl=dict(J=J), vf=dict(J=0.5 if n == 10 else 0.3)))
    cells = vbvf_report.Cells(dict(rows=out, settings=dict(seeds=3, horizons=[32], sizes=[10, 20]), command="x"))
    assert (cells.get("gap") - cells.get("gap", 10)).mean() > 6
    assert cells.fair_gap() - cells.fair_gap(10) == pytest.approx([0, 0.032, 0.064])


# ----------------------------------------------------------------------------------------------------
# experiments/vbvf_exact.py


def test_best_policy_in_a_chi_square_ball():
    reward, chance = np.array([0.0, 0.5, 1.0]), np.array([0.5, 0.3, 0.2])
    mean = reward @ chance
    sigma = (reward**2 @ chance - mean**2) ** 0.5
    for kappa in (0.01, 0.2):  # while every weight is positive
        assert vbvf_exact.best_near(reward, chance, kappa) == pytest.approx(mean + sigma * kappa**0.5, abs=1e-4)
    assert vbvf_exact.best_near(reward, chance, 4.0) == pytest.approx(1.0)  # all mass on the best: distance 1/0.2 - 1
    q = np.random.default_rng(0).dirichlet([1, 1, 1], 20000)  # nobody in the ball does better
    inside = q[(q / chance) ** 2 @ chance - 1 <= 1.0]
    assert len(inside) > 1000
    assert 0 <= vbvf_exact.best_near(reward, chance, 1.0) - (inside @ reward).max() < 0.02


def test_limits_equal_what_traces_say():
    found, task, n = vbvf_exact.limits((3.0, 48.0), 12, 4, 4), Contextual(length=12, mixture=(3.0, 48.0)), 8000
    p = task.problems("train")[0]
    r = np.array([task.trace_reward(p, task.demonstration(p, 0, i)) for i in range(n)])
    right = np.array([task.grade(p, task.demonstration(p, 0, i)) for i in range(n)]) > 0
    assert found["base"] == pytest.approx(r.mean(), abs=0.02) and found["vf"] == pytest.approx(r[right].mean(), abs=0.02)
    assert found["vb_best"] == pytest.approx(r.reshape(-1, 4).max(1).mean(), abs=0.03)
    assert found["sigma"] == pytest.approx(12 * r.std(), abs=0.1)
    assert found["vf"] <= found["vb_near"]  # VF is in the ball, the best of the ball is no worse
