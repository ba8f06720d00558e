"""Numbers, table, claims and figure of experiments/pav_search.py, which writes them."""

import itertools
import math

import numpy as np

from experiments.toolkit import COLOURS as REPORT_COLOURS
from experiments.toolkit import finish, mean_sd, pyplot, together, verdict, with_sd
from infra.runs import mean

NAMES = {
    "orm": "best-of-N, ORM",
    "q_as_orm": "best-of-N, Q as ORM",
    "majority": "majority vote",
    "pass": "pass@N (ceiling)",
    "beam_q": "beam, Q",
    "beam_pav": "beam, Q + alpha A",
}
COLOURS = {
    "orm": REPORT_COLOURS["orm"],
    "q_as_orm": "#56B4E9",
    "majority": "#CC79A7",
    "pass": "#7f7f7f",
    "beam_q": REPORT_COLOURS["q"],
    "beam_pav": REPORT_COLOURS["pav"],
}
BEAMS = ("beam_q", "beam_pav")
# correlation of Q's advantage with fresh rollouts from which on a task's search decides a claim
LEARNED = 0.3
TEXT = dict(  # claim, its line in README's index, where it fails
    orm=(
        "A beam ranked by Q + alpha A is 1.5 to 5 times as compute-efficient as best-of-N with "
        "an ORM, and over 8% better.",
        "A beam by Q + alpha A beats best-of-N by ORM",
        "",
    ),
    q=(
        "It beats a beam ranked by Q alone, by up to 8 times the compute.",
        "It beats a beam ranked by Q alone, too",
        "N=3: one parent a step, where any alpha gives the same ranking",
    ),
    k=(
        "The best prover is Best-of-K with K=4 of 1 to 32: neither the policy itself nor a "
        "strong one.",
        "The best prover for search is Best-of-4 of the policy",
        "one tuning seed, and the best single setting of its grid is not what is judged: "
        "differences within the two standard errors given are noise",
    ),
    rank=(
        "Q re-ranking whole samples is 4% better than the ORM at N=128.",
        "Whole samples: re-ranking by Q beats the ORM",
        "the ORM is trained for the end of a solution alone, Q on equally many tokens for every "
        "prefix; on planted the outcome is a sub-string, which the ORM reads nearly perfectly: "
        "there is nothing left to regularise",
    ),
)


def tokens_to_reach(tokens, accuracy, target):
    """(tokens at which a curve first reaches target, is that only an upper bound?); linear in
    log(tokens) between points. The bound: the first point is there already. (None, False):
    never."""
    if accuracy[0] >= target:
        return tokens[0], True
    for (a, b), (x, y) in zip(
        itertools.pairwise(accuracy), itertools.pairwise(map(math.log, tokens))
    ):
        if b >= target:
            return math.exp(x + (y - x) * (target - a) / (b - a)), False
    return None, False


def summarise(rows):
    """Curves of the seeds -> {arm: {n, tokens, scored, accuracy, sd, per_seed, gain, gain_sd,
    efficiency}}; gain: accuracy minus orm at each N, paired; efficiency: for each N (tokens of
    best-of-N with the ORM over those at which the arm's mean curve reaches its accuracy, word);
    word: "", "at least", "never", or "no target" where the ORM does no better than with a
    smaller N. rows: a dict {arm: [{n, accuracy, ...}]} a seed."""
    out = {}
    for arm in [a for a in NAMES if a in rows[0]]:
        grid = np.array([[p["accuracy"] for p in r[arm]] for r in rows])  # (seeds, sizes)
        gain = grid - np.array([[p["accuracy"] for p in r["orm"]] for r in rows])

        def column(key):
            return [mean(r[arm][i][key] for r in rows) for i in range(grid.shape[1])]  # noqa: B023

        out[arm] = dict(
            n=[p["n"] for p in rows[0][arm]],
            tokens=column("tokens"),
            scored=column("scored"),
            accuracy=grid.mean(0).tolist(),
            sd=grid.std(0, ddof=1).tolist(),
            per_seed=grid.tolist(),
            gain=gain.mean(0).tolist(),
            gain_sd=gain.std(0, ddof=1).tolist(),
        )
    target = out["orm"]["accuracy"]
    for arm in out.values():
        arm["efficiency"] = []
        for i, cost in enumerate(out["orm"]["tokens"]):
            tokens, bound = tokens_to_reach(arm["tokens"], arm["accuracy"], target[i])
            word = (
                "no target"
                if target[i] <= max(target[:i], default=-1)
                else "at least"
                if bound
                else ""
                if tokens
                else "never"
            )
            arm["efficiency"].append(
                (None if word in ("no target", "never") else cost / tokens, word)
            )
    return out


