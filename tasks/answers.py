r"""Find the answer in a text and compare it with the right one, without evaluating anything.

Two stages: extract_answer(text) -> str | None, answers_equal(prediction, gold) -> bool. Completions are hostile text:
`9**9**9**9` is a string here, and every number is bounded before it is made. The comparison is strict on purpose: a
reward that accepts too much is farmed, one that misses a few right answers only learns a little slower. So
    numbers       exact fractions; a decimal equals a fraction to 1e-12 (0.333 is not 1/3); % and $ are dropped, 50% is 50
    7 apples      one unit after a number is dropped; against another unit it stays
    (1,2] {1,2}   element by element; the order counts except in sets and unions; the kind of bracket counts
    x + 1         same_formula (algebra.py); but a number is asked for as a number: 2+2 is no answer where 4 is
    the rest      as text, after spellings of LaTeX are made one (canonical)
Left out: +-, inequalities, decimal commas. symbolic.py asks math-verify about those, for evaluation only.
"""

import re
from fractions import Fraction

from tasks.algebra import MAX_DIGITS, MAX_EXPONENT, MAX_NESTING, same_formula

MAX_ANSWER = 2000  # characters; beyond it nobody answers, somebody attacks
TAIL = 100_000  # characters at the end of a text in which the answer is looked for
RELATIVE_TOLERANCE = Fraction(1, 10**12)  # decimal against fraction: 0.333 is not 1/3

# ----------------------------------------------------------------------------------------------------
# 1. Extraction


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


def _last_box(text):
    r"""Content of the last \boxed{...}, \fbox{...} or "\boxed 7"; None if it is cut off."""
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    rest = text[at + (6 if text[at + 1] == "b" else 5) :][: MAX_ANSWER + 2]
    start = len(rest) - len(rest.lstrip(" "))
    if rest[start : start + 1] == "{":
        return _boxed(rest, start + 1)
    bare = re.match(r" ([^\s$]+)", rest)
    return bare[1] if bare else None


def extract_answer(text):
    r"""What the last mark in the text holds: a line "#### x", or \boxed{x} or \fbox{x}; without any of them the last
    "answer is x". None if there is no mark, and also if nothing readable follows the last one: an earlier one does not
    count. What stands within <think> is no answer."""
    if (thought := text.rfind("</think>")) >= 0:
        text = text[thought + len("</think>") :]
    elif "<think>" in text:
        return None
    text = text[-TAIL:]
    at, line = 0, -1  # where the last line that begins with #### stands
    for each in text.split("\n"):
        if each.lstrip().startswith("####"):
            line = at
        at += len(each) + 1
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    said = max(text.rfind("answer is"), text.rfind("Answer is"))
    if line > box:
        answer = text[line:].split("\n", 1)[0].strip().lstrip("#").strip()
    elif box >= 0:
        answer = _last_box(text)
    elif said >= 0:
        answer = text[said + len("answer is") :][: MAX_ANSWER + 1].lstrip(" :*\n").split("\n")[0]
        answer = re.split(r"\.(?:\s|$)", answer)[0].strip()
    else:
        return None
    return answer if answer and len(answer) <= MAX_ANSWER else None


def last_number(text):
    """The last number in the text, or None: a lenient second opinion for evaluation, never a reward."""
    found = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text[-TAIL:])
    return found[-1].rstrip(",") if found else None


# ----------------------------------------------------------------------------------------------------
# 2. One spelling

_SAME = {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty ", "∪": "\\cup ", "≤": "\\le ",
         "≥": "\\ge ", "≠": "\\ne ", "°": "^\\circ ", "{,}": ",", "<=": "\\le ", ">=": "\\ge ", "!=": "\\ne "}
_COMMANDS = {"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\leq": "\\le", "\\geq": "\\ge", "\\neq": "\\ne",
             "\\lt": "<", "\\gt": ">", "\\times": "\\cdot", "\\ast": "\\cdot", "\\degree": "\\circ", "\\lbrace": "\\{",
             "\\rbrace": "\\}", "\\colon": ":", "\\to": "\\rightarrow"}
_SILENT = {"\\left", "\\right", "\\big", "\\Big", "\\bigl", "\\bigr", "\\Bigl", "\\Bigr", "\\displaystyle", "\\quad", "\\qquad",
           "\\!", "\\,", "\\;", "\\:", "\\ ", "\\$", "\\%", "$", "%", "€", "£", "~", "\\(", "\\)", "\\[", "\\]"}
