"""Tasks whose problems come from files: gsm8k, math, and jsonl for any questions with answers.

    python train_sft.py --task gsm8k --data gsm8k_train.jsonl gsm8k_test.jsonl --model smollm2
    python sample.py --task math --data MATH/ --model DIR --eval
    python train_sft.py --task jsonl --data questions.jsonl --model DIR
"""

import json
import re
import sys
from pathlib import Path

from infra.cli import UserError, key_values
from tasks.answers import MAX_ANSWER, answers_equal, canonical, extract_answer, parse_number, without_thought
from tasks.base import Problem, Task, split_of, task_seed
from tasks.symbolic import available, symbolically_equal

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


def plain_row(row, where):
    """A conversational row -> question and solution as text; another row -> as it is, `completion` being a solution.

    {"messages": [{role, content}]}, {"prompt": messages or text, "completion": messages or text}: the formats of TRL. A
    system prompt is put before the question. UserError: a message without text, several questions or answers.
    """
    turns, prompt, completion = (row.get(name) for name in ("messages", "prompt", "completion"))
    if turns is None and isinstance(prompt, list):
        turns = prompt + (completion if isinstance(completion, list) else [])
    said = dict(solution=completion) if isinstance(completion, str) else {}
    if not isinstance(turns, list):
        return said | row
    by_role = dict(system=[], user=[], assistant=[])
    for turn in turns:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in by_role or not isinstance(content, str):
            raise UserError(f"{where}: a message needs a role (system, user or assistant) and content as text")
        by_role[role].append(content)
    questions, answers = len(by_role["user"]), len(by_role["assistant"])
    if questions != 1 or answers > 1:
        raise UserError(f"{where} holds {questions} questions and {answers} answers; cut the conversation to one of each")
    said |= dict(question="\n\n".join(by_role["system"] + by_role["user"]))
    said |= dict(solution=by_role["assistant"][0]) if answers else {}
    return said | {k: v for k, v in row.items() if k not in ("messages", "prompt", "completion")}


def _label(value):
    """true, false or a number in [0,1] (which _loads left as text) -> float; None for anything else."""
    try:
        label = float(value) if isinstance(value, (bool, str)) else -1.0
    except ValueError:
        return None
    return label if 0 <= label <= 1 else None


def read_labelled(path):
    """Rows {prompt, completions, labels}: a solution's steps, and for each whether all is well so far (PRM800K) or how
    often it can still be completed (Math-Shepherd); TRL's "stepwise supervision". -> [(prompt, [step], [label])].

    UserError, with file and line: a field is missing or empty, a label is neither true, false nor a number in [0,1].
    """
    found = []
    for where, row in read_rows(path):
        row = plain_row(row, where)
        prompt, steps, labels = row.get("question", row.get("prompt")), row.get("completions"), row.get("labels")
        texts = [prompt, *steps] if isinstance(steps, list) and steps else [None]
        are_texts = all(isinstance(text, str) and text.strip() for text in texts)
        if not (are_texts and isinstance(labels, list) and len(labels) == len(steps)):
            raise UserError(f"{where} needs prompt (text), completions (a list of steps) and labels (one a step)")
        values = [_label(v) for v in labels]
        if None in values:
            raise UserError(f"{where}: label {labels[values.index(None)]!r} is neither true, false nor a number in [0,1]")
        found.append((prompt.strip(), [s.strip("\n") for s in steps], values))
    return found


def to_problem(row, where, question_field, answer_field):
    """One row -> Problem; data holds the worked solution, "" where the file has none."""
    question = _field(row, question_field, QUESTION_FIELDS, where, "--task-args question_field=")
    text = _field(row, answer_field, ANSWER_FIELDS, where, "--task-args answer_field=")
    answer = " ".join((extract_answer(text) or text).split())
    number = parse_number(answer)
    if number and not number[1] and number[0] == int(number[0]):
        answer = str(int(number[0]))  # 43.0 is 43
    if len(answer) > MAX_ANSWER:
        raise UserError(f"{where}: the answer is longer than {MAX_ANSWER} characters; choose --task-args answer_field=")
    solution = row.get("solution")
    solution = solution if isinstance(solution, str) and solution.strip() else text
    solution = re.sub(r"<<[^<>\n]*>>", "", solution).strip()  # GSM8K's calculator annotations
    return Problem(" ".join(question.split()), question, answer, (solution if " " in solution else "",))


