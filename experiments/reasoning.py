"""Does a learned process reward help on reasoning, when every sampled token is counted?

    python -m experiments.reasoning --task countdown    # about 4 hours of one core
    python -m experiments.reasoning --task grid
    python -m experiments.reasoning --smoke             # few steps, a minute
    -> docs/results/reasoning_TASK/: results.json, table.md, curves.png

Every seed has a base, a prover and a verifier of its own (train_rl.py's stages), and every arm
starts from that base and takes the same number of samples a step:

    outcome          the grader alone, for as many tokens as PAV's RL and its verifier's rollouts
                     cost together: its accuracy is read at equal samples and at equal total tokens
    pav-k1, k4, k16  learned progress; the one verifier, read as Best-of-K of its prover (eq. 30)
    pav-alpha3       K = 1 with three times the weight: is it the size of the bonus, or its shape?
    constant         a verifier that says 0.5 everywhere, as long as outcome-only: what is left is
                     that the last line is paid the outcome once more (--guards anchor)
    strong           learned progress of a prover that (scripted) never leaves a winning line
    outcome-prover   the grader alone, from the prover's weights: what the prover is worth without
                     a verifier
    measured-k4      the same prover's values measured by rollouts at every step (papers/measured.py,
                     four continuations of each distinct prefix): nothing is learned
    measured-k1      the same for K = 1, from 16 continuations: what the verifier would say if it
                     made no error
    exact            the values of the scripted player whom the prover imitates, by the solver

Outcome-only and PAV choose warm-up and entropy bonus from the same grid, each for itself, on
validation problems of a seed that is not reported; the other process-reward arms take PAV's.

What would have falsified it: PAV not ahead of outcome-only, or of the control that says 0.5, at
equal total tokens by two standard errors over the seeds.

A killed run goes on with the same command; --arms, --seeds and --draws may be raised.
"""

import itertools
import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments import exact_rl
from experiments.toolkit import (
    COLOURS,
    TUNING,
    accuracy_at,
    comparison,
    evaluations,
    finish,
    mean_sd,
    print_results,
    pyplot,
    run_missing,
    spread,
    together,
    verdict,
    write_results,
)
from infra.cli import opt, parse, script
from infra.runs import mean, read_json, read_metrics, write_json
from model import resolve
from papers import measured
from pipeline import Job, fields_of
from tasks import get_task


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
    "measured-k4": Arm("PAV, measured, K=4", "measured", dict(n_mc=4, prover_k=4), colour="#882255"),
    "measured-k1": Arm("PAV, measured, K=1", "measured", dict(n_mc=16), colour="#AA4499"),
    "exact": Arm("PAV, exact values of the player", "exact", colour="#0072B2"),
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

MAIN = ("outcome", "pav-k4", "pav-k1")  # those of which --draws runs are made
SIBLINGS = {"measured": ["-m", "papers.measured"], "exact": ["-m", "experiments.exact_rl"]}


@dataclass
class Config:
    task: str = opt("countdown", "which reasoning task", choices=["countdown", "grid"])
    arms: list = opt(list(MAIN), "arms to run", choices=list(ARMS))
    seeds: int = opt(5, "each with its own base, prover and verifier", low=1)
    draws: int = opt(2, "runs of RL on each seed's policies, of the first three arms", low=1)
    steps: int = opt(300, "RL steps", low=1)
    long_steps: int = opt(
        650, "RL steps of the arms without a verifier: as many as PAV's tokens in all pay for", low=1
    )
    tuning_steps: int = opt(200, "RL steps of a tuning run", low=1)
    warmup_steps: list = opt([0, 30], "grid of both arms")
    entropy_coefs: list = opt([0.0, 3e-3], "grid of both arms")
    base_strength: float = opt(-1.0, "of the base's demonstrator (-1: the task's)", high=1)
    workers: int = opt(0, "jobs side by side (0: one per core)", low=0)
    out: str = opt("", "where the results go (default: docs/results/reasoning_TASK)")
    smoke: bool = opt(False, "one seed, a few steps")


# --------------------------------------------------------------------------------------------------
# Runs.


