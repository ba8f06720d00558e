"""Solutions as rows of a file: one JSON line a solution, cut into steps, each with its value.

train_rl.py writes those of its first and last evaluation (solutions_start.jsonl,
solutions_end.jsonl), `python -m report` shows them in a browser, `--show` in the terminal. A row is

    {prompt, answer, steps: [text], values: [V before the first step, V after each], reward,
     finish_reason}

answer: what the task asks for, null where nothing is known; reward: null where nothing is graded.
"""

import json
from pathlib import Path

from infra import parallel
from infra.cli import UserError
from rollouts import distinct, take

WRITTEN = 64  # solutions that an evaluation writes
FIELDS = ("prompt", "steps", "values", "reward", "finish_reason")


def solution_rows(problems, rollouts, ends, values, rewards, tokenizer):
    """problems: B of them; ends, values [B,S+1]: the step ends (column 0 the prompt's length, rows
    padded by repeating the last) and the verifier's values there; rewards: B numbers, or None."""
    rows = []
    for b, problem in enumerate(problems):
        real = distinct(ends[b])
        tokens = rollouts.tokens[b].tolist()
        rows.append(
            dict(
                prompt=problem.prompt,
                answer=getattr(problem, "answer", None),
                steps=[tokenizer.decode(tokens[i:j]) for i, j in zip(real, real[1:])],
                values=[round(v, 4) for v in values[b, : len(real)].tolist()],
                reward=None if rewards is None else float(rewards[b]),
                finish_reason=rollouts.finish_reason[b],
            )
        )
    return rows


def write_solutions(path, tokenizer, problems, rollouts, rewards, values, ends):
    """Write the first WRITTEN distinct solutions of an evaluation. Distinct, one of each (prompt,
    completion): a sharp policy repeats itself. Shapes as in solution_rows."""
    first = {}
    for b, problem in enumerate(problems):
        first.setdefault((problem.prompt, *rollouts.completion(b)), b)
    chosen = list(first.values())[:WRITTEN]
    rows = solution_rows(
        [problems[b] for b in chosen],
        take(rollouts, chosen),
        ends[chosen],
        values[chosen],
        [rewards[b] for b in chosen],
        tokenizer,
    )
    write_rows(path, rows)


def write_rows(path, rows):
    """JSON lines, whole or not at all; under torchrun rank 0 alone writes."""
    if parallel.rank():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def check_file(out):
    """UserError where --out is a folder: before the work whose rows go there."""
    if out and Path(out).is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file")


def read_rows(path):
    """Undo write_rows. UserError, with file and line: a line that is no such row."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            complete = all(field in row for field in FIELDS)
        except (ValueError, TypeError):
            complete = False
        if not complete or len(row["values"]) != len(row["steps"]) + 1:
            raise UserError(f"{path} is damaged: line {number} is no solution; delete the file")
        rows.append(row)
    return rows


def progress_of(row):
    """A^mu of each step: V_h - V_{h-1} (eq. 2 of arXiv 2410.08146)."""
    return [after - before for before, after in zip(row["values"], row["values"][1:])]
