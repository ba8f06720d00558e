"""Claims, rows and figures of experiments/memorization.py, from the numbers of its result files."""


import numpy as np

from experiments.toolkit import (
    finish,
    margin,
    mean_sd,
    pyplot,
    spread,
    together,
    verdict,
)
from infra.runs import mean

ENOUGH = 50  # examples of a group, for the comparison of two groups within a run
MATTERS = 0.1  # accuracy lost to a changed first line: what counts as not surviving it


def claim(results, says, short, measured, holds, fails_when=""):
    return dict(
        paper="2411.07681",
        claim=says,
        short=short,
        measured=measured,
        holds=holds,
        command=results["command"],
        fails_when=fails_when,
    )


def predicts(r):
    """The rule for "pre-memorization accuracy predicts test accuracy": with a threshold from
    other runs, R^2 of at least 0.8 and above that of training accuracy; partly, if only above."""
    better = r["held_out"]["median"] > r["r2_train_accuracy"]
    return True if better and r["held_out"]["median"] >= 0.8 else "partly" if better else False


def published_claims(results):
    """Of published.json."""
    claims = []
    for name in ("gsm8k", "math"):
        r = results[name]
        good = [np.log(float(t)) for t, r2 in r["sensitivity"].items() if r2 >= 0.8]
        claims.append(
            claim(
                results,
                f"pre-memorization accuracy predicts test accuracy (R^2 above 0.9; {name}, "
                "Llama-3-8B)",
                f"Pre-memorization accuracy predicts test accuracy: their {name} runs",
                f"their arrays: R^2 {r['r2']:.3f} ({r['checkpoints']} checkpoints); threshold "
                "from half of the runs, scored on the other: median "
                f"{r['held_out']['median']:.3f} (10th percentile {r['held_out']['p10']:.3f}); "
                f"training accuracy {r['r2_train_accuracy']:.1f}",
                predicts(r),
                f"the threshold's logarithm is not within {min(good):.1f} to {max(good):.1f} "
                "(R^2 below 0.8)",
            )
        )
    return claims


def runs_claims(results):
    """Of runs.json."""
    r = results
    if None in (r["r2"], r["held_out"]["median"], r["r2_train_accuracy"]):
        return []  # nothing varies: a run of a few steps
    return [
        claim(
            results,
            "pre-memorization accuracy predicts test accuracy, training accuracy does not",
            "Pre-memorization accuracy predicts test accuracy: our runs",
            f"{r['runs']} runs of our own: R^2 {r['r2']:.3f}, held out "
            f"{r['held_out']['median']:.3f} (10th percentile {r['held_out']['p10']:.3f}); "
            f"training accuracy {r['r2_train_accuracy']:.2f}",
            predicts(r),
        )
    ]


def robustness_claims(results):
    """Of robustness.json. What the change costs examples of low minus what it costs those of
    high pre-memorization accuracy, within each run; the 95% interval over the runs, or of one run
    over its examples, decides which side of MATTERS it is on."""
    rows = results["rows"]
    if not rows:
        return []
    extra = [r["low"]["cost"] - r["high"]["cost"] for r in rows]
    if len(rows) > 1:
        error = spread(extra) / len(extra) ** 0.5
        half = margin(extra)
    else:
        error = (rows[0]["low"]["error"] ** 2 + rows[0]["high"]["error"] ** 2) ** 0.5
        half = 2 * error
    above = mean(extra) - half > MATTERS
    below = mean(extra) + half < MATTERS

    def show(k):
        return (
            f"{mean(r[k]['changed'] for r in rows):.3f} (own letters: "
            f"{mean(r[k]['unchanged'] for r in rows):.3f}; {sum(r[k]['examples'] for r in rows)} "
            "examples)"
        )

    return [
        claim(
            results,
            "examples that were learned before they were memorised survive a changed prompt, "
            "the others do not",
            "What is learned before it is memorised survives a changed prompt",
            f"within {'one run' if len(rows) == 1 else f'each of {len(rows)} runs'}, still right "
            f"from a first line in other letters: high pre-memorization accuracy {show('high')}, "
            f"low {show('low')}; the change costs low ones {mean(extra):+.3f} more (standard "
            f"error over {'examples' if len(rows) == 1 else 'runs'} {error:.3f}; {MATTERS} would "
            "count)",
            True if above else False if below else "open",
            "only where runs are pooled do the two groups differ (runs.json): those that recite "
            "have most of the low examples and lose most, which is a difference between runs "
            "and not between examples",
        )
    ]


