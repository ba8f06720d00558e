"""Numbers, table and figure of experiments/openweights.py, from the files that its stages leave."""

import json

import torch

from experiments.toolkit import (
    COLOURS,
    evaluations,
    expected_best,
    finish,
    pyplot,
    vote_accuracy,
)
from infra.runs import mean
from report.judge import auc
from report.statistics import Z, interval

BEAMS = dict(beam_q=0.0, beam_pav=0.5)  # name -> alpha; 0.5 is the paper's for small models
NAMES = dict(
    base="base model, chat format, greedy",
    sft="SFT",
    rft="RFT",
    rl_outcome="RL, outcome only",
    rl_pav="RL, PAV",
)


def auc_within(score, correct):
    """Mean over the problems that have right and wrong samples of the AUC among them: what
    best-of-n lives on. An AUC over all samples can be had by knowing which problems are hard.
    score, correct [P,N]."""
    each = [auc(s, c > 0.5) for s, c in zip(score, correct)]
    return mean(a for a in each if a == a)


def voted(answers, correct, n):
    """answers [P][N], correct [P,N] -> accuracy of the majority vote of n, [P]."""
    return torch.tensor([vote_accuracy(a, right, n) for a, right in zip(answers, correct.tolist())])


def paired(a, b):
    """Two lists of shares a problem -> (mean of a - b, low, high), 95%. The problems are the
    same: their difficulty drops out."""
    d = [x - y for x, y in zip(a, b)]
    half = (
        Z * (sum((x - mean(d)) ** 2 for x in d) / (len(d) - 1) / len(d)) ** 0.5
        if len(d) > 1
        else float("nan")
    )
    return mean(d), mean(d) - half, mean(d) + half


