"""Find the answer in a text and compare it with the right one, without evaluating anything.

Completions are hostile text: `9**9**9**9` is a string here, and every number is bounded before it is made. The
comparison is strict on purpose: a reward that accepts too much is farmed, one that misses a few right answers
only learns a little slower. Left out: units, sets, intervals, symbolic equality.
"""

import re
from fractions import Fraction

MAX_ANSWER = 2000  # characters; beyond it nobody answers, somebody attacks
MAX_NESTING = 50  # braces within \boxed{...}; hand-written LaTeX stays below 10
MAX_EXPONENT = 64  # 1e64 is an answer, 1e999999999 an integer that fills the memory
MAX_DIGITS = 200  # Fraction arithmetic is quadratic in the digits
RELATIVE_TOLERANCE = Fraction(1, 10**12)  # decimal against fraction: 0.333 is not 1/3


def _boxed(text, start):
    """Content of the braces that open just before start; None if unbalanced, too long or too deep."""
    depth = 1
    for i in range(start, min(len(text), start + MAX_ANSWER + 1)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i].strip()
        if depth > MAX_NESTING:
            return None
    return None


def extract_answer(text):
    r"""The last line "#### x", else the last \boxed{x} or \fbox{x}, else the last "answer is x" -> x or None.
    Strict: the last mark of the first kind found decides, even if nothing readable follows it."""
    marked = [s for line in text.split("\n") if (s := line.strip()).startswith("####")]
    answer = None
    if marked:
        answer = marked[-1][4:].strip()
    elif (box := max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))) >= 0:
        answer = _boxed(text, text.index("{", box) + 1)
    elif (at := max(text.rfind("answer is"), text.rfind("Answer is"))) >= 0:
        line = text[at + len("answer is") :][: MAX_ANSWER + 1].split("\n")[0]
        answer = re.split(r"\.(?:\s|$)", line.lstrip(" :"))[0].strip()
    return answer if answer and len(answer) <= MAX_ANSWER else None


_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?"
DECIMAL = re.compile(rf"([+-]?)({_NUMBER})")
_FRACTION = re.compile(
    rf"([+-]?)(?:\\frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}|\\frac([0-9])([0-9])|({_NUMBER})/({_NUMBER}))")
_DROP = re.compile(r"\\left|\\right|\\[!,; ]|\\?[$%]|\*\*$|^\*\*")


def normalise(answer):
    """Marks that carry no value removed: $, %, \\left, thin spaces, bold, a final full stop, "x ="."""
    answer = " ".join(_DROP.sub("", answer.strip()).replace("−", "-").replace("{,}", ",").split())
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer).removesuffix(".")
    return re.sub(r"^[A-Za-z]=", "", re.sub(r" ?([,+\-*/=(){}\[\]]) ?", r"\1", answer)).strip()


def _decimal(text):
    """ "1,234.5e3" -> Fraction; None beyond the bounds or without a digit before the exponent."""
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    digits = sum(c.isdigit() for c in mantissa)
    if not 1 <= digits <= MAX_DIGITS or len(exponent) > 4 or abs(int(exponent or 0)) > MAX_EXPONENT:
        return None
    return Fraction(mantissa.removesuffix(".")) * Fraction(10) ** int(exponent or 0)


def parse_number(text):
    """Normalised answer -> (Fraction, is it written as a fraction), or None. [0-9] only, no eval."""
    match = DECIMAL.fullmatch(text) or _FRACTION.fullmatch(text)
    parts = [_decimal(g) for g in match.groups()[1:] if g is not None] if match else [None]
    if None in parts or parts[1:] == [0]:
        return None
    value = parts[0] if len(parts) == 1 else parts[0] / parts[1]
    return (-value if match[1] == "-" else value), len(parts) == 2


def answers_equal(pred, gold):
    """Exact rational arithmetic; 50% equals 50, not 0.5; other answers as text; None equals nothing."""
    if pred is None or gold is None or max(len(pred), len(gold)) > MAX_ANSWER:
        return False
    pred, gold = normalise(pred), normalise(gold)
    a, b = parse_number(pred), parse_number(gold)
    if a is None or b is None:
        return a is b and pred == gold != ""
    return abs(a[0] - b[0]) <= (RELATIVE_TOLERANCE * abs(b[0]) if a[1] != b[1] else 0)
