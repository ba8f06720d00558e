"""Networks extrapolate predictably: do predictions move to the best constant as inputs leave the
training data?

    python -m robustness.ocs --out docs/results/ocs     # 2 to 3 minutes of one core
    python -m robustness.ocs --smoke                    # in seconds, on synthetic images

Kang, Setlur, Tomlin, Levine 2023 (arXiv 2310.00873, ICLR 2024). The optimal constant solution
(OCS) of a loss is argmin_c (1/N) sum_i L(c, y_i): the label marginal for cross-entropy, the mean
for squared error, mean and variance for a Gaussian likelihood. The claim: outputs of networks
drift towards it, because the features of strange inputs miss the rows of the weights, W phi
shrinks, and the biases stay. Its use: choose a loss whose OCS is the cautious action. A network
that predicts the reward of each action (+1 right, -4 wrong, 0 abstain) then abstains far from its
data.

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
oracle row shows what theirs would do)."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from infra.cli import opt, parse, script
from infra.seeds import derive, generator
from robustness import common, data
from robustness.common import TUNING_SEED, cell, lead, temperature
from robustness.shifts import NO_SHIFT, SHIFTS, shifted_images

CLASSES = 10
OFFSET = 10.0  # regression labels are digit + 10, so that their mean is far from an output of zero
PENALTY = 4.0
GRID = [(1e-3, 0.0), (1e-3, 0.3), (3e-3, 0.0), (3e-3, 0.3)]  # learning rate, weight decay
LOSSES = ("ce", "mse", "nll", "reward", "onehot")
HEADS = ("default", "constant")
REWARD, ONEHOT, CE_T = "reward network", "one-hot, squared loss, threshold", "CE + temperature"
POLICIES = (REWARD, ONEHOT, CE_T, "CE + temperature of that shift (oracle)", "CE, never abstains")


@dataclass
class Config(common.Config):
    epochs: int = opt(25, "passes over the training images", low=1)


# --------------------------------------------------------------------------------------------------
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


def act(reward):
    """Reward of each action [N, A] -> the best one [N]."""
    return reward.argmax(1)


def act_on_probability(probability, penalty=PENALTY):
    """The same decision from class probabilities: abstain where the expected reward (1 + penalty)
    p - penalty is negative."""
    best, action = probability.max(1)
    return torch.where(best * (1 + penalty) > penalty, action, probability.shape[1])


def policy_reward(action, y, penalty=PENALTY):
    """Mean reward of actions [N]; action CLASSES is to abstain."""
    return reward_targets(y, penalty=penalty).gather(1, action[:, None]).mean().item()


# --------------------------------------------------------------------------------------------------
# Training and measuring.


class Net(nn.Module):
    """Three hidden layers of 128 ReLUs and a linear head."""

    def __init__(self, inputs, outputs):
        super().__init__()
        sizes = (inputs, 128, 128, 128)
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, outputs)

    def forward(self, x):
        return self.head(self.body(x))


def train(loss_name, head, x, y, setting, cfg, seed):
    """One network; setting: (learning rate, weight decay)."""
    constant = constant_solution(loss_name, y)
    net = common.seeded(derive(seed, "init"), lambda: Net(x.shape[1], len(constant)))
    if head == "constant":
        with torch.no_grad():
            net.head.weight.mul_(0.1)
            net.head.bias.copy_(constant)
    learning_rate, weight_decay = setting
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay)
    for epoch in range(cfg.epochs):
        for i in common.batches(len(y), 128, seed, epoch):
            loss = loss_of(loss_name, net(x[i]), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def splits(cfg, seed):
    """Centred train and validation images, their labels, test pixels and labels, the average
    image. Class k is kept with probability 1, 0.9, ... 0.1."""
    images, digit = data.digits(cfg.data)
    keep = torch.rand(len(digit), generator=generator(seed, "unbalanced")) < 1 - digit / CLASSES
    pixels = images[keep].flatten(1)
    y = digit[keep]
    tr, va, te = data.parts(len(y), (0.6, 0.15, 0.25), seed, "ocs")
    average = pixels[tr].mean(0)
    return pixels[tr] - average, y[tr], pixels[va] - average, y[va], pixels[te], y[te], average


@torch.no_grad()
def measure(nets, shifts, y_train, validation, y):
    """{shift: {what: value}} of the five networks of one seed and head. validation: images and
    labels of the source."""
    flat = torch.arange(CLASSES)  # balanced labels: their constant is the other candidate
    source = temperature(nets["ce"](validation[0]), validation[1])
    rows = {}
    for name, x in shifts.items():
        out = {loss: net(x) for loss, net in nets.items()}
        row = {}
        for loss in LOSSES:
            for to, labels in (("", y_train), ("/flat", flat)):
                constant = constant_solution(loss, labels)
                row[f"{loss}{to}"] = relative_distance(loss, out[loss], constant, y_train)
        row["nll_sd"] = ((out["nll"][:, 1] / 2).exp().mean() / y_train.float().std()).item()
        row["accuracy"] = (act(out["ce"]) == y).float().mean().item()
        row["w_phi"] = (out["ce"] - nets["ce"].head.bias).norm(dim=1).mean().item()
        own = temperature(out["ce"], y)
        actions = (act(out["reward"]), act_on_probability(out["onehot"]),
                   act_on_probability((out["ce"] / source).softmax(1)),
                   act_on_probability((out["ce"] / own).softmax(1)), act(out["ce"]))
        row |= {policy: policy_reward(action, y) for policy, action in zip(POLICIES, actions)}
        rows[name] = row
    return rows


def tune(cfg):
    """{loss/head: setting}, and the scores of the grid: validation loss on the tuning seed."""
    x, y, x_val, y_val, *_ = splits(cfg, TUNING_SEED)

    def score(arm, setting):
        loss, head = arm.split("/")
        net = train(loss, head, x, y, setting, cfg, TUNING_SEED)
        with torch.no_grad():
            return -loss_of(loss, net(x_val), y_val).item()

    arms = [f"{loss}/{head}" for loss, head in itertools.product(LOSSES, HEADS)]
    return common.tune(dict.fromkeys(arms, GRID), score, cfg.smoke)


def run(cfg, best):
    """[{seed, head, shift, ...}]"""
    rows = []
    for seed in range(cfg.seeds):
        x, y, x_val, y_val, pixels, y_test, average = splits(cfg, seed)
        shifts = shifted_images(pixels, average, data.photographs(cfg.data), seed)
        for head in HEADS:
            nets = {loss: train(loss, head, x, y, best[f"{loss}/{head}"], cfg, seed)
                    for loss in LOSSES}
            found = measure(nets, shifts, y, (x_val, y_val), y_test)
            rows += [dict(seed=seed, head=head, shift=name) | row for name, row in found.items()]
        print(f"seed {seed} done", flush=True)
    return rows


# --------------------------------------------------------------------------------------------------
# Table, claims, figure.


def column(rows, head, shift, key):
    """One value a seed, in the order of seeds."""
    return [r[key] for r in rows if r["head"] == head and r["shift"] == shift]


NOTE = f"""Distances to the OCS, and (/flat) to the constant of balanced labels, in units of the
training labels' own (1: as far as a perfect answer, 0: there). w_phi: norm of the CE head's output
without its bias; nll_sd: predicted sd over the labels'. Policies: +1 right, -4 wrong, 0 abstain.
Selection: loss on source validation labels, seed {TUNING_SEED}, four settings a network; no label
of a shift, but for the oracle's temperature. x3 and inverted do not keep the norm."""


