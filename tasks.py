"""Problems, demonstrations, step boundaries and grading: three tasks with one set of methods.

    python train_sft.py --task planted                                # find a hidden sequence: exploration
    python train_sft.py --task countdown                              # reach a number: has an exact solver
    python train_sft.py --task jsonl --data gsm8k.jsonl --model DIR   # questions and answers of your own

Splits: the first 8 bytes of sha256(key) modulo 10; 0-7 train, 8 val, 9 test. Python's own hash() is salted.
Completions are hostile text: they are matched and compared, never evaluated (`9**9**9**9` is just a string).
Left out: units, sets, intervals and symbolic equality of answers. A strict reward misses a few right answers;
a lenient one is farmed.
"""

import functools
import hashlib
import itertools
import json
import random
import re
import string
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from answers import MAX_ANSWER, answers_equal, extract_answer, parse_number
from common import UserError


@dataclass(frozen=True)
class Problem:
    """key: stable id, what the split hash is made of. data: what the task itself needs to know."""

    key: str
    prompt: str
    answer: str
    data: tuple = ()


class Task:
    """What tasks share. Each also has
    strengths: {base, prover, strong} of the demonstrator (None: none), max_new_tokens, ends_with_eos,
        random_demonstrations (False: one solution per problem), step_tokens (0: a step ends with a newline)
    tokenizer() -> the tiny alphabet (None: the model brings its own)
    demonstration(problem, strength, seed) -> completion text without EOS
    grade(problem, completion) -> 0.0 or 1.0, from the text alone
    step_ends(tokens, prompt_len, length, tokenizer) -> exclusive ends of the steps: increasing positions in
        `tokens` (prompt and completion), the last is length; [] for an empty completion
    """

    step_tokens = 0

    def problems(self, split, n=None, seed=0):
        """At most n problems (None: all) of "train", "val" or "test", in an order fixed by seed."""
        if split not in self.by_split:
            raise UserError(f"split {split!r} is unknown; use train, val or test")
        found = list(self.by_split[split])
        if not found:
            raise UserError(f"no problem is left in split {split!r}; give more data, or --data {split}=FILE")
        random.Random(f"{split}/{seed}").shuffle(found)
        return found[:n]

    def prompt_tokens(self, problem, tokenizer):
        return tokenizer.encode(problem.prompt)

    def exact_value(self, problem, prefix, strength):
        """Chance that the demonstrator of that strength succeeds from this text; None without a solver.
        It goes on from any text and cannot see an EOS: at the end of a response the outcome is the value."""
        return None

    def first_illegal_step(self, problem, completion):
        """Index of the first step that breaks the rules; None if all keep them or there are none."""
        return None


def split_of(key):
    """-> "train" (80%), "val" (10%) or "test" (10%)."""
    bucket = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") % 10
    return "train" if bucket < 8 else ("val", "test")[bucket - 8]


# ----------------------------------------------------------------------------------------------------
# Planted sub-sequence (2410.08146, section 3.3): each prompt hides a sequence that a response must contain


@functools.lru_cache(maxsize=1 << 16)
def kmp_next(pattern, k, symbol):
    """Length of the longest prefix of pattern that ends pattern[:k] + symbol; k < len(pattern)."""
    tail = pattern[:k] + symbol
    while not pattern.startswith(tail):
        tail = tail[1:]
    return len(tail)


@functools.lru_cache(maxsize=256)
def planted_values(pattern, letters, length, strength):
    """Success of the gamma policy: table[letters left, 0..length][KMP state, 0..len(pattern)]."""
    table = [[0.0] * len(pattern) + [1.0]]
    for _ in range(length):
        row = [sum((strength if c == y else 1.0) * table[-1][kmp_next(pattern, k, c)] for c in letters)
               for k, y in enumerate(pattern)]
        table.append([v / (strength + len(letters) - 1) for v in row] + [1.0])
    return table


