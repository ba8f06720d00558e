"""Countdown, and why it looked as if no process reward could help.

    python -m experiments.countdown_exact         # 45 minutes of one core, stages included
    python -m experiments.countdown_exact --smoke # few steps, seconds
    -> docs/results/countdown_exact/: results.json, table.md, curves.png

An earlier comparison (128 samples a step, a verifier fitted in 470 steps) moved nothing. Two things
were too small, and the solver says which: with *exact* values of the same prover no verifier can be
to blame. Every arm runs at every batch size and learning rate and the same number of steps, from
the same policies (those of train_rl.py's own comparison, built if they are not there):

    outcome    the grader alone
    pav        the learned verifier of the comparison
    exact      the value of the scripted prover by countdown_values, at every line
               (task.exact_value)

These two have different provers: the verifier learns what the *clone* of that player achieves, who
plays worse. experiments/reasoning.py has the clone's own values, measured (--arms measured-k1),
beside the player's exact ones (--arms exact), and the verifier read as Best-of-4.

What would have falsified it: exact values that do not help at the larger batch either, or all arms
alike.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import train_rl
from experiments.toolkit import (
    COLOURS,
    ExactVerifier,
    accuracy_at,
    comparison,
    evaluations,
    finish,
    mean_sd,
    print_results,
    pyplot,
    quiet,
    run_missing,
    typed,
    write_results,
)
from infra.cli import opt, parse, script
from infra.runs import mean
from tasks import get_task

NAMES = dict(outcome="outcome only", pav="PAV, learned verifier", exact="PAV, exact values")
HUES = dict(outcome=COLOURS["outcome"], pav=COLOURS["pav"], exact=COLOURS["orm"])


@dataclass
class Config:
    seeds: int = opt(3, "the whole comparison for each", low=1)
    prompts: list = opt([16, 64], "prompts a step, of 8 samples each")
    learning_rates: list = opt([3e-4, 1e-3], "of every arm")
    steps: int = opt(300, "RL steps of every run", low=1)
    workers: int = opt(0, "jobs side by side while stages are built (0: one per core)", low=0)
    out: str = opt("docs/results/countdown_exact", "where table, figure and numbers go")
    smoke: bool = opt(False, "one seed, a few steps")


def reinforce(root, pav, arm, prompts, lr):
    """One RL run (or the one that is there) -> its evaluations. pav: the config of the comparison's
    PAV arm."""
    config = replace(
        pav,
        reward="outcome" if arm == "outcome" else "pav",
        verifier=pav.verifier if arm == "pav" else "",
        num_prompts=prompts,
        learning_rate=lr,
        run_dir=f"{root}/seed{pav.seed}/{arm}_{prompts}_lr{lr:g}",
    )
    verifier = None
    if arm == "exact":
        task = get_task(config)
        verifier = ExactVerifier(task, task.tokenizer(), task.strengths["prover"])
    with quiet():
        train_rl.train(config, verifier)
    return [{k: r[k] for k in ("num_tokens", "eval/accuracy")} for r in evaluations(config.run_dir)]


def table(rows):
    lines = [
        "| arm | samples a step | learning rate | tokens of RL | accuracy before (sd over "
        "seeds) | half way | at the end | per seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        at = [
            [accuracy_at(c, c[-1]["num_tokens"] * share) for c in r["curves"]]
            for share in (0, 0.5, 1)
        ]
        cells = [mean_sd(a) for a in at]
        tokens = mean(c[-1]["num_tokens"] for c in r["curves"]) / 1e3
        lines.append(
            f"| {NAMES[r['arm']]} | {r['prompts'] * 8} | {r['learning_rate']:g} | {tokens:.0f}k "
            f"| {' | '.join(cells)} | {' '.join(f'{a:.2f}' for a in at[2])} |"
        )
    return "\n".join(lines)


def figure(rows, path):
    if (plt := pyplot()) is None:
        return
    rates = sorted({r["learning_rate"] for r in rows})
    fig, axes = plt.subplots(
        1,
        len(rates),
        figsize=(5.6 * len(rates), 4.2),
        constrained_layout=True,
        sharey=True,
        squeeze=False,
    )
    for r in rows:
        axis = axes[0, rates.index(r["learning_rate"])]
        steps = torch.linspace(0, 1, 60).tolist()
        y = [mean(accuracy_at(c, c[-1]["num_tokens"] * s) for c in r["curves"]) for s in steps]
        x = [mean(c[-1]["num_tokens"] for c in r["curves"]) * s / 1e3 for s in steps]
        line = ":" if r["prompts"] < max(q["prompts"] for q in rows) else "-"
        axis.plot(
            x,
            y,
            color=HUES[r["arm"]],
            linestyle=line,
            label=f"{NAMES[r['arm']]}, {r['prompts'] * 8} a step",
        )
    for axis, lr in zip(axes[0], rates):
        axis.set(
            xlabel="tokens sampled in RL, thousands (without the verifier's)",
            ylim=(0, None),
            title=f"--task countdown, learning rate {lr:g}",
        )
    axes[0, 0].set(ylabel="sampled accuracy, test")
    axes[0, 0].legend(frameon=False, fontsize=8)
    finish(plt, fig, axes[0], path)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    root = Path("runs/countdown_exact")
    stages = Path("runs/countdown")
    if cfg.smoke:
        root = stages = Path("runs/countdown_exact_smoke")
        cfg.seeds = 1
        cfg.prompts = [2]
        cfg.learning_rates = [1e-3]
        cfg.steps = 2
        cfg.out = str(root / "results")
    stages, arms = comparison(
        {"steps", "eval_split", "eval_steps"},
        task="countdown",
        reward="pav",
        seeds=cfg.seeds,
        steps=cfg.steps,
        run_dir=str(stages),
        smoke=cfg.smoke,
        eval_split="test",
        eval_steps=20,
        stage_flags='{"verifier": {"prover": "prover", "prover_k": 1}}',
    )
    run_missing(stages, cfg.workers, root / "logs")
    configs = [job.config for job in arms if job.label.endswith("/rl_pav")]
    rows = []
    for prompts, lr, arm in itertools.product(cfg.prompts, cfg.learning_rates, NAMES):
        rows.append(
            dict(
                arm=arm,
                prompts=prompts,
                learning_rate=lr,
                curves=[reinforce(root, pav, arm, prompts, lr) for pav in configs],
            )
        )
        print("  " + table(rows[-1:]).splitlines()[-1], flush=True)
    out = Path(cfg.out)
    text = table(rows)
    write_results(
        out,
        text,
        typed("countdown_exact", argv),
        cfg,
        rows=rows,
    )
    figure(rows, out / "curves.png")
    print_results(text, out)


if __name__ == "__main__":
    script(main)
