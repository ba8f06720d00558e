"""tasks/: exact values against sampling, splits, step ends, errors of data files."""

import itertools
import json
import random
from statistics import fmean

import pytest

import pipeline
import train_rl
import train_sft
from infra import cli
from infra.cli import UserError
from open_weights.tokenizer import alphabet_tokenizer
from tasks import TASKS, answers_equal, extract_answer, files, get_task, symbolic, task_class
from tasks.base import line_ends, split_of
from tasks.countdown import Countdown, countdown_moves
from tasks.files import Jsonl
from tasks.grid import Grid
from tasks.planted import Planted, kmp_next

PLANTED, COUNTDOWN = Planted(0, planted=5), Countdown()


def problem_of(task, numbers, target):
    return next(p for s in task.by_split.values() for p in s if p.data == (numbers, target))


# ----------------------------------------------------------------------------------------------------
# Planted


@pytest.mark.parametrize("pattern", ["abcde", "aabaa", "abab", "aaaa", "abacab"])
def test_kmp_state_is_the_longest_border(pattern):
    for text in itertools.product("abc", repeat=6):
        k, text = 0, "".join(text)
        for i, c in enumerate(text):
            k = kmp_next(pattern, k, c)
            seen = text[: i + 1]
            assert k == max(j for j in range(len(pattern) + 1) if seen.endswith(pattern[:j]))
            if k == len(pattern):
                break


@pytest.mark.parametrize("strength", [5.0, 30.0])
def test_planted_value_is_the_mean_outcome_of_the_demonstrator(strength):
    p, n = PLANTED.all[0], 6000
    hits = fmean(PLANTED.grade(p, PLANTED.demonstration(p, strength, i)) for i in range(n))
    value = PLANTED.exact_value(p, "", strength)
    assert abs(hits - value) < 4 * (value * (1 - value) / n) ** 0.5 + 1e-4


def test_planted_value_equals_enumeration_on_a_small_world():
    task = Planted(1, prompts=1, letters=3, planted=2, length=4)
    p, total = task.all[0], 0.0
    for text in itertools.product(task.letters, repeat=4):
        chance, k, text = 1.0, 0, "".join(text)
        for c in text:
            done = k == 2
            chance *= 1 / 3 if done else (7.0 if c == p.answer[k] else 1.0) / 9.0
            k = k if done else kmp_next(p.answer, k, c)
        total += chance * task.grade(p, text)
    assert task.exact_value(p, "", 7.0) == pytest.approx(total, rel=1e-12)


def test_planted_of_the_flags_is_the_class_with_those_settings():
    """--task-args length= is the letters that are hidden, not those of a response."""
    assert vars(get_task("planted")) == vars(Planted(0))
    flags = train_rl.Config(seed=2, task_args=["prompts=3", "length=4"])
    assert vars(get_task(flags)) == vars(Planted(2, prompts=3, planted=4)) and get_task(flags).max_new_tokens == 12
    with pytest.raises(UserError, match="reads no files"):
        get_task(train_rl.Config(data=["x.jsonl"]))


def test_planted_value_along_a_response():
    p = PLANTED.all[1]
    other = next(c for c in PLANTED.letters if c not in p.answer)
    assert PLANTED.exact_value(p, p.answer[:4], 5) > PLANTED.exact_value(p, "", 5)
    assert PLANTED.exact_value(p, p.answer + other, 5) == 1.0
    assert PLANTED.exact_value(p, other * 8, 5) == 0.0  # 4 letters left, 5 needed
    assert PLANTED.exact_value(p, p.answer[:4] + "A", 5) == PLANTED.exact_value(p, other * 5, 5)
    assert PLANTED.grade(p, other * 8 + p.answer) == 0.0  # completed past the cut


def test_planted_prompts_repeat_and_depend_on_the_seed():
    assert [p.key for p in PLANTED.problems("val", 6, 3)] == ["A", "B", "C", "D", "A", "B"]
    assert PLANTED.all == Planted(0, planted=5).all != Planted(1, planted=5).all
    assert all(len(set(p.answer)) == 5 for p in PLANTED.all)
    assert PLANTED.step_ends([0, 5, 6, 7], 1, 4, PLANTED.tokenizer()) == [2, 3, 4]


# ----------------------------------------------------------------------------------------------------
# Countdown


def enumerate_policy(task, state, target, strength):
    """Success chance by walking the whole tree, with reachability by brute force: no cache, no sorting."""
    if len(state) == 1:
        return float(state[0] == target)
    after = list(countdown_moves(state, task.ops, task.cap).values())
    good = [s for s in after if reachable(task, s, target)] or after
    walk = {s: enumerate_policy(task, s, target, strength) for s in after}
    return (1 - strength) * fmean(walk[s] for s in after) + strength * fmean(walk[s] for s in good)


