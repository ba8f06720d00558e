"""What a person types: every script explains itself, and a mistake ends in one line that names the mend, code 2."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import tiny_model

from infra import cli
from infra import runs as common
from model import save_model
from open_weights.tokenizer import alphabet_tokenizer
from tasks import get_task
from verifier import Verifier, save_verifier

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train_sft", "pav", "train_rl", "sample", "search", "papers.train_dpo", "papers.rft", "papers.memorization",
           "papers.mrt", "papers.mrt_star", "report.evaluate", "report.show", "report.chat"]


def command(script):
    """What is typed to run it."""
    return f"python -m {script}" if "." in script else f"python {script}.py"


def call(monkeypatch, capsys, script, *argv):
    """What `python SCRIPT.py ARGV` does in its last lines -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [script + ".py", *map(str, argv)])
    module, code = importlib.import_module(script), 0
    try:
        cli.script(module.main)
    except SystemExit as e:
        code = e.code
    return code or 0, *capsys.readouterr()


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def check(match, script, *argv):
        code, out, err = call(monkeypatch, capsys, script, *argv)
        assert code == 2 and "Traceback" not in err, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert re.search(match, err), err

    return check


@pytest.fixture
def policy(tmp_path):
    """A policy of the planted task's own alphabet, random weights."""
    tokenizer = get_task("planted").tokenizer()
    save_model(tmp_path / "policy", tiny_model(vocab=tokenizer.n_vocab), tokenizer)
    return tmp_path / "policy"