def plan(cfg, root, seed, seeds, split, steps, evaluate_every, arms):
    """-> the stages' jobs, {label "seedN/rl_ARM" of train_rl.py's comparison: job}."""
    base = dict(strength=cfg.base_strength) if cfg.base_strength >= 0 else {}
    stages, runs = comparison(
        {"steps", "eval_split", "eval_steps", "eval_problems"},
        task=cfg.task,
        reward="pav",
        arms=sorted({ARMS[a].of for a in arms} - set(SIBLINGS)) or ["pav"],
        seed=seed,
        seeds=seeds,
        run_dir=str(root),
        steps=steps,
        smoke=cfg.smoke,
        eval_split=split,
        eval_steps=evaluate_every,
        eval_problems=16 if cfg.smoke else 1024,
        # Judged as its prover is; the arms say what it is read as (read_as).
        stage_flags=json.dumps(dict(verifier=dict(prover_k=1), sft=base)),
    )
    return stages, {job.label: job for job in runs}


def read_as(verifier, k):
    """The folder of the same verifier, read as Best-of-k of its prover: K is applied when a value is
    read (verifier.best_of_k_value), so nothing is fitted again."""
    path = Path(verifier)
    if read_json(path / "run_config.json")["prover_k"] == k:
        return verifier
    out = path.with_name(f"{path.name}_k{k}")
    if not out.exists():
        shutil.copytree(resolve(verifier, verifier=True), out)
        info = read_json(out / "verifier.json")
        write_json(out / "verifier.json", info | dict(prover_k=k))
    return str(out)


def arm_job(name, runs, policies, label, settings):
    """The job of one arm. policies: the seed of its base, prover and verifier, which must be
    complete."""
    arm = ARMS[name]
    job = runs[f"seed{policies}/rl_{'pav' if arm.of in SIBLINGS else arm.of}"]
    home = Path(job.config.run_dir).parent
    config = replace(job.config, run_dir=str(home / label), **settings)
    if arm.of in SIBLINGS:
        cls = measured.Config if arm.of == "measured" else exact_rl.Config
        config = cls(**fields_of(config, cls) | dict(verifier=""))
        if arm.of == "measured":
            config.prover = str(home / "prover")
        else:
            config.strength = get_task(config).strengths["prover"]
        config = replace(config, **arm.settings)
        return Job(f"seed{policies}/{label}", SIBLINGS[arm.of], config, [])
    config = replace(config, **arm.settings)
    if config.reward == "outcome":
        config.verifier = ""
    elif config.verifier != "constant":
        config.verifier = read_as(config.verifier, arm.k)
    return Job(f"seed{policies}/{label}", job.script, config, [])


def tune(cfg, root):
    """{family: settings}: the best of the grid by accuracy averaged over the run, and all of it."""
    stages, runs = plan(cfg, root, TUNING, 1, "val", cfg.tuning_steps, 25, ["outcome", "pav-k4"])
    run_missing(stages, cfg.workers, root / "logs")
    jobs = {}
    for family, name in (("outcome", "outcome"), ("pav", "pav-k4")):
        for warmup, entropy in itertools.product(cfg.warmup_steps, cfg.entropy_coefs):
            setting = dict(warmup_steps=warmup, entropy_coef=entropy)
            label = f"tune_{name}_w{warmup}_e{entropy:g}"
            jobs[family, warmup, entropy] = arm_job(name, runs, TUNING, label, setting)
    run_missing(list(jobs.values()), cfg.workers, root / "logs")
    rows = []
    for (family, warmup, entropy), job in jobs.items():
        curve = [r["eval/accuracy"] for r in evaluations(job.config.run_dir)]
        rows.append(
            dict(
                family=family,
                warmup_steps=warmup,
                entropy_coef=entropy,
                accuracy=curve[-1],
                curve_mean=round(mean(curve), 4),
            )
        )
    best = {}
    for family in ("outcome", "pav"):
        row = max((r for r in rows if r["family"] == family), key=lambda r: r["curve_mean"])
        best[family] = {k: row[k] for k in ("warmup_steps", "entropy_coef")}
    return best, rows


def run_arms(cfg, root, best):
    """All runs of all seeds -> rows {arm, seed, draw, curve, tokens, verifier_tokens}."""
    stages, runs = plan(cfg, root, 0, cfg.seeds, "test", cfg.steps, 50, cfg.arms)
    run_missing(stages, cfg.workers, root / "logs")
    jobs = {}
    for draw, name, seed in itertools.product(range(cfg.draws), cfg.arms, range(cfg.seeds)):
        if draw and name not in MAIN:
            continue
        settings = best[ARMS[name].family] | dict(seed=seed + 100 * draw)
        if ARMS[name].long:
            settings["steps"] = cfg.long_steps
        label = f"rl_{name}_draw{draw}"
        jobs[name, seed, draw] = arm_job(name, runs, seed, label, settings)
    run_missing(list(jobs.values()), cfg.workers, root / "logs")
    rows = []
    for (name, seed, draw), job in jobs.items():
        folder = Path(job.config.run_dir)
        curve = [{k: r[k] for k in ("step", "num_tokens", "eval/accuracy")} for r in evaluations(folder)]
        extra = sum(r.get("measured/sampled_tokens", 0) for r in read_metrics(folder))
        if ARMS[name].of in ("pav", "strong-prover"):
            verifier = "verifier" if ARMS[name].of == "pav" else "verifier_strong"
            extra = read_json(folder.parent / verifier / "summary.json")["sampled_tokens"]
        rows.append(dict(arm=name, seed=seed, draw=draw, curve=curve, other_tokens=extra))
    return rows


