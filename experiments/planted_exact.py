"""The planted sub-sequence solved exactly: values, visits, PAV's terms, the policy update.

Used by experiments/provers.py and breaks.py. A state is two numbers: n letters left (0..L) and the
KMP state k (0..K-1; K: found); an action a is one of the letters (A of them). Everything is float64
and nothing is sampled. Source: Setlur et al. 2024, arXiv 2410.08146, section 3.3 (the task), eq. 13
(the update), theorem 3.1 (the two terms).
"""

import numpy as np
import torch

from tasks.planted import kmp_next
from train_rl import center_by_step, outcome_advantage, spread_credit, step_bonus


def transitions(pattern, letters):
    """[K,A] int: the KMP state after each letter."""
    return np.array([[kmp_next(pattern, k, c) for c in letters] for k in range(len(pattern))])


def scripted(pattern, letters, strength, length):
    """The demonstrator as a table, [L+1,K,A]: the next hidden letter has `strength` times the
    weight of another."""
    weight = np.array([[strength if c == y else 1.0 for c in letters] for y in pattern])
    return np.repeat((weight / weight.sum(1, keepdims=True))[None], length + 1, 0)


def state_values(step, policy):
    """V [L+1,K+1]: the chance that the policy still finds the pattern."""
    V = np.zeros((len(policy), len(step) + 1))
    V[:, -1] = 1.0
    for n in range(1, len(policy)):
        V[n, :-1] = (policy[n] * V[n - 1][step]).sum(1)
    return V


def visits(step, policy):
    """[L+1,K]: how often a solution of the policy passes through (n, k), not counting what comes
    after success."""
    d = np.zeros((len(policy), len(step) + 1))
    d[-1, 0] = 1.0
    for n in range(len(policy) - 1, 0, -1):
        np.add.at(d[n - 1], step.ravel(), (d[n, :-1, None] * policy[n]).ravel())
    d[0] = 0.0  # no letter left, nothing to choose
    return d[:, :-1]


def progress(step, V):
    """A(s,a) = V(after) - V(before), [L+1,K,A]; 0 where no letter is left."""
    A = np.zeros((len(V), *step.shape))
    A[1:] = V[:-1][:, step] - V[1:, :-1, None]
    return A


def two_terms(policy, visited, A_mu, A_pi):
    """(distinguishability, alignment) of theorem 3.1, s weighted by `visited`."""
    centred = A_mu - (policy * A_mu).sum(-1, keepdims=True)
    return float((visited * (policy * centred**2).sum(-1)).sum()), float(
        (visited * (policy * A_mu * A_pi).sum(-1)).sum()
    )


def natural_gradient(step, policy, bonus, eta, steps, kl=None):
    """eq. 13, `steps` times: pi <- pi exp(eta (A^pi + bonus)) / Z, A^pi anew each time (A^pi for
    Q^pi: V(s) cancels in Z). With kl, eta is chosen anew at every step so that the solutions'
    distribution moves by that many nats (to second order: KL = eta^2 / 2 E_s Var[A^pi + bonus]):
    the scale of the bonus no longer counts, only its direction.
    -> success from the prompt before, between and after, [steps+1]."""
    logits = np.log(policy)
    success = []
    for _ in range(steps + 1):
        policy = np.exp(logits - logits.max(-1, keepdims=True))
        policy /= policy.sum(-1, keepdims=True)
        V = state_values(step, policy)
        success.append(V[-1, 0])
        A = progress(step, V) + bonus
        if kl:
            eta = np.sqrt(2 * kl / max(two_terms(policy, visits(step, policy), A, A)[0], 1e-12))
        logits = np.log(np.maximum(policy, 1e-300)) + eta * A
    return np.array(success)


def time_to(curve, level, eta):
    """Time (eta times steps) at which a curve first reaches the level, linear between steps;
    None if it does not."""
    above = np.flatnonzero(curve >= level)
    if not len(above) or above[0] == 0:
        return 0.0 if len(above) else None
    i = above[0]
    return float(eta * (i - (curve[i] - level) / (curve[i] - curve[i - 1])))


def spearman(x, y):
    """Rank correlation; ties get their mean rank. nan where one side is constant."""

    def rank(v):
        return np.array([(np.sum(v < a) + np.sum(v <= a)) / 2 for a in v])

    a, b = (r - r.mean() for r in (rank(np.asarray(x, float)), rank(np.asarray(y, float))))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def sample_solutions(policy, after, prompt, rng):
    """policy [P,L+1,K+1,A], after [K+1,A], prompt [B] -> KMP states [B,L+1], actions [B,L]."""
    length = policy.shape[1] - 1
    letters = policy.shape[-1]
    cdf = policy.cumsum(-1)
    states = [torch.zeros(len(prompt), dtype=torch.long)]
    actions = []
    for n in range(length, 0, -1):
        u = torch.tensor(rng.random((len(prompt), 1)))
        actions.append((cdf[prompt, n, states[-1]] < u).sum(1).clamp(max=letters - 1))
        states.append(after[states[-1], actions[-1]])
    return torch.stack(states, 1), torch.stack(actions, 1)


def table_rl(
    step,
    base,
    V_mu,
    seed,
    lr,
    steps,
    reward="pav",
    scale_rewards="none",
    prompts=4,
    group=32,
    eval_steps=10,
):
    """train_rl.py's update with a table of logits [P,L+1,K+1,A] in the place of the transformer:
    sampled solutions, the same rewards and baselines, Adam. V_mu [L+1,K+1] values of the prover,
    None: outcome only. Prompts share nothing here.
    -> exact success, mean over prompts, every eval_steps steps, the base's first."""
    K, A = step.shape
    L = len(base) - 1
    rng = np.random.default_rng(seed)
    after = torch.tensor(np.vstack([step, np.full((1, A), K)]))  # found once, found for good
    any_letter = np.full((L + 1, 1, A), 1 / A)  # and then any letter will do
    table = torch.tensor(np.log(np.concatenate([base, any_letter], 1)))
    logits = table.repeat(prompts, 1, 1, 1).requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=lr, betas=(0.9, 0.99))
    prompt = torch.arange(prompts).repeat_interleave(group)  # (B,)
    left = torch.arange(L, -1, -1)  # (L+1,)
    curve = []
    for i in range(steps + 1):
        policy = logits.detach().softmax(-1)
        if i % eval_steps == 0:
            success = [state_values(step, pi[:, :K])[-1, 0] for pi in policy.numpy()]
            curve.append(float(np.mean(success)))
        states, actions = sample_solutions(policy, after, prompt, rng)
        outcome = (states[:, -1] == K).double().view(prompts, group)
        adv = outcome_advantage(outcome, scale_rewards).view(-1, 1).expand(actions.shape)
        if V_mu is not None:
            bonus = spread_credit(step_bonus(torch.tensor(V_mu)[left, states], reward), reward)
            adv = adv + center_by_step(bonus, torch.ones_like(bonus, dtype=torch.bool))
        logprob = logits[prompt[:, None], left[:-1], states[:, :-1]].log_softmax(-1)
        chosen = logprob.gather(2, actions[..., None])[..., 0]
        optimizer.zero_grad()
        (-(chosen * adv).mean()).backward()
        optimizer.step()
    return curve
