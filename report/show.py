"""Solutions step by step: what each step is worth to a verifier, and what it gained or lost.

    python sample.py --model runs/planted/seed0/rl_pav --task planted --verifier runs/planted/seed0/verifier --show
    python sample.py --model smollm2 --prompt "..." --verifier runs/q --show

Printed for each step: the progress A = V after - V before as a bar (right of the bar's middle: a gain), V after it, its
text. Blue and orange tell gains from losses for colour-blind readers too; NO_COLOR, or a pipe, leaves the colours out.
train_rl.py keeps the solutions of its first and last evaluation as rows of the same kind (solutions_*.jsonl), which
report.py shows in a browser. Text of a model is untrusted: control characters never reach the terminal.
"""

import json
import os
import sys
from pathlib import Path

from infra import parallel
from infra.cli import UserError
from labels import boundaries
from pav import load_verifier, step_values
from sample import generate

HALF = 10  # characters on either side of a bar's middle
GAIN, LOSS, FAINT, RESET = "\x1b[38;5;32m", "\x1b[38;5;208m", "\x1b[2m", "\x1b[0m"
KEPT = 64  # solutions that an evaluation keeps


# ----------------------------------------------------------------------------------------------------
# Rows: one solution each, ready for a file.


def solution_rows(problems, rollouts, ends, values, rewards, tokenizer):
    """ends [B,S+1] and values [B,S+1] as labels.boundaries and pav.step_values give them, rewards: B numbers or None
    -> [{prompt, steps: [text], values: [V before the first step, after each], reward, finish_reason}]."""
    rows = []
    for b, problem in enumerate(problems):
        own = sorted(set(ends[b].tolist()))  # without the padding, which repeats the last end
        tokens = rollouts.tokens[b].tolist()
        rows.append(dict(prompt=problem.prompt, steps=[tokenizer.decode(tokens[i:j]) for i, j in zip(own, own[1:])],
                         values=[round(v, 4) for v in values[b, : len(own)].tolist()],
                         reward=None if rewards is None else float(rewards[b]), finish_reason=rollouts.finish_reason[b]))
    return rows


def write_rows(path, rows):
    """JSON lines, whole or not at all; under torchrun rank 0's."""
    if parallel.rank():
        return
    path = Path(path)
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


class Question:
    """--prompt as a problem: no answer is known, so nothing is graded."""

    def __init__(self, prompt):
        self.prompt = prompt


def show(cfg, model, tokenizer, options):
    """sample.py --show: sample, score every step, print. UserError: no verifier, or one of another tokenizer."""
    from tasks import get_task
    from tasks.base import Task

    if not cfg.verifier:
        raise UserError("--show needs --verifier: a run directory of pav.py, whose values the steps are shown with")
    verifier = load_verifier(cfg.verifier, tokenizer, model.head.device)
    if cfg.task:
        task = get_task(cfg)
        problems = [p for p in task.problems(cfg.split, cfg.num_problems or None, cfg.seed) for _ in range(cfg.n)]
        prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
        options |= dict(stop_ids=task.stop_ids(tokenizer)) if hasattr(task, "stop_ids") else {}
        limit = cfg.max_new_tokens or task.max_new_tokens
    else:
        chat = tokenizer.chat_format and not cfg.raw
        ids = tokenizer.chat([dict(role="user", content=cfg.prompt)]) if chat else tokenizer.encode(cfg.prompt)
        problems, prompts, limit = [Question(cfg.prompt)] * cfg.n, [ids] * cfg.n, cfg.max_new_tokens or 256
        task = Task()  # steps are lines
    out = generate(model, prompts, max_new_tokens=limit, **options)
    ends = boundaries(task, out, tokenizer)
    rewards = [task.grade(p, tokenizer.decode(out.completion(i))) for i, p in enumerate(problems)] if cfg.task else None
    rows = solution_rows(problems, out, ends, step_values(verifier, out.tokens, ends), rewards, tokenizer)
    colour = wants_colour(sys.stdout)
    for row in rows:
        print(*show_row(row, colour), "", sep="\n")
    if cfg.out:
        write_rows(cfg.out, rows)
        print(f"rows: {cfg.out}")
    return rows


def keep_solutions(path, tokenizer, problems, rollouts, rewards, values, ends):
    """The first KEPT solutions of an evaluation, one of each (prompt, completion): a sharp policy repeats itself."""
    seen, keep = set(), []
    for b, problem in enumerate(problems):
        key = (problem.prompt, *rollouts.completion(b))
        if key not in seen and len(keep) < KEPT:
            seen.add(key)
            keep.append(b)
    rows = solution_rows([problems[b] for b in keep], pick(rollouts, keep), ends[keep], values[keep], [rewards[b] for b in keep],
                         tokenizer)
    write_rows(path, rows)


def pick(rollouts, rows):
    """Some rows of Rollouts, as Rollouts."""
    return type(rollouts)(rollouts.tokens[rows], rollouts.prompt_len[rows], rollouts.length[rows], rollouts.logprob[rows],
                          [rollouts.finish_reason[b] for b in rows], rollouts.seconds)
