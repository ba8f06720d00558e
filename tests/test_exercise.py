"""Every exercise: its judges pass here and fail in the copy, where the function has lost its body and nothing else has."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import exercise
from exercise import EXERCISES, copy_without, without_body
from infra.cli import UserError

ROOT = Path(__file__).parent.parent


def judge(folder, report):
    """Run all judges there. -> {(FILE, test): its failure, "" if it passed}; parameters of a test are one entry."""
    tests = [f"tests/{test}" for e in EXERCISES for test in e.judges]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests], cwd=folder,
                   capture_output=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    failures = {}
    for case in ElementTree.parse(report).iter("testcase"):
        key = f"{case.get('classname').split('.')[-1]}.py::{case.get('name').split('[')[0]}"
        failures[key] = failures.get(key, "") + "".join(f.text for f in case.iter() if f.tag in ("failure", "error"))
    return failures


def functions_of(path):
    return {n.name: n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("e", EXERCISES, ids=lambda e: e.function)
def test_a_copy_lacks_one_body(tmp_path, e):
    copy = tmp_path / "copy"
    copy_without(e, copy)
    file, name = e.function.split(":")
    copied = [p.relative_to(copy) for p in copy.rglob("*.py")]
    assert [str(p) for p in copied if (copy / p).read_text() != (ROOT / p).read_text()] == [file]
    functions, original = functions_of(copy / file), functions_of(ROOT / file)
    assert functions.keys() == original.keys() and len(functions[name].body) == 2
    assert ast.get_docstring(functions[name]) == ast.get_docstring(original[name])


def test_the_judges_fail_without_the_bodies_and_pass_here(tmp_path):
    """One copy without all ten: every judge must stumble over the function of its own exercise."""
    copy = tmp_path / "copy"
    copy_without(EXERCISES[0], copy)
    for e in EXERCISES[1:]:
        file, name = e.function.split(":")
        (copy / file).write_text(without_body((copy / file).read_text(), name))
    failures = judge(copy, tmp_path / "copy.xml")
    for e in EXERCISES:
        file, name = e.function.split(":")
        line = functions_of(copy / file)[name].end_lineno
        for test in e.judges:
            assert "NotImplementedError" in failures[test] and f"{file}:{line}" in failures[test], (test, failures[test])
    assert set(judge(ROOT, tmp_path / "here.xml").values()) == {""}


def test_the_body_alone_goes():
    source = '@cache\ndef f(x):\n    """Twice.\n\n    More."""\n    y = x\n    return 2 * y\n\n\ndef g():\n    return 1\n'
    want = source.replace("    y = x\n    return 2 * y\n", "    raise NotImplementedError\n")
    assert without_body(source, "f") == want


def test_the_list_the_hint_and_the_question(tmp_path, capsys):
    exercise.main([])
    out = capsys.readouterr().out
    assert all(e.function in out and e.run in out for e in EXERCISES) and len(EXERCISES) == 10
    exercise.main(["7", str(tmp_path / "a b")])
    out = capsys.readouterr().out
    assert "hint:" in out and "question:" in out and f"cd '{tmp_path}/a b' && python -m pytest tests/test_sample.py::" in out
    for argv in (["7", str(tmp_path / "a b")], ["11", "x"], ["7"], ["--help"]):
        with pytest.raises(UserError):
            exercise.main(argv)


def test_the_course_has_every_exercise():
    course = (ROOT / "docs/course.md").read_text()
    assert set(map(int, re.findall(r"exercise (\d+)", course))) == set(range(1, 11))
    lessons = re.split(r"^## ", course, flags=re.MULTILINE)[1:]
    assert len(lessons) == 8
    for lesson in lessons:
        total, *parts = map(int, re.findall(r"\((\d+)(?: minutes)?\)", lesson))
        assert total == sum(parts) and len(parts) == 4
        assert all(f"* **{part}**" in lesson for part in ("Read", "Run", "Look", "Exercise"))
    named = re.findall(r"\]\(((?!https?:)[^)#]+)\)", course)
    named += re.findall(r"`((?:\w+/)*\w+\.py)`", course)
    assert len(named) > 10 and all((ROOT / "docs" / n).exists() or (ROOT / n).exists() for n in named)
