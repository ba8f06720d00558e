"""What every script needs once: seeds, checkpoints that survive kill -9, metrics.jsonl.

Nothing here knows about reasoning or rewards. Two rules carry the whole of "resume":
1. All randomness is a function of (seed, purpose, step): see generator(). There is no generator state to save.
2. A checkpoint is a folder that appears by one rename, so it is either whole or absent.
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from infra import parallel
from infra.cli import UserError

# ----------------------------------------------------------------------------------------------------
# Seeds and devices.


def derive(seed, *purpose):
    """A 63-bit seed for one purpose: derive(0, "rollouts", 17). Other purposes do not move it."""
    text = json.dumps([seed, *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed, *purpose):
    return torch.Generator().manual_seed(derive(seed, *purpose))


def spare_threads(model, threads):
    """A tiny model is slower on two threads than on one (and far slower when another process wants the core):
    without --threads it gets one."""
    if not threads and model.cfg.hidden_size <= 256:
        torch.set_num_threads(1)


def setup(device, threads):
    """Pick the device, fix the thread count (another count adds floats in another order)."""
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    torch.set_float32_matmul_precision("high" if device.startswith("cuda") else "highest")
    device = parallel.join(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # Triton and CUDA graphs take the current one, whatever the tensors are on
    return device


# ----------------------------------------------------------------------------------------------------
# Run directories: config.json written once, step_000100/ checkpoints, metrics.jsonl.


def lock_file(file):
    """Lock an open file for this process; False if another one holds it. The system drops the lock even on kill -9."""
    try:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def open_run(run_dir, cfg, ignore=()):
    """Create or re-enter a run directory. Another process in it, or other settings, are refused.

    Returns a lock that lives as long as the caller keeps it (the kernel drops it even on kill -9); under torchrun it is
    rank 0's, and the others wait for it here.
    """
    lock = _enter(Path(run_dir), cfg, ignore) if parallel.rank() == 0 else None
    parallel.barrier()
    return lock


def _enter(run_dir, cfg, ignore):
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir / ".lock", "w")  # noqa: SIM115 (held for the life of the run)
    if not lock_file(lock):
        raise UserError(f"{run_dir} is in use by another process; wait for it or give another --run-dir")
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in (*ignore, "tensorboard")}
    path = run_dir / "run_config.json"
    if path.exists():
        old = json.loads(path.read_text())
        changed = [k for k in settings if old.get(k, settings[k]) != settings[k]]
        if changed:
            k = changed[0]
            raise UserError(f"{run_dir} holds a run with --{k.replace('_', '-')} {old[k]!r}, not {settings[k]!r}: give "
                            "another --run-dir, or delete that one")
    write_json(path, settings)
    for leftover in run_dir.glob(".tmp-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


def finite(value):
    """NaN and infinity -> null, all the way down: JSON has no words for them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Whole or not at all: a reader never sees half a file. Under torchrun rank 0 alone writes."""
    if parallel.rank():
        return
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(run_dir, step, write, optimizer=None, params=(), state=None, keep=2):
    """run_dir/step_000100/ in one rename. write(folder) puts the model there; the optimizer's moments go
    beside it as safetensors, everything else as JSON. Older checkpoints but `keep` are removed after. Collective under
    torchrun: sharded moments are gathered, and rank 0 writes."""
    moments = {}
    for i, p in enumerate(params):
        for k, v in optimizer.state[p].items():
            v = parallel.full(v.detach())
            if parallel.rank() == 0:
                moments[f"{i}.{k}"] = v.cpu().contiguous()
    final = _write_checkpoint(Path(run_dir), step, write, moments, state, keep) if parallel.rank() == 0 else None
    parallel.barrier()
    return final


def _write_checkpoint(run_dir, step, write, moments, state, keep):
    final, temporary = run_dir / f"step_{step:06d}", run_dir / f".tmp-step_{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        if moments:
            save_file(moments, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(dict(step=step, **(state or {}))) + "\n")
        for path in temporary.iterdir():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"checkpoint {final} could not be written ({e}); the one before it is intact: free some "
                        "space and run the same command again") from None
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    for old in sorted(run_dir.glob("step_*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def require_finite(run_dir, step, grad_norm, batch, learning_rate):
    """Stop the run where the gradient's norm is infinite or not a number. The batch that did it is kept in
    run_dir/bad_batch_000123.safetensors, the last checkpoint stays as it is. batch: {name: tensor}."""
    if math.isfinite(grad_norm):
        return
    path = Path(run_dir) / f"bad_batch_{step:06d}.safetensors"
    if parallel.rank() == 0:
        save_file({k: v.detach().cpu().contiguous() for k, v in batch.items()}, path)
    raise UserError(f"the gradient is not a number at step {step} (norm {grad_norm}); its batch is in {path}, the last "
                    f"checkpoint is intact: lower --learning-rate (now {learning_rate:g}), or look at the batch")


def latest_checkpoint(run_dir):
    """Newest checkpoint folder whose files are whole, or None."""
    for folder in sorted(Path(run_dir).glob("step_*"), reverse=True):
        try:
            json.loads((folder / "state.json").read_text())
            for path in folder.glob("*.safetensors"):
                with safe_open(path, framework="pt"):  # compares the header with the file's length
                    pass
            return folder
        except (OSError, ValueError, SafetensorError):
            print(f"warning: {folder} is incomplete, looking for the one before it", file=sys.stderr)
    return None


def load_state(folder, optimizer=None, params=()):
    """Undo save_checkpoint for the optimizer; returns the JSON state (with its step)."""
    state = json.loads((folder / "state.json").read_text())
    if optimizer is not None:
        try:
            moments = load_file(folder / "optimizer.safetensors")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{folder}/optimizer.safetensors cannot be read ({e}); delete {folder} to go on from "
                            "an earlier step") from None
        fused = any(group.get("fused") for group in optimizer.param_groups)  # counts its steps on the device
        for i, p in enumerate(params):
            mine = {k.split(".", 1)[1]: v for k, v in moments.items() if k.split(".", 1)[0] == str(i)}
            steps = {k: v.to(p.device if fused else "cpu") for k, v in mine.items() if v.dim() == 0}
            optimizer.state[p] = steps | {k: parallel.like(p, v) for k, v in mine.items() if v.dim()}
    return state


class Metrics:
    """metrics.jsonl, one line a step. On resume the lines after the checkpoint are cut off first. tensorboard: the same
    numbers in run_dir/tensorboard too (needs the package of that name)."""

    def __init__(self, run_dir, resume_step=0, tensorboard=False):
        self.path, self.board = Path(run_dir) / "metrics.jsonl", None
        if parallel.rank():
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs the package: pip install tensorboard") from None
            self.board = SummaryWriter(Path(run_dir) / "tensorboard", purge_step=resume_step + 1)
        rows = read_metrics(run_dir) if resume_step and self.path.exists() else []
        rows = [r for r in rows if r["step"] <= resume_step]
        temporary = self.path.with_name(f".tmp-metrics-{os.getpid()}")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
        temporary.replace(self.path)

    def write(self, step, **values):
        if parallel.rank():
            return
        row = finite(dict(step=step) | {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()})
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.board:
            for name, value in row.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)
            self.board.flush()


def read_metrics(run_dir):
    """Rows of metrics.jsonl; a last line cut off by a kill is dropped."""
    rows = []
    for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Laps:
    """Where a step's seconds go: lap(name) books those since the last lap under name. They add up to the whole."""

    def __init__(self, *names):
        self.seconds, self.last = dict.fromkeys(names, 0.0), time.perf_counter()

    def lap(self, name):
        if torch.cuda.is_initialized():  # a GPU's work is booked where it was asked for
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self.last = self.seconds.get(name, 0.0) + now - self.last, now


# ----------------------------------------------------------------------------------------------------
# Progress and jobs.


def progress(iterable, label, total=None, every=10.0):
    """tqdm on a terminal; elsewhere a plain line every `every` seconds."""
    if sys.stderr.isatty() and parallel.rank() == 0:
        try:
            from tqdm import tqdm

            yield from tqdm(iterable, desc=label, total=total, leave=False)
            return
        except ImportError:
            pass
    total = total or (len(iterable) if hasattr(iterable, "__len__") else None)
    last = time.time()
    for i, item in enumerate(iterable):
        yield item
        if time.time() - last > every:
            last = time.time()
            print(f"  {label}: {i + 1}" + (f"/{total}" if total else ""), flush=True)


def shuffled(n, seed, *purpose):
    """A permutation of range(n), the same on every machine."""
    order = list(range(n))
    random.Random(derive(seed, *purpose)).shuffle(order)
    return order


def mean(values):
    values = list(values)
    return float(np.mean(values)) if values else 0.0
