"""Evaluation: answer a split of a task, grade, and say how sure one can be. `python sample.py --task ... --eval` calls it.

    python sample.py --task gsm8k --data gsm8k_test.jsonl --model smollm2 --eval --num-problems 64 --greedy
    python sample.py --task gsm8k --data gsm8k_train.jsonl gsm8k_test.jsonl --model DIR --eval --template fewshot --n 8

Every completion is a line of OUT.jsonl, written chunk by chunk; OUT.json beside it holds the settings, and in the end the
results. Killed? The same command goes on behind the last whole line; as a draw depends on (seed, problem, sample, token)
alone, the file is the one that an uninterrupted run writes (CPU, float32). Other settings with the same OUT are refused.
The default name of OUT is made of the settings, under runs/eval/.
"""

import dataclasses
import hashlib
import json
import os
import re
import time
from pathlib import Path

from infra.cli import UserError, say_next
from infra.runs import lock_file, mean, write_json
from report.statistics import interval, vote
from sample import generate, pass_at_k
from tasks.symbolic import available

CHUNK_SECONDS = 60  # chunks grow until they take about this long: what a kill can lose
NO_MATTER = ("out", "slots", "device", "threads", "eval", "smoke", "prompt", "raw")  # flags that do not change a completion


def summarize(rows, n, task, problems):
    """Rows of the problems in order, n each -> the numbers that are printed and kept. lenient: what a forgiving grader would
    say (last number in the text, math-verify): far above accuracy, it is the format that is not known, not the mathematics."""
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    right = [sum(r["reward"] for r in g) for g in groups]
    accuracy, low, high = interval([c / n for c in right], n)
    out = dict(accuracy=accuracy, low=low, high=high, problems=len(groups), n=n,
               truncated=mean(r["finish_reason"] == "length" for r in rows), mean_length=mean(r["tokens"] for r in rows))
    if hasattr(task, "answer"):
        out["unparsable"] = mean(r["said"] is None for r in rows)
        out["lenient"] = mean(task.grade_leniently(problems[r["problem"]], r["completion"]) for r in rows)
        out["lenient_asked_math_verify"] = available()
        if n > 1:
            chosen = [vote([r["said"] for r in g]) for g in groups]
            out["majority"], out["majority_low"], out["majority_high"] = interval(
                [0.0 if i is None else g[i]["reward"] for g, i in zip(groups, chosen)])
    for k in (2, 4, 8, 16, 32, 64, 128, 256):
        if k <= n:
            out[f"pass@{k}"] = mean(pass_at_k(n, int(c), k) for c in right)
    return out


def report(r):
    """Lines for people."""
    yield (f"accuracy {r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}] (95%, {r['problems']} problems x {r['n']}), "
           f"truncated {r['truncated']:.3f}" + (f", unparsable {r['unparsable']:.3f}" if "unparsable" in r else ""))
    if "lenient" in r:
        yield f"lenient grader {r['lenient']:.3f} (takes the last number; not a reward)"
    if "majority" in r:
        yield f"majority@{r['n']} {r['majority']:.3f} [{r['majority_low']:.3f}, {r['majority_high']:.3f}]"
    for k in (k for k in r if k.startswith("pass@")):
        yield f"{k} {r[k]:.3f}"


# ----------------------------------------------------------------------------------------------------
# The file


