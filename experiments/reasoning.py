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
    base-k4          the same, the verifier being one of the base itself, read as Best-of-4: nothing
                     but the base is needed, no better policy that RL could start from instead
    pav-alpha3       K = 1 with three times the weight: is it the size of the bonus, or its shape?
    constant         a verifier that says 0.5 everywhere, as long as outcome-only: what is left is
                     that the last line is paid the outcome once more (--guards anchor)
    strong           learned progress of the clone of a player that never leaves a winning line
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
equal total tokens (the 95% interval of the paired difference over the seeds).

A killed run goes on with the same command; --arms, --seeds, --draws and --more-seeds may be raised.
"""

import itertools
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import exact_rl
from experiments.reasoning_report import ARMS, claims_of, figure, table
from experiments.toolkit import (
    TUNING,
    comparison,
    evaluations,
    print_results,
    run_missing,
    typed,
    write_results,
)
from infra.cli import opt, parse, script
from infra.runs import mean, read_json, read_metrics, write_json
from model import resolve
from papers import measured
from pipeline import Job, fields_of
from tasks import get_task

MAIN = ["outcome", "pav-k4", "pav-k1"]
VERIFIERS = {"pav": "verifier", "base-prover": "verifier_base", "strong-prover": "verifier_strong"}
SIBLINGS = {"measured": ["-m", "papers.measured"], "exact": ["-m", "experiments.exact_rl"]}


@dataclass
class Config:
    task: str = opt("countdown", "which reasoning task", choices=["countdown", "grid"])
    arms: list = opt(MAIN, "arms to run", choices=list(ARMS))
    seeds: int = opt(5, "each with its own base, prover and verifier", low=1)
    draws: int = opt(2, "runs of RL on each seed's policies", low=1)
    draws_of: list = opt(MAIN, "arms of which --draws runs are made (of others one)", choices=list(ARMS))
    more_seeds: int = opt(0, "further seeds, one run of RL each", low=0)
    more_of: list = opt(MAIN, "arms that run on the further seeds, too", choices=list(ARMS))
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
    of = {ARMS[a].of for a in arms}
    if of & set(SIBLINGS):  # they need the other policy, which is a stage of the arm pav
        of = of - set(SIBLINGS) | {"pav"}
    stages, runs = comparison(
        {"steps", "eval_split", "eval_steps", "eval_problems"},
        task=cfg.task,
        reward="pav" if "pav" in of else "outcome",
        arms=sorted(of),
        seed=seed,
        seeds=seeds,
        run_dir=str(root),
        steps=steps,
        smoke=cfg.smoke,
        eval_split=split,
        eval_steps=evaluate_every,
        eval_problems=16 if cfg.smoke else 1024,
        # Another policy, judged as it is; the arms say what the verifier is read as (read_as).
        stage_flags=json.dumps(dict(verifier=dict(prover="prover", prover_k=1), sft=base)),
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


def wanted(cfg):
    """The runs of RL: (arm, seed, draw)."""
    out = []
    for draw, name, seed in itertools.product(range(cfg.draws), cfg.arms, range(cfg.seeds)):
        if draw == 0 or name in cfg.draws_of:
            out.append((name, seed, draw))
    for name, seed in itertools.product(cfg.arms, range(cfg.more_seeds)):
        if name in cfg.more_of:
            out.append((name, cfg.seeds + seed, 0))
    return out


def run_arms(cfg, root, best):
    """All runs of all seeds -> rows {arm, seed, draw, curve, other_tokens}."""
    stages, runs = plan(cfg, root, 0, cfg.seeds, "test", cfg.steps, 50, cfg.arms)
    if cfg.more_seeds:
        arms = [name for name in cfg.arms if name in cfg.more_of]
        more = plan(cfg, root, cfg.seeds, cfg.more_seeds, "test", cfg.steps, 50, arms)
        stages += more[0]
        runs |= more[1]
    run_missing(stages, cfg.workers, root / "logs")
    jobs = {}
    for name, seed, draw in wanted(cfg):
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
        if ARMS[name].of in VERIFIERS:
            verifier = folder.parent / VERIFIERS[ARMS[name].of]
            extra = read_json(verifier / "summary.json")["sampled_tokens"]
        rows.append(dict(arm=name, seed=seed, draw=draw, curve=curve, other_tokens=extra))
    return rows


def provers(root, seeds):
    """What pav.py said of each seed's policies and verifier, the first of VERIFIERS that there is."""
    beginnings = ("corr_", "success_", "greedy_", "solvable_")
    for name in VERIFIERS.values():
        files = [root / f"seed{seed}" / name / "summary.json" for seed in range(seeds)]
        if said := [read_json(file) for file in files if file.exists()]:
            return [{k: v for k, v in s.items() if k.startswith(beginnings)} for s in said]
    return []


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    name = f"reasoning_{cfg.task}"
    if cfg.base_strength >= 0:
        name += f"_base{cfg.base_strength:g}"  # other policies, so another folder
    root = Path(f"runs/{name}{'_smoke' if cfg.smoke else ''}")
    cfg.out = cfg.out or (str(root / "results") if cfg.smoke else f"docs/results/{name}")
    if cfg.smoke:
        cfg.seeds = cfg.draws = 1
        cfg.more_seeds = min(cfg.more_seeds, 1)
        cfg.steps = cfg.tuning_steps = 2
        cfg.long_steps = 4
        cfg.warmup_steps = [0]
        cfg.entropy_coefs = [0.0]
    best, tuning = tune(cfg, root)
    print(json.dumps(best), flush=True)
    rows = run_arms(cfg, root, best)
    out = Path(cfg.out)
    said = provers(root, cfg.seeds + cfg.more_seeds)
    results = dict(settings=vars(cfg), best=best, tuning=tuning, rows=rows, provers=said)
    text = table(results)
    write_results(
        out,
        text,
        typed("reasoning", argv),
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
