"""The documents say what the code does: README's example task runs, the files and flags it names exist, docs/from_trl.md too."""

import dataclasses
import importlib
import json
import re
import tomllib
import types
from pathlib import Path

import pytest

import pav
import pipeline
import tasks
import train_rl
import train_sft
from infra import cli
from papers import train_dpo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRL = (ROOT / "docs/from_trl.md").read_text()
FLAGS = {f.name for c in (train_rl.Config, train_sft.Config, train_dpo.Config) for f in dataclasses.fields(c)}


def rows(text, heading):
    """Cells of the table under a heading."""
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    found = [[c.strip() for c in line.strip().strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")]
    assert found
    return found


@pytest.mark.parametrize("heading", ["Flags of `train_rl.py`", "Flags of `train_dpo.py` and `train_sft.py`"])
def test_flags_of_the_trl_table_exist(heading):
    ours = [name for _, cell, _ in rows(TRL, heading) for name in re.findall(r"`(\w+)`", cell)]
    assert ours and set(ours) <= FLAGS, set(ours) - FLAGS


def test_metrics_of_the_trl_table_are_written():
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("train_rl", "papers/train_dpo", "infra/runs", "report/watch"))
    for _, cell, _ in rows(TRL, "Metrics (`metrics.jsonl`)"):
        for name in re.findall(r"`([\w/]+)`", cell):
            assert f'"{name}"' in source or f"{name}=" in source, name


def test_the_left_column_is_trl():
    pytest.importorskip("trl")
    from trl import DPOConfig, GRPOConfig, SFTConfig

    known = {f.name for c in (DPOConfig, GRPOConfig, SFTConfig) for f in dataclasses.fields(c)}
    for heading in ("Flags of `train_rl.py`", "Flags of `train_dpo.py` and `train_sft.py`"):
        assert {cell.strip("`") for cell, *_ in rows(TRL, heading)} <= known


def test_the_reward_of_the_trl_page_is_a_task(tmp_path, monkeypatch):
    """Its class in a file, its line in TASKS."""
    block = TRL.split("```python\n# tasks/short.py")[1].split("```")[0]
    (tmp_path / "short.py").write_text("#" + block)
    rows = [dict(question=f"{i}+1?", answer=i + 1) for i in range(50)]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "short", "short:Short")
    assert '"short": "tasks.short:Short",' in TRL
    task = tasks.get_task("short", data=[str(tmp_path / "f.jsonl")])
    problem = task.problems("train", 1)[0]
    right = f"The answer is {problem.answer}."
    assert [task.grade(problem, text) for text in (right, "so " * 200 + right, "The answer is 99.")] == [1.0, 0.0, 0.0]


def test_files_and_flags_of_the_trl_page_exist():
    prose = TRL.split("## Flags of")[0]
    paths = re.findall(r"\]\(((?!https?:)[^)#]+)\)", prose) + re.findall(r"`((?:\w+/)*\w+\.py)`", prose)
    assert len(paths) > 8 and all((ROOT / p).exists() or (ROOT / "docs" / p).exists() for p in paths)
    known = FLAGS | {f.name for c in (pav.Config, pipeline.with_flags(train_rl.Config)) for f in dataclasses.fields(c)}
    flags = {flag for line in prose.splitlines() if "torchrun" not in line for flag in re.findall(r"--([a-z][a-z-]*)", line)}
    assert len(flags) > 15 and {flag.replace("-", "_") for flag in flags} <= known


def test_readme_names_files_that_exist():
    paths = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README) + re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", README)
    missing = [p for p in paths if not (ROOT / p).exists() and p != "tasks/sums.py"]
    assert len(paths) > 20 and not missing


def test_it_is_a_repository_and_no_package():
    """Top names such as search or kernels would collide in site-packages: nothing here can be installed there."""
    assert {"project", "build-system"}.isdisjoint(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    assert not any((ROOT / name).exists() for name in ("setup.py", "setup.cfg"))


def test_every_function_that_readme_points_to_exists():
    named = re.findall(r"`([\w.]+)\.(\w+)`", README.split("## The equations and their lines")[1].split("\n## ")[0])
    assert len(named) > 8
    for module, name in named:
        module = importlib.import_module(module)
        assert hasattr(module, name), (module, name)


def test_flags_in_readme_commands_exist():
    """python SCRIPT.py --flag ..., python -m MODULE --flag ...: every flag is a field of its config."""
    commands = re.findall(r"python (?:(\w+)\.py|-m ([\w.]+)) ([^\n`]*)", README)
    assert len(commands) > 5
    for script, module, arguments in commands:
        module = importlib.import_module(script or module)
        if hasattr(module, "Config") and dataclasses.is_dataclass(module.Config):
            config = pipeline.with_flags(module.Config) if script == "train_rl" else module.Config
            known = {f.name.replace("_", "-") for f in dataclasses.fields(config)} | {"help"}
            for flag in re.findall(r"--([a-z][a-z-]*)", arguments.split("#")[0]):
                assert flag in known or flag.removeprefix("no-") in known, (module, flag)


def example_task():
    block = README.split("```python\n# tasks/sums.py")[1].split("```")[0]
    module = types.ModuleType("sums")
    exec(compile("# tasks/sums.py" + block, "sums.py", "exec"), module.__dict__)  # our own README, no model's text
    return module.Sums()


def test_the_example_task_is_short_and_consistent():
    block = README.split("```python\n# tasks/sums.py")[1].split("```")[0]
    assert len(block.strip().splitlines()) <= 40
    task = example_task()
    tokenizer = task.tokenizer()
    for problem in task.problems("train", 20, 0):
        text = task.demonstration(problem, 1.0, 0)
        prompt, answer = task.prompt_tokens(problem, tokenizer), tokenizer.encode(text) + [tokenizer.eos_ids[0]]
        ends = task.step_ends(prompt + answer, len(prompt), len(prompt) + len(answer), tokenizer)
        assert task.grade(problem, text) == 1.0 and tokenizer.decode(answer[:-1]) == text
        assert ends == sorted(set(ends)) and ends[-1] == len(prompt) + len(answer) and len(ends) > 1


def test_the_example_task_is_one_file_and_one_line(tmp_path, monkeypatch):
    """As README says: a file, a line in TASKS, and every script and the pipeline know it."""
    (tmp_path / "sums.py").write_text(README.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(tasks.TASKS, "sums", "sums:Sums")
    train_sft.main(["--task", "sums", "--run-dir", str(tmp_path / "sft"), "--steps", "2", "--batch-size", "8",
                    "--num-examples", "16", "--threads", "1", "--eval-problems", "4", "--hidden-size", "16",
                    "--device", "cpu"])
    summary = json.loads((tmp_path / "sft" / "summary.json").read_text())
    assert 0 <= summary["accuracy"] <= 1 and summary["examples"] == 16
    cfg = cli.parse(pipeline.with_flags(train_rl.Config), ["--reward", "pav", "--task", "sums"])
    _, jobs = pipeline.plan(cfg, {"": (["train_rl.py"], train_rl.Config)}, set())
    strength = {Path(job.label).name: job.config.strength for job in jobs if job.script == ["train_sft.py"]}
    assert strength == dict(sft=0.7, prover=0.95)
