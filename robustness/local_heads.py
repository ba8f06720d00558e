"""Second scenario of private_transfer.py: every user has a labelling of the digits and ten images.

A user fits a linear head on the own images alone, in all pixels or in a subspace: from public
images with or without labels, more and more of them, or one that the users find together under
user-level privacy. No privacy is spent where nothing is shared.

    personal_models(cfg)    rows {arm, seed, accuracy: mean over users}, and the ridge of each arm
    claim(arms, at, cfg)    what they say; at(arm, ""): accuracies over seeds
    bars(axis, arms, at)    the figure's part
"""

import functools
import math

import torch
import torch.nn.functional as F

from infra.seeds import generator
from robustness import common, data, dp
from robustness.common import TUNING_SEED

CLASSES = 10
DELTA = 1e-5
RIDGES = (0.1, 0.3, 1.0, 3.0)


def labellings(users, seed):
    """Which five of the ten digits a user calls +1: [U, 10] in {-1, 1}."""
    order = torch.rand(users, CLASSES, generator=generator(seed, "labellings")).argsort(1)
    return torch.where(order < CLASSES // 2, 1.0, -1.0)


def user_subspaces(x_public, digit_public, x_users, y_users, seed):
    """{arm: basis [D, k]}. Nine directions tell ten classes apart: all labellings share them."""
    k = CLASSES - 1
    found = {"all 196 pixels": torch.eye(x_public.shape[1]),
             "public PCA 9, no label": dp.public_subspace(x_public, k)[1]}
    for n in (50, 200, len(x_public)):
        targets = F.one_hot(digit_public[:n], CLASSES).float()
        found[public_tasks(n)] = dp.task_subspace(x_public[:n], targets - targets.mean(0), k)
    first, second = (m.mean(1) for m in (x_users * y_users[:, :, None]).chunk(2, dim=1))
    for e in (1.0, 10.0, math.inf):
        g = generator(seed, "coordinate", str(e))
        found[coordinated(e)] = dp.private_subspace(first, second, k, dp.rho_for(e, DELTA), g)
    return found


def public_tasks(n):
    return f"public tasks 9, {n} labelled images"


def coordinated(epsilon):
    return f"users coordinate, epsilon {epsilon:g}"


def personal_models(cfg):
    """Rows {arm, seed, accuracy: mean over users}, and the ridge of each arm, chosen on stand-in
    users made of public images alone (seed 100)."""
    images, digit = data.digits(cfg.data)
    pixels = data.small(images).flatten(1)
    count = min(cfg.users, len(digit) // 25)
    tuned, rows = {}, []
    for seed in (TUNING_SEED, *range(cfg.seeds)):
        public, private, test = data.parts(len(digit), (0.4, 0.4, 0.2), seed, "users")
        x = F.normalize(pixels - pixels[public].mean(0), dim=1)
        label = labellings(count, seed)

        def score(basis, where, test, ridge, x=x, label=label):
            i = where[: len(where) // 10 * 10].view(-1, 10)
            heads = dp.local_heads(basis, x[i], label[: len(i)].gather(1, digit[i]), ridge)
            wanted = label[: len(i)].T[digit[test]] > 0
            return ((x[test] @ heads > 0) == wanted).double().mean().item()

        i = private[: 10 * count].view(count, 10)
        y_users = label.gather(1, digit[i])
        spaces = user_subspaces(x[public], digit[public], x[i], y_users, seed)
        stand_in, held = public.tensor_split([len(public) // 2])
        for arm, basis in spaces.items():
            if seed == TUNING_SEED:
                choice = functools.partial(score, basis, stand_in, held)
                tuned[arm] = common.choose(RIDGES, choice)
            else:
                found = score(basis, private[: 10 * count], test, tuned[arm][0])
                rows.append(dict(domain="local heads", arm=arm, epsilon="", seed=seed,
                                 accuracy=found))
    return rows, {f"local heads/{arm}": choice for arm, choice in tuned.items()}


def claim(arms, at, cfg):
    most = next(a for a in reversed(arms) if a.startswith("public tasks"))
    rivals = [coordinated(e) for e in (1.0, 10.0, math.inf)]
    few = [public_tasks(50), "all 196 pixels"]
    return dict(
        holds=common.verdict(common.ahead(at, most, rival, [""]) for rival in rivals),
        claim="with enough public data users need not coordinate privately: local heads in the "
              "public subspace do as well",
        short="With public data local heads need no private coordination",
        measured=f"local heads: {common.cells(at, arms, '')} ({cfg.seeds} seeds, sd)",
        fails_when=f"public data are few: local heads: {common.cells(at, few, '')}; here "
                   f"{cfg.users} users with ten images each, and public labels that name the digit")


def bars(axis, arms, at):
    for i, arm in enumerate(arms):
        m, sd = common.mean_sd(at(arm, ""))
        axis.barh(i, m, xerr=sd, color=common.COLOURS[3 if arm.startswith("public") else 7])
    axis.set_yticks(range(len(arms)), arms, fontsize=8)
    axis.invert_yaxis()
    axis.set(title="local heads", xlabel="test accuracy, mean over users", xlim=(0.5, None))