def fingerprint(model, tokenizer, problems):
    """What the settings do not say: which weights, which tokenizer, which problems."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for p in model.parameters():
        digest.update(p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    for p in problems:
        digest.update(json.dumps([p.key, p.prompt, p.answer]).encode())
    return digest.hexdigest()[:16]


def default_out(cfg, temperature):
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", str(cfg.model).strip("/")) or "model"
    limit = f"_max{cfg.max_new_tokens}" if cfg.max_new_tokens else ""
    return Path("runs/eval") / (f"{cfg.task}_{cfg.split}_{name[-60:]}_{cfg.template}{cfg.shots or ''}_{cfg.num_problems}x{cfg.n}"
                                f"_t{temperature:g}{limit}_seed{cfg.seed}.jsonl")


def open_rows(path, settings):
    """-> (file open for appending, rows already there). The settings beside it must be the same; a half-written last line, the
    mark of a kill, is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json")
    if path.exists() and path.stat().st_size and not beside.exists():
        raise UserError(f"{path} exists and is not an evaluation of mine ({beside.name} is missing); give another --out")
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held until the end)
    if not lock_file(file):
        raise UserError(f"{path} is being written by another process; wait for it or give another --out")
    if beside.exists():
        old = json.loads(beside.read_text())["settings"]
        if changed := [k for k in settings if old.get(k) != settings[k]]:
            k = changed[0]
            raise UserError(f"{path} holds an evaluation with {k} {old.get(k)!r}, not {settings[k]!r}; give another --out, or "
                            "delete that one")
    else:
        write_json(beside, dict(settings=settings))
    rows, whole = [], 0
    file.seek(0)
    for line in file.read().splitlines(keepends=True):
        try:
            rows.append(json.loads(line if line.endswith("\n") else "cut off"))
        except ValueError:
            break
        whole += len(line.encode())
    file.truncate(whole)
    return file, rows


def evaluate(cfg, model, tokenizer, options):
    """Grade --n samples of --num-problems problems; accuracy, pass@k, majority, truncated and unparsable shares."""
    from tasks import get_task

    task = get_task(cfg)
    problems = task.problems(cfg.split, cfg.num_problems or None, cfg.seed)
    limit = cfg.max_new_tokens or task.max_new_tokens
    options = options | dict(stop_ids=task.stop_ids(tokenizer) if hasattr(task, "stop_ids") else options["stop_ids"])
    file, rows, out = None, [], Path(cfg.out) if cfg.out else default_out(cfg, options["temperature"]) if cfg.eval else None
    if out:
        settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NO_MATTER}
        settings |= dict(temperature=options["temperature"], max_new_tokens=limit,
                         fingerprint=fingerprint(model, tokenizer, problems))
        file, rows = open_rows(out, settings)
        if rows:
            print(f"going on behind {len(rows)} completions in {out}")
    total, resumed, size, seconds = len(problems) * cfg.n, len(rows), cfg.slots, 0.0
    while len(rows) < total:
        ids = range(len(rows), min(total, len(rows) + size))
        began = time.time()
        some = generate(model, [task.prompt_tokens(problems[i // cfg.n], tokenizer) for i in ids], max_new_tokens=limit,
                        sequence_ids=list(ids), **options)
        new = [row_of(task, problems[i // cfg.n], i, cfg.n, tokenizer.decode(some.completion(b)), len(some.completion(b)),
                      some.finish_reason[b]) for b, i in enumerate(ids)]
        rows += new
        if file:
            file.write("".join(json.dumps(r) + "\n" for r in new))
            file.flush()
            os.fsync(file.fileno())
        seconds += some.seconds
        if len(rows) < total:
            print(f"  {len(rows)}/{total} completions, accuracy so far {mean(r['reward'] for r in rows):.3f}", flush=True)
            if time.time() - began < CHUNK_SECONDS / 2:
                size *= 2
    result = summarize(rows, cfg.n, task, problems)
    for r in rows[: 3 * cfg.n : cfg.n]:
        verdict = "right" if r["reward"] else "wrong"
        print(f"[{verdict}] {problems[r['problem']].prompt.strip()!r} -> {r['completion'].strip()!r} (gold {r['gold']!r})")
    print(*report(result), sep="\n")
    new = sum(r["tokens"] for r in rows[resumed:])
    if new:
        print(f"{new / seconds:.0f} tokens/s ({new} tokens in {seconds:.1f} s)")
    if out:
        write_json(out.with_suffix(".json"), dict(settings=settings, results=result))
        print(f"completions: {out}, settings and results: {out.with_suffix('.json')}")
        file.close()
        say_next(cfg, ("a vote of eight", ["sample.py", "--model", cfg.model, "--search", "majority", "--n", 8]))
    return result


def row_of(task, problem, i, n, text, tokens, finish_reason):
    """One line of the file: sample i % n of problem i // n."""
    row = dict(problem=i // n, sample=i % n, key=problem.key, gold=problem.answer, completion=text)
    if hasattr(task, "answer"):
        row["said"] = task.answer(problem, text)
    return row | dict(reward=task.grade(problem, text), tokens=tokens, finish_reason=finish_reason)