def write_sums(path):
    rows = [dict(question=f"{i}+1=", answer=i + 1) for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag(monkeypatch, capsys, script):
    code, out, err = call(monkeypatch, capsys, script, "--help")
    assert code == 0 and not err
    for name in importlib.import_module(script).Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in out, name
    assert command(script) in out and "%%" not in out  # the commands of the header are there


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_of_a_header_parse(script):
    """One a line, as --help shows them, and each with flags that exist."""
    import pipeline

    doc = importlib.import_module(script).__doc__
    assert " python " not in doc.replace("\n    python ", "")
    commands = [line for line in doc.replace("\\\n", " ").splitlines() if line.startswith("    python ")]
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        name, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
        module = importlib.import_module(name)
        if hasattr(module, "Config"):
            config = pipeline.with_flags(module.Config) if name in ("train_rl", "papers.mrt") else module.Config
            cli.parse(config, argv)


def test_report_explains_itself(monkeypatch, capsys, refuse):
    code, out, err = call(monkeypatch, capsys, "report.__main__", "--help")
    assert code == 0 and "python -m report" in out
    assert call(monkeypatch, capsys, "report.__main__")[0] == 2
    refuse("nowhere", "report.__main__", "nowhere")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_is_refused(refuse, script):
    refuse("--learning-rte", script, "--learning-rte", "1e-3")
    refuse("--temp", script, "--temp=1")  # no guessing from the first letters


@pytest.mark.parametrize("script, argv, flag", [
    ("train_rl", ["--alpha", "-1"], "--alpha must be at least 0"),
    ("train_rl", ["--num-generations", "1"], "--num-generations must be at least 2"),
    ("train_rl", ["--learning-rate", "nan"], "--learning-rate must be a finite number"),
    ("train_rl", ["--temperature", "0"], "--temperature must be at least 1e-06"),
    ("train_rl", ["--reward", "prm"], "--reward"), ("train_rl", ["--steps", "ten"], "--steps"),
    ("train_rl", ["--seed", "-1"], "--seed"), ("train_rl", ["--loss-type"], "--loss-type"),
    ("train_sft", ["--batch-size", "0"], "--batch-size"), ("train_sft", ["--learning-rate", "0"], "--learning-rate"),
    ("pav", ["--n-mc", "0"], "--n-mc"), ("pav", ["--policy", "p", "--task", "sudoku"], "--task"),
    ("sample", ["--top-p", "1.5"], "--top-p"), ("sample", ["--top-p", "0"], "--top-p"), ("sample", ["--n", "0"], "--n"),
])
def test_an_impossible_value_is_refused_by_its_flag(refuse, script, argv, flag):
    refuse(flag, script, *argv)


def test_nothing_to_do_is_said(refuse):
    refuse("--n is of --prompt or --task", "sample", "--n", "2")
    refuse("--policy is missing", "pav", "--run-dir", "v")
    refuse("--policy is missing", "papers.train_dpo", "--run-dir", "d")
    refuse("python -m papers.mrt", "train_rl", "--reward", "mrt")


def test_missing_files_are_named(refuse, tmp_path, policy):
    refuse("--data", "train_sft", "--task", "jsonl", "--run-dir", "a")
    refuse("none.jsonl", "train_sft", "--task", "jsonl", "--data", "none.jsonl", "--run-dir", "b")
    refuse("nowhere", "sample", "--model", "nowhere", "--prompt", "hi")
    refuse("nowhere", "pav", "--policy", "nowhere", "--run-dir", "c")
    refuse("nowhere", "train_rl", "--reward", "outcome", "--policy", "nowhere", "--run-dir", "d")
    refuse("nowhere", "train_rl", "--reward", "pav", "--policy", policy, "--verifier", "nowhere", "--run-dir", "e")
    (tmp_path / "bad.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n{"question": \n')
    refuse("bad.jsonl line 2", "train_sft", "--task", "jsonl", "--data", "bad.jsonl", "--run-dir", "f")
    write_sums(tmp_path / "ok.jsonl")
    refuse("give --model", "train_sft", "--task", "jsonl", "--data", "ok.jsonl", "--run-dir", "g")


def test_a_task_without_a_demonstrator_gets_past_its_strength(monkeypatch, capsys, tmp_path):
    """Files have no scripted demonstrator; the default --strength must not look one up."""
    write_sums(tmp_path / "ok.jsonl")
    tokenizer = alphabet_tokenizer(sorted(set("0123456789+=\n #.:?Question:Answer:The answer is")))
    save_model(tmp_path / "m", tiny_model(vocab=tokenizer.n_vocab, context=128), tokenizer)
    small = ["--steps", 2, "--batch-size", 4, "--eval-problems", 2, "--device", "cpu", "--max-completion-length", 8]
    code, out, err = call(monkeypatch, capsys, "train_sft", "--task", "jsonl", "--data", tmp_path / "ok.jsonl",
                          "--model", tmp_path / "m", "--run-dir", tmp_path / "run", *small)
    assert code == 0 and "2 steps" in out, err


def test_verifiers_that_do_not_fit_are_refused(refuse, tmp_path, policy):
    other = alphabet_tokenizer(list("0123456789="))
    (tmp_path / "verifier").mkdir()
    save_verifier(tmp_path / "verifier", Verifier(tiny_model(), fingerprint=other.fingerprint), other, {})
    rl = ["train_rl", "--reward", "pav", "--policy", policy]
    refuse("another tokenizer", *rl, "--verifier", tmp_path / "verifier", "--run-dir", "a")
    refuse("not a verifier", *rl, "--verifier", policy, "--run-dir", "b")
    save_model(tmp_path / "prover", tiny_model(), other)
    refuse("another tokenizer", "pav", "--policy", policy, "--prover", tmp_path / "prover", "--run-dir", "c")


def test_weights_that_are_not_numbers_end_the_run(refuse, tmp_path, policy):
    tensors = load_file(policy / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("inf"))
    save_file(tensors, policy / "model.safetensors", metadata=dict(format="pt"))
    refuse("not a number", "train_sft", "--model", policy, "--steps", 2, "--batch-size", 2, "--num-examples", 8,
           "--run-dir", "a", "--device", "cpu")


EXPLODES = {"train_sft": ["--num-examples", 16, "--batch-size", 8, "--hidden-size", 16],
            "train_rl": ["--reward", "outcome", "--num-prompts", 2, "--num-generations", 2, "--eval-problems", 4],
            "pav": ["--num-problems", 8, "--epochs", 8, "--batch-size", 4],
            "papers.train_dpo": ["--num-problems", 8, "--epochs", 8, "--task-args", "length=1"]}


@pytest.mark.parametrize("script", EXPLODES)
def test_a_gradient_that_is_no_number_leaves_the_batch_and_the_checkpoint(refuse, monkeypatch, policy, script):
    calls, clip = [], torch.nn.utils.clip_grad_norm_

    def third_is_nan(*args):
        calls.append(clip(*args))
        return calls[-1] if len(calls) < 3 else torch.tensor(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", third_is_nan)
    argv = [*EXPLODES[script], "--save-steps", 1, "--run-dir", "a", "--device", "cpu", "--threads", 1]
    refuse(r"not a number at step 3 .*a/bad_batch_000003\.safetensors.*lower --learning-rate", script,
           *argv, *(["--policy", policy] if script != "train_sft" else []))
    assert load_file("a/bad_batch_000003.safetensors")["tokens"].numel()
    assert common.latest_checkpoint("a").name == "step_000002"


@pytest.mark.parametrize("script, argv, code", [("train_rl", ["--alpha", "-1"], 2), ("pav", ["--help"], 0)])
def test_as_its_own_process(tmp_path, script, argv, code):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", *argv], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == code and (code == 0) == (not done.stderr) and done.stderr.count("\n") == (code != 0)
    assert not list(tmp_path.iterdir())


def test_tensorboard_is_optional_and_gets_the_numbers(tmp_path, monkeypatch):
    """The package is not needed by the project: a stand-in with its one class takes what is written."""
    from report import tensorboard

    seen = []

    class Writer:
        def __init__(self, folder):
            seen.append(str(folder))

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def close(self):
            pass

    common.Metrics(tmp_path, 4).write(5, loss=0.5, kl=float("nan"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(cli.UserError, match="pip install tensorboard"):
        tensorboard.main([str(tmp_path)])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("Module", (), dict(SummaryWriter=Writer)))
    tensorboard.main([str(tmp_path)])
    assert seen == [str(tmp_path / "tensorboard"), ("loss", 0.5, 5)]
    with pytest.raises(cli.UserError, match="no metrics.jsonl"):
        tensorboard.main([str(tmp_path / "nowhere")])


@pytest.mark.parametrize("script, argv, said", [
    ("train_sft", ["--task", "jsonl", "--data", "a b.jsonl", "test=c.jsonl"], ["report.evaluate", "pav"]),
    ("train_sft", ["--seed", "2"], ["report.evaluate", "train_sft", "pav"]),
    ("pav", ["--policy", "p"], ["search"]),  # the base as prover is for search
    ("pav", ["--policy", "p", "--prover-k", "4"], ["train_rl", "search"]),
    ("pav", ["--policy", "p", "--prover", "another"], ["train_rl"]),
    ("pav", ["--policy", "p", "--label", "outcome", "--task-args", "length=3"], ["train_rl", "search"]),
    ("train_rl", ["--policy", "p", "--reward", "outcome", "--seed", "3"], ["report.evaluate"]),
    ("papers.train_dpo", ["--policy", "p"], ["report.evaluate"]),
    ("papers.rft", ["--policy", "p"], ["report.evaluate"]),
    ("papers.mrt", ["--policy", "p", "--task", "probe"], ["papers.mrt_star"]),
    ("papers.mrt_star", ["--policy", "p", "--task", "probe"], ["papers.mrt"]),
])
def test_what_a_script_says_to_run_next_would_run(script, argv, said, monkeypatch, capsys):
    """Its flags exist there, and name the same task, seed and run."""
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "train", lambda cfg: {})
    monkeypatch.setattr(module, "get_task", lambda cfg: get_task("planted"), raising=False)  # no file is looked for
    monkeypatch.chdir(ROOT)
    module.main([*argv, "--run-dir", "here is/it"])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  python ")]
    modules = [c[2] if c[1] == "-m" else c[1].removesuffix(".py") for c in commands]
    assert modules == said and all(shlex.join(c).startswith(command(m)) for c, m in zip(commands, modules))
    cfg = cli.parse(module.Config, argv)
    for words, name in zip(commands, modules):
        assert any(a.startswith("here is/it") for a in words)
        theirs = cli.parse(importlib.import_module(name).Config, words[3 if words[1] == "-m" else 2 :])
        assert all(getattr(theirs, f) == getattr(cfg, f) for f in ("task", "data", "seed", "task_args"))


def test_next_commands_bring_the_settings_that_work(monkeypatch, capsys):
    """A task's settings have one source: what the pipeline runs is what a single script recommends."""
    import train_sft
    from tasks import task_class

    monkeypatch.setattr(train_sft, "train", lambda cfg: {})
    monkeypatch.chdir(ROOT)
    for task in ("planted", "countdown"):
        train_sft.main(["--task", task, "--run-dir", "r"])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python pav.py")]
        cfg = cli.parse(importlib.import_module("pav").Config, shlex.split(lines[0])[2:])
        assert cfg.prover == dict(planted="r_prover", countdown="base")[task] and cfg.policy == "r"
        for name, value in task_class(task).stages["verifier"].items():
            assert getattr(cfg, name) == value


def test_a_script_typed_alone_says_what_a_comparison_has_otherwise(monkeypatch, capsys, policy):
    import pav

    monkeypatch.setattr(pav, "train", lambda cfg: {})
    pav.main(["--policy", str(policy), "--prover-k", "4"])
    assert "note: a comparison on --task planted runs this stage with --num-problems=40000" in capsys.readouterr().out
    pav.main(["--policy", str(policy), "--prover-k", "4", "--num-problems", "10"])
    assert "note:" not in capsys.readouterr().out
    monkeypatch.setenv("NANOPAV_STAGE", "1")  # a stage's command is complete
    pav.main(["--policy", str(policy)])
    assert "note:" not in capsys.readouterr().out


def test_commands_say_where_the_scripts_are_when_started_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert cli.command_line(["pav.py", "--x"]) == "python pav.py --x"
    monkeypatch.chdir(tmp_path)
    assert cli.command_line(["pav.py", "--x"]) == f"python {ROOT}/pav.py --x"
    assert cli.command_line(["-m", "report", "r"]) == f"PYTHONPATH={ROOT} python -m report r"


@pytest.mark.parametrize("script", ["train_sft", "pav", "train_rl", "sample", "papers.rft"])
@pytest.mark.parametrize("argv, said", [(["--device", "gpu"], "--device gpu is not supported"),
                                        (["--device", "mps"], "use auto, cpu, cuda or cuda:N"),
                                        (["--threads", "100000"], "--threads 100000: this machine has")])
def test_what_the_machine_has_not_is_refused_before_the_work(refuse, policy, script, argv, said):
    given = {"pav": ["--policy", policy], "papers.rft": ["--policy", policy], "sample": ["--prompt", "A", "--model", policy]}
    refuse(said, script, *given.get(script, []), *argv)


def test_results_have_a_place_before_they_are_computed(refuse, policy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("sample.generate", lambda *args, **options: pytest.fail("sampled first"))
    for script in ("search", "report.show", "report.evaluate"):
        verifier = [] if script == "report.evaluate" else ["--verifier", "v"]
        given = [script, "--task", "planted", "--model", policy, *verifier, "--n", "3"]
        refuse("--out file/x.jsonl: .*file is a file", *given, "--out", "file/x.jsonl")
        refuse("folder is a folder", *given, "--out", "folder")
    refuse("--run-dir file is a file", "train_rl", "--run-dir", "file")
    refuse("--run-dir file/run: .*file is a file", "train_sft", "--run-dir", "file/run")
    refuse("--out file/x: .*file is a file", "experiments.breaks", "--out", "file/x")


def test_samples_that_cannot_differ_are_refused(refuse, policy):
    refuse("--n 3 samples at temperature 0", "sample", "--model", policy, "--prompt", "A", "--n", 3)
    refuse("--n 2 samples at temperature 0", "report.evaluate", "--task", "planted", "--model", policy, "--n", 2, "--greedy")
    refuse("--temperature must be at least 0", "sample", "--model", policy, "--prompt", "A", "--temperature", -5)


def test_a_verifier_is_no_policy(refuse, tmp_path):
    tokenizer = get_task("planted").tokenizer()
    (tmp_path / "v").mkdir()
    save_verifier(tmp_path / "v", Verifier(tiny_model(vocab=tokenizer.n_vocab), fingerprint=tokenizer.fingerprint), tokenizer, {})
    said = "v holds a verifier, not a language model"
    refuse(said, "sample", "--model", "v", "--prompt", "A")
    refuse(said, "train_rl", "--policy", "v", "--verifier", "v", "--run-dir", "a")
    refuse(said, "train_rl", "--policy", "v", "--run-dir", "b")  # before its prover is built
    refuse(said, "pav", "--policy", "v", "--run-dir", "c")
    refuse(said, "train_sft", "--model", "v", "--run-dir", "d")


def made(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_config.json").write_text(json.dumps(dict(task="planted", seed=0, task_seed=-1, task_args=[]) | settings))
    return str(folder)


def test_the_task_of_a_given_policy_is_taken_over(tmp_path, capsys):
    """Another --seed draws anew; it does not ask for other hidden sequences behind one's back."""
    from tasks import adopt_task
    from train_rl import Config

    policy = made(tmp_path / "p", seed=3, task_args=["length=4"])
    cfg = Config(seed=1)
    adopt_task(cfg, policy)
    assert (cfg.task_seed, cfg.task_args) == (3, ["length=4"])
    assert [p.answer for p in get_task(cfg).all] == [p.answer for p in get_task("planted", 3, planted=4).all]
    err = capsys.readouterr().err
    assert "note: --task-seed=3 is taken from" in err and "note: --task-args length=4 is taken from" in err
    adopt_task(Config(seed=3, task_args=["length=4"]), policy)
    assert capsys.readouterr().err == ""
    adopt_task(Config(task="countdown", seed=1), policy)
    assert "was made for --task planted" in capsys.readouterr().err
    adopt_task(Config(seed=1), "", "smollm2", str(tmp_path / "nowhere"))
    assert capsys.readouterr().err == ""
    cfg = Config(task_seed=0, task_args=["length=4"])
    adopt_task(cfg, policy)  # typed: done, and said
    assert cfg.task_seed == 0 and "warning:" in capsys.readouterr().err
    cfg = Config(seed=1)
    adopt_task(cfg, made(tmp_path / "q", seed=5), made(tmp_path / "v", seed=6))
    assert cfg.task_seed == 5 and "warning:" in capsys.readouterr().err  # policy and verifier of two tasks


@pytest.mark.parametrize("summary, said", [
    (dict(labels=38, brier=0.2, brier_constant=0.25, corr_advantage=0.1), "only 38 labels"),
    (dict(labels=5000, brier=0.25, brier_constant=0.2, corr_advantage=0.1), "no better than a constant"),
    (dict(labels=5000, brier=0.1, brier_constant=0.2, corr_advantage=-0.1), "does not correlate"),
    (dict(labels=5000, brier=0.1, brier_constant=0.2, corr_advantage=float("nan")), "does not correlate"),
])
def test_rl_is_not_recommended_with_a_verifier_that_knows_nothing(summary, said, monkeypatch, capsys):
    import pav

    monkeypatch.setattr(pav, "train", lambda cfg: summary)
    pav.main(["--policy", "p", "--prover", "another", "--run-dir", "r"])
    out = capsys.readouterr().out
    assert f"warning: {said}" in out.replace("its advantage ", "").replace("it is ", "") and "train_rl.py" not in out
    pav.main(["--policy", "p", "--prover", "base", "--run-dir", "r"])
    assert "--prover-k 4" in capsys.readouterr().out
