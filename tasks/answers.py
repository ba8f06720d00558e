r"""Find the answer in a text and compare it with the right one, without evaluating anything.

Completions are hostile text, and the comparison is strict on purpose: a reward that accepts too
much is farmed, one that misses a few right answers only learns a little slower. So
    numbers       exactly; a decimal equals a fraction to 1e-12; % and $ are dropped, 50% is 50
    7 apples      one unit after a number is dropped, against another it stays; 7 tenths has none
    (1,2] {1,2}   element by element; the order counts but for sets and unions; the brackets count
    x + 1         by its value, wherever x is; but where 4 is asked for, 2+2 is no answer
    the rest      as text, after spellings of LaTeX are made one (canonical)
Left out, and asked of math-verify (symbolic.py): +-, flipped inequalities, identities of functions.
"""

import decimal
import functools
import operator
import random
import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate

MAX_ANSWER = 2000  # characters; beyond it nobody answers, somebody attacks
MAX_PARTS = 50  # elements of a list; the rest stays in one piece
MAX_NESTING = 50  # hand-written LaTeX stays below 10
MAX_DIGITS = 80  # of a number
MAX_EXPONENT = 64  # 1e64 is an answer, 1e999999999 a number that fills the memory
TAIL = 100_000  # characters at the end of a text in which the answer is looked for
TOLERANCE = Decimal(10) ** -12  # decimal against fraction, relative: 0.333 is not 1/3
AGREE = Decimal(10) ** -MAX_DIGITS  # formulas, computed to some more digits

# 1. Extraction
_GROUP = r"\{[^{}]*\}"  # in braces, ten deep; \{ is no brace
for _ in range(9):
    _GROUP = rf"\{{(?:[^{{}}\\]|\\.|{_GROUP})*+\}}"
_GOES_ON = re.compile(r"\.(?:\s|$)|,? \(?(?:because|since|so|as|which|where|when|therefore|thus)\b|"
                      r"(?<=[0-9A-Za-z}$)%]), (?!(?:and|or) \W*(?:[0-9]|[A-Za-z]\b|\\))[a-z]{2,} ")


def without_thought(text):
    """What follows the last closed thought; "" where one is open at the end: it was cut off."""
    after = text.rpartition("</think>")[2]
    return "" if "<think>" in after else after


def extract_answer(text):
    r"""What the last mark of a text holds: a line "#### x", or \boxed{x} or \fbox{x}; without them
    the last "answer is x". None: no mark, or nothing readable behind it, whatever stands above it.
    A thought holds no answer, and a line "####" between a box and more text is a heading."""
    text = without_thought(text)[-TAIL:]
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    phrase = max(text.rfind("answer is"), text.rfind("Answer is"))
    line = max((m.start() for m in re.finditer(r"^[^\S\n]*####", text, re.M)), default=-1)
    answer, _, below = text[line:].strip().partition("\n")
    if line > box and not (box >= 0 and below):
        answer = answer.lstrip("#").strip()
    elif box >= 0:
        inside = re.match(rf"(?s)\\\w+(?: *({_GROUP})| +([^\s${{]+))", text[box:])
        answer = inside and (inside[2] or inside[1][1:-1].strip())
    elif phrase >= 0:
        answer = text[phrase + 9 :][: MAX_ANSWER + 1].lstrip(" :*\n").split("\n")[0]
        answer = _GOES_ON.split(answer)[0].strip()
    return answer if answer and max(line, box, phrase) >= 0 and len(answer) <= MAX_ANSWER else None


# 2. One spelling
GREEK = set("""alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda
    mu nu xi pi rho sigma tau upsilon phi varphi chi psi omega ell
    Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega""".split())  # noqa: SIM905
FUNCTIONS = {f + h for f in ("sin", "cos", "tan", "cot") for h in ("", "h")} | {
    "sec", "csc", "arcsin", "arccos", "arctan", "ln", "log", "exp"}
