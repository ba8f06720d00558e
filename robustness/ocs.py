"""OCS: do predictions move to the best constant as inputs leave the training data?

    python -m robustness.ocs --out docs/results/ocs     # 2 to 3 minutes of one core
    python -m robustness.ocs --smoke                    # in seconds, on synthetic images

Kang, Setlur, Tomlin, Levine 2023 (arXiv 2310.00873, ICLR 2024). The optimal constant solution
(OCS) of a loss is argmin_c (1/N) sum_i L(c, y_i): the label marginal for cross-entropy, the mean
for squared error, mean and variance for a Gaussian likelihood. The claim: outputs of networks
drift towards it, because the features of strange inputs miss the rows of the weights, W phi
shrinks, and the biases stay. Its use (abstain.py): a loss whose OCS is the cautious action.

What would have falsified it: at constant input norm the distance to the OCS does not fall below
the one on the test set, or the output is as near to another constant (that of balanced labels) as
to the OCS. Labels are unbalanced here for that reason: with balanced ones the OCS is the uniform
distribution, and every loss of confidence looks like the claim.

Distances are divided by those of the true labels: 1 = as far from the OCS as a perfect answer, 0 =
the OCS. Two heads: "default" as PyTorch draws it, as in the paper, and "constant", whose bias
starts at the OCS (weights times 0.1), which is not in the paper. Selection: learning rate and
weight decay by the loss on source validation labels of seed 100, four settings for every network;
no shifted label is used, but by the policy called oracle.

Left out: ResNets and eight data sets (here an MLP on MNIST-5k); the official temperature, which
has one entry a class and is fitted on the labels of each shift (here a scalar from the source; the
oracle row shows what theirs would do).
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from infra.cli import opt, parse, script
from infra.seeds import derive
from robustness import abstain, common, data
from robustness.abstain import CLASSES, PENALTY, POLICIES
from robustness.common import TUNING_SEED, cell, lead
from robustness.shifts import NO_SHIFT, SHIFTS, shifted_images, unbalanced_digits

OFFSET = 10.0  # regression labels are digit + 10, so that their mean is far from an output of zero
GRID = [(1e-3, 0.0), (1e-3, 0.3), (3e-3, 0.0), (3e-3, 0.3)]  # learning rate, weight decay
LOSSES = ("ce", "mse", "nll", "reward", "onehot")
HEADS = ("default", "constant")


@dataclass
class Config(common.Config):
    epochs: int = opt(25, "passes over the training images", low=1)


# Objectives: outputs [N, K], labels y [N] (integers). Sources: the paper's abstract for the
# constant, get_rew_pred_loss of the authors' cautious_extrapolation/utils.py for the rewards.


def reward_targets(y, classes=CLASSES, penalty=PENALTY):
    """Reward of each action [N, classes + 1]: +1 right, -penalty wrong, the last (abstain) 0."""
    reward = (penalty + 1) * F.one_hot(y, classes + 1).float() - penalty
    reward[:, -1] = 0.0
    return reward


def ideal(loss_name, y):
    """What a perfect network would predict [N, K], in the space of prediction()."""
    if loss_name == "reward":
        return reward_targets(y)
    if loss_name in ("ce", "onehot"):
        return F.one_hot(y, CLASSES).float()
    return y.float()[:, None] + OFFSET


def loss_of(loss_name, output, y):
    """Mean loss of a batch. nll: the outputs are mean and log variance of a Gaussian."""
    if loss_name == "ce":
        return F.cross_entropy(output, y)
    if loss_name == "nll":
        error = (y.float() + OFFSET - output[:, 0]) ** 2
        return 0.5 * (output[:, 1] + error * (-output[:, 1]).exp()).mean()
    return ((output - ideal(loss_name, y)) ** 2).sum(1).mean()


def constant_solution(loss_name, y):
    """argmin_c of the mean loss over labels y, as an output [K] of the network."""
    if loss_name == "ce":
        return (torch.bincount(y, minlength=CLASSES) / len(y)).log()
    if loss_name == "nll":
        value = y.float()
        return torch.stack([value.mean() + OFFSET, value.var(unbiased=False).log()])
    return ideal(loss_name, y).mean(0)


def prediction(loss_name, output):
    """What is compared: probabilities for ce, the mean for nll, the output itself otherwise."""
    if loss_name == "ce":
        return output.softmax(-1)
    return output[..., :1] if loss_name == "nll" else output


def relative_distance(loss_name, output, constant, y_train):
    """Mean distance [1] of predictions from a constant output [K], in units of that of the
    training labels from it. Euclidean, for ce the total variation."""
    order = 1 if loss_name == "ce" else 2
    centre = prediction(loss_name, constant)
    far = (ideal(loss_name, y_train) - centre).norm(p=order, dim=1).mean()
    return ((prediction(loss_name, output) - centre).norm(p=order, dim=1).mean() / far).item()


def train(loss_name, head, x, y, setting, cfg, seed):
    """One network; setting: (learning rate, weight decay)."""
    constant = constant_solution(loss_name, y)
    sizes = (x.shape[1], 128, 128, 128, len(constant))
    net = common.seeded(derive(seed, "init"), lambda: common.mlp(*sizes))
    if head == "constant":
        with torch.no_grad():
            net[-1].weight.mul_(0.1)
            net[-1].bias.copy_(constant)
    learning_rate, weight_decay = setting
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay)
    for epoch in range(cfg.epochs):
        for i in common.batches(len(y), 128, seed, epoch):
            loss = loss_of(loss_name, net(x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


@torch.no_grad()
def measure(nets, shifts, y_train, validation, y):
    """{shift: {what: value}} of the five networks of one seed and head."""
    flat = torch.arange(CLASSES)  # balanced labels: their constant is the other candidate
    source = common.temperature(nets["ce"](validation[0]), validation[1])
    rows = {}
    for name, x in shifts.items():
        out = {loss: net(x) for loss, net in nets.items()}
        row = {}
        for loss, (to, labels) in itertools.product(LOSSES, (("", y_train), ("/flat", flat))):
            constant = constant_solution(loss, labels)
            row[f"{loss}{to}"] = relative_distance(loss, out[loss], constant, y_train)
        row["nll_sd"] = ((out["nll"][:, 1] / 2).exp().mean() / y_train.float().std()).item()
        row["accuracy"] = (out["ce"].argmax(1) == y).float().mean().item()
        row["w_phi"] = (out["ce"] - nets["ce"][-1].bias).norm(dim=1).mean().item()
        rows[name] = row | abstain.rewards(out, y, source)
    return rows


def tune(cfg):
    """{loss/head: setting}, and the scores of the grid: validation loss on the tuning seed."""
    x, y, validation, *_ = unbalanced_digits(cfg.data, TUNING_SEED)

    def score(arm, setting):
        loss, head = arm.split("/")
        net = train(loss, head, x, y, setting, cfg, TUNING_SEED)
        with torch.no_grad():
            return -loss_of(loss, net(validation[0]), validation[1]).item()

    arms = [f"{loss}/{head}" for loss, head in itertools.product(LOSSES, HEADS)]
    return common.tune(dict.fromkeys(arms, GRID), score, cfg.smoke)


NOTE = f"""Distances to the OCS, and (/flat) to the constant of balanced labels, in units of the
training labels' own (1: as far as a perfect answer, 0: there). w_phi: norm of the CE head's output
without its bias; nll_sd: predicted sd over the labels'. Policies: +1 right, -4 wrong, 0 abstain.
Selection: loss on source validation labels, seed {TUNING_SEED}, four settings a network; no label
of a shift, but for the oracle's temperature. x3 and inverted do not keep the norm."""