def reachable(task, state, target):
    if len(state) == 1:
        return state[0] == target
    return any(reachable(task, s, target) for s in countdown_moves(state, task.ops, task.cap).values())


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task", [COUNTDOWN, Countdown(numbers=4, largest=3, cap=9)])
def test_countdown_value_equals_enumeration(task, strength):
    for p in task.problems("train", 12, 0):
        want = enumerate_policy(task, *p.data, strength)
        assert task.exact_value(p, "", strength) == pytest.approx(want, abs=1e-12)


def test_countdown_value_is_the_mean_outcome_of_the_demonstrator():
    problems, n = COUNTDOWN.problems("train", 20, 1), 150
    for strength in (0.3, 0.5):
        hits = fmean(
            COUNTDOWN.grade(p, COUNTDOWN.demonstration(p, strength, i)) for p in problems for i in range(n)
        )
        assert abs(hits - fmean(COUNTDOWN.exact_value(p, "", strength) for p in problems)) < 0.04
    assert all(COUNTDOWN.grade(p, COUNTDOWN.demonstration(p, 1.0, 0)) == 1.0 for p in problems)


def test_countdown_value_is_a_martingale_over_tokens():
    """The value before a token is the demonstrator's mean of the values after it, within lines as well."""
    p = problem_of(COUNTDOWN, (3, 3, 5), 12)
    demos = [COUNTDOWN.demonstration(p, 0.3, i) for i in range(4000)]
    for cut in ("", "5 ", "5 * ", "5 * 3 = "):
        here = [d for d in demos if d.startswith(cut)]
        hits = fmean(COUNTDOWN.grade(p, d) for d in here)
        assert abs(hits - COUNTDOWN.exact_value(p, cut, 0.3)) < 3.5 * (0.25 / len(here)) ** 0.5


def test_countdown_legality_grade_and_values():
    p = problem_of(COUNTDOWN, (3, 7, 2), 12)
    right = "7 + 3 = 10 | 2 \n10 + 2 = 12 \n"
    assert COUNTDOWN.grade(p, right) == 1.0 and COUNTDOWN.first_illegal_step(p, right) is None
    assert COUNTDOWN.grade(p, right.rstrip()) == 1.0
    cases = {
        "7 + 3 = 11 | 2 \n11 + 2 = 13 \n": 0,
        "7 + 3 = 10 | 2 \n10 + 2 = 12 \n12 - 0 = 12 \n": 2,
        "7 + 3 = 10 | 3 \n10 + 2 = 12 \n": 0,
        "7 + 3 = 10 | 2 \n10 + 3 = 12 \n": 1,
        "12 \n": 0,
        "\n" + right: 0,
        "7 + 3 = 10 | 2 \n10 + 2 =": 1,
        "9" * 10**6: 0,
        "7 + 3 = 1০ | 2 \n": 0,
        "9**9**9**9\n": 0,
        right + "x": 2,
    }
    for text, step in cases.items():
        assert COUNTDOWN.grade(p, text) == 0.0 and COUNTDOWN.first_illegal_step(p, text) == step, text[:40]
    assert COUNTDOWN.grade(p, "") == COUNTDOWN.grade(p, "7 + 3 = 10 | 2 \n") == 0.0
    assert COUNTDOWN.exact_value(p, right, 0.3) == 1.0 and COUNTDOWN.exact_value(p, "7 + 3 = 11", 0.3) == 0.0
    assert COUNTDOWN.exact_value(p, "7 + 3 = 10 | 2 \n10 - 2 = 8 \n", 0.3) == 0.0
    assert COUNTDOWN.solvable(p, "7 + 3 = 10 | 2 \n") and not COUNTDOWN.solvable(p, "7 - 2 = 5 | 3 \n5 - ")
    assert COUNTDOWN.solvable(p, "7 + 3 = 10 | 2 \n10 ") and not COUNTDOWN.solvable(p, "3 + 7")


def test_countdown_tokens_and_step_ends():
    tok, p = COUNTDOWN.tokenizer(), problem_of(COUNTDOWN, (12, 1, 12), 24)
    prompt, done = COUNTDOWN.prompt_tokens(p, tok), COUNTDOWN.demonstration(p, 0.3, 1)
    ids, eos, n = tok.encode(done), list(tok.eos_ids), len(prompt)
    assert tok.decode(prompt) == p.prompt and tok.decode(ids) == done
    assert len(ids) + 1 == COUNTDOWN.max_new_tokens == 15
    ends = lambda t: COUNTDOWN.step_ends(prompt + t, n, n + len(t), tok)  # noqa: E731
    assert ends(ids + eos) == [n + 8, n + 14, n + 15] and ends(ids) == [n + 8, n + 14]
    credit = lambda t: COUNTDOWN.credit_ends(prompt + t, n, n + len(t), tok)  # noqa: E731
    assert credit(ids + eos) == [n + 8, n + 15] and credit(ids) == ends(ids)
    assert credit(eos) == [n + 1] and credit(ids[:10] + eos) == [n + 8, n + 11]
    assert ends([]) == [] and ends(eos) == [n + 1] and ends(ids[:10]) == [n + 8, n + 10]


