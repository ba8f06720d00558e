"""Tables, figure and claims of experiments/provers.py, from its numbers."""

import math

from experiments.planted_exact import spearman
from experiments.toolkit import finish, mean_sd, pyplot, together, verdict, with_sd


def number(x, digits=3):
    return "" if x is None else f"{x:.{digits}g}"


def exact_table(rows):
    lines = [
        "| prover | its success from the prompt | distinguishability | alignment | predicted "
        "(sum) | measured: first order | a step of size 1 | time to 50% | steps of 0.05 nats to "
        "50% |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [
            number(r[k])
            for k in (
                "success",
                "distinguishability",
                "alignment",
                "predicted",
                "first_order",
                "step_of_one",
                "time_to_half",
                "equal_kl_steps",
            )
        ]
        lines.append(f"| {r['prover']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def correlation_table(exact):
    gains = {
        "first_order": "first order",
        "step_of_one": "a step of size 1",
        "flow": "speed to 50%",
        "equal_kl": "speed to 50%, steps of equal KL",
    }
    groups = {"six letters in 12, base 5": [exact["correlations"]]}
    for name, o in exact["regimes"].items():
        groups.setdefault(
            "the same, repeated letters" if name.startswith("repeated") else name, []
        ).append(o["correlations"])
    lines = [
        "| task | measured gain | distinguishability alone | alignment alone | their sum |",
        "|---|---|---|---|---|",
    ]
    for name, correlations in groups.items():
        for gain, label in gains.items():
            cells = []
            for term in ("distinguishability", "alignment", "predicted"):
                values = [f[f"{term}/{gain}"] for f in correlations]
                cells.append(
                    f"{mean_sd(values, 2)}, {len(values)} patterns"
                    if len(values) > 1
                    else f"{values[0]:.2f}"
                )
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def remark_table(rows):
    lines = [
        "| K | K^2 | distinguishability over that of K = 1, where K Q <= 0.3 | all states | "
        "alignment over that of K = 1, where K Q <= 0.3 | all states |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [
            number(r[f"{term}_{where}"])
            for term in ("distinguishability", "alignment")
            for where in ("small_q", "all")
        ]
        lines.append(f"| {r['K']} | {r['K'] ** 2} | {' | '.join(cells)} |")
    return "\n".join(lines)


HOW = {
    "table": "table, exact",
    "outcome": "transformer",
    "exact": "transformer, exact",
    "learned": "transformer, learned",
}


def runs_table(rows):
    lines = [
        "| policy, values | prover | learning rate | accuracy, averaged over the run (sd) | per "
        "seed | at the end (sd) | corr. of learned with exact A (sd) |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        known = [c for c in r["corr_advantage"] if c is not None and math.isfinite(c)]
        corr = mean_sd(known, 2) if known else ""
        if len(known) < len(r["corr_advantage"]):
            constant = len(r["corr_advantage"]) - len(known)
            corr += f" the verifier is constant on {constant} of {len(r['corr_advantage'])} seeds"
        per_seed = " ".join(f"{v:.2f}" for v in r["per_seed"])
        lines.append(
            f"| {HOW[r['source']]} | {r['prover']} | {r['learning_rate']:g} | "
            f"{with_sd(r['mean'], r['mean_sd'])} | {per_seed} | {with_sd(r['end'], r['end_sd'])} "
            f"| {corr} |"
        )
    return "\n".join(lines)


KINDS = {  # look, name
    "scripted": (dict(marker="o", color="#0072B2"), "scripted prover, strength"),
    "best-of": (dict(marker="s", color="#D55E00"), "Best-of-K of the base, K"),
}
SUCCESS = "success of the prover from the prompt"


def annotate(axis, points):
    """points: [(x, y, text)]"""
    for x, y, text in points:
        offset = dict(xytext=(5, 5), textcoords="offset points")
        axis.annotate(text, (x, y), fontsize=7, **offset)


def strength_of(row):
    return row["prover"].rsplit("-", 1)[1]


def terms_panel(axis, exact):
    """The two terms and the first-order gain against the prover's success."""
    keys = (
        ("distinguishability", "-", "distinguishability"),
        ("alignment", ":", "alignment"),
        ("first_order", "--", "exact gain, first order"),
    )
    for kind, (look, _) in KINDS.items():
        rows = [r for r in exact["rows"] if r["prover"].startswith(kind)]
        x = [r["success"] for r in rows]
        for key, style, label in keys:
            y = [r[key] for r in rows]
            axis.plot(x, y, style, **look, markersize=4, label=f"{label}, {kind}")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel=SUCCESS,
        ylabel="per unit of eta",
        title="The two terms, and the gain (exact)",
    )


def speed_panel(axis, exact, key, value, **words):
    """Time to 50% (value) against key, with outcome-only's as a line."""
    for kind, (look, name) in KINDS.items():
        rows = [r for r in exact["rows"] if r["prover"].startswith(kind)]
        axis.plot([r[key] for r in rows], [r[value] for r in rows], "-", **look, label=name)
        annotate(axis, [(r[key], r[value], strength_of(r)) for r in rows])
    axis.axhline(exact["rows"][0][value], color="#000000", linewidth=1, label="outcome only")
    axis.set(xscale="log", **words)


def runs_panel(axis, exact, rows):
    """Accuracy of the transformer, exact and learned values, and of the table."""
    success = {r["prover"]: r["success"] for r in exact["rows"]}
    looks = (("exact", None, "-"), ("learned", "white", ":"), ("table", "#cccccc", "--"))
    for kind, (look, name) in KINDS.items():
        for source, face, line in looks:
            of = [r for r in rows if r["source"] == source and r["prover"].startswith(kind)]
            of.sort(key=lambda r: success[r["prover"]])
            if not of:
                continue
            x = [success[r["prover"]] for r in of]
            style = dict(markersize=6, capsize=3, markerfacecolor=face or look["color"])
            bars = [r["mean"] for r in of], [r["mean_sd"] for r in of]
            label = f"{HOW[source]}: {name}"
            axis.errorbar(x, *bars, linestyle=line, **look, **style, label=label)
            annotate(axis, [(a, r["mean"], strength_of(r)) for a, r in zip(x, of)])
    plain = [r for r in rows if r["prover"] == "none"]
    for r, line in zip(plain, ("--", "-")):
        policy = "transformer" if r["source"] == "outcome" else r["source"]
        style = dict(color="#000000", linewidth=1, linestyle=line)
        axis.axhline(r["mean"], label=f"outcome only, {policy}", **style)
    axis.set(
        xscale="log",
        xlabel=SUCCESS,
        ylabel="accuracy, mean over the run",
        title="Sampled gradient and Adam (bars: sd over seeds)",
    )


def figure(exact, rows, path):
    if (plt := pyplot()) is None:
        return
    fig, axes = plt.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    terms, time, equal, runs = axes.flat
    terms_panel(terms, exact)
    speed_panel(
        time,
        exact,
        "predicted",
        "time_to_half",
        xlabel="predicted: distinguishability + alignment",
        ylabel="time to 50% (eta times steps)",
        title="Exact, equal step size: stronger is faster",
    )
    speed_panel(
        equal,
        exact,
        "success",
        "equal_kl_steps",
        xlabel=SUCCESS,
        ylabel="steps of 0.05 nats to 50%",
        title="Exact, equal KL: a middle one is fastest",
    )
    runs_panel(runs, exact, rows)
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize=7, handlelength=3)
    finish(plt, fig, axes.flat, path)


