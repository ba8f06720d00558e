"""What several experiments share: cells, one verdict rule, the exact verifier, best-of-n.

The rule of every verdict in docs/results: a difference, paired over seeds, is shown where the 95%
interval of its mean (Student's t) leaves out the threshold (0, where the claim names no other);
otherwise the question is open. `verdict` judges one comparison, `together` a claim of several.
"""

import functools
import json
import math
import os
import shlex
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import nn

import pipeline
import train_rl
from infra.runs import finite, mean, read_metrics, write_json
from report.figures import (
    COLOURS,
    METHOD_COLOURS,
    accuracy_at,
    finish,
    machine,
    print_results,
    pyplot,
)
from report.figures import NAMES as ARM_NAMES
from report.statistics import margin, spread, vote

__all__ = [
    "ARM_NAMES",
    "COLOURS",
    "METHOD_COLOURS",
    "ExactVerifier",
    "accuracy_at",
    "cached",
    "comparison",
    "evaluations",
    "expected_best",
    "finish",
    "margin",
    "mean_sd",
    "print_results",
    "pyplot",
    "quiet",
    "run_missing",
    "spread",
    "together",
    "typed",
    "verdict",
    "vote_accuracy",
    "with_sd",
    "write_results",
]

TUNING = 1000  # the seed that chooses settings, on val; seeds 0, 1, ... are reported, on test

# --------------------------------------------------------------------------------------------------
# Runs and files.


def quiet():
    """A context in which a training script prints nothing."""
    return redirect_stdout(StringIO())


def cached(path, make):
    """make() -> what JSON can hold, computed once and kept at path, whole or absent. A dict is
    given its CPU seconds.

    The return value is always read from the file, so that the first call and a later one see the
    same numbers."""
    path = Path(path)
    if not path.exists():
        clock = time.process_time()
        with quiet():
            made = make()
        if isinstance(made, dict):
            made["cpu_seconds"] = round(time.process_time() - clock, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, made)
    return json.loads(path.read_text())


def cpu_seconds(paths):
    """What the cells at these paths took together."""
    return round(sum(json.loads(Path(p).read_text())["cpu_seconds"] for p in paths))


def comparison(given, **settings):
    """The plan of one of train_rl.py's comparisons -> its stages' jobs, its arms' jobs.

    given: names of the settings that win over the task's table."""
    cfg = pipeline.with_flags(train_rl.Config)(**settings)
    _, jobs = pipeline.plan(cfg, {"": (["train_rl.py"], train_rl.Config)}, given)
    arms = [job for job in jobs if "/rl_" in job.label]
    return [job for job in jobs if job not in arms], arms


def run_missing(jobs, workers, log_dir):
    """Run those of the jobs that are not complete, at most `workers` side by side (0: one per
    core). UserError: one was completed with other settings."""
    done = [job for job in jobs if job.done()]
    for job in done:
        pipeline.refuse_other_settings(log_dir.parent, job)
    missing = [job for job in jobs if job not in done]
    labels = {job.label for job in done}
    pipeline.run_jobs(missing, workers or os.cpu_count() or 1, log_dir, labels)


def evaluations(run):
    """The rows of a training run's metrics that hold an evaluation."""
    return [r for r in read_metrics(run) if "eval/accuracy" in r]


def typed(name, argv):
    """Experiment and flags as they were typed, which is what write_results wants. argv: main's."""
    return shlex.join([name, *(sys.argv[1:] if argv is None else argv)])