_WRAPPERS = {"\\text", "\\mbox", "\\textbf", "\\textit", "\\textrm", "\\textnormal", "\\mathrm", "\\mathbf", "\\mathbb",
             "\\mathcal", "\\operatorname", "\\boxed", "\\fbox", "\\hbox", "\\bf", "\\rm"}
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.S)


class _TooDeep(Exception):
    pass


def _group(tokens, at, depth=0):
    """Canonical text of the argument that begins at tokens[at] (a group in braces or one token) -> (text, next at)."""
    while at < len(tokens) and tokens[at] == " ":
        at += 1
    if at >= len(tokens):
        return "", at
    if tokens[at] != "{":
        return _unit(tokens, at, depth)
    text, at = _run(tokens, at + 1, depth + 1)
    return text, at + 1


def _unit(tokens, at, depth):
    """One token with the arguments that belong to it, spelled in one way -> (text, next at)."""
    if depth > MAX_NESTING:
        raise _TooDeep
    token, at = _COMMANDS.get(tokens[at], tokens[at]), at + 1
    if token in _SILENT:
        return "", at
    if token in _WRAPPERS:
        text, at = _group(tokens, at, depth + 1)
        return (text if text.strip().lower() in ("and", "or") else TEXT + text.strip()), at
    if token == "\\frac":
        top, at = _group(tokens, at, depth + 1)
        bottom, at = _group(tokens, at, depth + 1)
        return f"\\frac{{{top.strip()}}}{{{bottom.strip()}}}", at
    if token == "\\sqrt":
        root = ""
        if at < len(tokens) and tokens[at] == "[" and "]" in tokens[at:]:
            end = tokens.index("]", at)
            root, at = "".join(tokens[at : end + 1]), end + 1
        text, at = _group(tokens, at, depth + 1)
        return f"\\sqrt{root}{{{text.strip()}}}", at
    if token in "^_":
        text, at = _group(tokens, at, depth + 1)
        text = text.strip()
        return (token + text if len(text) == 1 else "" if text == "\\circ" else f"{token}{{{text}}}"), at
    if token == "{":
        text, at = _run(tokens, at, depth + 1)
        return text if len(text) < 2 or text.startswith("\\frac") else f"{{{text}}}", at + 1
    return token, at


def _run(tokens, at, depth=0):
    """Canonical text up to the brace that closes this group, or the end -> (text, where it stands)."""
    out = []
    while at < len(tokens) and tokens[at] != "}":
        text, at = _unit(tokens, at, depth)
        out.append(text)
    return "".join(out), at


