"""Arms, numbers, table, claims and figure of experiments/reasoning.py, which writes them."""

import itertools
from dataclasses import dataclass, field
from statistics import correlation

from experiments.toolkit import (
    COLOURS,
    accuracy_at,
    finish,
    margin,
    mean_sd,
    pyplot,
    spread,
    together,
    verdict,
)
from infra.runs import mean
from tasks import TaskFlags, get_task


@dataclass(frozen=True)
class Arm:
    label: str
    of: str  # the arm of train_rl.py's comparison that it is
    settings: dict = field(default_factory=dict)
    k: int = 1  # the verifier is read as Best-of-k
    long: bool = False  # goes on until it has sampled what PAV's RL and verifier cost together
    family: str = "pav"  # whose tuned settings it takes
    colour: str = "#7f7f7f"


ARMS = {
    "outcome": Arm(
        "outcome only", "outcome", family="outcome", long=True, colour=COLOURS["outcome"]
    ),
    "pav-k4": Arm("PAV, learned, K=4", "pav", k=4, colour=COLOURS["pav"]),
    "pav-k1": Arm("PAV, learned, K=1", "pav", colour="#56B4E9"),
    "pav-k16": Arm("PAV, learned, K=16", "pav", k=16, colour="#0072B2"),
    "pav-alpha3": Arm("PAV, learned, K=1, alpha 3", "pav", dict(alpha=3.0), colour="#D55E00"),
    "base-k4": Arm("PAV, learned, Best-of-4 of the base", "base-prover", k=4, colour="#332288"),
    "measured-k4": Arm(
        "PAV, measured, K=4", "measured", dict(n_mc=4, prover_k=4), colour="#882255"
    ),
    "measured-k1": Arm("PAV, measured, K=1", "measured", dict(n_mc=16), colour="#AA4499"),
    "exact": Arm("PAV, exact values of the player", "exact", colour="#44AA99"),
    "constant": Arm("control: constant value", "constant", long=True, colour=COLOURS["constant"]),
    "strong": Arm(
        "PAV, learned, clone of the strong player", "strong-prover", colour=COLOURS["strong-prover"]
    ),
    "outcome-prover": Arm(
        "outcome only, from the prover",
        "outcome-prover",
        family="outcome",
        colour=COLOURS["outcome-prover"],
    ),
}


def tokens_at(row, steps):
    """Tokens that a run's policy has sampled after so many steps."""
    return next(e["num_tokens"] for e in row["curve"] if e["step"] == steps)


def at_end(results, name):
    """{(seed, draw): accuracy at the end of the arm's steps, at equal samples}."""
    steps = results["settings"]["steps"]
    rows = [r for r in results["rows"] if r["arm"] == name]
    return {
        (r["seed"], r["draw"]): next(e["eval/accuracy"] for e in r["curve"] if e["step"] == steps)
        for r in rows
    }


def by_seed(values):
    """{(seed, draw): value} -> {seed: mean over its draws}."""
    seeds = sorted({seed for seed, _ in values})
    return {seed: mean(v for (s, _), v in values.items() if s == seed) for seed in seeds}


def equal_tokens(results, name, rival="outcome"):
    """{seed: the rival's accuracy (mean over its draws) once it has sampled as many tokens as the
    arm's RL and its prover together, or at its last step}, for the seeds that both have."""
    out = {}
    steps = results["settings"]["steps"]
    rows = [r for r in results["rows"] if r["arm"] == name]
    for seed in sorted({r["seed"] for r in rows}):
        of_seed = [r for r in rows if r["seed"] == seed]
        cost = mean(tokens_at(r, steps) + r["other_tokens"] for r in of_seed)
        rivals = [r for r in results["rows"] if (r["arm"], r["seed"]) == (rival, seed)]
        if rivals:
            out[seed] = mean(accuracy_at(r["curve"], cost) for r in rivals)
    return out