_SIGNS = dict.fromkeys("−–‐‑‒﹣－", "-") | dict.fromkeys("\u00a0\u2009\u202f", " ") | {
    "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "，": ",", "√": "\\sqrt ", "°": " degrees ",
    "∞": "\\infty ", "∪": "\\cup ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ",
    "∈": "\\in ", "∅": "\\emptyset "}
_plain = functools.partial(unicodedata.normalize, "NFKC")
_COMMANDS = {"\\" + c: new for new, old in {
    "\\frac": "dfrac tfrac cfrac", "\\binom": "dbinom tbinom", "\\le ": "leq leqslant", "<": "lt",
    "\\ge ": "geq geqslant", ">": "gt", "\\ne ": "neq", "*": "times ast cdot", "/": "div",
    " degrees ": "degree", "\\emptyset ": "varnothing", "\\to ": "rightarrow", " or ": "lor vee",
    "⦃": "{ lbrace", "⦄": "} rbrace", "": "left right big Big bigl bigr Bigl Bigr mathbf mathbb "
    "mathcal mathit mathsf boldsymbol bm underline boxed fbox displaystyle textstyle large bf rm",
    ":": "colon", " ": "quad qquad ! , ; : > $ % ( ) [ ]", "¶": "\\"}.items() for c in old.split()}
_UNITS = dict(m="meters", g="grams", s="seconds", h="hours", L="liters", N="newtons", V="volts")
_ROMAN = r"\\(?:text(?:bf|it|rm|normal)?|mbox|hbox|mathrm|operatorname|emph) ?\{"
_ONE = r"(\\[A-Za-z]+|[^\\{}\s(\[])"  # an argument without braces
_NAMES = "|".join((GREEK | FUNCTIONS | {"infty", "sqrt"}) - {"xi", "mu", "nu"})
_SPELLINGS = [(re.compile(pattern), new) for pattern, new in [  # in this order
    ("[¼-¾⅐-⅞]", lambda m: r"\frac{{{}}}{{{}}}".format(*_plain(m[0]).split("⁄"))),
    ("[⁰¹²³⁴-⁻]+", lambda m: f"^{{{_plain(m[0])}}}"), ("[₀-₉]+", lambda m: f"_{{{_plain(m[0])}}}"),
    ("[α-ω]", lambda m: f"\\{unicodedata.name(m[0]).split()[-1].lower()} "),
    (r"[^ -~]", lambda m: _SIGNS.get(m[0], m[0])), (r"^\*\*|\*\*$|[⦃⦄⦅⦆¶]", ""),
    (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\ne "), (r"\bsqrt ?([0-9]+)", r"sqrt{\1}"),
    (rf"(?<![\\A-Za-z])({_NAMES})(?![A-Za-z])", r"\\\1 "),  # plain pi
    (r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?: ?\{, ?\} ?|,\\! ?|\\[,!;: ]|[ ~])[0-9]{3})+(?![0-9])",
     lambda m: re.sub("[^0-9]", "", m[0])),  # signs that part thousands
    (rf"(?:(?:\\[,;: ]|[ ~]){_ROMAN}|{_ROMAN}(?:\\,|[ ~]))([mgshLNV])\}}",
     lambda m: f" {_UNITS[m[1]]} "),  # 5\,\mathrm{m}; without the distance it is a letter
    (r"(\\(?:right|left))\.|(\\\\)\[[^\]]*\]|\\(?:text)?color(?:box)? ?\{[^{}]*\}", r"\1\2"),
    (r"\\(begin|end)\{?([pbv]?matrix|array)\}?(?:\{[lcr| ]*\})?", r"⦅\1 \2⦆"),
    (r"\\(?:[A-Za-z]+|.)", lambda m: _COMMANDS.get(m[0], m[0])), (r"[$%€£~]|\\ |\{\}", " "),
    (rf"{_ROMAN}([^{{}}]*)\}}", lambda m: m[1] if len(m[1]) == 1 else
        f"\\{m[1]} " if m[1] in FUNCTIONS else f" {m[1]} "),
    (r"\^ ?\{? ?(?:\\circ|degrees) ?\}?", " degrees "), (r"\^ ?\{? ?th ?\}?", ""),
    (r"\^ ?([+-]?[0-9]+|[+-] ?[A-Za-z])", r"^{\1}"),
    (r"(\\sqrt|\^) ?\(((?:[^()]|\([^()]*\))*+)\)", r"\1{\2}"),
    (rf"(\\sqrt\[[^\]]*\]|\\sqrt|\\frac|\\binom|\^|_) ?{_ONE}", r"\1{\2}"),
    *[(rf"(\\(?:frac|binom){_GROUP}) ?{_ONE}", r"\1{\2}")] * 3, (r"(?<=[}\w]) ?(?=\{)", ""),
    (r"(?:(\()|\[) *⦅begin (?:array|matrix)⦆(.*)⦅end (?:array|matrix)⦆ *(?(1)\)|\])",
     r"⦅begin pmatrix⦆\2⦅end pmatrix⦆"),
    (r"(?<=[0-9]) ?\b([apAP])\.? ?[mM]\b\.?", lambda m: f" {m[1].lower()}m"),  # 9:05 p.m.
    (r"\s+", " "), (r",? ?\b(?:and|or)\b ?|, | ?; ?", ";"),  # 7, 125 is a list, 7,125 a number
    (r"(?<![\w}\])]) | (?!\w|\([A-Za-z]{2})", ""),
    (r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1"), (r"(?:¶|[ .])+$", ""),
    (r"(?<![^({\[;,])\+(?=\\infty)", ""), (r"^⦃⦄$", r"\\emptyset"),
    (r"(?<![\w)}\]!'])\(([0-9.]+)\)(?![\w({\[^!.])", r"\1"),  # (5)/(6)
]]


