"""What every task is: problems in three splits, prompts, demonstrations, step boundaries and grading.

Splits: the first 8 bytes of sha256(key) modulo 10; 0-7 train, 8 val, 9 test. Python's own hash() is salted.
"""

import hashlib
import random
from dataclasses import dataclass

from infra.cli import UserError


@dataclass(frozen=True)
class Problem:
    """key: stable id, what the split hash is made of. data: what the task itself needs to know."""

    key: str
    prompt: str
    answer: str
    data: tuple = ()


class Task:
    """What tasks share. Each also has
    strengths: {base, prover, strong} of the demonstrator (None: none), max_new_tokens, ends_with_eos,
        random_demonstrations (False: one solution per problem), step_tokens (0: a step ends with a newline)
    tokenizer() -> the tiny alphabet (None: the model brings its own)
    demonstration(problem, strength, seed) -> completion text without EOS
    grade(problem, completion) -> 0.0 or 1.0, from the text alone
    step_ends(tokens, prompt_len, length, tokenizer) -> exclusive ends of the steps: increasing positions in
        `tokens` (prompt and completion), the last is length; [] for an empty completion
    """

    step_tokens = 0

    def problems(self, split, n=None, seed=0):
        """At most n problems (None: all) of "train", "val" or "test", in an order fixed by seed."""
        if split not in self.by_split:
            raise UserError(f"split {split!r} is unknown; use train, val or test")
        found = list(self.by_split[split])
        if not found:
            raise UserError(f"no problem is left in split {split!r}; give more data, or --data {split}=FILE")
        random.Random(f"{split}/{seed}").shuffle(found)
        return found[:n]

    def prompt_tokens(self, problem, tokenizer):
        return tokenizer.encode(problem.prompt)

    def stop_ids(self, tokenizer):
        """Token ids that end a completion, in training as in evaluation."""
        return list(tokenizer.eos_ids)

    def exact_value(self, problem, prefix, strength):
        """Chance that the demonstrator of that strength succeeds from this text; None without a solver.
        It goes on from any text and cannot see an EOS: at the end of a response the outcome is the value."""
        return None

    def first_illegal_step(self, problem, completion):
        """Index of the first step that breaks the rules; None if all keep them or there are none."""
        return None


def split_of(key):
    """-> "train" (80%), "val" (10%) or "test" (10%)."""
    bucket = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") % 10
    return "train" if bucket < 8 else ("val", "test")[bucket - 8]
