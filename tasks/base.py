"""What every task is: problems in three splits, prompts, demonstrations, steps and grading.

Splits: the first 8 bytes of sha256(key) modulo 10; 0-7 train, 8 val, 9 test. Python's own hash()
is salted.
A step is a line, or a fixed number of tokens. It ends with the token that completes it, so its end
is known when that token is drawn, and no later text moves it: a search may cut there, and finds a
label there. Left out: sentences as steps (the full stop of "3." is known for one only after the
next token), and stop strings.
"""

import hashlib
import random
from dataclasses import dataclass

from infra.cli import UserError, key_values


@dataclass(frozen=True)
class Problem:
    """key: stable id, what the split hash is made of. data: what the task itself needs to know."""

    key: str
    prompt: str
    answer: str
    data: tuple = ()


class Task:
    """The contract. A task gives max_new_tokens, by_split {"train" "val" "test": [Problem]},
    tokenizer, demonstration and grade; all else has a default here, None where a task cannot say.
    """

    max_new_tokens: int  # tokens a completion may have, EOS included
    hides_by_seed = False  # True: --task-seed decides what is asked for
    needs_model = False  # True: tokenizer() is None, the model brings one
    strengths = None  # {base, prover, strong} of the scripted demonstrator; None: there is none
    ends_with_eos = True  # demonstrations are trained with an EOS behind them
    random_demonstrations = False  # False: one solution a problem, whatever the seed
    step_tokens = 0  # tokens of a step; 0: a step ends with the token that holds its newline
    termination = "\nTime is up. The answer is"  # text that closes the thinking (papers/mrt.py)
    answer_tokens = 64  # tokens that an answer given after `termination` may have
    has_final_answer = False  # final_answer is a part of the text, and a grade may be lenient

    # Settings of a comparison's stages (pipeline.py), searched for where a task has its own:
    # docs/log.md. long: the arm outcome-long runs this many times the steps.
    stages = dict(
        sft=dict(steps=600, num_examples=20000),
        verifier=dict(num_problems=20000, epochs=3),
        rl=dict(num_prompts=16, num_generations=8),
        long=5,
    )
    smoke = dict(  # what --smoke puts on top: does it run?
        sft=dict(steps=20, num_examples=256, eval_problems=32),
        verifier=dict(num_problems=64, epochs=1, eval_problems=16, eval_mc=4),
        rl=dict(steps=3, eval_steps=1, eval_problems=32),
    )

    args = {}  # the KEYs of --task-args that the class takes, each with its default

    @classmethod
    def from_config(cls, cfg, **options):
        """The task that the flags describe (tasks.TaskFlags, and seed); options go to the class."""
        return cls(**(cls.args_of(cfg) | options))

    @classmethod
    def main_prover(cls):
        """Whose success the main verifier learns: the stage "prover", a clone of the demonstrator,
        or "base", the base policy itself; what the stage's settings say, else the first there is."""
        return cls.stages["verifier"].get("prover", "prover" if cls.strengths else "base")

    @classmethod
    def args_of(cls, cfg):
        """--task-args -> {KEY: value}, the defaults among them. UserError: a KEY that the class does
        not have; --data for a task that reads none."""
        if cfg.data:
            raise UserError(
                f"--task {cfg.task} reads no files: leave out --data, or give --task jsonl"
            )
        return key_values(cfg.task_args, cls.args, "--task-args")

    # ----------------------------------------------------------------------------------------------
    # What every task must give.

    def tokenizer(self):
        """-> the task's tiny alphabet; None: the model brings its own tokenizer."""
        raise NotImplementedError

    def demonstration(self, problem, strength, seed):
        """-> completion text without EOS, by the demonstrator of that strength."""
        raise NotImplementedError

    def grade(self, problem, completion):
        """-> 0.0 or 1.0, from the completion's text alone."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------
    # Problems and prompts.

    def problems(self, split, n=None, seed=0):
        """At most n problems (None: all) of "train", "val" or "test", in an order fixed by seed.
        UserError: an unknown or an empty split."""
        if split not in self.by_split:
            raise UserError(f"split {split!r} is unknown; use train, val or test")
        problems = list(self.by_split[split])
        if not problems:
            raise UserError(
                f"no problem is left in split {split!r}; give more data, or --data {split}=FILE"
            )
        random.Random(f"{split}/{seed}").shuffle(problems)
        return problems[:n]

    def prompt_tokens(self, problem, tokenizer):
        """-> list of token ids."""
        return tokenizer.encode(problem.prompt)

    def stop_ids(self, tokenizer):
        """-> list of the token ids that end a completion."""
        return list(tokenizer.eos_ids)

    def similar(self, problem, seed):
        """-> a new training problem like the given one; None: the task cannot make one."""
        return None

    # ----------------------------------------------------------------------------------------------
    # Steps.

    def step_ends(self, tokens, prompt_len, length, tokenizer):
        """Exclusive ends of the steps: increasing positions in `tokens` (the ids of prompt and
        completion, whose first `length` count), the last is length; [] for an empty completion.

        Where labels are placed and a search cuts. Ends of a text but for its last one stay ends
        when it goes on; an EOS alone behind a step is therefore an end of its own.
        """
        if not self.step_tokens:
            return line_ends(tokens, prompt_len, length, tokenizer)
        inner = range(prompt_len + self.step_tokens, length, self.step_tokens)
        return [*inner, length] if length > prompt_len else []

    def credit_ends(self, tokens, prompt_len, length, tokenizer):
        """step_ends for credit in training: an EOS alone is no decision worth a step of its own
        and belongs to the step before it."""
        ends = self.step_ends(tokens, prompt_len, length, tokenizer)
        if not self.ends_with_eos or len(ends) < 2:
            return ends
        if all(t in tokenizer.eos_ids for t in tokens[ends[-2] : length]):
            del ends[-2]
        return ends

    # ----------------------------------------------------------------------------------------------
    # What only some tasks can say.

    def final_answer(self, problem, completion):
        """-> text that a majority votes for, None if there is none: here the whole completion."""
        return completion

    def grade_leniently(self, problem, completion):
        """A second grade for evaluations, never a reward, by a more forgiving grader."""
        return self.grade(problem, completion)

    def first_illegal_step(self, problem, completion):
        """Index of the first step that breaks the rules; None: all keep them, or there are none."""
        return None

    def exact_value(self, problem, prefix, strength):
        """Chance that the demonstrator of that strength succeeds from this text; None: no solver.
        It goes on from any text and cannot see an EOS: a finished response's value is its grade.
        """
        return None

    def solvable(self, problem, prefix):
        """Can a solution that begins with this text still be right? None: no solver."""
        value = self.exact_value(problem, prefix, (self.strengths or {}).get("base"))
        return None if value is None else value > 0

    def value_now(self, problem, prefix):
        """Chance that an answer given at once, after this text, is right; None: no solver."""
        return None


def task_seed(cfg):
    """The seed of what a task hides: --task-seed, or the run's seed where that is -1."""
    return cfg.seed if cfg.task_seed < 0 else cfg.task_seed


def split_of(key):
    """-> "train" (80%), "val" (10%) or "test" (10%)."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    bucket = int.from_bytes(digest[:8], "big") % 10
    return "train" if bucket < 8 else ("val", "test")[bucket - 8]


def line_ends(tokens, prompt_len, length, tokenizer):
    """Exclusive ends of the lines, in token positions; the last is length. A line ends with the
    token that holds its newline; blank lines open the next one."""
    ends = []
    line = b""
    for end in range(prompt_len + 1, length + 1):
        token = tokens[end - 1]
        piece = b"" if token in tokenizer.eos_ids else tokenizer.token_bytes(token)
        line += piece
        if b"\n" in piece and b"\n" in line.lstrip():  # a newline after some text
            ends.append(end)
            line = b""
    if length > prompt_len and ends[-1:] != [length]:
        ends.append(length)
    return ends
