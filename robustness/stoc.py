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

Selection: one learning rate an encoder of three, by accuracy on source validation labels, seed
100. Self-training has one fixed schedule. No target label is used but to measure, and the last
step counts.

Left out: SwAV and ResNets, eight data sets; self-training of all weights (FixMatch needs tens of
thousands of steps); batches of one domain (here every batch is drawn from both).
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from infra.cli import opt, parse, script
from infra.runs import mean
from infra.seeds import derive, generator
from robustness import common, data
from robustness.common import TUNING_SEED, cell, lead
from robustness.self_training import ARMS, CLASSES, accuracy, self_train, toy
from robustness.shifts import rotate

PAIRS = ("MNIST to turned", "MNIST to optdigits", "optdigits to MNIST", "no shift: 100 labels")
NO_SHIFT = PAIRS[-1]
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
BATCH = 128


@dataclass
class Config(common.Config):
    epochs: int = opt(80, "of the contrastive stage, over source and target", low=1)
    images: int = opt(700, "of each domain, training", low=50)


# --------------------------------------------------------------------------------------------------
# Objectives.


def nt_xent(a, b, temperature=0.2):
    """SimCLR's loss (Chen et al. 2020, arXiv 2002.05709, equation 1): two views a, b [B, D] of
    every image; of all 2 B - 1 other views, which is its partner? Mean cross-entropy over the 2 B.
    """
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z)).roll(len(a))
    return F.cross_entropy(similarity, partner)


# --------------------------------------------------------------------------------------------------
# Digits.


def augment(x, g):
    """Another view of images [B, 1, H, W]: turned by up to 20 degrees, scaled, moved, blurred
    (half of them), darker or lighter, a square of 4x4 cut out, noise."""
    n, _, height, width = x.shape
    u = 2 * torch.rand(n, 6, generator=g) - 1
    angle = u[:, 0] * 20 * torch.pi / 180
    scale = 1 + 0.2 * u[:, 1]
    turn = torch.stack([
        torch.stack([scale * angle.cos(), -scale * angle.sin(), 0.15 * u[:, 2]], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), 0.15 * u[:, 3]], 1)], 1)
    x = F.grid_sample(x, F.affine_grid(turn, x.shape, align_corners=False), align_corners=False)
    x = torch.where((u[:, 4] > 0).view(-1, 1, 1, 1), F.avg_pool2d(x, 3, 1, 1), x)
    x = x.clamp(1e-4, 1) ** (0.5 * u[:, 5]).exp().view(-1, 1, 1, 1)
    top = torch.randint(0, height - 3, (n, 1), generator=g)
    left = torch.randint(0, width - 3, (n, 1), generator=g)
    in_rows = (torch.arange(height) >= top) & (torch.arange(height) < top + 4)
    in_columns = (torch.arange(width) >= left) & (torch.arange(width) < left + 4)
    cut = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return x.masked_fill(cut, 0.0) + 0.1 * torch.randn(x.shape, generator=g)