def curation_claims(results):
    """Of curation.json. Curated against iid data at equal size, differences paired by seed."""
    more = results["test_accuracy"]
    sizes = [n for n in more if "iid" in more[n]]
    gains = {
        by: [np.subtract(more[n][by], more[n]["iid"]).tolist() for n in sizes]
        for by in ("premem", "nll", "accuracy")
    }

    def show(d):
        return ", ".join(mean_sd(x, signed=True) for x in d)

    best = all(
        mean(gains["premem"][i]) >= mean(gains[by][i]) for by in gains for i in range(len(sizes))
    )
    return [
        claim(
            results,
            "problems like those of low pre-memorization accuracy are worth 1.5 to 2 times iid "
            "ones",
            "Problems of low pre-memorization accuracy are worth 1.5 to 2 others",
            f"test accuracy minus iid at {', '.join(sizes)} examples: {show(gains['premem'])}; "
            f"chosen by nll {show(gains['nll'])}, by training accuracy {show(gains['accuracy'])} "
            f"({len(gains['premem'][0])} seeds, sd)",
            together(verdict(x) for x in gains["premem"]),
            "" if best else "another measure of difficulty does as well or better",
        )
    ]


def scatter(path, panels, title, more=None):
    """A panel for each {name: result of judge()}: what training shows against test accuracy.
    more: curation()'s, as one more."""
    if (plt := pyplot()) is None:
        return
    fig, axes = plt.subplots(
        1,
        len(panels) + bool(more),
        figsize=(4.8 * (len(panels) + bool(more)), 4.2),
        squeeze=False,
        constrained_layout=True,
    )
    for axis, (name, r) in zip(axes[0], panels.items()):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        axis.scatter(
            r["train_accuracy"],
            r["test"],
            s=14,
            color="#E69F00",
            marker="x",
            label=f"train accuracy, R² {r['r2_train_accuracy']:.2f}",
        )
        axis.scatter(
            r["premem"],
            r["test"],
            s=14,
            color="#0072B2",
            label=f"pre-memorization accuracy, R² {r['r2']:.2f} "
            f"(held out {r['held_out']['median']:.2f})",
        )
        axis.set(
            xlabel="measured on the training set",
            ylabel="test accuracy",
            xlim=(0, 1),
            ylim=(0, 1),
            title=name,
        )
        axis.legend(fontsize=7, loc="upper left")
    if more:
        curated(axes[0][-1], more)
    fig.suptitle(title, fontsize=10)
    finish(plt, fig, axes[0], path)


def curated(axis, more):
    """Test accuracy by how the examples were chosen: a dot a seed, a bar their mean; the seeds'
    start is the first column."""
    columns = [
        (by, n, a)
        for n, arms in sorted(more.items(), key=lambda x: int(x[0]))
        for by, a in arms.items()
    ]
    for x, (by, _, a) in enumerate(columns):
        colour = {
            "none": "0.5",
            "iid": "#000000",
            "premem": "#0072B2",
            "nll": "#D55E00",
            "accuracy": "#E69F00",
        }[by]
        axis.scatter([x] * len(a), a, s=16, color=colour, alpha=0.6)
        axis.hlines(np.mean(a), x - 0.3, x + 0.3, color=colour, linewidth=2)
    axis.set(
        xticks=range(len(columns)),
        ylabel="test accuracy",
        title="data chosen by a measure of difficulty",
    )
    names = dict(none="start", premem="pre-mem.", accuracy="train acc.")
    axis.set_xticklabels([f"{names.get(by, by)}\n{n}" for by, n, _ in columns], fontsize=8)


def row(name, r):
    return (
        f"| {name} | {r['runs']} | {r['checkpoints']} | {r['threshold']:.3f} | {r['r2']:.3f} | "
        f"{r['held_out']['median']:.3f} ({r['held_out']['p10']:.3f}) | "
        f"{r['r2_train_accuracy']:.2f} |"
    )


HEAD = (
    "| data | runs | checkpoints | threshold (nats) | R² | R², threshold from the other half: "
    "median (10th percentile) | R² of train accuracy |\n|---|---|---|---|---|---|---|\n"
)
