"""The report of a run or of a comparison: table, figures and a page, from the files of the runs.

    python -m report runs/planted                             # a comparison: all its finished arms
    python -m report runs/planted/seed0/rl_pav                # one run
    python -m report runs/planted --out docs/results/planted  # written elsewhere, to keep

Written: report.html (for people, self-contained), table.md, curves.png, results.json. Every number
comes from metrics.jsonl and summary.json of a stage; nothing is computed twice. Runs whose settings
differ in more than seed and folders are not averaged (report/runs.py).
"""

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from infra.cli import UserError, opt, parse, script
from infra.runs import mean, write_json
from report.arms import arm_of
from report.figures import accuracy_at, finish, machine, pyplot
from report.runs import commands, load_arms, unequal_arms
from report.statistics import spread
from report.webpage import goodhart_points, learning_curves, learning_label, page, shown_end
from tasks import TaskFlags, get_task

FEW = 30  # problems of a task that the page lists with their answers


@dataclass
class Config:
    run: str = opt("", "folder of a comparison or of one run; the first argument is it, too")
    out: str = opt("", "where table, figures and numbers go (default: that folder)")


# --------------------------------------------------------------------------------------------------
# The table.


def paid_by_verifier(arm, run):
    """Whether the run's reward needed rollouts of a verifier's prover."""
    reward = run.config.get("reward", arm_of(arm).reward)
    return reward != "outcome" and run.config.get("verifier") != "constant"


def summarise(arms):
    """Numbers of the table, one dict an arm. The budget is what the shortest run sampled, equal for
    all; a control whose solutions shrink does not shorten it for the others: where it ended
    earlier, its end counts."""
    compared = [name for name in arms if not arm_of(name).control] or list(arms)
    budget = min(run.evaluations[-1]["num_tokens"] for n in compared for run in arms[n])
    rows = {}
    for name, runs in arms.items():
        curves = [run.evaluations for run in runs]
        at_budget = [accuracy_at(curve, budget) for curve in curves]
        paid = [run.verifier for run in runs if run.verifier and paid_by_verifier(name, run)]
        rows[name] = dict(
            seeds=len(runs),
            budget_tokens=budget,
            accuracy_quarter=mean(accuracy_at(curve, budget / 4) for curve in curves),
            accuracy_half=mean(accuracy_at(curve, budget / 2) for curve in curves),
            accuracy_budget=mean(at_budget),
            accuracy_sd=spread(at_budget) if len(at_budget) > 1 else None,
            accuracy_per_seed=at_budget,
            accuracy_end=mean(curve[-1]["eval/accuracy"] for curve in curves),
            tokens_end=mean(curve[-1]["num_tokens"] for curve in curves),
            verifier_tokens=mean(v.get("sampled_tokens", 0) for v in paid),
            corr_advantage_exact=[v.get("corr_advantage_exact") for v in paid],
            n=runs[0].config.get("eval_problems"),
        )
    return rows