# ----------------------------------------------------------------------------------------------------
# Splits


def test_splits_are_stable_disjoint_and_seeded():
    assert {k: split_of(k) for k in SPLITS} == SPLITS
    sets = {s: {p.key for p in COUNTDOWN.problems(s)} for s in ("train", "val", "test")}
    assert not (sets["train"] & sets["val"] or sets["train"] & sets["test"] or sets["val"] & sets["test"])
    assert 0.7 < len(sets["train"]) / sum(map(len, sets.values())) < 0.9
    assert (
        COUNTDOWN.problems("val", 9, 1)
        == Countdown().problems("val", 9, 1)
        != COUNTDOWN.problems("val", 9, 2)
    )
    with pytest.raises(UserError, match="train, val or test"):
        COUNTDOWN.problems("dev")


SPLITS = {
    "1 2 3 : 6": "train",
    "6": "test",
    "11": "val",
    "21": "val",
    "What is 2 + 2?": "train",
    "é": "train",
}


# ----------------------------------------------------------------------------------------------------
# Jsonl: steps


class Pieces:
    """A tokenizer whose tokens are the given byte strings; the last id is EOS."""

    def __init__(self, *pieces):
        self.pieces, self.eos_ids = [p.encode() for p in pieces] + [b""], (len(pieces),)

    def token_bytes(self, i):
        return self.pieces[i]


@pytest.mark.parametrize(
    "pieces, eos, ends",
    [
        (["a", "\n", "b", "\n"], True, [2, 4, 5]),
        (["a", "\n", "b"], False, [2, 3]),
        (["a", "\n\n", "b", "\n", "\n"], True, [2, 4, 6]),
        (["a", "\n", "\n", "b"], False, [2, 4]),  # the blank line opens the next step
        (["\n", "a", "\n", "b"], False, [3, 4]),
        (["\n a", "b", "\n", "c"], False, [3, 4]),
        (["x", ".\n", "y", " is 3.5.", "\n"], True, [2, 5, 6]),
        (["a\nb"], True, [1, 2]),
        (["a\nb", "c\n"], False, [1, 2]),
        (["One.", " Two!", " Three"], False, [3]),
        ([" ", "\n"], True, [3]),
        ([], True, [1]),
        ([], False, []),
    ],
)
def test_text_steps(tmp_path, pieces, eos, ends):
    task = Jsonl([write(tmp_path, ROWS)])
    tokens = [0, 0, *range(len(pieces) + eos)]
    assert task.step_ends(tokens + [0] * 3, 2, len(tokens), Pieces(*pieces)) == [e + 2 for e in ends]


def test_a_step_end_never_moves_while_the_text_grows():
    """What a search cuts at when the newline is drawn is a step end of every text that goes on from there."""
    rng, words = random.Random(0), ["a", "b ", " 3.", "\n", "\n\n", ".\n", " ", "\nc", "d\ne"]
    for _ in range(300):
        pieces = rng.choices(words, k=12)
        cuts = []
        for n in range(1, len(pieces) + 1):
            ends = line_ends(list(range(n)), 0, n, Pieces(*pieces))
            assert ends == sorted(set(ends)) and ends[-1] == n
            assert set(cuts) | {n} >= set(ends), pieces  # nothing is found later, looking back
            since = "".join(pieces[max([0, *cuts]) : n])
            if "\n" in pieces[n - 1] and "\n" in since.lstrip():
                cuts.append(n)
            assert set(cuts) <= set(ends), pieces


# ----------------------------------------------------------------------------------------------------
# Jsonl: files


ROWS = [
    dict(question=f"q{i}?", answer=f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}") for i in range(60)
]


def write(folder, rows, name="d.jsonl"):
    path = folder / name
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return str(path)


def test_jsonl_problems_demonstrations_grades(tmp_path):
    task = get_task("jsonl", data=[write(tmp_path, ROWS + ROWS[:5])])
    every = [p for s in ("train", "val", "test") for p in task.problems(s)]
    assert len(every) == 60 and all(
        split_of(p.key) == s for s in ("train", "val", "test") for p in task.problems(s)
    )
    p = next(p for p in every if p.prompt == "q6?")
    assert p.answer == "7" and task.demonstration(p) == "6 + 1 = 7\n#### 7"
    assert all(task.grade(p, task.demonstration(p)) == 1.0 for p in every)
    assert task.grade(p, "#### 8") == task.grade(p, "") == task.grade(p, "7") == 0.0
    assert task.grade(p, "#### 7\n\nQuestion: more?\nAnswer:\n#### 9") == 1.0
    assert (
        task.exact_value(p, "", 1.0) is None
        and task.first_illegal_step(p, "x") is None
        and task.tokenizer() is None
    )


