"""Run directories: a lock, settings, metrics.jsonl, checkpoints that survive kill -9.

    run = Run(cfg)                                    # refuses a folder that is in use, or that holds other settings
    if run.summary: return run.summary                # the folder is complete
    state = run.resume(model, load, make_optimizer)   # weights, moments, step of the newest checkpoint, if there is one
    run.log(step, loss=...)                           # a line of metrics.jsonl
    run.save(step, write, tokens=...)                 # step_000100/, whole or absent
    run.finish(accuracy=...)                          # summary.json

Nothing here knows about reasoning or rewards. Two rules carry the whole of "resume":
1. All randomness is a function of (seed, purpose, step): seeds.py. There is no generator state to save.
2. A checkpoint is a folder that appears by one rename, so it is either whole or absent.
"""

import dataclasses
import json
import math
import os
import re
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
# Devices.


def one_thread_if_tiny(model, threads):
    """A tiny model is slower on two threads than on one (and far slower when another process wants the core):
    without --threads it gets one."""
    if not threads and model.cfg.hidden_size <= 256:
        torch.set_num_threads(1)


def choose_device(device, threads=0):
    """--device -> "cpu", "cuda" or "cuda:N". UserError: another kind, one that is not there, more threads than can be."""
    most = max(64, os.cpu_count() or 1)
    if threads > most:
        raise UserError(f"--threads {threads}: this machine has {os.cpu_count()} cores; give at most {most}")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    name = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if not name:
        raise UserError(f"--device {device} is not supported; use auto, cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is visible; use --device cpu")
    if name[1] and int(name[1]) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, the first is cuda:0")
    return device


def setup(device, threads):
    """Pick the device, fix the thread count (another count adds floats in another order)."""
    device = choose_device(device, threads)
    if threads:
        torch.set_num_threads(threads)
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


def make_folder(folder):
    """mkdir -p. UserError: a file stands in the way, or the place cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"the folder {folder} cannot be made ({e.strerror}); give another place") from None


def lock_folder(folder):
    """Lock a folder for this process -> the lock's open file, to be held. UserError: another process has it."""
    make_folder(folder)
    lock = open(folder / ".lock", "w")  # noqa: SIM115 (held for the life of the run)
    if not lock_file(lock):
        raise UserError(f"{folder} is in use by another process; wait for it or give another --run-dir")
    return lock


def _enter(run_dir, cfg, ignore):
    lock = lock_folder(run_dir)
    for name, old, new in different_settings(run_dir, cfg, ignore):
        raise UserError(f"{run_dir} holds a run with --{name.replace('_', '-')} {old!r}, not {new!r}: give another --run-dir, "
                        f"or delete that one: rm -r {run_dir}")
    write_json(run_dir / "run_config.json", dataclasses.asdict(cfg))
    for leftover in run_dir.glob(".tmp-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


PATHS = ("policy", "prover", "verifier")  # settings that name other runs


def different_settings(run_dir, cfg, ignore=()):
    """[(name, old, new)] of the settings in run_dir/run_config.json that cfg has otherwise; [] where there is none.
    Paths of other runs count as seen from the run's folder: a moved experiment is the same."""
    path = Path(run_dir) / "run_config.json"
    if not path.exists():
        return []
    recorded = read_json(path)

    def seen_from(folder, value):
        return os.path.relpath(value, folder) if value and folder else value

    different = []
    for name, new in dataclasses.asdict(cfg).items():
        old = recorded.get(name, new)
        same = old == new
        if name in PATHS and not same:
            same = seen_from(recorded.get("run_dir"), old) == seen_from(cfg.run_dir, new)
        if name not in (*ignore, "run_dir") and not same:
            different.append((name, old, new))
    return different


def recorded_settings(folder):
    """run_config.json of the run whose folder, or whose checkpoint's folder, this is; {} where there is none."""
    folder = Path(folder)
    for place in (folder, folder.parent):
        if (place / "run_config.json").is_file():
            return read_json(place / "run_config.json")
    return {}


def finite(value):
    """NaN and infinity -> null, all the way down: JSON has no words for them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path):
    """The content of a JSON file. UserError: it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); delete its folder and run that stage again") from None


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


STEP = re.compile(r"step_(\d+)(\.safetensors)?")


