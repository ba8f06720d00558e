"""What experiments/vbvf.py measured, in words: tables, claims against the paper's, figure. It computes nothing anew:

    python experiments/vbvf.py        # whose cells, under runs/vbvf, are then only read
"""

import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from infra.runs import mean  # noqa: E402
from report.figures import METHOD_COLOURS, finish, pyplot  # noqa: E402

BUDGETS = (1, 2, 4, 8, 16)  # N of best-of-N
MIXTURES = {"concentrated": (12.0,), "mixed": (3.0, 48.0), "widest": (1.0, 144.0)}  # geometric mean 12, each

VALUES = {
    "base": lambda r: r["base"]["J"], "vf": lambda r: r["vf"]["J"], "rl": lambda r: r["rl"]["J"],
    "bon": lambda r: r["bon"]["J"]["16"], "likeliest": lambda r: r["vf"]["likeliest"]["16"],
    "oracle": lambda r: r["base"]["oracle"]["16"], "greedy_base": lambda r: r["base"]["greedy"]["J"],
    "greedy_vf": lambda r: r["vf"]["greedy"]["J"], "greedy_rl": lambda r: r["rl"]["greedy"]["J"],
    "gap": lambda r: (r["rl"]["J"] - r["vf"]["J"]) * r["H"],  # tokens after the first right point; H tokens at test time
    "gap_bon": lambda r: (r["bon"]["J"]["16"] - max(r["vf"]["J"], r["vf"]["likeliest"]["16"])) * r["H"],  # 16 H tokens
    "sigma": lambda r: r["base"]["sigma"] * r["H"], "c": lambda r: r["base"]["c_1"],
}


def per_seed(rows, name, mixture, n, H):
    """[seeds] of one value in one cell, in the order of seeds."""
    mine = sorted((r for r in rows if (r["mixture"], r["n"], r["H"]) == (mixture, n, H)), key=lambda r: r["seed"])
    return np.array([VALUES.get(name, lambda r: r[name])(r) for r in mine])


def shown(values, digits=3):
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def clear(values):
    """Above 0 by more than two standard errors over the seeds."""
    return bool(values.mean() > 2 * values.std(ddof=1) / len(values) ** 0.5)


def tables(rows, cfg):
    """Markdown. J: mean trace reward in [0,1); gaps in tokens; mean ± sd over seeds."""
    cells = [("mixed", n, H) for n, H in itertools.product(cfg.sizes, cfg.horizons)]
    cells += sorted({(r["mixture"], r["n"], r["H"]) for r in rows if r["mixture"] != "mixed"})
    find = lambda name, c, digits=3: shown(per_seed(rows, name, *c), digits)  # noqa: E731
    out = [f"J = E[(H - t_solve)/H] on new prompts, mean ± sd over {cfg.seeds} seeds. At H tokens: base, VF and VB-RL, one "
           "sample. At 16 H: VB best-of-16 of the base, and the VF policy's likeliest of 16. Gaps in tokens after the first "
           "right point: VB-RL minus VF; best-of-16 minus the better of VF's two.\n",
           "| base | n | H | base J | VF | VB-RL | VF likeliest of 16 | VB best-of-16 | oracle of 16 | gap at H | gap at 16 H |",
           "|---|---|---|---|---|---|---|---|---|---|---|"]
    for c in cells:
        names = ("base", "vf", "rl", "likeliest", "bon", "oracle")
        out.append(f"| {c[0]} | {c[1]} | {c[2]} | " + " | ".join(find(name, c) for name in names)
                   + f" | {find('gap', c, 2)} | {find('gap_bon', c, 2)} |")
    out += ["\nThe same cells, what lies behind: sigma (tokens; root of the median variance of a trace's reward), "
            "anti-concentration c = Pr[r >= mean + sd], accuracy, greedy decoding, the verifier's correlation with the true "
            "reward, VF's right traces and the base traces drawn for them, KL of the RL policy to the base in nats a trace.\n",
            "| base | n | H | sigma | c | accuracy base / VF / VB-RL | greedy J base / VF / VB-RL | correlation | "
            "traces of VF | KL |",
            "|---|---|---|---|---|---|---|---|---|---|"]
    for c in cells:
        mine = [r for r in rows if (r["mixture"], r["n"], r["H"]) == c]
        trio = lambda f: " / ".join(f"{mean(f(r[a]) for r in mine):.2f}" for a in ("base", "vf", "rl"))  # noqa: E731, B023
        out.append(f"| {c[0]} | {c[1]} | {c[2]} | {find('sigma', c, 2)} | {find('c', c, 2)} | {trio(lambda a: a['accuracy'])} | "
                   f"{trio(lambda a: a['greedy']['J'])} | {mean(r['bon']['correlation'] for r in mine):.2f} | "
                   f"{mean(r['vf']['traces'] for r in mine):.0f} of {mean(r['vf']['base_traces'] for r in mine):.0f} | "
                   f"{mean(r['rl']['kl'] for r in mine):.1f} |")
    n, H = cfg.sizes[-1], cfg.horizons[-1]
    mine = [r for r in rows if (r["mixture"], r["n"], r["H"]) == ("mixed", n, H)]
    out += [f"\nJ against N (mixed, n = {n}, H = {H}); lambda = {cfg.pessimism:g} is the pessimistic score.\n",
            "| N | VF likeliest of N | VB best-of-N | VB, lambda 0 | oracle |", "|---|---|---|---|---|"]
    for N in map(str, BUDGETS):
        at = lambda f: f"{mean(f(r).get(N, float('nan')) for r in mine):.3f}"  # noqa: B023, E731
        out.append(f"| {N} | {at(lambda r: r['vf']['likeliest'])} | {at(lambda r: r['bon']['J'])} | "
                   f"{at(lambda r: r['bon']['J_mean'])} | {at(lambda r: r['base']['oracle'])} |")
    return "\n".join(out).replace("nan", "")