@pytest.mark.parametrize(
    "row, answer, demo",
    [
        (dict(problem="a", target=43.0), "43", "The answer is 43."),
        (dict(input="b", answer="x is", solution="So \\boxed{5}."), "x is", "So \\boxed{5}.\n#### x is"),
        (dict(problem="c", solution="Thus \\boxed{\\frac12}."), r"\frac12", "Thus \\boxed{\\frac12}."),
        (dict(prompt="d", answer=0.1), "0.1", "The answer is 0.1."),
        (dict(prompt="e", answer="a. b"), "a. b", "a. b\n#### a. b"),
    ],
)
def test_jsonl_answers(tmp_path, row, answer, demo):
    task = Jsonl([f"train={write(tmp_path, [row])}"])
    p = next(p for s in task.by_split.values() for p in s)
    assert (p.answer, task.demonstration(p)) == (answer, demo) and task.grade(p, demo) == 1.0


def test_jsonl_named_splits_never_share_a_question(tmp_path):
    train, test = write(tmp_path, ROWS), write(tmp_path, ROWS[:10], "t.jsonl")
    task = Jsonl([f"train={train}", f"test={test}"])
    sets = {s: {p.key for p in task.problems(s)} for s in ("train", "val", "test")}
    assert len(sets["test"]) == 10 and sum(map(len, sets.values())) == len(set.union(*sets.values())) == 60
    assert all(split_of(k) == "val" for k in sets["val"])


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], {}, "empty"),
        ([ROWS[0], "{oops"], {}, "line 2"),
        ([ROWS[0], "", "[1]"], {}, "line 3"),
        (["[" * 10**5], {}, "line 1"),
        (['{"question": "q", "answer": NaN}'], {}, "line 1"),
        ([dict(q="a", a="b")], {}, "fields: q, a"),
        ([dict(question="a", answer=None)], {}, "line 1.*'answer'"),
        ([dict(question="a", answer=["7"])], {}, "text or a number"),
        ([dict(question="", answer="7")], {}, "'question'"),
        ([ROWS[0]], dict(answer_field="gold"), "'gold'.*fields: question, answer"),
        ([ROWS[0]], dict(template="jinja"), "template"),
    ],
)
def test_jsonl_errors_are_one_line(tmp_path, rows, options, message):
    with pytest.raises(UserError, match=message) as e:
        Jsonl([write(tmp_path, rows)], **options)
    assert "\n" not in str(e.value)


def test_jsonl_file_and_split_errors(tmp_path):
    path = write(tmp_path, ROWS[:1])
    (tmp_path / "latin").write_bytes(b"\xff\xfe\x00")
    empty = next(s for s in ("val", "test") if s != split_of("q0?"))
    for make, message in [
        (lambda: Jsonl([]), "--data"),
        (lambda: Jsonl([str(tmp_path / "no")]), "cannot read"),
        (lambda: Jsonl([str(tmp_path)]), "cannot read"),
        (lambda: Jsonl([str(tmp_path / "latin")]), "UTF-8"),
        (lambda: Jsonl([path]).problems(empty), "no problem is left"),
        (lambda: Jsonl([f"test={path}", path]), "mixes"),
        (lambda: get_task("chess"), "unknown"),
    ]:
        with pytest.raises(UserError, match=message):
            make()


def test_jsonl_prompts(tmp_path):
    path = write(tmp_path, ROWS)
    plain = alphabet_tokenizer(
        sorted({c for r in ROWS for c in r["question"] + r["answer"]} | set("QuestionAswr:\n "))
    )
    task = Jsonl([path], shots=2)
    p = task.problems("val")[0]
    text = plain.decode(task.prompt_tokens(p, plain))
    assert text.count("Question: ") == 3 and text.endswith(f"Question: {p.prompt}\nAnswer:\n")

    class Chat:
        chat_format = "chatml"

        opens = ""

        def chat(self, messages):
            return [messages[0]["content"], self.opens]

        def decode(self, tokens):
            return "".join(tokens)

    task, tokenizer = Jsonl([path]), Chat()
    assert task.prompt_tokens(p, tokenizer)[0].startswith(p.prompt + "\n")
    right, unfinished = f"It is.\n</think>\n\\boxed{{{p.answer}}}", f"Is it \\boxed{{{p.answer}}}? Let me see"
    assert task.grade(p, right) == task.grade(p, unfinished) == 1.0
    tokenizer.opens = "<think>\n"  # the prompt ends inside a thought, so a completion begins there
    task.prompt_tokens(p, tokenizer)
    assert task.grade(p, right) == 1.0 and task.grade(p, unfinished) == task.grade_leniently(p, unfinished) == 0.0
    assert task.answer(p, unfinished) is None and task.answer(p, right) == p.answer
    assert all(answers_equal(extract_answer(task.demonstration(q)), q.answer) for q in task.by_split["train"])
    assert all(task.grade(q, task.demonstration(q)) == 1.0 for q in task.by_split["train"])  # the thought is closed
    tokenizer.opens, tokenizer.eos_ids = "", (0,)
    assert task.stop_ids(tokenizer) == [0] and task.grade(p, unfinished) == 1.0  # asked of this tokenizer's prompts