def claims_of(results):
    """The sentences for the table of claims, filled with what was measured."""
    exact = results["exact"]
    rows = results["runs"]
    parts = (theory_claim(exact), strength_claim(exact, rows), remark_claim(exact["remark"][-1]))
    return [dict(paper="2410.08146", command=results["command"]) | c for c in parts]


def easy_task(exact):
    return next(iter(exact["regimes"].values()))


def theory_claim(exact):
    paid = [r for r in exact["rows"] if r["success"] is not None]
    share = [r["first_order"] / r["predicted"] for r in paid]
    gap = max(
        abs(r["first_order"] / (r["own_variance"] + r["alignment"]) - 1) for r in exact["rows"]
    )
    c = exact["correlations"]
    easy = easy_task(exact)["correlations"]
    return dict(
        claim="Theorem 3.1: one policy update improves by at least the order of "
        "distinguishability plus alignment.",
        short="Theorem 3.1: distinguishability plus alignment bounds an update's gain from below",
        measured=f"Exact tabular update, {len(paid)} provers: the sum's rank correlation with "
        f"the gain of a step of size 1 is {c['predicted/step_of_one']:.2f}, with the "
        f"speed to 50% {c['predicted/flow']:.2f}; to first order the gain is Var[A^pi] "
        f"+ alignment (within {gap:.1%}) and distinguishability is not in it: gain over "
        f"sum falls from {max(share):.2f} to {min(share):.2f} with the prover's "
        "strength. The alignment's sign is plus.",
        holds=together([c["predicted/step_of_one"] > 0.8, easy["predicted/first_order"] > 0.8]),
        fails_when="the task is easy (four letters in 30): the sum's rank correlation with the "
        f"first-order gain is {easy['predicted/first_order']:.2f}, alignment's alone "
        f"{easy['alignment/first_order']:.2f}.",
    )


