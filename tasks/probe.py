"""The task probe: thinking that goes on for a while, in episodes, of which some help and some do
not.

    python -m papers.mrt --task probe    # from nothing: base policy, then two arms

Each of six candidates A..F has a digit, shuffled in the prompt; exactly one of them is sent to the
goal by a fixed function of digits (FUNCTION: 0 -> 3, 1 -> 8, ...), which the model learns by heart:

    C4A1F3E5B0D8?8     ->     C=7n~~,D=5nC=7n~~,A=8y~~,!A

An *episode* is three tokens: a test (candidate, function value, "y" or "n") or filler "~~,". "!"
ends the thinking and the next letter is the answer; it may come at any time. That is what meta
reinforcement fine-tuning asks of a model (MRT, Setlur et al. 2025, arXiv 2503.07572;
papers/mrt.py): what would the answer be if the time were up now?

Who has tested t different candidates in vain can guess among 6-t, so a new test adds 1/6 to the
chance of success on average, until the right one is found or only one is left; a repeated test and
filler add nothing. The demonstrator tests something new with chance `strength` an episode, else it
writes filler or repeats itself. It rarely gives up, so that it is nearly always right when nobody
hurries it: the outcome alone hardly tells a useful episode from an idle one.
"""

import functools
import random
import re

from tasks.base import Problem, Task, split_of

CANDIDATES = "ABCDEF"
FUNCTION = (3, 8, 0, 6, 7, 1, 9, 4, 5, 2)
POOL = 24000  # problems made; eight tenths are for training
TEST = re.compile(rf"([{CANDIDATES}])=([0-9])([yn])")
# Chance an episode that the demonstrator ends its thinking: before and after a "y".
GIVE_UP = 0.01
SATISFIED = 0.15


class Probe(Task):
    """See above. Reward 1 iff the completion is episodes, one "!" and the right letter."""

    strengths = dict(base=0.4, prover=0.8, strong=1.0)
    random_demonstrations = True
    termination = "!"
    answer_tokens = 2  # letter, EOS
    stages = dict(  # for --reward mrt, which needs no verifier
        sft=dict(steps=600, batch_size=64, num_examples=20000, learning_rate=4e-3),
        verifier=dict(num_problems=20000, epochs=3),
        rl=dict(num_prompts=16, num_generations=4, steps=40),
        long=5,
    )

    def __init__(self, episodes=20):
        self.episodes = episodes
        self.max_new_tokens = 3 * episodes + 3

    def tokenizer(self):
        from open_weights.tokenizer import alphabet_tokenizer

        table = [f"{c}{d}" for c in CANDIDATES for d in range(10)]
        goals = [f"?{d}" for d in range(10)]
        values = [f"={d}" for d in range(10)]
        return alphabet_tokenizer([*table, *goals, *CANDIDATES, *values, *"yn~,!"])

    @property
    def by_split(self):
        return self._pool()

    @staticmethod
    @functools.cache
    def _pool():
        out = dict(train=[], val=[], test=[])
        rng = random.Random("probe")
        for _ in range(POOL):
            goal = rng.randrange(10)
            answer = rng.choice(CANDIDATES)
            others = [d for d in range(10) if FUNCTION[d] != goal]
            digits = {c: rng.choice(others) for c in CANDIDATES}
            digits[answer] = FUNCTION.index(goal)
            table = [f"{c}{d}" for c, d in digits.items()]
            prompt = "".join(rng.sample(table, len(CANDIDATES))) + f"?{goal}"
            data = (goal, tuple(digits.items()))
            out[split_of(prompt)].append(Problem(prompt, prompt, answer, data))
        return out

    def test(self, problem, candidate):
        """The episode that tests it, without a mistake."""
        value = FUNCTION[dict(problem.data[1])[candidate]]
        return f"{candidate}={value}{'y' if value == problem.data[0] else 'n'}"

    def demonstration(self, problem, strength, seed):
        rng = random.Random(f"{problem.key}/{seed}")
        text = ""
        tested = []
        for _ in range(self.episodes):
            solved = problem.answer in tested
            if rng.random() < (SATISFIED if solved else GIVE_UP):
                break
            untested = [c for c in CANDIDATES if c not in tested]
            if not solved and untested and rng.random() < strength:
                tested.append(rng.choice(untested))
                text += self.test(problem, tested[-1])
            elif tested and rng.random() < 0.5:
                text += self.test(problem, rng.choice(tested))
            else:
                text += "~~,"
        untested = [c for c in CANDIDATES if c not in tested]
        return f"{text}!{problem.answer if problem.answer in tested else rng.choice(untested)}"

    def grade(self, problem, completion):
        _, mark, answer = completion.partition("!")
        return float(mark == "!" and answer == problem.answer)

    def step_ends(self, tokens, prompt_len, length, tokenizer):
        """A step is an episode; what follows the last one ("!", answer, EOS) is the last step."""
        closing = {tokenizer.encode(c)[0] for c in "yn,"}
        ends = [t + 1 for t in range(prompt_len, length) if tokens[t] in closing]
        return ends if ends and ends[-1] == length else ends + [length] * (length > prompt_len)

    def credit_ends(self, tokens, prompt_len, length, tokenizer):
        """EOS right after an episode gives up without an answer: a decision, and a step."""
        return self.step_ends(tokens, prompt_len, length, tokenizer)

    def first_illegal_step(self, problem, completion):
        """The first episode that is no filler and no test done right; what comes after "!" is none.
        """
        for i, episode in enumerate(self._cut(completion.partition("!")[0])):
            right = TEST.fullmatch(episode) and episode == self.test(problem, episode[0])
            if episode != "~~," and not right:
                return i
        return None

    @staticmethod
    def _cut(thinking):
        """Text -> episodes, the last may be unfinished."""
        return re.findall(r"[^yn,]*[yn,]|[^yn,]+$", thinking)

    def value_now(self, problem, prefix):
        """Exact J(prefix): the chance that an answer given now is right, for one who believes the
        tests that are written there and guesses among the untested candidates. A completed text has
        the value of its outcome."""
        if "!" in prefix:
            return self.grade(problem, prefix)
        verdict = {}
        for episode in self._cut(prefix):
            if match := TEST.fullmatch(episode):
                verdict[match[1]] = match[3]
        accepted = [c for c, v in verdict.items() if v == "y"]
        left = accepted or [c for c in CANDIDATES if c not in verdict] or list(CANDIDATES)
        return (problem.answer in left) / len(left)

    def exact_value(self, problem, prefix, strength):
        """Chance that the demonstrator of that strength is right in the end, from this text; an
        unfinished episode counts as one that is finished. Reads the tests as value_now does."""
        if "!" in prefix:
            return self.grade(problem, prefix)
        episodes = self._cut(prefix)
        tested = {m[1] for m in map(TEST.fullmatch, episodes) if m}
        if problem.answer in tested:
            return 1.0
        untested = len(CANDIDATES) - len(tested)
        return _value(max(0, self.episodes - len(episodes)), untested, strength)


@functools.cache
def _value(episodes, untested, strength):
    """With the right candidate among `untested`, and so many episodes left."""
    now = 1 / untested
    if episodes == 0:
        return now
    hit = 1 / untested
    later = _value(episodes - 1, untested - 1, strength) if untested > 1 else 0
    after = hit + (1 - hit) * later
    go_on = strength * after + (1 - strength) * _value(episodes - 1, untested, strength)
    return GIVE_UP * now + (1 - GIVE_UP) * go_on
