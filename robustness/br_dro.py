"""BR-DRO: an adversary that can only name simple groups (Setlur et al. 2023, arXiv 2302.02931).

    python -m robustness.br_dro --out docs/results/br_dro              # 11 minutes of one core
    python -m robustness.br_dro --smoke                                # seconds, synthetic data

Claim: of all groups that an adversary could raise the weight of, only *simple* ones matter. One of
limited capacity finds the minority without group labels and, unlike CVaR's, which may name any set
of points, does not chase mislabelled ones. Falsified if, under label noise, BR-DRO has no better
worst group than CVaR, or as much weight on mislabelled images.

One game, four adversaries; w in [0, 1] is what one says of each training image after an epoch:

    ERM         nothing             w = 0
    CVaR        every function      w = 1[loss > eta], eta = the (1 - alpha)-quantile
    Group DRO   group indicators    w = 1[group of the highest mean loss]; knows the groups
    BR-DRO      simple functions    w = sigmoid(u_y . x + b_y), max mean w (loss - eta) - beta |u|^2

Sample weights follow without regret, W <- W exp(step w), mean 1; the learner minimises the
W-weighted cross-entropy. JTT (train briefly, raise what is wrong, train again) stands beside them.
Data: digits on photographs; label: has the digit a loop; the photograph agrees in 90% of training;
noise in training labels only. Settings: four an arm, chosen on another seed at 0, 10% noise. All
keep the epoch of the best *validation worst group* (it takes group labels); the last is shown too.

Two things decide whether it works. The adversary must not see the learner's last features: the loss
is monotone in what is linear there, so a linear adversary becomes CVaR's (an arm below); it sees 8
principal components of the image. Best responses oscillate; multiplied weights do not.
Left out: the information bottleneck as capacity (a squared norm here), ResNet-50 and the paper's
data, an adversary trained along with the learner (it is fitted afresh each epoch).
"""

import copy
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from infra.cli import opt, parse, script
from infra.seeds import generator
from robustness import common, data

AGREEMENT = 0.9
COMPONENTS, BETA = 8, 1e-3  # what the adversary sees of an image; weight of its squared norm
SIMPLE = "10%, on bright images"
NOISES = {"0%": 0.0, "5%": 0.05, "10%": 0.1, "20%": 0.2, SIMPLE: 0.1}
# The game's settings are (alpha, step), JTT's (epochs before, factor), ERM's (lr, weight decay).
ALPHA_STEP = [(0.1, 0.3), (0.1, 0.5), (0.2, 0.3), (0.2, 0.5)]
GRIDS = {
    "ERM": [(2e-3, 1e-4), (1e-3, 1e-4), (4e-3, 1e-4), (2e-3, 1.0)],
    "CVaR": ALPHA_STEP,
    "JTT": [(1, 5), (2, 5), (2, 10), (4, 5)],
    "BR-DRO, learner's features": ALPHA_STEP,
    "BR-DRO": ALPHA_STEP,
    "Group DRO": [(None, 0.1), (None, 0.2), (None, 0.3), (None, 0.5)],
}
TITLES = {"worst": "Worst group by label noise, epoch chosen on validation",
          "average": "Average accuracy, the same epoch", "last_worst": "Worst group, last epoch"}


@dataclass
class Config(common.Config):
    epochs: int = opt(24, "passes over the training images", "method", low=3)


def bitrate_inputs(images, components):
    """Images [N, C, H, W] -> their leading principal components [N, k], each of unit variance."""
    x = images.flatten(1)
    x = x - x.mean(0)
    z = x @ torch.linalg.eigh(x.T @ x)[1][:, -components:]
    return z / z.std(0)


def cvar_adversary(loss, alpha):
    """The best response of all functions into [0, 1] to mean w (loss - eta): w [N]."""
    return (loss > loss.quantile(1 - alpha)).float()


def group_adversary(loss, group, groups=4):
    """The best response of the group indicators: the group of the highest mean loss. w [N]"""
    means = torch.stack([loss[group == g].mean() for g in range(groups)])
    return (group == means.nan_to_num(-1).argmax()).float()


