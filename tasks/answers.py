r"""Find the answer in a text and compare it with the right one, without evaluating anything.

Two stages: extract_answer(text) -> str | None, answers_equal(prediction, gold) -> bool. Completions are hostile text:
`9**9**9**9` is a string here, and every number is bounded before it is made. The comparison is strict on purpose: a
reward that accepts too much is farmed, one that misses a few right answers only learns a little slower. So
    numbers       exact fractions; a decimal equals a fraction to 1e-12 (0.333 is not 1/3); % and $ are dropped, 50% is 50
    7 apples      one unit after a number is dropped; against another unit it stays; a number word (7 tenths) is none
    (1,2] {1,2}   element by element; the order counts except in sets and unions; the kind of bracket counts
    x + 1         as a formula (formula.py); but a number is asked for as a number: 2+2 is no answer where 4 is
    the rest      as text, after spellings of LaTeX are made one (canonical)
Left out: +-, flipped inequalities, identities of functions, decimal commas. symbolic.py asks math-verify about those.
"""

import re
import unicodedata
from fractions import Fraction
from itertools import accumulate

from tasks import formula

MAX_ANSWER = 2000  # characters; beyond it nobody answers, somebody attacks
MAX_PARTS = 50  # elements of a list; the rest stays in one piece
MAX_NESTING = 50  # hand-written LaTeX stays below 10; recursion must end long before Python's own limit
TAIL = 100_000  # characters at the end of a text in which the answer is looked for
RELATIVE_TOLERANCE = Fraction(1, 10**12)  # decimal against fraction: 0.333 is not 1/3

# ----------------------------------------------------------------------------------------------------
# 1. Extraction

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.S)  # \{ is one token, and no brace
_SENTENCE_GOES_ON = re.compile(r"\.(?:\s|$)|,? \(?(?:because|since|so|as|which|where|when|for)\b"
                               r"|(?<=[0-9A-Za-z}$)%]), (?!(?:and|or) \W*[0-9])[a-z]{2,} ")


def without_thought(text):
    """What follows the last closed thought; None where a thought is open at the end: it was cut off."""
    after = text.rpartition("</think>")[2]
    return None if "<think>" in after else after


def _box(text):
    r"""Content of the \boxed{...}, \fbox{...} or "\boxed 7" that text begins with; None if it is cut off, too long or deep."""
    space, rest = re.match(r"\\[a-z]+( *)(.*)", text[: MAX_ANSWER + 9], re.S).groups()
    if not rest.startswith("{"):
        return re.match(r"[^\s$]*", rest)[0] if space else None
    depth = at = 0
    for token in _TOKEN.findall(rest):
        depth += (token == "{") - (token == "}")
        at += len(token)
        if depth in (0, MAX_NESTING + 2):
            return rest[1 : at - 1].strip() if depth == 0 else None
    return None


def extract_answer(text):
    r"""What the last mark in the text holds: a line "#### x", or \boxed{x} or \fbox{x}; without any of them the last
    "answer is x". None if there is no mark, and also if nothing readable follows the last one: an earlier one does not
    count. What stands in <think> is no answer, and a line "####" between a box and more text is a heading."""
    text = (without_thought(text) or "")[-TAIL:]
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    sentence = max(text.rfind("answer is"), text.rfind("Answer is"))
    line = max((m.start() for m in re.finditer(r"^[^\S\n]*####", text, re.M)), default=-1)
    answer, _, below = text[line:].strip().partition("\n")
    if line > box and not (box >= 0 and below):
        answer = answer.lstrip("#").strip()
    elif box >= 0:
        answer = _box(text[box:])
    elif sentence >= 0:
        answer = text[sentence + len("answer is") :][: MAX_ANSWER + 1].lstrip(" :*\n").split("\n")[0]
        answer = _SENTENCE_GOES_ON.split(answer)[0].strip()
    else:
        return None
    return answer if answer and len(answer) <= MAX_ANSWER else None


def last_number(text):
    """The last number in the text, or None: a lenient second opinion for evaluation, never a reward."""
    found = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text[-TAIL:])
    return found[-1].rstrip(",") if found else None