def _depths(text):
    """Of the brackets, behind every character; an interval's brackets need not match."""
    return list(accumulate((c in "([{⦃") - (c in ")]}⦄") for c in text))


def canonical(answer):
    r"""LaTeX or plain text in one spelling: "$\dfrac12$." and "\frac{1}{2}" are one. What has no
    value goes ($, %, \left, spaces, bold, a full stop); None if it is nested too deep."""
    if "\\begin" not in answer:  # a doubled backslash ends a row, or was escaped once too often
        answer = re.sub(r"\\\\(?=[A-Za-z])", r"\\", answer)
    for pattern, new in _SPELLINGS:
        answer = pattern.sub(new, answer).strip()
    return None if max(_depths(answer), default=0) > MAX_NESTING else answer


# 3. Formulas: computed at the same random values of their letters (Schwartz-Zippel). A function is
# one more unknown, fixed by its name and the value of its argument; pi, e and i are letters like x.
CLOSE = {"(": ")", "{": "}", "[": "]"}
LEVEL = {"+": 0, "-": 0, "^": 2, ")": -1, "}": -1, "]": -1, ";": -1}  # the rest is a product: 1
TOKEN = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z])(?:_\{\w+\})?|[0-9]+\.?[0-9]*|\.[0-9]+|[^\w\\ ]")
NO_PRODUCT = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3}|[A-Z]{2}|[fghFGHP](?:_\{\w*\})?\()")  # east


def _unknown(*name):
    """A number between 1/2 and 3/2 that is fixed by the name."""
    return Decimal(random.Random(repr(name)).getrandbits(400)) / 2**400 + Decimal("0.5")


def _power(base, exponent):
    r"""Of a negative base odd roots alone: \sqrt{x^2} is not x."""
    ratio = Fraction(exponent if abs(exponent) <= MAX_EXPONENT else 0).limit_denominator(99)
    odd = ratio.denominator % 2 and abs(exponent * ratio.denominator - ratio.numerator) < AGREE
    if abs(exponent) > MAX_EXPONENT or (not base and exponent <= 0) or (base < 0 and not odd):
        raise ValueError
    return abs(base) ** exponent * (-1 if base < 0 and ratio.numerator % 2 else 1)