def canonical(answer):
    r"""LaTeX or plain text in one spelling: "$\dfrac12$." and "\frac{1}{2}" are the same. Marks that carry no value go
    ($, %, \left, thin spaces, bold, a final full stop, "x ="); None if it is nested too deep."""
    for old, new in _SAME.items():
        answer = answer.replace(old, new)
    answer = re.sub(r"\*\*$|^\*\*|√\s*([0-9]+)", lambda m: f"\\sqrt{{{m[1]}}}" if m[1] else "", answer.strip())
    answer = answer.replace(TEXT, "")
    if "\\begin" not in answer:
        answer = re.sub(r"\\\\(?=[A-Za-z])", r"\\", answer)  # a doubled backslash ends a row, or was escaped once too often
    tokens = _TOKEN.findall(re.sub(r"(?<!\\)\\! *", "", answer))
    out, at = [], 0
    try:
        while at < len(tokens):
            if tokens[at] == "}":  # one that closes nothing
                out.append("}")
                at += 1
            text, at = _run(tokens, at)
            out.append(text)
    except _TooDeep:
        return None
    text = " ".join("".join(out).split())
    text = text.removesuffix(".").removesuffix("\\").strip()
    if text.startswith("{") and text.endswith("}") and text.find("}") == len(text) - 1:
        text = text[1:-1].strip()
    text = re.sub(r" ?([+\-*/=(){}\[\]&^_<>|:;!]|\\\\|\\[{}]) ?", r"\1", text)
    text = re.sub(rf"^{TEXT}|(?<=[-+=,(]){TEXT}", "", re.sub(rf" (?=[,{TEXT}])", "", text))
    text = re.sub(r" (?=\\)", "", text)
    text = re.sub(r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1", text)
    text = re.sub(r"\\cdot(?=[A-Za-z\\(])", "", re.sub(r"\\cdot ", r"\\cdot", text))
    return re.sub(r"^(?:[A-Za-z]|\\[a-z]+)(?:=|\\in(?![A-Za-z]) ?)", "", text).strip()


# ----------------------------------------------------------------------------------------------------
# 3. Numbers

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?"
_DECIMAL = re.compile(rf"([+-]?)({_NUMBER})")
_FRACTION = re.compile(rf"([+-]?)(?:\\frac\{{([+-]?)({_NUMBER})\}}\{{([+-]?)({_NUMBER})\}}|()({_NUMBER})/([+-]?)({_NUMBER}))")
_MIXED = re.compile(r"([+-]?)([0-9]+) ?(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|(?<= )([0-9]+)/([0-9]+))")
_SCIENTIFIC = re.compile(rf"([+-]?)({_NUMBER})(?:\\cdot|\*|x)10\^(?:([0-9])|\{{([+-]?[0-9]+)\}})")
# A unit is a word of three letters or one of the list, or what \text holds (TEXT): "7 xy" is no seven.
TEXT = "\x01"  # a mark that no answer holds: canonical puts it before the words of \text
_UNIT = re.compile(rf"(.+){TEXT}([A-Za-z ]+)(?:\^[23])?|(.*[0-9}}]) ((?:[A-Za-z]{{3,}}|mm|cm|km|kg|mg|ml|ft|in|mi|hr|lb|oz)"
                   r"(?: [A-Za-z]+){0,2})(?:\^[23])?")
_NO_UNIT = set("""hundred hundreds thousand thousands million millions billion billions trillion dozen dozens half halves third
    thirds quarter quarters fourth fourths fifth fifths sixth sixths tenth tenths hundredth hundredths squared cubed
    factorial over or and plus minus times divided to by not choose mod point nor versus vs if""".split())  # noqa: SIM905


def exact(text):
    """ "1,234.5e3" -> Fraction; None beyond the bounds or without a digit before the exponent."""
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    digits = sum(c.isdigit() for c in mantissa)
    if not 1 <= digits <= MAX_DIGITS or len(exponent) > 4 or abs(int(exponent or 0)) > MAX_EXPONENT:
        return None
    return Fraction(mantissa.removesuffix(".")) * Fraction(10) ** int(exponent or 0)


def parse_number(text):
    """Canonical answer -> (Fraction, is it written as a fraction), or None. [0-9] only, no eval."""
    if match := _DECIMAL.fullmatch(text):
        value = exact(match[2])
        return None if value is None else (-value if match[1] == "-" else value, False)
    if match := _FRACTION.fullmatch(text):
        sign, s1, a, s2, b, s3, c, s4, d = (g or "" for g in match.groups())
        top, bottom = exact(a or c), exact(b or d)
        if top is None or not bottom:
            return None
        return (-1) ** [sign, s1, s2, s3, s4].count("-") * top / bottom, True
    if match := _MIXED.fullmatch(text):
        whole, top, bottom = exact(match[2]), exact(match[3] or match[5]), exact(match[4] or match[6])
        if None in (whole, top, bottom) or not 0 < top < bottom:
            return None
        return (-1 if match[1] == "-" else 1) * (whole + top / bottom), True
    if match := _SCIENTIFIC.fullmatch(text):
        power = match[3] or match[4]
        value = exact(f"{match[2]}e{power}") if "e" not in match[2].lower() else None
        return None if value is None else (-value if match[1] == "-" else value, False)
    return None


def _same_number(a, b):
    return abs(a[0] - b[0]) <= (RELATIVE_TOLERANCE * abs(b[0]) if a[1] != b[1] else 0)


def _unit_of(text):
    """ "7 apples" -> ("7", "apple"); ("7", "") without a unit."""
    match = _UNIT.fullmatch(text)
    words = (match[2] or match[4]).lower().split() if match else []
    if not words or set(words) & _NO_UNIT:
        return text, ""
    return (match[1] or match[3]).strip(), " ".join(w.removesuffix("s") for w in words)


# ----------------------------------------------------------------------------------------------------
# 4. Comparison


MAX_PARTS = 50  # elements of a list; the rest stays in one piece


def _split(text, separator):
    """At the separators outside all brackets; an interval's brackets need not match."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0 and len(parts) < MAX_PARTS and text.startswith(separator, i):
            parts.append(text[start:i])
            i += len(separator)
            start = i
        else:
            i += 1
    return [p.strip() for p in [*parts, text[start:]]]


def _brackets(text):
    """ "(1,2]" -> ("(", "1,2", "]") if its outermost brackets open first and close last; else ("", text, "")."""
    for left in ("\\{", "(", "["):
        right = [r for r in (("\\}",) if left == "\\{" else (")", "]")) if text.endswith(r)]
        if text.startswith(left) and right:
            inner, depth = text[len(left) : -len(right[0])], 0
            for c in inner:
                depth += (c in "([{") - (c in ")]}")
                if depth < 0:
                    break
            if depth == 0 and "," in inner:
                return left, inner, right[0]
    return "", text, ""


def _matrix(text):
    r"""\begin{pmatrix}1&2\\3&4\end{pmatrix} -> [["1","2"],["3","4"]]; None if it is none."""
    match = re.fullmatch(r"\\begin\{([pb])matrix\}(.*?)(?:\\\\)?\\end\{\1matrix\}", text, re.S)
    return match and [[c.strip() for c in row.split("&")] for row in match[2].split("\\\\")]


def _all_equal(a, b, ordered=True):
    if len(a) != len(b):
        return False
    if ordered:
        return all(_equal(x, y, inner=True) for x, y in zip(a, b))
    left = list(b)
    for x in a:
        same = next((i for i, y in enumerate(left) if _equal(x, y, inner=True)), None)
        if same is None:
            return False
        del left[same]
    return True


def _equal(a, b, inner=False):
    """Two canonical answers. inner: they stand in a list; sets within sets keep their order, or the cost would be a power."""
    number_a, number_b = parse_number(a), parse_number(b)
    if number_a and number_b:
        return _same_number(number_a, number_b)
    if a == b != "":
        return True
    if "," in a and "," in b or "\\cup" in a:
        unions = _split(a, "\\cup"), _split(b, "\\cup")
        if len(unions[0]) > 1:
            return _all_equal(*unions, ordered=inner)
        (left_a, inner_a, right_a), (left_b, inner_b, right_b) = _brackets(a), _brackets(b)
        if (left_a, right_a) != (left_b, right_b):
            return False
        parts = _split(inner_a, ","), _split(inner_b, ",")
        if len(parts[0]) > 1:
            return _all_equal(*parts, ordered=inner or left_a != "\\{")
    rows_a, rows_b = _matrix(a), _matrix(b)
    if rows_a and rows_b:
        return len(rows_a) == len(rows_b) and all(map(_all_equal, rows_a, rows_b))
    (plain_a, unit_a), (plain_b, unit_b) = _unit_of(a), _unit_of(b)
    if (unit_a or unit_b) and not (unit_a and unit_b and unit_a != unit_b) and (plain_a, plain_b) != (a, b):
        return _equal(plain_a, plain_b, inner)
    if re.fullmatch(r"[A-Za-z ]{2,}", a):
        return a.casefold() == b.casefold()  # Evelyn, evelyn; but x is not X
    if re.fullmatch(r"\([A-Z]\)|[A-Z]", a) and re.fullmatch(r"\([A-Z]\)|[A-Z]", b):
        return a.strip("()") == b.strip("()")  # (C) and C, a choice
    return not (number_a or number_b) and same_formula(a, b)


def _nesting(text):
    """Depth of the brackets at their deepest."""
    depth = deepest = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    return deepest


_LIST_WORD = re.compile(r",? +(?:and|or) +|, +")


def answers_equal(prediction, gold):
    """Do the two say the same? A pure function of the two texts; None equals nothing."""
    if prediction is None or gold is None or max(len(prediction), len(gold)) > MAX_ANSWER:
        return False
    a, b = canonical(prediction), canonical(gold)
    if not a or not b:
        return False
    if max(_nesting(a), _nesting(b)) > MAX_NESTING:
        return a == b
    number_a, number_b = parse_number(a), parse_number(b)
    if number_a and number_b:
        return _same_number(number_a, number_b)
    return _equal(_LIST_WORD.sub(",", a), _LIST_WORD.sub(",", b))