def times(factor, word):
    return word if factor is None else f"{word} {factor:.1f}x".strip()


def grid_table(head, sizes, rows):
    return [
        f"| {head} | " + " | ".join(f"N={n}" for n in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
        *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows),
    ]


def table(result, cfg):
    """Markdown: accuracy and efficiency by arm and N, the grid of alpha and K, the other
    regimes."""
    arms = result["arms"]

    def by_arm(sizes, cells):
        return grid_table("arm", sizes, [(NAMES[name], row) for name, row in cells.items()])

    accuracy = {n: [with_sd(*c) for c in zip(a["accuracy"], a["sd"])] for n, a in arms.items()}
    lines = by_arm(cfg.sizes, accuracy)
    factors = {n: [times(*e) for e in arms[n]["efficiency"]] for n in arms if n in BEAMS}
    lines += [
        "",
        "Tokens of best-of-N with the ORM over the tokens with which a beam is as accurate:",
        "",
        *by_arm(cfg.sizes, factors),
    ]
    beam = arms["beam_pav"]
    lines += [
        "",
        f"At N={cfg.sizes[-1]} a beam generates {beam['tokens'][-1]:.0f} tokens and its verifier "
        f"reads {beam['scored'][-1]:.0f}; best-of-N {arms['orm']['tokens'][-1]:.0f} and "
        f"{arms['orm']['scored'][-1]:.0f}.",
        "",
        *tuning_table(result["tuning"], cfg),
    ]
    titles = dict(
        weak=f"Verifiers from {cfg.weak} times fewer rollouts", cold=f"Temperature {cfg.cold:g}"
    )
    for regime, arms in result["regimes"].items():
        cells = {}
        for name, a in arms.items():
            gains = [with_sd(g, d, signed=True) for g, d in zip(a["gain"], a["gain_sd"])]
            levels = [with_sd(*c) for c in zip(a["accuracy"], a["sd"])]
            cells[name] = [f"{level}; {gain}" for level, gain in zip(levels, gains)]
        title = f"{titles[regime]} (and minus the ORM, paired):"
        lines += ["", title, "", *by_arm(cfg.regime_sizes, cells)]
    return "\n".join(lines)


def tuning_table(tuning, cfg):
    """The grid of alpha and K on the tuning seed."""
    tried = {(s["alpha"], s["k"]): a for a, s in tuning["grid"]}
    lines = [
        f"Tuning seed, mean accuracy of N = {' and '.join(map(str, cfg.tuning_sizes))}; alpha 0: "
        f"{tuning['alpha_0'][0][0]:.3f}",
        "",
        "| alpha | " + " | ".join(f"K={k}" for k in cfg.prover_ks) + " |",
        "|---" * (len(cfg.prover_ks) + 1) + "|",
    ]
    for a in cfg.alphas:
        cells = " | ".join(f"{tried[a, k]:.3f}" for k in cfg.prover_ks)
        lines.append(f"| {a:g} | {cells} |")
    return lines


# --------------------------------------------------------------------------------------------------
# What the paper says, and what is seen here. Every "holds" follows from the numbers by a rule that
# stands here.


def difference(result, a, b, i):
    """Paired differences of accuracy between two arms at sizes[i], a seed each."""
    return [
        x[i] - y[i] for x, y in zip(result["arms"][a]["per_seed"], result["arms"][b]["per_seed"])
    ]


def plus(gains):
    return mean_sd(gains, signed=True)


def learned(result):
    """Did Q^pi learn to tell steps apart? The correlation of its advantage with that of fresh
    rollouts, mean over seeds."""
    return mean(v["q_corr_advantage"] or 0.0 for v in result["verifiers"]["main"]) >= LEARNED


