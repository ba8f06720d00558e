r"""Are two formulas the same? Both are computed at the same made-up values of their letters, to 200 digits.

An identity holds at every point; two different formulas of bounded size agree at a random one with a chance of nothing
(the Schwartz-Zippel lemma for polynomials; roots and powers are decimals here, hence 100 digits must agree). So there is
no rewriting, no eval and no computer algebra, and the cost is one walk over the text. pi, e and \sin x are unknowns like
x: their numeric values play no part. Left out, and never equal: inequalities, \pm, |x|, n!, exponents above 64.
"""

import decimal
import functools
import hashlib
import re
from decimal import Decimal

MAX_EXPONENT = 64  # 1e64 is an answer, 1e999999999 an integer that fills the memory
MAX_DIGITS = 200  # Fraction arithmetic is quadratic in the digits
MAX_ROOTS = 30  # a power with a fraction in it costs a logarithm to 200 digits
MAX_NESTING = 50  # hand-written LaTeX stays below 10; recursion must end long before Python's own limit
AGREE = Decimal(10) ** -100

GREEK = set("""alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau
    upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell""".split())  # noqa: SIM905
FUNCTIONS = set("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan ln log exp".split())  # noqa: SIM905
_TOKEN = re.compile(r"\\[A-Za-z]+|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[A-Za-z]|[-+*/^_(){}\[\]=]")
_WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3}|[A-Z]{2})")  # "east" is not e a s t, and no anagram of "seat"


class _Refused(Exception):
    """Not a formula that is understood here."""


def _unknown(salt, *name):
    """A number between 1/2 and 3/2 (salt 1: minus that), fixed by the name: 1 + x is one value wherever it stands."""
    digest = hashlib.sha256(repr((salt, name)).encode()).digest()
    size = Decimal(int.from_bytes(digest * 3, "big")) / Decimal(2 ** (8 * 3 * len(digest))) + Decimal("0.5")
    return (-size if salt else size), Decimal(0)


def _times(a, b):
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _over(a, b):
    size = b[0] * b[0] + b[1] * b[1]
    if size < AGREE * AGREE:
        raise _Refused
    return _times(a, (b[0] / size, -b[1] / size))


def _power(base, exponent):
    """Integers by multiplication, real roots of positive numbers, square roots of negative ones; nothing else."""
    if exponent[1]:
        raise _Refused
    n = exponent[0].to_integral_value()
    if abs(exponent[0]) > MAX_EXPONENT or (base[1] and n != exponent[0]):
        raise _Refused
    if n == exponent[0]:
        out = (Decimal(1), Decimal(0))
        for bit in bin(abs(int(n)))[2:]:
            out = _times(out, out)
            out = _times(out, base) if bit == "1" else out
        return out if n >= 0 else _over((Decimal(1), Decimal(0)), out)
    if base[0] < 0 and exponent[0] == Decimal("0.5"):
        return Decimal(0), (-base[0]).sqrt()
    if base[0] <= 0:
        raise _Refused
    return base[0] ** exponent[0], Decimal(0)