# ----------------------------------------------------------------------------------------------------
# 2. One spelling

_SIGNS = str.maketrans(dict.fromkeys("−–‐‑‒﹣－", "-") | dict.fromkeys("\u00a0\u2009\u202f", " ") | {
    "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "，": ",", "√": "\\sqrt ", "°": " degrees ",
    "∞": "\\infty ", "∪": "\\cup ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ",
    "∈": "\\in ", "∅": "\\emptyset "})
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
_COMMANDS = {"\\" + c: new for new, old in {
    "\\frac": "dfrac tfrac cfrac", "\\binom": "dbinom tbinom", "\\le ": "leq leqslant", "<": "lt",
    "\\ge ": "geq geqslant", ">": "gt", "\\ne ": "neq", "*": "times ast cdot", "/": "div", ":": "colon",
    " degrees ": "degree", "\\emptyset ": "varnothing", "\\rightarrow ": "to", " or ": "lor vee",
    "⦃": "{ lbrace", "⦄": "} rbrace", "": "left right big Big bigl bigr Bigl Bigr mathbf mathbb "
    "mathcal mathit mathsf boldsymbol bm underline boxed fbox displaystyle textstyle large Large bf rm",
    " ": "quad qquad ! , ; : > $ % ( ) [ ]", "¶": "\\"}.items() for c in old.split()} | {"\\ ": " "}
_UNITS = dict(m="meters", g="grams", s="seconds", h="hours", L="liters", N="newtons", V="volts")
_ROMAN = r"\\(?:text(?:bf|it|rm|normal)?|mbox|hbox|mathrm|operatorname|emph) ?\{"
_ONE = r"(\\[A-Za-z]+|[^\\{}\s(\[])"  # an argument without braces
_GROUP = r"\{[^{}]*\}"
for _ in range(4):
    _GROUP = rf"\{{(?:[^{{}}]|{_GROUP})*+\}}"
_NAMES = "|".join((formula.GREEK | formula.FUNCTIONS | {"infty", "sqrt"}) - {"xi", "mu", "nu"})
_SPELLINGS = [(re.compile(pattern), new) for pattern, new in [  # in this order
    ("[¼-¾⅐-⅞]", lambda m: r"\frac{%s}{%s}" % (*unicodedata.normalize("NFKC", m[0]).split("⁄"),)),
    ("[⁰¹²³⁴-⁹⁺⁻]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}"),
    ("[₀-₉]+", lambda m: f"_{{{m[0].translate(_RAISED)}}}"),
    ("[α-ω]", lambda m: f"\\{unicodedata.name(m[0]).split()[-1].lower()} "),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\ne "), (r"^\*\*|\*\*$|[⦃⦄¶]", ""),
    (r"(?<!\\)sqrt ?([0-9]+)", r"\\sqrt{\1}"), (rf"(?<![\\A-Za-z])({_NAMES})(?![A-Za-z])", r"\\\1 "),
    (r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:\{, ?\}|,\\! ?|\\[,!;: ]|[ ~])[0-9]{3})+(?![0-9])",
     lambda m: re.sub("[^0-9]", "", m[0])),  # signs that part thousands
    (rf"(?:(?:\\[,;: ]|[ ~]){_ROMAN}|{_ROMAN}(?:\\,|[ ~]))([mgshLNV])\}}",
     lambda m: f" {_UNITS[m[1]]} "),  # 5\,\mathrm{m}; without the distance it is a letter
    (r"(\\(?:right|left))\.|(\\\\)\[[^\]]*\]|\\(?:text)?color ?\{[^{}]*\}", r"\1\2"),
    (r"\\(begin|end)\{?([pbv]?matrix|array)\}?(?:\{[lcr| ]*\})?", r"⦅\1 \2⦆"),
    (r"\\(?:[A-Za-z]+|.)", lambda m: _COMMANDS.get(m[0], m[0])), (r"[$%€£~]|\{\}|\\text\{\}", " "),
    (rf"{_ROMAN}([^{{}}]*)\}}", lambda m: m[1] if len(m[1]) == 1 else
        f"\\{m[1]} " if m[1] in formula.FUNCTIONS else f" {m[1]} "),
    (r"\^ ?\{? ?(?:\\circ|degrees) ?\}?", " degrees "), (r"\^ ?\{? ?th ?\}?", ""),
    (r"\^ ?([+-]?[0-9]+|[+-] ?[A-Za-z])", r"^{\1}"), (r"(\\sqrt|\^) ?\(([^()]*)\)", r"\1{\2}"),
    (rf"(\\sqrt\[[^\]]*\]|\\sqrt|\\frac|\\binom|\^|_) ?{_ONE}", r"\1{\2}"),
    *[(rf"(\\(?:frac|binom){_GROUP}) ?{_ONE}", r"\1{\2}")] * 3, (r"(?<=[}\w]) ?(?=\{)", ""),
    (r"(?:(\()|\[) *⦅begin array⦆(.*)⦅end array⦆ *(?(1)\)|\])", r"⦅begin pmatrix⦆\2⦅end pmatrix⦆"),
    (r"(?<=[0-9]) ?\b([apAP])\.? ?[mM]\b\.?", lambda m: f" {m[1].lower()}m"),  # 9:05 p.m.
    (r"\s+", " "), (r",? (?:and|or) |, | ?; ?", ";"),  # 7, 125 is a list, 7,125 may be a number
    (r"(?<![\w}\])]) | (?!\w|\([A-Za-z]{2})", ""),
    (r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1"), (r"(?<= )\\|(?:¶|[ .])+$", lambda m: m[0].strip(" .¶")),
    (r"(?<![^(\[;,])\+(?=\\infty)", ""), (r"^⦃⦄$", r"\\emptyset"),
    (r"(?<![\w)}\]!'])\(([0-9.]+)\)(?![\w(){}\[\]^!.])", r"\1"),  # (5)/(6)
]]