class _Reader:
    """Precedence climbing over canonical LaTeX. ValueError: it is not understood."""
    operators = {"+": operator.add, "-": operator.sub, "/": operator.truediv, "^": _power}

    def __init__(self, text, scale):
        self.rest, self.scale = [";", *TOKEN.findall(text)[::-1]], scale  # the next token is last
        if "".join(self.rest[:0:-1]) != text.replace(" ", "") or NO_PRODUCT.search(text):
            raise ValueError

    def expression(self, level=0):
        """A sum (level 0), a product (1) or a power (2)."""
        sign = self.rest.pop() if level == 0 and self.rest[-1] in ("+", "-") else "+"
        value = self.atom() if sign == "+" else -self.expression(1)
        while (binds := LEVEL.get(token := self.rest[-1], 1)) >= level:
            if token in self.operators or token == "*":
                self.rest.pop()
            elif token[0] in ".0123456789":
                raise ValueError  # x2 and (1)(2)3 are no way to write a product
            right = self.group("{") if token == "^" else self.expression(binds + 1)
            value = self.operators.get(token, operator.mul)(value, right)
        return value

    def group(self, left):
        opened, value, closed = self.rest.pop(), self.expression(), self.rest.pop()
        if opened != left or closed != CLOSE[left]:
            raise ValueError
        return value

    def atom(self):
        if (token := self.rest[-1]) in ("(", "{"):
            return self.group(token)
        name = self.rest.pop().split("_")[0].removeprefix("\\")
        if token[0] in ".0123456789" and len(token) <= MAX_DIGITS:
            mixed = re.match(r"\\frac\{[0-9]+\}\{[0-9]+\}", "".join(self.rest[:-8:-1]))
            part = self.atom() if mixed else 0
            if part < 1:
                return Decimal(token) + part
        elif name == "frac":
            return self.group("{") / self.group("{")
        elif name == "sqrt":
            degree = self.group("[") if self.rest[-1] == "[" else Decimal(2)
            return _power(self.group("{"), 1 / degree)
        elif name in FUNCTIONS:
            return self.function(token)
        elif name in GREEK or (len(name) == 1 and name.isalpha()):
            return self.scale * _unknown(token)
        raise ValueError

    def function(self, name):
        r"""\sin^2 x, \sin 2x, \log_2(8): in brackets stands the whole argument, else numbers and
        letters are part of it. \sin^{-1} is arcsin or 1/sin, \ln x\frac{1}{2} one or the other."""
        power = self.group("{") if self.rest[-1] == "^" and self.rest.pop() else Decimal(1)
        bracket = self.rest[-1] in ("(", "{")
        value = self.atom() if bracket else self.expression(2)
        while not bracket and (self.rest[-1][0].isalpha() or self.rest[-1][1:] in GREEK):
            value *= self.expression(2)
        if power < 0 or (not bracket and self.rest[-1] in ("\\frac", "\\sqrt")):
            raise ValueError
        return _power(_unknown(name, str(value.quantize(AGREE) + 0)), power)


@functools.lru_cache(maxsize=1024)  # a set of n formulas is compared n^2 times, computed n times
def _value(text, scale=1):
    """With letters about as large as scale; None if it is not understood, or not defined there."""
    try:
        with decimal.localcontext(decimal.Context(MAX_DIGITS + 20, Emax=9999, Emin=-9999)):
            out = (reader := _Reader(text, scale)).expression()
            return out if reader.rest == [";"] else None
    except (ValueError, IndexError, RecursionError, decimal.DecimalException):
        return None


def _same(a, b):
    """Canonical LaTeX -> are both understood, and equal wherever they are defined? Never raises."""
    both = {(_value(a, scale), _value(b, scale)) for scale in (1, -1, 100)} - {(None, None)}
    return bool(both) and all(None not in p and abs(p[0] - p[1]) <= AGREE * abs(p[0]) for p in both)


