"""The tasks by name, and the three whose problems come from files of yours.

    python train_sft.py --task gsm8k --data gsm8k_train.jsonl gsm8k_test.jsonl --model smollm2
    python sample.py --task math --data MATH/ --model DIR --eval
    python train_sft.py --task jsonl --data questions.jsonl --model DIR        # any questions with answers

planted and countdown are in puzzles.py, chain and stargraph in didactic.py, worded, probe and contextual in
files of that name, what all share in problems.py.
A step is a line: it ends with the token that holds its newline, and blank lines open the next step. So a boundary is known
when that token is drawn and no later text moves it; a search may cut there. Left out: sentences as steps (the full stop of
"3." is known for one only after the next token), and stop strings.
"""

import json
import re
from pathlib import Path

from tasks.answers import MAX_ANSWER, answers_equal, canonical, extract_answer, last_number, parse_number
from infra.cli import TASKS, UserError
from tasks.base import Problem, Task, split_of
from tasks.puzzles import Countdown, Planted, countdown_moves, kmp_next
from tasks.symbolic import symbolically_equal

__all__ = ["Countdown", "Gsm8k", "Jsonl", "Math", "Planted", "Problem", "Task", "answers_equal", "countdown_moves",
           "extract_answer", "get_task", "kmp_next", "line_ends", "split_of"]

# ----------------------------------------------------------------------------------------------------
# Files -> rows

QUESTION_FIELDS = ("question", "problem", "input", "prompt")
ANSWER_FIELDS = ("answer", "target", "solution")
DEFAULT_SHOTS = 4  # worked examples of --template fewshot
SPLIT_NAMES = dict(train="train", test="test", math500="test", val="val", valid="val", validation="val", dev="val")


def _loads(text):
    """Numbers stay text, so that 43.0 and 0.1 keep their exact value; int of "NaN" is a ValueError, as it should be."""
    return json.loads(text, parse_float=str, parse_int=str, parse_constant=int)


def _json_lines(path, text):
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path} line {i}", _loads(line)
            except (ValueError, RecursionError):
                yield f"{path} line {i}", None


def _json_whole(path, text):
    """A .json file: one object, or a list of them."""
    try:
        whole = _loads(text)
    except (ValueError, RecursionError) as e:
        line = f" (line {e.lineno})" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(f"{path} is not JSON{line}; a file of one object a line is called .jsonl") from None
    return [(f"{path} item {i}", row) for i, row in enumerate(whole, 1)] if isinstance(whole, list) else [(str(path), whole)]


