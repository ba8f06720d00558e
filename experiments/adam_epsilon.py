"""A bonus that says nothing is not harmless: what Adam makes of a tiny gradient.

    python -m experiments.adam_epsilon         # about 25 minutes of one core
    python -m experiments.adam_epsilon --smoke # few steps, seconds
    -> docs/results/adam_epsilon/: results.json, table.md, curves.png

On the planted task the controls with an empty process reward (prover = base, whose learned
advantages are around 1e-4; a constant value, whose only bonus is the guards') end *below*
outcome-only. The suspect: Adam divides every gradient by its own size. Where the outcome is silent,
step after step, a bonus is all there is, and however small, it moves the policy by a full learning
rate a step. epsilon is the size below which Adam stops doing that (its default, 1e-8, never does).

Every arm runs at every epsilon, from the same policies and verifiers (those of train_rl.py's own
comparison, built if they are not there), with train_rl.py's settings; test problems are the four
prompts themselves, so nothing is chosen here. What would have falsified the suspicion: an empty
bonus that stays below outcome-only at every epsilon, or one whose gradients are as large as the
outcome's.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from experiments.toolkit import (
    ARM_NAMES,
    COLOURS,
    comparison,
    finish,
    mean_sd,
    print_results,
    pyplot,
    run_missing,
    spread,
    typed,
    write_results,
)
from infra.cli import opt, parse, script
from infra.runs import mean, read_metrics


@dataclass
class Config:
    epsilons: list = opt(
        [1e-8, 1e-7, 1e-6, 1e-5, 1e-4], "of Adam; the first is the default of train_rl.py"
    )
    arms: list = opt(
        ["outcome", "base-prover", "constant"],
        "beside PAV",
        choices=["outcome", "base-prover", "constant", "strong-prover"],
    )
    seeds: int = opt(5, "the whole comparison for each", low=1)
    steps: int = opt(200, "RL steps of every run", low=1)
    workers: int = opt(0, "jobs side by side (0: one per core)", low=0)
    out: str = opt("docs/results/adam_epsilon", "where table, figure and numbers go")
    smoke: bool = opt(False, "two epsilons, one seed, two arms, a few steps")


def look(run):
    """One RL run -> accuracy at its end and averaged, and what its gradients and its entropy
    did. Silent: steps on which no sample was right, so that no group had anything to learn from
    the outcome. (A group that is right throughout has no spread either; its step is not silent.)"""
    rows = read_metrics(run)
    accuracy = [r["eval/accuracy"] for r in rows if "eval/accuracy" in r]
    steps = rows[1:]
    moving = [r for r in steps if r["grad_norm"] > 0]
    silent = [r["grad_norm"] for r in moving if r["rewards/outcome/mean"] == 0]
    return dict(
        end=accuracy[-1],
        curve=accuracy,
        with_gradient=len(moving),
        norm=median(r["grad_norm"] for r in moving) if moving else 0.0,
        silent=len(silent),
        silent_norm=median(silent) if silent else 0.0,
        entropy=[steps[min(t, len(steps)) - 1]["entropy"] for t in (1, 50)],
    )


def table(rows):
    lines = [
        "| arm | Adam's epsilon | accuracy at the end (sd) | per seed | entropy, step 1 | step "
        "50 | steps with a gradient | of them without a right sample | its norm there, median |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        ends = [x["end"] for x in r["runs"]]
        norms = [x["silent_norm"] for x in r["runs"] if x["silent"]]
        cells = [
            ARM_NAMES[r["arm"]],
            f"{r['epsilon']:g}",
            mean_sd(ends, 2),
            " ".join(f"{e:.2f}" for e in ends),
            *(f"{mean(x['entropy'][i] for x in r['runs']):.2f}" for i in (0, 1)),
            *(f"{mean(x[key] for x in r['runs']):.0f}" for key in ("with_gradient", "silent")),
            f"{median(norms):.1g}" if norms else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(rows, path):
    if (plt := pyplot()) is None:
        return
    fig, axis = plt.subplots(figsize=(6.2, 4.2), constrained_layout=True)
    for arm in dict.fromkeys(r["arm"] for r in rows):
        of_arm = [r for r in rows if r["arm"] == arm]
        y = [[x["end"] for x in r["runs"]] for r in of_arm]
        axis.errorbar(
            [r["epsilon"] for r in of_arm],
            [mean(e) for e in y],
            [spread(e) / len(e) ** 0.5 for e in y],
            marker="o",
            capsize=3,
            color=COLOURS[arm],
            label=ARM_NAMES[arm],
        )
    axis.set(
        xscale="log",
        xlabel="Adam's epsilon",
        ylabel="sampled accuracy at the end",
        ylim=(-0.02, 1.02),
        title="--task planted (bars: standard error over seeds)",
    )
    axis.legend(frameon=False, fontsize=8)
    finish(plt, fig, [axis], path)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    name = typed("adam_epsilon", argv)
    root = Path("runs/adam_epsilon")
    stages = Path("runs/planted")
    if cfg.smoke:
        root = Path("runs/adam_epsilon_smoke")
        stages = Path("runs/adam_epsilon_smoke")
        cfg.epsilons = [1e-8, 1e-4]
        cfg.seeds = 1
        cfg.steps = 2
        cfg.out = str(root / "results")
        cfg.arms = ["base-prover"]
    jobs, arms = comparison(
        {"steps"},
        task="planted",
        reward="pav",
        arms=cfg.arms,
        seeds=cfg.seeds,
        steps=cfg.steps,
        run_dir=str(stages),
        smoke=cfg.smoke,
    )
    where = {}
    for job, epsilon in itertools.product(arms, cfg.epsilons):
        seed, arm = job.label.split("/rl_")
        where[arm, epsilon, seed] = run = root / seed / f"{arm}_eps{epsilon:g}"
        config = replace(job.config, adam_epsilon=epsilon, run_dir=str(run))
        jobs.append(replace(job, label=f"{seed}/{run.name}", config=config))
    run_missing(jobs, cfg.workers, root / "logs")
    seeds = sorted({s for _, _, s in where})
    rows = [
        dict(arm=arm, epsilon=e, runs=[look(where[arm, e, s]) for s in seeds])
        for arm in ["pav", *cfg.arms]
        for e in cfg.epsilons
    ]
    out = Path(cfg.out)
    text = table(rows)
    write_results(out, text, name, cfg, rows=rows)
    figure(rows, out / "curves.png")
    print_results(text, out)


if __name__ == "__main__":
    script(main)