def claims_of(results):
    """Rules. orm: at every N from 6 on the PAV beam needs 1.5 times fewer tokens than best-of-N
    with the ORM and is more accurate at equal ones (some N: partly). q: its gain over alpha 0,
    mean over these N. k: the mean over alpha of the best K minus the better of the smallest and
    the largest K; one seed, so over searches. rank: the gain at the largest N. A task whose
    verifier learned nothing about steps is reported and does not decide."""
    cfg = results["settings"]
    command = results["command"]
    tasks = results["tasks"]
    decisive = {t: r for t, r in tasks.items() if learned(r)} or tasks
    apart = [
        f"{t} does not decide: no verifier learned to check a step there"
        for t in tasks
        if t not in decisive
    ]
    parts = dict(orm=orm_part, q=q_part, k=k_part, rank=rank_part)
    only = f"{next(iter(tasks))}: " if len(tasks) == 1 else ""
    claims = []
    for key, (says, short, fails) in TEXT.items():
        each = {t: parts[key](t, r, cfg) for t, r in tasks.items()}
        remarks = [fails] if fails else orm_failures(tasks, cfg)
        claims.append(
            dict(
                paper="2410.08146",
                claim=says,
                short=only + (short[0].lower() + short[1:] if only else short),
                command=command,
                measured="; ".join(words for words, _ in each.values()),
                holds=together(v for t in decisive for v in each[t][1]),
                fails_when="; ".join([*remarks, *apart]),
            )
        )
    return claims


def orm_part(task, r, cfg):
    """-> what was measured, a verdict for each N from 6 on."""
    beam = r["arms"]["beam_pav"]
    sizes = cfg["sizes"]
    targets = [i for i, n in enumerate(sizes) if n > 3]
    cheap = [(beam["efficiency"][i][0] or 0) >= 1.5 for i in targets]
    better = [verdict(difference(r, "beam_pav", "orm", i)) for i in targets]
    verdicts = [v if c or v is not True else False for c, v in zip(cheap, better)]
    mid = sizes.index(cfg["regime_sizes"][-1])
    listed = [i for i in targets if i in (mid - 1, mid, mid + 1, len(sizes) - 1)]
    words = f"{task}: " + ", ".join(
        f"N={sizes[i]} {times(*beam['efficiency'][i])} and "
        f"{plus(difference(r, 'beam_pav', 'orm', i))}"
        for i in listed
    )
    return words, verdicts


def orm_failures(tasks, cfg):
    """Where the beam was not shown to be above best-of-N with the ORM, in words."""
    remarks = []
    where = dict(
        weak=f"verifiers from {cfg['weak']} times fewer rollouts",
        cold=f"temperature {cfg['cold']:g}",
    )
    last = len(cfg["sizes"]) - 1
    mid = cfg["sizes"].index(cfg["regime_sizes"][-1])
    for task, r in tasks.items():
        beam = r["arms"]["beam_pav"]["accuracy"]
        orm = r["arms"]["orm"]["accuracy"]
        for k, a in r["regimes"].items():
            gains = np.subtract(a["beam_pav"]["per_seed"], a["orm"]["per_seed"])[:, -1].tolist()
            if verdict(gains) is not True:
                remarks.append(f"{where[k]} ({task}): {plus(gains)} at N={cfg['regime_sizes'][-1]}")
        if orm[last] < mean(r["one_sample"]):
            remarks.append(
                f"{task}: one sample is right in {mean(r['one_sample']):.3f}, at "
                f"N={cfg['sizes'][last]} the ORM's pick in {orm[last]:.3f}, the beam's in "
                f"{beam[last]:.3f}"
            )
        if "majority" in r["arms"]:
            remarks.append(
                f"a vote reaches {r['arms']['majority']['accuracy'][mid]:.3f} on {task} at "
                f"N={cfg['sizes'][mid]}, the beam {beam[mid]:.3f}"
            )
    return remarks or ["Nowhere here."]


def q_part(task, r, cfg):
    targets = [i for i, n in enumerate(cfg["sizes"]) if n > 3]
    gains = [difference(r, "beam_pav", "beam_q", i) for i in targets]
    whole = np.mean(gains, 0).tolist()
    return (
        f"{task}: {plus(whole)} over all N from 6 on, {plus(gains[-1])} at N={cfg['sizes'][-1]}",
        [verdict(whole)],
    )