def by_step(paths):
    """Those of the paths that are named step_000100 or step_000100.safetensors, the earliest step
    first. By number: as text step_1000000 would come before step_999999."""
    named = [(int(m[1]), p.name, p) for p in paths if (m := STEP.fullmatch(p.name))]
    return [p for *_, p in sorted(named)]


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
    for old in by_step(run_dir.glob("step_*"))[:-keep]:
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
    for folder in reversed(by_step(Path(run_dir).glob("step_*"))):
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
    """metrics.jsonl, one line a step. On resume the lines after the checkpoint are cut off first. Under torchrun rank 0
    alone writes. `python -m report.tensorboard RUN` makes TensorBoard's files of it."""

    def __init__(self, run_dir, resume_step=0):
        self.path = Path(run_dir) / "metrics.jsonl"
        if parallel.rank():
            return
        rows = read_metrics(run_dir) if resume_step and self.path.exists() else []
        rows = [r for r in rows if r["step"] <= resume_step]
        temporary = self.path.with_name(f".tmp-metrics-{os.getpid()}")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
        temporary.replace(self.path)

    def write(self, step, **values):
        if parallel.rank():
            return
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        with open(self.path, "a") as f:
            f.write(json.dumps(finite(dict(step=step) | rounded)) + "\n")


def read_metrics(run_dir):
    """Rows of metrics.jsonl; a last line cut off by a kill is dropped."""
    rows = []
    for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Timer:
    """Where a step's seconds go: mark(name) books the seconds since the last mark under name. They add up to the whole."""

    def __init__(self, *names):
        self.seconds = dict.fromkeys(names, 0.0)
        self.last = time.perf_counter()

    def mark(self, name):
        if torch.cuda.is_initialized():  # a GPU's work is booked where it was asked for
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def metrics(self):
        parts = {f"timing/{name}": seconds for name, seconds in self.seconds.items()}
        return parts | dict(step_time=sum(self.seconds.values()))


class Run:
    """A run directory as a script sees it. What is trained in it, it does not know.

    cfg: a script's config with run_dir; ignore: settings that another process of the same run may change. summary is what
    finish() wrote, or None. UserError: the folder is in use, or holds a run with other settings.
    """

    def __init__(self, cfg, ignore=("run_dir", "device")):
        self.folder = Path(cfg.run_dir)
        self.cfg = cfg
        self.lock = open_run(self.folder, cfg, ignore)  # held as long as this object is
        path = self.folder / "summary.json"
        self.summary = json.loads(path.read_text()) if path.exists() else None
        if self.summary:
            print(f"{self.folder} is complete")

    def resume(self, model, load, make_optimizer):
        """Fill model and optimizer from the newest checkpoint, if there is one; shard the model under --shard.

        load(folder) fills the model; make_optimizer(params) -> optimizer (None: this run has none). Returns the state
        that save() was given, with step (0: a new run) and seconds.
        """
        folder = latest_checkpoint(self.folder)
        if folder:
            load(folder)
        if self.cfg.shard:
            parallel.shard(model)
        self.model = model
        self.params = list(model.parameters())
        self.optimizer = make_optimizer(self.params) if make_optimizer else None
        state = dict(step=0, seconds=0.0)
        if folder:
            state = load_state(folder, self.optimizer, self.params)
            print(f"resuming {self.folder} at step {state['step']}")
        self.began = time.time() - state["seconds"]
        self.metrics = Metrics(self.folder, state["step"] or -1)  # -1: step 0 is logged again
        return state

    def log(self, step, **values):
        """A line of metrics.jsonl."""
        self.metrics.write(step, **values)

    def save(self, step, write, **state):
        """A checkpoint: write(folder, model in one piece) puts the model there."""
        whole = parallel.whole(self.model)
        state["seconds"] = time.time() - self.began
        params = self.params if self.optimizer else ()
        save_checkpoint(self.folder, step, lambda folder: write(folder, whole), self.optimizer, params, state)

    def finish(self, **summary):
        """Write summary.json, the mark of a complete run. Returns it with the seconds that the run took."""
        self.summary = summary | dict(seconds=round(time.time() - self.began, 1))
        write_json(self.folder / "summary.json", self.summary)
        return self.summary


# ----------------------------------------------------------------------------------------------------
# Progress.


def with_progress_bar(iterable, label, total=None, every=10.0):
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


def mean(values):
    values = list(values)
    return float(np.mean(values)) if values else 0.0
