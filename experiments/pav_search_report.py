"""Numbers, table, claims and figure of experiments/pav_search.py, which writes them."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from infra.runs import mean  # noqa: E402
from report.figures import COLOURS as REPORT_COLOURS  # noqa: E402
from report.figures import finish, pyplot, spread  # noqa: E402

NAMES = {"orm": "best-of-N, ORM", "q_as_orm": "best-of-N, Q as ORM", "majority": "majority vote", "pass": "pass@N (ceiling)",
         "beam_q": "beam, Q", "beam_pav": "beam, Q + alpha A"}
COLOURS = {"orm": REPORT_COLOURS["orm"], "q_as_orm": "#56B4E9", "majority": "#CC79A7", "pass": "#7f7f7f",
           "beam_q": REPORT_COLOURS["q"], "beam_pav": REPORT_COLOURS["pav"]}
BEAMS = ("beam_q", "beam_pav")


def tokens_to_reach(tokens, accuracy, target):
    """(tokens at which a curve first reaches target, is that only an upper bound?); linear in log(tokens) between points.
    The bound: the first point is there already. (None, False): never."""
    if accuracy[0] >= target:
        return tokens[0], True
    for (a, b), (x, y) in zip(itertools.pairwise(accuracy), itertools.pairwise(map(math.log, tokens))):
        if b >= target:
            return math.exp(x + (y - x) * (target - a) / (b - a)), False
    return None, False


def verdict(gains, least=0.0):
    """Paired differences of one task, a seed each -> is their mean above `least` by two standard errors?"""
    return mean(gains) - 2 * spread(gains) / math.sqrt(len(gains)) > least


def together(verdicts):
    """Of several tasks -> True, False or "partly"."""
    return all(verdicts) or ("partly" if any(verdicts) else False)


def summarise(rows):
    """Curves of the seeds -> {arm: {n, tokens, scored, accuracy, sd, per_seed, gain, gain_sd, efficiency}}; gain: accuracy
    minus orm at each N, paired; efficiency: for each N (tokens of best-of-N with the ORM over those at which the arm's mean
    curve reaches its accuracy, word); word: "", "at least", "never", or "no target" where the ORM does no better than with a
    smaller N. rows: a dict {arm: [{n, accuracy, ...}]} a seed."""
    out = {}
    for arm in [a for a in NAMES if a in rows[0]]:
        grid = np.array([[p["accuracy"] for p in r[arm]] for r in rows])  # (seeds, sizes)
        gain = grid - np.array([[p["accuracy"] for p in r["orm"]] for r in rows])
        column = lambda key: [mean(r[arm][i][key] for r in rows) for i in range(grid.shape[1])]  # noqa: B023, E731
        out[arm] = dict(n=[p["n"] for p in rows[0][arm]], tokens=column("tokens"), scored=column("scored"),
                        accuracy=grid.mean(0).tolist(), sd=grid.std(0, ddof=1).tolist(), per_seed=grid.tolist(),
                        gain=gain.mean(0).tolist(), gain_sd=gain.std(0, ddof=1).tolist())
    target = out["orm"]["accuracy"]
    for arm in out.values():
        arm["efficiency"] = []
        for i, cost in enumerate(out["orm"]["tokens"]):
            tokens, bound = tokens_to_reach(arm["tokens"], arm["accuracy"], target[i])
            word = "no target" if target[i] <= max(target[:i], default=-1) else "at least" if bound else "" if tokens else "never"
            arm["efficiency"].append((None if word in ("no target", "never") else cost / tokens, word))
    return out


def times(factor, word):
    return word if factor is None else f"{word} {factor:.1f}x".strip()


def grid_table(head, sizes, rows):
    return [f"| {head} | " + " | ".join(f"N={n}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|",
            *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows)]


def table(result, cfg):
    """Markdown: accuracy and efficiency by arm and N, the grid of alpha and K, the other regimes."""
    lines = grid_table("arm", cfg.sizes, [(NAMES[name], [f"{m:.3f} ({s:.3f})" for m, s in zip(a["accuracy"], a["sd"])])
                                          for name, a in result["arms"].items()])
    beams = [a for a in result["arms"] if a in BEAMS]
    lines += ["", "Tokens of best-of-N with the ORM over the tokens with which a beam is as accurate:", "", *grid_table(
        "arm", cfg.sizes, [(NAMES[name], [times(*e) for e in result["arms"][name]["efficiency"]]) for name in beams])]
    cost = result["arms"]["beam_pav"]
    lines += ["", f"At N={cfg.sizes[-1]} a beam generates {cost['tokens'][-1]:.0f} tokens and its verifier reads "
              f"{cost['scored'][-1]:.0f}; best-of-N {result['arms']['orm']['tokens'][-1]:.0f} and "
              f"{result['arms']['orm']['scored'][-1]:.0f}."]
    lines += ["", "Tuning seed, mean accuracy of N = " + " and ".join(map(str, cfg.tuning_sizes)) + "; alpha 0: "
              f"{result['tuning']['alpha_0'][0][0]:.3f}", "", "| alpha | " + " | ".join(f"K={k}" for k in cfg.prover_ks) + " |",
              "|---" * (len(cfg.prover_ks) + 1) + "|"]
    tried = {(s["alpha"], s["k"]): a for a, s in result["tuning"]["grid"]}
    lines += [f"| {a:g} | " + " | ".join(f"{tried[a, k]:.3f}" for k in cfg.prover_ks) + " |" for a in cfg.alphas]
    words = dict(weak=f"Verifiers from {cfg.weak} times fewer rollouts", cold=f"Temperature {cfg.cold:g}")
    for regime, arms in result["regimes"].items():
        lines += ["", f"{words[regime]} (and minus the ORM, paired):", "", *grid_table("arm", cfg.regime_sizes, [
            (NAMES[name], [f"{m:.3f} ({s:.3f}); {g:+.3f} ({d:.3f})" for m, s, g, d in
                           zip(a["accuracy"], a["sd"], a["gain"], a["gain_sd"])]) for name, a in arms.items()])]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# What the paper says, and what is seen here. Every "holds" follows from the numbers by a rule that stands here.


def difference(result, a, b, i):
    """Paired differences of accuracy between two arms at sizes[i], a seed each."""
    return [x[i] - y[i] for x, y in zip(result["arms"][a]["per_seed"], result["arms"][b]["per_seed"])]


def plus(gains):
    return f"{mean(gains):+.3f} (sd {spread(gains):.3f})"


def claims(results, cfg, command):
    """Rules. orm: at every N from 6 on the PAV beam needs 1.5 times fewer tokens than best-of-N with the ORM and is more
    accurate at equal ones (some N: partly). q: its gain over alpha 0, mean over these N; rank: the gain at the largest N. A
    gain counts if it is two standard errors above 0, over seeds, (k: one seed) over searches. All tasks: true; some: partly."""
    parts = dict(orm=[], q=[], k=[], rank=[])
    holds, fails = dict(orm=[], q=[], k=[], rank=[]), []
    words = dict(weak=f"verifiers from {cfg.weak} times fewer rollouts", cold=f"temperature {cfg.cold:g}")
    last, mid = len(cfg.sizes) - 1, cfg.sizes.index(cfg.regime_sizes[-1])
    for task, r in results.items():
        beam, targets = r["arms"]["beam_pav"], [i for i, n in enumerate(cfg.sizes) if n > 3]
        wins = [(beam["efficiency"][i][0] or 0) >= 1.5 and verdict(difference(r, "beam_pav", "orm", i)) for i in targets]
        holds["orm"] += wins
        shown = [i for i in targets if i in (mid, mid + 1, last)]
        parts["orm"].append(f"{task}: " + ", ".join(f"N={cfg.sizes[i]} {times(*beam['efficiency'][i])} and "
                                                    f"{plus(difference(r, 'beam_pav', 'orm', i))}" for i in shown))
        for k, a in r["regimes"].items():
            gains = np.subtract(a["beam_pav"]["per_seed"], a["orm"]["per_seed"])[:, -1].tolist()
            if not verdict(gains):
                fails.append(f"{words[k]} ({task}): {plus(gains)} at N={cfg.regime_sizes[-1]}")
        if r["arms"]["orm"]["accuracy"][last] < mean(r["one_sample"]):
            fails.append(f"{task}, where no verifier learned to check a step: one sample is right in "
                         f"{mean(r['one_sample']):.3f}, at N={cfg.sizes[last]} the ORM's pick in "
                         f"{r['arms']['orm']['accuracy'][last]:.3f}, the beam's in "
                         f"{beam['accuracy'][last]:.3f}")
        if "majority" in r["arms"]:
            fails.append(f"a vote reaches {r['arms']['majority']['accuracy'][mid]:.3f} on {task} at N={cfg.sizes[mid]}, the beam "
                         f"{beam['accuracy'][mid]:.3f}")
        gains = [difference(r, "beam_pav", "beam_q", i) for i in targets]
        whole = np.mean(gains, 0).tolist()
        holds["q"].append(verdict(whole))
        parts["q"].append(f"{task}: {plus(whole)} over all N from 6 on, {plus(gains[-1])} at N={cfg.sizes[last]}")
        ks = {k: mean(a for a, s in r["tuning"]["grid"] if s["k"] == k) for k in cfg.prover_ks}
        best, first, final = max(ks, key=ks.get), ks[cfg.prover_ks[0]], ks[cfg.prover_ks[-1]]
        error = (2 * ks[best] * (1 - ks[best]) / (cfg.problems * len(cfg.tuning_sizes) * len(cfg.alphas))) ** 0.5
        holds["k"].append(ks[best] - max(first, final) > 2 * error)
        parts["k"].append(f"{task}: best K={best}, mean over alpha {ks[best]:.3f}, K=1 {first:.3f}, K={cfg.prover_ks[-1]} "
                          f"{final:.3f}, alpha 0 {r['tuning']['alpha_0'][0][0]:.3f} (two standard errors: {2 * error:.3f})")
        gains = difference(r, "q_as_orm", "orm", last)
        holds["rank"].append(verdict(gains))
        parts["rank"].append(f"{task}: {plus(gains)} at N={cfg.sizes[last]}")
    text = dict(
        orm=("A beam ranked by Q + alpha A is 1.5 to 5 times as compute-efficient as best-of-N with an ORM, and over 8% better.",
             "; ".join(fails) or "Nowhere here."),
        q=("It beats a beam ranked by Q alone, by up to 8 times the compute.",
           "N=3: one parent a step, where any alpha gives the same ranking."),
        k=("The best prover is Best-of-K with K=4 of 1 to 32: neither the policy itself nor a strong one.",
           "Differences within the two standard errors given are noise of the one tuning seed."),
        rank=("Q re-ranking whole samples is 4% better than the ORM at N=128.",
              "The ORM is trained for the end of a solution alone, Q on equally many tokens for every prefix."))
    return [dict(paper="2410.08146", claim=c, measured="; ".join(parts[key]), holds=together(holds[key]), command=command,
                 fails_when=f) for key, (c, f) in text.items()]


def figure(results, cfg, path):
    """A row a task. Left: accuracy against tokens, band: sd over seeds. Middle: the grid of alpha and K. Right: gain over the
    ORM in the main setting (lines), with weak verifiers (diamonds) and at a low temperature (squares)."""
    if (plt := pyplot()) is None:
        return
    fig, grid = plt.subplots(len(results), 3, figsize=(14.5, 4.2 * len(results)), constrained_layout=True, squeeze=False)
    for (task, r), (left, middle, right) in zip(results.items(), grid):
        for name, a in r["arms"].items():
            style = dict(color=COLOURS[name], label=NAMES[name], linewidth=2, linestyle=":" if name == "pass" else "-")
            left.plot(a["tokens"], a["accuracy"], marker="o", markersize=4, **style)
            mid, sd = np.array(a["accuracy"]), np.array(a["sd"])
            left.fill_between(a["tokens"], mid - sd, mid + sd, color=COLOURS[name], alpha=0.12, linewidth=0)
        left.set_xscale("log", base=2)
        ticks = r["arms"]["orm"]["tokens"]
        left.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
        left.minorticks_off()
        left.set(xlabel="tokens generated a problem", ylabel="accuracy", ylim=(0, 1.03),
                 title=f"{task} (band: sd of {cfg.seeds} seeds)")
        left.legend(frameon=False, fontsize=8)
        tried = {(s["alpha"], s["k"]): x for x, s in r["tuning"]["grid"]}
        for j, k in enumerate(cfg.prover_ks):
            shade = plt.cm.viridis(0.9 * j / max(1, len(cfg.prover_ks) - 1))
            middle.plot([0, *cfg.alphas], [r["tuning"]["alpha_0"][0][0], *(tried[a, k] for a in cfg.alphas)], color=shade,
                        marker="o", markersize=4, label=f"K={k}")
        middle.set(xlabel="alpha", ylabel=f"accuracy, mean of N={' and '.join(map(str, cfg.tuning_sizes))}",
                   title="Tuning seed: weight of progress and prover")
        middle.legend(frameon=False, fontsize=8)
        for name in ("q_as_orm", *BEAMS):
            a = r["arms"][name]
            right.errorbar(a["n"], a["gain"], a["gain_sd"], color=COLOURS[name], marker="o", markersize=4, capsize=3)
            for regime, arms in r["regimes"].items():
                right.plot(arms[name]["n"], arms[name]["gain"], color=COLOURS[name], marker=dict(weak="D", cold="s")[regime],
                           markersize=6, markerfacecolor="white", linestyle="")
        right.axhline(0, color="#aaaaaa", linewidth=1)
        right.set_xscale("log", base=2)
        right.set_xticks(cfg.sizes, cfg.sizes)
        right.minorticks_off()
        right.set(xlabel=f"N (diamonds: weak verifiers; squares: temperature {cfg.cold:g})",
                  ylabel="accuracy minus best-of-N with the ORM", title="Gain, paired by seed (bars: sd)")
    finish(plt, fig, grid.flat, path)