def write_results(out, table, name, settings, claims_of=None, file="results", **numbers):
    """An experiment's table (OUT/table.md) and numbers (OUT/FILE.json), with the command that
    made them.

    name: "module --flags", what follows `python -m experiments.` on the command line. claims_of:
    the experiment's function from the content of such a file to its claims; it sees nothing else,
    so that claims can be made anew from a committed file."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / ("table.md" if file == "results" else f"{file}.md")).write_text(table + "\n")
    record = dict(
        command=f"python -m experiments.{name}".strip(),
        machine=machine(),
        torch=torch.__version__,
        settings=vars(settings),
        **numbers,
    )
    record = json.loads(json.dumps(finite(record)))
    if claims_of is not None:
        record["claims"] = claims_of(record)
    write_json(out / f"{file}.json", record)


# --------------------------------------------------------------------------------------------------
# Verdicts and formats.


def verdict(differences, least=0.0):
    """Is a paired difference above `least`? True: the 95% interval of its mean over the seeds is
    (Student's t); False: it is below; "open": neither, or fewer than two seeds."""
    differences = list(differences)
    if len(differences) < 2:
        return "open"
    error = margin(differences)
    if mean(differences) - error > least:
        return True
    return False if mean(differences) + error < least else "open"


def together(verdicts):
    """A claim of several parts: True if all are; "partly" if some are; else False if any is;
    else "open"."""
    verdicts = list(verdicts)
    if all(v is True for v in verdicts):
        return True
    if any(v is True or v == "partly" for v in verdicts):
        return "partly"
    return False if any(v is False for v in verdicts) else "open"


def opposite(v):
    """The verdict of the claim that says the contrary."""
    return not v if isinstance(v, bool) else v


def with_sd(value, sd, digits=3, signed=False):
    """ "0.123 (0.045)": a mean and the standard deviation over seeds."""
    return f"{value:{'+' if signed else ''}.{digits}f} ({sd:.{digits}f})"


def mean_sd(values, digits=3, signed=False):
    """The same from the values of the seeds."""
    values = list(values)
    return with_sd(mean(values), spread(values), digits, signed)


# --------------------------------------------------------------------------------------------------
# Best-of-n, votes.


def expected_best(score, value, n):
    """Expected value of the highest-scored of n of a problem's N samples, over all subsets.
    score, value [P,N] -> [P].

    Exact: the sample of rank j (0 is best; ties: the earlier) is the best of C(N-1-j, n-1) of
    the C(N, n) subsets."""
    N = score.shape[1]
    order = score.argsort(dim=1, descending=True, stable=True)
    weight = torch.tensor(
        [math.comb(N - 1 - j, n - 1) / math.comb(N, n) for j in range(N)], dtype=value.dtype
    )
    return (value.gather(1, order) * weight).sum(1)


def vote_accuracy(answers, right, n):
    """Accuracy of the majority vote of n of a problem's samples: mean over its disjoint groups
    of n. answers: final answers or None, right: 0 or 1, of one problem."""
    groups = range(0, len(answers) - n + 1, n)
    chosen = [vote(answers[i : i + n]) for i in groups]
    return mean(0.0 if c is None else float(right[i + c]) for i, c in zip(groups, chosen))


# --------------------------------------------------------------------------------------------------
# The solver as a verifier.


class ExactVerifier(nn.Module):
    """The task's solver in the place of a pav.Verifier: tokens [B,T] -> logits [B,T] of the
    chance that the scripted prover of that strength succeeds from there (k: the Best-of-k prover
    of it).

    Values stand at the prompt's end and at every step end (each token, or each newline:
    task.step_tokens); a position between holds the last one's, and is not read."""

    def __init__(self, task, tokenizer, strength, k=1):
        super().__init__()
        self.head = nn.Linear(1, 1)  # step_values asks it for the device
        self.logit_shift = 0.0
        self.k = k
        self.task = task
        self.tokenizer = tokenizer
        self.strength = float(strength)
        problems = {p.prompt: p for part in task.by_split.values() for p in part}.values()
        self.problems = {tuple(task.prompt_tokens(p, tokenizer)): p for p in problems}
        self.prompt_lengths = sorted({len(prompt) for prompt in self.problems})
        self.value = functools.lru_cache(maxsize=1 << 16)(self._value)

    def _value(self, prompt, completion):
        return self.task.exact_value(
            self.problems[prompt], self.tokenizer.decode(completion), self.strength
        )

    def _ends_step(self, token):
        return self.task.step_tokens == 1 or b"\n" in self.tokenizer.token_bytes(token)

    def forward(self, tokens, share=None):
        out = torch.zeros(tokens.shape, dtype=torch.float64)
        for b, row in enumerate(tokens.tolist()):
            k = next(k for k in self.prompt_lengths if tuple(row[:k]) in self.problems)
            prompt = tuple(row[:k])
            out[b, k - 1 :] = self.value(prompt, ())
            for t in range(k, len(row)):
                if self._ends_step(row[t]):
                    out[b, t:] = self.value(prompt, tuple(row[k : t + 1]))
        return out.logit().float()
