"""The task planted: a hidden sequence of letters to find, by exploration (arXiv 2410.08146, section
3.3).

    python train_sft.py --task planted
"""

import functools
import itertools
import random
import string

from infra.cli import UserError
from tasks.base import Problem, Task, task_seed


@functools.lru_cache(maxsize=1 << 16)
def kmp_next(pattern, k, symbol):
    """Length of the longest prefix of pattern that ends pattern[:k] + symbol; k < len(pattern)."""
    tail = pattern[:k] + symbol
    while not pattern.startswith(tail):
        tail = tail[1:]
    return len(tail)


@functools.lru_cache(maxsize=256)
def planted_values(pattern, letters, length, strength):
    """Success of the gamma policy: table[letters left, 0..length][KMP state, 0..len(pattern)]."""
    table = [[0.0] * len(pattern) + [1.0]]
    for _ in range(length):
        row = []
        for k, y in enumerate(pattern):
            weight = {c: strength if c == y else 1.0 for c in letters}
            row.append(sum(weight[c] * table[-1][kmp_next(pattern, k, c)] for c in letters))
        table.append([v / (strength + len(letters) - 1) for v in row] + [1.0])
    return table


class Planted(Task):
    """Prompt "A" hides 6 of the letters a..n; reward 1 iff they occur in a row among the first 12
    letters.

    A response is 12 letters and is cut by max_new_tokens: no EOS is trained, as when to stop is not
    what this teaches. A step is a token. The demonstrator of strength gamma gives the next hidden
    letter gamma times the weight of each other letter. train, val and test are the same prompts,
    repeated to any n: the task asks whether a policy finds what it was never shown, not whether it
    generalises.
    """

    hides_by_seed = True
    strengths = dict(base=5.0, prover=16.0, strong=1000.0)
    ends_with_eos = False
    random_demonstrations = True
    step_tokens = 1
    stages = dict(
        sft=dict(steps=400, num_examples=6000),
        verifier=dict(num_problems=40000),
        rl=dict(num_prompts=4, num_generations=32),  # outcome-only needs large groups
        long=5,
    )

    def __init__(self, seed=0, prompts=4, letters=14, planted=6, length=12):
        if not (1 <= prompts <= 26 and 1 <= planted <= letters <= 26 and planted <= length):
            raise UserError(
                "planted needs 1-26 prompts and planted <= letters <= 26 and planted <= length"
            )
        self.letters = string.ascii_lowercase[:letters]
        self.max_new_tokens = length
        self.all = []
        for name in string.ascii_uppercase[:prompts]:
            hidden = random.Random(f"planted/{seed}/{name}").sample(self.letters, planted)
            self.all.append(Problem(name, name, "".join(hidden)))
        self.by_split = dict(train=self.all, val=self.all, test=self.all)

    args = dict(prompts=4, length=6)  # prompts, each with a sequence of its own; its letters

    @classmethod
    def from_config(cls, cfg, **options):
        args = cls.args_of(cfg)
        if not 1 <= args["prompts"] <= 26 or not 1 <= args["length"] <= 12:
            raise UserError("--task-args: prompts is 1 to 26 and length 1 to 12")
        flags = dict(seed=task_seed(cfg), prompts=args["prompts"], planted=args["length"])
        return cls(**(flags | options))

    def tokenizer(self):
        from open_weights.tokenizer import alphabet_tokenizer

        return alphabet_tokenizer([p.prompt for p in self.all] + list(self.letters))

    def problems(self, split, n=None, seed=0):
        """The prompts in the order of their names, from the first again until there are n."""
        once = sorted(super().problems(split), key=lambda p: p.key)
        return list(itertools.islice(itertools.cycle(once), len(once) if n is None else n))

    def demonstration(self, problem, strength, seed):
        rng = random.Random(f"{problem.key}/{seed}")
        y = problem.answer
        k = 0  # KMP state: so many letters of y stand at the end
        out = []
        for _ in range(self.max_new_tokens):
            if k == len(y):  # solved: the rest does not matter
                out.append(rng.choice(self.letters))
                continue
            follow = rng.random() * (strength + len(self.letters) - 1) < strength
            out.append(y[k] if follow else rng.choice(self.letters.replace(y[k], "")))
            k = kmp_next(y, k, out[-1])
        return "".join(out)

    def grade(self, problem, completion):
        return float(problem.answer in completion[: self.max_new_tokens])

    def exact_value(self, problem, prefix, strength):
        prefix = prefix[: self.max_new_tokens]
        k = 0
        for c in prefix:
            k = kmp_next(problem.answer, k, c)
            if k == len(problem.answer):
                return 1.0
        table = planted_values(problem.answer, self.letters, self.max_new_tokens, float(strength))
        return table[self.max_new_tokens - len(prefix)][k]