def table(rows):
    """Markdown. Accuracies are sampled at the temperature of training; sd is over seeds, not over
    problems."""
    budget = next(iter(rows.values()))["budget_tokens"] / 1e3
    head = [
        "arm",
        "seeds",
        f"at {budget / 4:.0f}k tokens",
        f"at {budget / 2:.0f}k",
        f"at {budget:.0f}k (sd)",
        "in the end",
        "tokens sampled",
        "with the verifier's",
        "corr. of A with exact A",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, r in rows.items():
        sd = "" if r["accuracy_sd"] is None else f" ({r['accuracy_sd']:.3f})"
        corr = [c for c in r["corr_advantage_exact"] if c is not None]
        cells = [
            arm_of(name).label,
            str(r["seeds"]),
            f"{r['accuracy_quarter']:.3f}",
            f"{r['accuracy_half']:.3f}",
            f"{r['accuracy_budget']:.3f}{sd}",
            f"{r['accuracy_end']:.3f}",
            f"{r['tokens_end'] / 1e3:.0f}k",
            f"{(r['tokens_end'] + r['verifier_tokens']) / 1e3:.0f}k",
            f"{mean(corr):.2f}" if corr else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# curves.png.


def figure(arms, path, title):
    """Left: accuracy against sampled tokens, mean over seeds and each seed. Right: the Goodhart
    plot, V of the verifier against the accuracy of the same solutions, one line a seed, a dot where
    it ends."""
    if (plt := pyplot()) is None:
        return
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    end = shown_end(arms, lambda run: run.evaluations[-1]["num_tokens"])
    for name, runs in arms.items():
        draw_learning(left, name, runs, end)
        for run in runs:
            points = goodhart_points(run)
            if points and run.verifier and not arm_of(name).longer:
                value, accuracy = zip(*points)
                colour = arm_of(name).colour
                right.plot(value, accuracy, color=colour, alpha=0.7, linewidth=1)
                right.plot(value[-1], accuracy[-1], "o", color=colour, markersize=5)
    left.set(
        xlabel="sampled tokens, thousands (without the verifier's)",
        ylabel="sampled accuracy",
        xlim=(0, end / 1e3),
        ylim=(-0.02, 1.02),
        title=title,
    )
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    right.plot([0, 1], [0, 1], color="#aaaaaa", linestyle=":", linewidth=1)
    right.set(
        xlabel="V: the verifier's mean value of the same solutions",
        ylabel="true accuracy",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        title="Goodhart plot: below the diagonal it is fooled",
    )
    finish(plt, fig, (left, right), path)


def draw_learning(axis, name, runs, end):
    """One arm's mean over seeds up to `end` tokens, and thin lines of the seeds."""
    arm = arm_of(name)
    tokens, average, seeds = learning_curves(runs, end)
    x = np.array(tokens) / 1e3
    label = learning_label(name, runs, end)
    style = "--" if arm.longer else "-"
    axis.plot(x, average, style, color=arm.colour, label=label, linewidth=2, zorder=3)
    if len(runs) > 1 and not arm.longer:
        for accuracies in seeds:
            axis.plot(x, accuracies, color=arm.colour, alpha=0.4, linewidth=0.7)


# --------------------------------------------------------------------------------------------------
# What stands beside the numbers.


def task_facts(config):
    """What the page says of the task: dict(name, text, truth, ends_with_eos).

    A task may offer describe() -> a sentence or two for people, and truth() -> [(prompt, answer)],
    what it hides; without truth() the answers of a task of few problems are listed. A task whose
    files are gone costs the page this section and nothing else.
    """
    facts = dict(name=config.get("task", "run"), text=None, truth=[], ends_with_eos=True)
    try:
        known = {f.name for f in dataclasses.fields(TaskFlags)}  # a later flag: its default
        flags = TaskFlags(**{name: value for name, value in config.items() if name in known})
        if flags.task_seed < 0:
            flags.task_seed = config.get("seed", 0)
        task = get_task(flags)
        facts["ends_with_eos"] = getattr(task, "ends_with_eos", True)
        facts["text"] = task.describe() if hasattr(task, "describe") else None
        if hasattr(task, "truth"):
            facts["truth"] = list(task.truth())
        else:
            problems = task.problems("val", None, 0)
            if len(problems) <= FEW:
                facts["truth"] = [(p.prompt, p.answer) for p in problems]
    except (UserError, OSError, AttributeError, KeyError, TypeError) as e:
        print(f"the page says nothing of the task: {e}")
    return facts


def commit():
    """The commit of this code, "+ changes" where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return "unknown commit (git is not installed)"
    if head.returncode:
        return "unknown commit (no git repository)"
    return f"commit {head.stdout.strip()[:12]}" + (" + changes" if changes.stdout.strip() else "")


def command_line(command):
    """A stage's command as one line: argv, a line, or anything else as JSON."""
    if isinstance(command, list):
        return shlex.join(["python", *map(str, command)])
    return command if isinstance(command, str) else json.dumps(command)


def commands_of(root, arms):
    """{stage: command line}: from commands.json where a pipeline wrote it, else the training script
    with every setting of the run."""
    stages = {label: command_line(command) for label, command in commands(root).items()}
    runs = [run for some in arms.values() for run in some]
    if len(runs) == 1 and stages:  # one run: what it was made of, not all that lies beside it
        home = runs[0].folder.resolve().parent.name
        return {k: v for k, v in stages.items() if k.startswith(f"{home}/")} or stages
    if stages:
        return stages
    return {run.folder.name: settings_command(run) for run in runs}


def settings_command(run):
    argv = ["train_rl.py", "--run-dir", str(run.folder)]
    for name, value in run.config.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            argv += [f"--{flag}", *map(str, value)] if value else []
        elif value not in (None, ""):
            argv.append(f"--{flag}={value}")
    return shlex.join(["python", *argv])


def provenance(root, out, arms):
    """What the page and results.json record of the runs and of themselves."""
    day = "%Y-%m-%d %H:%M"
    files = [run.folder / "metrics.jsonl" for runs in arms.values() for run in runs]
    trained = sorted(time.strftime(day, time.localtime(f.stat().st_mtime)) for f in files)
    elsewhere = ["--out", str(out)] if out != root else []
    return dict(
        commit=commit(),
        machine=machine(),
        torch=torch.__version__,
        written=time.strftime(day),
        trained=trained[0] if trained[0] == trained[-1] else f"{trained[0]} to {trained[-1]}",
        command=shlex.join(["python", "-m", "report", str(root), *elsewhere]),
        commands=commands_of(root, arms),
    )


def notes_on(arms):
    """Sentences on arms that differ in more than their reward."""
    out = []
    first = arm_of(next(iter(arms))).label
    for name, changed in unequal_arms(arms).items():
        flags = ", ".join("--" + k.replace("_", "-") for k in changed)
        label = arm_of(name).label
        out.append(f"{label} differs from {first} in {flags} too: not a fair comparison.")
    return out


def write(root, out=None):
    """Table, figure, page and numbers of all finished arms below root, into out (default: root).
    UserError: there is no run, or a file of one is damaged; then nothing is written."""
    root = Path(root)
    out = Path(out or root)
    arms = load_arms(root)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    rows = summarise(arms)
    text = table(rows)
    config = next(iter(arms.values()))[0].config
    task = task_facts(config)
    record = provenance(root, out, arms)
    notes = notes_on(arms)
    html = page(arms, text, task, record, notes)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    write_json(out / "results.json", results(arms, rows, task, record))
    (out / "report.html").write_text(html, encoding="utf-8")
    figure(arms, out / "curves.png", f"--task {task['name']}")
    print("\n" + "\n".join([text, *notes]))
    print(f"\nto read: {out}/report.html   figure: {out}/curves.png   table: {out}/table.md   "
          f"numbers: {out}/results.json")
    folders = {f"{runs[0].folder}/metrics.jsonl" for runs in arms.values()}
    print("metrics of each arm's first seed: " + ", ".join(sorted(folders)))


def results(arms, rows, task, record):
    """The content of results.json: numbers, curves, and the settings of every seed."""
    curves = {
        name: {
            run.seed: [
                (r["num_tokens"], r["eval/accuracy"], r.get("eval/verifier_score"))
                for r in run.evaluations
            ]
            for run in runs
        }
        for name, runs in arms.items()
    }
    settings = {name: {run.seed: run.config for run in runs} for name, runs in arms.items()}
    return dict(task=task["name"], arms=rows, **record, settings=settings, curves=curves)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--run")
    cfg = parse(Config, argv, __doc__)
    if not cfg.run:
        raise UserError("which run? python -m report RUN_DIR, what train_rl.py --run-dir was given")
    write(cfg.run, cfg.out or None)


if __name__ == "__main__":
    script(main)
