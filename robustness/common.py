"""What several of the eight methods share, and no more.

    Config                            flags --seeds --out --smoke --data, to subclass
    SmallCNN(channels, outputs, size, width)    features(x) [N, width], forward(x) [N, outputs]
    mlp(*sizes)                       linear layers of these sizes, ReLUs between them
    seeded(seed, make)                make() under a fixed seed: initial weights
    batches(n, batch, seed, *purpose) index tensors of one shuffled pass
    fit(net, x, y, epochs, seed, weight, lr, weight_decay, batch)    plain training, in place
    group_accuracies(logits, y, group, groups), worst_group(...)     accuracy of each, of the worst
    balanced(group)                   weights [N], the same sum for every group
    accuracies(net, split)            (average accuracy, worst group's) of a data.Split
    logistic(x, y, l2, weight)        binary logistic regression, exact: theta [D + 1], bias last
    affine(x, theta)                  its logits [N]
    temperature(logits, y)            the scalar that minimises the cross-entropy
    choose(settings, score)           the best setting (on TUNING_SEED), and all scores
    tune(grids, score, smoke)         choose for every arm: {arm: setting}, {arm: scores}
    mean_sd(values), cell(values)     mean and sample sd over seeds; the same as "0.640 (0.036)"
    clearly_positive(differences), verdict(tests)    the rule for a claim's "holds"
    lead(a, b)                        a - b paired by seed: mean, sd, clearly positive?
    pick(rows, key, **where)          the values of key in the rows that agree with `where`
    ahead(values, arm, rival, columns)    the columns where arm is clearly above rival
    cells(values, arms, column)       "ERM 0.505 (0.068), ENP 0.637 (0.073)"
    markdown(header, rows)            a table
    matrix(title, arms, columns, values)           cells of values(arm, column), a list over seeds
    leads(title, arm, arms, columns, values)       arm minus each other; * clearly positive
    lines(axis, x, arms, columns, values)          the same as lines with error bars
    finish_run(cfg, name, argv, text, content, draw)    table.md, figure.png, results.json, summary

Every file: seeds 0 .. --seeds - 1 are reported; settings are chosen on TUNING_SEED, from grids of
the same size an arm. A results.json holds claims (experiments/claims.py reads them), command,
machine, torch, settings, tuned, rows. Figures come from the house's report module, imported here
alone.
"""

import itertools
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from infra.cli import UserError, opt
from infra.runs import mean, write_json
from infra.seeds import generator

# The one place of this folder that knows where figures live.
from report.figures import finish, machine, print_results, pyplot
from report.statistics import margin, spread

TUNING_SEED = 100
# Okabe-Ito, safe for colour-blind readers.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#7f7f7f"]
COLOURS += ["#882255", "#44AA99"]


@dataclass
class Config:
    """The flags of every file of this folder."""

    seeds: int = opt(
        5, "seeds reported, from 0 (settings are chosen on another)", "run", low=1, high=100
    )
    out: str = opt("", "where table, figure and numbers go (default: runs/robustness/NAME)", "run")
    smoke: bool = opt(False, "the same road in seconds, on synthetic data", "run")
    data: str = opt(
        "real",
        "real: from packages; synthetic: made up, for a look",
        "run",
        choices=["real", "synthetic"],
    )

    def __post_init__(self):
        if self.smoke:
            self.data = "synthetic"
            self.seeds = min(self.seeds, 2)
        if self.data == "synthetic" and Path(self.out).as_posix().startswith("docs/results"):
            raise UserError("--data synthetic gives no results to keep: leave --out away")
        torch.set_num_threads(1)  # the networks are tiny: a second thread only costs


# -------------------------------------------------------------------------------------------------
# Networks and their training.


