"""Arms, numbers, table, claims and figure of experiments/reasoning.py, which writes them."""

import itertools
from dataclasses import dataclass, field

from experiments.toolkit import (
    COLOURS,
    accuracy_at,
    finish,
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
    "measured-k4": Arm("PAV, measured, K=4", "measured", dict(n_mc=4, prover_k=4), colour="#882255"),
    "measured-k1": Arm("PAV, measured, K=1", "measured", dict(n_mc=16), colour="#AA4499"),
    "exact": Arm("PAV, exact values of the player", "exact", colour="#44AA99"),
    "constant": Arm(
        "control: constant value", "constant", long=True, colour=COLOURS["constant"]
    ),
    "strong": Arm("control: prover too strong", "strong-prover", colour=COLOURS["strong-prover"]),
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
    """{(seed, draw): value} -> [mean over the seed's draws]."""
    seeds = sorted({seed for seed, _ in values})
    return [mean(v for (s, _), v in values.items() if s == seed) for seed in seeds]


def equal_tokens(results, name, rival="outcome"):
    """Per seed: the rival's accuracy (mean over its draws) once it has sampled as many tokens as the
    arm's RL and its prover together, or at its last step."""
    out = []
    steps = results["settings"]["steps"]
    rows = [r for r in results["rows"] if r["arm"] == name]
    for seed in sorted({r["seed"] for r in rows}):
        of_seed = [r for r in rows if r["seed"] == seed]
        cost = mean(tokens_at(r, steps) + r["other_tokens"] for r in of_seed)
        rivals = [r for r in results["rows"] if (r["arm"], r["seed"]) == (rival, seed)]
        out.append(mean(accuracy_at(r["curve"], cost) for r in rivals))
    return out


def share_of_steps(results, name):
    """Per seed: the share of its steps after which the arm is at the level that outcome-only ends
    with at equal total tokens (a mean over draws; linear between evaluations); None: never."""
    steps = results["settings"]["steps"]
    out = []
    for seed, level in enumerate(equal_tokens(results, name)):
        curves = [r["curve"] for r in results["rows"] if (r["arm"], r["seed"]) == (name, seed)]
        mean_curve = [
            (points[0]["step"], mean(p["eval/accuracy"] for p in points)) for points in zip(*curves)
        ]
        reached = None
        for (s0, a0), (s1, a1) in itertools.pairwise(mean_curve):
            if a1 >= level and reached is None:
                reached = (s0 + (s1 - s0) * max(0.0, level - a0) / max(a1 - a0, 1e-9)) / steps
        out.append(reached)
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
        mean_of = by_seed(values)
        steps = results["settings"]["steps"]
        rows = [r for r in results["rows"] if r["arm"] == name]
        rl = mean(tokens_at(r, steps) for r in rows)
        total = rl + mean(r["other_tokens"] for r in rows)
        draws = max(d for _, d in values) + 1
        within = [spread(v for (s, _), v in values.items() if s == seed) for seed in range(len(mean_of))]
        cells = ["", ""]
        if ARMS[name].long and "pav-k4" in present:
            longer = mean_sd(equal_tokens(results, "pav-k4", name))
            cells = [f"itself, as many as K=4: {longer}", ""]
        elif "outcome" in present:
            rival = equal_tokens(results, name)
            cells = [mean_sd(rival), mean_sd([a - b for a, b in zip(mean_of, rival)], signed=True)]
        lines.append(
            f"| {ARMS[name].label} | {len(mean_of)} x {draws} | {mean_sd(mean_of)} "
            f"| {' '.join(f'{v:.2f}' for v in mean_of)} "
            f"| {f'{mean(within):.3f}' if draws > 1 else ''} | {rl / 1e3:.0f}k | {total / 1e3:.0f}k "
            f"| {cells[0]} | {cells[1]} |"
        )
    lines += provers_lines(results["provers"])
    lines += ["", "Tuning (seed 1000, validation): warm-up, entropy bonus: mean over the run, end"]
    for r in results["tuning"]:
        best = results["best"][r["family"]]
        chosen = all(best[k] == r[k] for k in best)
        lines.append(
            f"* {r['family']}: {r['warmup_steps']}, {r['entropy_coef']:g}: {r['curve_mean']:.3f}, "
            f"{r['accuracy']:.3f}{' (chosen)' if chosen else ''}"
        )
    return "\n".join(lines)


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
    return ["", "Who is the prover?", ""] + [
        f"* {names[k]}: {mean_sd([p[k] for p in provers])}" for k in known
    ]


def figure(results, path):
    if (plt := pyplot()) is None:
        return
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True, sharey=True)
    for name in ARMS:
        rows = [r for r in results["rows"] if r["arm"] == name]
        if not rows:
            continue
        steps = [e["step"] for e in rows[0]["curve"]]
        accuracy = [[e["eval/accuracy"] for e in r["curve"]] for r in rows]
        middle = [mean(column) for column in zip(*accuracy)]
        tokens = [mean(c) / 1e6 for c in zip(*[[e["num_tokens"] for e in r["curve"]] for r in rows])]
        other = mean(r["other_tokens"] for r in rows) / 1e6
        if "measured" in name:  # paid at every step, not before the first
            in_all = [t + other * s / steps[-1] for t, s in zip(tokens, steps)]
        else:
            in_all = [t + other for t in tokens]
        for axis, x in zip(axes, (tokens, in_all)):
            axis.plot(x, middle, color=ARMS[name].colour, label=ARMS[name].label)
        if name in ("outcome", "pav-k4"):
            for curve in accuracy:
                axes[0].plot(tokens, curve, color=ARMS[name].colour, alpha=0.25, linewidth=0.8)
    axes[0].set(xlabel="tokens sampled in RL, millions", ylabel="sampled accuracy, test", ylim=(0, None))
    axes[1].set(xlabel="all sampled tokens, the prover's counted, millions")
    axes[0].legend(frameon=False, fontsize=8)
    finish(plt, fig, axes, path)


