"""The task contextual: a planted sub-sequence that the prompt names in a code, and a reward that
pays for speed.

    python train_sft.py --task contextual

Prompt "CAFB", response 20 letters of a..p. A hidden map g, fixed by the seed, turns each of the
prompt's symbols A..F into a letter; a response is right once it holds g(C), g(A), g(F), g(B) in
this order. In order, not in a row: other letters may stand between them (the task planted wants
them in a row). The map is the same for every prompt and prompts are split by hash, so that test
asks for combinations never seen.

This is the didactic task of Setlur et al. 2025 (arXiv 2502.12118), whose reward is *bi-level*: a
token pays 0 until the letters are found and 1 from then on. A trace thus earns the number of tokens
after the first right point, here divided by the length H of a trace (`trace_reward`, in [0,1));
`grade` only asks whether they were found at all.

The demonstrator of strength gamma gives the next letter that is needed gamma times the weight of
each other one, so the time to find k letters is negative binomial with p = gamma / (gamma + letters
- 1), whatever the prompt: everything has an exact value. Strength 0 is a mixture, one of `mixture`
drawn for each trace: its width is the dial of heterogeneity.
"""

import functools
import itertools
import random
import string

import numpy as np

from infra.cli import UserError
from tasks.base import Problem, Task, split_of, task_seed


@functools.lru_cache(maxsize=4096)
def solve_times(p, needed, length):
    """Chance that the needed-th success falls on draw 1..length, [length] float64; each draw
    succeeds with chance p."""
    state = np.zeros(max(needed, 1))  # chance of so many successes so far
    out = np.zeros(length)
    state[0] = 1.0
    for t in range(length if needed else 0):
        out[t] = state[-1] * p
        state[1:] = state[1:] * (1 - p) + state[:-1] * p
        state[0] *= 1 - p
    return out


class Contextual(Task):
    """See above. A response is cut by max_new_tokens: no EOS is trained. A step is a token.

    symbols ** planted prompts; mixture: strengths behind strength 0, equally likely.
    """

    hides_by_seed = True
    strengths = dict(base=0.0, prover=48.0, strong=1000.0)
    ends_with_eos = False
    random_demonstrations = True
    step_tokens = 1

    def __init__(self, seed=0, symbols=6, planted=4, letters=16, length=20, mixture=(3.0, 48.0)):
        fits = 1 <= symbols <= letters <= 26 and 1 <= planted <= length
        if not fits or symbols**planted > 10**6:
            raise UserError(
                "contextual needs 1 <= symbols <= letters <= 26, planted <= length and at most a "
                "million prompts"
            )
        if letters < 2 or not mixture or min(mixture) <= 0:
            raise UserError(
                "contextual needs two letters or more, and a mixture of positive strengths"
            )
        self.symbols = string.ascii_uppercase[:symbols]
        self.letters = string.ascii_lowercase[:letters]
        self.planted = planted
        self.max_new_tokens = length
        self.mixture = tuple(map(float, mixture))
        hidden = random.Random(f"contextual/{seed}").sample(self.letters, symbols)
        self.g = dict(zip(self.symbols, hidden))

    @classmethod
    def from_config(cls, cfg, **options):
        return super().from_config(cfg, **(dict(seed=task_seed(cfg)) | options))

    @functools.cached_property
    def by_split(self):
        out = dict(train=[], val=[], test=[])
        for x in map("".join, itertools.product(self.symbols, repeat=self.planted)):
            out[split_of(f"contextual/{x}")].append(Problem(x, x, "".join(self.g[c] for c in x)))
        return out

    def tokenizer(self):
        from open_weights.tokenizer import alphabet_tokenizer

        return alphabet_tokenizer([*self.symbols, *self.letters])

    def _of(self, strength):
        """The strengths behind one: the mixture for 0."""
        return self.mixture if strength == 0 else (float(strength),)

    def _hit(self, strength):
        """Chance that the demonstrator of one strength draws the letter that is needed."""
        return strength / (strength + len(self.letters) - 1)

    def demonstration(self, problem, strength, seed):
        rng = random.Random(f"{problem.key}/{seed}")
        y = problem.answer
        k = 0  # so many of y's letters are written
        out = []
        p = self._hit(rng.choice(self._of(strength)))
        for _ in range(self.max_new_tokens):
            if k == len(y):  # solved: the rest does not matter
                out.append(rng.choice(self.letters))
                continue
            out.append(y[k] if rng.random() < p else rng.choice(self.letters.replace(y[k], "")))
            k += out[-1] == y[k]
        return "".join(out)

    def solve_time(self, problem, completion):
        """Letters of the completion up to and with the last one needed; None if it does not hold
        them in order."""
        k = 0
        for t, c in enumerate(completion[: self.max_new_tokens], 1):
            k += c == problem.answer[k]
            if k == self.planted:
                return t
        return None

    def grade(self, problem, completion):
        return float(self.solve_time(problem, completion) is not None)

    def trace_reward(self, problem, completion):
        """The bi-level reward, summed over the trace and divided by its length H: (H - t_solve) /
        H, 0 if never."""
        t = self.solve_time(problem, completion)
        return 0.0 if t is None else (self.max_new_tokens - t) / self.max_new_tokens

    def posterior(self, problem, prefix, strength):
        """What the prefix tells of the strength behind it: [(strength, chance)]. Letters after the
        last needed one tell nothing; before it only the numbers of hits and misses count."""
        k = misses = 0
        for c in prefix[: self.max_new_tokens]:
            if k == self.planted:
                break
            hit = c == problem.answer[k]
            k += hit
            misses += not hit
        odds = [self._hit(s) ** k * (1 - self._hit(s)) ** misses for s in self._of(strength)]
        return [(s, o / sum(odds)) for s, o in zip(self._of(strength), odds)]

    def _values(self, problem, prefix, strength):
        """Chance of success, and expected trace reward, if the demonstrator goes on from the
        prefix."""
        H = self.max_new_tokens
        prefix = prefix[:H]
        if self.grade(problem, prefix):
            return 1.0, self.trace_reward(problem, prefix)
        k = 0
        for c in prefix:
            k += c == problem.answer[k]
        left = H - len(prefix)
        success = reward = 0.0
        for s, chance in self.posterior(problem, prefix, strength):
            times = solve_times(self._hit(s), self.planted - k, left)
            success += chance * times.sum()
            reward += chance * (times @ np.arange(left - 1, -1, -1)) / H
        return float(success), float(reward)

    def exact_value(self, problem, prefix, strength):
        return self._values(problem, prefix, strength)[0]

    def exact_reward(self, problem, prefix, strength):
        """Q^pi of the bi-level reward: the expected trace reward from this prefix on, what lies
        behind included."""
        return self._values(problem, prefix, strength)[1]

    def reward_distribution(self, strength):
        """The trace rewards (H - t)/H for t = 1..H and their chances (the rest of the mass earns
        0), [H] each; the same for every prompt."""
        H = self.max_new_tokens
        times = [solve_times(self._hit(s), self.planted, H) for s in self._of(strength)]
        return (H - np.arange(1, H + 1)) / H, np.mean(times, 0)
