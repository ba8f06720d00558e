"""answers.py, symbolic.py: extraction, every row of the case file, hostile input, the process of its own."""

import json
import os
import random
from pathlib import Path

import pytest

from tasks import symbolic
from tasks.answers import _same, _value, answers_equal, canonical, extract_answer
from tasks.files import last_number

CASES = [json.loads(line) for line in (Path(__file__).parent / "answer_cases.jsonl").read_text("utf-8").splitlines()]
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.parametrize(
    "text, want",
    [
        ("so\n#### 7", "7"),
        ("#### 7\nand\n#### 8", "8"),
        ("  ####   1,234 ", "1,234"),
        ("#### 7\n####", None),
        ("##### 7", "7"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed{7", None),
        (r"\boxed{1} and \boxed{2", None),
        (r"so $\boxed 7$.", "7"),
        (r"\boxed{}", None),
        (r"\boxed", None),
        ("The answer is 7.", "7"),
        ("the answer is: 3.5. I hope so.", "3.5"),
        ("The final answer is:\n\n$$7$$", "$$7$$"),
        ("#### 1\n" + r"\boxed{2}", "2"),  # whichever stands last
        (r"\boxed{2}" + "\n#### 1", "1"),
        ("#### Step 1\n#### Step 2\nso " + r"$\boxed{7}$.", "7"),  # headings of Markdown
        ("#### 7\nThe answer is 8.", "7"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> so it is", None),
        (r"<think>it is \boxed{1}", None),
        ("it is 7", None),
        ("", None),
        ("x #### 7", None),
        (r"\boxed{" + "{" * 8 + "}" * 8 + "}", "{" * 8 + "}" * 8),
        (r"\boxed{" + "{" * 51 + "}" * 51 + "}", None),
        (r"\boxed{\{2, 3\}}", r"\{2, 3\}"),
        (r"\boxed{\left\{ x = 4 \right.}", r"\left\{ x = 4 \right."),  # a brace that is text closes nothing
        (r"\boxed{5}" + "\n\n#### Check\n2 + 3 is 5.", "5"),  # a heading
        (r"\boxed{5}" + "\n#### 6\n", "6"),
        ("#### 5 miles.\n\nThat is all.", "5 miles."),
        ("The answer is 9, because 4 + 5 = 9.", "9"),
        ("The answer is 9 pounds, and they can buy it.", "9 pounds"),
        ("The answer is 9 (since 4 + 5 = 9).", "9"),
        ("The answer is 2, 5, and 11.", "2, 5, and 11"),
        ("The answer is not 9 but 8.", "not 9 but 8"),
        (r"<think>a</think> wait <think>or \boxed{1}", None),
        (r"<think>a</think> \boxed{1} <think>or", None),  # a thought that was cut off
        (r"<think>a</think> <think>b</think> \boxed{1}", "1"),
        (r"so it is \boxed{2}</think> \boxed{1}", "1"),
        (r"\boxed{" * 10**5, None),
        ("#### " + "9" * 2001, None),
        ("answer is " * 10**5, None),
        ("\n" * 10**6, None),
    ],
)
def test_extract(text, want):
    assert extract_answer(text) == want


def test_last_number_is_what_it_says():
    assert last_number("3 apples and 1,234.50 pears, -7 left.") == "-7" and last_number("1,234.50 in all") == "1,234.50"
    assert last_number("none") is None and last_number("9" * 10**6) is not None


def test_case_file_has_both_verdicts_and_reasons():
    verdicts = [case["verdict"] for case in CASES]
    assert len(CASES) >= 150 and min(sum(verdicts), len(CASES) - sum(verdicts)) >= 60
    assert all(case["why"] for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{str(c['prediction'])[:24]} ? {str(c['gold'])[:24]}")
def test_case(case):
    """Both ways round: which of the two is the gold answer does not matter."""
    assert answers_equal(case["prediction"], case["gold"]) is case["verdict"], case["why"]
    assert answers_equal(case["gold"], case["prediction"]) is case["verdict"], case["why"]


PIECES = [r"\frac", r"\sqrt", r"\text{", r"\boxed{", "{", "}", "(", ")", "[", "]", r"\{", r"\}", "^", "_", "**", "9", "0.1",
          "1e9", "x", ",", "=", "+", "-", "/", " ", "$", "%", r"\\", "&", r"\begin{pmatrix}", r"\end{pmatrix}", r"\cup", r"\sin",
          "\\", "\n", "é", "٧", "\x01", "\ud800", "and", "cm", r"\left", r"\circ", r"\pm", "####", "answer is ",
          "<think>", "1,234", "i"]


def test_random_and_mutated_text_raises_nothing_and_is_symmetric():
    rng = random.Random(0)
    seeds = [c[k] for c in CASES for k in ("prediction", "gold") if c[k]]
    for i in range(3000):
        texts = []
        for _ in range(2):
            if i % 2:
                text = "".join(rng.choices(PIECES, k=rng.choice([3, 10, 60])))
            else:
                text = rng.choice(seeds)[:400]
                for _ in range(rng.randrange(4)):
                    at = rng.randrange(len(text) + 1)
                    text = text[:at] + rng.choice(PIECES) + text[at + rng.randrange(3) :]
            texts.append(text)
        a, b = texts
        extract_answer(a), last_number(a)
        assert answers_equal(a, b) == answers_equal(b, a), texts
        if canonical(a) and len(a) <= 2000:
            assert answers_equal(a, a), a


@pytest.mark.parametrize("piece", PIECES)
def test_the_same_piece_for_ever(piece):
    long = piece * (2000 // len(piece))
    extract_answer(piece * 10**5)
    listed = r"\{" + (piece + ",") * (1900 // (len(piece) + 1)) + r"\}"
    for text in (long, "(" + long[:1990] + ")", f"{long[:900]},{long[:900]}", listed):
        answers_equal(text, text + "1" if len(text) < 2000 else text[:-1] + "1")
        answers_equal(text, "7")


def test_sets_of_formulas_are_computed_once_each():
    parts = [f"x^{{.{i:02d}}}" for i in range(10, 60)]
    other = [p.replace("{.", "{0.") for p in reversed(parts)]
    _value.cache_clear()
    assert answers_equal(r"\{" + ",".join(parts) + r"\}", r"\{" + ",".join(other) + r"\}")
    assert _value.cache_info().misses <= 6 * len(parts)
    assert not answers_equal(r"\{" + ",".join(parts) + r"\}", r"\{" + ",".join(other[1:] + ["x"]) + r"\}")


def test_formulas_agree_with_known_identities():
    for a, b in [("(x+y)^{3}", "x^{3}+3x^{2}y+3xy^{2}+y^{3}"), ("x_{1}+x_{1}", "2x_{1}"), ("2^{-1}x", "x/2"),
                 (r"\frac{1}{x-1}-\frac{1}{x+1}", r"\frac{2}{x^{2}-1}"), (r"\sqrt{12}-\sqrt{3}", r"\sqrt{3}"),
                 (r"\sqrt[3]{-8}x", "-2x"), (r"\sin\cos x", r"\sin(\cos(x))")]:
        assert _same(a, b), (a, b)
    for a, b in [("x", "-x"), ("x_{1}", "x_{2}"), (r"\alpha", "a"), (r"\ln x", r"\log x"), ("x^{65}", "x^{65}"), ("|x|", "|x|"),
                 ("x!", "x!"), ("x=1=2", "x=1=2"), ("", ""), ("(", "("), ("x2", "2x"), (r"\sqrt{x^{2}}", "x"),
                 ("0." + "3" * 70 + "x", r"\frac{x}{3}"), (r"\sin(x)^{2}+\cos(x)^{2}", "1")]:
        assert not _same(a, b), (a, b)


def test_gold_answers_of_math_500_equal_what_their_solutions_say():
    if not (DATA / "math500.json").exists():
        pytest.skip("MATH-500 is not here")
    rows = json.loads((DATA / "math500.json").read_text())
    wrong = [r["answer"] for r in rows if not answers_equal(extract_answer(r["solution"]), r["answer"])]
    assert len(rows) == 500 and not wrong


def test_gsm8k_answers_equal_themselves():
    if not (DATA / "gsm8k_test.jsonl").exists():
        pytest.skip("GSM8K is not here")
    for line in (DATA / "gsm8k_test.jsonl").read_text().splitlines():
        gold = extract_answer(json.loads(line)["answer"])
        assert answers_equal(gold, gold) and not answers_equal(gold + "1", gold)


@pytest.mark.skipif(not symbolic.available(), reason="math-verify is not installed")
def test_math_verify_is_a_second_opinion_with_a_time_limit(monkeypatch):
    equal = symbolic.symbolically_equal
    monkeypatch.setattr(symbolic, "TIME_LIMIT", 60.0)  # this test is not about how busy the machine is
    assert equal("x > 3", "3 < x") and not answers_equal("x > 3", "3 < x")
    assert equal(r"(\tan^2 y + 1, 2)", r"(\sec^2 y, 2)") and not equal("x > 3", "x < 3")
    child, late = symbolic._judge.child, symbolic._judge.timeouts
    monkeypatch.setattr(symbolic, "TIME_LIMIT", 0.5)
    assert not equal("x^{9^{9^{9^{9}}}}", "y^{9^{9^{9}}}")  # sympy would compute for ever
    assert symbolic._judge.timeouts == late + 1 and child.poll() is not None
    monkeypatch.setattr(symbolic, "TIME_LIMIT", 60.0)
    assert equal("x > 3", "3 < x") and symbolic._judge.child.pid != child.pid  # another process took its place
    pid = os.fork()
    if not pid:  # a child of ours asks a process of its own, and leaves the parent's alone
        os._exit(0 if equal("x > 4", "4 < x") else 1)
    assert os.waitpid(pid, 0)[1] == 0 and equal("x > 5", "5 < x")


@pytest.mark.parametrize("a, b", [
    ("2+2", "4"), ("3=3", "8=8"), ("1<2", "3<4"), ("7 tenths", "7"), ("3, 2, 1", "1, 2, 3"), (None, "1"), ("3 and 141", "3141"),
    (r"4\mathrm{i}", "4"), (r"\{1, 2\}", r"\{1, 3\}"), ("5 cm", "5 mm")])
def test_what_ours_knows_to_be_wrong_is_not_asked(monkeypatch, a, b):
    monkeypatch.setattr(symbolic, "available", lambda: True)
    monkeypatch.setattr(symbolic._judge, "ask", lambda *pair: True)
    assert not symbolic.symbolically_equal(a, b) and not symbolic.symbolically_equal(b, a)
    assert symbolic.symbolically_equal("x > 3", "3 < x")


def test_without_math_verify_the_second_opinion_is_the_first(monkeypatch):
    monkeypatch.setattr(symbolic, "available", lambda: False)
    assert symbolic.symbolically_equal("1+x", "x+1") and not symbolic.symbolically_equal("x > 3", "3 < x")