def _depths(text):
    """Of the brackets, behind every character; an interval's brackets need not match."""
    return list(accumulate((c in "([{⦃") - (c in ")]}⦄") for c in text))


def canonical(answer):
    r"""LaTeX or plain text in one spelling: "$\dfrac12$." and "\frac{1}{2}" are the same. Marks that
    carry no value go ($, %, \left, spaces, bold, colour, a full stop); None if it is nested too deep."""
    if "\\begin" not in answer:  # a doubled backslash ends a row, or was escaped once too often
        answer = re.sub(r"\\\\(?=[A-Za-z])", r"\\", answer)
    answer = answer.translate(_SIGNS).strip()
    for pattern, new in _SPELLINGS:
        answer = pattern.sub(new, answer).strip()
    return None if max(_depths(answer), default=0) > MAX_NESTING else answer


# ----------------------------------------------------------------------------------------------------
# 3. Numbers and units

_D = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?"
_DECIMAL = re.compile(rf"([+-]?)({_D})(?:[eE]([+-]?[0-9]+)|"
                      r"(?:(?<=[0-9.])[*x]|(?<![0-9.]))10\^\{([+-]?[0-9]+)\})?")
_FRACTION = re.compile(rf"([+-]?)(?:([0-9]*) )?([+-]?{_D})/([+-]?{_D})")
_LATEX_FRACTION = re.compile(r"([+-]?)([0-9]*)\\frac\{([^{}]*)\}\{([^{}]*)\}")
_WORD = (r"(?:(?=[A-Za-z]+[aeiou])[A-Za-z]{3,}|inch|[mckd]m|[mk]g|m[lL]|ft|in|mi|yd|hrs?|lbs?|oz|mph"
         r"|pct|cc|sq)(?:\^\{[23]\})?")
_UNIT = re.compile(rf"(.*(?:[0-9)}}\]]|\\pi)) ?(\()?((?:{_WORD}|[mg](?=/s))(?: {_WORD}|/(?:{_WORD}|"
                   r"[hsmgL](?:\^\{[23]\})?)){0,3}(?:(?<=degrees) [CF])?)(?(2)\))", re.S)