def simple_adversary(inputs, loss, label, alpha, beta, steps=50, lr=0.3):
    """The best response of simple functions: w = sigmoid(u_y . inputs + b_y), by Adam from zero.

    inputs [N, D] (standardised), loss [N], label [N] -> w [N] in (0, 1). Maximises
    mean w (loss - eta) - beta |u|^2, as the notebooks of github.com/ars22/bitrate_DRO do (with l1).
    """
    u = torch.zeros(int(label.max()) + 1, inputs.shape[1], requires_grad=True)
    b = torch.zeros(len(u), requires_grad=True)
    advantage = loss - loss.quantile(1 - alpha)
    optimizer = torch.optim.Adam([u, b], lr=lr)
    for _ in range(steps):
        w = torch.sigmoid((u[label] * inputs).sum(1) + b[label])
        objective = (w * advantage).mean() - beta * (u**2).sum()
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    return torch.sigmoid((u[label] * inputs).sum(1) + b[label]).detach()


def update_weights(weight, w, step, most=50.0):
    """W <- W exp(step w), [N], a point cut at `most` times the mean, then mean 1 (as there)."""
    weight = weight * torch.exp(step * w)
    weight = weight.clamp(max=most * weight.mean())
    return weight / weight.mean()


def noisy(split, kind, rate, seed):
    """Labels with `rate` flips, which were flipped, [N]; SIMPLE: only on the 40% brightest."""
    light = split.x.mean((1, 2, 3))
    chance = 2.5 * rate * (light > light.quantile(0.6)) if kind == SIMPLE else rate
    flipped = torch.rand(len(split.y), generator=generator(seed, "noise")) < chance
    return torch.where(flipped, 1 - split.y, split.y), flipped


def train(arm, setting, noise, seed, cfg):
    """One arm on one seed -> its measures, at the epoch chosen on validation and at the last."""
    train_split, validation, test = data.waterdigits(AGREEMENT, seed, cfg.data)
    x = train_split.x
    y, flipped = noisy(train_split, noise, NOISES[noise], seed)
    alpha, step = setting
    lr, weight_decay = setting if arm == "ERM" else (2e-3, 1e-4)
    pixels = bitrate_inputs(x, COMPONENTS)
    weight = torch.ones(len(y))
    if arm == "JTT":
        before, factor = setting  # epochs of the first network; weight of what it gets wrong
        first = common.fit(common.seeded(seed, common.SmallCNN), x, y, before, seed)
        weight = 1 + (factor - 1) * (first(x).argmax(1) != y).float()
        weight = weight / weight.mean()
    net = common.seeded(seed, common.SmallCNN)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    best, chosen, share = -1.0, None, []
    for epoch in range(cfg.epochs):
        for i in common.batches(len(y), 128, seed, epoch):
            loss = (weight[i] * F.cross_entropy(net(x[i]), y[i], reduction="none")).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        if arm not in ("ERM", "JTT"):  # the adversary's turn
            with torch.no_grad():
                hidden = net.features(x)
                loss = F.cross_entropy(net.head(hidden), y, reduction="none")
            if arm == "CVaR":
                w = cvar_adversary(loss, alpha)
            elif arm == "Group DRO":
                w = group_adversary(loss, train_split.group)
            elif arm == "BR-DRO":
                w = simple_adversary(pixels, loss, y, alpha, BETA)
            else:
                scaled = (hidden - hidden.mean(0)) / (hidden.std(0) + 1e-6)
                w = simple_adversary(scaled, loss, y, alpha, BETA)
            weight = update_weights(weight, w, step)
        share.append((weight[flipped].sum() / weight.sum()).item())

        worst = common.accuracies(net, validation)[1]
        if worst > best:
            best, chosen = worst, copy.deepcopy(net.state_dict())
    last = common.accuracies(net, test)[1]
    net.load_state_dict(chosen)
    average, worst = common.accuracies(net, test)
    return dict(average=average, worst=worst, validation=best, last_worst=last, share_flipped=share)