def read_rows(path):
    """-> [("FILE line N", dict)] of a .jsonl file, or of a .json file that holds an object or a list."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it to JSON lines in UTF-8") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; check --data") from None
    rows = list((_json_whole if str(path).endswith(".json") else _json_lines)(path, text))
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object; write one object a line")
    if not rows:
        raise UserError(f"{path} is empty; it needs one JSON object a line")
    return rows


def name_split(path):
    """ "gsm8k_test.jsonl" -> "test"; "" where the name says nothing."""
    words = re.split(r"[^a-z]+", str(path).lower().replace("math-500", "math_test").replace("math_500", "math_test")
                     .replace("math500", "math_test"))
    return next((SPLIT_NAMES[w] for w in reversed(words) if w in SPLIT_NAMES), "")


def find_files(data, task):
    """--data -> [(split or "", path)]. "test=FILE" names a file's split. For gsm8k and math the name of a file does so too,
    and a folder stands for the files below it that name their split (of those with the task in their name, if any)."""
    found = []
    for entry in data:
        split, _, path = entry.partition("=") if entry.startswith(("train=", "val=", "test=")) else ("", "", entry)
        if task != "jsonl" and Path(path).is_dir():
            below = [(p, name_split(p.relative_to(path))) for p in sorted(Path(path).rglob("*.json*"))]
            below = [(p, s) for p, s in below if split or s]
            below = [(p, s) for p, s in below if task in p.name.lower()] or below
            if not below:
                raise UserError(f"{path} holds no .jsonl or .json file named after a split (train, test); check --data")
            found += [(split or s, str(p)) for p, s in below]
        else:
            found.append((split or (name_split(Path(path).name) if task != "jsonl" else ""), path))
    return found


# ----------------------------------------------------------------------------------------------------
# Rows -> problems


def _field(row, name, guesses, where, flag):
    """Text of a field of the row: the named one, or the first of the guesses that is there."""
    name = name or next((g for g in guesses if g in row), "")
    if name not in row:
        want = repr(name) if name else " or ".join(guesses)
        raise UserError(f"{where} has no field {want}; fields: {', '.join(row)}; name it with {flag}")
    if not isinstance(row[name], str) or not row[name].strip():
        raise UserError(f"{where}: field {name!r} must be non-empty text or a number; name it with {flag}")
    return row[name].strip()


def to_problem(row, where, question_field, answer_field):
    """One row -> Problem; data holds the worked solution, "" where the file has none."""
    question = _field(row, question_field, QUESTION_FIELDS, where, "--question-field")
    text = _field(row, answer_field, ANSWER_FIELDS, where, "--answer-field")
    answer = " ".join((extract_answer(text) or text).split())
    number = parse_number(answer)
    if number and not number[1] and number[0].denominator == 1:
        answer = str(number[0])  # 43.0 is 43
    if len(answer) > MAX_ANSWER:
        raise UserError(f"{where}: the answer is longer than {MAX_ANSWER} characters; choose --answer-field")
    solution = row.get("solution")
    solution = solution if isinstance(solution, str) and solution.strip() else text
    solution = re.sub(r"<<[^<>\n]*>>", "", solution).strip()  # GSM8K's calculator annotations
    return Problem(" ".join(question.split()), question, answer, (solution if " " in solution else "",))


def load_problems(files, make):
    """[(split, path)] -> {split: [Problem]}; make(row, where) -> Problem. Without a split the question's hash decides.

    A question counts once, for test before val before train: no evaluation on what was trained. Where files
    are named and none is val, val is the tenth of train that the hash gives it.
    """
    kinds = {split for split, _ in files}
    if "" in kinds and len(kinds) > 1:
        path = next(path for split, path in files if not split)
        raise UserError(f"--data mixes files of a known split with others; write the split of {path}: train={path} or test=...")
    out, seen = dict(train=[], val=[], test=[]), set()
    for split, path in sorted(files, key=lambda x: ("test", "val", "train", "").index(x[0])):
        for where, row in read_rows(path):
            problem = make(row, where)
            carve = split == "train" and "val" not in kinds and split_of(problem.key) == "val"
            if problem.key not in seen:
                out["val" if carve else split or split_of(problem.key)].append(problem)
            seen.add(problem.key)
    return out


# ----------------------------------------------------------------------------------------------------
# Steps


def line_ends(tokens, prompt_len, length, tokenizer):
    """Exclusive ends of the lines, in token positions; the last is length, with what blank rest or EOS there is."""
    raw = [b"" if t in tokenizer.eos_ids else tokenizer.token_bytes(t) for t in tokens[prompt_len:length]]
    ends, line = [], b""
    for end, piece in enumerate(raw, prompt_len + 1):
        line += piece
        if b"\n" in piece and b"\n" in line.lstrip():  # a newline after some text: blank lines open the next step
            ends.append(end)
            line = b""
    if ends and not line.strip():
        ends.pop()
    return ends + [length] * (length > prompt_len)


# ----------------------------------------------------------------------------------------------------
# Tasks


class Jsonl(Task):
    """Questions with answers, one JSON object a line; any names of fields.

    A demonstration is the file's solution, ended by a line "#### 7" if it does not show the answer itself;
    where only the answer is known it is "The answer is 7.". No solver, and no demonstrator with a strength.
    """

    name, strengths, max_new_tokens = "jsonl", None, 512
    ends_with_eos, random_demonstrations = True, False
    ask = '\nWork step by step, one step a line. Your last sentence is "The answer is", then the answer alone.'
    shot = "Question: {}\nAnswer:\n"

    def __init__(self, data, question_field="", answer_field="", seed=0, template="auto", shots=0):
        if template not in ("auto", "chat", "plain", "fewshot") or (template == "chat" and shots):
            raise UserError("--template is auto, chat, plain or fewshot; worked examples (--shots) need plain text")
        if not data:
            raise UserError(f"--task {self.name} needs --data FILE (JSON lines)")
        make = lambda row, where: self.to_problem(row, where, question_field, answer_field)  # noqa: E731
        self.by_split, self.template = load_problems(find_files(data, self.name), make), template
        shots = shots or (DEFAULT_SHOTS if template == "fewshot" else 0)
        self.shots = []
        if shots:  # from the training split alone, whichever split is answered
            if len(self.by_split["train"]) < shots:
                raise UserError(f"{shots} worked examples are drawn from the training split, which holds "
                                f"{len(self.by_split['train'])} problems; add --data train=FILE, or lower --shots")
            self.shots = self.problems("train", shots, seed)

    def to_problem(self, row, where, question_field, answer_field):
        return to_problem(row, where, question_field, answer_field)

    def tokenizer(self):
        return None

    def problems(self, split, n=None, seed=0):
        if split in self.by_split and not self.by_split[split]:
            held = ", ".join(f"{len(v)} {k}" for k, v in self.by_split.items() if v)
            raise UserError(f"no problem is left in split {split!r} (--data holds {held}); add --data {split}=FILE")
        return super().problems(split, n, seed)

    def demonstration(self, problem, strength=None, seed=0):
        solution, last = problem.data[0], f"#### {problem.answer}"
        choices = [solution, f"{solution}\n{last}"] if solution else [f"The answer is {problem.answer}."]
        return next((text for text in choices if self.grade(problem, text)), last)

    def own_text(self, completion):
        """A base model goes on with a question of its own: what follows is no answer to ours."""
        return completion.split("\n" + self.shot.split(":")[0])[0]

    def answer(self, problem, completion):
        """What the completion says in the end, or None (unparsable)."""
        return extract_answer(self.own_text(completion))

    def grade(self, problem, completion):
        return float(answers_equal(self.answer(problem, completion), problem.answer))

    def grade_leniently(self, problem, completion):
        """For a second number in evaluation, never a reward: the last number will do, and math-verify is asked."""
        found = self.answer(problem, completion) or last_number(self.own_text(completion))
        return float(symbolically_equal(found, problem.answer))

    def step_ends(self, tokens, prompt_len, length, tokenizer):
        return line_ends(tokens, prompt_len, length, tokenizer)

    def stop_ids(self, tokenizer):
        """Tokens that end a completion: EOS, and after worked examples the blank line that parts them or the word ("Question")
        that begins the next: a model that was shown four goes on with a sixth."""
        if not self.shots:
            return list(tokenizer.eos_ids)
        word = self.shot.split(":")[0].encode()
        blank = not any("\n\n" in self.demonstration(p) for p in self.shots)
        pieces = map(tokenizer.token_bytes, range(tokenizer.n_vocab))
        return [*tokenizer.eos_ids, *(t for t, b in enumerate(pieces) if b == word or (blank and b"\n\n" in b))]

    def prompt_tokens(self, problem, tokenizer):
        """auto: the chat format where the tokenizer has one, else plain."""
        chat = self.template == "auto" and getattr(tokenizer, "chat_format", None)
        if self.template == "chat" or chat:
            return tokenizer.chat([dict(role="user", content=problem.prompt + self.ask)])
        shown = [(p.prompt, self.demonstration(p) + "\n\n") for p in self.shots if p.key != problem.key]
        shown.append((problem.prompt, ""))
        return tokenizer.prompt("".join(self.shot.format(q) + a for q, a in shown))


class Gsm8k(Jsonl):
    """Grade-school word problems (arXiv 2110.14168): {"question", "answer"}, the answer ending in a line "#### 18".

    The official test file stays the test split; val is the tenth of the training file that the hash gives it."""

    name, max_new_tokens = "gsm8k", 400

    def to_problem(self, row, where, question_field, answer_field):
        problem = to_problem(row, where, question_field, answer_field or "answer")
        if parse_number(canonical(problem.answer) or "") is None or "####" not in row[answer_field or "answer"]:
            raise UserError(f"{where}: the answer does not end in '#### NUMBER'; is this GSM8K? (other files: --task jsonl)")
        return problem


class Math(Jsonl):
    r"""Competition problems (arXiv 2103.03874): {"problem", "solution"} with \boxed{answer} in the solution; an "answer" beside
    it (MATH-500) is used as it stands."""

    name, max_new_tokens = "math", 1024
    ask = "\nWork step by step, a step a line. Put the final answer within \\boxed{}."
    shot = "Problem: {}\nSolution:\n"

    def to_problem(self, row, where, question_field, answer_field):
        problem = to_problem(row, where, question_field, answer_field)
        if not answer_field and "answer" not in row and extract_answer(str(row.get("solution"))) is None:
            raise UserError(f"{where}: no \\boxed{{answer}} in the solution; is this MATH? (other files: --task jsonl)")
        return problem

    def demonstration(self, problem, strength=None, seed=0):
        solution = problem.data[0]
        last = f"The answer is $\\boxed{{{problem.answer}}}$."
        return next((t for t in (solution, f"{solution}\n{last}".strip()) if self.grade(problem, t)), last)


FILES = dict(gsm8k=Gsm8k, math=Math, jsonl=Jsonl)


def get_task(name, seed=0, data=(), question_field="", answer_field="", **options):
    """Task by name; options go to its class. A script's config may stand in for the name, seed and fields."""
    if not isinstance(name, str):
        cfg, name = name, name.task
        seed, data, question_field, answer_field = cfg.seed, cfg.data, cfg.question_field, cfg.answer_field
        if name == "planted" and hasattr(cfg, "planted_prompts"):
            options = dict(prompts=cfg.planted_prompts, planted=cfg.planted_length) | options
        if name in FILES:
            options = {k: getattr(cfg, k) for k in ("template", "shots") if hasattr(cfg, k)} | options
    if name in FILES:
        return FILES[name](data, question_field, answer_field, seed, **options)
    if name == "planted":
        return Planted(seed, **options)
    if name == "countdown":
        return Countdown(**options)
    if name in ("chain", "stargraph"):
        from tasks import didactic

        return didactic.Chain(seed, **options) if name == "chain" else didactic.StarGraph(seed, **options)
    if name == "contextual":
        from tasks.contextual import Contextual

        return Contextual(seed, **options)
    if name == "worded":
        from tasks.worded import Worded

        return Worded(**options)
    if name == "probe":
        from tasks.probe import Probe

        return Probe(**options)
    raise UserError(f"task {name!r} is unknown; use {', '.join(TASKS[:-1])} or {TASKS[-1]}")