def provers(root, seeds):
    """What pav.py said of each seed's policies and verifier."""
    beginnings = ("corr_", "success_", "solvable_")
    out = []
    for seed in range(seeds):
        summary = read_json(root / f"seed{seed}" / "verifier" / "summary.json")
        out.append({k: v for k, v in summary.items() if k.startswith(beginnings)})
    return out


# --------------------------------------------------------------------------------------------------
# Report. Everything below sees the result file alone.


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
        claims.append(prover_claim(results, minus(ends["pav-k4"], ends["pav-k1"])))
    return claims


def progress_claim(results, ends):
    """ends: {arm: accuracy of each seed at equal samples}."""
    task = results["settings"]["task"]
    total = minus(ends["pav-k4"], equal_tokens(results, "pav-k4"))
    samples = minus(ends["pav-k4"], ends["outcome"])
    reach = share_of_steps(results, "pav-k4")
    shares = ", ".join("never" if s is None else f"{s:.2f}" for s in reach)
    means = "; ".join(f"{ARMS[n].label} {mean_sd(v)}" for n, v in ends.items())
    others = ", ".join(
        f"{ARMS[n].label} minus it {mean_sd(minus(ends[n], equal_tokens(results, n)), signed=True)}"
        for n in ends
        if ARMS[n].of == "pav" and n != "pav-k4"
    )
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
        short=f"{task}: learned progress beats the outcome alone, all tokens counted",
        measured=f"--task {task}, {len(total)} seeds, each with its own base, prover and verifier: "
        f"PAV (Best-of-4) minus outcome-only {mean_sd(samples, signed=True)} at equal samples, "
        f"{mean_sd(total, signed=True)} at equal total tokens (per seed "
        f"{' '.join(f'{d:+.2f}' for d in total)}). It is at the level of the longer outcome-only "
        f"run after these shares of its samples: {shares}. At equal samples: {means}.{control}",
        holds=together(verdicts),
        command=results["command"],
        fails_when=f"at equal total tokens, outcome only tuned alike: {others}" if others else "",
    )


def prover_claim(results, gain):
    """gain: accuracy with K = 4 minus K = 1, of each seed."""
    task = results["settings"]["task"]
    return dict(
        paper="2410.08146",
        claim="Best-of-K of a policy is a better prover than the policy itself (K = 4 best).",
        short=f"{task}: Best-of-4 is a better prover than the prover itself",
        measured=f"--task {task}, the same verifier read as K=4 minus K=1, {len(gain)} seeds: "
        f"{mean_sd(gain, signed=True)} (per seed {' '.join(f'{d:+.2f}' for d in gain)}).",
        holds=verdict(gain),
        command=results["command"],
        fails_when="",
    )


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    name = f"reasoning_{cfg.task}"
    if cfg.base_strength >= 0:
        name += f"_base{cfg.base_strength:g}"  # other policies, so another folder
    root = Path(f"runs/{name}{'_smoke' if cfg.smoke else ''}")
    cfg.out = cfg.out or (str(root / "results") if cfg.smoke else f"docs/results/{name}")
    if cfg.smoke:
        cfg.seeds = cfg.draws = 1
        cfg.steps = cfg.tuning_steps = 2
        cfg.long_steps = 4
        cfg.warmup_steps = [0]
        cfg.entropy_coefs = [0.0]
    best, tuning = tune(cfg, root)
    print(json.dumps(best), flush=True)
    rows = run_arms(cfg, root, best)
    out = Path(cfg.out)
    words = " ".join(["reasoning", *(sys.argv[1:] if argv is None else argv)])
    said = provers(root, cfg.seeds)
    results = dict(settings=vars(cfg), best=best, tuning=tuning, rows=rows, provers=said)
    text = table(results)
    write_results(
        out,
        text,
        words,
        cfg,
        claims_of,
        best=best,
        tuning=tuning,
        rows=rows,
        provers=said,
    )
    figure(results, out / "curves.png")
    print_results(text, out)


if __name__ == "__main__":
    script(main)