def strength_claim(exact, rows):
    """The best scripted prover against the strongest, paired over seeds; and the same in the exact
    flow."""
    by = {r["prover"]: r for r in exact["rows"]}
    how = "exact" if any(r["source"] == "exact" for r in rows) else "table"
    sampled = [r for r in rows if r["source"] == how and r["prover"] != "none"]
    scripts = [r for r in sampled if r["prover"].startswith("scripted")]
    best = max(scripts, key=lambda r: r["mean"])
    strongest = max(scripts, key=lambda r: by[r["prover"]]["success"])
    minus = [a - b for a, b in zip(best["per_seed"], strongest["per_seed"])]
    scripted = [n for n in by if n.startswith("scripted")]
    quickest = by[min(scripted, key=lambda n: by[n]["equal_kl_steps"])]
    strong = by[max(scripted, key=lambda n: by[n]["success"])]
    easy = [r for r in easy_task(exact)["rows"] if r["prover"].startswith("scripted")]
    easy_best = max(easy, key=lambda r: r["step_of_one"])
    measured = [
        sampled_words(by, rows, how, sampled, best, strongest),
        learned_words(rows),
        exact_words(quickest, strong, by["outcome"]),
    ]
    return dict(
        claim="Provers of middle strength are best (planted sub-sequence: 8 to 15 with a base "
        "of 5), too strong ones help less.",
        short="Provers of middle strength are best",
        measured=" ".join(words for words in measured if words),
        holds=together([verdict(minus), strong["time_to_half"] > quickest["time_to_half"]]),
        fails_when="steps are measured in eta, not in KL: then the scale of A^mu counts, and "
        f"time to 50% is {strong['time_to_half']:.1f} with {strong['prover']}, "
        f"{quickest['time_to_half']:.1f} with {quickest['prover']} (on the easy task "
        f"{easy_best['prover']} is best even so).",
    )


def show(r):
    return with_sd(r["mean"], r["mean_sd"], 2)


def sampled_words(by, rows, how, sampled, best, strongest):
    source = "outcome" if how == "exact" else how
    plain = next(r for r in rows if (r["source"], r["prover"]) == (source, "none"))
    means = [r["mean"] for r in sampled]
    rho = spearman([by[r["prover"]]["predicted"] for r in sampled], means)
    rho_kl = spearman([-by[r["prover"]]["equal_kl_steps"] for r in sampled], means)
    words = (
        f"Sampled gradients, {HOW[how]} values, accuracy averaged over the run (sd over "
        f"{len(best['per_seed'])} seeds): {best['prover']} {show(best)}, {strongest['prover']} "
        f"{show(strongest)}, outcome only {show(plain)}; rank correlation with theorem 3.1's sum "
        f"{rho:.2f}, with the exact speed at equal KL {rho_kl:.2f}."
    )
    four = next((r for r in sampled if r["prover"] == "best-of-4"), None)
    if four is None:
        return words
    gap = [a - b for a, b in zip(four["per_seed"], best["per_seed"])]
    return (
        f"{words} Best-of-4 of the base {show(four)}, minus {best['prover']} "
        f"{mean_sd(gap, signed=True)}, paired."
    )


def learned_words(rows):
    learned = [r for r in rows if r["source"] == "learned"]
    if not learned:
        return ""
    each = ", ".join(f"{r['prover']} {show(r)}" for r in learned)
    of_base = [c for r in learned if r["prover"].startswith("best-of") for c in r["corr_advantage"]]
    known = [c for c in of_base if c is not None and math.isfinite(c)]
    words = f"Learned verifiers: {each}."
    if not known:
        return words
    return (
        f"{words} Those of the base have seen hardly any success: their advantage correlates with "
        f"the exact one by {mean_sd(known, 2)}."
    )


def exact_words(quickest, strong, outcome):
    def share(r):
        return f"{r['alignment'] / r['distinguishability']:.2f}"

    return (
        f"Exact gradient, steps of equal KL to 50%: {quickest['prover']} "
        f"{quickest['equal_kl_steps']:.2f}, {strong['prover']} {strong['equal_kl_steps']:.2f}, "
        f"outcome only {outcome['equal_kl_steps']:.2f}. The steps of {strong['prover']} differ "
        f"most of all (distinguishability {strong['distinguishability']:.2f}) but point "
        f"elsewhere: alignment over distinguishability {share(strong)}, of {quickest['prover']} "
        f"{share(quickest)}."
    )


def remark_claim(top):
    """top: the row of the largest K."""
    return dict(
        claim="Remark 3.1: where Q^pi = O(1/K), Best-of-K raises distinguishability by K^2 and "
        "worsens alignment by at most K.",
        short="Remark 3.1: Best-of-K raises distinguishability by K^2",
        measured=f"K = {top['K']} (K^2 = {top['K'] ** 2}), over states with K Q <= 0.3: "
        f"distinguishability times {number(top['distinguishability_small_q'])}, "
        f"alignment times {number(top['alignment_small_q'])}: better, not worse, as "
        "Best-of-K is monotone in Q^pi. Exact, so without a spread.",
        holds=abs((top["distinguishability_small_q"] or 0) / top["K"] ** 2 - 1) < 0.5,
        fails_when="all states are counted: the letter that completes the sequence has Q = 1, "
        f"which is not O(1/K), and K = {top['K']} gives a factor of "
        f"{number(top['distinguishability_all'])}.",
    )