def load_problems(files, make):
    """[(split, path)] -> {split: [Problem]}; make(row, where) -> Problem. Without a split the question's hash decides.

    A question counts once, for test before val before train: no evaluation on what was trained. Where files
    are named and none is val, val is the tenth of train that the hash gives it. A question with two answers is
    warned about: the first row counts.
    """
    kinds = {split for split, _ in files}
    if "" in kinds and len(kinds) > 1:
        path = next(path for split, path in files if not split)
        raise UserError(f"--data mixes files of a known split with others; write the split of {path}: train={path} or test=...")
    out, first, other = dict(train=[], val=[], test=[]), {}, []
    for split, path in sorted(files, key=lambda x: ("test", "val", "train", "").index(x[0])):
        for where, row in read_rows(path):
            problem = make(plain_row(row, where), where)
            carve = split == "train" and "val" not in kinds and split_of(problem.key) == "val"
            if problem.key not in first:
                out["val" if carve else split or split_of(problem.key)].append(problem)
                first[problem.key] = where, problem.answer
            elif not answers_equal(problem.answer, first[problem.key][1]):
                other.append((*first[problem.key], where, problem.answer))
    if other:
        print("warning: one question, two answers: {} says {!r}, {} says {!r}; the first counts. Rows like the second: {}. "
              "Mend --data or leave them out".format(*other[0], len(other)), file=sys.stderr)
    return out


# ----------------------------------------------------------------------------------------------------
# Tasks


def last_number(text):
    """The last number in the text, or None: a lenient second opinion for evaluation, never a reward."""
    found = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text[-100_000:])
    return found[-1].rstrip(",") if found else None


