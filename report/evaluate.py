"""Evaluation: answer a split of a task, grade, and say how sure one can be.

    python -m report.evaluate --task planted --model runs/planted/seed0/rl_pav --n 8
    python -m report.evaluate --task gsm8k --data gsm8k_test.jsonl --model smollm2 --greedy
    python -m report.evaluate --task jsonl --data q.jsonl --model DIR --task-args shots=4

Every completion is a line of OUT.jsonl, written chunk by chunk; OUT.json beside it holds the
settings, and in the end the results. Killed? The same command goes on behind the last whole line;
as a draw depends on (seed, problem, sample, token) alone, the file is the one that an uninterrupted
run writes (CPU, float32). Other settings with the same OUT are refused. The default name of OUT is
made of the settings, under runs/eval/.
"""

import dataclasses
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from infra.cli import UserError, opt, parse, print_next_command, script
from infra.runs import lock_file, make_folder, mean, read_json, write_json
from report.solutions import check_file
from report.statistics import interval, vote
from rollouts import pass_at_k
from sample import SampleFlags, generate, start
from tasks.symbolic import available

CHUNK_SECONDS = 60  # chunks grow until they take about this long: what a kill can lose
FORMAT = 2  # of a row; 1 called the final answer "said"
NO_MATTER = ("out", "slots", "device", "threads")  # flags that do not change a completion


@dataclass
class Config(SampleFlags):
    out: str = opt(
        "", "jsonl file of the completions (default: named by the settings, in runs/eval)", "what"
    )


# --------------------------------------------------------------------------------------------------
# What the rows say.


def row_of(task, problem, i, n, text, tokens, finish_reason):
    """One line of the file: sample i % n of problem i // n; tokens: how many the completion has."""
    row = dict(
        problem=i // n,
        sample=i % n,
        key=problem.key,
        gold=problem.answer,
        completion=text,
    )
    if task.has_final_answer:
        row["final_answer"] = task.final_answer(problem, text)
    return row | dict(reward=task.grade(problem, text), tokens=tokens, finish_reason=finish_reason)


def summarize(rows, n, task, problems):
    """Rows of the problems in order, n each -> the numbers that are printed and written.

    lenient: what a forgiving grader would say (last number in the text, math-verify); far above
    accuracy, it is the format that is not known, not the mathematics.
    """
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    right = [sum(row["reward"] for row in group) for group in groups]
    accuracy, low, high = interval([count / n for count in right], n)
    out = dict(
        accuracy=accuracy,
        low=low,
        high=high,
        problems=len(groups),
        n=n,
        truncated=mean(row["finish_reason"] == "length" for row in rows),
        mean_length=mean(row["tokens"] for row in rows),
    )
    if task.has_final_answer:
        out["unparsable"] = mean(row["final_answer"] is None for row in rows)
        out["lenient"] = mean(
            task.grade_leniently(problems[row["problem"]], row["completion"]) for row in rows
        )
        out["lenient_asked_math_verify"] = available()
        if n > 1:
            out["majority"], out["majority_low"], out["majority_high"] = majority(groups)
    for k in (2, 4, 8, 16, 32, 64, 128, 256):
        if k <= n:
            out[f"pass@{k}"] = mean(pass_at_k(n, int(count), k) for count in right)
    return out


def majority(groups):
    """Accuracy of the majority vote over each group's rows, with its interval."""
    chosen = [vote([row["final_answer"] for row in group]) for group in groups]
    return interval([0.0 if i is None else group[i]["reward"] for group, i in zip(groups, chosen)])


def report(r):
    """Lines for people."""
    unparsable = f", unparsable {r['unparsable']:.3f}" if "unparsable" in r else ""
    yield (
        f"accuracy {r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}] (95%, {r['problems']} "
        f"problems x {r['n']}), truncated {r['truncated']:.3f}{unparsable}"
    )
    if "lenient" in r:
        yield f"lenient grader {r['lenient']:.3f} (takes the last number; not a reward)"
    if "majority" in r:
        bounds = f"[{r['majority_low']:.3f}, {r['majority_high']:.3f}]"
        yield f"majority@{r['n']} {r['majority']:.3f} {bounds}"
    for k in (k for k in r if k.startswith("pass@")):
        yield f"{k} {r[k]:.3f}"


# --------------------------------------------------------------------------------------------------
# The file.


def fingerprint(model, tokenizer, problems):
    """What the settings do not say: which weights, which tokenizer, which problems."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for p in model.parameters():
        digest.update(p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    for problem in problems:
        digest.update(json.dumps([problem.key, problem.prompt, problem.answer]).encode())
    return digest.hexdigest()[:16]


def default_out(cfg, temperature):
    """runs/eval/SETTINGS.jsonl."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "_", str(cfg.model).strip("/")) or "model"
    limit = f"_max{cfg.max_new_tokens}" if cfg.max_new_tokens else ""
    args = "".join(re.sub(r"[^A-Za-z0-9.-]+", "_", f"_{word}") for word in cfg.task_args)[:60]
    name = (
        f"{cfg.task}_{cfg.split}_{model[-60:]}{args}_"
        f"{cfg.num_problems}x{cfg.n}_t{temperature:g}{limit}_seed{cfg.seed}.jsonl"
    )
    return Path("runs/eval") / name


