"""Solutions in the terminal: the value of each step to a verifier, and what it gained or lost.

    python -m report.show --model runs/rl_pav --task planted --verifier runs/verifier
    python -m report.show --model smollm2 --prompt "..." --verifier runs/q

Printed for each step: the progress A = V after - V before as a bar (right of the bar's middle: a
gain), V after it, its text. Blue and orange tell gains from losses for colour-blind readers too;
NO_COLOR, or a pipe, leaves the colours out. Text of a model is untrusted: control characters never
reach the terminal.
"""

import sys
from dataclasses import dataclass

from infra import terminal
from infra.cli import UserError, opt, parse, script
from infra.terminal import FAINT, GAIN, LOSS, paint, wants_colour
from report.solutions import check_file, progress_of, solution_rows, write_rows
from report.solutions import write_solutions as write_solutions  # train_rl.py takes it from here
from rollouts import grades, step_ends
from sample import SampleFlags, generate, prompt_ids, start
from tasks.base import Problem, Task
from verifier import load_verifier, step_values

HALF = 10  # characters on either side of a bar's middle


def printable(text):
    """One line without control characters."""
    return terminal.printable(text.replace("\n", "\u23ce").replace("\t", " "))


def bar(progress):
    """Progress in [-1,1] -> (left half, right half) of HALF characters each, filled from the middle
    in eighths of a character."""
    eighths = min(8 * HALF, round(8 * HALF * abs(progress)))
    full, rest = divmod(eighths, 8)
    empty = " " * HALF
    if progress >= 0:
        partial = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"[rest] if rest else ""
        return empty, ("\u2588" * full + partial).ljust(HALF)
    partial = "\u2590" if rest >= 4 else ""  # only half blocks exist for the left side
    return (partial + "\u2588" * full).rjust(HALF), empty


def verdict_of(row):
    if row["reward"] is None:
        return ""
    return " [right]" if row["reward"] else " [wrong]"


def show_row(row, colour):
    """Lines for one solution (a row of report/solutions.py)."""
    answer = row.get("answer")
    wanted = f" (answer: {printable(str(answer).strip())})" if answer else ""
    yield f"{printable(row['prompt'].strip())}{wanted}{verdict_of(row)}"
    yield paint(FAINT, f"{'A':>6} {'loss':>{HALF}}|{'gain':<{HALF}} {'V':>5}  step", colour)
    yield f"{'':>6} {'':{HALF}}|{'':{HALF}} {row['values'][0]:5.2f}  (prompt alone)"
    for progress, value, text in zip(progress_of(row), row["values"][1:], row["steps"]):
        left, right = bar(progress)
        code = GAIN if progress >= 0 else LOSS
        bars = f"{paint(code, left, colour)}|{paint(code, right, colour)}"
        yield f"{progress:+6.2f} {bars} {value:5.2f}  {printable(text)}"


@dataclass
class Config(SampleFlags):
    verifier: str = opt("", "run directory of pav.py, whose values are shown", "what")
    prompt: str = opt("", "text to answer (in the model's chat format where it has one)", "what")
    raw: bool = opt(False, "continue --prompt as plain text, without the chat format", "what")
    out: str = opt("", "write the solutions to this jsonl file, too", "what")


def show(cfg, task, model, tokenizer, options):
    """Sample, score every step, print; --out writes the rows. task: None for --prompt; options: of
    sample.generate. UserError: a verifier of another tokenizer."""
    verifier = load_verifier(cfg.verifier, tokenizer, model.head.device)
    if task:
        once = task.problems(cfg.split, cfg.num_problems or None, cfg.seed)
        problems = [p for p in once for _ in range(cfg.n)]
        prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
    else:
        problems = [Problem("", cfg.prompt, "")] * cfg.n
        prompts = [prompt_ids(cfg, tokenizer)] * cfg.n
    rolled = generate(model, prompts, **options)
    ends = step_ends(task or Task(), rolled, tokenizer)  # without a task a step is a line
    values = step_values(verifier, rolled.tokens, ends)
    rewards = grades(task, problems, rolled, tokenizer).tolist() if task else None
    rows = solution_rows(problems, rolled, ends, values, rewards, tokenizer)
    if cfg.out:
        write_rows(cfg.out, rows)
    colour = wants_colour(sys.stdout)
    for row in rows:
        print(*show_row(row, colour), "", sep="\n")
    if cfg.out:
        print(f"rows: {cfg.out}")
    return rows


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if not cfg.verifier:
        raise UserError("--verifier is missing: a run directory of pav.py, whose values are shown")
    if not cfg.prompt and not cfg.task:
        raise UserError("nothing to show: give --prompt TEXT, or --task NAME")
    check_file(cfg.out)
    return show(cfg, *start(cfg))


if __name__ == "__main__":
    script(main)