# 4. Numbers and units
_DECIMAL = r"(?=\.?[0-9])(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?"
_NUMBER = re.compile(
    rf"([+-]?)(?:({_DECIMAL})(?:[eE]([+-]?\d+)| ?[*x] ?10\^\{{([+-]?\d+)\}})?|10\^\{{([+-]?\d+)\}}|"
    rf"(?:([0-9]+) ?)?\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}|"
    rf"(?:([0-9]+) )?([+-]?{_DECIMAL})/([+-]?{_DECIMAL}))")
_WORD = (r"(?:(?=[A-Za-z]+[aeiou])[A-Za-z]{3,}|inch|eggs?|[mckd]m|[mk]g|m[lL]|ft|in|mi|yd|hrs?|lbs?"
         r"|oz|mph|pct|cc|sq)(?:\^\{[23]\})?")
_UNIT = re.compile(
    r"((?:[^\\]|\\(?:frac|sqrt|pi))*(?:(?<=[0-9)}\]])|(?<=\\pi))) ?(\()?"  # no unit behind \sin 30
    rf"((?:{_WORD}|[mg](?=/))(?: {_WORD}|/(?:{_WORD}|[hsmgL](?:\^\{{[23]\}})?)){{0,3}}"
    r"(?:(?<=degrees) [CF])?)(?(2)\))", re.S)
_NO_UNIT = re.compile(
    r"(?i)\b(?:(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand"
    r"|\w*illion|lakh|crore|dozen|score|gross|hal[fv]e?|quarter|third|fifth|eighth|ninth|twelfth|"
    r"(?:twen|thir|for|four|fif|six|seven|eigh|nine)t(?:een|y|ie))(?:th)?s?|squared|cubed|factorial"
    r"|if|over|plus|minus|times|divided|not|choose|mod|point|versus|vs|out|but|root|base|than)\b")


def parse_number(text):
    """Canonical answer -> (Decimal, is it written as a fraction), or None: no plain number."""
    if not (match := _NUMBER.fullmatch(text)):
        return None
    sign, digits, *powers, whole, top, bottom, first, over, under = match.groups("")
    fraction = f"{whole or first}\\frac{{{top or over}}}{{{bottom or under}}}"
    text = fraction if top or over else f"{digits or 1}*10^{{{''.join(powers) or 0}}}"
    number = _value(sign.strip("+") + text.replace(",", ""))
    return None if number is None else (number, bool(top or over))


def _without_unit(text):
    """ "7 apples" -> ("7", "apple"); ("7", "") without a unit."""
    if not (match := _UNIT.fullmatch(text)) or _NO_UNIT.search(match[3]):
        return text, ""
    return match[1], " ".join(w.removesuffix("s") for w in match[3].lower().split())


# 5. Comparison
_LETTER = rf"(?:[A-Za-z]|\\(?:{'|'.join(GREEK)}))(?:_\{{\w+\}})?'?"
_NAME = re.compile(rf"((?:{_LETTER}(?:(?:\^\{{-1\}})?\({_LETTER}\))?|[fghpqFGHPS]\([0-9]+\)"
                   rf"|\({_LETTER}(?:[,;]{_LETTER})+\))(?:=(?!\(?[A-Z]\)?$)|\\in\b ?))?(.*)", re.S)
_MATRIX = re.compile(r"⦅begin [pb]matrix⦆(.*?)¶?⦅end ([pb])matrix⦆", re.S)
_BRACKETS = re.compile(r"([⦃{(\[])(.*)([⦄})\]])", re.S)
_RELATION = re.compile(r"(=|<|>|\\(?:le|ge|ne|in)(?![A-Za-z]))")


def _split(text, separator):
    """At the separators outside all brackets."""
    depths = [0, *_depths(text)]
    cuts = [m.start() for m in re.finditer(re.escape(separator), text) if depths[m.start()] == 0]
    starts = [0, *(cut + len(separator) for cut in cuts[:MAX_PARTS])]
    return [text[i:j].strip() for i, j in zip(starts, [*cuts[:MAX_PARTS], len(text)])]


