"""Tables, figure and claims of experiments/provers.py, from its numbers; nothing is computed twice."""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from planted_exact import spearman  # noqa: E402

from infra.runs import mean  # noqa: E402
from report.figures import finish, pyplot, spread  # noqa: E402


def number(x, digits=3):
    return "" if x is None else f"{x:.{digits}g}"


def exact_table(rows):
    lines = ["| prover | its success from the prompt | distinguishability | alignment | predicted (sum) | measured: first "
             "order | a step of size 1 | time to 50% | steps of 0.05 nats to 50% |", "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        cells = [number(r[k]) for k in ("success", "distinguishability", "alignment", "predicted", "first_order", "step_of_one",
                                        "time_to_half", "equal_kl_steps")]
        lines.append(f"| {r['prover']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def correlation_table(exact):
    gains = {"first_order": "first order", "step_of_one": "a step of size 1", "flow": "speed to 50%",
             "equal_kl": "speed to 50%, steps of equal KL"}
    groups = {"six letters in 12, base 5": [exact["correlations"]]}
    for name, o in exact["regimes"].items():
        groups.setdefault("the same, repeated letters" if name.startswith("repeated") else name, []).append(o["correlations"])
    lines = ["| task | measured gain | distinguishability alone | alignment alone | their sum |", "|---|---|---|---|---|"]
    for name, found in groups.items():
        for gain, label in gains.items():
            cells = []
            for term in ("distinguishability", "alignment", "predicted"):
                values = [f[f"{term}/{gain}"] for f in found]
                sd = f" ({spread(values):.2f}, {len(values)} patterns)" if len(values) > 1 else ""
                cells.append(f"{mean(values):.2f}{sd}")
            lines.append(f"| {name} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def remark_table(rows):
    lines = ["| K | K^2 | distinguishability over that of K = 1, where K Q <= 0.3 | all states | alignment over that of K = 1, "
             "where K Q <= 0.3 | all states |", "|---|---|---|---|---|---|"]
    for r in rows:
        cells = [number(r[f"{term}_{where}"]) for term in ("distinguishability", "alignment") for where in ("small_q", "all")]
        lines.append(f"| {r['K']} | {r['K'] ** 2} | {' | '.join(cells)} |")
    return "\n".join(lines)


HOW = {"table": "table, exact", "outcome": "transformer", "exact": "transformer, exact", "learned": "transformer, learned"}


def runs_table(rows):
    lines = ["| policy, values | prover | learning rate | accuracy, averaged over the run (sd) | per seed | at the end (sd) "
             "| corr. of learned with exact A (sd) |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        known = [c for c in r["corr_advantage"] if c is not None and math.isfinite(c)]
        corr = f"{mean(known):.2f} ({spread(known):.2f})" if known else ""
        if len(known) < len(r["corr_advantage"]):
            corr += f" the verifier is constant on {len(r['corr_advantage']) - len(known)} of {len(r['corr_advantage'])} seeds"
        per_seed = " ".join(f"{v:.2f}" for v in r["per_seed"])
        lines.append(f"| {HOW[r['source']]} | {r['prover']} | {r['learning_rate']:g} | {r['mean']:.3f} ({r['mean_sd']:.3f}) | "
                     f"{per_seed} | {r['end']:.3f} ({r['end_sd']:.3f}) | {corr} |")
    return "\n".join(lines)


def figure(exact, rows, path):
    """The two terms and the first-order gain against the prover's success; the prediction against the time to 50%; the same
    in steps of equal KL; accuracy of the transformer, exact and learned values."""
    if (plt := pyplot()) is None:
        return
    kinds = {"scripted": dict(marker="o", color="#0072B2"), "best-of": dict(marker="s", color="#D55E00")}
    names = {"scripted": "scripted prover, strength", "best-of": "Best-of-K of the base, K"}
    fig, ((left, middle), (equal, right)) = plt.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    success = {r["prover"]: r["success"] for r in exact["rows"]}
    for kind, look in kinds.items():
        mine = [r for r in exact["rows"] if r["prover"].startswith(kind)]
        x = [r["success"] for r in mine]
        for key, style, label in (("distinguishability", "-", "distinguishability"), ("alignment", ":", "alignment"),
                                  ("first_order", "--", "exact gain, first order")):
            left.plot(x, [r[key] for r in mine], style, **look, markersize=4, label=f"{label}, {kind}")
        middle.plot([r["predicted"] for r in mine], [r["time_to_half"] for r in mine], "-", **look, label=names[kind])
        equal.plot(x, [r["equal_kl_steps"] for r in mine], "-", **look, label=names[kind])
        for axis, key, value in ((middle, "predicted", "time_to_half"), (equal, "success", "equal_kl_steps")):
            for r in mine:
                axis.annotate(r["prover"].rsplit("-", 1)[1], (r[key], r[value]), fontsize=7, xytext=(4, 4),
                              textcoords="offset points")
        for source, face, line in (("exact", None, "-"), ("learned", "white", ":"), ("table", "#cccccc", "--")):
            got = sorted((success[r["prover"]], r["mean"], r["mean_sd"], r["prover"].rsplit("-", 1)[1]) for r in rows
                         if r["source"] == source and r["prover"].startswith(kind))
            if got:
                x, y, sd, tags = zip(*got)
                right.errorbar(x, y, sd, linestyle=line, **look, markersize=6, capsize=3,
                               markerfacecolor=face or look["color"], label=f"{HOW[source]}: {names[kind]}")
                for a, b, tag in zip(x, y, tags):
                    right.annotate(tag, (a, b), fontsize=7, xytext=(5, 5), textcoords="offset points")
    for plain, line in zip((r for r in rows if r["prover"] == "none"), ("--", "-")):
        right.axhline(plain["mean"], color="#000000", linewidth=1, linestyle=line, label=f"outcome only, {plain['source']}"
                      .replace("outcome only, outcome", "outcome only, transformer"))
    left.set(xscale="log", yscale="log", xlabel="success of the prover from the prompt", ylabel="per unit of eta",
             title="The two terms, and the gain (exact)")
    for axis, value in ((middle, "time_to_half"), (equal, "equal_kl_steps")):
        axis.axhline(exact["rows"][0][value], color="#000000", linewidth=1, label="outcome only")
    middle.set(xscale="log", xlabel="predicted: distinguishability + alignment", ylabel="time to 50% (eta times steps)",
               title="Exact, equal step size: stronger is faster")
    equal.set(xscale="log", xlabel="success of the prover from the prompt", ylabel="steps of 0.05 nats to 50%",
              title="Exact, equal KL: a middle one is fastest")
    right.set(xscale="log", xlabel="success of the prover from the prompt", ylabel="accuracy, mean over the run",
              title="Sampled gradient and Adam (bars: sd over seeds)")
    for axis in (left, middle, equal, right):
        axis.legend(frameon=False, fontsize=7, handlelength=3)
    finish(plt, fig, (left, middle, equal, right), path)


def verdict(*tests):
    """True if all of them pass, "partly" if some do, False if none does."""
    return True if all(tests) else "partly" if any(tests) else False


def claims(exact, rows, command):
    """The sentences for README's table of claims, filled with what was measured."""
    by, easy = {r["prover"]: r for r in exact["rows"]}, next(iter(exact["regimes"].values()))
    paid = [r for r in exact["rows"] if r["success"] is not None]
    share = [r["first_order"] / r["predicted"] for r in paid]
    gap = max(abs(r["first_order"] / (r["own_variance"] + r["alignment"]) - 1) for r in exact["rows"])
    c, ec, top = exact["correlations"], easy["correlations"], exact["remark"][-1]
    theory = dict(
        claim="Theorem 3.1: one policy update improves by at least the order of distinguishability plus alignment.",
        measured=f"Exact tabular update, {len(paid)} provers: the sum's rank correlation with the gain of a step of size 1 is "
                 f"{c['predicted/step_of_one']:.2f}, with the speed to 50% {c['predicted/flow']:.2f}; to first order the gain "
                 f"is Var[A^pi] + alignment (within {gap:.1%}) and distinguishability is not in it: gain over sum falls from "
                 f"{max(share):.2f} to {min(share):.2f} with the prover's strength. The alignment's sign is plus.",
        holds=verdict(c["predicted/step_of_one"] > 0.8, ec["predicted/first_order"] > 0.8),
        fails_when=f"the task is easy (four letters in 30): the sum's rank correlation with the first-order gain is "
                   f"{ec['predicted/first_order']:.2f}, alignment's alone {ec['alignment/first_order']:.2f}.")
    of = {(r["source"], r["prover"]): r for r in rows}
    shape = {n: by[n]["equal_kl_steps"] for n in by if n.startswith("scripted")}
    quickest, strong = min(shape, key=shape.get), max(shape, key=lambda n: by[n]["success"])
    show = lambda r: f"{r['mean']:.2f} ({r['mean_sd']:.2f})"  # noqa: E731
    how = "exact" if any(r["source"] == "exact" for r in rows) else "table"
    mine = [r for r in rows if r["source"] == how and r["prover"] != "none"]
    plain = of["outcome" if how == "exact" else how, "none"]
    learned = ", ".join(f"{r['prover']} {show(r)}" for r in rows if r["source"] == "learned")
    scripts = [r for r in mine if r["prover"].startswith("scripted")]
    best, strongest = max(scripts, key=lambda r: r["mean"]), max(scripts, key=lambda r: by[r["prover"]]["success"])
    rho = spearman([by[r["prover"]]["predicted"] for r in mine], [r["mean"] for r in mine])
    rho_kl = spearman([-by[r["prover"]]["equal_kl_steps"] for r in mine], [r["mean"] for r in mine])
    margin = 2 * ((best["mean_sd"] ** 2 + strongest["mean_sd"] ** 2) / len(best["per_seed"])) ** 0.5
    easy_best = max((r for r in easy["rows"] if r["prover"].startswith("scripted")), key=lambda r: r["step_of_one"])
    strength = dict(
        claim="Provers of middle strength are best (planted sub-sequence: 8 to 15 with a base of 5), too strong ones help less.",
        measured=f"Sampled gradients, {HOW[how]} values, accuracy averaged over the run (sd over {len(best['per_seed'])} "
                 f"seeds): {best['prover']} {show(best)}, {strongest['prover']} {show(strongest)}, outcome only {show(plain)}; "
                 f"rank correlation with theorem 3.1's sum {rho:.2f}, with the exact speed at equal KL {rho_kl:.2f}. "
                 + (f"Learned verifiers: {learned}. " if learned else "")
                 + f"Exact gradient, steps of equal KL to 50%: {quickest} {shape[quickest]:.2f}, {strong} {shape[strong]:.2f}, "
                 f"outcome only {by['outcome']['equal_kl_steps']:.2f}.",
        holds=verdict(best["mean"] - strongest["mean"] > margin, by[strong]["time_to_half"] > by[quickest]["time_to_half"]),
        fails_when=f"steps are measured in eta, not in KL: then the scale of A^mu counts, and time to 50% is "
                   f"{by[strong]['time_to_half']:.1f} with {strong}, {by[quickest]['time_to_half']:.1f} with {quickest} (on the "
                   f"easy task {easy_best['prover']} is best even so).")
    remark = dict(
        claim="Remark 3.1: where Q^pi = O(1/K), Best-of-K raises distinguishability by K^2 and worsens alignment by at most K.",
        measured=f"K = {top['K']} (K^2 = {top['K'] ** 2}), over states with K Q <= 0.3: distinguishability times "
                 f"{number(top['distinguishability_small_q'])}, alignment times {number(top['alignment_small_q'])}: better, not "
                 "worse, as Best-of-K is monotone in Q^pi. Exact, so without a spread.",
        holds=abs((top["distinguishability_small_q"] or 0) / top["K"] ** 2 - 1) < 0.5,
        fails_when=f"all states are counted: the letter that completes the sequence has Q = 1, which is not O(1/K), and K = "
                   f"{top['K']} gives a factor of {number(top['distinguishability_all'])}.")
    return [dict(paper="2410.08146", command=command) | c for c in (theory, strength, remark)]
