"""A run that is killed and started again ends with the same bits as one that was not.

Every run is a process of its own: forked from a server that has imported torch once, so that it starts in
milliseconds. It dies by SIGKILL at a file operation counted beforehand (opening, renaming, removing: where a half
state could be left) or at a random moment of the work between them.
"""

import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from toy import ToyTask, tiny_model

from infra import cli
from infra.cli import UserError
from infra.runs import by_step, latest_checkpoint, load_state, open_run, read_metrics, save_checkpoint
from model import load_weights, save_model, write_model
from open_weights.files import resolve
from verifier import Verifier, save_verifier

ROOT = Path(__file__).parent.parent
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
SFT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, steps=12, num_examples=40, batch_size=8, save_steps=3,
           logging_steps=2, eval_problems=8)
RL = dict(num_prompts=3, num_generations=4, steps=8, save_steps=3, eval_steps=2, eval_problems=8, num_iterations=2, beta=0.1)
TINY = {
    "train_sft": SFT,
    "pav": dict(num_problems=18, n_mc=2, cuts=2, shard_problems=6, epochs=6, batch_size=16, save_steps=4,
                eval_problems=8, eval_mc=2),
    "train_rl": RL | dict(reward="pav"),
    "papers.memorization": SFT | dict(snapshots=4, memorization_samples=1, memorization_problems=4),
    "papers.rft": SFT | dict(num_problems=18, num_examples=18, num_generations=6, shard_problems=6),
    "papers.train_dpo": dict(num_problems=18, num_generations=8, n_mc=5, shard_problems=6, epochs=4, batch_size=8,
                             save_steps=3, logging_steps=1, eval_problems=8),
    "papers.mrt": RL | dict(mu_samples=2, mu_tokens=2, termination_text="="),
}


# ----------------------------------------------------------------------------------------------------
# Processes


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def count_files(root, die_at):
    """-> list that holds the number of file operations below root so far; before the one number die_at, death."""
    count = [0]

    def watch(event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(root) and not str(arguments[0]).endswith("/log"):
            count[0] += 1
            if count[0] == die_at:
                die()

    sys.addaudithook(watch)
    os.fsync = lambda fd: None  # slow, and only for the loss of power: what a killed process wrote is kept
    return count


def stage(script, argv, log, die_at=None, die_after=None, largest_file=None):
    """Body of a process: one command, its words in a file. die_at: the file operation before which it is killed."""
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 (for the life of the process)
    module, begin = importlib.import_module(script), time.time()
    for where in (module, importlib.import_module("train_sft")):  # rft and memorization open their runs there
        where.get_task = lambda cfg: ToyTask()
    count = count_files(os.path.dirname(log), die_at)
    if die_after is not None:
        threading.Timer(die_after, die).start()
    cli.script(lambda: module.main(argv))
    print(f"file operations: {count[0]} in {time.time() - begin}")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def start():
    """start(script, argv, log, ...) -> exit code."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*TINY, "toy", "torch._dynamo"])  # which Adam imports

        def run(script, argv, log, **kill):
            process = context.Process(target=stage, args=(script, argv, str(log)), kwargs=kill)
            process.start()
            process.join()
            return process.exitcode

        yield run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A policy and a verifier with a random head."""
    folder, tokenizer = tmp_path_factory.mktemp("inputs"), ToyTask().tokenizer()
    save_model(folder / "policy", tiny_model(), tokenizer)
    verifier = Verifier(tiny_model(seed=1), fingerprint=tokenizer.fingerprint)
    torch.nn.init.normal_(verifier.head.weight, generator=torch.Generator().manual_seed(0))
    (folder / "verifier").mkdir()
    save_verifier(folder / "verifier", verifier, tokenizer, {})
    return folder


def command(script, inputs, run_dir, **change):
    """Flags of a tiny run."""
    policy = {} if script in ("train_sft", "papers.memorization") else dict(policy=inputs / "policy")
    policy |= dict(verifier=inputs / "verifier") if script == "train_rl" else {}
    settings = TINY[script] | policy | dict(run_dir=run_dir, device="cpu", threads=1) | change
    return [f"--{k.replace('_', '-')}" + (f"={v}" if v is not True else "") for k, v in settings.items()]


def outcome(run):
    """What must be the same: every file of the newest checkpoint but the time in it, and the rows of metrics.jsonl."""
    folder = latest_checkpoint(run)
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "state.json"}
    files |= {p.name: p.read_bytes() for p in [*run.glob("rollouts/*"), *run.glob("pairs.*"), *run.glob("memorization/*")]}
    state = {k: v for k, v in json.loads((folder / "state.json").read_text()).items() if k != "seconds"}
    clock = lambda name: name in ("step_time", "tokens_per_second") or name.startswith("timing/")  # noqa: E731
    rows = [{k: v for k, v in row.items() if not clock(k)} for row in read_metrics(run)]
    return files, state, rows