class Planted(Task):
    """Prompt "A" hides 6 of the letters a..n; reward 1 iff they occur in a row among the first 12 letters.

    A response is 12 letters and is cut by max_new_tokens: no EOS is trained, as when to stop is not
    what this teaches. A step is a token. The demonstrator of strength gamma gives the next hidden letter
    gamma times the weight of each other letter. train, val and test are the same prompts, repeated to any n:
    the task asks whether a policy finds what it was never shown, not whether it generalises.
    """

    strengths = dict(base=5.0, prover=16.0, strong=1000.0)
    ends_with_eos, random_demonstrations = False, True
    step_tokens = 1

    def __init__(self, seed=0, prompts=4, letters=14, planted=6, length=12):
        if not (1 <= prompts <= 26 and 1 <= planted <= letters <= 26 and planted <= length):
            raise UserError("planted needs 1-26 prompts and planted <= letters <= 26 and planted <= length")
        self.letters, self.max_new_tokens = string.ascii_lowercase[:letters], length
        self.all = []
        for name in string.ascii_uppercase[:prompts]:
            hidden = random.Random(f"planted/{seed}/{name}").sample(self.letters, planted)
            self.all.append(Problem(name, name, "".join(hidden)))
        self.by_split = dict(train=self.all, val=self.all, test=self.all)

    def tokenizer(self):
        from tokenizer import alphabet_tokenizer

        return alphabet_tokenizer([p.prompt for p in self.all] + list(self.letters))

    def problems(self, split, n=None, seed=0):
        once = sorted(super().problems(split), key=lambda p: p.key)
        return list(itertools.islice(itertools.cycle(once), len(once) if n is None else n))

    def demonstration(self, problem, strength, seed):
        rng, y, k, out = random.Random(f"{problem.key}/{seed}"), problem.answer, 0, []
        for _ in range(self.max_new_tokens):
            if k == len(y):  # found: the rest does not matter
                out.append(rng.choice(self.letters))
                continue
            follow = rng.random() * (strength + len(self.letters) - 1) < strength
            out.append(y[k] if follow else rng.choice(self.letters.replace(y[k], "")))
            k = kmp_next(y, k, out[-1])
        return "".join(out)

    def grade(self, problem, completion):
        return float(problem.answer in completion[: self.max_new_tokens])

    def step_ends(self, tokens, prompt_len, length, tokenizer):
        return list(range(prompt_len + 1, length + 1))

    def exact_value(self, problem, prefix, strength):
        k, prefix = 0, prefix[: self.max_new_tokens]
        for c in prefix:
            k = kmp_next(problem.answer, k, c)
            if k == len(problem.answer):
                return 1.0
        table = planted_values(problem.answer, self.letters, self.max_new_tokens, float(strength))
        return table[self.max_new_tokens - len(prefix)][k]


# ----------------------------------------------------------------------------------------------------
# Countdown: use all the numbers to reach the target, one operation a line


@functools.lru_cache(maxsize=1 << 17)
def countdown_moves(state, ops, cap):
    """state: tuple of numbers -> {line: next state}, one line for each pair of values and operation.

    The larger number stands first, results lie in 0..cap. As zero is allowed, any pair can be subtracted: no
    state is stuck. The number of moves depends on the multiset alone, not on the order of the list.
    """
    out = {}
    for x, y in itertools.combinations(state, 2):
        a, b, rest = max(x, y), min(x, y), list(state)
        rest.remove(a)
        rest.remove(b)
        tail = f" | {' '.join(map(str, rest))}" if rest else ""
        for op, c in (("+", a + b), ("-", a - b), ("*", a * b)):
            if op in ops and c <= cap:
                out[f"{a} {op} {b} = {c}{tail}"] = (c, *rest)
    return out


@functools.lru_cache(maxsize=1 << 17)
def countdown_values(state, ops, cap, strength):
    """state: sorted tuple -> [cap+1] float64, the demonstrator's chance to end at each target."""
    if len(state) == 1:
        return np.eye(cap + 1)[state[0]]
    moves = countdown_moves(state, ops, cap).values()
    v = np.array([countdown_values(tuple(sorted(s)), ops, cap, strength) for s in moves])  # [moves, cap+1]
    # A move keeps the target reachable iff its value is positive, whatever the strength in [0, 1].
    return (1 - strength) * v.mean(0) + strength * v.sum(0) / np.maximum((v > 0).sum(0), 1)


