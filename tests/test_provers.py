"""The planted sub-sequence solved exactly (experiments/planted_exact.py) against enumeration, the task's own solver and
finite differences, countdown's solver as a verifier; and the claims that experiments/provers.py prints."""

import itertools

import numpy as np
import pytest
import torch

from experiments import planted_exact as exact
from experiments import provers
from experiments.toolkit import ExactVerifier
from tasks.countdown import Countdown
from tasks.planted import Planted, planted_values

LETTERS, LENGTH = "abc", 5


def world(pattern="aba", strength=4.0):
    step, policy = exact.transitions(pattern, LETTERS), exact.scripted(pattern, LETTERS, strength, LENGTH)
    return step, policy, exact.state_values(step, policy)


def enumerate_solutions(pattern, policy, step):
    """(probability, states visited with n letters left, found) of all 3^5 solutions."""
    for word in itertools.product(range(3), repeat=LENGTH):
        p, k, path = 1.0, 0, []
        for n, a in zip(range(LENGTH, 0, -1), word):
            if k == len(pattern):
                p /= 3  # after success any letter
                continue
            path.append((n, k))
            p, k = p * policy[n, k, a], step[k, a]
        yield p, path, k == len(pattern)


@pytest.mark.parametrize("pattern", ["aba", "aab", "abc"])
def test_values_and_visits_are_those_of_all_solutions(pattern):
    step, policy, V = world(pattern)
    visited, success = np.zeros_like(V[:, :-1]), 0.0
    for p, path, found in enumerate_solutions(pattern, policy, step):
        success += p * found
        for at in path:
            visited[at] += p
    assert V[-1, 0] == pytest.approx(success)
    np.testing.assert_allclose(exact.visits(step, policy), visited, atol=1e-12)
    np.testing.assert_allclose(V, planted_values(pattern, LETTERS, LENGTH, 4.0), atol=1e-12)  # the task's solver


def test_the_first_order_gain_is_own_variance_plus_alignment():
    """d/d eta of the success under eq. 13, by finite differences; a bonus that is misaligned with the policy subtracts."""
    step, policy, V = world()
    d, A_pi = exact.visits(step, policy), exact.progress(step, V)
    prover = exact.progress(step, exact.state_values(step, exact.scripted("aba", LETTERS, 50.0, LENGTH)))
    np.testing.assert_allclose((policy * A_pi).sum(-1), 0, atol=1e-12)
    gains = {}
    for name, bonus in (("none", 0 * prover), ("prover", prover), ("against", -prover)):
        success = exact.natural_gradient(step, policy, bonus, 1e-6, 1)
        _, aligned = exact.two_terms(policy, d, bonus, A_pi)
        gains[name] = (success[1] - success[0]) / 1e-6
        assert gains[name] == pytest.approx(exact.two_terms(policy, d, A_pi, A_pi)[0] + aligned, rel=1e-3)
    assert gains["against"] < gains["none"] < gains["prover"]


def test_steps_of_equal_kl_do_not_see_the_scale_of_the_reward():
    """With bonus = A^pi * 9 the first step is that of A^pi alone; its KL, by enumeration of all solutions, is the one asked
    for; and an eta that is asked for is taken."""
    step, policy, V = world()
    A = exact.progress(step, V)
    plain, scaled = (exact.natural_gradient(step, policy, b, None, 1, kl=1e-4) for b in (0 * A, 9 * A))
    np.testing.assert_allclose(plain, scaled, rtol=1e-9)
    eta = np.sqrt(2e-4 / exact.two_terms(policy, exact.visits(step, policy), A, A)[0])
    np.testing.assert_allclose(plain, exact.natural_gradient(step, policy, 0 * A, eta, 1), rtol=1e-9)
    moved = policy * np.exp(eta * A)
    moved /= moved.sum(-1, keepdims=True)
    kl = (exact.visits(step, moved)[..., None] * moved * np.log(moved / policy)).sum()
    assert kl == pytest.approx(1e-4, rel=0.05)


def test_the_base_as_prover_has_both_terms_alike():
    step, policy, V = world()
    A = exact.progress(step, V)
    seen, aligned = exact.two_terms(policy, exact.visits(step, policy), A, A)
    assert seen == pytest.approx(aligned) and seen > 0
    assert exact.two_terms(policy, exact.visits(step, policy), A + 0.3, A)[0] == pytest.approx(seen)  # a constant is not seen


def test_time_to_a_level_and_rank_correlation():
    curve = np.array([0.1, 0.3, 0.7, 0.9])
    assert exact.time_to(curve, 0.5, 0.1) == pytest.approx(0.15)
    assert exact.time_to(curve, 0.05, 0.1) == 0.0 and exact.time_to(curve, 0.95, 0.1) is None
    assert exact.spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert exact.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert exact.spearman([1, 1, 2, 3], [5, 5, 6, 7]) == pytest.approx(1) and np.isnan(exact.spearman([1, 2], [3, 3]))