# ----------------------------------------------------------------------------------------------------
# Kill and go on


@pytest.mark.parametrize("script", TINY)
def test_killed_runs_end_with_the_same_bits(start, inputs, tmp_path, script):
    argv, log = command(script, inputs, tmp_path / "run"), tmp_path / "log"
    assert start(script, argv, log) == 0, log.read_text()
    operations, seconds = map(float, log.read_text().split("file operations: ")[1].split(" in "))
    whole = outcome(tmp_path / "run")
    assert {"model.safetensors", "optimizer.safetensors", "config.json"} <= whole[0].keys() and whole[2]
    left = sorted(p.name for p in (tmp_path / "run").iterdir())

    rng, kills = random.Random(script), 0
    for attempt in range(3):
        shutil.rmtree(tmp_path / "run")
        for life in range(6):
            at_file = dict(die_at=rng.randint(5, int(operations) * 2 // 3))
            at_moment = dict(die_after=rng.uniform(0.2, 0.9) * seconds)
            code = start(script, argv, log, **(at_moment if life % 3 == 2 else at_file))
            assert code in (0, -signal.SIGKILL), log.read_text()
            kills += code != 0
        assert start(script, argv, log) == 0, log.read_text()
        for got, want in zip(outcome(tmp_path / "run"), whole):
            assert got == want, attempt
        assert sorted(p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith("step_")) == [
            name for name in left if not name.startswith("step_")]  # and no temporary file stays behind
    assert kills >= 6
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert start(script, argv, log) == 0 and "is complete" in log.read_text()  # once more: nothing to do
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def checkpoint(run, step, seed):
    """A checkpoint whose weights, moments and state all say which it is."""
    model = tiny_model(seed)
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, float(seed))
    optimizer.step()
    tokenizer = ToyTask().tokenizer()
    write = lambda folder: write_model(folder, model, tokenizer)  # noqa: E731
    save_checkpoint(run, step, write, optimizer, list(model.parameters()), dict(x=seed))
    return model, optimizer


def save_and_die(run, die_at):
    count_files(run, die_at)
    checkpoint(run, 20, 2)


def test_a_kill_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(start, tmp_path):
    context, newest = multiprocessing.get_context("forkserver"), []
    for die_at in range(1, 100):  # a later save removes the older checkpoint: 10 before the rename, 20 after it
        run = tmp_path / str(die_at)
        checkpoint(run, 10, 1)
        process = context.Process(target=save_and_die, args=(str(run), die_at))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        folder, model = latest_checkpoint(run), tiny_model(9)
        optimizer = torch.optim.Adam(model.parameters())
        load_weights(model, folder)
        state = load_state(folder, optimizer, list(model.parameters()))
        assert state in (dict(step=10, x=1), dict(step=20, x=2)) and folder.name == f"step_{state['step']:06d}"
        expected, moments = checkpoint(tmp_path / "expected", 1, state["x"])
        for p, q in zip(model.parameters(), expected.parameters()):
            assert torch.equal(p, q)
            for k, v in moments.state[q].items():
                assert torch.equal(optimizer.state[p][k], v)
        newest.append(state["step"])
        if process.exitcode == 0:
            break
    assert len(newest) > 10 and newest == sorted(newest) and set(newest) == {10, 20}


# ----------------------------------------------------------------------------------------------------
# What is refused, and what a damaged file costs


def test_a_second_process_and_changed_settings_are_refused(start, inputs, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = command("train_sft", inputs, run)
    assert start("train_sft", argv, log) == 0
    before = outcome(run)
    for change in (dict(learning_rate=1e-4), dict(seed=1), dict(steps=13)):
        assert start("train_sft", command("train_sft", inputs, run, **change), log) == 2
        words = log.read_text()
        assert words.startswith("error: ") and words.count("\n") == 1
        assert f"--{[*change][0].replace('_', '-')} " in words
    lock = open_run(tmp_path / "busy", cli.RunConfig())
    assert start("train_sft", command("train_sft", inputs, tmp_path / "busy"), log) == 2
    assert "is in use by another process" in log.read_text() and log.read_text().count("\n") == 1
    lock.close()
    assert outcome(run) == before


@pytest.mark.parametrize("script, name", [
    *((s, n) for s in ("train_sft", "pav", "train_rl") for n in ("state.json", "model.safetensors")),
    ("train_sft", "optimizer.safetensors"), ("pav", "value_head.safetensors")])
def test_a_truncated_checkpoint_is_passed_over_with_a_warning(start, inputs, tmp_path, script, name):
    """No older one is kept here, so it begins again, and ends with the same bits."""
    run, log = tmp_path / "run", tmp_path / "log"
    argv = command(script, inputs, run)
    assert start(script, argv, log) == 0
    whole, newest = outcome(run), latest_checkpoint(run)
    (run / "summary.json").unlink()
    (newest / name).write_bytes((newest / name).read_bytes()[:-9])
    assert start(script, argv, log) == 0, log.read_text()
    assert f"warning: {newest} is incomplete" in log.read_text()
    assert outcome(run) == whole


def test_the_newest_whole_checkpoint_is_taken(tmp_path, capsys):
    for step in (10, 20, 30):
        checkpoint(tmp_path / f"{step}", step, step)
        (tmp_path / f"{step}" / f"step_{step:06d}").rename(tmp_path / f"step_{step:06d}")
    assert latest_checkpoint(tmp_path).name == "step_000030" and not capsys.readouterr().err
    (tmp_path / "step_000030" / "optimizer.safetensors").write_bytes(b"")
    assert latest_checkpoint(tmp_path).name == "step_000020"
    assert capsys.readouterr().err.startswith("warning: ")


def test_step_1000000_comes_after_step_999999(tmp_path, tokenizer):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        checkpoint(tmp_path, step, 1)
        (tmp_path / "step_000100.mine").mkdir(exist_ok=True)  # a name that no run gives is nobody's checkpoint
        (tmp_path / "step_last").mkdir(exist_ok=True)
        assert latest_checkpoint(tmp_path).name == f"step_{step}"
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"step_1000000", "step_1000001", "step_000100.mine", "step_last"}
    assert resolve(tmp_path).name == "step_1000001"
    assert [p.name for p in by_step(map(Path, ["step_1000000", "step_999999", "step_7.safetensors", "step_x"]))] == [
        "step_7.safetensors", "step_999999", "step_1000000"]


@pytest.mark.parametrize("script, largest_file", [
    ("train_sft", 3000), ("pav", 3000), ("pav", 8000), ("train_rl", 12000), ("papers.train_dpo", 3000)])
def test_a_run_goes_on_when_there_is_space_again(start, inputs, tmp_path, script, largest_file):
    """No file may grow beyond the limit: the weights do not fit, nor, with the smaller one, pav.py's rollouts."""
    run, log = tmp_path / "run", tmp_path / "log"
    argv = command(script, inputs, run)
    assert start(script, argv, log) == 0
    whole = outcome(run)
    shutil.rmtree(run)
    assert start(script, argv, log, largest_file=largest_file) == 2
    error = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "File too large" in error[0] and "run the same command again" in error[0]
    assert "Traceback" not in log.read_text()
    assert start(script, argv, log) == 0
    assert outcome(run) == whole


@pytest.mark.parametrize("where", ["open_weights.files", "infra.runs"])
def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch, where):
    model, _ = checkpoint(tmp_path, 10, 1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "step_000010").iterdir()}

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importlib.import_module(where), "save_file", full)
    with pytest.raises(UserError, match="No space left.*the one before it is intact.*run the same command again"):
        checkpoint(tmp_path, 20, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000010"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "step_000010").iterdir()} == before
