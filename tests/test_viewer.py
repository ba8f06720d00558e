"""Solutions as rows, in the terminal and on the page: model text can do harm in neither."""

from html.parser import HTMLParser

import pytest
import torch
from toy import EOS, ToyTask, tiny_model

from model import save_model
from report import charts, solutions, webpage
from report import show as viewer
from rollouts import Rollouts, step_ends
from tasks import get_task
from verifier import Verifier, save_verifier

ROW = dict(prompt="A", steps=["ab", "c"], values=[0.25, 0.75, 0.5], reward=1.0, finish_reason="stop")
HOSTILE = dict(prompt="<b>", steps=["</span><script>alert(1)</script>", "\x1b[2J\u202e\" onload='x'"], values=[0.1, 0.9, 0.0],
               reward=0.0, finish_reason="length")


def test_rows_are_cut_at_the_steps_and_carry_their_values():
    task, tokenizer = ToyTask(), ToyTask().tokenizer()
    tokens = torch.tensor([[3, 7, 10, 1, 2, 7, EOS], [0, 9, 10, 9, EOS, 0, 0]])
    out = Rollouts(tokens, torch.tensor([3, 3]), torch.tensor([7, 5]), torch.zeros(2, 7), ["stop", "stop"])
    ends = step_ends(task, out, tokenizer)  # two tokens a step
    values = torch.tensor([[0.5, 0.25, 1.0], [0.125, 0.75, 0.75]])
    rows = solutions.solution_rows(task.problems("train", 2, 0), out, ends, values, [1.0, 0.0], tokenizer)
    assert rows[0]["steps"] == ["12", "7"] and rows[0]["values"] == [0.5, 0.25, 1.0]
    assert rows[1]["steps"] == ["9"] and rows[1]["values"] == [0.125, 0.75]  # the padding step is no step
    assert solutions.progress_of(rows[0]) == [-0.25, 0.75] and [r["reward"] for r in rows] == [1.0, 0.0]


def test_written_solutions_are_distinct_and_few(tmp_path, monkeypatch):
    monkeypatch.setattr(solutions, "WRITTEN", 2)
    task, tokenizer = ToyTask(), ToyTask().tokenizer()
    tokens = torch.tensor([[3, 7, 10, 7]] * 3 + [[3, 7, 10, 8], [3, 7, 10, 9]])
    out = Rollouts(tokens, torch.full((5,), 3), torch.full((5,), 4), torch.zeros(5, 4), ["length"] * 5)
    ends = step_ends(task, out, tokenizer)
    solutions.write_solutions(tmp_path / "s.jsonl", tokenizer, task.problems("train", 1, 0) * 5, out, [1, 1, 1, 0, 0],
                          torch.rand(5, 2), ends)
    rows = solutions.read_rows(tmp_path / "s.jsonl")
    assert [r["steps"] for r in rows] == [["7"], ["8"]] and [r["reward"] for r in rows] == [1.0, 0.0]


@pytest.mark.parametrize("a, left, right", [(0.0, 0, 0), (1.0, 0, 10), (-1.0, 10, 0), (0.5, 0, 5), (-0.3, 3, 0), (7.0, 0, 10)])
def test_bar_length_is_the_progress(a, left, right):
    sides = viewer.bar(a)
    assert [len(s) for s in sides] == [10, 10] and [s.count("\u2588") for s in sides] == [left, right]


def test_terminal_lines_are_plain_without_colour_and_hold_no_control_characters():
    lines = list(viewer.show_row(HOSTILE, colour=False))
    assert not any("\x1b" in x or "\u202e" in x for x in lines) and all(x.isprintable() for x in lines)
    assert "+0.80" in lines[3] and "0.90" in lines[3] and "[wrong]" in lines[0]
    coloured = list(viewer.show_row(HOSTILE, colour=True))
    assert viewer.GAIN in coloured[3] and viewer.LOSS in coloured[4] and "\x1b[2J" not in "".join(coloured)


@pytest.mark.parametrize("tty, env, expected", [(True, {}, True), (True, {"NO_COLOR": "1"}, False), (False, {}, False),
                                                 (True, {"NO_COLOR": ""}, True), (True, {"TERM": "dumb"}, False)])
def test_colour_only_where_it_is_wanted(monkeypatch, tty, env, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    assert viewer.wants_colour(type("Stream", (), dict(isatty=lambda self: tty))()) is expected


def test_show_prints_every_step_of_the_planted_task(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = get_task("planted").tokenizer()
    save_model(tmp_path / "policy", tiny_model(vocab=tokenizer.n_vocab), tokenizer)
    (tmp_path / "verifier").mkdir()
    save_verifier(tmp_path / "verifier", Verifier(tiny_model(vocab=tokenizer.n_vocab), fingerprint=tokenizer.fingerprint),
                  tokenizer, {})
    argv = ["--model", str(tmp_path / "policy"), "--task", "planted", "--num-problems", "2", "--device", "cpu"]
    viewer.main([*argv, "--verifier", str(tmp_path / "verifier"), "--out", "rows.jsonl"])
    out = capsys.readouterr().out
    steps = sum(len(r["steps"]) for r in solutions.read_rows("rows.jsonl"))
    assert out.count("(prompt alone)") == 2 and "\x1b" not in out
    assert steps > 2 and out.count(" 0.50  ") == steps + 2  # an untrained head says 0.50 everywhere
    with pytest.raises(viewer.UserError, match="--verifier"):
        viewer.main(argv)
    with pytest.raises(viewer.UserError, match="nothing to show"):
        viewer.main(["--verifier", "x"])


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [k for k, _ in attrs]

    def handle_data(self, data):
        self.text += data


def test_a_hostile_completion_stays_text_in_the_page():
    parser = Tags()
    parser.feed(webpage.browser([HOSTILE, ROW], "<i>title"))
    assert "script" not in parser.tags and "b" not in parser.tags and "i" not in parser.tags
    assert not [a for a in parser.attributes if a.startswith("on")]
    assert "</span><script>alert(1)</script>" in parser.text


def test_shade_tells_gain_from_loss_and_grows():
    alpha = lambda a: float(webpage.shade(a).rsplit(",", 1)[1].rstrip(")"))  # noqa: E731
    assert webpage.shade(0.5).startswith("background:rgba(0,114,178") and webpage.shade(-0.5).startswith("background:rgba(230")
    assert alpha(0) == 0 < alpha(0.1) < alpha(0.5) <= alpha(-1) <= 0.75


def test_ticks_are_round_and_inside():
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(0, 307.2) == [0, 100, 200, 300]
    assert charts.ticks(0, 12) == [0, 5, 10] and charts.ticks(0, 0.03)[-1] == 0.03