def domains(pair, seed, cfg):
    """Four pairs (images [N, 1, 14, 14], digit [N]): labelled source, source validation, target
    without labels (they are for the record), target test. No digit is in two of them."""
    x, y = data.digits(cfg.data)
    order = torch.randperm(len(y), generator=generator(seed, "mnist"))
    x, y = data.small(x)[order][:, None], y[order]
    other, y_other = data.optdigits(cfg.data)
    order = torch.randperm(len(y_other), generator=generator(seed, "optdigits"))
    other = F.interpolate(other[order][:, None], size=(10, 10), mode="bilinear")
    other = F.pad(other, (2, 2, 2, 2))  # they fill their frame, those of MNIST leave a margin
    y_other = y_other[order]
    n = min(cfg.images, len(y) // 4, len(y_other) // 2)
    one, two, three, rest = slice(n), slice(n, 2 * n), slice(2 * n, 3 * n), slice(3 * n, None)
    source = [(x[one], y[one]), (x[two], y[two])]
    target = [(x[three], y[three]), (x[rest], y[rest])]
    of_others = [(other[one], y_other[one]), (other[n:], y_other[n:])]
    if pair == "MNIST to turned":
        target = [(rotate(images.flatten(1), 35).view_as(images), d) for images, d in target]
    elif pair == "MNIST to optdigits":
        target = of_others
    elif pair == "optdigits to MNIST":
        source = of_others
    else:
        source[0] = (x[: min(n, 100)], y[: min(n, 100)])
    return *source, *target


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

    def at(pair, key, epochs=budgets[-1]):
        return [r[key] for r in rows if r["pair"] == pair and r["epochs"] == epochs]

    def by_arm(arm, pair):
        return at(pair, arm)

    def gain(epochs, pair):
        rival = max(("ST", "CL"), key=lambda arm: mean(at(pair, arm, epochs)))
        return [a - b for a, b in zip(at(pair, "STOC", epochs), at(pair, rival, epochs))]

    def ahead(pair):
        return all(lead(at(pair, "STOC"), at(pair, rival))[2] for rival in ("ST", "CL"))

    kept = ["right_of_ERM", "right_of_CL"]
    parts = [
        f"Accuracy on the target at the last step, {cfg.seeds} seeds. Selection: learning rates "
        f"{rates} by source validation labels, seed {TUNING_SEED}, of three; no target label.",
        common.matrix("Toy in closed form", toys, ARMS, lambda t, arm: [r[arm] for r in toys[t]]),
        common.matrix(f"Digits, {cfg.epochs} epochs of contrast", [*ARMS, *kept], PAIRS, by_arm),
        common.leads("Digits", "STOC", ARMS[:3], PAIRS, by_arm),
        common.matrix("STOC minus the better of the two, by epochs", budgets, PAIRS, gain)]
    cells = [f"{pair}: " + ", ".join(f"{a} {cell(at(pair, a))}" for a in ARMS) for pair in PAIRS]
    gained = [ahead(pair) for pair in PAIRS[:-1]]  # if nothing is, the last pair tells nothing
    flat = [pair for pair, gain_here in zip(PAIRS, gained) if not gain_here]
    claim = dict(
        paper="2312.03318", command=command,
        holds=any(gained) and common.verdict([*gained, not ahead(NO_SHIFT)]),
        claim="under distribution shift self-training from contrastive features adds 3 to 8% to "
              "either alone; without shift nothing",
        short="Self-training on contrastive features adds to either alone under shift",
        measured=f"{'; '.join(cells)}. STOC minus the better of the two, paired: "
                 + ", ".join(f"{p} {cell(gain(budgets[-1], p), sign=True)}" for p in PAIRS)
                 + f" ({cfg.seeds} seeds, sd)",
        fails_when=f"not clearly above both ST and CL: {', '.join(flat) or 'none'}; after "
                   f"{budgets[0]} epochs of contrast MNIST to turned "
                   f"{cell(gain(budgets[0], PAIRS[0]), sign=True)}")
    found = next(iter(toys.values()))
    in_toy = {arm: [r[arm] for r in found] for arm in ARMS}
    theory = dict(
        paper="2312.03318", command=command,
        holds=common.verdict(lead(in_toy["STOC"], in_toy[rival])[2] for rival in ("ST", "CL")),
        claim="in the toy of the theory neither self-training nor contrast alone is enough, both "
              "together are",
        short="In the theory's toy only both together are enough",
        measured=", ".join(f"{arm} {cell(in_toy[arm])}" for arm in ARMS)
                 + f" on the target ({cfg.seeds} seeds, sd)",
        fails_when="there is no shift: all four are right, with 10% of the labels wrong")
    return "\n\n".join(parts), [claim, theory], lambda plt: draw(plt, toys, by_arm, gain, budgets)


def draw(plt, toys, by_arm, gain, budgets):
    """The toy, the digits, and what the length of the contrastive stage does."""
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.4), constrained_layout=True)
    for axis, groups, values in ((axes[0], list(toys), lambda arm, t: [r[arm] for r in toys[t]]),
                                 (axes[1], PAIRS, by_arm)):
        for k, (arm, colour) in enumerate(zip(ARMS, common.COLOURS)):
            points = [common.mean_sd(values(arm, group)) for group in groups]
            x = [i + 0.2 * (k - 1.5) for i in range(len(groups))]
            axis.bar(x, [m for m, _ in points], 0.18, yerr=[sd for _, sd in points], color=colour,
                     label=arm, capsize=2)
        axis.set_xticks(range(len(groups)), [g.replace(" ", "\n", 1) for g in groups], fontsize=8)
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
