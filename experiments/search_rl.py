"""The search behind the RL settings: every arm gets the same grid, on a seed of its own.

    python -m experiments.search_rl --task planted           # about 5 minutes on 2 cores
    python -m experiments.search_rl --task countdown --samples 512 --groups 4 8 32 \
        --learning-rates 1e-4 3e-4 1e-3 3e-3 --entropy-coefs 0     # about 40 minutes on 2 cores
    -> docs/results/search_TASK.json: accuracy at the end and mean over the curve of every run

The stages (policy, prover, verifier) are built once; the grid is learning rate x entropy bonus x
group size at the same number of samples a step. The table prints the best of each arm;
train_rl.py's defaults are one common setting, chosen so that neither arm loses by it (docs/log.md
says what was chosen and why).
"""

import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.toolkit import comparison, evaluations, run_missing
from infra.cli import opt, parse, script
from infra.runs import mean, write_json

ARMS = ["outcome", "pav"]


@dataclass
class Config:
    task: str = opt("planted", "which embedded task", choices=["planted", "countdown"])
    seed: int = opt(1000, "of the search; the reported runs use 0, 1, 2, ...", low=0)
    learning_rates: list = opt([3e-4, 1e-3, 3e-3], "grid")
    entropy_coefs: list = opt([0.0, 3e-3], "grid")
    groups: list = opt([8, 32], "samples a prompt")
    samples: int = opt(128, "samples a step: prompts times samples a prompt", low=1)
    steps: int = opt(200, "RL steps of every run", low=1)
    workers: int = opt(0, "jobs side by side (0: one per core)", low=0)
    smoke: bool = opt(False, "a grid of one with few steps")


def grid_jobs(cfg, root, arms):
    """arms: the jobs of one comparison's arms. -> (the grid's jobs, {setting: run folder})."""
    job_of = {job.label.split("/rl_")[1]: job for job in arms}
    grid = itertools.product(cfg.learning_rates, cfg.entropy_coefs, cfg.groups)
    runs = {}
    jobs = []
    for (lr, entropy, group), arm in itertools.product(grid, ARMS):
        name = f"{arm}/lr{lr:g}_ent{entropy:g}_g{group}"
        runs[arm, lr, entropy, group] = root / name
        config = replace(
            job_of[arm].config,
            learning_rate=lr,
            entropy_coef=entropy,
            num_generations=group,
            num_prompts=cfg.samples // group,
            run_dir=str(root / name),
        )
        jobs.append(replace(job_of[arm], label=name, config=config))
    return jobs, runs


def row(setting, run):
    """One run's setting and curve -> a row of the results."""
    arm, lr, entropy, group = setting
    curve = [r["eval/accuracy"] for r in evaluations(run)]
    return dict(
        arm=arm,
        learning_rate=lr,
        entropy_coef=entropy,
        num_generations=group,
        accuracy=curve[-1],
        curve_mean=round(mean(curve), 4),
    )


def main():
    cfg = parse(Config, None, __doc__)
    if cfg.smoke:
        vars(cfg).update(learning_rates=[1e-3], entropy_coefs=[0.0], groups=[8], steps=2)
    root = Path(f"runs/search_{cfg.task}{'_smoke' if cfg.smoke else ''}")
    shared = dict(task=cfg.task, seed=cfg.seed, steps=cfg.steps, smoke=cfg.smoke)
    stages, arms = comparison({"steps"}, reward="pav", run_dir=str(root), **shared)
    jobs, runs = grid_jobs(cfg, root, arms)
    run_missing([*stages, *jobs], cfg.workers, root / "logs")
    rows = [row(setting, run) for setting, run in runs.items()]
    rows.sort(key=lambda r: (r["arm"], -r["curve_mean"]))
    out = Path("docs/results" if not cfg.smoke else root) / f"search_{cfg.task}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m experiments.search_rl {' '.join(sys.argv[1:])}"
    write_json(out, dict(command=command, steps=cfg.steps, samples=cfg.samples, rows=rows))
    for arm in ARMS:
        for r in [r for r in rows if r["arm"] == arm][:5]:
            print(json.dumps(r))
    print(f"all {len(rows)} runs: {out}")


if __name__ == "__main__":
    script(main)
