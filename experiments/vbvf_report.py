"""Tables, claims and figure of experiments/vbvf.py, from its cells; nothing is computed anew.

python -m experiments.vbvf        # whose cells, under runs/vbvf, are then only read
"""

import itertools
import math

import numpy as np

from experiments.toolkit import METHOD_COLOURS, finish, mean_sd, opposite, pyplot, together, verdict
from infra.runs import mean

BUDGETS = (1, 2, 4, 8, 16)  # N of best-of-N
# Geometric mean 12, each.
MIXTURES = {"concentrated": (12.0,), "mixed": (3.0, 48.0), "widest": (1.0, 144.0)}


def best_of_vf(r, N):
    """J of the better of VF's sample and its likeliest of N."""
    return max(r["vf"]["J"], r["vf"]["likeliest"][N])


def in_cell(rows, mixture, n, H):
    return [r for r in rows if (r["mixture"], r["n"], r["H"]) == (mixture, n, H)]


VALUES = {
    "base": lambda r: r["base"]["J"],
    "vf": lambda r: r["vf"]["J"],
    "rl": lambda r: r["rl"]["J"],
    "bon": lambda r: r["bon"]["J"]["16"],
    "likeliest": lambda r: r["vf"]["likeliest"]["16"],
    "oracle": lambda r: r["base"]["oracle"]["16"],
    "greedy_base": lambda r: r["base"]["greedy"]["J"],
    "greedy_vf": lambda r: r["vf"]["greedy"]["J"],
    "greedy_rl": lambda r: r["rl"]["greedy"]["J"],
    # In tokens after the first right point; the first costs H tokens at test time, the second 16 H.
    "gap": lambda r: (r["rl"]["J"] - r["vf"]["J"]) * r["H"],
    "gap_bon": lambda r: (r["bon"]["J"]["16"] - best_of_vf(r, "16")) * r["H"],
    "gap_sample": lambda r: (r["bon"]["J"]["16"] - r["vf"]["J"]) * r["H"],
    "sigma": lambda r: r["base"]["sigma"] * r["H"],
    "c": lambda r: r["base"]["c_1"],
}


def per_seed(rows, name, mixture, n, H):
    """[seeds] of one value in one cell, in the order of seeds."""
    cell = sorted(in_cell(rows, mixture, n, H), key=lambda r: r["seed"])
    return np.array([VALUES[name](r) for r in cell])


def tables(rows, cfg):
    """Markdown. J: mean trace reward in [0,1); gaps in tokens; mean (sd over seeds)."""
    cells = [("mixed", n, H) for n, H in itertools.product(cfg.sizes, cfg.horizons)]
    cells += sorted({(r["mixture"], r["n"], r["H"]) for r in rows if r["mixture"] != "mixed"})
    text = "\n".join(
        [
            f"J = E[(H - t_solve)/H] on new prompts, mean (sd over {cfg.seeds} seeds). At H tokens "
            "base, VF and VB-RL, one sample. At 16 H: VB best-of-16 of the base, and the VF "
            "policy's likeliest of 16. Gaps in tokens after the first right point: VB-RL minus VF; "
            "best-of-16 minus the better of VF's two.\n",
            "| base | n | H | base J | VF | VB-RL | VF likeliest of 16 | VB best-of-16 | oracle of "
            "16 | gap at H | gap at 16 H |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(result_line(rows, c) for c in cells),
            "\nThe same cells, what lies behind: sigma (tokens; root of the median variance of a "
            "trace's reward), anti-concentration c = Pr[r >= mean + sd], accuracy, greedy "
            "decoding, the verifier's correlation with the true reward, VF's right traces and the "
            "base traces drawn for them, KL of the RL policy to the base, nats a trace.\n",
            "| base | n | H | sigma | c | accuracy base / VF / VB-RL | greedy J base / VF / VB-RL "
            "| correlation | traces of VF | KL |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(background_line(rows, c) for c in cells),
            *by_samples(rows, cfg),
        ]
    )
    return text.replace("nan", "")


def result_line(rows, cell):
    names = ("base", "vf", "rl", "likeliest", "bon", "oracle")
    J = [mean_sd(per_seed(rows, name, *cell)) for name in names]
    gaps = [mean_sd(per_seed(rows, name, *cell), 2) for name in ("gap", "gap_bon")]
    return f"| {' | '.join([*map(str, cell), *J, *gaps])} |"


