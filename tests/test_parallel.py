"""N processes are one process: rows are shared out and gathered whole, and runs under torchrun (gloo) end as one ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import tiny_model

from infra import parallel
from infra.runs import read_metrics, setup
from model import save_model
from pav import padded_share
from tasks import get_task
from verifier import Verifier, save_verifier

ROOT = Path(__file__).parent.parent
RL = ["train_rl.py", "--reward", "pav", "--num-prompts", "4", "--num-generations", "4", "--steps", "4", "--save-steps", "2",
      "--eval-steps", "2", "--eval-problems", "7", "--beta", "0.1", "--entropy-coef", "0.01", "--num-iterations", "2",
      "--micro-batch-size", "3"]
SFT = ["train_sft.py", "--steps", "6", "--num-examples", "40", "--batch-size", "8", "--hidden-size", "16", "--save-steps", "3",
       "--logging-steps", "1", "--eval-problems", "7"]
PAV = ["pav.py", "--num-problems", "18", "--n-mc", "2", "--cuts", "2", "--shard-problems", "6", "--epochs", "3", "--batch-size",
       "7", "--eval-problems", "8", "--eval-mc", "2", "--save-steps", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A policy and a verifier of the planted task."""
    home = tmp_path_factory.mktemp("parallel")
    tokenizer = get_task("planted", planted=2).tokenizer()
    save_model(home / "policy", tiny_model(vocab=tokenizer.n_vocab), tokenizer)
    verifier = Verifier(tiny_model(1, vocab=tokenizer.n_vocab), fingerprint=tokenizer.fingerprint)
    torch.nn.init.normal_(verifier.head.weight, generator=torch.Generator().manual_seed(0))
    (home / "verifier").mkdir()
    save_verifier(home / "verifier", verifier, tokenizer, {})
    return home


def command(home, argv, run, n, *more):
    argv = [*argv, *more, "--run-dir", str(run), "--device", "cpu", "--threads", "1", "--task-args", "length=2"]
    if argv[0] != "train_sft.py":
        argv += ["--policy", str(home / "policy")]
    if argv[0] == "train_rl.py":
        argv += ["--verifier", str(home / "verifier")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)] if n > 1 else []
    return [sys.executable, *torchrun, *argv]


def execute(*args):
    done = subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same(a, b):
    """Final weights and metrics of two runs, but for the clock; float32 additions in another order."""
    def last(run):
        return load_file(max(run.glob("step_*")) / "model.safetensors")

    for name, tensor in last(a).items():
        torch.testing.assert_close(tensor, last(b)[name], rtol=2e-3, atol=2e-4)
    rows_a, rows_b = read_metrics(a), read_metrics(b)
    assert len(rows_a) == len(rows_b)
    for x, y in zip(rows_a, rows_b):
        for k in set(x) | set(y):
            if not k.startswith(("timing/", "step_time", "tokens_per_second", "sampling/")):
                assert x[k] == pytest.approx(y[k], rel=2e-3, abs=2e-4), k


def test_shares_are_whole_and_in_order(monkeypatch):
    for n, s in [(7, 3), (2, 4), (0, 2), (8, 2)]:
        monkeypatch.setattr(parallel, "size", lambda s=s: s)
        assert [i for r in range(s) for i in parallel.share(n, r)] == list(range(n))


@pytest.mark.parametrize("n", [1, 5, 6])
def test_dealt_rows_are_as_many_everywhere_and_each_counts_once(monkeypatch, n):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    found = []
    for r in range(3):
        monkeypatch.setattr(parallel, "rank", lambda r=r: r)
        found.append(padded_share(n))
    assert len({len(rows) for rows, _ in found}) == 1
    counted = [int(i) for rows, real in found for i, x in zip(rows, real[:, 0]) if x]
    assert sorted(counted) == list(range(n))


@pytest.mark.parametrize("argv", [RL, SFT, PAV], ids=lambda a: a[0])
def test_two_processes_are_one_sharded_or_not(home, tmp_path, argv):
    alone = execute(home, argv, tmp_path / "one", 1)
    out = execute(home, argv, tmp_path / "two", 2)
    same(tmp_path / "one", tmp_path / "two")
    assert out.count("\n") == alone.count("\n") and str(tmp_path / "two") in out  # the other process does not print
    execute(home, argv, tmp_path / "sharded", 2, "--shard")
    same(tmp_path / "one", tmp_path / "sharded")


@pytest.mark.parametrize("ending, code", [("pass", 0), ("raise cli.UserError('to be mended')", 2)])
def test_the_end_is_not_gloos_to_abort(tmp_path, ending, code):
    """A group that is still held when the interpreter ends aborts it, after all is written, with exit code -6."""
    (tmp_path / "go.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from infra import cli, parallel
import torch.distributed as dist

def main():
    parallel.join("cpu")
    sys.held = dist.group.WORLD
    assert parallel.summed(dict(n=1)) == dict(n=2)
    print("all is written")
    {ending}

cli.script(main)
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(tmp_path / "go.py")], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.stdout == "all is written\n" and (done.returncode == 0) == (code == 0), done.stderr
    assert code == 0 or f"exitcode  : {code} " in done.stderr and "terminate called" not in done.stderr, done.stderr


def test_a_killed_rank_ends_the_run_and_it_goes_on_alone(home, tmp_path):
    """Rank 1 is killed after the first checkpoint: torchrun ends rank 0 with an error; one process finishes the run."""
    run = tmp_path / "killed"
    child = subprocess.Popen(command(home, [*RL[:8], "400", *RL[9:]], run, 2), cwd=ROOT, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
    end = time.time() + 120
    while not list(run.glob("step_*")) and time.time() < end and child.poll() is None:
        time.sleep(0.05)
    workers = [int(p.name) for p in Path("/proc").glob("[0-9]*") if parent_of(p) == child.pid]
    assert workers, "no worker to kill"
    os.kill(max(workers), 9)
    assert child.wait(timeout=60) != 0
    kept = json.loads((max(run.glob("step_*")) / "state.json").read_text())["step"]
    settings = json.loads((run / "run_config.json").read_text()) | dict(steps=kept + 2)
    (run / "run_config.json").write_text(json.dumps(settings))
    execute(home, [*RL[:8], str(kept + 2), *RL[9:]], run, 1)
    assert [r["step"] for r in read_metrics(run)] == list(range(kept + 3))


def parent_of(path):
    try:
        return int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return None


def test_batches_that_cannot_be_dealt_are_refused(home, tmp_path):
    argv = command(home, ["train_rl.py", "--num-prompts", "1", "--num-generations", "3"], tmp_path / "x", 2)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode != 0 and "multiple of the 2 processes" in done.stderr and not (tmp_path / "x").exists()


@pytest.mark.parametrize("device, current", [("cuda:1", ["cuda:1"]), ("cuda", [])])
def test_a_second_gpu_becomes_the_current_one(device, current, monkeypatch):
    """--device cuda:1: kernels and graphs go to the current device, so tensors there are not enough."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert setup(device, 0) == device and chosen == current
