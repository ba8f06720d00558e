"""The task chain: a chain of digit operations, made to show what wrong solutions teach that right
ones do not.

    python train_sft.py --task chain --num-problems 256 --num-examples 256

A model of width 64 learns in seconds to solve *new* problems; papers/train_dpo.py uses it.
"""

import functools
import random

from tasks.base import Problem, Task, split_of

POOL = 24000  # problems made; eight tenths are for training


class Chain(Task):
    """Prompt "+5*2>3=7", response "=2=4=4": apply the operations one after the other to the 7 and
    write the digit after each; success: the last digit is right. + - * are modulo 10, "<b" is the
    smaller and ">b" the larger of the two. A step is one digit (a token). To solve new problems is
    to know the table of 200 (digit, operation) pairs.

    The demonstrator computes a step right with chance `strength`, else it writes some other digit
    and goes on from there; only solutions whose *last* digit is right are shown. As maps merge (>7
    sends 3 and 5 alike to 7) some mistakes are healed, so demonstrations contain wrong steps
    although every one is "correct": the spurious steps of arXiv 2406.14532. With strength 1 they
    contain none.
    """

    strengths = dict(base=0.7, prover=0.9, strong=1.0)
    random_demonstrations = True
    step_tokens = 1

    def __init__(self, operations=5):
        self.operations = operations
        self.max_new_tokens = operations + 1
        self.symbols = [o + b for o in "+-*<>" for b in "2357"]

    def tokenizer(self):
        from open_weights.tokenizer import alphabet_tokenizer

        return alphabet_tokenizer([*self.symbols, *(f"={d}" for d in range(10))])

    @staticmethod
    def apply(digit, symbol):
        """One operation: apply(5, ">7") is 7."""
        b = int(symbol[1:])
        results = {
            "+": digit + b,
            "-": digit - b,
            "*": digit * b,
            "<": min(digit, b),
            ">": max(digit, b),
        }
        return results[symbol[0]] % 10

    @property
    def by_split(self):
        return self._pool(self.operations, tuple(self.symbols))

    @classmethod
    @functools.lru_cache(maxsize=4)
    def _pool(cls, operations, symbols):
        out = dict(train=[], val=[], test=[])
        rng = random.Random(f"chain/{operations}")
        for _ in range(POOL):
            start = rng.randrange(10)
            ops = tuple(rng.choice(symbols) for _ in range(operations))
            prompt = f"{''.join(ops)}={start}"
            digit = functools.reduce(cls.apply, ops, start)
            out[split_of(prompt)].append(Problem(prompt, prompt, str(digit), (start, ops)))
        return out

    def demonstration(self, problem, strength, seed):
        rng = random.Random(f"{problem.key}/{seed}")
        start, ops = problem.data
        while True:
            digit = start
            text = ""
            for op in ops:
                digit = self.apply(digit, op)
                if rng.random() >= strength:
                    digit = (digit + rng.randrange(1, 10)) % 10
                text += f"={digit}"
            if str(digit) == problem.answer:
                return text

    def grade(self, problem, completion):
        digits = completion.split("=")[1:]
        return float(len(digits) == self.operations and digits[-1] == problem.answer)

    def first_illegal_step(self, problem, completion):
        """The first step whose digit does not follow from the digit before it."""
        digit, ops = problem.data
        written = completion.split("=")[1:]
        for i, op in enumerate(ops):
            digit = self.apply(digit, op)
            if i >= len(written) or written[i] != str(digit):
                return i
        return None
