"""STOC: does self-training on top of contrastive features pay where labels and test data differ?

    python -m robustness.stoc --out docs/results/stoc     # about 6 minutes of one core
    python -m robustness.stoc --smoke                     # in seconds, on synthetic images

Garg, Setlur, Lipton, Balakrishnan, Smith, Raghunathan 2023 (arXiv 2312.03318, NeurIPS 2023). The
claim: under distribution shift, self-training (ST) that starts from contrastive features (CL) adds
3 to 8% to either alone; without shift, in plain semi-supervised learning, nothing is added. What
would have falsified it: STOC no better than the better of ST and CL under shift, beyond the spread
over seeds; or as large a gain without shift.

    ERM     features of a network trained on the labelled source, softmax head on them
    ST      the same features; the head refitted on its own most confident target labels
    CL      contrastive features of source and target together, no label; head on the source's
    STOC    CL, then ST

First the toy of the paper's theory in closed form: a shortcut that the target lacks, features of
the linear spectral contrastive loss. Then digits of 14x14: MNIST to the same turned by 35 degrees,
MNIST to other writers' digits and back, and 100 labels of MNIST to the rest (no shift). Heads on
frozen features only, which is the setting of the theory. The augmentations are the same for ERM.
self_training.py has ST and the toy, digit_domains.py the digits.

Selection: one learning rate an encoder of three, by accuracy on source validation labels, seed
100. Self-training has one fixed schedule. No target label is used but to measure, and the last
step counts.

Left out: SwAV and ResNets, eight data sets; self-training of all weights (FixMatch needs tens of
thousands of steps); batches of one domain (here every batch is drawn from both).
"""

import copy
import textwrap
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from infra.cli import opt, parse, script
from infra.runs import mean
from infra.seeds import derive, generator
from robustness import common
from robustness.common import TUNING_SEED, cell
from robustness.digit_domains import NO_SHIFT, PAIRS, augment, domains
from robustness.self_training import ARMS, CLASSES, accuracy, self_train, toy

LEARNING_RATES = (1e-3, 2e-3, 4e-3)
BATCH = 128


@dataclass
class Config(common.Config):
    epochs: int = opt(80, "of the contrastive stage, over source and target", low=1)
    images: int = opt(700, "of each domain, training", low=50)


def nt_xent(a, b, temperature=0.2):
    """SimCLR's loss (Chen et al. 2020, arXiv 2002.05709, equation 1): two views a, b [B, D] of
    every image; of all 2 B - 1 other views, which is its partner? Mean cross-entropy over the 2 B.
    """
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z)).roll(len(a))
    return F.cross_entropy(similarity, partner)