@pytest.mark.parametrize("kind, text, grade", [
    ("jsonl", "I read it again.\nQuestions of this kind need a sum.\n#### 23", 1),
    ("jsonl", "Question by question:\nQuestion one asks for a sum.\n#### 23", 1),
    ("jsonl", "So.\nQuestion: What is 20 + 3?\nAnswer:\n#### 23", 1),  # ours, repeated
    ("jsonl", "#### 23\n\nQuestion: What is 4 + 5?\nAnswer:\n#### 9", 1),
    ("jsonl", "#### 23\n\nQuestion: Write 9 as \\boxed{9}. Wh", 1),
    ("jsonl", "No idea.\n\nQuestion: What is 22 + 1?\nAnswer:\n#### 23", 0),  # answers another question
    ("jsonl", "Let me ask.\nQuestion: which sum is it? 20 + 3.\n#### 23", 1),
    ("math", "Problems like this are sums.\nProblem solved: \\boxed{23}", 1),
    ("math", "\\boxed{23}\n\nProblem: What is 4 + 5?\nSolution:\n\\boxed{9}", 1),
    ("math", "Problem: hard.\nProblem: is it 23? Yes.\n\\boxed{23}", 1),
])
def test_a_question_of_its_own_ends_the_answer(tmp_path, kind, text, grade):
    row = dict(question="What is 20 + 3?", answer="23", solution="\\boxed{23}")
    task = get_task(kind, 0, ["test=" + write(tmp_path, [row])])
    assert task.grade(task.problems("test")[0], text) == grade


