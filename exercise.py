"""Ten exercises over this code: a function loses its body, and the tests that know it judge yours.

    python exercise.py                  # the list
    python exercise.py 3 ../credit      # a copy of the repository in which exercise 3 is to be done

The copy holds the tracked files as they stand, made from this tree (ast); the docstring of the
function stays and says what it must do. Each exercise has a question whose answer is a number that
the command under it prints here; those on runs/planted want `python train_rl.py --reward pav` first
(minutes). docs/course.md puts them in order. Left out: solutions, for this tree is full of them.
"""

import ast
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from infra.cli import UserError, script

ROOT = Path(__file__).parent
SEED = "runs/planted/seed0"
POLICY = f"--task planted --verifier {SEED}/verifier --model {SEED}"


@dataclass
class Exercise:
    function: str  # FILE:NAME, a function at the top level of its file
    judges: tuple  # tests, as pytest takes them
    hint: str
    question: str
    run: str  # prints the answer


EXERCISES = [
    Exercise("train_rl.py:outcome_advantage",
             ("test_advantages.py::test_a_group_that_agrees_gets_exactly_nothing",
              "test_advantages.py::test_the_group_baseline_and_its_scale"),
             "Subtract one sample of the group first: then equal rewards are exact zeros.",
             "Which share of its last groups (frac_reward_zero_std) taught outcome-only nothing?",
             f"tail -n 1 {SEED}/rl_outcome/metrics.jsonl"),
    Exercise("train_rl.py:step_bonus",
             ("test_advantages.py::test_progress_telescopes_and_q_does_not",),
             "One slice minus another. What does the sum over the steps leave?",
             "Add up column A of one solution: which difference of two numbers in column V is it?",
             f"python -m report.show {POLICY}/rl_pav --num-problems 1"),
    Exercise("train_rl.py:credit_tokens",
             ("test_advantages.py::test_a_step_pays_its_own_tokens_and_no_other",),
             "searchsorted with right=True counts the ends at or before a token.",
             "Paid to all earlier tokens too, progress is a baseline: what accuracy is left?",
             f"python train_rl.py --reward pav-to-go --policy {SEED}/sft "
             f"--verifier {SEED}/verifier --num-prompts 4 --num-generations 32 --run-dir runs/go"),
    Exercise("pav.py:label_continuations",
             ("test_verifier.py::test_labels_are_the_provers_outcomes_from_each_cut",
              "test_labels.py::test_a_continuation_that_is_eos_at_once_keeps_the_label_of_its_cut"),
             "The cut itself has n outcomes to average, every later end one; padding counts once.",
             "4 continuations each of 2,500 cuts: what is the correlation of the advantage then?",
             f"python pav.py --policy {SEED}/sft --prover {SEED}/prover --num-problems 2500 "
             "--n-mc 4 --run-dir runs/few_cuts"),
    Exercise("pav.py:value_loss",
             ("test_verifier.py::test_the_balanced_optimum_minus_the_shift_is_the_true_probability",
              "test_verifier.py::test_labels_without_weight_do_not_count"),
             "log(1 - sigmoid(z)) is logsigmoid(-z); the target need not be 0 or 1.",
             "Without class weights (--no-balance), is the Brier score lower than the constant's?",
             f"python pav.py --policy {SEED}/sft --prover {SEED}/prover --num-problems 10000 "
             "--no-balance --run-dir runs/plain_loss"),
    Exercise("papers/train_dpo.py:first_pit",
             ("test_dpo.py::test_the_first_pit_is_the_first_of_the_lowest",),
             "min() keeps the first of equals.",
             "Of the prover's wrong solutions, how many pairs does the smoke run make?",
             f"python -m papers.train_dpo --smoke --policy {SEED}/prover --run-dir runs/pairs"),
    Exercise("rollouts.py:pass_at_k",
             ("test_sample.py::test_pass_at_k_equals_enumeration",),
             "The chance that k draws without replacement all miss is a product of k fractions.",
             "How much higher is the prover's pass@64 than its accuracy?",
             f"python sample.py --model {SEED}/prover --task planted --n 64"),
    Exercise("kernels/attention_triton.py:combine_kernel",
             ("test_decode_kernels.py::test_decode_attention",),
             "Keep the largest score so far; when it grows, shrink the sums by 2^(old - new).",
             "What is the second probability without the maximum, in float32, and what with it?",
             'python -c "import torch; z = torch.tensor([0.0, 100.0]); '
             'print(z.exp()[1] / z.exp().sum(), z.softmax(0)[1])"'),
    Exercise("search.py:effective_score",
             ("test_search.py::test_effective_score_is_q_plus_alpha_times_progress",
              "test_search.py::test_the_answer_is_chosen_by_q_and_the_beam_by_the_effective_score"),
             "Equation 5, one line.",
             "Which accuracy does a beam of the base reach (and with --alpha 0)?",
             f"python search.py {POLICY}/sft --method beam --n 12"),
    Exercise("papers/memorization.py:pre_memorization",
             ("test_memorization.py::test_premem_by_hand",),
             "A running maximum over checkpoints, then the smaller of it and today's accuracy.",
             "At the last checkpoint, how far is training accuracy above test accuracy?",
             "python -m papers.memorization --task worded --num-examples 500 --steps 800"),
]


def without_body(source, name):
    """Python source whose function `name` ends after its docstring, with NotImplementedError."""
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    function = next(n for n in functions if n.name == name)
    docstring = function.body[0]
    lines = source.splitlines(keepends=True)
    stub = " " * docstring.col_offset + "raise NotImplementedError\n"
    return "".join([*lines[: docstring.end_lineno], stub, *lines[function.end_lineno :]])


def copy_without(exercise, folder):
    """Write the tracked files to a new folder, the exercise's function without its body. UserError:
    the folder exists, or this is no clone."""
    if folder.exists():
        raise UserError(f"{folder} exists; give a new folder")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        raise UserError(f"{ROOT} is no clone of the repository, which says what to copy: git clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    file, name = exercise.function.split(":")
    (folder / file).write_text(without_body((ROOT / file).read_text(), name))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    numbers = {str(i): exercise for i, exercise in enumerate(EXERCISES, 1)}
    if not argv:
        for i, exercise in numbers.items():
            print(f"{i:>2}. {exercise.function}: {exercise.question}\n    {exercise.run}")
        return
    if len(argv) != 2 or argv[0] not in numbers:
        raise UserError("give a number from 1 to 10 and a new folder: python exercise.py 3 DIR")
    exercise = numbers[argv[0]]
    copy_without(exercise, Path(argv[1]))
    print(f"write {exercise.function} in {argv[1]}\nhint: {exercise.hint}\njudged by:")
    judges = " ".join(f"tests/{test}" for test in exercise.judges)
    print(f"  cd {shlex.quote(argv[1])} && python -m pytest {judges}")
    print(f"question: {exercise.question}\n  {exercise.run}")


if __name__ == "__main__":
    script(main)
