"""Are the runs below two folders the same, bit for bit? For changes that must not change what is learned.

    git worktree add /tmp/old OLD_COMMIT
    (cd /tmp/old && python train_rl.py --reward pav --run-dir /tmp/a)
    python train_rl.py --reward pav --run-dir /tmp/b
    python tests/same_runs.py /tmp/a /tmp/b          # exit code 1 and a line for each difference

Compared are the tensors of the newest checkpoints (weights, moments, value heads) and all numbers of metrics.jsonl that both
write, but for times. A metric that only one side writes is named and is no difference.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TIMES = ("timing/", "tokens_per_second", "step_time")


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def newest(run):
    return max(run.glob("step_*"), key=lambda folder: int(folder.name.split("_")[1]))


def compare_metrics(a, b):
    """Lines that say what differs, and the names that only one side writes."""
    left, right = rows(a), rows(b)
    different = [] if len(left) == len(right) else [f"{len(left)} rows of metrics against {len(right)}"]
    alone = set()
    for x, y in zip(left, right):
        alone |= {k for k in x.keys() ^ y.keys() if not k.startswith(TIMES)}
        names = [k for k in x.keys() & y.keys() if not k.startswith(TIMES) and x[k] != y[k]]
        different += [f"step {x['step']}: {k} {x[k]} against {y[k]}" for k in names]
    return different, alone


def compare_checkpoints(a, b):
    different = []
    for path in sorted(newest(a).glob("*.safetensors")):
        left, right = load_file(path), load_file(newest(b) / path.name)
        same = left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
        different += [] if same else [f"{path.relative_to(a)} differs"]
    return different


def main():
    left, right = map(Path, sys.argv[1:3])
    runs = sorted(p.parent.relative_to(left) for p in left.rglob("metrics.jsonl"))
    bad = 0
    for run in runs:
        other = right / run
        if not (other / "metrics.jsonl").exists():
            print(f"{run}: only in {left}")
            bad += 1
            continue
        different, alone = compare_metrics(left / run, other)
        different += compare_checkpoints(left / run, other)
        bad += len(different)
        words = "the same" if not different else f"{len(different)} differences"
        print(f"{run}: {words}" + (f"; only one side writes {', '.join(sorted(alone))}" if alone else ""))
        print(*(f"  {line}" for line in different[:5]), sep="\n", end="\n" if different else "")
    return 1 if bad or not runs else 0


if __name__ == "__main__":
    sys.exit(main())
