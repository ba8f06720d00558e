"""Differential privacy, as far as private_transfer.py needs it: accounting, a linear learner,
subspaces.

Accounting. Every release here is a sum of rows clipped to a norm, plus Gaussian noise; neighbours
differ by one row (or user) that is added or removed; no rows are sampled, so that no amplification
is claimed; the number of rows is public.

    zcdp_rho(noise_multiplier, steps)    `steps` releases, sum + noise_multiplier * clip * N(0, I)
    gaussian_epsilon(rho, delta)         exact, for Gaussian releases alone: what the tables print
    rdp_epsilon(rho, delta)              what libraries print by default: 8 to 10% larger
    zcdp_epsilon(rho, delta)             true of every mechanism with this rho: 24 to 36% larger
    rho_for(epsilon, delta)              the budget that Gaussian releases may spend
    conversions(epsilons, delta)         a table of the three

Under zCDP adaptive releases add up, rho = sum of 1 / (2 s^2) (Bun and Steinke 2016, arXiv
1605.02065). Gaussian ones equal a single release with mu = sqrt(2 rho) (Dong, Roth, Su 2022, arXiv
1905.02383): adding up in rho loses nothing. Tests compare with dp-accounting and opacus where they
are installed."""

import math

import torch
import torch.nn.functional as F

from infra.seeds import generator


def zcdp_rho(noise_multiplier, steps):
    return steps / (2 * noise_multiplier**2)


def zcdp_epsilon(rho, delta):
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def rdp_epsilon(rho, delta):
    """Renyi divergence of order a is rho * a; the best order of a fine grid (Canonne, Kamath,
    Steinke 2020)."""
    orders = [1 + k / 100 for k in range(1, 2000)] + list(range(21, 2000))
    return min(rho * a + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in orders)


def gaussian_delta(epsilon, rho):
    """The smallest delta for this epsilon (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(2 * rho)
    miss, power = _normal_cdf(-mu / 2 - epsilon / mu), _normal_cdf(mu / 2 - epsilon / mu)
    return power - math.exp(epsilon) * miss


def gaussian_epsilon(rho, delta):
    return _last(lambda e: gaussian_delta(e, rho) > delta, 0.0, zcdp_epsilon(rho, delta))


def rho_for(epsilon, delta):
    """Infinite where epsilon is."""
    if math.isinf(epsilon):
        return math.inf
    return _last(lambda rho: gaussian_delta(epsilon, rho) < delta, 1e-12, 10 + 10 * epsilon)


def conversions(epsilons, delta):
    """Header and rows of a table: what else is printed for the budget of each exact epsilon."""
    rows = []
    for epsilon in epsilons:
        rho = rho_for(epsilon, delta)
        others = (rdp_epsilon(rho, delta), zcdp_epsilon(rho, delta))
        rows.append([epsilon, f"{rho:.5f}", *(f"{other:.3f}" for other in others)])
    return ["epsilon, exact", "rho (zCDP)", "by RDP", "by zCDP"], rows


def _normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _last(test, low, high):
    """The largest value with test(value) true, where it is true up to some point between low and
    high."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if test(middle) else (low, middle)
    return low


# --------------------------------------------------------------------------------------------------
# Public: a subspace. Private: a linear model in it.


def public_subspace(features, k):
    """Mean [D] and top k principal directions [D, k] of public features [N, D]; no label."""
    centre = features.mean(0)
    _, _, rows = torch.linalg.svd(features - centre, full_matrices=False)
    return centre, rows[:k].T


def task_subspace(x, targets, k, ridge=1e-3):
    """Basis [D, k] of what public tasks share: top directions of their least-squares heads. x [N,
    D], targets [N, T]."""
    moment = x.T @ x / len(x) + ridge * torch.eye(x.shape[1])
    heads = torch.linalg.solve(moment, x.T @ targets / len(x))
    return torch.linalg.svd(heads, full_matrices=False)[0][:, :k]


def private_subspace(first, second, k, rho, g):
    """The same without public data: each user adds the outer product of two moments, mean of y x
    over either half of the own rows; first, second [U, D] -> basis [D, k]. rho-zCDP for a whole
    user: moments are clipped to norm 1, so that their product has norm 1 at most. The halves'
    noise is independent and averages out."""
    first, second = (m / m.norm(dim=1, keepdim=True).clamp_min(1.0) for m in (first, second))
    noise = torch.randn(first.shape[1], first.shape[1], generator=g) / math.sqrt(2 * rho)
    noisy = first.T @ second + noise
    return torch.linalg.eigh(noisy + noisy.T)[1][:, -k:]


def clipped_gradient_sum(weights, z, target, clip):
    """Sum [K, D + 1] over rows of their cross-entropy gradients, each of norm at most clip.

    weights [K, D + 1], the bias last; z [N, D]; target [N, K]. The gradient of a row is (p -
    target) x (z, 1), so its norm is the product of two."""
    inputs = F.pad(z, (0, 1), value=1.0)
    residual = (inputs @ weights.T).softmax(1) - target
    norm = residual.norm(dim=1) * inputs.norm(dim=1)
    scale = (clip / norm.clamp_min(1e-12)).clamp_max(1.0)
    return (residual * scale[:, None]).T @ inputs


def dp_linear(z, target, rho, lr, steps, g, clip=1.0, momentum=0.9):
    """Softmax regression [K, D + 1] that spends rho in all (inf: no noise). Momentum acts on what
    is released: free."""
    weights = torch.zeros(target.shape[1], z.shape[1] + 1)
    velocity = torch.zeros_like(weights)
    deviation = clip * math.sqrt(steps / (2 * rho))
    for _ in range(steps):
        noise = deviation * torch.randn(weights.shape, generator=g)
        gradient = (clipped_gradient_sum(weights, z, target, clip) + noise) / len(z)
        velocity = momentum * velocity + gradient
        weights = weights - lr * velocity
    return weights


def paid_tuning(z, y, rho, grid, seed):
    """Choose among the grid with private rows, under rho-zCDP in all -> weights. Four fifths of
    the rows train every candidate (their rhos add up to rho), the others count its right answers
    (one noisy vector, all of rho): a row is in one of the two."""
    g = generator(seed, "paid")
    train, held = torch.randperm(len(z), generator=g).tensor_split([len(z) * 4 // 5])
    target = F.one_hot(y)[train].float()
    found = [dp_linear(z[train], target, rho / len(grid), lr, steps, g) for lr, steps in grid]
    right = torch.tensor([accuracy(w, z[held], y[held]) * len(held) for w in found])
    noise = torch.randn(len(grid), generator=g) * math.sqrt(len(grid) / (2 * rho))
    return found[(right + noise).argmax()]


def accuracy(weights, z, y):
    return ((F.pad(z, (0, 1), value=1.0) @ weights.T).argmax(1) == y).double().mean().item()


def local_heads(basis, x, y, ridge):
    """Least squares of each user in a subspace: basis [D, k], x [U, n, D], y [U, n] in {-1, 1} ->
    heads [D, U]."""
    z = x @ basis
    gram = z.transpose(1, 2) @ z + ridge * torch.eye(basis.shape[1])
    return basis @ torch.linalg.solve(gram, (z * y[:, :, None]).sum(1)).T
