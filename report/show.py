"""Solutions step by step: what each step is worth to a verifier, and what it gained or lost.

    python -m report.show --model runs/planted/seed0/rl_pav --task planted --verifier runs/planted/seed0/verifier
    python -m report.show --model smollm2 --prompt "..." --verifier runs/q

Printed for each step: the progress A = V after - V before as a bar (right of the bar's middle: a gain), V after it, its
text. Blue and orange tell gains from losses for colour-blind readers too; NO_COLOR, or a pipe, leaves the colours out.
train_rl.py writes the solutions of its first and last evaluation as rows of the same kind (solutions_*.jsonl), which
`python -m report` shows in a browser. Text of a model is untrusted: control characters never reach the terminal.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from infra import parallel
from infra.cli import UserError, opt, parse, script
from rollouts import distinct, grades, step_ends, take
from sample import SampleFlags, generate, prompt_ids, start
from tasks.base import Problem, Task
from verifier import load_verifier, step_values

HALF = 10  # characters on either side of a bar's middle
GAIN, LOSS, FAINT, RESET = "\x1b[38;5;32m", "\x1b[38;5;208m", "\x1b[2m", "\x1b[0m"
WRITTEN = 64  # solutions of an evaluation that are written


@dataclass
class Config(SampleFlags):
    verifier: str = opt("", "run directory of pav.py, with whose values the steps are shown", "what")
    prompt: str = opt("", "text to answer (in the model's chat format where it has one)", "what")
    raw: bool = opt(False, "continue --prompt as plain text, without the chat format", "what")
    out: str = opt("", "write the solutions to this jsonl file too", "what")


# ----------------------------------------------------------------------------------------------------
# Rows: one solution each, ready for a file.


def solution_rows(problems, rollouts, ends, values, rewards, tokenizer):
    """ends [B,S+1] and values [B,S+1] as rollouts.step_ends and verifier.step_values give them, rewards: B numbers or None
    -> [{prompt, steps: [text], values: [V before the first step, after each], reward, finish_reason}]."""
    rows = []
    for b, problem in enumerate(problems):
        row = distinct(ends[b])
        tokens = rollouts.tokens[b].tolist()
        rows.append(dict(prompt=problem.prompt, steps=[tokenizer.decode(tokens[i:j]) for i, j in zip(row, row[1:])],
                         values=[round(v, 4) for v in values[b, : len(row)].tolist()],
                         reward=None if rewards is None else float(rewards[b]), finish_reason=rollouts.finish_reason[b]))
    return rows


def write_rows(path, rows):
    """JSON lines, whole or not at all; under torchrun rank 0's."""
    if parallel.rank():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
    temporary.replace(path)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def progress_of(row):
    """A^mu of each step: V_h - V_{h-1} (eq. 2 of arXiv 2410.08146)."""
    return [after - before for before, after in zip(row["values"], row["values"][1:])]


# ----------------------------------------------------------------------------------------------------
# The terminal.


def printable(text):
    """One line without control characters: an escape sequence in a completion must not move somebody's cursor."""
    text = text.replace("\n", "\u23ce").replace("\t", " ")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def bar(a):
    """A in [-1,1] -> (left half, right half) of 10 characters each, filled from the middle in eighths."""
    eighths = min(8 * HALF, round(8 * HALF * abs(a)))
    full, rest = divmod(eighths, 8)
    right = "\u2588" * full + (" \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[rest] if rest else "")
    left = ("\u2590" if rest >= 4 else "") + "\u2588" * full  # only half blocks exist for the left side
    return (" " * HALF, right.ljust(HALF)) if a >= 0 else (left.rjust(HALF), " " * HALF)


def show_row(row, colour):
    """Lines for one solution."""
    paint = (lambda code, text: f"{code}{text}{RESET}") if colour else (lambda code, text: text)
    verdict = "" if row["reward"] is None else " [right]" if row["reward"] else " [wrong]"
    yield f"{printable(row['prompt'].strip())}{verdict}"
    yield paint(FAINT, f"{'A':>6} {'loss':>{HALF}}|{'gain':<{HALF}} {'V':>5}  step")
    yield f"{'':>6} {'':{HALF}}|{'':{HALF}} {row['values'][0]:5.2f}  (prompt alone)"
    for a, value, text in zip(progress_of(row), row["values"][1:], row["steps"]):
        left, right = bar(a)
        code = GAIN if a >= 0 else LOSS
        yield f"{a:+6.2f} {paint(code, left)}|{paint(code, right)} {value:5.2f}  {printable(text)}"


def wants_colour(stream):
    """no-color.org: NO_COLOR set to anything but nothing turns colours off; so does a pipe."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def show(cfg, task, model, tokenizer, options):
    """Sample, score every step, print. UserError: no verifier, or one of another tokenizer."""
    verifier = load_verifier(cfg.verifier, tokenizer, model.head.device)
    if task:
        problems = [p for p in task.problems(cfg.split, cfg.num_problems or None, cfg.seed) for _ in range(cfg.n)]
        prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
    else:
        problems = [Problem("", cfg.prompt, "")] * cfg.n
        prompts = [prompt_ids(cfg, tokenizer)] * cfg.n
    rolled = generate(model, prompts, **options)
    ends = step_ends(task or Task(), rolled, tokenizer)  # without a task a step is a line
    rewards = grades(task, problems, rolled, tokenizer).tolist() if task else None
    rows = solution_rows(problems, rolled, ends, step_values(verifier, rolled.tokens, ends), rewards, tokenizer)
    if cfg.out:
        write_rows(cfg.out, rows)
    colour = wants_colour(sys.stdout)
    for row in rows:
        print(*show_row(row, colour), "", sep="\n")
    if cfg.out:
        print(f"rows: {cfg.out}")
    return rows


def write_solutions(path, tokenizer, problems, rollouts, rewards, values, ends):
    """The first solutions of an evaluation, one of each (prompt, completion): a sharp policy repeats itself."""
    rows = {}
    for b, problem in enumerate(problems):
        rows.setdefault((problem.prompt, *rollouts.completion(b)), b)
    rows = list(rows.values())[:WRITTEN]
    some = solution_rows([problems[b] for b in rows], take(rollouts, rows), ends[rows], values[rows],
                         [rewards[b] for b in rows], tokenizer)
    write_rows(path, some)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if not cfg.verifier:
        raise UserError("--verifier is missing: a run directory of pav.py, whose values the steps are shown with")
    if not cfg.prompt and not cfg.task:
        raise UserError("nothing to show: give --prompt TEXT, or --task NAME")
    return show(cfg, *start(cfg))


if __name__ == "__main__":
    script(main)