def minus(a, b):
    """{seed: value} twice -> paired differences over the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def share_of_steps(results, name):
    """{seed: the share of its steps after which the arm is at the level that outcome-only ends with
    at equal total tokens (a mean over draws; linear between evaluations); None: never}."""
    steps = results["settings"]["steps"]
    out = {}
    for seed, level in equal_tokens(results, name).items():
        curves = [r["curve"] for r in results["rows"] if (r["arm"], r["seed"]) == (name, seed)]
        mean_curve = [
            (points[0]["step"], mean(p["eval/accuracy"] for p in points)) for points in zip(*curves)
        ]
        reached = None
        for (s0, a0), (s1, a1) in itertools.pairwise(mean_curve):
            if a1 >= level and reached is None:
                reached = (s0 + (s1 - s0) * max(0.0, level - a0) / max(a1 - a0, 1e-9)) / steps
        out[seed] = reached
    return out


def table(results):
    lines = [
        "| arm | seeds x draws | accuracy at equal samples (sd over seeds) | per seed "
        "| sd of two draws | tokens of RL | tokens in all | outcome only, as many tokens in all "
        "| difference, paired |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    present = [name for name in ARMS if any(r["arm"] == name for r in results["rows"])]
    for name in present:
        values = at_end(results, name)
        ends = by_seed(values)
        steps = results["settings"]["steps"]
        rows = [r for r in results["rows"] if r["arm"] == name]
        rl = mean(tokens_at(r, steps) for r in rows)
        total = rl + mean(r["other_tokens"] for r in rows)
        cells = ["", ""]
        if ARMS[name].long and "pav-k4" in present:
            longer = mean_sd(equal_tokens(results, "pav-k4", name).values())
            cells = [f"itself, as many as K=4: {longer}", ""]
        elif "outcome" in present:
            rival = equal_tokens(results, name)
            cells = [mean_sd(rival.values()), mean_sd(minus(ends, rival), signed=True)]
        lines.append(
            f"| {ARMS[name].label} | {draws_of(values)} | {mean_sd(ends.values())} "
            f"| {each(ends.values())} "
            f"| {two_draws(values)} | {rl / 1e3:.0f}k | {total / 1e3:.0f}k "
            f"| {cells[0]} | {cells[1]} |"
        )
    lines += contrast_lines(results)
    lines += provers_lines(results["provers"])
    lines += foretold_lines(results)
    lines += ["", "Tuning (seed 1000, validation): warm-up, entropy bonus: mean over the run, end"]
    for r in results["tuning"]:
        best = results["best"][r["family"]]
        chosen = all(best[k] == r[k] for k in best)
        lines.append(
            f"* {r['family']}: {r['warmup_steps']}, {r['entropy_coef']:g}: {r['curve_mean']:.3f}, "
            f"{r['accuracy']:.3f}{' (chosen)' if chosen else ''}"
        )
    return "\n".join(lines)


def draws_of(values):
    """{(seed, draw): value} -> "5 x 2" (seeds x draws), or "10, 5 of them twice"."""
    seeds = {seed for seed, _ in values}
    twice = sum(draw == 1 for _, draw in values)
    if 0 < twice < len(seeds):
        return f"{len(seeds)}, {twice} of them twice"
    return f"{len(seeds)} x {2 if twice else 1}"


def two_draws(values):
    """The sd of two draws of RL on one seed's policies, a mean over the seeds that have two."""
    pairs = [[v for (s, _), v in values.items() if s == seed] for seed, draw in values if draw == 1]
    return f"{mean(spread(pair) for pair in pairs):.3f}" if pairs else ""


def each(values, sign=""):
    """One number a seed: "0.45 0.53"."""
    return " ".join(f"{v:{sign}.2f}" for v in values)


# What a pair of arms tells apart, at equal samples.
CONTRASTS = [
    ("pav-k4", "pav-k1", "Best-of-4 of the prover or the prover itself, one verifier"),
    ("pav-k16", "pav-k4", "K = 16 or 4"),
    ("pav-alpha3", "pav-k1", "three times the weight"),
    ("strong", "pav-k1", "a prover that never leaves a winning line, or the usual one"),
    ("base-k4", "pav-k4", "the base or another policy as the prover"),
    ("measured-k4", "pav-k4", "what the fit loses, K = 4"),
    ("measured-k1", "pav-k1", "what the fit loses, K = 1"),
    ("exact", "measured-k1", "the scripted player's values or those of its clone"),
    ("pav-k4", "constant", "is the verifier worth anything"),
    ("base-k4", "constant", "the same of the verifier of the base"),
    ("pav-k4", "outcome-prover", "a verifier of the prover, or RL from its weights"),
]


def contrast_lines(results):
    """Arms against each other, paired over the seeds that both have."""
    ends = {name: by_seed(at_end(results, name)) for name in ARMS}
    lines = []
    for name, rival, question in CONTRASTS:
        if differences := minus(ends[name], ends[rival]):
            lines.append(
                f"* {question}: {ARMS[name].label} minus {ARMS[rival].label} {gap(differences)}"
            )
    title = "At equal samples, paired by seed (sd, half the 95% interval of the mean):"
    return ["", title, "", *lines] if lines else []


def provers_lines(provers):
    """What pav.py said, mean (sd) over the seeds."""
    names = {
        "success_base": "solved by the base",
        "success_prover": "solved by the prover",
        "greedy_base": "solved by the base's likeliest tokens",
        "greedy_prover": "solved by the prover's",
        "solvable_base": "first steps of the base that keep the target reachable",
        "solvable_prover": "first steps of the prover that do",
        "corr_policies": "correlation of the two policies' values after the base's first steps",
        "corr_advantage_exact": "correlation of the verifier's advantage with the player's exact one",
        "corr_first_exact": "the same, first steps, over the batch",
        "corr_first_within_exact": "the same, first steps, within a prompt",
    }
    known = [k for k in names if all(p.get(k) is not None for p in provers)]
    if not provers:
        return []
    return ["", "Who is the prover?", ""] + [
        f"* {names[k]}: {mean_sd([p[k] for p in provers])}" for k in known
    ]


