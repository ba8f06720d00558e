"""What figures and result files have in common: matplotlib without a window, one colour a method,
the record of machine and command beside every number. The experiments import from here."""

import os
import platform
from pathlib import Path

import numpy as np

from report.arms import ARMS
from report.statistics import spread  # noqa: F401 (the experiments take it from here)

NAMES = {name: arm.label for name, arm in ARMS.items()}
COLOURS = {name: arm.colour for name, arm in ARMS.items()}
# The same for the comparisons of training methods (experiments/negatives.py and others).
METHOD_COLOURS = {
    "sft": "#000000",
    "rft": "#E69F00",
    "rft_early": "#AA4499",
    "dpo_per_step": "#009E73",
    "dpo_shared_prefix": "#56B4E9",
    "dpo_whole": "#D55E00",
    "dpo_random_cut": "#CC79A7",
    "base": "#7f7f7f",
    "pav": "#0072B2",
    "vf": "#000000",
    "vb_bon": "#009E73",
    "vb_rl": "#0072B2",
}


def accuracy_at(evaluations, tokens):
    """Accuracy after so many sampled tokens, linear between evaluations. evaluations: rows of
    metrics.jsonl with num_tokens and eval/accuracy, in order."""
    x = [row["num_tokens"] for row in evaluations]
    y = [row["eval/accuracy"] for row in evaluations]
    return float(np.interp(tokens, x, y))


def pyplot():
    """matplotlib.pyplot without a window; None, with a line on the screen, where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish(plt, fig, axes, path):
    """The end of every figure: two spines, a faint grid, a file."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def machine():
    """Processor and core count, for the record beside the numbers."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def print_results(text, out, seconds=0, figure="curves", numbers="results"):
    """The last lines of every experiment: its table, where the files lie, and what to run next."""
    cost = f"   {seconds / 60:.0f} CPU minutes" if seconds else ""
    print(f"\n{text}\n\nfigure: {out}/{figure}.png   numbers: {out}/{numbers}.json{cost}")
    if str(out).startswith("docs/results"):
        print("next, its claims in README's index and docs/claims.md:\n  python -m report.claims")