def k_part(task, r, cfg):
    ks = {k: mean(a for a, s in r["tuning"]["grid"] if s["k"] == k) for k in cfg["prover_ks"]}
    smallest = cfg["prover_ks"][0]
    largest = cfg["prover_ks"][-1]
    best = max(ks, key=ks.get)
    gain = ks[best] - max(ks[smallest], ks[largest])
    searches = cfg["problems"] * len(cfg["tuning_sizes"]) * len(cfg["alphas"])
    two_errors = 2 * (2 * ks[best] * (1 - ks[best]) / searches) ** 0.5
    words = (
        f"{task}: best K={best}, mean over alpha {ks[best]:.3f}, K={smallest} "
        f"{ks[smallest]:.3f}, K={largest} {ks[largest]:.3f}, alpha 0 "
        f"{r['tuning']['alpha_0'][0][0]:.3f} (two standard errors: {two_errors:.3f})"
    )
    return words, [True if gain > two_errors else "open"]


def rank_part(task, r, cfg):
    gains = difference(r, "q_as_orm", "orm", len(cfg["sizes"]) - 1)
    return f"{task}: {plus(gains)} at N={cfg['sizes'][-1]}", [verdict(gains)]


def logarithmic(axis, ticks, labels):
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, labels)
    axis.minorticks_off()


def accuracy_panel(axis, arms, title):
    """Accuracy against tokens, band: sd over seeds."""
    for name, a in arms.items():
        style = dict(color=COLOURS[name], label=NAMES[name], linewidth=2, marker="o", markersize=4)
        line = ":" if name == "pass" else "-"
        axis.plot(a["tokens"], a["accuracy"], linestyle=line, **style)
        middle = np.array(a["accuracy"])
        sd = np.array(a["sd"])
        band = dict(color=COLOURS[name], alpha=0.12, linewidth=0)
        axis.fill_between(a["tokens"], middle - sd, middle + sd, **band)
    ticks = arms["orm"]["tokens"]
    logarithmic(axis, ticks, [f"{t:.0f}" for t in ticks])
    axis.set(xlabel="tokens generated a problem", ylabel="accuracy", ylim=(0, 1.03), title=title)
    axis.legend(frameon=False, fontsize=8)


def tuning_panel(axis, tuning, cfg, colours):
    """The grid of alpha and K."""
    tried = {(s["alpha"], s["k"]): x for x, s in tuning["grid"]}
    for j, k in enumerate(cfg.prover_ks):
        shade = colours(0.9 * j / max(1, len(cfg.prover_ks) - 1))
        y = [tuning["alpha_0"][0][0], *(tried[a, k] for a in cfg.alphas)]
        axis.plot([0, *cfg.alphas], y, color=shade, marker="o", markersize=4, label=f"K={k}")
    axis.set(
        xlabel="alpha",
        ylabel=f"accuracy, mean of N={' and '.join(map(str, cfg.tuning_sizes))}",
        title="Tuning seed: weight of progress and prover",
    )
    axis.legend(frameon=False, fontsize=8)


def gain_panel(axis, result, cfg):
    """Gain over the ORM in the main setting (lines), with weak verifiers (diamonds) and at a low
    temperature (squares)."""
    for name in ("q_as_orm", *BEAMS):
        a = result["arms"][name]
        style = dict(color=COLOURS[name], marker="o", markersize=4, capsize=3)
        axis.errorbar(a["n"], a["gain"], a["gain_sd"], **style)
        for regime, arms in result["regimes"].items():
            hollow = dict(markersize=6, markerfacecolor="white", linestyle="", color=COLOURS[name])
            marker = dict(weak="D", cold="s")[regime]
            axis.plot(arms[name]["n"], arms[name]["gain"], marker=marker, **hollow)
    axis.axhline(0, color="#aaaaaa", linewidth=1)
    logarithmic(axis, cfg.sizes, cfg.sizes)
    axis.set(
        xlabel=f"N (diamonds: weak verifiers; squares: temperature {cfg.cold:g})",
        ylabel="accuracy minus best-of-N with the ORM",
        title="Gain, paired by seed (bars: sd)",
    )


def figure(results, cfg, path):
    """A row a task."""
    if (plt := pyplot()) is None:
        return
    size = (14.5, 4.2 * len(results))
    fig, grid = plt.subplots(len(results), 3, figsize=size, constrained_layout=True, squeeze=False)
    for (task, r), (left, middle, right) in zip(results.items(), grid):
        accuracy_panel(left, r["arms"], f"{task} (band: sd of {cfg.seeds} seeds)")
        tuning_panel(middle, r["tuning"], cfg, plt.cm.viridis)
        gain_panel(right, r, cfg)
    finish(plt, fig, grid.flat, path)
