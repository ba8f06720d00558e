"""Games played line by line, as countdown and grid are: state, legal lines, scripted player.

A game gives _moves(state) and _value(state, target, strength); a problem's data is (first state,
target). The player, the grader and the exact values of every prefix follow from the two.
"""

import random

from tasks.base import Task


class LineGame(Task):
    """The player of strength s plays, with chance s, a line that keeps the target reachable (any of
    them alike), else any legal line; its failures are kept. A game is over when no line is legal.
    """

    random_demonstrations = True

    def _moves(self, state):
        """-> {legal line: next state}; {} where the game is over."""
        raise NotImplementedError

    def _value(self, state, target, strength):
        """-> chance that the player of that strength ends at the target; positive iff it can be
        reached, whatever the strength."""
        raise NotImplementedError

    def _walk(self, problem, text):
        """-> (state, number of legal lines, the text from the first other line on, or None)."""
        state = problem.data[0]
        lines = text.split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        for i, line in enumerate(lines):
            after = self._moves(state).get(line.rstrip(" "))
            if after is None:
                return state, i, "\n".join(lines[i:])
            state = after
        return state, len(lines), None

    def demonstration(self, problem, strength, seed):
        state, target = problem.data
        rng = random.Random(f"{problem.prompt}/{seed}")
        text = ""
        while moves := self._moves(state):
            lines = list(moves)
            if rng.random() < strength:
                lines = [x for x in lines if self._value(moves[x], target, 0) > 0] or lines
            line = rng.choice(lines)
            text += f"{line} \n"
            state = moves[line]
        return text

    def grade(self, problem, completion):
        """1.0 iff every line is legal, the game is over, and at its target."""
        state, _, rest = self._walk(problem, completion)
        over = rest is None and not self._moves(state)
        return float(over and self._value(state, problem.data[1], 0) > 0)

    def exact_value(self, problem, prefix, strength):
        """Also within a line: the player's lines that begin like it, by their chances. Illegal: 0.
        """
        target = problem.data[1]
        state, _, rest = self._walk(problem, prefix)
        if rest is None:
            return self._value(state, target, strength)
        begun = rest.rstrip(" ").split(" ")
        value = {x: self._value(s, target, strength) for x, s in self._moves(state).items()}
        good = sum(v > 0 for v in value.values())
        if prefix.endswith("\n") or not good:
            return 0.0
        chance = {}
        for line, v in value.items():
            if line.split(" ")[: len(begun)] == begun:
                chance[line] = (1 - strength) / len(value) + strength * (v > 0) / good
        # 0: no legal line begins so, or only losing ones that strength 1 avoids.
        total = sum(chance.values())
        return sum(p * value[x] for x, p in chance.items()) / total if total else 0.0

    def solvable(self, problem, prefix):
        return self.exact_value(problem, prefix, 0) > 0

    def first_illegal_step(self, problem, completion):
        _, legal, rest = self._walk(problem, completion)
        return None if rest is None else legal
