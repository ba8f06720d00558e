"""CosMoS: per cluster of inputs the most confident classifier (Chen et al. 2023, arXiv 2306.11120).

    python -m robustness.cosmos --out docs/results/cosmos    # 3 minutes of one core, five seeds
    python -m robustness.cosmos --smoke                      # seconds, synthetic data

Claim: do not throw shortcut models away. Give each classifier its temperature on source data,
cluster the unlabelled test inputs, use in each cluster the classifier that is most confident there:
lower average regret over mixes of subpopulations than the robust model and than other ways to
combine them, without target labels. Regret of a mix: accuracy of the best single classifier on it
minus the rule's. Falsified where the invariant model alone, or averaging, has no higher regret.

When it can work: where the shortcut contradicts the core, log-odds are c for the invariant model
and s - c for the one that uses both; the invariant one is more confident iff s < 2c. A shortcut of
more than twice the core's strength must be chosen where it is wrong. Here s is the log-odds of the
source's agreement (the figure's upper axis), c the invariant model's median.

Two classifiers: ERM ("shortcut") and the same with balanced groups ("invariant"). Two data sets:
sentences (label: sign of the valence, attribute: tweet or film review; logistic regression on
MiniLM embeddings) and digits on photographs (label: loop, attribute: photograph; SmallCNN). Test
mixes of agreement 0.95 to 0.05, and one batch whose attributes have different best classifiers.

Settings are chosen on another seed, four an arm: the classifiers' by source validation (the
invariant one's by its worst group), the clusters and the average's weight by the regret itself at
agreement 0.8, that is with target labels, which the method would not have.

Left out: a third classifier, the paper's data.
"""

import math

import torch
import torch.nn.functional as F

from infra.cli import parse, script
from infra.seeds import generator
from robustness import common, data

SOURCES = (0.6, 0.7, 0.8, 0.9, 0.95)
MIXES = {"0.95": (0.95, 0.95), "0.75": (0.75, 0.75), "0.5": (0.5, 0.5), "0.25": (0.25, 0.25),
         "0.05": (0.05, 0.05), "two in one": (0.95, 0.05)}  # P(y = a) where a = 0, where a = 1
FIVE = [m for m in MIXES if m != "two in one"]
GRIDS = {"text": [1e-4, 3e-4, 1e-3, 3e-3], "images": [10, 15, 20, 25]}  # l2; epochs
CLUSTERS = [1, 4, 16, 64]
WEIGHTS = [0.25, 0.5, 0.75, 0.9]  # of the invariant model in the average


def kmeans(x, k, seed, steps=25):
    """k-means from k-means++ seeds: the cluster [N] of each row of x [N, D]."""
    g = generator(seed, "kmeans", k)
    centres = x[torch.randint(len(x), (1,), generator=g)]
    while len(centres) < k:
        d2 = torch.cdist(x, centres).min(1).values ** 2
        centres = torch.cat([centres, x[torch.multinomial(d2 + 1e-12, 1, generator=g)]])
    for _ in range(steps):
        cluster = torch.cdist(x, centres).argmin(1)
        total = torch.zeros_like(centres).index_add_(0, cluster, x)
        count = torch.bincount(cluster, minlength=k).unsqueeze(1)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    return torch.cdist(x, centres).argmin(1)


def select(prob, cluster):
    """Each input's classifier: that of the highest mean confidence in the input's cluster.

    prob [M, N, K] calibrated, cluster [N] -> index of a classifier [N]. Source: the algorithm as
    the paper's reviews describe it; no code is public.
    """
    total = torch.zeros(len(prob), int(cluster.max()) + 1)
    total.index_add_(1, cluster, prob.max(2).values)
    return total.argmax(0)[cluster]


def regret(correct, rule_correct):
    """Accuracy of the best of M classifiers on a mix minus the rule's; [M, N] and [N], 0 or 1."""
    return (correct.double().mean(1).max() - rule_correct.double().mean()).item()