def test_exact_verifier_says_what_the_task_says():
    from verifier import step_values

    task = Planted(prompts=2, letters=6, planted=3, length=5)
    tokenizer = task.tokenizer()
    verifier = ExactVerifier(task, tokenizer, 16.0)
    texts = [(p, word) for p in task.all for word in (p.answer + "ab", "a" + p.answer + "a", "ababa",
                                                     p.answer[:2] + "A" + p.answer[:2], "B" + p.answer[:2] + "AA")]
    tokens = torch.tensor([tokenizer.encode(p.prompt + word) for p, word in texts])
    values = step_values(verifier, tokens, torch.arange(1, 7).expand(len(tokens), 6))
    expected = [[task.exact_value(p, word[:t], 16.0) for t in range(6)] for p, word in texts]
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    best_of = step_values(ExactVerifier(task, tokenizer, 16.0, k=4), tokens, torch.arange(1, 7).expand(len(tokens), 6))
    torch.testing.assert_close(best_of, 1 - (1 - values) ** 4)


def test_the_solver_as_a_verifier_of_countdown():
    """Right, wrong and illegal solutions, cut anywhere: at the prompt and at each line end the value is exact_value's."""
    from rollouts import Rollouts, step_ends
    from verifier import step_values

    task = Countdown()
    tokenizer, problems = task.tokenizer(), task.problems("test", 40, 0)
    texts = [task.demonstration(p, 0.3, i) for i, p in enumerate(problems)]
    texts = [t.replace("=", "+", 1) if i % 5 == 0 else t for i, t in enumerate(texts)]
    prompts = [tokenizer.encode(p.prompt) for p in problems]
    rows = [prompt + tokenizer.encode(t) for prompt, t in zip(prompts, texts)]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.tensor(row)
    rolled = Rollouts(tokens, torch.tensor([len(p) for p in prompts]), torch.tensor([len(r) for r in rows]),
                      torch.zeros(tokens.shape), ["stop"] * len(rows), 0.0)
    ends = step_ends(task, rolled, tokenizer)
    values = step_values(ExactVerifier(task, tokenizer, 0.5), tokens, ends)
    expected = [[task.exact_value(p, tokenizer.decode(rows[b][len(prompts[b]) : end]), 0.5) for end in ends[b].tolist()]
                for b, p in enumerate(problems)]
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-6, rtol=1e-4)
    assert len({round(v, 3) for v in values[:, 1].tolist()}) > 3
    assert values[:, -1].unique().tolist() == pytest.approx([0, 1], abs=1e-6)


def test_the_exact_table_of_the_experiment():
    cfg = provers.Config(strengths=[5, 1000], best_of=[1, 2, 4], patterns=1)
    rows = {r["prover"]: r for r in provers.exact_rows(cfg, "abcd", "abcdefgh", 8, 5.0)}
    assert rows["scripted-5"]["predicted"] == pytest.approx(rows["best-of-1"]["predicted"])  # the base, twice
    assert rows["outcome"]["predicted"] == 0
    assert rows["outcome"]["first_order"] == pytest.approx(rows["outcome"]["own_variance"], rel=1e-3)
    assert rows["scripted-1000"]["time_to_half"] < rows["outcome"]["time_to_half"]
    growth = provers.growth_with_k("abcdef", "abcdefghijklmn", 12, 5.0, [1, 2])
    assert growth[1]["distinguishability_small_q"] == pytest.approx(4, rel=0.1)  # K^2, where Q is small
    assert growth[1]["alignment_small_q"] == pytest.approx(2, rel=0.1)


def test_a_table_learns_from_progress_and_not_without_a_reward():
    """Exact success rises with the exact progress of a good prover; with a prover whose value is the same everywhere and a
    pattern that is never found there is no gradient at all; the same seed gives the same run."""
    step, base = exact.transitions("abc", LETTERS), exact.scripted("abc", LETTERS, 1.0, LENGTH)
    V_mu = exact.state_values(step, exact.scripted("abc", LETTERS, 20.0, LENGTH))
    curve = exact.table_rl(step, base, V_mu, 0, 0.1, 30)
    assert len(curve) == 4 and curve[0] == pytest.approx(exact.state_values(step, base)[-1, 0]) and curve[-1] > curve[0] + 0.3
    assert curve == exact.table_rl(step, base, V_mu, 0, 0.1, 30) != exact.table_rl(step, base, V_mu, 1, 0.1, 30)
    short = exact.scripted("abcabc", LETTERS, 1.0, LENGTH)  # six letters do not fit into five
    flat = exact.table_rl(exact.transitions("abcabc", LETTERS), short, np.full((LENGTH + 1, 7), 0.5), 0, 0.1, 10)
    assert flat == [0.0, 0.0]