def test_one_question_with_two_answers_is_warned_about(tmp_path, capsys):
    rows = [dict(question="how many?", answer=a) for a in ("4", "4.0", "\\boxed{4}")]
    task = get_task("jsonl", 0, ["test=" + write(tmp_path, rows)])
    assert capsys.readouterr().err == "" and len(task.problems("test")) == 1
    path = write(tmp_path, [*rows, dict(question=" how  many?", answer="6"), dict(question="how many?", answer="7")], "two.jsonl")
    assert [p.answer for p in get_task("jsonl", 0, ["test=" + path]).problems("test")] == ["4"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{path} line 1 says '4', {path} line 4 says '6'" in said and "like the second: 2" in said


def test_math_verify_grades_where_it_is_asked_to(tmp_path, monkeypatch):
    data = ["test=" + write(tmp_path, [dict(question="solve", answer="x > 3")])]
    monkeypatch.setattr(symbolic, "available", lambda: False)
    monkeypatch.setattr(files, "available", lambda: False)
    with pytest.raises(UserError, match="pip install math-verify"):
        get_task("jsonl", 0, data, grader="math-verify")
    monkeypatch.setattr(symbolic, "available", lambda: True)
    monkeypatch.setattr(files, "available", lambda: True)
    monkeypatch.setattr(symbolic._judge, "ask", lambda a, b: {a, b} == {"3<x", "x>3"})
    ours, task = get_task("jsonl", 0, data), get_task(train_sft.Config(task="jsonl", data=data, grader="math-verify"))
    p = task.problems("test")[0]
    assert (ours.grade(p, "#### 3 < x"), task.grade(p, "#### 3 < x"), task.grade(p, "#### x < 3")) == (0.0, 1.0, 0.0)


def test_get_task_takes_a_config_as_well():
    cfg = train_sft.Config(task="planted", seed=3)
    assert get_task(cfg).all == get_task("planted", 3).all
    cfg.task_args = ["prompts=6", "length=4"]
    assert [len(p.answer) for p in get_task(cfg).all] == [4] * 6
    assert isinstance(get_task("countdown"), Countdown)


# ----------------------------------------------------------------------------------------------------
# GSM8K and MATH


def gsm(n, start=0):
    return [dict(question=f"What is {i} + 1?", answer=f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1:,}")
            for i in range(start, n)]


def test_gsm8k_from_files_or_their_folder(tmp_path):
    write(tmp_path, gsm(2000), "train.jsonl")
    write(tmp_path, gsm(2050, 1990), "test.jsonl")
    write(tmp_path, ["not read"], "other.jsonl")
    task = get_task("gsm8k", data=[str(tmp_path)])
    sizes = {s: len(task.problems(s)) for s in ("train", "val", "test")}
    assert sizes["test"] == 60 and sizes["train"] + sizes["val"] == 1990 and 150 < sizes["val"] < 250
    assert all(split_of(p.key) == "val" for p in task.problems("val"))
    p = next(p for p in task.problems("test") if p.answer == "2050")
    assert task.demonstration(p) == "2049 + 1 = 2050\n#### 2,050" and task.grade(p, task.demonstration(p)) == 1.0
    assert task.grade(p, "#### 2,050 apples") == 1.0 and task.grade(p, "so it is 2050") == 0.0
    assert task.grade_leniently(p, "so it is 2050") == 1.0 and task.answer(p, "so it is 2050") is None
    files = get_task("gsm8k", data=[str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")])
    assert files.by_split == task.by_split
    only = get_task("gsm8k", data=[write(tmp_path, gsm(300), "sums.jsonl")])  # no split in the name: by the hash
    assert all(split_of(p.key) == s for s in ("train", "val", "test") for p in only.problems(s))


def test_worked_examples_come_from_train_only(tmp_path):
    write(tmp_path, gsm(80), "train.jsonl")
    write(tmp_path, gsm(90, 80), "test.jsonl")
    task = get_task("gsm8k", data=[str(tmp_path)], template="fewshot", shots=3)
    train = {p.key for p in task.problems("train")}
    plain = alphabet_tokenizer(sorted(set("Whatis 0123456789+=?#QuestionAnswer:\n,")))
    for p in [*task.problems("test"), *task.problems("val"), *task.problems("train")]:
        text = plain.decode(task.prompt_tokens(p, plain))
        shown = {q.split("\n")[0] for q in text.split("Question: ")[1:-1]}
        assert shown <= train - {p.key} and len(shown) >= 2 and text.endswith(f"Question: {p.prompt}\nAnswer:\n")
    assert get_task("gsm8k", data=[str(tmp_path)], template="fewshot").shots == task.problems("train", 4, 0)
    blank = Pieces("a", "\n\n", "b\n\nc", "Question")
    blank.n_vocab = 5
    assert task.stop_ids(blank) == [4, 1, 2, 3] and get_task("gsm8k", data=[str(tmp_path)]).stop_ids(blank) == [4]
    assert task.grade(p, f"#### {p.answer}\n\nQuestion") == 1.0
    assert task.grade(p, f"#### {p.answer}\n\nQuestion: and?\nAnswer:\n#### 0") == 1.0


def test_math_folder_and_list(tmp_path):
    for split, n in (("train", 30), ("test", 5)):
        (tmp_path / "MATH" / split / "algebra").mkdir(parents=True)
        for i in range(n):
            solution = f"So it is\n\n$x=\\boxed{{\\frac{{{i}}}{{2}}}}$."
            row = dict(problem=f"{split} {i}: solve $x={i}$.", level="Level 1", solution=solution)
            (tmp_path / "MATH" / split / "algebra" / f"{i}.json").write_text(json.dumps(row))
    task = get_task("math", data=[str(tmp_path / "MATH")])
    assert len(task.problems("test")) == 5 and len(task.problems("train")) + len(task.problems("val")) == 30
    p = task.problems("test")[0]
    assert task.grade(p, f"\\boxed{{{p.answer}}}") == 1.0 and task.demonstration(p) == p.data[0]
    rows = [dict(problem="a", answer="\\frac12", solution="s"), dict(problem="b", answer=7)]
    (tmp_path / "math500.json").write_text(json.dumps(rows))
    task = get_task("math", data=[str(tmp_path / "math500.json")])
    assert [p.answer for p in sorted(task.problems("test"), key=lambda p: p.key)] == ["\\frac12", "7"]
    assert all(task.grade(p, task.demonstration(p)) for p in task.problems("test"))


@pytest.mark.parametrize("name, file, rows, message", [
    ("gsm8k", "train.jsonl", [*gsm(3), "{oops"], "train.jsonl line 4 is not a JSON object"),
    ("gsm8k", "train.jsonl", [*gsm(2), dict(question="q", answer="7")], "line 3: the answer does not end in '#### NUMBER'"),
    ("gsm8k", "train.jsonl", [dict(question="q", answer="#### seven")], "#### NUMBER"),
    ("gsm8k", "train.jsonl", [dict(question="q", target="7")], "no field 'answer'"),
    ("math", "train.jsonl", [dict(problem="q", solution="it is 7")], "line 1: no .boxed"),
    ("math", "train.json", ["[1, 2]"], "item 1 is not a JSON object"),
    ("math", "train.json", ["[{}", ""], "not JSON"),
])
def test_rows_of_another_kind_are_named(tmp_path, name, file, rows, message):
    with pytest.raises(UserError, match=message) as e:
        get_task(name, data=[write(tmp_path, rows, file)])
    assert "\n" not in str(e.value)


def test_what_is_missing_is_said(tmp_path):
    train, test = write(tmp_path, gsm(60), "train.jsonl"), write(tmp_path, gsm(9), "test.jsonl")
    (tmp_path / "empty").mkdir()
    for make, message in [
        (lambda: get_task("gsm8k"), "--task gsm8k needs --data"),
        (lambda: get_task("gsm8k", data=[str(tmp_path / "none.jsonl")]), "cannot read .*none.jsonl"),
        (lambda: get_task("gsm8k", data=[str(tmp_path / "empty")]), "no .jsonl or .json file named after a split"),
        (lambda: get_task("gsm8k", data=[train]).problems("test"), "split 'test' .*train.*add --data test=FILE"),
        (lambda: get_task("gsm8k", data=[test]).problems("train"), "split 'train' .*9 test.*add --data train=FILE"),
        (lambda: get_task("gsm8k", data=[test], template="fewshot"), "4 worked examples .*training split"),
        (lambda: get_task("gsm8k", data=[train, write(tmp_path, gsm(9), "more.jsonl")]), "write the split of .*more.jsonl"),
    ]:
        with pytest.raises(UserError, match=message):
            make()


# ----------------------------------------------------------------------------------------------------
# Grid

GRID = Grid()


def grid_chance(cell, target, left, strength, size):
    """Success of the player by walking the whole tree: no cache, and reachability by trying every way."""
    row, column = cell
    if not left:
        return float(cell == target)
    cells = itertools.product(range(size), repeat=2)
    after = [(r, c) for r, c in cells if abs(r - row) + abs(c - column) == 1]
    good = [s for s in after if grid_chance(s, target, left - 1, 0.0, size) > 0] or after
    walk = {s: grid_chance(s, target, left - 1, strength, size) for s in after}
    return (1 - strength) * fmean(walk[s] for s in after) + strength * fmean(walk[s] for s in good)


@pytest.mark.parametrize("strength", [0.0, 0.2, 1.0])
def test_grid_value_equals_enumeration(strength):
    task = Grid(size=4, shortest=2, longest=4)
    for p in task.problems("train", 12, 0):
        (row, column, left), target = p.data
        want = grid_chance((row, column), target, left, strength, 4)
        assert task.exact_value(p, "", strength) == pytest.approx(want, abs=1e-12)


def test_grid_value_is_the_mean_outcome_of_the_player_within_lines_as_well():
    p = next(p for p in GRID.by_split["train"] if p.prompt == "7 5 :1 :4 \n")
    n = 4000
    demos = [GRID.demonstration(p, 0.6, i) for i in range(n)]
    for cut in ("", "6 ", "7 ", "7 4 \n", "6 5 \n5 "):
        here = [d for d in demos if d.startswith(cut)]
        hits, value = fmean(GRID.grade(p, d) for d in here), GRID.exact_value(p, cut, 0.6)
        assert abs(hits - value) < 4 * (value * (1 - value) / len(here)) ** 0.5 + 1e-3
    base = fmean(GRID.exact_value(p, "", 0.5) for p in GRID.problems("test"))
    assert 0.1 < base < 0.13


def test_grid_targets_of_test_are_never_trained_and_every_problem_has_its_distance():
    targets = {s: {p.data[1] for p in GRID.problems(s)} for s in ("train", "val", "test")}
    assert sum(map(len, targets.values())) == len(set.union(*targets.values())) == 100
    assert min(map(len, targets.values())) > 5
    for s in targets:
        for p in GRID.problems(s):
            (row, column, left), (r, c) = p.data
            assert left == abs(row - r) + abs(column - c) and 5 <= left <= 7


def test_grid_lines_that_are_illegal_and_lines_that_are_fatal():
    p = next(p for p in GRID.by_split["train"] if p.prompt == "7 5 :1 :4 \n")
    right = "6 5 \n5 5 \n4 5 \n3 5 \n2 5 \n1 5 \n1 4 \n"
    assert GRID.grade(p, right) == GRID.grade(p, right.rstrip()) == 1.0
    assert GRID.first_illegal_step(p, right) is None and GRID.exact_value(p, right, 0.2) == 1.0
    cases = {
        "6 4 \n": 0,  # two steps in one
        "7 5 \n": 0,  # none
        "\n" + right: 0,
        "6 5 \n6 5": 1,
        "6 5 \n5 5 \n4 5 \n3 5 \n2 5 \n1 5 \n1 4 \n1 3 \n": 7,  # beyond the distance
        "6 5 \n5 ": 1,
        "6 :5 \n": 0,
        "06 5 \n": 0,
        "٦ 5 \n": 0,
        "9" * 10**6: 0,
    }
    for text, step in cases.items():
        assert GRID.grade(p, text) == 0.0 and GRID.first_illegal_step(p, text) == step, text[:40]
    away = "8 5 \n"  # legal, and fatal: the distance was the limit
    assert GRID.first_illegal_step(p, away) is None and GRID.grade(p, away) == 0.0
    assert GRID.exact_value(p, away, 1.0) == 0.0 and not GRID.solvable(p, "8 ") and GRID.solvable(p, "7 ")
    edge = next(p for p in GRID.by_split["train"] if p.data[0][0] == 9)
    assert GRID.first_illegal_step(edge, f"10 {edge.data[0][1]} \n") == 0
    with pytest.raises(UserError, match="grid needs"):
        Grid(size=11)


# ----------------------------------------------------------------------------------------------------
# The contract, over all tasks


def data_of(name, folder):
    """--data for a task: a file of its kind, where it reads one."""
    if not task_class(name).needs_model:
        return []
    rows = dict(gsm8k=gsm(60), math=[dict(problem=f"{i}?", solution=f"So\n$\\boxed{{{i}}}$.") for i in range(60)])
    return [f"train={write(folder, rows.get(name, ROWS))}"]


def task_of(name, folder):
    data = data_of(name, folder)
    return get_task(name, data=data) if data else get_task(name)


class Letters:
    """A model's tokenizer for tasks from files: a character is a token."""

    eos_ids = (0x110000,)
    chat_format = None

    def encode(self, text):
        return [ord(c) for c in text]

    def prompt(self, text):
        return self.encode(text)

    def token_bytes(self, i):
        return b"" if i in self.eos_ids else chr(i).encode()

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i not in self.eos_ids)


@pytest.mark.parametrize("name", TASKS)
def test_the_strongest_demonstration_fits_and_is_right(name, tmp_path):
    """With EOS behind it, cut at max_new_tokens; its steps increase, end at its length, and stay as it grows."""
    task = task_of(name, tmp_path)
    tokenizer = task.tokenizer() or Letters()
    strength = max(task.strengths.values()) if task.strengths else None
    strength = 1e9 if strength and strength > 1 else strength  # planted's are odds: one that never errs
    for i, problem in enumerate(task.problems("train", 40, 0)):
        prompt = list(task.prompt_tokens(problem, tokenizer))
        text = tokenizer.encode(task.demonstration(problem, strength, i))
        whole = text + [tokenizer.eos_ids[0]] * task.ends_with_eos
        assert text and len(whole) <= task.max_new_tokens
        assert task.grade(problem, tokenizer.decode(whole[: task.max_new_tokens])) == 1.0
        n, seen = len(prompt), set()
        assert task.step_ends(prompt, n, n, tokenizer) == task.credit_ends(prompt, n, n, tokenizer) == []
        for length in range(n + 1, n + len(whole) + 1):
            ends = task.step_ends(prompt + whole, n, length, tokenizer)
            credit = task.credit_ends(prompt + whole, n, length, tokenizer)
            assert ends == sorted(set(ends)) and ends[0] > n and ends[-1] == credit[-1] == length
            assert set(credit) <= set(ends) and len(ends) - len(credit) <= 1
            assert set(ends[:-1]) <= seen  # an end is known when its token is drawn
            seen |= set(ends)
        assert len(ends) > 1 or task.needs_model  # a file may hold solutions of one line


@pytest.mark.parametrize("name", TASKS)
def test_every_optional_method_has_an_answer(name, tmp_path):
    task = task_of(name, tmp_path)
    problem = task.problems("train", 1, 0)[0]
    tokenizer = task.tokenizer() or Letters()
    tokenizer.n_vocab = 128 if task.needs_model else tokenizer.n_vocab
    text = task.demonstration(problem, max(task.strengths.values()) if task.strengths else None, 0)
    assert set(tokenizer.eos_ids) <= set(task.stop_ids(tokenizer))
    assert task.final_answer(problem, text) and task.grade_leniently(problem, text) == 1.0
    for value in (task.exact_value(problem, text, 1.0), task.value_now(problem, text)):
        assert value is None or value == 1.0
    assert task.similar(problem, 0) is None or split_of(task.similar(problem, 0).key) == "train"
    assert isinstance(task.termination, str) and task.answer_tokens > 0 and task.stages["long"] > 0


@pytest.mark.parametrize("name", TASKS)
def test_the_settings_beside_a_task_are_flags_of_the_stages_scripts(name, tmp_path):
    """So that a new task is one file and one line: the contract's settings do for it."""
    data = data_of(name, tmp_path)
    config = pipeline.with_flags(train_rl.Config)
    cfg = config(reward="pav", task=name, data=data, model="M" if data else "")
    _, jobs = pipeline.plan(cfg, {"": (["train_rl.py"], train_rl.Config)}, set())
    stages = {job.label.split("/")[1] for job in jobs}
    scripted = task_class(name).strengths is not None
    another = scripted and task_class(name).stages["verifier"].get("prover") != "base"
    assert stages == {"sft", "verifier", "rl_pav", "rl_outcome"} | ({"prover"} if another else set())
    verifier = next(job.config for job in jobs if job.label.endswith("/verifier"))
    assert scripted or verifier.prover_k == 4  # the base policy is no prover of itself
    for job in jobs:
        assert cli.parse(type(job.config), job.command()[len(job.script) :]) == job.config


def test_the_task_may_stay_while_the_runs_seed_changes():
    one = train_sft.Config(task="planted", seed=1)
    other = train_sft.Config(task="planted", seed=2, task_seed=1)
    assert get_task(one).all == get_task(other).all != get_task(train_sft.Config(task="planted", seed=2)).all
    same = [get_task(train_sft.Config(task="contextual", seed=s, task_seed=7)).g for s in (0, 1)]
    assert same[0] == same[1] == get_task("contextual", 7).g