class SmallCNN(nn.Module):
    """conv 5x5/2 (8) - conv 3x3/2 (16) - linear (width) - linear (outputs), ReLU between.

    size: (height, width) of the input. 11 thousand weights at 14x14.
    """

    def __init__(self, channels=3, outputs=2, size=(14, 14), width=32):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        height, across = ((s + 3) // 4 for s in size)
        self.hidden = nn.Linear(16 * height * across, width)
        self.head = nn.Linear(width, outputs)

    def features(self, x):
        """[N, C, H, W] -> [N, width], not negative."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x):
        return self.head(self.features(x))


def mlp(*sizes):
    """Linear layers of these sizes with ReLUs between them; the last one is mlp(...)[-1]."""
    layers = [nn.Linear(*sizes[:2])]
    for wide in itertools.pairwise(sizes[1:]):
        layers += [nn.ReLU(), nn.Linear(*wide)]
    return nn.Sequential(*layers)


def seeded(seed, make):
    """make() under a fixed seed of the global generator, which is put back afterwards.

    Networks take their initial weights from it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def batches(n, batch, seed, *purpose):
    """One shuffled pass over 0..n-1: index tensors of `batch` (the last may be shorter)."""
    return torch.randperm(n, generator=generator(seed, "batches", *purpose)).split(batch)


def fit(net, x, y, epochs, seed, weight=None, lr=2e-3, weight_decay=1e-4, batch=128):
    """AdamW on the (weighted) cross-entropy; weight [N] with mean 1. Returns net, in place."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    for epoch in range(epochs):
        for i in batches(len(y), batch, seed, epoch):
            loss = F.cross_entropy(net(x[i]), y[i], reduction="none")
            loss = loss.mean() if weight is None else (weight[i] * loss).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


# -------------------------------------------------------------------------------------------------
# Measures.


def group_accuracies(logits, y, group, groups=4):
    """[accuracy of each group], NaN for a group without members."""
    right = (logits.argmax(1) == y).double()
    return [right[group == g].mean().item() for g in range(groups)]


def worst_group(logits, y, group, groups=4):
    return min(group_accuracies(logits, y, group, groups))


def balanced(group):
    """Weights [N] of mean 1, the same for every group in all."""
    weight = 1 / torch.bincount(group)[group].float()
    return weight / weight.mean()


def accuracies(net, split):
    """A Split -> (average accuracy, worst group's)."""
    with torch.no_grad():
        logits = net(split.x)
    return (logits.argmax(1) == split.y).double().mean().item(), worst_group(
        logits, split.y, split.group
    )


# -------------------------------------------------------------------------------------------------
# Exact small classifiers: no learning rate to tune.


def logistic(x, y, l2, weight=None, steps=30):
    """Binary logistic regression: argmin mean_i w_i CE_i + l2/2 |theta|^2, no penalty on the bias.

    Newton in float64. x [N, D], y [N] in {0, 1}, weight [N] (mean 1) -> theta [D + 1], bias last.
    """
    if len(x) < x.shape[1]:  # the solution lies in the span of the points: solve there
        basis, coordinates = torch.linalg.qr(x.double().T)
        theta = logistic(coordinates.T, y, l2, weight, steps)
        return torch.cat([basis @ theta[:-1], theta[-1:]])
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    y = y.double()
    weight = torch.ones_like(y) if weight is None else weight.double()
    penalty = torch.full((x.shape[1],), float(l2), dtype=torch.float64)
    penalty[-1] = 1e-8  # separable classes need a bound for the bias as well
    theta = torch.zeros(x.shape[1], dtype=torch.float64)

    def loss(theta):
        z = x @ theta
        return (weight * (F.softplus(z) - y * z)).mean() + 0.5 * (penalty * theta**2).sum()

    for _ in range(steps):
        p = torch.sigmoid(x @ theta)
        gradient = x.T @ (weight * (p - y)) / len(y) + penalty * theta
        if gradient.abs().max() < 1e-8:
            break
        curvature = (x * (weight * p * (1 - p)).unsqueeze(1)).T @ x / len(y) + torch.diag(
            penalty + 1e-10
        )
        step = torch.linalg.solve(curvature, gradient)
        size = 1.0
        while loss(theta - size * step) > loss(theta) and size > 1e-4:
            size /= 2
        theta = theta - size * step
    return theta


def affine(x, theta):
    """Logits [N] of a logistic regression."""
    return x.double() @ theta[:-1] + theta[-1]


def temperature(logits, y):
    """The scalar T that minimises CE(logits / T, y), of 101 from 0.05 to 20. logits [N, K]."""
    grid = torch.logspace(-1.30103, 1.30103, 101)
    losses = torch.stack([F.cross_entropy(logits / t, y) for t in grid])
    return grid[losses.argmin()].item()


# -------------------------------------------------------------------------------------------------
# Choices, tables, result files.


def choose(settings, score):
    """The setting with the highest score(setting), and [(setting, score)] of all."""
    scores = [(s, score(s)) for s in settings]
    return max(scores, key=lambda pair: pair[1])[0], scores


def tune(grids, score, smoke=False):
    """{arm: [setting]} -> {arm: its setting of the highest score(arm, setting)}, {arm: scores}.

    score runs on TUNING_SEED. smoke: the first setting of each arm, without scores.
    """
    if smoke:
        return {arm: grid[0] for arm, grid in grids.items()}, {}
    results = {arm: choose(grid, lambda s, arm=arm: score(arm, s)) for arm, grid in grids.items()}
    return {arm: r[0] for arm, r in results.items()}, {arm: r[1] for arm, r in results.items()}


def mean_sd(values):
    values = list(values)
    return mean(values), spread(values)


def cell(values, sign=False):
    """mean (sample sd over seeds)"""
    m, sd = mean_sd(values)
    return f"{m:+.3f} ({sd:.3f})" if sign else f"{m:.3f} ({sd:.3f})"


def clearly_positive(differences):
    """Paired differences over seeds: is the 95% interval of their mean above 0 (Student's t)?"""
    differences = list(differences)
    return mean(differences) > margin(differences)


def verdict(tests):
    """For a claim's "holds": True if every test is passed, False if none is, else "partly"."""
    tests = list(tests)
    return True if all(tests) else "partly" if any(tests) else False


def lead(a, b):
    """a minus b, paired by seed: (mean, sample sd, whether it is clearly positive)."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return *mean_sd(differences), clearly_positive(differences)


def pick(rows, key, **where):
    """[row[key]] of the rows that agree with `where`, in their order: one value a seed."""
    return [r[key] for r in rows if all(r[k] == v for k, v in where.items())]


def ahead(values, arm, rival, columns):
    """The columns where arm is clearly above rival; values(arm, column) is a list over seeds."""
    return [c for c in columns if lead(values(arm, c), values(rival, c))[2]]


def cells(values, arms, column, sign=False):
    """The arms' cells at one column, for a sentence."""
    return ", ".join(f"{arm} {cell(values(arm, column), sign)}" for arm in arms)


def markdown(header, rows):
    """A Markdown table of strings and numbers."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def matrix(title, arms, columns, values):
    """A table with a title: one row an arm, cells of values(arm, column), a list over seeds."""
    rows = [[arm, *(cell(values(arm, c)) for c in columns)] for arm in arms]
    return f"{title}, mean (sd over seeds):\n\n" + markdown(["arm", *columns], rows)


def leads(title, arm, arms, columns, values):
    """The same for an arm minus each other one, paired by seed; * where it is clearly positive."""
    rows = []
    for rival in [a for a in arms if a != arm]:
        found = [lead(values(arm, c), values(rival, c)) for c in columns]
        rows.append([rival, *(f"{m:+.3f} ({sd:.3f}){' *' * ahead}" for m, sd, ahead in found)])
    note = f"{title}, {arm} minus the other arm, paired by seed (* 95% interval above 0)"
    return f"{note}:\n\n" + markdown(["minus", *columns], rows)


def lines(axis, x, arms, columns, values, **style):
    """One line an arm over x, its mean over seeds with sd as error bar; colours in order."""
    for arm, colour in zip(arms, COLOURS):
        points = [mean_sd(values(arm, c)) for c in columns]
        axis.errorbar(x, [m for m, _ in points], [sd for _, sd in points], color=colour, capsize=2,
                      label=arm, **{"marker": "o", "markersize": 4} | style)


def command(name, argv):
    return shlex.join(
        ["python", "-m", f"robustness.{name}", *(sys.argv[1:] if argv is None else argv)]
    )


def finish_run(cfg, name, argv, text, content, draw):
    """What every file ends with.

    text: Markdown; content: claims, tuned, rows, ...; draw(plt) -> (figure, its axes).
    """
    out = Path(cfg.out or f"runs/robustness/{name}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    record = dict(
        command=command(name, argv),
        machine=machine(),
        torch=torch.__version__,
        settings=vars(cfg),
        cpu_minutes=round(time.process_time() / 60, 1),
    )
    write_json(out / "results.json", content | record)
    if (plt := pyplot()) is not None:
        fig, axes = draw(plt)
        finish(plt, fig, axes, out / "figure.png")
    print_results(text, out, time.process_time(), figure="figure")