def world(dataset, agreement, seed, kind):
    """Source training and validation at `agreement`, and {mix: Split}; sentences or composites."""
    g = generator(seed, "cosmos", dataset, agreement)
    if dataset == "images":
        train, validation, test = data.waterdigits(agreement, seed, kind)
        size = len(validation.y) * 4 // 9
        rows = data.draw_mix(validation.y, validation.a, (agreement, agreement), size, g)
        validation = data.Split(*[t[rows] for t in validation])
        size = len(test.y) * 4 // 9
    else:
        x, valence, source = data.sentences(kind)
        keep = ((valence.abs() > 0.4) & (source < 2)).nonzero().flatten()
        pool = data.Split(x[keep], (valence[keep] > 0).long(), source[keep])
        size = len(keep) // 11
        parts = []
        for n in (2 * size, size // 2):  # training, validation; what is left is for the tests
            rows = data.draw_mix(pool.y, pool.a, (agreement, agreement), n, g)
            parts.append(data.Split(*[t[rows] for t in pool]))
            left = torch.ones(len(pool.y), dtype=torch.bool)
            left[rows] = False
            pool = data.Split(*[t[left] for t in pool])
        train, validation, test = *parts, pool
    mixes = {}
    for name, agreements in MIXES.items():
        rows = data.draw_mix(test.y, test.a, agreements, size, g)
        mixes[name] = data.Split(*[t[rows] for t in test])
    return train, validation, mixes


def classifier(dataset, train, balanced, setting, seed):
    """ERM on the source or, balanced, with equal weight of the four groups: x -> logits [N, 2]."""
    weight = common.balanced(train.group) if balanced else torch.ones(len(train.y))
    if dataset == "text":
        theta = common.logistic(train.x, train.y, setting, weight)
        return lambda x: F.pad(common.affine(x, theta).float().unsqueeze(1), (1, 0))
    net = common.seeded(seed, common.SmallCNN)
    return common.fit(net, train.x, train.y, setting, seed, weight)


def cluster_inputs(x):
    """Embeddings as they are; images as 8 principal components of the batch."""
    if x.dim() == 2:
        return x
    x = x.flatten(1) - x.flatten(1).mean(0)
    return x @ torch.linalg.eigh(x.T @ x)[1][:, -8:]


@torch.no_grad()
def run(dataset, agreement, seed, settings, kind):
    """Regret of every rule on every mix, and s / c, the shortcut's strength over the core's."""
    train, validation, mixes = world(dataset, agreement, seed, kind)
    with torch.enable_grad():
        models = [classifier(dataset, train, b, s, seed) for b, s in zip((False, True), settings)]
    temperatures = [common.temperature(m(validation.x), validation.y) for m in models]
    z = models[1](validation.x) / temperatures[1]
    core = (z[:, 1] - z[:, 0]).abs().median().item()
    out = {"s / c": math.log(agreement / (1 - agreement)) / core}
    for name, mix in mixes.items():
        prob = torch.stack([(m(mix.x) / t).softmax(1) for m, t in zip(models, temperatures)])
        correct = prob.argmax(2) == mix.y
        rules = {"shortcut": correct[0], "invariant": correct[1], "oracle": correct.any(0)}
        for w in WEIGHTS:
            rules[f"average {w}"] = ((1 - w) * prob[0] + w * prob[1]).argmax(1) == mix.y
        inputs = cluster_inputs(mix.x)
        for k in CLUSTERS:
            chosen = select(prob, kmeans(inputs, k, seed))
            rules[f"CosMoS k={k}"] = correct[chosen, torch.arange(len(mix.y))]
        out[name] = {rule: regret(correct, right) for rule, right in rules.items()}
    return out


def tune(dataset, cfg):
    """Settings on the tuning seed at agreement 0.8 -> [shortcut's, invariant's], rules, scores."""
    seed = common.TUNING_SEED
    train, validation, _ = world(dataset, 0.8, seed, cfg.data)

    def score(arm, setting):
        logits = classifier(dataset, train, arm == "invariant", setting, seed)(validation.x)
        if arm == "invariant":
            return common.worst_group(logits, validation.y, validation.group)
        return (logits.argmax(1) == validation.y).double().mean().item()

    grids = dict.fromkeys(("shortcut", "invariant"), GRIDS[dataset])
    best, scores = common.tune(grids, score, cfg.smoke)
    found = run(dataset, 0.8, seed, list(best.values()), cfg.data)
    grids = {"average": [f"average {w}" for w in WEIGHTS],
             "CosMoS": [f"CosMoS k={k}" for k in CLUSTERS]}
    rules, more = common.tune(grids, lambda _, r: -sum(found[m][r] for m in MIXES) / len(MIXES))
    return list(best.values()), rules, scores | more


def report(runs, chosen, command):
    """runs {(dataset, agreement): [run of a seed]} -> (tables, claims, draw)."""
    columns = {f"{d} {a}": (d, a) for d, a in runs}
    rules = [*next(iter(runs.values()))[0]["0.5"]]

    def average(rule, column):
        rule = chosen[columns[column][0]].get(rule, rule)
        return [sum(r[m][rule] for m in FIVE) / len(FIVE) for r in runs[columns[column]]]

    def worst(rule, column):
        return [max(r[m][rule] for m in FIVE) for r in runs[columns[column]]]

    def two(rule, column):
        return [r["two in one"][rule] for r in runs[columns[column]]]

    ratio = {c: common.mean_sd(r["s / c"] for r in runs[k])[0] for c, k in columns.items()}
    tables = ["Log-odds of the shortcut over the core's (above 2 it must lose):\n\n"
              + common.markdown(["", *columns], [["s / c", *(f"{r:.1f}" for r in ratio.values())]])]
    for title, measure in (("Average regret over five mixes", average), ("Worst regret", worst),
                           ("Regret on the batch of two populations", two)):
        tables.append(common.matrix(title, rules, columns, measure))
    rivals = ("shortcut", "invariant", "average")
    tables.append(common.leads("Average regret", "CosMoS", rivals, columns, average))

    def better(c):
        return all(common.lead(average(r, c), average("CosMoS", c))[2] for r in rivals)

    def cells(c):
        return common.cells(average, (*rivals, "CosMoS"), c)

    won = [c for c in columns if better(c)]
    lost = common.ahead(average, "CosMoS", "invariant", columns)
    claims = [dict(
        paper="2306.11120", command=command, holds=common.verdict(map(better, columns)),
        claim="Selecting the most confident classifier per cluster has 2 to 5% lower average "
              "regret than the robust model and other aggregations, without target labels.",
        short="The most confident classifier per cluster has least regret",
        measured=f"{len(next(iter(runs.values())))} seeds, average regret over five mixes. "
                 + "; ".join(f"{c}: {cells(c)}" for c in columns if c.endswith(("0.7", "0.9")))
                 + f". Clearly below all three at: {', '.join(won) or 'none'}.",
        fails_when="Clearly above the invariant model alone at: "
                   + (", ".join(f"{c} (s/c {ratio[c]:.1f})" for c in lost) or "none")
                   + ". Confidence must mislead above s/c = 2; the classifier that was trained "
                   "leans on its shortcut more than those log-odds, so it does so earlier.")]
    return "\n\n".join(tables), claims, lambda plt: draw(plt, runs, ratio, average)


def draw(plt, runs, ratio, average):
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, dataset in zip(axes, GRIDS):
        x = [a for d, a in runs if d == dataset]
        columns = [f"{dataset} {a}" for a in x]
        common.lines(axis, x, ("shortcut", "invariant", "average", "CosMoS"), columns, average)
        top = axis.secondary_xaxis("top")
        top.set_xticks(x, [f"{ratio[c]:.1f}" for c in columns])
        top.set_xlabel(f"{dataset}: log-odds of the shortcut over the core's (s / c)")
        axis.set(xlabel="agreement of attribute and label in the source", xticks=x,
                 ylabel="average regret over five mixes", ylim=(-0.01, None))
        axis.legend(frameon=False, fontsize=8)
    return fig, axes


def main(argv=None):
    cfg = parse(common.Config, argv, __doc__)
    sources = SOURCES[1::2] if cfg.smoke else SOURCES
    runs, tuned, chosen = {}, {}, {}
    for dataset in GRIDS:
        settings, chosen[dataset], scores = tune(dataset, cfg)
        tuned[dataset] = dict(settings=settings, chosen=chosen[dataset], scores=scores)
        print(dataset, settings, chosen[dataset], flush=True)
        for source in sources:
            seeds = range(cfg.seeds)
            runs[dataset, source] = [run(dataset, source, s, settings, cfg.data) for s in seeds]
    text, claims, figure = report(runs, chosen, common.command("cosmos", argv))
    content = dict(claims=claims, tuned=tuned, rows={f"{d} {a}": r for (d, a), r in runs.items()})
    common.finish_run(cfg, "cosmos", argv, text, content, figure)


if __name__ == "__main__":
    script(main)
