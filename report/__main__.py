"""Read the runs below a directory, print the table, draw the figures. Nothing is computed twice: every number
comes from metrics.jsonl and summary.json of a stage.

    python report.py runs/planted                              # -> report.html, table.md, curves.png, results.json there
    python report.py runs/planted --out docs/results/planted   # ... or elsewhere, to keep
"""

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np
import torch

from infra.cli import UserError, script
from infra.runs import mean, read_metrics, write_json
from report.webpage import page

# One colour per method in every figure (Okabe-Ito, safe for colour-blind readers).
COLOURS = {"outcome": "#000000", "outcome-long": "#7f7f7f", "pav": "#009E73", "constant": "#E69F00", "base-prover": "#56B4E9",
           "strong-prover": "#CC79A7", "orm": "#0072B2", "q": "#D55E00", "mrt": "#882255"}
NAMES = {"outcome": "outcome only", "outcome-long": "outcome only, more steps", "pav": "PAV (prover: mid)",
         "constant": "control: constant value", "base-prover": "control: prover = base",
         "strong-prover": "control: prover too strong", "orm": "learned outcome model", "q": "Q as reward",
         "mrt": "MRT (prover: the policy, told to answer)"}
CONTROLS = ("constant", "base-prover", "strong-prover")
# The same for the comparisons of training methods (experiments/negatives.py and others): method -> colour.
METHOD_COLOURS = {"sft": "#000000", "rft": "#E69F00", "dpo_per_step": "#009E73", "dpo_shared_prefix": "#56B4E9",
                  "dpo_whole": "#D55E00", "dpo_random_cut": "#CC79A7", "base": "#7f7f7f", "pav": "#0072B2",
                  "vf": "#000000", "vb_bon": "#009E73", "vb_rl": "#0072B2"}


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
    return {name: arms[name] for name in NAMES if name in arms}


def accuracy_at(evaluations, tokens):
    """Accuracy after so many sampled tokens, linear between evaluations."""
    return float(np.interp(tokens, [r["num_tokens"] for r in evaluations], [r["eval/accuracy"] for r in evaluations]))


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
        lines.append(f"| {NAMES[name]} | {r['seeds']} | {r['accuracy_quarter']:.3f} | {r['accuracy_half']:.3f} | "
                     f"{r['accuracy_budget']:.3f}{sd} | {r['accuracy_end']:.3f} | {r['tokens_end'] / 1e3:.0f}k | "
                     f"{(r['tokens_end'] + r['verifier_tokens']) / 1e3:.0f}k | {f'{mean(corr):.2f}' if corr else ''} |")
    return "\n".join(lines)


def pyplot():
    """matplotlib.pyplot without a window, or None (said on screen) where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish(plt, fig, axes, path):
    """What every figure here ends with: two spines, a faint grid, a file."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    fig.savefig(path, dpi=130)
    plt.close(fig)


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
        label = f"{NAMES[name]} (n={len(runs)})"
        left.plot(x / 1e3, y.mean(0), color=COLOURS[name], label=label, linewidth=2)
        if len(runs) > 1:
            left.fill_between(x / 1e3, y.min(0), y.max(0), color=COLOURS[name], alpha=0.15, linewidth=0)
        for _, e, info, _ in runs:
            points = [(r["eval/verifier_score"], r["eval/accuracy"]) for r in e if "eval/verifier_score" in r]
            if points and (info or name == "constant") and name != "outcome-long":
                a, b = zip(*points)
                right.plot(a, b, color=COLOURS[name], alpha=0.7, linewidth=1)
                right.plot(a[-1], b[-1], "o", color=COLOURS[name], markersize=5)
    left.set(xlabel="sampled tokens, thousands (without the verifier's)", ylabel="sampled accuracy", ylim=(-0.02, 1.02),
             title=title)
    left.legend(frameon=False, fontsize=8)
    right.plot([0, 1], [0, 1], color="#aaaaaa", linestyle=":", linewidth=1)
    right.set(xlabel="verifier's mean score of the same solutions", ylabel="true accuracy", xlim=(-0.02, 1.02),
              ylim=(-0.02, 1.02), title="Goodhart plot: below the diagonal it is fooled")
    finish(plt, fig, (left, right), path)


def reliability_figure(rows, path):
    """rows (mean prediction, mean outcome, count) from pav.reliability: the diagonal is perfect calibration."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(4.2, 4), constrained_layout=True)
    axis.plot([0, 1], [0, 1], color="#aaaaaa", linestyle=":")
    axis.scatter([r[0] for r in rows], [r[1] for r in rows], s=[10 + 6 * np.log1p(r[2]) for r in rows], color=COLOURS["pav"])
    for p, o, n in rows:
        axis.annotate(f"n={n}", (p, o), fontsize=7, xytext=(6, -8), textcoords="offset points")
    axis.set(xlabel="predicted value", ylabel="share of prover rollouts that succeed", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02),
             title="Reliability of the verifier")
    axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


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
    (out / "report.html").write_text(page(f"nanoPAV: {task}", text, arms, NAMES, COLOURS, accuracy_at, root,
                                          f"python report.py {root}"), encoding="utf-8")
    print("\n" + text + f"\n\nto read: {out}/report.html   figure: {out}/curves.png   table: {out}/table.md   "
          f"numbers: {out}/results.json")
    print("metrics of each arm: " + ", ".join(f"{root}/seed*/rl_{a}/metrics.jsonl" for a in rows))


def spread(values):
    """Sample standard deviation over seeds; 0 of one."""
    values = list(values)
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def keep_results(out, text, script, argv, settings, rows):
    """An experiment's table.md and results.json, with the command that made them."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    write_json(out / "results.json", dict(command=" ".join([f"python experiments/{script}", *argv]), machine=machine(),
                                          torch=torch.__version__, settings=vars(settings), rows=rows))


def print_results(text, out, seconds=0, figure="curves", numbers="results"):
    """What every experiment ends with: its table, where the files lie, and what to run next."""
    cost = f"   {seconds / 60:.0f} CPU minutes" if seconds else ""
    print(f"\n{text}\n\nfigure: {out}/{figure}.png   numbers: {out}/{numbers}.json{cost}")
    if str(out).startswith("docs/results"):
        print("next, its claims in README's table:\n  python experiments/claims.py")


def machine():
    """Processor and core count, for the record beside the numbers."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="a directory with seed*/rl_* runs, as train_rl.py makes it")
    parser.add_argument("--out", help="where table, figure and numbers go (default: root)")
    args = parser.parse_args()
    write(args.root, args.out)


if __name__ == "__main__":
    script(main)
