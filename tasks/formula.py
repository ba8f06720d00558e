r"""Do two formulas agree? Both are computed, to 100 digits, at the same random values of their letters.

An identity of roots and powers holds at every point, two different ones agree at a random point with
a chance of nothing (Schwartz-Zippel). A function is one more unknown, fixed by its name and the value
of its argument: t\ln 5 is \ln(5)t, but not \ln(5t). pi, e and i are letters like x. Identities of
functions, and i^2 = -1, are left to math-verify (symbolic.py).
"""

import decimal
import functools
import hashlib
import operator
import re
from decimal import Decimal
from fractions import Fraction

MAX_DIGITS = 80
MAX_EXPONENT = 64  # 1e64 is an answer, 1e999999999 a number that fills the memory
AGREE = Decimal(10) ** -MAX_DIGITS
GREEK = set("""alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu
    nu xi pi rho sigma tau upsilon phi varphi chi psi omega ell
    Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega""".split())
FUNCTIONS = set("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan ln log exp".split())
CLOSE = {"(": ")", "{": "}", "[": "]"}
LEVEL = {"+": 0, "-": 0, "^": 2, ")": -1, "}": -1, "]": -1, ";": -1}  # the rest is a product: 1
TOKEN = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z])(?:_\{\w+\})?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+|[-+*/^(){}\[\]]")
NO_PRODUCT = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3}|[A-Z]{2}|[fghFGHP](?:_\{\w*\})?\()")  # east, f(2)


def _unknown(*name):
    """A number between 1/2 and 3/2 that is fixed by the name."""
    digest = hashlib.sha256(repr(name).encode()).digest() * 2
    return Decimal(int.from_bytes(digest, "big")) / Decimal(256 ** len(digest)) + Decimal("0.5")


def _power(base, exponent):
    r"""Of a negative base odd roots alone: \sqrt{x^2} is not x."""
    ratio = Fraction(exponent).limit_denominator(99)
    odd = ratio.denominator % 2 and abs(exponent * ratio.denominator - ratio.numerator) < AGREE
    if abs(exponent) > MAX_EXPONENT or (not base and exponent <= 0) or (base < 0 and not odd):
        raise ValueError
    return abs(base) ** exponent * (-1 if base < 0 and ratio.numerator % 2 else 1)


OPERATORS = {"+": operator.add, "-": operator.sub, "/": operator.truediv, "^": _power}

class _Reader:
    """Precedence climbing over canonical LaTeX of bounded nesting. Every method returns a number;
    ValueError: not a formula that is understood here."""

    def __init__(self, text, scale):
        self.rest, self.scale = [";", *TOKEN.findall(text)[::-1]], scale  # the next token is the last
        if "".join(self.rest[:0:-1]) != text.replace(" ", "") or NO_PRODUCT.search(text):
            raise ValueError

    def expression(self, level=0):
        """A sum (level 0), a product (1) or a power (2)."""
        sign = self.rest.pop() if level == 0 and self.rest[-1] in ("+", "-") else "+"
        value = self.atom() if sign == "+" else -self.expression(1)
        while (binds := LEVEL.get(token := self.rest[-1], 1)) >= level:
            if token in OPERATORS or token == "*":
                self.rest.pop()
            elif token[0] in ".0123456789":
                raise ValueError  # x2 and (1)(2)3 are no way to write a product
            right = self.group("{") if token == "^" else self.expression(binds + 1)
            value = OPERATORS.get(token, operator.mul)(value, right)
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
            mixed = re.match(r"\\frac\{[0-9]+\}\{[0-9]+\}", "".join(self.rest[:-8:-1]))  # 1\frac{1}{2}
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
        if power < 0 or self.rest[-1].split("_")[0][1:] in FUNCTIONS:
            raise ValueError
        value = self.atom() if bracket else self.expression(2)
        while not bracket and (self.rest[-1][0].isalpha() or self.rest[-1][1:] in GREEK):
            value *= self.expression(2)
        if not bracket and self.rest[-1] in ("\\frac", "\\sqrt"):
            raise ValueError
        return _power(_unknown(name, str(value.quantize(AGREE) + 0)), power)


@functools.lru_cache(maxsize=1024)  # a set of n formulas is compared n^2 times, but computed n times
def value(text, scale=1):
    """With letters about as large as scale; None if it is not understood, or not defined there."""
    try:
        with decimal.localcontext(decimal.Context(MAX_DIGITS + 20, Emax=9999, Emin=-9999)):
            reader = _Reader(text, scale)
            out = reader.expression()
            return out if reader.rest == [";"] else None
    except (ValueError, IndexError, decimal.DecimalException):
        return None


def same(a, b):
    """Canonical LaTeX -> are both understood, and equal wherever they are defined? Never raises."""
    points = [(value(a, scale), value(b, scale)) for scale in (1, -1, 100)]
    gaps = [abs(x - y) <= AGREE * max(abs(x), abs(y), AGREE) for x, y in points if None not in (x, y)]
    return bool(gaps) and all(gaps) and all((x is None) == (y is None) for x, y in points)