def foretold_lines(results):
    """Does what pav.py says of a verifier tell beforehand what RL will gain by it? Correlation over
    the seeds with the gain of K = 4 over outcome-only at equal total tokens."""
    ends = by_seed(at_end(results, "pav-k4"))
    gains = minus(ends, equal_tokens(results, "pav-k4"))
    lines = []
    for key, truth in (("", "fresh rollouts"), ("_exact", "the player's exact values")):
        said = [p.get(f"corr_first_within{key}") for p in results["provers"]]
        if len(said) == len(gains) > 2 and None not in said:
            lines.append(
                f"* does its correlation within a prompt with {truth} foretell what K=4 gains at "
                f"equal total tokens? Over {len(gains)} seeds the two correlate "
                f"{correlation(said, gains):.2f}"
            )
    return lines


def figure(results, path):
    if (plt := pyplot()) is None:
        return
    fig, axes = plt.subplots(1, 2, figsize=(11, 5.2), constrained_layout=True, sharey=True)
    for name in ARMS:
        rows = [r for r in results["rows"] if r["arm"] == name]
        if not rows:
            continue
        steps = [e["step"] for e in rows[0]["curve"]]
        accuracy = [[e["eval/accuracy"] for e in r["curve"]] for r in rows]
        middle = [mean(column) for column in zip(*accuracy)]
        tokens = [
            mean(c) / 1e6 for c in zip(*[[e["num_tokens"] for e in r["curve"]] for r in rows])
        ]
        other = mean(r["other_tokens"] for r in rows) / 1e6
        style = {"measured": "--", "exact": ":", "constant": "-."}.get(ARMS[name].of, "-")
        if "measured" in name:  # paid at every step, not before the first
            in_all = [t + other * s / steps[-1] for t, s in zip(tokens, steps)]
        else:
            in_all = [t + other for t in tokens]
        for axis, x in zip(axes, (tokens, in_all)):
            label = f"{ARMS[name].label} (n={len({r['seed'] for r in rows})})"
            axis.plot(x, middle, style, color=ARMS[name].colour, label=label)
        if name in ("outcome", "pav-k4"):
            for curve in accuracy:
                axes[0].plot(tokens, curve, color=ARMS[name].colour, alpha=0.25, linewidth=0.8)
    axes[0].set(
        xlabel="tokens sampled in RL, millions", ylabel="sampled accuracy, test", ylim=(0, None)
    )
    axes[1].set(xlabel="all sampled tokens, the prover's counted, millions")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    finish(plt, fig, axes, path)


def claims_of(results):
    """The claims of a result file: what progress is worth, and whether Best-of-K makes the prover."""
    present = [n for n in ARMS if any(r["arm"] == n for r in results["rows"])]
    if not {"outcome", "pav-k4"} <= set(present):
        return []
    ends = {n: by_seed(at_end(results, n)) for n in present}
    claims = [progress_claim(results, ends)]
    if "pav-k1" in present:
        claims.append(prover_claim(results, ends))
    if "base-k4" in present:
        claims.append(self_claim(results, ends))
    return claims


def gap(differences):
    """Paired differences over seeds: "+0.095 (0.089, 95% +-0.111)": mean, sd, half its interval."""
    return f"{mean(differences):+.3f} ({spread(differences):.3f}, 95% +-{margin(differences):.3f})"


def against_rivals(results, ends, name):
    """An arm minus outcome-only and, where it ran, minus the control that says 0.5, both at equal
    samples and at equal total tokens -> (in words, the verdict). The control can take a "yes" away
    and gives nothing: it may collapse by itself, as on grid."""
    words = []
    verdicts = {}
    for rival, title in (("outcome", "outcome-only"), ("constant", "a verifier that says 0.5")):
        if rival not in ends:
            continue
        samples = minus(ends[name], ends[rival])
        total = minus(ends[name], equal_tokens(results, name, rival))
        words.append(
            f"minus {title} {gap(samples)} at equal samples, {gap(total)} at equal total tokens "
            f"(per seed {each(total, '+')})"
        )
        later = minus(later_seeds(results, ends[name]), equal_tokens(results, name, rival))
        if rival == "outcome" and len(later) > 1:
            words[-1] += f", of which the {len(later)} seeds added later {gap(later)}"
        verdicts[rival] = together([verdict(samples), verdict(total)])
    holds = verdicts["outcome"]
    if holds is True and verdicts.get("constant", True) is not True:
        holds = "partly"
    return "; ".join(words), holds


