"""What experiments/vbvf.py tends to with endless data, exactly, for the scripted base.

    python -m experiments.vbvf_exact             # a second
    -> docs/results/vbvf/: exact.json, exact.md, exact.png

On the task contextual (tasks/contextual.py) the time to the first right point is negative binomial,
a mixture of them for a mixed base, the same for every prompt. So, for the bi-level reward r = (H -
t)/H, these are numbers, not estimates:

    VF        E[r | right]: the clone of right traces of the base, which is what verifier-free
              training tends to. Its chi-square distance from the base is kappa = 1/Pr[right] - 1
    VB near   the largest E_pi[r] over all pi within that same chi-square distance of the base: what
              a perfect verifier could buy for the distance that VF goes (Setlur et al. 2025, arXiv
              2502.12118, compare within such a ball). The optimum weighs a trace by max(0, r - c);
              while no trace gets weight 0 it is E[r] + sigma sqrt(kappa)
    VB of N   best of N traces of the base by the true reward: what best-of-N with a perfect
              verifier tends to

sigma is the standard deviation of r, which is the root of the paper's heterogeneity sum_h Var_a Q
(Q is a martingale along a trace). The gap is in tokens, H times the difference in r. What would
falsify the claim even here: a gap to VF that does not grow with H, or grows as much from a
concentrated base as from a mixed one.

Left out: everything that learning adds. VF gets its n traces for nothing here, and a verifier makes
no mistakes.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.toolkit import (
    METHOD_COLOURS,
    finish,
    print_results,
    pyplot,
    together,
    typed,
    write_results,
)
from experiments.vbvf_report import MIXTURES
from infra.cli import opt, parse, script
from tasks.contextual import Contextual


@dataclass
class Config:
    horizons: list = opt([8, 12, 16, 24, 32, 48, 64], "H: tokens of a trace")
    letters: int = opt(4, "letters that a trace must hold", low=1)
    n: int = opt(16, "N of best-of-N", low=1)
    out: str = opt("docs/results/vbvf", "where table, figure and numbers go")
    smoke: bool = opt(False, "the same (it takes a second), written elsewhere")


def best_near(reward, chance, kappa):
    """Largest mean reward of a distribution within chi-square distance kappa of `chance`, both
    [T], chance summing to 1: weights max(0, reward - c), normalised, with c found by bisection
    (the smaller c, the nearer)."""

    def weighed(c):
        w = np.maximum(0, reward - c)
        w = w / (w @ chance)
        return w @ (chance * reward), w**2 @ chance - 1

    low = reward.min() - 1e6
    high = reward.max() - 1e-9
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if weighed(c)[1] <= kappa else (low, c)
    return float(weighed(low)[0])


def limits(strengths, H, letters, N):
    """One row of the table: exact numbers for a base policy and a horizon."""
    reward, chance = Contextual(planted=letters, length=H, mixture=strengths).reward_distribution(0)
    right = chance.sum()
    # last: never right
    reward = np.append(reward, 0.0)
    chance = np.append(chance, 1 - right)
    mean = reward @ chance
    sigma = math.sqrt(reward**2 @ chance - mean**2)
    at_least_one = 1 - (1 - np.cumsum(chance[:-1])) ** N  # by t, among N traces
    best = float(np.diff(at_least_one, prepend=0) @ reward[:-1])
    near = best_near(reward, chance, 1 / right - 1)
    vf = mean / right
    return dict(
        H=H,
        right=right,
        base=mean,
        sigma=sigma * H,
        anti_concentration=float(chance[reward >= mean + sigma].sum()),
        anti_concentration_half=float(chance[reward >= mean + sigma / 2].sum()),
        vf=vf,
        kappa=1 / right - 1,
        vb_near=near,
        vb_best=best,
        gap_near=(near - vf) * H,
        gap_best=(best - vf) * H,
    )


def table(rows, N):
    lines = [
        "| base | H | Pr[right] | E[r] | sigma, tokens | Pr[r >= mean + sd] | VF | VB near | "
        f"VB of {N} | gap of VB near, tokens | gap of VB of {N}, tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['mixture']} | {r['H']} | {r['right']:.3f} | {r['base']:.3f} | "
            f"{r['sigma']:.2f} | {r['anti_concentration']:.2f} | {r['vf']:.3f} | "
            f"{r['vb_near']:.3f} | {r['vb_best']:.3f} | {r['gap_near']:.2f} | "
            f"{r['gap_best']:.2f} |"
        )
    return "\n".join(lines)


def claims_of(results):
    """Judged by three questions on the mixed base: does the gap of best-of-N grow over all
    horizons, does it end above the concentrated base's, and does the gap within VF's own
    distance grow, too?"""
    rows = results["rows"]
    N = results["settings"]["n"]

    def gap(m, name="gap_best"):
        return [r[name] for r in rows if r["mixture"] == m]

    H = sorted({r["H"] for r in rows})

    def ends(m):
        return f"{gap(m)[0]:.1f} at H = {H[0]} to {gap(m)[-1]:.1f} at H = {H[-1]}"

    def grows(values):
        return all(b > a for a, b in itertools.pairwise(values))

    checks = [
        grows(gap("mixed")),
        gap("mixed")[-1] > gap("concentrated")[-1],
        grows(gap("mixed", "gap_near")),
    ]
    near = max(rows, key=lambda r: r["gap_near"])
    order = math.log(gap("mixed")[-1] / gap("mixed")[0]) / math.log(H[-1] / H[0])
    return [
        dict(
            paper="2502.12118",
            command=results["command"],
            claim="From a heterogeneous base the gap between verifier-based and verifier-free "
            "use of test tokens grows with their number H; from a concentrated one it "
            "need not.",
            short="Verifier-based minus verifier-free grows with H: exact",
            measured=f"Exact, endless data, perfect learning, scripted base: best-of-{N} ({N} H "
            "tokens) minus the clone of right traces (H tokens) goes from "
            f"{ends('mixed')} tokens (mixed base; like H^{order:.2f}), from "
            f"{ends('widest')} (widest), from {ends('concentrated')} (concentrated). No "
            "spread: nothing is sampled.",
            holds=together(checks),
            fails_when=f"At H = {H[0]} the concentrated base has the larger gap "
            f"({gap('concentrated')[0]:.1f} against {gap('mixed')[0]:.1f} and "
            f"{gap('widest')[0]:.1f}): there wrong traces are the spread, and "
            "rejection removes them. Within VF's own chi-square distance a perfect "
            f"verifier buys {near['gap_near']:.1f} tokens at most ({near['mixture']}, "
            f"H = {near['H']}): VB wins by going farther from the base.",
        )
    ]


def figure(rows, N, path):
    plt = pyplot()
    if plt is None:
        return
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), constrained_layout=True)
    for mixture, style in zip(MIXTURES, (":", "-", "--")):
        of_base = [r for r in rows if r["mixture"] == mixture]
        H = [r["H"] for r in of_base]
        left.plot(
            H,
            [r["gap_best"] for r in of_base],
            style,
            marker="o",
            color=METHOD_COLOURS["vb_bon"],
            label=f"{mixture}: best of {N}",
        )
        left.plot(
            H,
            [r["gap_near"] for r in of_base],
            style,
            marker="o",
            color=METHOD_COLOURS["vb_rl"],
            label=f"{mixture}: best as near as VF",
        )
        right.plot(
            H,
            [r["sigma"] for r in of_base],
            style,
            marker="o",
            color=METHOD_COLOURS["base"],
            label=mixture,
        )
    left.set(
        ylabel="VB minus VF, tokens after the first right point", title="Exact gap, endless data"
    )
    right.set(ylabel="sigma of the base, tokens", title="Heterogeneity of the base")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(H, H)
        axis.minorticks_off()
        axis.set_xlabel("H, tokens of a trace")
        axis.legend(frameon=False, fontsize=8)
    finish(plt, fig, (left, right), path)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    out = Path("runs/vbvf_exact" if cfg.smoke else cfg.out)
    rows = [
        dict(mixture=m) | limits(strengths, H, cfg.letters, cfg.n)
        for (m, strengths), H in itertools.product(MIXTURES.items(), cfg.horizons)
    ]
    text = table(rows, cfg.n)
    name = typed("vbvf_exact", argv)
    write_results(out, text, name, cfg, claims_of, "exact", mixtures=MIXTURES, rows=rows)
    figure(rows, cfg.n, out / "exact.png")
    print_results(text, out, figure="exact", numbers="exact")


if __name__ == "__main__":
    script(main)