def _parts(text):
    """-> (kind, elements): "cup" of a union, "(]" of an interval, "," of a list, the shape of a
    matrix; "" of one thing, without the brackets around it."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in matrix[1].split("¶")]
        return str([len(row) for row in rows]), [cell.strip() for row in rows for cell in row]
    if (union := _split(text, "\\cup"))[1:]:
        return "cup", union
    kind, inner = ",", text
    if (match := _BRACKETS.fullmatch(text)) and min([0, *_depths(match[2])]) == 0:
        kind, inner = match[1] + match[3], match[2]
    parts = _split(inner, ";")  # where ";" parts them (canonical), 1,234 is one of them
    parts = [q for p in parts for q in ([p] if parts[1:] and parse_number(p) else _split(p, ","))]
    if kind == "⦃⦄" or (parts[1:] and not (kind == "," and parse_number(text))):
        return kind.replace("{}", ","), parts
    return _parts(inner) if kind in ("()", "{}") else ("", [text])


def _all_equal(a, b, ordered, ask):
    left, ask = list(b) if len(a) == len(b) else [], ask if ordered and len(a) < 5 else None
    for x in a:
        match = next((y for y in left[: 1 if ordered else None] if _equal(x, y, ask, True)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _depends(text):
    """Does the value of a formula depend on its letters? 3=3 says nothing."""
    ends = _value(text, 1), _value(text, 100)
    return None not in ends and abs(ends[0] - ends[1]) > TOLERANCE


def _equal(a, b, ask, inner=False):
    """Two canonical answers. ask: whom to ask about formulas that differ for all that is known.
    inner: they stand in a list; sets within sets keep their order, or the cost would be a power."""
    (kind_a, parts_a), (kind_b, parts_b) = _parts(a), _parts(b)
    if kind_a and kind_b:
        ordered = inner or kind_a not in ("cup", "⦃⦄")
        return kind_a == kind_b and _all_equal(parts_a, parts_b, ordered, ask)
    a, b = a if kind_a else parts_a[0], b if kind_b else parts_b[0]
    number_a, number_b = parse_number(a), parse_number(b)
    if number_a and number_b:
        tolerance = TOLERANCE * abs(number_b[0]) if number_a[1] != number_b[1] else 0
        return abs(number_a[0] - number_b[0]) <= tolerance
    if a == b:
        return a != ""
    sides_a, sides_b = _RELATION.split(a), _RELATION.split(b)
    if sides_a[1::2] == sides_b[1::2] == ["="]:
        x, y = (f"({left})-({right})" for left, _, right in (sides_a, sides_b))
        if _depends(x) and _depends(y) and (_same(x, y) or _same(x, f"-({y})")):
            return True
    (name_a, rest_a), (name_b, rest_b) = (_NAME.fullmatch(e).groups("") for e in (a, b))
    if (name_a or name_b) and max(len(sides_a), len(sides_b)) < 7:
        other = name_a and name_b and name_a != name_b and "(" not in name_a + name_b
        return not other and _equal(rest_a, rest_b, ask, inner)
    (rest_a, unit_a), (rest_b, unit_b) = _without_unit(a), _without_unit(b)
    if unit_a or unit_b:
        return ("" in (unit_a, unit_b) or unit_a == unit_b) and _equal(rest_a, rest_b, ask, inner)
    if number_a or number_b:
        return False
    if re.fullmatch(r"[A-Za-z ]*[A-Za-z][AEIOUaeiou][A-Za-z ]*", a):
        return a.casefold() == b.casefold()  # Evelyn, evelyn; but x is not X
    if sides_a[1::2] == sides_b[1::2] != [] and _all_equal(sides_a[::2], sides_b[::2], True, None):
        return True
    says = all(any(map(_depends, sides)) or not sides[1:] for sides in (sides_a, sides_b))
    return _same(a, b) or bool(ask and says and ask(a, b))


def answers_equal(prediction, gold, ask=None):
    """Do the two say the same? Without ask a pure function of two texts; None equals nothing."""
    if prediction is None or gold is None or max(len(prediction), len(gold)) > MAX_ANSWER:
        return False
    a, b = canonical(prediction), canonical(gold)
    return bool(a and b) and (a == b or _equal(a, b, ask))