def report(rows, best, cfg, command):
    """rows [{seed, head, shift, ...}], best {loss/head: setting} -> (text, claims, draw)."""

    def at(head):
        return lambda key, shift: common.pick(rows, key, head=head, shift=shift)

    def reverts(head, loss, shift):
        """(the distance to the OCS falls, it ends below that to the other constant)"""
        before, after = at(head)(loss, NO_SHIFT), at(head)(loss, shift)
        return lead(before, after)[2], lead(at(head)(f"{loss}/flat", shift), after)[2]

    distances = [f"{loss}{to}" for loss in LOSSES[:4] for to in ("", "/flat")]
    tables = {"distances": ["accuracy", "w_phi", *distances, "nll_sd"],
              "reward of policies": POLICIES}
    parts = [common.matrix(f"**Head: {head}**, {name}", SHIFTS, keys,
                           lambda shift, key, head=head: at(head)(key, shift))
             for head, (name, keys) in itertools.product(HEADS, tables.items())]
    chosen = [f"{arm} {lr:g}, {decay:g}" for arm, (lr, decay) in best.items()]
    text = "\n\n".join([NOTE, *parts, f"Learning rate, weight decay: {'; '.join(chosen)}"])
    pairs = list(itertools.product(LOSSES[:4], ("rotation 60", "noise 1", "pixels shuffled")))
    tests = {head: [reverts(head, *pair) for pair in pairs] for head in HEADS}
    words = [f"{head} head: falls in {sum(a for a, _ in tests[head])} of {len(pairs)} pairs of "
             "loss and shift, ends nearer than to the constant of balanced labels in "
             f"{sum(map(all, tests[head]))}, squared error {cell(at(head)('mse', NO_SHIFT))} on "
             f"the test set and {cell(at(head)('mse', 'noise 1'))} under noise" for head in HEADS]
    claim = dict(
        paper="2310.00873", command=command, holds=common.verdict(map(all, tests["default"])),
        claim="as inputs leave the training data, predictions move to the optimal constant "
              "solution of their loss",
        short="Far from the data, predictions move to the best constant",
        measured=f"distance in units of the labels': {'; '.join(words)} ({cfg.seeds} seeds, sd)",
        fails_when="a regression's head starts with a bias of zero, far from the constant: "
                   "features shrink, but towards another place; and at three times the contrast: "
                   f"{cell(at('constant')('mse', 'x3'))} for squared error even with the constant "
                   "in the bias")
    claims = [claim, abstain.claim(at("default"), cfg, command)]
    return text, claims, lambda plt: draw(plt, at)