class Countdown(Task):
    """Prompt "3 12 7 :24 ", response "12 - 3 = 9 | 7 ", ...: a line takes two numbers, the larger first, and
    after the bar repeats those it leaves, in order: result and rest are the whole state. Success: every line
    legal, and the one number left is the target.

    The demonstrator of strength s plays, with chance s, a move from which the target can be reached (any of
    them alike), else any legal move; its failures are kept. Blanks belong to the token before them ("12 ")
    and the target has tokens of its own (":24 "), which a small model finds by content, not by position.
    Three numbers to 12 and values to 30, because it is what a 2-layer model of width 64 could both learn to
    write legally and improve at by RL; with four or five numbers it wrote legally, and RL did not move it.
    """

    strengths = dict(base=0.3, prover=0.5, strong=1.0)
    ends_with_eos, random_demonstrations = True, True

    def __init__(self, numbers=3, largest=12, cap=30, ops="+-*"):
        if not (2 <= numbers <= 5 and 1 <= largest <= cap <= 99 and "-" in ops and set(ops) <= set("+-*")):
            raise UserError("countdown needs 2-5 numbers, largest <= cap <= 99, and ops out of +-* with -")
        self.numbers, self.largest, self.cap, self.ops = numbers, largest, cap, ops
        # Each legal response has this length: 6 tokens a line, more for bar and rest, and EOS.
        self.max_new_tokens = sum(6 + (1 + rest if rest else 0) for rest in range(numbers - 1)) + 1

    def tokenizer(self):
        from tokenizer import alphabet_tokenizer

        targets = [f":{t}" for t in range(1, self.cap + 1)]
        words = [*map(str, range(self.cap + 1)), *self.ops, "=", "|", *targets]
        return alphabet_tokenizer([w + " " for w in words] + ["\n"])

    @functools.cached_property
    def by_split(self):
        """Every order of the numbers is a problem; all orders share a key, hence a split."""
        out = dict(train=[], val=[], test=[])
        for nums in itertools.combinations_with_replacement(range(1, self.largest + 1), self.numbers):
            orders = sorted(set(itertools.permutations(nums)))
            for t in range(1, self.cap + 1):
                if self._value(nums, t, 0) > 0:
                    key = f"{' '.join(map(str, nums))} : {t}"
                    out[split_of(key)] += [
                        Problem(key, f"{' '.join(map(str, o))} :{t} \n", str(t), (o, t)) for o in orders]
        return out

    def _moves(self, state):
        return countdown_moves(state, self.ops, self.cap)

    def _value(self, state, target, strength):
        return float(countdown_values(tuple(sorted(state)), self.ops, self.cap, float(strength))[target])

    def _walk(self, problem, text):
        """-> (state, number of legal lines, the text from the first other line on, or None)."""
        state, lines = problem.data[0], text.split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        for i, line in enumerate(lines):
            after = self._moves(state).get(line.rstrip(" "))
            if after is None:
                return state, i, "\n".join(lines[i:])
            state = after
        return state, len(lines), None

    def demonstration(self, problem, strength, seed):
        (state, target), rng, text = problem.data, random.Random(f"{problem.prompt}/{seed}"), ""
        while len(state) > 1:
            moves = self._moves(state)
            lines = list(moves)
            if rng.random() < strength:
                lines = [x for x in lines if self._value(moves[x], target, 0) > 0] or lines
            line = rng.choice(lines)
            text, state = f"{text}{line} \n", moves[line]
        return text

    def grade(self, problem, completion):
        state, _, rest = self._walk(problem, completion)
        return float(rest is None and state == (problem.data[1],))

    def step_ends(self, tokens, prompt_len, length, tokenizer):
        ends = [t + 1 for t in range(prompt_len, length) if b"\n" in tokenizer.token_bytes(tokens[t])]
        if ends and all(t in tokenizer.eos_ids for t in tokens[ends[-1] : length]):
            return [*ends[:-1], length]  # EOS alone after a newline belongs to the last step
        return ends + [length] * (length > prompt_len)

    def exact_value(self, problem, prefix, strength):
        """Also within a line: the demonstrator's moves that begin like it, by their chances. Illegal: 0."""
        state, _, rest = self._walk(problem, prefix)
        if rest is None:
            return self._value(state, problem.data[1], strength)
        begun = rest.rstrip(" ").split(" ")
        value = {x: self._value(s, problem.data[1], strength) for x, s in self._moves(state).items()}
        good = sum(v > 0 for v in value.values())
        if prefix.endswith("\n") or not good:
            return 0.0
        chance = {x: (1 - strength) / len(value) + strength * (v > 0) / good
                  for x, v in value.items() if x.split(" ")[: len(begun)] == begun}
        total = sum(chance.values())  # 0: no legal line begins so, or only losing ones that strength 1 avoids
        return sum(p * value[x] for x, p in chance.items()) / total if total else 0.0

    def solvable(self, problem, prefix):
        return self.exact_value(problem, prefix, 0) > 0

    def first_illegal_step(self, problem, completion):
        _, legal, rest = self._walk(problem, completion)
        return None if rest is None else legal


