"""Self-training of a softmax head, and the toy of stoc.py where its gain is exact.

    self_train(z_source, y_source, z_target, classes, rounds)    head before, head after
    spectral_features(x, k)           contrastive features in closed form
    toy(seed, shift, noise, n)        {arm: accuracy on the target}
"""

import torch
import torch.nn.functional as F

from infra.seeds import generator

ARMS = ("ERM", "ST", "CL", "STOC")
CLASSES = 10


def softmax_head(z, y, weight, start, l2=1e-3):
    """Softmax regression: argmin of the weighted mean CE + l2/2 |W|^2 by L-BFGS; start, result
    [D + 1, K], the bias last."""
    inputs = F.pad(z, (0, 1), value=1.0)
    head = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([head], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(inputs @ head, y, reduction="none")
        loss = (weight * loss).sum() / weight.sum() + l2 / 2 * head[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return head.detach()


def predict(z, head):
    """Class probabilities [N, K]."""
    return (F.pad(z, (0, 1), value=1.0) @ head).softmax(1)


def accuracy(z, y, head):
    return (predict(z, head).argmax(1) == y).double().mean().item()


def confident(p, share):
    """The most confident `share` of every predicted class: (rows, their pseudo-labels). p [N, K].
    """
    confidence, label = p.max(1)
    rows = []
    for k in label.unique():
        of_class = (label == k).nonzero().flatten()
        best = confidence[of_class].argsort(descending=True)
        rows.append(of_class[best[: max(1, round(share * len(of_class)))]])
    rows = torch.cat(rows)
    return rows, label[rows]


def self_train(z_source, y_source, z_target, classes=CLASSES, rounds=8):
    """Head on the source, then `rounds` refits on the source and a growing share of pseudo-labelled
    target rows, from 30% to all, both with half the weight -> (head before, head after)."""
    zero = torch.zeros(z_source.shape[1] + 1, classes)
    before = softmax_head(z_source, y_source, torch.ones(len(z_source)), zero)
    head = before
    for share in torch.linspace(0.3, 1.0, rounds).tolist():
        rows, label = confident(predict(z_target, head), share)
        z = torch.cat([z_source, z_target[rows]])
        weight = torch.cat([torch.full((len(z_source),), 1 / len(z_source)),
                            torch.full((len(rows),), 1 / len(rows))])
        head = softmax_head(z, torch.cat([y_source, label]), weight, head)
    return before, head


# --------------------------------------------------------------------------------------------------
# The toy, in closed form.


def toy_domain(n, target, noise, g):
    """x [n, 25], y [n]: five coordinates with half a unit of signal along one direction, and twenty
    that equal the label in the source and are noise in the target. noise: share of wrong labels.
    """
    y = torch.randint(0, 2, (n,), generator=g)
    sign = 2.0 * y[:, None] - 1
    direction = F.normalize(torch.ones(5), dim=0)
    rest = torch.randn(n, 5, generator=g)
    rest = rest - (rest @ direction)[:, None] * direction
    core = 0.5 * sign * direction + 0.05 * rest
    shortcut = torch.randn(n, 20, generator=g) if target else sign.expand(n, 20)
    flipped = torch.rand(n, generator=g) < noise
    return torch.cat([core, shortcut], 1), torch.where(flipped, 1 - y, y), y


def spectral_features(x, k=10):
    """Map [D, k] of the linear spectral contrastive loss (HaoChen et al. 2021, arXiv 2106.04156)
    when a view multiplies each coordinate by U[0, 1]: with M the second moment, views of one point
    have cross-moment M / 4, a view has moment M / 4 + diag(M) / 12; top generalised eigenvectors.
    """
    moment = x.T @ x / len(x)
    whole = torch.linalg.cholesky(moment / 4 + moment.diagonal().diag() / 12)
    inverse = torch.linalg.inv(whole)
    values, vectors = torch.linalg.eigh(inverse @ (moment / 4) @ inverse.T)
    return inverse.T @ vectors[:, -k:] * values[-k:].clamp_min(0).sqrt()


def toy(seed, shift, noise=0.0, n=1000):
    """{arm: accuracy on the target}."""
    g = generator(seed, "toy", shift, noise)
    x, y, _ = toy_domain(n, False, noise, g)
    x_target, _, y_target = toy_domain(n, shift, 0.0, g)
    features = spectral_features(torch.cat([x, x_target]))
    found = {}
    for names, maps in ((ARMS[:2], torch.eye(x.shape[1])), (ARMS[2:], features)):
        heads = self_train(x @ maps, y, x_target @ maps, classes=2)
        for name, head in zip(names, heads):
            found[name] = accuracy(x_target @ maps, y_target, head)
    return found