def report(runs, command):
    """runs {noise: {arm: [measures of a seed]}} -> (tables, claims, draw)."""
    arms, random = list(GRIDS), [n for n in runs if n not in ("0%", SIMPLE)]

    def measured(key):
        return lambda arm, noise: [r[key] for r in runs[noise][arm]]

    worst = measured("worst")

    def share(arm, noise):
        return [r["share_flipped"][-1] for r in runs[noise][arm]]

    def lead(rival, *noises):
        return [common.lead(worst("BR-DRO", n), worst(rival, n)) for n in noises]

    def said(rival, *noises):
        return ", ".join(f"{x[0]:+.3f} at {n}" for n, x in zip(noises, lead(rival, *noises)))

    tables = [common.matrix(title, arms, runs, measured(key)) for key, title in TITLES.items()]
    tables += [common.matrix("Weight on mislabelled images, last epoch", arms, runs, share),
               common.leads("Worst group", "BR-DRO", arms, runs, worst)]
    ahead = [x[2] for x in lead("CVaR", *random)]
    spared = [common.lead(share("CVaR", n), share("BR-DRO", n))[2] for n in random]
    cells = ", ".join(f"{a} {common.cell(worst(a, '10%'))}" for a in arms)
    last = [common.cell(measured("last_worst")(a, "10%")) for a in ("CVaR", "BR-DRO")]
    claims = [dict(
        paper="2302.02931", command=command, holds=common.verdict(ahead + spared),
        claim="An adversary limited to simple groups does not chase mislabelled points as CVaR's "
              "does: under label noise BR-DRO has the better worst group.",
        short="Bounded adversaries spare mislabelled points and win the worst group",
        measured=f"Digits on photographs, {len(worst('ERM', '0%'))} seeds. Worst group at 10% "
                 f"noise: {cells}. BR-DRO minus CVaR {said('CVaR', *random)}. Weight on "
                 f"mislabelled images at 10%: CVaR {common.cell(share('CVaR', '10%'))}, BR-DRO "
                 f"{common.cell(share('BR-DRO', '10%'))}. Last epoch, worst group at 10%: CVaR "
                 f"{last[0]}, BR-DRO {last[1]}.",
        fails_when=f"BR-DRO minus CVaR without noise {said('CVaR', '0%')}; where the noise is "
                   f"itself simple {said('CVaR', SIMPLE)}. BR-DRO minus JTT, which needs no "
                   f"adversary: {said('JTT', *runs)}."), dict(
        paper="2302.02931", command=command,
        claim="BR-DRO matches Group DRO without group labels.",
        short="BR-DRO matches Group DRO without group labels",
        holds=common.verdict(x[0] > -0.03 for x in lead("Group DRO", "0%", *random)),
        measured=f"Worst group, BR-DRO minus Group DRO: {said('Group DRO', '0%', *random)} "
                 "(matched: at most 0.03 below).",
        fails_when="Group labels in training are worth the differences above.")]
    return "\n\n".join(tables), claims, lambda plt: draw(plt, runs, worst)


def draw(plt, runs, worst):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    noises = [n for n in runs if n != SIMPLE]
    common.lines(left, [100 * NOISES[n] for n in noises], GRIDS, noises, worst)
    for arm, colour in zip(GRIDS, common.COLOURS):
        share = torch.tensor([r["share_flipped"] for r in runs["10%"][arm]]).mean(0)
        right.plot(range(1, len(share) + 1), share, color=colour)
    left.set(xlabel="label noise in training, %", ylabel="worst-group accuracy",
             xticks=[0, 5, 10, 20], title="Worst group (mean, sd over seeds)")
    right.set(xlabel="epoch", ylabel="share of the weight", ylim=(0, None),
              title="Weight on mislabelled images, 10% noise")
    right.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, ncol=2, loc=4)
    return fig, (left, right)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    cfg.epochs = 4 if cfg.smoke else cfg.epochs
    noises = ["0%", "10%", SIMPLE] if cfg.smoke else list(NOISES)

    def score(arm, setting):
        runs = [train(arm, setting, n, common.TUNING_SEED, cfg) for n in ("0%", "10%")]
        return sum(r["validation"] for r in runs) / 2

    settings, scores = common.tune(GRIDS, score, cfg.smoke)
    runs = {}
    for noise, arm in itertools.product(noises, GRIDS):
        found = [train(arm, settings[arm], noise, s, cfg) for s in range(cfg.seeds)]
        runs.setdefault(noise, {})[arm] = found
        print(noise, arm, common.cell(r["worst"] for r in found), flush=True)
    text, claims, fig = report(runs, common.command("br_dro", argv))
    common.finish_run(cfg, "br_dro", argv, text, dict(claims=claims, tuned=scores, rows=runs), fig)


if __name__ == "__main__":
    script(main)