def minus(a, b):
    """Paired differences, a list a seed."""
    return [x - y for x, y in zip(a, b)]


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


def self_claim(results, ends):
    """Is Best-of-4 of the base itself prover enough? ends: {arm: accuracy of each seed}."""
    task = name_of(results["settings"])
    samples = minus(ends["base-k4"], ends["outcome"])
    total = minus(ends["base-k4"], equal_tokens(results, "base-k4"))
    other = minus(ends["base-k4"], ends["pav-k4"])
    fails = ""
    if "constant" in ends:
        gap = minus(ends["base-k4"], equal_tokens(results, "base-k4", "constant"))
        fails = (
            "the rival is a verifier that says 0.5, for as many tokens in all: minus it "
            f"{mean_sd(gap, signed=True)}"
        )
    return dict(
        paper="2410.08146",
        claim="Best-of-K of the base policy itself is a good prover: no stronger policy is needed.",
        short=f"{label_of(results)}: Best-of-4 of the base itself is prover enough",
        measured=f"--task {task}, {len(total)} seeds: Best-of-4 of the base {mean_sd(ends['base-k4'])}, "
        f"minus outcome-only {mean_sd(samples, signed=True)} at equal samples, "
        f"{mean_sd(total, signed=True)} at equal total tokens (per seed "
        f"{' '.join(f'{d:+.2f}' for d in total)}); minus Best-of-4 of the other policy "
        f"{mean_sd(other, signed=True)}.",
        holds=together([verdict(samples), verdict(total)]),
        command=results["command"],
        fails_when=fails,
    )


def progress_claim(results, ends):
    """ends: {arm: accuracy of each seed at equal samples}."""
    task = name_of(results["settings"])
    total = minus(ends["pav-k4"], equal_tokens(results, "pav-k4"))
    samples = minus(ends["pav-k4"], ends["outcome"])
    reach = share_of_steps(results, "pav-k4")
    shares = ", ".join("never" if s is None else f"{s:.2f}" for s in reach)
    means = "; ".join(f"{ARMS[n].label} {mean_sd(v)}" for n, v in ends.items())
    verdicts = [verdict(samples), verdict(total)]
    control = ""
    if "constant" in ends:
        gap = minus(ends["pav-k4"], ends["constant"])
        longer = minus(ends["pav-k4"], equal_tokens(results, "pav-k4", "constant"))
        verdicts += [verdict(gap), verdict(longer)]
        control = (
            f" Minus the control, a verifier that says 0.5: {mean_sd(gap, signed=True)} at equal "
            f"samples, {mean_sd(longer, signed=True)} at equal total tokens."
        )
    return dict(
        paper="2410.08146",
        claim="RL that is paid learned progress is 5 to 6 times as sample-efficient as "
        "outcome-reward RL, and ends 6 to 7% more accurate.",
        short=f"{label_of(results)}: learned progress beats the outcome alone, all tokens counted",
        measured=f"--task {task}, {len(total)} seeds, each with its own base, prover and verifier: "
        f"PAV (Best-of-4) minus outcome-only {mean_sd(samples, signed=True)} at equal samples, "
        f"{mean_sd(total, signed=True)} at equal total tokens (per seed "
        f"{' '.join(f'{d:+.2f}' for d in total)}). It is at the level of the longer outcome-only "
        f"run after these shares of its samples: {shares}. At equal samples: {means}.{control}",
        holds=together(verdicts),
        command=results["command"],
        fails_when="; ".join(progress_failures(results, ends)),
    )


def progress_failures(results, ends):
    """In words: PAV's other settings at equal total tokens, and RL that starts from the prover."""
    out = []
    others = ", ".join(
        f"{ARMS[n].label} minus it {mean_sd(minus(ends[n], equal_tokens(results, n)), signed=True)}"
        for n in ends
        if ARMS[n].of == "pav" and n != "pav-k4"
    )
    if others:
        out.append(f"at equal total tokens, outcome only tuned alike: {others}")
    if "outcome-prover" in ends:
        gap = minus(ends["pav-k4"], ends["outcome-prover"])
        out.append(
            "RL on the outcome alone that starts from the prover's weights needs no verifier: PAV "
            f"(Best-of-4) from the base minus that {mean_sd(gap, signed=True)} at equal samples"
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
    """ends: {arm: accuracy of each seed at equal samples}."""
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
        f"{mean_sd(gain, signed=True)} (per seed {' '.join(f'{d:+.2f}' for d in gain)}).{others}",
        holds=verdict(gain),
        command=results["command"],
        fails_when="",
    )