class Jsonl(Task):
    """Questions with answers, one JSON object a line; any names of fields.

    A demonstration is the file's solution, ended by a line "#### 7" if it does not show the answer itself;
    where only the answer is known it is "The answer is 7.". No solver, and no demonstrator with a strength.
    """

    name = "jsonl"
    max_new_tokens = 512
    has_final_answer = True
    needs_model = True
    # There is no scripted teacher: the prover is Best-of-4 of the base policy (the paper's best K).
    stages = dict(
        sft=dict(steps=24, batch_size=16, learning_rate=1e-4, warmup_steps=3, num_examples=384, eval_problems=64,
                 micro_batch_size=8, save_steps=12, logging_steps=1),
        verifier=dict(num_problems=64, n_cov=2, cuts=2, n_mc=2, epochs=1, batch_size=32, learning_rate=5e-5, prover_k=4,
                      slots=128, eval_problems=24, eval_mc=8, shard_problems=16, save_steps=4),
        rl=dict(num_prompts=8, num_generations=8, steps=10, learning_rate=5e-6, temperature=0.5, micro_batch_size=16,
                eval_steps=5, eval_problems=64, save_steps=1),
        long=5,
    )
    ask = '\nWork step by step, one step a line. Your last sentence is "The answer is", then the answer alone.'
    shot = "Question: {}\nAnswer:\n"

    # template: auto (chat where the model has a format, else plain), chat, plain or fewshot; shots: worked
    # examples before each problem (0: 4 with fewshot); the fields' names in the rows (empty: guessed).
    args = dict(template="auto", shots=0, question_field="", answer_field="")

    @classmethod
    def from_config(cls, cfg, **options):
        flags = key_values(cfg.task_args, cls.args, "--task-args")
        flags |= dict(data=cfg.data, seed=task_seed(cfg), grader=cfg.grader)
        return cls(**(flags | options))

    def __init__(self, data=(), question_field="", answer_field="", seed=0, template="auto", shots=0, grader="exact"):
        if template not in ("auto", "chat", "plain", "fewshot") or (template == "chat" and shots):
            raise UserError("--task-args template= is auto, chat, plain or fewshot; worked examples (shots=) need plain text")
        if not data:
            raise UserError(f"--task {self.name} needs --data FILE (JSON lines)")
        if grader == "math-verify" and not available():
            raise UserError("--grader math-verify needs the package of that name, on Linux or macOS: pip install math-verify")
        self.equal = symbolically_equal if grader == "math-verify" else answers_equal
        self.chats = self.opens_thought = False  # the last prompt: is it a chat, does it end in an opened <think>?
        make = lambda row, where: self.to_problem(row, where, question_field, answer_field)  # noqa: E731
        self.by_split, self.template = load_problems(find_files(data, self.name), make), template
        shots = shots or (DEFAULT_SHOTS if template == "fewshot" else 0)
        self.shots = []
        if shots:  # from the training split alone, whichever split is answered
            if len(self.by_split["train"]) < shots:
                raise UserError(f"{shots} worked examples are drawn from the training split, which holds "
                                f"{len(self.by_split['train'])} problems; add --data train=FILE, or lower --task-args shots=")
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
        return self.after_thought(next((t for t in choices if answers_equal(extract_answer(t), problem.answer)), last))

    def after_thought(self, text):
        """A demonstration closes the thought that the prompt opened: files hold solutions, no thoughts."""
        return "</think>\n\n" * self.opens_thought + text

    def own_text(self, problem, completion):
        """What follows the thought. A base model goes on with a question of its own, which is no answer to ours: it begins
        with a line "Question: " that stands below an answer, or is followed by the whole form of a worked example."""
        text = without_thought("<think>" * self.opens_thought + completion)
        mark, form = ("\n" + part.strip("\n") for part in self.shot.split("{}"))
        given = re.search(r"^[^\S\n]*####|\\boxed|\\fbox", text, re.M)
        first, last = given.start() if given else len(text), text.rfind(form)
        for new in re.finditer(mark, "" if self.chats else text):
            if (first < new.start() or new.start() < last) and not text.startswith(problem.prompt, new.end()):
                return text[: new.start()]
        return text

    def answer(self, problem, completion):
        """What the completion says in the end, or None (unparsable)."""
        return extract_answer(self.own_text(problem, completion))

    def grade(self, problem, completion):
        return float(self.equal(self.answer(problem, completion), problem.answer))

    def grade_leniently(self, problem, completion):
        """For a second number in evaluation, never a reward: the last number will do, and math-verify is asked."""
        text = self.own_text(problem, completion)
        return float(symbolically_equal(extract_answer(text) or last_number(text), problem.answer))

    def final_answer(self, problem, completion):
        return self.answer(problem, completion)

    def stop_ids(self, tokenizer):
        """Tokens that end a completion: EOS, and after worked examples the blank line that parts them or the word ("Question")
        that begins the next: a model that was shown four goes on with a sixth."""
        if self.in_chat(tokenizer):
            self.prompt_tokens(Problem("", "", ""), tokenizer)  # before grading completions of another process
        if not self.shots:
            return list(tokenizer.eos_ids)
        word = self.shot.split(":")[0].encode()
        blank = not any("\n\n" in self.demonstration(p) for p in self.shots)
        pieces = map(tokenizer.token_bytes, range(tokenizer.n_vocab))
        return [*tokenizer.eos_ids, *(t for t, b in enumerate(pieces) if b == word or (blank and b"\n\n" in b))]

    def in_chat(self, tokenizer):
        return self.template == "chat" or (self.template == "auto" and bool(getattr(tokenizer, "chat_format", None)))

    def prompt_tokens(self, problem, tokenizer):
        """auto: the chat format where the tokenizer has one, else plain."""
        self.chats, self.opens_thought = self.in_chat(tokenizer), False
        if self.chats:
            tokens = tokenizer.chat([dict(role="user", content=problem.prompt + self.ask)])
            self.opens_thought = tokenizer.decode(tokens[-16:]).rstrip().endswith("<think>")
            return tokens
        shown = [(p.prompt, self.demonstration(p) + "\n\n") for p in self.shots if p.key != problem.key]
        shown.append((problem.prompt, ""))
        return tokenizer.prompt("".join(self.shot.format(q) + a for q, a in shown))


class Gsm8k(Jsonl):
    """Grade-school word problems (arXiv 2110.14168): {"question", "answer"}, the answer ending in a line "#### 18".

    The official test file stays the test split; val is the tenth of the training file that the hash gives it."""

    name = "gsm8k"
    max_new_tokens = 400

    def to_problem(self, row, where, question_field, answer_field):
        problem = to_problem(row, where, question_field, answer_field or "answer")
        if parse_number(canonical(problem.answer) or "") is None or "####" not in row[answer_field or "answer"]:
            raise UserError(f"{where}: the answer does not end in '#### NUMBER'; is this GSM8K? (other files: --task jsonl)")
        return problem


class Math(Jsonl):
    r"""Competition problems (arXiv 2103.03874): {"problem", "solution"} with \boxed{answer} in the solution; an "answer" beside
    it (MATH-500) is used as it stands."""

    name = "math"
    max_new_tokens = 1024
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
        choices = (solution, f"{solution}\n{last}".strip())
        return self.after_thought(next((t for t in choices if answers_equal(extract_answer(t), problem.answer)), last))
