"""What experiments/openweights.py rests on: demonstrations by trial, splits that wording does not cross, votes."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from experiments import openweights, openweights_report, wordproblems
from infra.cli import UserError, flags, parse
from tasks.answers import answers_equal, extract_answer


@pytest.mark.parametrize("found,goal,lines", [
    ([70, 27], 43, "70 - 27 = 43"),
    ([27, 70], 43, "70 - 27 = 43"),
    ([17, 32, 10], 39, "17 + 32 = 49\n49 - 10 = 39"),
    ([60, 40, 5], 4, "60 - 40 = 20\n20 / 5 = 4"),
    (["0.5", 3], "1.5", "0.5 * 3 = 1.5"),
    ([3, 6, 9], 18, None),  # 3 * 6, or all three added up
    ([2, 2], 4, None),
    ([10, 3], Fraction(10, 3), None),  # not a decimal that anybody writes
    ([8], 4, None),
    ([], 0, None),
])
def test_a_demonstration_is_the_only_way_to_the_answer(found, goal, lines):
    assert wordproblems.derivation([Fraction(x) for x in found], Fraction(goal)) == lines


def test_numbers_are_read_as_they_are_written():
    read = wordproblems.numbers("Tom, 7th of 1,200 (x2), had $3.50 and 4. He ate 0 of them")
    assert read == [Fraction(7), Fraction(1200), Fraction(7, 2), Fraction(4), Fraction(0)]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_two_wordings_of_a_problem_share_a_split(tmp_path):
    wordings = ("Joan found {} shells and gave {} away . How many ?", "Joan had {} shells, gave away {}; what is left?")
    rows = [dict(input=w.format(a, b), target=float(a - b)) for a in range(20, 80) for b in (3, 7) for w in wordings]
    rows += [dict(input="JOAN found 20 shells, and gave 3 away. How many?", target=17)]  # the first one again
    parts = wordproblems.read_problems([write(tmp_path / "m.jsonl", rows)], "mawps")
    demonstrated = parts.pop("demonstrated")
    assert sum(map(len, parts.values())) == 240 and all(parts.values())
    seen = {name: {(*map(str, wordproblems.numbers(r["question"])),) for r in part} for name, part in parts.items()}
    assert not any(seen[a] & seen[b] for a, b in itertools.combinations(seen, 2))
    for r in demonstrated:
        assert answers_equal(extract_answer(r["solution"]), r["answer"])


def test_files_of_another_kind_are_refused(tmp_path):
    for rows, kind in (([dict(question="a", answer="#### 1")], "mawps"), ([dict(input="2 and 3?", target="five")], "mawps"),
                       ([dict(input="2 and 3?", target=5)], "gsm8k")):
        with pytest.raises(UserError, match="m.jsonl line 1.*--problems"):
            wordproblems.read_problems([write(tmp_path / "m.jsonl", rows)], kind)


def test_gsm8k_keeps_its_test_file(tmp_path):
    row = lambda i: dict(question=f"What is {i} and 1?", answer=f"It is <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}")  # noqa: E731
    files = [write(tmp_path / f"gsm8k_{s}.jsonl", map(row, r)) for s, r in (("train", range(60)), ("test", range(50, 70)))]
    parts = wordproblems.read_problems(files, "gsm8k")
    assert len(parts["test"]) == 20 and sum(len(parts[p]) for p in ("first", "second", "val")) == 50


def test_votes_and_paired_differences():
    answers, correct = [["3", "4", "4.0", None], [None, None, "1", "2"]], torch.tensor([[0.0, 1, 1, 0], [0, 0, 1, 0]])
    assert openweights_report.voted(answers, correct, 4).tolist() == [1, 1]  # a tie goes to the answer that came first
    assert openweights_report.voted(answers, correct, 2).tolist() == [0.5, 0.5]
    middle, low, high = openweights_report.paired([1.0, 0.0, 1.0], [0.0, 0.0, 1.0])
    assert middle == pytest.approx(1 / 3) and middle - low == pytest.approx(1.96 / 3) == pytest.approx(high - middle)


def test_auc_within_a_problem_does_not_see_which_problems_are_hard():
    correct = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    knows_problems = torch.tensor([[0.9] * 4, [0.2] * 4, [0.1] * 4])
    assert openweights_report.auc_within(knows_problems, correct) == pytest.approx(0.5)
    knows_solutions = torch.tensor([[0.3, 0.3, 0.3, 0.1], [0.5, 0.5, 0.5, 0.8], [0.9, 0.1, 0.5, 0.2]])
    assert openweights_report.auc_within(knows_solutions, correct) == pytest.approx(1)


@pytest.mark.parametrize("size", [*openweights.SIZES, "smoke"])
def test_every_stage_is_a_command_that_its_script_takes(size):
    smoke = size == "smoke"
    cfg = openweights.Config(size="cpu" if smoke else size, smoke=smoke)
    column = openweights.SMOKE if smoke else openweights.SIZES[size]
    stages = openweights.plan(cfg, column, Path("runs/x"))
    assert [s.name for s in stages][:6] == ["sft", "test_sft", "rft", "orm", "q", "rl_outcome_0"]
    for stage in stages:
        assert parse(stage.script.Config, flags(stage.config)) == stage.config