def open_rows(path, settings):
    """-> (file open for appending, rows already there). The settings beside it must be the same; a
    half-written last line, the mark of a kill, is cut off."""
    check_file(path)
    make_folder(path.parent)
    beside = path.with_suffix(".json")
    if path.exists() and path.stat().st_size and not beside.exists():
        raise UserError(
            f"{path} exists and is not the file of an evaluation ({beside.name} is missing); give "
            "another --out"
        )
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held until the end)
    if not lock_file(file):
        raise UserError(f"{path} is being written by another process; wait or give another --out")
    if beside.exists():
        refuse_other_settings(path, read_json(beside).get("settings", {}), settings)
    else:
        write_json(beside, dict(settings=settings))
    rows = []
    whole = 0
    file.seek(0)
    for line in file.read().splitlines(keepends=True):
        try:
            rows.append(json.loads(line if line.endswith("\n") else "cut off"))
        except ValueError:
            break
        whole += len(line.encode())
    file.truncate(whole)
    return file, rows


def refuse_other_settings(path, old, settings):
    changed = [k for k in settings if old.get(k) != settings[k]]
    if changed:
        k = changed[0]
        raise UserError(
            f"{path} holds an evaluation with {k} {old.get(k)!r}, not {settings[k]!r}; give "
            "another --out, or delete that one"
        )


# --------------------------------------------------------------------------------------------------
# The evaluation.


def add_rows(rows, cfg, task, model, tokenizer, options, problems, file):
    """Append the completions that are missing, --n of each problem, chunk by chunk, each a line of
    the file. Returns the seconds of generation."""
    total = len(problems) * cfg.n
    size = cfg.slots
    seconds = 0.0
    while len(rows) < total:
        began = time.time()
        ids = range(len(rows), min(total, len(rows) + size))
        prompts = [task.prompt_tokens(problems[i // cfg.n], tokenizer) for i in ids]
        rolled = generate(model, prompts, sequence_ids=list(ids), **options)
        new = []
        for i, completion, reason in zip(ids, rolled.completions(), rolled.finish_reason):
            text = tokenizer.decode(completion)
            problem = problems[i // cfg.n]
            new.append(row_of(task, problem, i, cfg.n, text, len(completion), reason))
        rows += new
        file.write("".join(json.dumps(row) + "\n" for row in new))
        file.flush()
        os.fsync(file.fileno())
        seconds += rolled.seconds
        if len(rows) < total:
            so_far = mean(row["reward"] for row in rows)
            print(f"  {len(rows)}/{total} completions, accuracy so far {so_far:.3f}", flush=True)
            if time.time() - began < CHUNK_SECONDS / 2:
                size *= 2
    return seconds


def evaluate(cfg, task, model, tokenizer, options):
    """Grade --n samples of --num-problems problems; accuracy, pass@k, majority, truncated and
    unparsable shares. options: of sample.generate. Returns the numbers, see summarize."""
    problems = task.problems(cfg.split, cfg.num_problems or None, cfg.seed)
    out = Path(cfg.out) if cfg.out else default_out(cfg, options["temperature"])
    beside = out.with_suffix(".json")
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NO_MATTER}
    settings |= dict(
        temperature=options["temperature"],
        max_new_tokens=options["max_new_tokens"],
        fingerprint=fingerprint(model, tokenizer, problems),
        format=FORMAT,
    )
    file, rows = open_rows(out, settings)
    if rows:
        print(f"going on behind {len(rows)} completions in {out}")
    resumed = len(rows)
    seconds = add_rows(rows, cfg, task, model, tokenizer, options, problems, file)
    file.close()
    result = summarize(rows, cfg.n, task, problems)
    result["left_out"] = getattr(task, "left_out", 0)
    write_json(beside, dict(settings=settings, results=result))
    print_examples(rows[: 3 * cfg.n : cfg.n], problems)
    print(*report(result), sep="\n")
    tokens = sum(row["tokens"] for row in rows[resumed:])
    if tokens:
        print(f"{tokens / seconds:.0f} tokens/s ({tokens} tokens in {seconds:.1f} s)")
    print(f"completions: {out}, settings and results: {beside}")
    return result


def print_examples(rows, problems):
    for row in rows:
        verdict = "right" if row["reward"] else "wrong"
        prompt = problems[row["problem"]].prompt.strip()
        completion = row["completion"].strip()
        print(f"[{verdict}] {prompt!r} -> {completion!r} (gold {row['gold']!r})")


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if not cfg.task:
        raise UserError("--task is missing: an evaluation needs problems with known answers")
    result = evaluate(cfg, *start(cfg))
    majority_of_8 = ["search.py", "--model", cfg.model, "--method", "majority", "--n", 8]
    print_next_command(cfg, ("a vote of eight", majority_of_8))
    return result


if __name__ == "__main__":
    script(main)