def draw(plt, at):
    """Distance from the OCS for both heads, reward of the policies for the default one."""
    fig, axes = plt.subplots(1, 3, figsize=(16, 5.6), constrained_layout=True)
    for axis, head in zip(axes, (*HEADS, "default")):
        arms = POLICIES if axis is axes[2] else LOSSES[:4]
        common.lines(axis, range(len(SHIFTS)), arms, SHIFTS, at(head))
        axis.set_xticks(range(len(SHIFTS)), SHIFTS, rotation=60, ha="right", fontsize=8)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
        axis.axhline(0 if axis is axes[2] else 1, color="#aaaaaa", linewidth=1)
        axis.set(title=f"head: {head}", ylabel="distance from the OCS (1: that of the labels)")
    for axis in axes[:2]:
        axis.set_yscale("log")
        axis.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
        axis.set(ylim=(0.2, 14))
    axes[2].set(ylabel="mean reward (always abstain: 0)", ylim=(-4.1, 3.2))
    return fig, axes


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.epochs = 2
    best, scores = tune(cfg)
    rows = []
    for seed in range(cfg.seeds):
        x, y, validation, pixels, y_test, average = unbalanced_digits(cfg.data, seed)
        shifts = shifted_images(pixels, average, data.photographs(cfg.data), seed)
        for head in HEADS:
            nets = {loss: train(loss, head, x, y, best[f"{loss}/{head}"], cfg, seed)
                    for loss in LOSSES}
            found = measure(nets, shifts, y, validation, y_test)
            rows += [dict(seed=seed, head=head, shift=name) | row for name, row in found.items()]
        print(f"seed {seed} done", flush=True)
    text, claims, figure = report(rows, best, cfg, common.command("ocs", argv))
    content = dict(claims=claims, tuned=scores, rows=rows)
    common.finish_run(cfg, "ocs", argv, text, content, figure)


if __name__ == "__main__":
    script(main)
