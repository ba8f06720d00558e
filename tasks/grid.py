"""The task grid: walk to a cell by a shortest way, 5 to 7 decisions, each of which can fail.

    python train_sft.py --task grid
"""

import functools

from infra.cli import UserError
from tasks.base import Problem, split_of
from tasks.moves import LineGame

NEIGHBOURS = ((-1, 0), (0, -1), (0, 1), (1, 0))


@functools.lru_cache(maxsize=1 << 17)
def grid_moves(state, size):
    """state (row, column, lines left) -> {line: next state}: the neighbours on a board of size^2
    cells, above, left, right, below; {} when no line is left."""
    row, column, left = state
    out = {}
    for r, c in ((row + down, column + right) for down, right in NEIGHBOURS):
        if left and 0 <= r < size and 0 <= c < size:
            out[f"{r} {c}"] = (r, c, left - 1)
    return out


@functools.lru_cache(maxsize=1 << 17)
def grid_value(state, size, target, strength):
    """Chance that the player of that strength ends at the target (row, column)."""
    row, column, left = state
    distance = abs(row - target[0]) + abs(column - target[1])
    if distance > left or (left - distance) % 2:
        return 0.0
    if not left:
        return 1.0
    values = [grid_value(s, size, target, strength) for s in grid_moves(state, size).values()]
    good = sum(v > 0 for v in values)
    return (1 - strength) * sum(values) / len(values) + strength * sum(values) / good


class Grid(LineGame):
    """Prompt "7 5 :1 :4 ", a cell (row 7, column 5) and the cell to go to; response "6 5 ", "6 4 ",
    ...: a line is the next cell, a neighbour of the last one. Success: the target is reached in
    exactly the distance, `shortest` to `longest` lines. So a legal line that leads away is fatal,
    although nothing in the text says so: the value is what knows. Then the response must end.

    Targets are split: no cell that validation and test ask for is one that training asks for. The
    player knows when to stop and plays as many lines as the distance, lost or not. The target's
    numbers have tokens of their own (":4 "), as in countdown.
    """

    # A clone solves far less than its player: after 800 steps those of 0.5, 0.7 and 0.85 solve 1, 2
    # and 16% of the validation problems.
    strengths = dict(base=0.7, prover=0.85, strong=1.0)
    stages = dict(
        sft=dict(steps=800, num_examples=100000),
        verifier=dict(num_problems=40000),
        rl=dict(num_prompts=64, guards=["anchor", "center", "legal"]),
        long=3,
    )

    def __init__(self, size=10, shortest=5, longest=7):
        if not (2 <= size <= 10 and 1 <= shortest <= longest <= 2 * (size - 1)):
            raise UserError(
                "grid needs a size of 2-10 and 1 <= shortest <= longest <= 2 * (size - 1)"
            )
        self.size = size
        self.shortest, self.longest = shortest, longest
        self.max_new_tokens = 3 * longest + 1  # two numbers and a newline a line, and EOS

    def tokenizer(self):
        from open_weights.tokenizer import alphabet_tokenizer

        numbers = [f"{n} " for n in range(self.size)]
        return alphabet_tokenizer(numbers + [f":{n}" for n in numbers] + ["\n"])

    @functools.cached_property
    def by_split(self):
        out = dict(train=[], val=[], test=[])
        cells = [(r, c) for r in range(self.size) for c in range(self.size)]
        for target in cells:
            r, c = target
            split = split_of(f"grid/{r} {c}")
            for row, column in cells:
                distance = abs(row - r) + abs(column - c)
                if self.shortest <= distance <= self.longest:
                    prompt = f"{row} {column} :{r} :{c} \n"
                    problem = Problem(prompt, prompt, f"{r} {c}", ((row, column, distance), target))
                    out[split].append(problem)
        return out

    def _moves(self, state):
        return grid_moves(state, self.size)

    def _value(self, state, target, strength):
        return grid_value(state, self.size, target, float(strength))
