"""Word problems for experiments/openweights.py: solutions for MAWPS, and splits.

MAWPS (Koncel-Kedziorski et al. 2016) as it is passed around, {"input", "target"}, has questions and
answers, no solutions. A demonstration is found by trying: one or two operations on the numbers of
the question that give the answer, one a line. Where different ones do, there is none: is 18 here 3
+ 6 + 9 or 3 * 6? What is found can still be wrong, rarely.

Splits go by the hash of a problem's numbers and answer, so that two wordings of one problem (AddSub
and SingleEq share over a hundred) and two problems with one equation fall into the same. Of GSM8K
the official test file is the test split.
"""

import itertools
import re
from fractions import Fraction
from pathlib import Path

from infra.cli import UserError
from infra.seeds import derive
from tasks.answers import extract_answer
from tasks.files import read_rows

# demonstrated: those of `first` with a solution.
PARTS = ("demonstrated", "first", "second", "val", "test")


def numbers(question):
    """Numbers of a text in its order, as fractions."""
    texts = re.findall(r"(?<![A-Za-z0-9.])[0-9][0-9,]*(?:\.[0-9]+)?", question)
    return [Fraction(f.replace(",", "").rstrip(",")) for f in texts]


def operations(a, b):
    """What can be done with two numbers: [(left, sign, right, result)], nothing below zero,
    nothing by zero."""
    both = [(a, "+", b, a + b), (a, "*", b, a * b), (max(a, b), "-", min(a, b), abs(a - b))]
    return both + [(x, "/", y, x / y) for x, y in ((a, b), (b, a)) if y]


def derivation(values, goal):
    """Lines of the one way to get goal by one or two operations on the values; None if
    there is none, or several.

    Ways count as one if they add and subtract, multiply and divide the same numbers: of 17 + 32
    - 10 and 17 - 10 + 32 the first in the order of the text is taken."""
    ways = []  # (operations, numbers used)
    for i, j in itertools.combinations(range(len(values)), 2):
        for o in operations(values[i], values[j]):
            ways += [([o], [values[i], values[j]])] if o[3] == goal else []
            for k in set(range(len(values))) - {i, j}:
                ways += [
                    ([o, p], [values[i], values[j], values[k]])
                    for p in operations(o[3], values[k])
                    if p[3] == goal
                ]
    kinds = {
        (tuple(sorted(o[1].replace("-", "+") for o in way)), tuple(sorted(used)))
        for way, used in ways
    }
    if len(kinds) != 1 or not all(decimal(x) for o in ways[0][0] for x in (o[0], o[2], o[3])):
        return None
    return "\n".join(
        f"{decimal(a)} {sign} {decimal(b)} = {decimal(c)}" for a, sign, b, c in ways[0][0]
    )


def decimal(x):
    """Fraction -> text with at most two decimals, "" if it has more."""
    return (
        ""
        if (x * 100).denominator != 1
        else str(x.numerator)
        if x.denominator == 1
        else f"{float(x):.2f}".rstrip("0")
    )


def read_problems(files, kind):
    """Files of one kind, mawps or gsm8k -> {part: [row]}, rows for --task jsonl. UserError:
    fields or answers of another kind."""
    parts = {name: [] for name in PARTS}
    seen = set()
    for path in sorted(files, key=lambda p: "test" not in Path(p).name):
        for where, row in read_rows(path):
            question, text = (
                row.get(k)
                for k in (("question", "answer") if kind == "gsm8k" else ("input", "target"))
            )
            if not question or not text:
                raise UserError(f"{where} has not the fields of {kind}; see --problems and --data")
            try:
                answer = extract_answer(text) if kind == "gsm8k" else decimal(Fraction(text))
            except (TypeError, ValueError):
                raise UserError(
                    f"{where}: {str(text)[:40]!r} is no answer of {kind}; see --problems and --data"
                ) from None
            key = re.sub("[^a-z0-9]", "", question.lower())
            if (
                not answer or key in seen
            ):  # MAWPS rounds a few fractions to ten decimals: no strict grader can take those
                continue
            seen.add(key)
            values = numbers(question)
            lines = text if kind == "gsm8k" else derivation(values, Fraction(text))
            row = dict(question=question, answer=answer)
            if lines:
                row["solution"] = lines if "#### " in lines else f"{lines}\n#### {answer}"
            bucket = derive(0, "openweights", sorted(map(str, values)), answer) % 10
            if kind == "gsm8k":
                bucket = 9 if "test" in Path(path).name else bucket % 7
            part = (
                "first"
                if bucket < 3
                else "second"
                if bucket < 6
                else "val"
                if bucket == 6
                else "test"
            )
            parts[part].append(row)
            if part == "first" and lines:
                parts["demonstrated"].append(row)
    return parts