_TENS = "(?:thir|for|four|fif|six|seven|eigh|nine|twen)t(?:een|y|ie)"
_NO_UNIT = re.compile(
    r"(?i)\b(?:(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand"
    rf"|\w*illion|lakh|crore|dozen|score|gross|half|halve|quarter|third|fifth|eighth|ninth|twelfth|{_TENS})"
    r"(?:th)?s?|squared|cubed|factorial|over|plus|minus|times|divided|not|choose|mod|point|nor|versus"
    r"|vs|if|out|but|except|root|base|prime|than)\b")


def _exact(digits, exponent=""):
    """ "1,234.5", "3" -> Fraction; None beyond the bounds or without a digit before the exponent."""
    n = sum(c.isdigit() for c in digits)
    if not 1 <= n <= formula.MAX_DIGITS or abs(int(exponent[:5] or 0)) > formula.MAX_EXPONENT:
        return None
    return Fraction(digits.replace(",", "").removesuffix(".")) * Fraction(10) ** int(exponent or 0)


def parse_number(text):
    """Canonical answer -> (Fraction, is it written as a fraction), or None. [0-9] only, no eval."""
    if match := _DECIMAL.fullmatch(text):
        sign, digits, e, power = (g or "" for g in match.groups())
        value = _exact(digits or "1" * bool(power), e or power)
        return None if value is None else (-value if sign == "-" else value, False)
    match = _LATEX_FRACTION.fullmatch(text)
    match = _FRACTION.fullmatch("{}{} {}/{}".format(*match.groups()) if match else text)
    sign, whole, top, bottom = (g or "" for g in match.groups()) if match else "    "
    signs, parts = sign + top[:1] + bottom[:1], [_exact(p.strip("+-")) for p in (top, bottom)]
    if None in parts or not parts[1] or (whole and not 0 < parts[0] < parts[1]):
        return None
    return ((_exact(whole or "0") or 0) + parts[0] / parts[1]) * (-1) ** signs.count("-"), True


def _without_unit(text):
    """ "7 apples" -> ("7", "apple"); ("7", "") without a unit."""
    match = _UNIT.fullmatch(text)
    if not match or _NO_UNIT.search(match[3]):
        return text, ""
    return match[1], " ".join(w.removesuffix("s") for w in match[3].lower().split())


# ----------------------------------------------------------------------------------------------------
# 4. Comparison

_LETTER = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{\w+\})?'?"
_NAME = re.compile(rf"((?:{_LETTER}(?:\({_LETTER}\))?|[fghpqFGHPS]\([0-9]+\)"
                   rf"|\({_LETTER}(?:[,;]{_LETTER})+\))(?:=|\\in(?![A-Za-z]) ?))?(.*)", re.S)
_MATRIX = re.compile(r"⦅begin [pb]matrix⦆(.*?)¶?⦅end ([pb])matrix⦆", re.S)
_BRACKETS = re.compile(r"([⦃{(\[])(.*)([⦄})\]])", re.S)
_RELATION = re.compile(r"(=|<|>|\\(?:le|ge|ne|in)(?![A-Za-z]))")


def _split(text, separator):
    """At the separators outside all brackets."""
    depths = [0, *_depths(text)]
    cuts = [m.start() for m in re.finditer(re.escape(separator), text) if depths[m.start()] == 0]
    starts = [0, *(cut + len(separator) for cut in cuts[:MAX_PARTS])]
    return [text[i:j].strip() for i, j in zip(starts, [*cuts[:MAX_PARTS], len(text)])]


def _list(text):
    """Elements of a list. Where ";" parts them (canonical), 1,234 is one of them."""
    parts = _split(text, ";")
    return [q for p in parts for q in ([p] if parts[1:] and parse_number(p) else _split(p, ","))]