def later_seeds(results, values):
    """{seed: value} -> those of --more-seeds, which were run once the others had been looked at."""
    first = results["settings"].get("seeds", 0)
    return {seed: v for seed, v in values.items() if first and seed >= first}


def self_claim(results, ends):
    """Is Best-of-4 of the base itself prover enough? ends: {arm: {seed: accuracy}}."""
    words, holds = against_rivals(results, ends, "base-k4")
    other = minus(ends["base-k4"], ends["pav-k4"])
    return dict(
        paper="2410.08146",
        claim="Best-of-K of the base policy itself is a good prover: no stronger policy is needed.",
        short=f"{label_of(results)}: Best-of-4 of the base itself is prover enough",
        measured=f"--task {name_of(results['settings'])}, {len(ends['base-k4'])} seeds: Best-of-4 "
        f"of the base {mean_sd(ends['base-k4'].values())}, {words}; minus Best-of-4 of the other "
        f"policy ({len(other)} seeds) {gap(other)}.",
        holds=holds,
        command=results["command"],
        fails_when="",
    )


def progress_claim(results, ends):
    """ends: {arm: {seed: accuracy at equal samples}}."""
    words, holds = against_rivals(results, ends, "pav-k4")
    reach = share_of_steps(results, "pav-k4")
    shares = ", ".join("never" if s is None else f"{s:.2f}" for s in reach.values())
    means = "; ".join(f"{ARMS[n].label} {mean_sd(v.values())}" for n, v in ends.items())
    return dict(
        paper="2410.08146",
        claim="RL that is paid learned progress is 5 to 6 times as sample-efficient as "
        "outcome-reward RL, and ends 6 to 7% more accurate.",
        short=f"{label_of(results)}: learned progress beats the outcome alone, all tokens counted",
        measured=f"--task {name_of(results['settings'])}, {len(ends['pav-k4'])} seeds, each with "
        f"its own base, prover and verifier: PAV (Best-of-4) {words}. It is at the level of the "
        f"longer outcome-only run after these shares of its samples: {shares}. At equal samples: "
        f"{means}.",
        holds=holds,
        command=results["command"],
        fails_when="; ".join(progress_failures(results, ends)),
    )


def progress_failures(results, ends):
    """In words: PAV's other settings at equal total tokens, and RL that starts from the prover."""
    out = []
    others = ", ".join(
        f"{ARMS[n].label} ({len(ends[n])} seeds) minus it "
        f"{gap(minus(ends[n], equal_tokens(results, n)))}"
        for n in ends
        if ARMS[n].of in ("pav", "strong-prover", "measured") and n != "pav-k4"
    )
    if others:
        out.append(f"at equal total tokens, outcome only tuned alike: {others}")
    if "exact" in ends:
        exact = gap(minus(ends["exact"], ends["outcome"]))
        out.append(f"exact values of the scripted player, which cost nothing, minus it {exact}")
    if "outcome-prover" in ends:
        rest = gap(minus(ends["pav-k4"], ends["outcome-prover"]))
        out.append(
            "RL on the outcome alone that starts from the prover's weights needs no verifier: PAV "
            f"(Best-of-4) from the base minus that {rest} at equal samples"
        )
    return out


def name_of(settings):
    """The task, and the base where it is not the task's."""
    base = settings.get("base_strength", -1.0)
    return settings["task"] + (f" --base-strength {base:g}" if base >= 0 else "")


def label_of(results):
    """The same for the index: was the base weaker or stronger than the task's?"""
    task = results["settings"]["task"]
    base = results["settings"].get("base_strength", -1.0)
    if base < 0:
        return task
    usual = get_task(TaskFlags(task=task)).strengths["base"]
    return f"{task}, {'weaker' if base < usual else 'stronger'} base"


def prover_claim(results, ends):
    """ends: {arm: {seed: accuracy at equal samples}}."""
    task = name_of(results["settings"])
    gain = minus(ends["pav-k4"], ends["pav-k1"])
    others = "".join(
        f" {ARMS[n].label} minus K=4: {mean_sd(minus(ends[n], ends['pav-k4']), signed=True)}."
        for n in ("pav-k16", "strong")
        if n in ends
    )
    return dict(
        paper="2410.08146",
        claim="Best-of-K of a policy is a better prover than the policy itself (K = 4 best).",
        short=f"{label_of(results)}: Best-of-4 of the prover is a better prover",
        measured=f"--task {task}, the same verifier read as K=4 minus K=1, {len(gain)} seeds: "
        f"{mean_sd(gain, signed=True)} (per seed {each(gain, '+')}).{others}",
        holds=verdict(gain),
        command=results["command"],
        fails_when="",
    )