def table(rows, best):
    parts = [NOTE]
    columns = [f"{loss}{to}" for loss in LOSSES[:4] for to in ("", "/flat")]
    for head in HEADS:
        for name, keys in (("distances", ["accuracy", "w_phi", *columns, "nll_sd"]),
                           ("reward of policies", POLICIES)):
            def at(shift, key, head=head):
                return column(rows, head, shift, key)

            parts.append(common.matrix(f"**Head: {head}**, {name}", SHIFTS, keys, at))
    chosen = [f"{arm} {lr:g}, {decay:g}" for arm, (lr, decay) in best.items()]
    return "\n\n".join([*parts, f"Learning rate, weight decay: {'; '.join(chosen)}"])


def reverts(rows, head, loss, shift):
    """(distance to the OCS falls, ends below that to the other constant); beyond two std errors."""
    after = column(rows, head, shift, loss)
    return (lead(column(rows, head, NO_SHIFT, loss), after)[2],
            lead(column(rows, head, shift, f"{loss}/flat"), after)[2])


def claims(rows, cfg, command):
    pairs = list(itertools.product(LOSSES[:4], ("rotation 60", "noise 1", "pixels shuffled")))
    tests = {head: [reverts(rows, head, *pair) for pair in pairs] for head in HEADS}
    words = [f"{head} head: falls in {sum(a for a, _ in tests[head])} of {len(pairs)} pairs of "
             "loss and shift, ends nearer than to the constant of balanced labels in "
             f"{sum(map(all, tests[head]))}, squared error "
             f"{cell(column(rows, head, NO_SHIFT, 'mse'))} on the test set and "
             f"{cell(column(rows, head, 'noise 1', 'mse'))} under noise" for head in HEADS]
    first = dict(
        paper="2310.00873", command=command, holds=common.verdict(map(all, tests["default"])),
        claim="as inputs leave the training data, predictions move to the optimal constant "
              "solution of their loss",
        short="Far from the data, predictions move to the best constant",
        measured=f"distance in units of the labels': {'; '.join(words)} ({cfg.seeds} seeds, sd)",
        fails_when="a regression's head starts with a bias of zero, far from the constant: "
                   "features shrink, but towards another place; and at three times the contrast: "
                   f"{cell(column(rows, 'constant', 'x3', 'mse'))} for squared error even with the "
                   "constant in the bias")
    kept = [s for s, norm_kept in SHIFTS.items() if norm_kept and s != NO_SHIFT]

    def wins(policy, rival):
        return [s for s in kept
                if lead(column(rows, "default", s, policy), column(rows, "default", s, rival))[2]]

    more = wins(REWARD, CE_T)
    turned = [f"{k} {cell(column(rows, 'default', 'rotation 60', k), sign=True)}" for k in POLICIES]
    second = dict(
        paper="2310.00873", command=command, holds=common.verdict(s in more for s in kept),
        claim="a network that predicts rewards, abstaining among them, is cautious where CE with a "
              "temperature is not",
        short="Predicted rewards with an abstaining action are cautious far away",
        measured=f"more reward than CE + temperature on {len(more)} of {len(kept)} shifts "
                 f"({', '.join(more)}), than a one-hot squared loss with a threshold, which never "
                 f"hears of rewards, on {len(wins(REWARD, ONEHOT))}; rotation 60: "
                 f"{', '.join(turned)} ({cfg.seeds} seeds, sd)",
        fails_when="less reward than CE + temperature under "
                   f"{', '.join(wins(CE_T, REWARD)) or 'none'}; than the one-hot control under "
                   f"{', '.join(wins(ONEHOT, REWARD)) or 'none'}")
    return [first, second]


def figure(rows):
    """Distance from the OCS for both heads, reward of the policies for the default one."""
    def draw(plt):
        fig, axes = plt.subplots(1, 3, figsize=(16, 5.6), constrained_layout=True)
        for axis, head in zip(axes, (*HEADS, "default")):
            arms = POLICIES if axis is axes[2] else LOSSES[:4]
            common.lines(axis, range(len(SHIFTS)), arms, SHIFTS,
                         lambda arm, shift, head=head: column(rows, head, shift, arm))
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

    return draw


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.epochs = 2
    best, record = tune(cfg)
    rows = run(cfg, best)
    command = common.command("ocs", argv)
    content = dict(claims=claims(rows, cfg, command), tuned=record, rows=rows)
    common.finish_run(cfg, "ocs", argv, table(rows, best), content, figure(rows))


if __name__ == "__main__":
    script(main)