# ----------------------------------------------------------------------------------------------------
# Questions and answers from files

QUESTION_FIELDS = ("question", "problem", "input", "prompt")
ANSWER_FIELDS = ("answer", "target", "solution")
ASK = "\nWork line by line. End with a line that holds #### and the answer alone."


def read_rows(path):
    """-> [("FILE line N", dict)]; numbers stay text, so that 43.0 and 0.1 keep their exact value."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            lines = [(f"{path} line {i}", line) for i, line in enumerate(f, 1) if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it to JSON lines in UTF-8") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; check --data") from None
    rows = []
    for where, line in lines:
        try:  # int of "NaN" or "Infinity" is a ValueError, as it should be
            rows.append((where, json.loads(line, parse_float=str, parse_int=str, parse_constant=int)))
        except (ValueError, RecursionError):
            rows.append((where, None))
        if not isinstance(rows[-1][1], dict):
            raise UserError(f"{where} is not a JSON object; write one object a line")
    if not rows:
        raise UserError(f"{path} is empty; it needs one JSON object a line")
    return rows


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


def load_problems(data, question_field, answer_field):
    """Files -> {split: [Problem]}. "train=FILE" names a file's split; otherwise the question's hash decides.

    A question counts once, for test before val before train: no evaluation on what was trained. Where files
    are named and none is val, val is the tenth of train that the hash gives it.
    """
    named = [d.split("=", 1) if d.startswith(("train=", "val=", "test=")) else ["", d] for d in data]
    kinds = {split for split, _ in named}
    if not kinds:
        raise UserError("--task jsonl needs --data FILE (JSON lines)")
    if "" in kinds and len(kinds) > 1:
        raise UserError("--data mixes split=FILE with plain files; name the split of all of them or of none")
    out, seen = dict(train=[], val=[], test=[]), set()
    for split, path in sorted(named, key=lambda x: ("test", "val", "train", "").index(x[0])):
        for where, row in read_rows(path):
            problem = to_problem(row, where, question_field, answer_field)
            carve = split == "train" and "val" not in kinds and split_of(problem.key) == "val"
            if problem.key not in seen:
                out["val" if carve else split or split_of(problem.key)].append(problem)
            seen.add(problem.key)
    return out


def text_step_ends(tokens, prompt_len, length, tokenizer):
    """Steps are lines, or sentences where the completion is one line; a blank line belongs to the one before.

    A step ends with the token that holds its newline or full stop. A stop counts only before white space
    ("3.5" is whole), and not after a bare list number ("1. First"). "e.g. " does split: known, harmless.
    """
    raw = [b"" if t in tokenizer.eos_ids else tokenizer.token_bytes(t) for t in tokens[prompt_len:length]]
    upto = list(itertools.accumulate(map(len, raw)))  # bytes up to and with each token
    body = b"".join(raw).rstrip()
    marks = rb"\n(?:[ \t\r]*\n)*" if b"\n" in body.lstrip() else rb"[.!?][\"')\]]*(?=\s)"
    ends, last = [], 0
    for match in re.finditer(marks, body):
        step = body[last : match.end()].strip()
        if step and not re.fullmatch(rb"[0-9]+\.", step):
            last = match.end()
            end = bisect_left(upto, last) + 1
            ends += [end] if not ends or end > ends[-1] else []
    if ends and not b"".join(raw[ends[-1] :]).strip():
        ends.pop()  # only blanks or EOS remain: they go to the last step
    return [prompt_len + e for e in ends] + [length] * (length > prompt_len)


class Jsonl(Task):
    """Questions with answers, one JSON object a line.

    A demonstration is the file's solution, ended by a line "#### 7" if it does not show the answer itself;
    where only the answer is known it is "The answer is 7.". No solver, and no demonstrator with a strength.
    """

    strengths = None
    ends_with_eos, random_demonstrations = True, False

    def __init__(self, data, question_field="", answer_field="", seed=0, template="auto", shots=0,
                 max_new_tokens=512):
        if template not in ("auto", "chat", "plain") or (template == "chat" and shots):
            raise UserError("template is auto, chat or plain; worked examples (shots) need plain text")
        self.by_split = load_problems(data, question_field, answer_field)
        self.template, self.max_new_tokens = template, max_new_tokens
        self.shots = self.problems("train", shots, seed) if shots else []

    def tokenizer(self):
        return None

    def demonstration(self, problem, strength=None, seed=0):
        solution, last = problem.data[0], f"#### {problem.answer}"
        choices = [solution, f"{solution}\n{last}"] if solution else [f"The answer is {problem.answer}."]
        return next((text for text in choices if self.grade(problem, text)), last)

    def grade(self, problem, completion):
        # A base model goes on with a question of its own: what follows is no answer to ours.
        return float(answers_equal(extract_answer(completion.split("\nQuestion:")[0]), problem.answer))

    def step_ends(self, tokens, prompt_len, length, tokenizer):
        return text_step_ends(tokens, prompt_len, length, tokenizer)

    def prompt_tokens(self, problem, tokenizer):
        """Chat format where the tokenizer has one, unless shots or template="plain" ask for text."""
        chat = getattr(tokenizer, "chat_format", None) and not self.shots
        if self.template == "chat" or (self.template == "auto" and chat):
            return tokenizer.chat([dict(role="user", content=problem.prompt + ASK)])
        shown = [(p.prompt, self.demonstration(p) + "\n\n") for p in self.shots if p.key != problem.key]
        shown.append((problem.prompt, ""))
        return tokenizer.encode("".join(f"Question: {q}\nAnswer:\n{a}" for q, a in shown))


def get_task(name, seed=0, data=(), question_field="", answer_field="", **options):
    """Task by name; options go to its class. A script's config may stand in for the name, seed and fields."""
    if not isinstance(name, str):
        cfg, name = name, name.task
        seed, data, question_field, answer_field = cfg.seed, cfg.data, cfg.question_field, cfg.answer_field
        if name == "planted" and hasattr(cfg, "planted_prompts"):
            options = dict(prompts=cfg.planted_prompts, planted=cfg.planted_length) | options
        if name == "jsonl" and hasattr(cfg, "template"):
            options = dict(template=cfg.template) | options
    if name == "planted":
        return Planted(seed, **options)
    if name == "countdown":
        return Countdown(**options)
    if name == "jsonl":
        return Jsonl(data, question_field, answer_field, seed, **options)
    if name in ("chain", "stargraph"):
        import didactic

        return didactic.Chain(seed, **options) if name == "chain" else didactic.StarGraph(seed, **options)
    if name == "worded":
        from worded import Worded

        return Worded(**options)
    raise UserError(f"task {name!r} is unknown; use planted, countdown, chain, stargraph, worded or jsonl")
