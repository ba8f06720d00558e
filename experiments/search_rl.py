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
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pipeline
from experiments.toolkit import evaluations
from infra.cli import opt, parse, script
from infra.runs import mean, write_json
from train_rl import Config as RLConfig

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


def main():
    cfg = parse(Config, None, __doc__)
    if cfg.smoke:
        cfg.learning_rates = [1e-3]
        cfg.entropy_coefs = [0.0]
        cfg.groups = [8]
        cfg.steps = 2
    root = Path(f"runs/search_{cfg.task}{'_smoke' if cfg.smoke else ''}")
    rl = RLConfig(
        task=cfg.task,
        seed=cfg.seed,
        reward="pav",
        steps=cfg.steps,
        run_dir=str(root),
        smoke=cfg.smoke,
    )
    _, jobs = pipeline.plan(rl, given={"steps"})
    stages = [j for j in jobs if "/rl_" not in j[0]]
    arms = {j[0].split("/rl_")[1]: j for j in jobs if "/rl_" in j[0]}
    grid = list(itertools.product(cfg.learning_rates, cfg.entropy_coefs, cfg.groups))
    where = {}
    for (lr, entropy, group), arm in itertools.product(grid, ARMS):
        _, needs, argv = arms[arm]
        name = f"{arm}/lr{lr:g}_ent{entropy:g}_g{group}"
        where[arm, lr, entropy, group] = run = root / name
        drop = (
            "--learning-rate=",
            "--entropy-coef=",
            "--num-generations=",
            "--num-prompts=",
            "--run-dir=",
        )
        argv = [a for a in argv if not a.startswith(drop)]
        argv += [
            f"--learning-rate={lr}",
            f"--entropy-coef={entropy}",
            f"--num-generations={group}",
            f"--num-prompts={cfg.samples // group}",
            f"--run-dir={run}",
        ]
        stages.append((name, needs, argv))
    pipeline.run_jobs(stages, cfg.workers or os.cpu_count() or 1, root / "logs")
    rows = []
    for (arm, lr, entropy, group), run in where.items():
        curve = [r["eval/accuracy"] for r in evaluations(run)]
        rows.append(
            dict(
                arm=arm,
                learning_rate=lr,
                entropy_coef=entropy,
                num_generations=group,
                accuracy=curve[-1],
                curve_mean=round(mean(curve), 4),
            )
        )
    rows.sort(key=lambda r: (r["arm"], -r["curve_mean"]))
    out = Path("docs/results" if not cfg.smoke else root) / f"search_{cfg.task}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        out,
        dict(
            command=f"python -m experiments.search_rl {' '.join(sys.argv[1:])}",
            steps=cfg.steps,
            samples=cfg.samples,
            rows=rows,
        ),
    )
    for arm in ARMS:
        for r in [r for r in rows if r["arm"] == arm][:5]:
            print(json.dumps(r))
    print(f"all {len(rows)} runs: {out}")


if __name__ == "__main__":
    script(main)