def background_line(rows, cell):
    of = in_cell(rows, *cell)

    def trio(value):
        return " / ".join(f"{mean(value(r[arm]) for r in of):.2f}" for arm in ("base", "vf", "rl"))

    traces = mean(r["vf"]["traces"] for r in of), mean(r["vf"]["base_traces"] for r in of)
    cells = [
        *map(str, cell),
        *(mean_sd(per_seed(rows, name, *cell), 2) for name in ("sigma", "c")),
        trio(lambda a: a["accuracy"]),
        trio(lambda a: a["greedy"]["J"]),
        f"{mean(r['bon']['correlation'] for r in of):.2f}",
        "{:.0f} of {:.0f}".format(*traces),
        f"{mean(r['rl']['kl'] for r in of):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def by_samples(rows, cfg):
    """J against N in the largest mixed cell."""
    n = cfg.sizes[-1]
    H = cfg.horizons[-1]
    of = in_cell(rows, "mixed", n, H)
    columns = (
        [r["vf"]["likeliest"] for r in of],
        [r["bon"]["J"] for r in of],
        [r["bon"]["J_mean"] for r in of],
        [r["base"]["oracle"] for r in of],
    )
    lines = [
        f"\nJ against N (mixed, n = {n}, H = {H}); lambda = {cfg.pessimism:g} is the pessimistic "
        "score.\n",
        "| N | VF likeliest of N | VB best-of-N | VB, lambda 0 | oracle |",
        "|---|---|---|---|---|",
    ]
    for N in map(str, BUDGETS):
        means = [mean(by_n.get(N, math.nan) for by_n in column) for column in columns]
        lines.append(f"| {N} | {' | '.join(f'{m:.3f}' for m in means)} |")
    return lines


class Cells:
    """The rows of a results file, by cell, and what the claims ask of them. Defaults: mixed
    base, largest n, longest H."""

    def __init__(self, results):
        settings = results["settings"]
        self.rows = results["rows"]
        self.seeds = settings["seeds"]
        self.horizons = settings["horizons"]
        self.sizes = settings["sizes"]
        self.command = results["command"]

    def get(self, name, n=None, H=None, mixture="mixed"):
        """[seeds]"""
        return per_seed(self.rows, name, mixture, n or self.sizes[-1], H or self.horizons[-1])

    def tokens(self, values):
        return mean_sd(values, 2)

    def fair_gap(self, n=None, H=None):
        """[seeds] VB-RL minus VF in tokens, VF being given the best n up to this one: whoever
        has 1000 traces can train on 256 of them, and verifier-free training here gets worse with
        more."""
        n = n or self.sizes[-1]
        H = H or self.horizons[-1]
        vf = max((self.get("vf", m, H) for m in self.sizes if m <= n), key=lambda v: v.mean())
        return (self.get("rl", n, H) - vf) * H


def claims_of(results):
    """The paper's statements beside ours, judged by the rule that the head of vbvf.py announces."""
    cells = Cells(results)
    shared = dict(paper="2502.12118", command=cells.command)
    return [
        shared | part(cells)
        for part in (grows_with_H, grows_with_n, needs_heterogeneity, best_of_n_wins)
    ]


def grows_with_H(c):
    n = c.sizes[-1]
    H = c.horizons
    growth = c.fair_gap() - c.fair_gap(H=H[0])
    wins = [
        f"{m} base, n = {k}, H = {h}"
        for m, k, h in sorted({(r["mixture"], r["n"], r["H"]) for r in c.rows})
        if verdict(c.get("gap", k, h, m)) is False
    ]
    won = (
        "VF is ahead with " + "; ".join(wins)
        if wins
        else "VF is ahead in no cell of the sweep"
    )
    return dict(
        claim="From a heterogeneous base the advantage of verifier-based over verifier-free "
        "training grows with the test budget H.",
        short="Verifier-based training's lead grows with the test budget H",
        measured=f"VB-RL (n = {n}) minus VF at its best n, in tokens after the first right point: "
        + ", ".join(f"{c.tokens(c.fair_gap(H=h))} at H = {h}" for h in H)
        + f" (sd over {c.seeds} seeds); minus VF at n = {n}: "
        + ", ".join(c.tokens(c.get("gap", H=h)) for h in H)
        + ".",
        holds=together([verdict(c.fair_gap()), verdict(growth)]),
        fails_when=f"{won}; decoded greedily even the base reaches J "
        f"{c.get('greedy_base').mean():.2f} and VF {c.get('greedy_vf').mean():.2f} "
        f"(VB-RL {c.get('greedy_rl').mean():.2f}): the claim is about sampled "
        f"policies. VF is tuned at H = {H[len(H) // 2]} alone.",
    )


def grows_with_n(c):
    """VF at n must not be worse than VF with fewer problems: fair_gap."""
    sizes = c.sizes
    H = c.horizons[-1]
    growth = {n: c.fair_gap() - c.fair_gap(n) for n in sizes[:-1]}
    J = ", ".join(f"{mean_sd(c.get('vf', n))} at n = {n}" for n in sizes)
    return dict(
        claim="The advantage of verifier-based methods grows with the number of training "
        "problems n.",
        short="Verifier-based training's lead grows with the problems n",
        measured=f"VB-RL minus VF at H = {H}, in tokens, VF at its best n up to that: "
        + ", ".join(f"{c.tokens(c.fair_gap(n))} at n = {n}" for n in sizes)
        + "; growth up to the last "
        + ", ".join(f"{c.tokens(g)} from n = {n}" for n, g in growth.items())
        + f" (sd over {c.seeds} seeds).",
        holds=together(verdict(g) for g in growth.values()),
        fails_when="VF is taken at each n as it is "
        f"({', '.join(c.tokens(c.get('gap', n)) for n in sizes)}): its J is {J}, so "
        "that the gap grows because VF, tuned at a shorter H, gets worse with more "
        "data.",
    )


def needs_heterogeneity(c):
    mid = c.sizes[len(c.sizes) // 2]
    H0 = c.horizons[0]
    H1 = c.horizons[-1]
    gap = {(m, H): c.get("gap", mid, H, m) for m in MIXTURES for H in (H0, H1)}
    contrast = gap["mixed", H1] - gap["concentrated", H1]
    return dict(
        claim="The gap needs heterogeneity: from a concentrated base verifier-free training can "
        "keep up.",
        short="From a concentrated base verifier-free training can keep up",
        measured=f"VB-RL minus VF at n = {mid}, H = {H1}: "
        + ", ".join(
            f"{c.tokens(gap[m, H1])} tokens from the {m} base (sigma "
            f"{c.get('sigma', mid, mixture=m).mean():.1f}, c "
            f"{c.get('c', mid, mixture=m).mean():.2f})"
            for m in MIXTURES
        )
        + f"; mixed minus concentrated {mean_sd(contrast, 2, signed=True)} ({c.seeds} seeds, sd).",
        holds=together([verdict(contrast), opposite(verdict(gap["concentrated", H1]))]),
        fails_when=f"At H = {H0} the gaps are "
        + ", ".join(
            f"{c.tokens(gap[m, H0])} ({m}, sigma {c.get('sigma', mid, H0, m).mean():.1f})"
            for m in MIXTURES
        )
        + ".",
    )


def best_of_n_wins(c):
    n = c.sizes[-1]
    H = c.horizons
    N = str(BUDGETS[-1])
    of = [r for r in c.rows if (r["mixture"], r["n"], r["H"]) == ("mixed", n, H[-1])]
    ahead = [
        N
        for N in map(str, BUDGETS)
        if verdict(r["bon"]["J"][N] - max(r["vf"]["J"], r["vf"]["likeliest"][N]) for r in of)
        is True
    ]
    return dict(
        claim="At equal test tokens N H, best-of-N by a learned verifier beats the "
        "verifier-free policy.",
        short="Best-of-N by a learned verifier beats the verifier-free policy",
        measured=f"Best-of-{N} of the base, n = {n}, in tokens, minus VF's sample, as in the paper: "
        + ", ".join(f"{c.tokens(c.get('gap_sample', H=h))} at H = {h}" for h in H)
        + f"; minus the better of that and VF's likeliest of {N}, a rival that the paper does not "
        "have: "
        + ", ".join(f"{c.tokens(c.get('gap_bon', H=h))} at H = {h}" for h in H)
        + f" ({c.seeds} seeds, sd). J at H = {H[-1]}: {mean_sd(c.get('bon'))}, VF's sample "
        f"{mean_sd(c.get('vf'))}.",
        holds=together(
            verdict(c.get(gap, H=h)) for gap in ("gap_sample", "gap_bon") for h in (H[0], H[-1])
        ),
        fails_when=f"Against the second rival best-of-N, at n = {n} and H = {H[-1]}, is ahead "
        + (f"from N = {ahead[0]} on." if ahead else f"for no N up to {N}."),
    )


BARS = dict(linewidth=2, markersize=5, capsize=3, marker="o")


def bars(axis, x, values, **style):
    """values: [seeds] for each x."""
    axis.errorbar(x, [v.mean() for v in values], [v.std(ddof=1) for v in values], **BARS | style)


def logarithmic(axis, ticks):
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()


def horizon_panel(axis, rows, cfg):
    """The gap against H, by n."""
    gaps = (("gap", "vb_rl", "RL at H tokens"), ("gap_bon", "vb_bon", "best-of-16 at 16 H"))
    for (n, line), (name, arm, label) in itertools.product(
        zip(cfg.sizes, (":", "--", "-", "-.")), gaps
    ):
        values = [per_seed(rows, name, "mixed", n, H) for H in cfg.horizons]
        style = dict(linestyle=line, color=METHOD_COLOURS[arm], label=f"{label}, n = {n}")
        bars(axis, cfg.horizons, values, **style)
    axis.axhline(0, color="#aaaaaa", linewidth=1)
    logarithmic(axis, cfg.horizons)
    axis.set(
        xlabel="H, tokens of a trace",
        ylabel="VB minus VF, tokens after the first right point",
        title="Mixed base (bars: sd over seeds)",
    )


def samples_panel(axis, rows, n, H):
    """J against N."""
    of = in_cell(rows, "mixed", n, H)
    curves = (
        ("VB best-of-N", "vb_bon", "-", [r["bon"]["J"] for r in of]),
        ("oracle best-of-N of the base", "base", ":", [r["base"]["oracle"] for r in of]),
        ("VF, its likeliest of N", "vf", "--", [r["vf"]["likeliest"] for r in of]),
    )
    for label, arm, line, seeds in curves:
        x = [N for N in BUDGETS if str(N) in seeds[0]]
        values = [np.array([by_n[str(N)] for by_n in seeds]) for N in x]
        bars(axis, x, values, linestyle=line, color=METHOD_COLOURS[arm], label=label)
    one = (("rl", "vb_rl", "VB-RL, one sample"), ("vf", "vf", "VF, one sample"))
    for name, arm, label in one:
        J = per_seed(rows, name, "mixed", n, H).mean()
        axis.axhline(J, color=METHOD_COLOURS[arm], linewidth=1.5, label=label)
    logarithmic(axis, BUDGETS)
    axis.set(
        xlabel="N, traces at test time",
        ylabel="J = E[(H - t)/H], new prompts",
        title=f"Mixed base, n = {n}, H = {H}",
    )


def heterogeneity_panel(axis, rows, n, horizons):
    """The gap against sigma, every cell of the three bases."""
    for (mixture, marker), (H, size) in itertools.product(
        zip(MIXTURES, "osD"), ((horizons[0], 5), (horizons[-1], 10))
    ):
        sigma = per_seed(rows, "sigma", mixture, n, H)
        gap = per_seed(rows, "gap", mixture, n, H)
        style = dict(
            color=METHOD_COLOURS["vb_rl"],
            marker=marker,
            markersize=size,
            capsize=2,
            linestyle="",
            markerfacecolor="white" if mixture == "concentrated" else None,
            alpha=0.5 if mixture == "widest" else 1,
        )
        spreads = gap.std(ddof=1), sigma.std(ddof=1)
        axis.errorbar(sigma.mean(), gap.mean(), *spreads, label=f"{mixture}, H = {H}", **style)
    axis.axhline(0, color="#aaaaaa", linewidth=1)
    axis.set(
        xlabel="heterogeneity sigma of the base, tokens",
        ylabel="VB-RL minus VF, tokens",
        title=f"Heterogeneity, n = {n}",
    )


def figure(rows, cfg, path):
    if (plt := pyplot()) is None:
        return
    fig, axes = plt.subplots(1, 3, figsize=(14.5, 4.3), constrained_layout=True)
    horizon_panel(axes[0], rows, cfg)
    samples_panel(axes[1], rows, cfg.sizes[-1], cfg.horizons[-1])
    heterogeneity_panel(axes[2], rows, cfg.sizes[len(cfg.sizes) // 2], cfg.horizons)
    for axis in axes:
        axis.legend(frameon=False, fontsize=7)
    finish(plt, fig, axes, path)