def _parts(text):
    """-> (kind, elements): "cup" of a union, "(]" of an interval, "," of a list, the shape of a
    matrix; "" of one thing, without the brackets around it."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in matrix[1].split("¶")]
        return str([len(row) for row in rows]), [cell.strip() for row in rows for cell in row]
    if (union := _split(text, "\\cup"))[1:]:
        return "cup", union
    if (match := _BRACKETS.fullmatch(text)) and min([0, *_depths(match[2])]) == 0:
        kind, parts = match[1] + match[3], _list(match[2])
        if kind == "⦃⦄" or (parts[1:] and kind != "{}"):
            return kind, parts
        return _parts(match[2]) if kind in ("()", "{}") else ("", [text])
    parts = [text] if parse_number(text) else _list(text)
    return "," if parts[1:] else "", parts


def _all_equal(a, b, ordered, ask):
    if len(a) != len(b) or ordered:
        return len(a) == len(b) and all(_equal(x, y, ask, inner=True) for x, y in zip(a, b))
    left = list(b)
    for x in a:
        match = [i for i, y in enumerate(left) if _equal(x, y, None, inner=True)][:1]
        if not match:
            return False
        del left[match[0]]
    return True


def _same_equation(a, b):
    """One is the other, or its negative, and neither holds whatever its letters are."""
    x, y = ("({})-({})".format(*e.split("=")) for e in (a, b))
    ends = formula.value(x, 1), formula.value(x, 100)
    depends = None not in ends and abs(ends[0] - ends[1]) * 10**40 > 1
    return depends and (formula.same(x, y) or formula.same(x, f"-({y})"))


def _equal(a, b, ask, inner=False):
    """Two canonical answers. ask: whom to ask about formulas that differ for all that is known here.
    inner: they stand in a list; sets within sets keep their order, or the cost would be a power."""
    (kind_a, parts_a), (kind_b, parts_b) = _parts(a), _parts(b)
    if kind_a and kind_b:
        ordered = inner or kind_a not in ("cup", "⦃⦄")
        return kind_a == kind_b and _all_equal(parts_a, parts_b, ordered, ask)
    a, b = (p if kind else parts[0] for p, kind, parts in ((a, kind_a, parts_a), (b, kind_b, parts_b)))
    number_a, number_b = parse_number(a), parse_number(b)
    if number_a and number_b:
        tolerance = RELATIVE_TOLERANCE * abs(number_b[0]) if number_a[1] != number_b[1] else 0
        return abs(number_a[0] - number_b[0]) <= tolerance
    if a == b:
        return a != ""
    equations = a.count("="), b.count("=")
    if equations == (1, 1) and _same_equation(a, b):
        return True
    (name_a, rest_a), (name_b, rest_b) = _NAME.fullmatch(a).groups(), _NAME.fullmatch(b).groups()
    if name_a or name_b:
        other = name_a and name_b and name_a != name_b and "(" not in name_a + name_b
        return not other and _equal(rest_a, rest_b, ask, inner)
    (plain_a, unit_a), (plain_b, unit_b) = _without_unit(a), _without_unit(b)
    if unit_a or unit_b:
        return ("" in (unit_a, unit_b) or unit_a == unit_b) and _equal(plain_a, plain_b, ask, inner)
    if number_a or number_b:
        return False
    if re.fullmatch(r"[A-Za-z ]*[A-Za-z][AEIOUaeiou][A-Za-z ]*", a):
        return a.casefold() == b.casefold()  # Evelyn, evelyn; but x is not X
    sides_a, sides_b = _RELATION.split(a), _RELATION.split(b)
    if sides_a[1:] and sides_a[1::2] == sides_b[1::2]:
        if _all_equal(sides_a[::2], sides_b[::2], True, None):
            return True
    return formula.same(a, b) or bool(ask and max(equations) < 2 and ask(a, b))


def answers_equal(prediction, gold, ask=None):
    """Do the two say the same? Without ask a pure function of the two texts; None equals nothing."""
    if prediction is None or gold is None or max(len(prediction), len(gold)) > MAX_ANSWER:
        return False
    a, b = canonical(prediction), canonical(gold)
    return bool(a and b) and _equal(a, b, ask)