def verdict(*parts):
    return True if all(parts) else "partly" if any(parts) else False


def claims(rows, cfg, command):
    """The paper's statements beside ours, judged by the rule that the head of this file announces."""
    H0, H1, n0, n1, mid = cfg.horizons[0], cfg.horizons[-1], cfg.sizes[0], cfg.sizes[-1], cfg.sizes[len(cfg.sizes) // 2]
    get = lambda name, n=n1, H=H1, mixture="mixed": per_seed(rows, name, mixture, n, H)  # noqa: E731
    tokens, seeds = lambda v: shown(v, 2), f"over {cfg.seeds} seeds"  # noqa: E731
    wins = [f"{m} base, n = {n}, H = {H}" for m, n, H in sorted({(r["mixture"], r["n"], r["H"]) for r in rows})
            if clear(-get("gap", n, H, m))]
    won = "VF is ahead with " + "; ".join(wins) if wins else "VF is ahead by two standard errors in no cell of the sweep"
    greedy = (f"decoded greedily even the base reaches J {get('greedy_base').mean():.2f} and VF {get('greedy_vf').mean():.2f} "
              f"(VB-RL {get('greedy_rl').mean():.2f}): the claim is about sampled policies")
    growth, many = get("gap") - get("gap", H=H0), get("gap") - get("gap", n=n0)
    contrast, few = get("gap", mid) - get("gap", mid, mixture="concentrated"), get("gap_bon")
    enough = next((N for N in map(str, BUDGETS) if clear(np.array(
        [r["bon"]["J"][N] - max(r["vf"]["J"], r["vf"]["likeliest"][N]) for r in rows
         if (r["mixture"], r["n"], r["H"]) == ("mixed", n1, H1)]))), None)
    return [dict(paper="2502.12118", command=command, claim=claim, measured=measured, holds=holds, fails_when=fails)
            for claim, measured, holds, fails in [
        ("From a heterogeneous base the advantage of verifier-based over verifier-free training grows with the test budget H.",
         f"VB-RL minus VF at n = {n1}, in tokens after the first right point: "
         + ", ".join(f"{tokens(get('gap', H=H))} at H = {H}" for H in cfg.horizons) + f" (mean ± sd {seeds}).",
         verdict(clear(get("gap")), clear(growth)), won + "; " + greedy + "."),
        ("The advantage of verifier-based methods grows with the number of training problems n.",
         f"VB-RL minus VF at H = {H1}, in tokens: " + ", ".join(f"{tokens(get('gap', n=n))} at n = {n}" for n in cfg.sizes)
         + f" (mean ± sd {seeds}).", verdict(clear(get("gap")), clear(many)),
         f"The difference between n = {n1} and n = {n0} is {tokens(many)} tokens."),
        ("The gap needs heterogeneity: from a concentrated base verifier-free training can keep up.",
         f"VB-RL minus VF at n = {mid}, H = {H1}: " + ", ".join(
             f"{tokens(get('gap', mid, mixture=m))} tokens from the {m} base (sigma {get('sigma', mid, mixture=m).mean():.1f}, "
             f"c {get('c', mid, mixture=m).mean():.2f})" for m in MIXTURES) + f" ({seeds}).",
         verdict(clear(contrast), not clear(get("gap", mid, mixture="concentrated"))),
         f"At H = {H0} the gaps are " + ", ".join(f"{tokens(get('gap', mid, H0, m))} ({m}, sigma "
                                                  f"{get('sigma', mid, H0, m).mean():.1f})" for m in MIXTURES) + "."),
        ("At equal test tokens N H, best-of-N by a learned verifier beats the verifier-free policy.",
         f"Best-of-16 minus the better of VF's sample and its likeliest of 16, n = {n1}: "
         + ", ".join(f"{tokens(get('gap_bon', H=H))} tokens at H = {H}" for H in cfg.horizons) + f" ({seeds}).",
         verdict(clear(few), clear(get("gap_bon", H=H0))),
         f"With small N: at n = {n1}, H = {H1} best-of-N is ahead from N = {enough} on." if enough else
         f"At n = {n1}, H = {H1} best-of-N is ahead for no N up to 16."),
    ]]


def figure(rows, cfg, path):
    """Left: the gap against H, by n. Middle: J against N. Right: the gap against sigma, every cell of the three bases."""
    plt = pyplot()
    if plt is None:
        return
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14.5, 4.3), constrained_layout=True)
    bars = dict(linewidth=2, markersize=5, capsize=3)
    for n, style in zip(cfg.sizes, (":", "--", "-", "-.")):
        for name, colour, label in (("gap", "vb_rl", "RL at H tokens"), ("gap_bon", "vb_bon", "best-of-16 at 16 H")):
            v = [per_seed(rows, name, "mixed", n, H) for H in cfg.horizons]
            left.errorbar(cfg.horizons, [x.mean() for x in v], [x.std(ddof=1) for x in v], linestyle=style, marker="o",
                          color=METHOD_COLOURS[colour], label=f"{label}, n = {n}", **bars)
    left.axhline(0, color="#aaaaaa", linewidth=1)
    left.set_xscale("log", base=2)
    left.set_xticks(cfg.horizons, cfg.horizons)
    left.set(xlabel="H, tokens of a trace", ylabel="VB minus VF, tokens after the first right point",
             title="Mixed base (bars: sd over seeds)")
    left.legend(frameon=False, fontsize=7)
    n, H = cfg.sizes[-1], cfg.horizons[-1]
    mine = [r for r in rows if (r["mixture"], r["n"], r["H"]) == ("mixed", n, H)]
    for label, colour, style, f in (
            ("VB best-of-N", "vb_bon", "-", lambda r: r["bon"]["J"]),
            ("oracle best-of-N of the base", "base", ":", lambda r: r["base"]["oracle"]),
            ("VF, its likeliest of N", "vf", "--", lambda r: r["vf"]["likeliest"])):
        x = [N for N in BUDGETS if str(N) in f(mine[0])]
        v = np.array([[f(r)[str(N)] for N in x] for r in mine])
        middle.errorbar(x, v.mean(0), v.std(0, ddof=1), color=METHOD_COLOURS[colour], linestyle=style, marker="o",
                        label=label, **bars)
    for name, colour, label in (("rl", "vb_rl", "VB-RL, one sample"), ("vf", "vf", "VF, one sample")):
        middle.axhline(per_seed(rows, name, "mixed", n, H).mean(), color=METHOD_COLOURS[colour], linewidth=1.5, label=label)
    middle.set_xscale("log", base=2)
    middle.set_xticks(BUDGETS, BUDGETS)
    middle.set(xlabel="N, traces at test time", ylabel="J = E[(H - t)/H], new prompts", title=f"Mixed base, n = {n}, H = {H}")
    middle.legend(frameon=False, fontsize=7)
    for mixture, marker in zip(MIXTURES, "osD"):
        for H, size in ((cfg.horizons[0], 5), (cfg.horizons[-1], 10)):
            at = (mixture, cfg.sizes[len(cfg.sizes) // 2], H)
            s, g = per_seed(rows, "sigma", *at), per_seed(rows, "gap", *at)
            right.errorbar(s.mean(), g.mean(), g.std(ddof=1), s.std(ddof=1), color=METHOD_COLOURS["vb_rl"], marker=marker,
                           markersize=size, capsize=2, linestyle="", label=f"{mixture}, H = {H}",
                           markerfacecolor="white" if mixture == "concentrated" else None,
                           alpha=0.5 if mixture == "widest" else 1)
    right.axhline(0, color="#aaaaaa", linewidth=1)
    right.set(xlabel="heterogeneity sigma of the base, tokens", ylabel="VB-RL minus VF, tokens",
              title=f"Heterogeneity, n = {cfg.sizes[len(cfg.sizes) // 2]}")
    right.legend(frameon=False, fontsize=7)
    for axis in (left, middle):
        axis.minorticks_off()
    finish(plt, fig, (left, middle, right), path)