def shares(path, n):
    """An evaluation's or a search's file -> right share of each problem, and its rows."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [mean(r["reward"] for r in rows[i : i + n]) for i in range(0, len(rows), n)], rows


def row(right, each=1):
    """Right share of each problem, of `each` independent samples -> a row of the results."""
    return dict(zip(("accuracy", "low", "high"), interval(right, each)), problems=len(right))


def supervised_numbers(size, root, rft):
    """{base, sft, rft: row}; rft: right share of each problem."""
    base, _ = shares(root / "test" / "base.jsonl", 1)
    sft, _ = shares(root / "test" / "sft.jsonl", size["n"])
    return dict(
        base=row(base, 1),
        sft=row(sft, size["n"]) | dict(minus_rft=paired(sft, rft)),
        rft=row(rft, size["search"]["n"]),
    )


def rl_numbers(size, root, arm, rft):
    """-> row of an RL arm, its right share of each problem over all seeds, its curves."""
    seeds = size["rl_seeds"]
    each = [shares(root / "test" / f"{arm}_{s}.jsonl", size["n"])[0] for s in seeds]
    right = [mean(x) for x in zip(*each)]
    curves = []
    for s in seeds:
        points = evaluations(root / f"{arm}_{s}")
        curves.append([(r["num_tokens"], r["eval/accuracy"]) for r in points])
    verifier = json.loads((root / "q" / "summary.json").read_text())
    numbers = dict(
        row(right, size["n"] * len(each)),
        per_seed=[mean(e) for e in each],
        sampled_tokens=[c[-1][0] for c in curves],
        pass_at_n=[mean(p > 0 for p in e) for e in each],
        verifier_tokens=verifier["sampled_tokens"] if arm == "rl_pav" else 0,
        minus_rft=paired(right, rft),
    )
    return numbers, right, curves


def rerank_numbers(size, correct, tokens, score, answers):
    """{way of choosing among n samples: a row for each n}"""
    most = size["search"]["n"]
    length = float(tokens.float().mean())

    def rows(way):
        out = []
        for n in [2**i for i in range(20) if 2**i <= most]:
            right = way(n).tolist()
            majority = paired(right, voted(answers, correct, n).tolist())
            cell = dict(n=n, tokens=n * length, minus_majority=majority)
            out.append(row(right, most / n) | cell)
        return out

    search = {}
    for v in score:
        search[f"best-of-n, {v}"] = rows(lambda n, v=v: expected_best(score[v], correct, n))
    search["majority"] = rows(lambda n: voted(answers, correct, n))
    search["pass@n (an oracle)"] = rows(lambda n: expected_best(correct, correct, n))
    return search


def beam_numbers(size, root, rft):
    """The same of the beams that were run."""
    search = {}
    for name, alpha in BEAMS.items():
        path = root / "test" / f"{name}.jsonl"
        if not path.exists():
            continue
        right, rows = shares(path, 1)
        kinds = ("generated", "prefilled", "scored")
        cost = {k: mean(r[f"{k}_tokens"] for r in rows) for k in kinds}
        cell = dict(n=size["search"]["beam"], tokens=cost["generated"], **cost)
        name = "beam, Q" + (f" + {alpha} A" if alpha else "")
        search[name] = [row(right) | cell | dict(minus_one_sample=paired(right, rft))]
    return search


def interval_text(x):
    return f"{x['accuracy']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"


def paired_text(d):
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*d)


def table(r):
    """Markdown of numbers_of's result."""
    lines = [
        "| policy | test problems | accuracy [95%] | minus RFT, paired | seeds | tokens of RL | "
        "and of the verifier |",
        "|---|---|---|---|---|---|---|",
        *(policy_line(name, p) for name, p in r["policies"].items()),
        "",
        f"RL, PAV minus outcome only, paired by problem: {paired_text(r['pav_minus_outcome'])}",
        "",
        "| search with the RFT policy | n | tokens a problem | accuracy [95%] | minus majority, "
        "paired | minus one sample, paired |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in r["search"].items():
        for x in rows:
            keys = ("minus_majority", "minus_one_sample")
            minus = " | ".join(paired_text(x[k]) if k in x else "" for k in keys)
            cells = f"{name} | {x['n']} | {x['tokens']:.0f} | {interval_text(x)}"
            lines.append(f"| {cells} | {minus} |")
    lines += [
        "",
        "| verifier | labels | right among them | AUC, end | AUC, any step | within a test "
        "problem | Brier (constant) | corr. of advantage |",
        "|---|---|---|---|---|---|---|---|",
        *(verifier_line(v, r["summaries"][v]) for v in ("orm", "q")),
    ]
    return "\n".join(lines)


def policy_line(name, p):
    seeds = ", ".join(f"{s:.3f}" for s in p.get("per_seed", []))
    tokens = ["", ""]
    if seeds:
        tokens = [f"{mean(p['sampled_tokens']):.0f}", str(p["verifier_tokens"])]
    minus = paired_text(p["minus_rft"]) if "minus_rft" in p else ""
    cells = [NAMES[name], str(p["problems"]), interval_text(p), minus, seeds, *tokens]
    return f"| {' | '.join(cells)} |"


def verifier_line(name, v):
    keys = ("mean_label", "auc_outcome", "auc", "auc_within_problem")
    cells = [f"{v[k]:.3f}" if v[k] is not None else "" for k in keys]
    brier = ""
    if v["brier"] is not None:
        brier = f"{v['brier']:.3f} ({v['brier_constant']:.3f})"
    corr = ""
    if v["corr_advantage"] is not None:
        corr = f"{v['corr_advantage']:.2f} ({v['judged_steps']} steps)"
    return f"| {' | '.join([name, str(v['labels']), *cells, brier, corr])} |"


def error_bars(middle, low, high):
    return [[a - b for a, b in zip(middle, low)], [b - a for a, b in zip(middle, high)]]


def rl_panel(axis, curves, n):
    """RL, accuracy on val against sampled tokens, a line a seed. n: problems of an evaluation."""
    for arm, runs in curves.items():
        for i, run in enumerate(runs):
            rights = [round(a * n) for _, a in run]
            y, low, high = zip(*(interval([1.0] * k + [0.0] * (n - k)) for k in rights))
            x = [t / 1e3 for t, _ in run]
            style = dict(color=COLOURS[arm[3:]], alpha=0.7, markersize=4, elinewidth=0.8)
            label = None if i else NAMES[arm]
            axis.errorbar(x, y, error_bars(y, low, high), fmt="-o", label=label, **style)
    axis.set(
        xlabel="tokens sampled in RL, thousands",
        ylabel=f"sampled accuracy, val ({n} draws)",
        title="RL from the RFT policy (a line a seed; bars: 95%)",
    )


def search_panel(axis, search):
    """Search, test accuracy against tokens, 95% bars."""
    colours = ("#0072B2", "#009E73", "#7f7f7f", "#cccccc", "#D55E00", "#CC79A7")
    for i, (name, rows) in enumerate(search.items()):
        x = [r["tokens"] * 1.04 ** (i - 2) for r in rows]  # side by side, so that each bar is seen
        y, low, high = ([r[k] for r in rows] for k in ("accuracy", "low", "high"))
        style = dict(color=colours[i], markersize=5, linewidth=1.5, elinewidth=0.8)
        fmt = "-o" if len(rows) > 1 else "D"
        axis.errorbar(x, y, error_bars(y, low, high), fmt=fmt, label=name, **style)
    axis.set_xscale("log")
    ticks = [r["tokens"] for r in search["majority"]]
    axis.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
    axis.minorticks_off()
    axis.set(
        xlabel="tokens generated a problem (logarithmic)",
        ylabel="accuracy, test",
        title="search with the RFT policy (bars: 95%)",
    )


def figure(r, size, path):
    if (plt := pyplot()) is None:
        return
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    rl_panel(left, r["curves"], size["rl"]["eval_problems"])
    search_panel(right, r["search"])
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
    finish(plt, fig, (left, right), path)
