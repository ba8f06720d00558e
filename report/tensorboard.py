"""metrics.jsonl of the runs below a folder -> files for TensorBoard, during or after the runs.

    python -m report.tensorboard runs/planted && tensorboard --logdir runs/planted

Needs the package: pip install tensorboard. wandb and trackio read TensorBoard's files.
"""

import sys
from pathlib import Path

from infra.cli import UserError, script
from infra.runs import read_metrics


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        raise UserError("give one folder: python -m report.tensorboard RUN_DIR")
    runs = sorted(path.parent for path in Path(argv[0]).rglob("metrics.jsonl"))
    if not runs:
        raise UserError(f"{argv[0]} holds no metrics.jsonl; give a run directory, or a folder of them")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard's package is missing: pip install tensorboard") from None
    for run in runs:
        writer = SummaryWriter(run / "tensorboard")
        for row in read_metrics(run):
            for name, value in row.items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, row["step"])
        writer.close()
        print(f"{run}/tensorboard")


if __name__ == "__main__":
    script(main)