def train_erm(x, y, cfg, learning_rate, seed):
    """Cross-entropy on augmented source images, as many passes as the contrastive stage makes."""
    net = common.seeded(derive(seed, "net"), lambda: common.SmallCNN(1, CLASSES, width=64))
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    g = generator(seed, "augment")
    for step in range(cfg.epochs * cfg.images // BATCH):
        i = torch.randint(0, len(y), (BATCH,), generator=generator(seed, "batch", step))
        loss = F.cross_entropy(net(augment(x[i], g)), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def contrast(x, cfg, learning_rate, seed, milestones):
    """The contrastive stage on unlabelled images of both domains; {epoch: features' network} at
    milestones. The projection head is thrown away."""
    net = common.seeded(derive(seed, "net"), lambda: common.SmallCNN(1, 32, width=64))
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    g = generator(seed, "augment")
    kept = {}
    for epoch in range(1, cfg.epochs + 1):
        for i in common.batches(len(x), BATCH, seed, epoch):
            views = torch.cat([augment(x[i], g), augment(x[i], g)])
            loss = nt_xent(*net(views).chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in milestones:
            kept[epoch] = copy.deepcopy(net)
    return kept


def heads_on(net, source, target, test):
    """Accuracy on the target's test images (before, after self-training), and of the pseudo-labels.
    """
    with torch.no_grad():
        z, z_target, z_test = (net.features(images) for images in (source[0], target[0], test[0]))
    centre, scale = z.mean(0), z.std() + 1e-6
    z, z_target, z_test = ((features - centre) / scale for features in (z, z_target, z_test))
    before, after = self_train(z, source[1], z_target)
    return [accuracy(z_test, test[1], head) for head in (before, after)], \
        accuracy(z_target, target[1], before)


def run(pair, rates, cfg, seed):
    """Rows {pair, seed, epochs, ERM, ST, CL, STOC, and how many pseudo-labels were right at first}.
    """
    source, _, target, test = domains(pair, seed, cfg)
    milestones = [e for e in (10, 30) if e < cfg.epochs] + [cfg.epochs]
    erm = train_erm(*source, cfg, rates["ERM"], seed)
    (plain, self_trained), right = heads_on(erm, source, target, test)
    rows = []
    pooled = torch.cat([source[0], target[0]])
    for epoch, net in contrast(pooled, cfg, rates["CL"], seed, milestones).items():
        (cl, stoc), right_cl = heads_on(net, source, target, test)
        rows.append(dict(pair=pair, seed=seed, epochs=epoch, ERM=plain, ST=self_trained, CL=cl,
                         STOC=stoc, right_of_ERM=right, right_of_CL=right_cl))
    return rows


def tune(cfg):
    """Learning rates of both encoders, by accuracy on source validation labels of the turned pair.
    """
    source, validation, target, _ = domains(PAIRS[0], TUNING_SEED, cfg)

    def score(arm, rate):
        if arm == "ERM":
            net = train_erm(*source, cfg, rate, TUNING_SEED)
        else:
            pooled = torch.cat([source[0], target[0]])
            net = contrast(pooled, cfg, rate, TUNING_SEED, [cfg.epochs])[cfg.epochs]
        return heads_on(net, source, target, validation)[0][0]

    return common.tune(dict.fromkeys(("ERM", "CL"), LEARNING_RATES), score, cfg.smoke)


# --------------------------------------------------------------------------------------------------
# Table, claim, figure.


def report(toys, rows, rates, cfg, command):
    """toys {setting: [{arm: accuracy} of a seed]}, rows of run() -> (text, claims, draw)."""
    budgets = sorted({r["epochs"] for r in rows})

    def at(arm, pair, epochs=budgets[-1]):
        return common.pick(rows, arm, pair=pair, epochs=epochs)

    def in_toy(arm, setting):
        return common.pick(toys[setting], arm)

    def gain(epochs, pair):
        rival = max(("ST", "CL"), key=lambda arm: mean(at(arm, pair, epochs)))
        return [a - b for a, b in zip(at("STOC", pair, epochs), at(rival, pair, epochs))]

    won = set(common.ahead(at, "STOC", "ST", PAIRS)) & set(common.ahead(at, "STOC", "CL", PAIRS))
    flat = [pair for pair in PAIRS[:-1] if pair not in won]
    kept = ["right_of_ERM", "right_of_CL"]
    parts = [
        f"Accuracy on the target at the last step, {cfg.seeds} seeds. Selection: learning rates "
        f"{rates} by source validation labels, seed {TUNING_SEED}, of three; no target label.",
        common.matrix("Toy in closed form", toys, ARMS, lambda t, arm: in_toy(arm, t)),
        common.matrix(f"Digits, {cfg.epochs} epochs of contrast", [*ARMS, *kept], PAIRS, at),
        common.leads("Digits", "STOC", ARMS, PAIRS, at),
        common.matrix("STOC minus the better of the two, by epochs", budgets, PAIRS, gain)]
    cells = [f"{pair}: {common.cells(at, ARMS, pair)}" for pair in PAIRS]
    gained = [pair in won for pair in PAIRS[:-1]]  # if nothing is, the last pair tells nothing
    claim = dict(
        paper="2312.03318", command=command,
        holds=any(gained) and common.verdict([*gained, NO_SHIFT not in won]),
        claim="under distribution shift self-training from contrastive features adds 3 to 8% to "
              "either alone; without shift nothing",
        short="Self-training on contrastive features adds to either alone under shift",
        measured=f"{'; '.join(cells)}. STOC minus the better of the two, paired: "
                 + ", ".join(f"{p} {cell(gain(budgets[-1], p), sign=True)}" for p in PAIRS)
                 + f" ({cfg.seeds} seeds, sd)",
        fails_when=f"not clearly above both ST and CL: {', '.join(flat) or 'none'}; after "
                   f"{budgets[0]} epochs of contrast MNIST to turned "
                   f"{cell(gain(budgets[0], PAIRS[0]), sign=True)}")
    shift = next(iter(toys))
    theory = dict(
        paper="2312.03318", command=command,
        holds=common.verdict(common.ahead(in_toy, "STOC", r, [shift]) for r in ("ST", "CL")),
        claim="in the toy of the theory neither self-training nor contrast alone is enough, both "
              "together are",
        short="In the theory's toy only both together are enough",
        measured=f"{common.cells(in_toy, ARMS, shift)} on the target ({cfg.seeds} seeds, sd)",
        fails_when="there is no shift: all four are right, with 10% of the labels wrong")
    text = "\n\n".join(parts)
    return text, [claim, theory], lambda plt: draw(plt, toys, in_toy, at, gain, budgets)


def draw(plt, toys, in_toy, at, gain, budgets):
    """The toy, the digits, and what the length of the contrastive stage does."""
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.4), constrained_layout=True)
    for axis, groups, values in ((axes[0], list(toys), in_toy), (axes[1], PAIRS, at)):
        for k, (arm, colour) in enumerate(zip(ARMS, common.COLOURS)):
            points = [common.mean_sd(values(arm, group)) for group in groups]
            x = [i + 0.2 * (k - 1.5) for i in range(len(groups))]
            axis.bar(x, [m for m, _ in points], 0.18, yerr=[sd for _, sd in points], color=colour,
                     label=arm, capsize=2)
        axis.set_xticks(range(len(groups)), [textwrap.fill(g, 14) for g in groups], fontsize=8)
        axis.set(ylabel="accuracy on the target", ylim=(0, 1.15))
        axis.legend(frameon=False, fontsize=8, ncol=4, loc="upper center")
    common.lines(axes[2], budgets, PAIRS, budgets, lambda pair, epochs: gain(epochs, pair))
    axes[2].axhline(0, color="#aaaaaa", linewidth=1)
    axes[2].set(xlabel="epochs of contrast", ylabel="STOC minus the better of ST and CL")
    axes[2].legend(frameon=False, fontsize=8)
    axes[0].set_title("toy, closed form")
    axes[1].set_title("digits, heads on frozen features")
    return fig, axes


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.epochs, cfg.images = 2, 100
    settings = {"shift": (True, 0.0), "no shift, 10% of the labels wrong": (False, 0.1)}
    toys = {name: [toy(seed, *s) for seed in range(cfg.seeds)] for name, s in settings.items()}
    rates, scores = tune(cfg)
    rows = []
    for seed in range(cfg.seeds):
        for pair in PAIRS:
            rows += run(pair, rates, cfg, seed)
        print(f"seed {seed} done", flush=True)
    text, claims, figure = report(toys, rows, rates, cfg, common.command("stoc", argv))
    content = dict(claims=claims, tuned=dict(chosen=rates, scores=scores), rows=rows, toy=toys)
    common.finish_run(cfg, "stoc", argv, text, content, figure)


if __name__ == "__main__":
    script(main)
