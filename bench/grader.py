"""How often does the grader pay for a wrong answer, and refuse a right one? Before and now, with and without math-verify.

    python -m bench.grader --answers math500_model_answers.jsonl --golds gold_answers.json --suites SUITES --before OLD

--answers   lines {"prediction", "answer"} of models. Nobody has labelled them: an answer counts as right where any of the
            graders says so. Those that ours refuses or math-verify alone refuses are written out for a person to judge
--golds     a list of answers as data sets hold them: each must equal itself; two of them are compared where they have the
            same digits, and 20,000 random pairs more; those accepted that are not plainly one text are written out
--suites    a folder with the tests of Hendrycks' MATH (math_equivalence_test.py and math_equivalence.py) and Math-Verify
            (test_*.py, among them the pairs of Qwen2.5-Math's grader). A pair counts where both sides hold one marked answer.
            The suites contradict each other (Math-Verify takes a list in another order and one of its elements, a sum where
            a number is asked for, rounded and decimal-comma numbers, 1+1/e for 1-1/e): they "agree" on a pair if both
            graders give the label, Hendrycks' by its is_equiv, Math-Verify's by its package. What ours says otherwise than
            the labels, anywhere, is written out
--before    a checkout of an older version, whose tasks/answers.py is compared with

Writes docs/results/grader/results.json and table.md.
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from infra.cli import UserError, opt, parse, script
from tasks import symbolic
from tasks.answers import _NAME, _without_unit, answers_equal, canonical, extract_answer, parse_number

OLD = """
import json, sys
from tasks.answers import answers_equal
print(json.dumps([answers_equal(a, b) for a, b in json.load(sys.stdin)]))
"""


@dataclass
class Config:
    answers: str = opt("", "answers of models with the right ones, JSON lines")
    golds: str = opt("", "answers of data sets, a JSON list")
    suites: str = opt("", "folder with the tests of other graders")
    before: str = opt("", "checkout of an older version")
    pairs: int = opt(20_000, "random pairs of --golds")
    out: str = opt("docs/results/grader", "folder of the results")


def one_answer(text):
    """The answer that a side of a test holds: in a box, in the only formula, or alone; None: it holds several."""
    if text.count("boxed") > 1 or re.search(r"[A-Za-z]{3,}.* .*\\$.*[A-Za-z]{3,} [a-z]", text):
        return None
    if (answer := extract_answer(text)) is not None:
        return answer
    formulas = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text, re.S)
    if len(formulas) > 1 or (not formulas and len(text) > 30):
        return None
    return next(f for f in formulas[0] if f) if formulas else text


def read_suites(folder):
    """-> [(suite, prediction, gold, label)]"""
    out = []
    for path in sorted(Path(folder).glob("*test*.py")):
        for node in ast.walk(ast.parse(path.read_text().replace("\t", "    "))):
            if isinstance(node, ast.FunctionDef) and path.stem == "math_equivalence_test":
                values = [n.value.value for n in ast.walk(node) if isinstance(n, ast.Assign)]
                label = any(getattr(n, "attr", "") == "assertTrue" for n in ast.walk(node))
                out.append(("Hendrycks", *values, label))
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "parametrize":
                names = node.args[0].value.replace(" ", "").split(",")
                for row in (r for r in node.args[1].elts if isinstance(r, ast.Tuple)):
                    if all(isinstance(e, ast.Constant) for e in row.elts) and {"gold", "pred"} <= set(names):
                        case = dict(zip(names, (e.value for e in row.elts)))
                        suite = "Qwen2.5-Math" if "precision" in names else "Math-Verify"
                        out.append((suite, case["pred"], case["gold"], bool(case.get("expected", case.get("result")))))
    sides = [(suite, one_answer(a), one_answer(b), label) for suite, a, b, label in out]
    return [row for row in dict.fromkeys(sides) if None not in row[:3]], len(out)


def graders(before, pairs):
    """{name: [verdict of each pair]}"""
    out = {}
    if before:
        env = dict(os.environ, PYTHONPATH=str(Path(before).resolve()))
        done = subprocess.run([sys.executable, "-c", OLD], input=json.dumps(pairs), capture_output=True, text=True, cwd=before,
                              env=env)
        if done.returncode:
            raise UserError(f"--before {before}: its grader failed: {done.stderr.strip().splitlines()[-1]}")
        out["before"] = json.loads(done.stdout)
    out["ours"] = [answers_equal(a, b) for a, b in pairs]
    if symbolic.available():
        out["ours + math-verify"] = [symbolic.symbolically_equal(a, b) for a, b in pairs]
        out["math-verify alone"] = [bool(a and b and symbolic._judge.ask(a, b)) for a, b in pairs]
    return out


def count(verdicts, labels):
    wrong, right = labels.count(False), labels.count(True)
    return dict(pairs=len(labels), right=right, wrong=wrong, accepted_wrong=sum(v and not y for v, y in zip(verdicts, labels)),
                refused_right=sum(y and not v for v, y in zip(verdicts, labels)))


def measure_suites(cfg):
    rows, total = read_suites(cfg.suites)
    sys.path.insert(0, cfg.suites)
    from math_equivalence import is_equiv  # Hendrycks' own

    pairs, labels = [r[1:3] for r in rows], [r[3] for r in rows]
    verdicts = graders(cfg.before, pairs)
    hendrycks = [is_equiv(*p) for p in pairs]
    agree = [i for i, y in enumerate(labels) if hendrycks[i] == verdicts["math-verify alone"][i] == y]
    every = {name: count(v, labels) for name, v in verdicts.items()}
    agreed = {name: count([v[i] for i in agree], [labels[i] for i in agree]) for name, v in verdicts.items()}
    differ = [dict(suite=s, prediction=a, gold=b, label=y) for (s, a, b, y), v in zip(rows, verdicts["ours"]) if v != y]
    return {f"suites, where they agree ({len(agree)} of {total} pairs)": agreed, f"suites, all ({len(rows)})": every}, differ


def measure_answers(cfg):
    rows = [json.loads(line) for line in Path(cfg.answers).read_text().splitlines()]
    pairs = [(extract_answer(r["prediction"]) or "", r["answer"]) for r in rows]
    verdicts = graders(cfg.before, pairs)
    labels = [any(v) for v in zip(*verdicts.values())]
    alone = [dict(prediction=p[0], gold=p[1], accepted=[n for n, v in verdicts.items() if v[i]])
             for i, p in enumerate(pairs) if labels[i] and not verdicts["ours"][i]]
    alone += [dict(prediction=p[0], gold=p[1], accepted=["ours"]) for i, p in enumerate(pairs)
              if verdicts["ours"][i] and not verdicts.get("math-verify alone", verdicts["ours"])[i]]
    counts = {name: count(v, labels) | dict(accepted_wrong="-") for name, v in verdicts.items()}  # by the labels' making 0
    return {f"answers of models ({len(rows)})": counts}, alone


def measure_golds(cfg):
    golds = json.loads(Path(cfg.golds).read_text())
    digits = [re.sub(r"[^0-9]", "", g) for g in golds]
    homes = {}
    for i, d in enumerate(digits):
        homes.setdefault("".join(sorted(d)), []).append(i)
    rng = random.Random(0)
    near = {(i, j) for home in homes.values() for k, i in enumerate(home) for j in home[k + 1 : k + 40]}
    pairs = sorted(near | {tuple(sorted(rng.sample(range(len(golds)), 2))) for _ in range(cfg.pairs)})
    accepted = [(golds[i], golds[j]) for i, j in pairs if answers_equal(golds[i], golds[j])]

    def bare(text):
        return _without_unit(_NAME.fullmatch(canonical(text))[2])[0]

    unlike = [p for p in accepted if bare(p[0]) != bare(p[1]) and not all(parse_number(bare(t)) for t in p)]
    refused = [g for g in golds if not answers_equal(g, g)]
    return dict(golds=len(golds), not_equal_to_themselves=refused, pairs=len(pairs), accepted=len(accepted),
                accepted_but_written_differently=sorted({p if len(p[0]) < 60 else (p[0][:60], p[1][:60]) for p in unlike}))


def main():
    cfg = parse(Config, description=__doc__)
    if not symbolic.available():
        raise UserError("this comparison needs math-verify: pip install math-verify")
    symbolic.TIME_LIMIT = 10.0  # a busy machine changes no verdict
    results, tables = dict(python=sys.version.split()[0]), {}
    for flag, measure in (("suites", measure_suites), ("answers", measure_answers)):
        if getattr(cfg, flag):
            some, listed = measure(cfg)
            tables |= some
            results[f"{flag}_listed"] = listed
    if cfg.golds:
        results["golds"] = measure_golds(cfg)
    results["tables"] = tables
    lines = ["| pairs | grader | right | refused of these | wrong | accepted of these |", "|---|---|---|---|---|---|"]
    for what, by in tables.items():
        lines += [f"| {what} | {name} | {c['right']} | {c['refused_right']} ({c['refused_right'] / max(c['right'], 1):.1%}) | "
                  f"{c['wrong']} | {c['accepted_wrong']} |" for name, c in by.items()]
    if cfg.golds:
        g = results["golds"]
        lines += ["", f"{g['golds']} answers of data sets: {len(g['not_equal_to_themselves'])} do not equal themselves. Of "
                  f"{g['pairs']} pairs of different ones {g['accepted']} are accepted, "
                  f"{len(g['accepted_but_written_differently'])} of them not plainly one text (listed in results.json)."]
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    script(main)
