"""The task countdown: use all the numbers to reach the target, one operation a line; it asks for
planning.

    python train_sft.py --task countdown
"""

import functools
import itertools

import numpy as np

from infra.cli import UserError
from tasks.base import Problem, split_of
from tasks.moves import LineGame


@functools.lru_cache(maxsize=1 << 17)
def countdown_moves(state, ops, cap):
    """state: tuple of numbers -> {line: next state}, one line for each pair of values and
    operation.

    The larger number stands first, results lie in 0..cap. As zero is allowed, any pair can be
    subtracted: no state is stuck. The number of moves depends on the multiset alone, not on the
    order of the list.
    """
    out = {}
    for x, y in itertools.combinations(state, 2):
        a = max(x, y)
        b = min(x, y)
        rest = list(state)
        rest.remove(a)
        rest.remove(b)
        tail = f" | {' '.join(map(str, rest))}" if rest else ""
        for op, c in (("+", a + b), ("-", a - b), ("*", a * b)):
            if op in ops and c <= cap:
                out[f"{a} {op} {b} = {c}{tail}"] = (c, *rest)
    return out


@functools.lru_cache(maxsize=1 << 17)
def countdown_values(state, ops, cap, strength):
    """state: sorted tuple -> [cap+1] float64, the demonstrator's chance to end at each target."""
    if len(state) == 1:
        return np.eye(cap + 1)[state[0]]
    moves = countdown_moves(state, ops, cap).values()
    v = np.array([countdown_values(tuple(sorted(s)), ops, cap, strength) for s in moves])
    # v [moves, cap+1]. A move keeps the target reachable iff its value is positive, whatever the
    # strength in [0, 1].
    return (1 - strength) * v.mean(0) + strength * v.sum(0) / np.maximum((v > 0).sum(0), 1)


class Countdown(LineGame):
    """Prompt "3 12 7 :24 ", response "12 - 3 = 9 | 7 ", ...: a line takes two numbers, the larger
    first, and after the bar repeats those it leaves, in order: result and rest are the whole state.
    Success: every line legal, and the one number left is the target.

    The demonstrator of strength s plays, with chance s, a move from which the target can be reached
    (any of them alike), else any legal move; its failures are kept. Blanks belong to the token
    before them ("12 ") and the target has tokens of its own (":24 "), which a small model finds by
    content, not by position. Three numbers to 12 and values to 30, because it is what a 2-layer
    model of width 64 could both learn to write legally and improve at by RL; with four or five
    numbers it wrote legally, and RL did not move it.
    """

    strengths = dict(base=0.3, prover=0.5, strong=1.0)
    stages = dict(
        sft=dict(steps=1200, num_examples=100000),
        # 470 steps of fitting learn nothing, 4,700 do. The prover is Best-of-4 of the base itself:
        # a clone of a better player does no better (docs/results/reasoning_countdown).
        verifier=dict(num_problems=100000, prover="base", prover_k=4),
        # With 128 samples a step no arm moves.
        rl=dict(num_prompts=64, guards=["anchor", "center", "legal"]),
        long=3,
    )

    def __init__(self, numbers=3, largest=12, cap=30, ops="+-*"):
        known = "-" in ops and set(ops) <= set("+-*")
        if not (2 <= numbers <= 5 and 1 <= largest <= cap <= 99 and known):
            raise UserError(
                "countdown needs 2-5 numbers, largest <= cap <= 99, and ops out of +-* with -"
            )
        self.numbers, self.largest, self.cap = numbers, largest, cap
        self.ops = ops
        # Each legal response has this length: 6 tokens a line, more for bar and rest, and EOS.
        self.max_new_tokens = sum(6 + (1 + rest if rest else 0) for rest in range(numbers - 1)) + 1

    def tokenizer(self):
        from open_weights.tokenizer import alphabet_tokenizer

        targets = [f":{t}" for t in range(1, self.cap + 1)]
        words = [*map(str, range(self.cap + 1)), *self.ops, "=", "|", *targets]
        return alphabet_tokenizer([w + " " for w in words] + ["\n"])

    @functools.cached_property
    def by_split(self):
        """Every order of the numbers is a problem; all orders share a key, hence a split."""
        out = dict(train=[], val=[], test=[])
        values = range(1, self.largest + 1)
        for nums in itertools.combinations_with_replacement(values, self.numbers):
            orders = sorted(set(itertools.permutations(nums)))
            for t in range(1, self.cap + 1):
                if self._value(nums, t, 0) > 0:
                    key = f"{' '.join(map(str, nums))} : {t}"
                    for order in orders:
                        prompt = f"{' '.join(map(str, order))} :{t} \n"
                        out[split_of(key)].append(Problem(key, prompt, str(t), (order, t)))
        return out

    def _moves(self, state):
        return countdown_moves(state, self.ops, self.cap)

    def _value(self, state, target, strength):
        values = countdown_values(tuple(sorted(state)), self.ops, self.cap, float(strength))
        return float(values[target])