class _Reader:
    """Recursive descent over the tokens of one formula; every method returns a complex number (re, im)."""

    def __init__(self, text, salt):
        self.tokens = _TOKEN.findall(text)
        if "".join(self.tokens) != text.replace(" ", "") or _WORD.search(text):
            raise _Refused
        self.at, self.depth, self.salt, self.roots = 0, 0, salt, 0

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, want=None):
        token = self.peek()
        if not token or (want and token != want):
            raise _Refused
        self.at += 1
        return token

    def sum(self):
        total = self.product()
        while self.peek() in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            term = self.product()
            total = total[0] + sign * term[0], total[1] + sign * term[1]
        return total

    def product(self):
        sign = 1
        if self.peek() in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
        value = self.factor()
        while (token := self.peek()) and token not in ("+", "-", ")", "}", "]", "="):
            if token in ("*", "/", "\\cdot", "\\times"):
                self.take()
            elif token[0].isdigit() or token[0] == ".":
                raise _Refused  # x2 and (1)(2)3 are no way to write a product
            value = (_over if token == "/" else _times)(value, self.factor())
        return sign * value[0], sign * value[1]

    def factor(self):
        base = self.atom()
        if self.peek() != "^":
            return base
        self.take()
        return self.power(base, self.argument())

    def power(self, base, exponent):
        self.roots += exponent[0] != exponent[0].to_integral_value()
        if self.roots > MAX_ROOTS:
            raise _Refused
        return _power(base, exponent)

    def argument(self):
        """A group in braces, or one token: x^2, \\sqrt2."""
        if self.peek() == "{":
            return self.group("}")
        return self.atom()

    def group(self, close):
        self.take()
        value = self.sum()
        self.take(close)
        return value

    def atom(self):
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise _Refused
        value = self.nested_atom()
        self.depth -= 1
        return value

    def nested_atom(self):
        token = self.peek()
        if token in ("(", "{"):
            return self.group(")" if token == "(" else "}")
        self.take()
        if token[0].isdigit() or token[0] == ".":
            return self.number(token)
        if token == "\\frac":
            top = self.argument()
            return _over(top, self.argument())
        if token == "\\sqrt":
            degree = self.group("]") if self.peek() == "[" else (Decimal(2), Decimal(0))
            return self.power(self.argument(), _over((Decimal(1), Decimal(0)), degree))
        if token[1:] in FUNCTIONS:
            return self.function(token)
        if len(token) > 1 and token[1:] not in GREEK or not token[-1].isalpha():
            raise _Refused
        name = token + self.subscript()
        return (Decimal(0), Decimal(1)) if name == "i" else _unknown(self.salt, name)

    def number(self, token):
        if len(token) > MAX_DIGITS or self.peek() == "_":
            raise _Refused  # 52_8 is 42
        value, rest = Decimal(token), self.tokens[self.at : self.at + 7]
        if rest[:1] == ["\\frac"] and re.fullmatch(r"\\frac\{[0-9]+\}\{[0-9]+\}", "".join(rest)):
            part = self.atom()[0]  # 1\frac{1}{2} is a mixed number
            if not 0 < part < 1:
                raise _Refused
            value += part
        return value, Decimal(0)

    def subscript(self):
        if self.peek() != "_":
            return ""
        self.take()
        if self.peek() != "{":
            return "_" + self.take()
        end = self.tokens.index("}", self.at) if "}" in self.tokens[self.at :] else self.at
        name, self.at = "".join(self.tokens[self.at + 1 : end]), end + 1
        return "_" + name

    def function(self, name):
        """\\sin^2 x, \\sin 2x, \\log_2(8): an unknown of its argument's value."""
        name += self.subscript()
        exponent = None
        if self.peek() == "^":
            self.take()
            exponent = self.argument()
            if exponent[0] < 0:
                raise _Refused  # \sin^{-1} is arcsin or 1/sin
        value = self.factor()
        while self.peek() and (self.peek()[0].isalpha() or self.peek() in ("\\frac", "\\sqrt") or self.peek()[1:] in GREEK):
            value = _times(value, self.factor())
        rounded = [str(v.quantize(AGREE) + 0) for v in value]
        out = _unknown(self.salt, name, *rounded)
        return out if exponent is None else _power(out, exponent)


@functools.lru_cache(maxsize=1024)  # a set of n formulas is compared n^2 times, but computed n times
def _value(text, salt):
    """(re, im) of a formula, of an equation its left side minus its right side; None if it is not understood."""
    try:
        with decimal.localcontext(decimal.Context(prec=200, Emax=9999, Emin=-9999)):
            reader = _Reader(text, salt)
            value = reader.sum()
            if reader.peek() == "=":
                reader.take()
                right = reader.sum()
                value = value[0] - right[0], value[1] - right[1]
            return None if reader.peek() else value
    except (_Refused, decimal.DecimalException, ValueError, IndexError):
        return None


def same_formula(a, b):
    """Canonical LaTeX (answers.canonical) -> True if both are formulas and equal for all values of their letters; two
    equations also if one is the other's negative. False where either is not understood; never raises."""
    if max(len(a), len(b)) > 2000 or a.count("=") != b.count("=") or a.count("=") > 1:
        return False
    for salt in (0, 1):
        x, y = _value(a, salt), _value(b, salt)
        if x is None or y is None:
            return salt == 1  # x^{2/3} has no value at a negative x: the positive one has decided
        with decimal.localcontext(decimal.Context(prec=200, Emax=99999, Emin=-99999)):
            size = max(map(abs, (*x, *y, Decimal(1) / 10**64)))
            gap = max(abs(x[0] - y[0]), abs(x[1] - y[1]))
            if "=" in a:
                gap = min(gap, max(abs(x[0] + y[0]), abs(x[1] + y[1])))
            if gap > AGREE * size:
                return False
    return True
