"""Read the runs below a directory, print the table, draw the figures. Nothing is computed twice: every number
comes from metrics.jsonl and summary.json of a stage.

    python report.py runs/planted                              # -> report.html, table.md, curves.png, results.json there
    python report.py runs/planted --out docs/results/planted   # ... or elsewhere, to keep
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from infra.cli import UserError, script
from infra.runs import mean, read_metrics, write_json
from report.arms import ARMS, arm_of, in_order
from report.figures import accuracy_at, finish, machine, pyplot
from report.webpage import page

CONTROLS = [name for name, arm in ARMS.items() if arm.control]


def load_arms(root):
    """root/seedS/rl_ARM -> {arm: [(seed, evaluations, verifier summary or None)]}, complete runs only."""
    arms = {}
    for run in sorted(Path(root).glob("seed*/rl_*")):
        if not (run / "summary.json").exists():
            continue
        evaluations = [r for r in read_metrics(run) if "eval/accuracy" in r]
        config = json.loads((run / "run_config.json").read_text())
        beside = run.parent / Path(config["verifier"]).name / "summary.json"  # the runs may have been moved since
        places = [p for p in (Path(config["verifier"]) / "summary.json", beside) if config["verifier"] and p.exists()]
        info = json.loads(places[0].read_text()) if places else None
        if run.name == "rl_mrt":  # its prover's tokens are sampled during RL
            info = dict(sampled_tokens=json.loads((run / "summary.json").read_text())["mrt_tokens"])
        arms.setdefault(run.name[3:], []).append((run.parent.name, evaluations, info, config))
    if not arms:
        raise UserError(f"{root} holds no finished RL run; start one with train_rl.py --run-dir {root}")
    return {name: arms[name] for name in in_order(list(arms))}


def summarise(arms):
    """Numbers of the table, one dict an arm. The budget is what the shortest run sampled, equal for all; a control whose
    solutions shrink does not shorten it for the others: where it ended earlier, its end counts."""
    compared = [n for n in arms if n not in CONTROLS] or list(arms)
    budget = min(evaluations[-1]["num_tokens"] for name in compared for _, evaluations, *_ in arms[name])
    rows = {}
    for name, runs in arms.items():
        final = [accuracy_at(e, budget) for _, e, *_ in runs]
        paid = name not in ("outcome", "outcome-long")  # whose reward needed the verifier's rollouts
        extra = mean(info["sampled_tokens"] for *_, info, _ in runs if info) if paid and name != "constant" else 0.0
        rows[name] = dict(
            seeds=len(runs),
            budget_tokens=budget,
            accuracy_quarter=mean(accuracy_at(e, budget / 4) for _, e, *_ in runs),
            accuracy_half=mean(accuracy_at(e, budget / 2) for _, e, *_ in runs),
            accuracy_budget=mean(final),
            accuracy_sd=float(np.std(final, ddof=1)) if len(final) > 1 else None,
            accuracy_per_seed=final,
            accuracy_end=mean(e[-1]["eval/accuracy"] for _, e, *_ in runs),
            tokens_end=mean(e[-1]["num_tokens"] for _, e, *_ in runs),
            verifier_tokens=extra,
            corr_advantage_exact=[info.get("corr_advantage_exact") for *_, info, _ in runs if info] if extra else [],
            n=runs[0][3]["eval_problems"],
        )
    return rows


def table(rows):
    """Markdown. Accuracies are sampled (temperature of training); sd is over seeds, not over problems."""
    budget = next(iter(rows.values()))["budget_tokens"]
    lines = [f"| arm | seeds | at {budget / 4e3:.0f}k tokens | at {budget / 2e3:.0f}k | at {budget / 1e3:.0f}k (sd) | its end | "
             "tokens sampled | with the verifier's | corr. of A with exact A |", "|---|---|---|---|---|---|---|---|---|"]
    for name, r in rows.items():
        sd = "" if r["accuracy_sd"] is None else f" ({r['accuracy_sd']:.3f})"
        corr = [c for c in r["corr_advantage_exact"] if c is not None]
        lines.append(f"| {arm_of(name).label} | {r['seeds']} | {r['accuracy_quarter']:.3f} | {r['accuracy_half']:.3f} | "
                     f"{r['accuracy_budget']:.3f}{sd} | {r['accuracy_end']:.3f} | {r['tokens_end'] / 1e3:.0f}k | "
                     f"{(r['tokens_end'] + r['verifier_tokens']) / 1e3:.0f}k | {f'{mean(corr):.2f}' if corr else ''} |")
    return "\n".join(lines)


def figure(arms, path, title):
    """Left: accuracy against sampled tokens, mean over seeds, band from the worst to the best seed. Right: the
    Goodhart plot, what the verifier believes against what is true, one line a seed, a dot where it ends."""
    if (plt := pyplot()) is None:
        return
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for name, runs in arms.items():
        end = min(e[-1]["num_tokens"] for _, e, *_ in runs)
        x = np.linspace(0, end, 200)
        y = np.array([[accuracy_at(e, t) for t in x] for _, e, *_ in runs])
        label = f"{arm_of(name).label} (n={len(runs)})"
        left.plot(x / 1e3, y.mean(0), color=arm_of(name).colour, label=label, linewidth=2)
        if len(runs) > 1:
            left.fill_between(x / 1e3, y.min(0), y.max(0), color=arm_of(name).colour, alpha=0.15, linewidth=0)
        for _, e, info, _ in runs:
            points = [(r["eval/verifier_score"], r["eval/accuracy"]) for r in e if "eval/verifier_score" in r]
            if points and (info or name == "constant") and name != "outcome-long":
                a, b = zip(*points)
                right.plot(a, b, color=arm_of(name).colour, alpha=0.7, linewidth=1)
                right.plot(a[-1], b[-1], "o", color=arm_of(name).colour, markersize=5)
    left.set(xlabel="sampled tokens, thousands (without the verifier's)", ylabel="sampled accuracy", ylim=(-0.02, 1.02),
             title=title)
    left.legend(frameon=False, fontsize=8)
    right.plot([0, 1], [0, 1], color="#aaaaaa", linestyle=":", linewidth=1)
    right.set(xlabel="verifier's mean score of the same solutions", ylabel="true accuracy", xlim=(-0.02, 1.02),
              ylim=(-0.02, 1.02), title="Goodhart plot: below the diagonal it is fooled")
    finish(plt, fig, (left, right), path)


def write(root, out=None):
    """Table, figure and numbers of all finished arms below root, into out (default: root)."""
    root, out = Path(root), Path(out or root)
    out.mkdir(parents=True, exist_ok=True)
    arms = load_arms(root)
    rows = summarise(arms)
    task = next(iter(arms.values()))[0][3]["task"]
    text = table(rows)
    figure(arms, out / "curves.png", f"--task {task}")
    (out / "table.md").write_text(text + "\n")
    curves = {name: {seed: [(r["num_tokens"], r["eval/accuracy"], r.get("eval/verifier_score")) for r in e]
                     for seed, e, *_ in runs} for name, runs in arms.items()}
    settings = {name: runs[0][3] for name, runs in arms.items()}
    write_json(out / "results.json", dict(task=task, arms=rows, machine=machine(), torch=torch.__version__, settings=settings,
                                          curves=curves))
    (out / "report.html").write_text(page(f"nanoPAV: {task}", text, arms, {n: arm_of(n).label for n in arms},
                                          {n: arm_of(n).colour for n in arms}, accuracy_at, root,
                                          f"python report.py {root}"), encoding="utf-8")
    print("\n" + text + f"\n\nto read: {out}/report.html   figure: {out}/curves.png   table: {out}/table.md   "
          f"numbers: {out}/results.json")
    print("metrics of each arm: " + ", ".join(f"{root}/seed*/rl_{a}/metrics.jsonl" for a in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="a directory with seed*/rl_* runs, as train_rl.py makes it")
    parser.add_argument("--out", help="where table, figure and numbers go (default: root)")
    args = parser.parse_args()
    write(args.root, args.out)


if __name__ == "__main__":
    script(main)
