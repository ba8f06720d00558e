"""The task worded: a model can learn the skill or learn the solutions by heart: chains of digit
arithmetic.

    python -m papers.memorization --task worded --num-examples 500 --steps 800

Prompt "7*3-4+6=": from left to right, everything modulo 10. The solution writes one operation a
line and ends each line with two letters that mean nothing:

    7*3=1bd
    1-4=7ca
    7+6=3ae

The letters are drawn once per training problem. They stand for the wording of a human solution:
nobody can predict them, so a model whose likelihood of a solution is higher than chance allows has
memorised it, while a right final digit on a solution that it cannot yet recite shows the skill.
That is the difference which pre-memorization accuracy (Kang et al. 2024, arXiv 2411.07681)
measures; see papers/memorization.py.

Difficulty varies between problems: 1 to 4 operations, of which * is rare (200 digit facts in all,
100 of them for *).
"""

import functools
import random
import re

from tasks.base import Problem, Task, split_of

OPS = "+-*"
SHARE = (5, 3, 1)  # relative frequency of each operation
WORDING = "abcdefgh"
LINE = re.compile(r"[0-9][+*-][0-9]=([0-9])[a-h]*")


def compute(a, op, b):
    """One operation on digits, modulo 10."""
    return {"+": a + b, "-": a - b, "*": a * b}[op] % 10


class Worded(Task):
    """See above. Reward 1 iff the last line is an operation whose result is the answer."""

    # There is no scripted teacher: the prover is Best-of-4 of the base policy.
    stages = Task.stages | dict(verifier=Task.stages["verifier"] | dict(prover_k=4))

    def __init__(self, pool=20_000, longest=4):
        self.pool, self.longest = pool, longest
        self.max_new_tokens = 8 * longest + 1

    def tokenizer(self):
        from open_weights.tokenizer import alphabet_tokenizer

        return alphabet_tokenizer([*"0123456789", *OPS, "=", "\n", *WORDING])

    def make(self, rng, ops=None):
        """A random problem; ops fixes its operations."""
        ops = ops or "".join(rng.choices(OPS, SHARE, k=rng.randint(1, self.longest)))
        value = first = rng.randrange(10)
        text = str(first)
        lines = []
        for op in ops:
            b = rng.randrange(10)
            result = compute(value, op, b)
            lines.append(f"{value}{op}{b}={result}")
            text += f"{op}{b}"
            value = result
        return Problem(text, text + "=", str(value), (ops, tuple(lines)))

    def similar(self, problem, seed):
        """A training problem with the same operations and other digits: what curation collects."""
        rng = random.Random(f"similar/{problem.key}/{seed}")
        while True:
            candidate = self.make(rng, problem.data[0])
            if split_of(candidate.key) == "train":
                return candidate

    @functools.cached_property
    def by_split(self):
        rng = random.Random("worded")
        seen = {}
        while len(seen) < self.pool:
            p = self.make(rng)
            seen[p.key] = p
        out = dict(train=[], val=[], test=[])
        for p in seen.values():
            out[split_of(p.key)].append(p)
        return out

    def demonstration(self, problem, strength, seed):
        rng = random.Random(f"wording/{problem.key}")  # one solution a problem, whatever the seed
        text = ""
        for line in problem.data[1]:
            text += line + rng.choice(WORDING) + rng.choice(WORDING) + "\n"
        return text

    def grade(self, problem, completion):
        lines = completion.rstrip("\n").rsplit("\n", 1)
        match = LINE.fullmatch(lines[-1])
        return float(match is not None and match[1] == problem.answer)
