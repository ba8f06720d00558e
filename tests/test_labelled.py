"""Solutions with a label a step, from a file: read strictly, cut where RL cuts, fitted without a rollout."""

import json

import pytest
import torch
from toy import ToyTask, tiny_model

import pav
from infra.cli import UserError
from model import save_model
from open_weights.tokenizer import alphabet_tokenizer
from report.judge import judge_labels
from rollouts import labelled_solutions
from tasks import get_task
from tasks.files import plain_row, read_labelled
from verifier import Verifier, load_verifier, step_values


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


USER, ASSISTANT = dict(role="user", content="2+2?"), dict(role="assistant", content="It is 4.\n#### 4")
SYSTEM = dict(role="system", content="Be brief.")
ASKED = dict(question="2+2?", solution="It is 4.\n#### 4")


@pytest.mark.parametrize("row, want", [
    (dict(messages=[USER, ASSISTANT]), ASKED),
    (dict(prompt=[USER], completion=[ASSISTANT]), ASKED),
    (dict(prompt=[USER], completion=ASSISTANT["content"]), ASKED),
    (dict(prompt=[SYSTEM, USER], answer="4"), dict(question="Be brief.\n\n2+2?", answer="4")),
    (dict(prompt="2+2?", completion="4"), dict(prompt="2+2?", completion="4", solution="4")),
    (dict(question="2+2?", answer="4"), dict(question="2+2?", answer="4")),
])
def test_rows_of_chat_messages(row, want):
    assert plain_row(row, "f line 1") == want


@pytest.mark.parametrize("row, said", [
    (dict(messages=[USER, ASSISTANT, USER, ASSISTANT]), "2 questions and 2 answers"), (dict(messages=[SYSTEM]), "0 questions"),
    (dict(messages=["hi"]), "role"), (dict(prompt=[dict(role="tool", content="x")]), "role"),
    (dict(messages=[dict(role="user", content=None)]), "content as text"),
])
def test_conversations_that_are_no_problem_are_refused_by_line(row, said):
    with pytest.raises(UserError, match="f line 1") as e:
        plain_row(row, "f line 1")
    assert said in str(e.value)


def test_a_task_from_a_file_reads_all_of_them(tmp_path):
    rows = [dict(messages=[dict(USER, content=f"{i}+2?"), ASSISTANT]) for i in range(40)]
    rows += [dict(prompt=[dict(USER, content=f"{i}+3?")], completion=[ASSISTANT]) for i in range(40)]
    task = get_task("jsonl", data=[str(write(tmp_path / "f.jsonl", *rows))])
    problems = [p for split in ("train", "val", "test") for p in task.by_split[split]]
    assert len(problems) == 80 and {p.answer for p in problems} == {"4"}


ROW = dict(prompt="1=", completions=["2", "3"], labels=[True, 0.25])


def test_labelled_rows_are_read_strictly(tmp_path):
    path = write(tmp_path / "f.jsonl", ROW, ROW | dict(prompt=[USER], labels=[1, 0]))
    assert read_labelled(path) == [("1=", ["2", "3"], [1.0, 0.25]), ("2+2?", ["2", "3"], [1.0, 0.0])]
    for change, said in [(dict(labels=[True]), "one a step"), (dict(labels=[True, None]), "None"),
                         (dict(completions=[]), "list of steps"),
                         (dict(labels=[0.5, 1.5]), "1.5"), (dict(completions=["2", " "]), "list of steps"),
                         (dict(labels=[0.5, 1.5]), "1.5"), (dict(completions=["2", " "]), "list of steps"),
                         (dict(prompt=" "), "needs prompt"),
                         (dict(labels=[0, "yes"]), "yes"), (dict(completions="2"), "list of steps")]:
        path = write(tmp_path / "f.jsonl", ROW, ROW | change)
        with pytest.raises(UserError, match="line 2") as e:
            read_labelled(path)
        assert said in str(e.value)


class Lines(ToyTask):
    """Steps are lines."""

    step_ends, credit_ends = ToyTask.__mro__[1].step_ends, ToyTask.__mro__[1].credit_ends

    def tokenizer(self):
        return alphabet_tokenizer([*"0123456789=", "\n"])


def test_labels_stand_where_steps_end():
    task, tokenizer = Lines(), Lines().tokenizer()
    rows = [("1=", ["22", "3"], [1.0, 0.25]), ("1=", ["4"], [0.75]), ("1=", ["5" * 30], [1.0])]
    data = labelled_solutions(task, tokenizer, rows, context=20)  # the last one is too long
    with pytest.raises(UserError, match="no labelled solution fits"):
        labelled_solutions(task, tokenizer, rows, context=2)
    newline, eos = 11, 12
    assert data["tokens"].tolist() == [[1, 10, 2, 2, newline, 3, eos], [1, 10, 4, eos, 0, 0, 0]]
    assert data["ends"].tolist() == [[2, 5, 7], [2, 4, 4]]
    assert data["weight"].tolist() == [[1, 1, 1], [1, 1, 0]]
    start = (0.25 + 0.75 + 1) / 3
    torch.testing.assert_close(data["target"][:, 0], torch.full((2,), start))
    assert data["target"][:, 1:].tolist() == [[1.0, 0.25], [0.75, 0.75]]
    for row, ends in zip(data["tokens"].tolist(), data["ends"].tolist()):  # where RL reads values, EOS included
        assert task.credit_ends(row, ends[0], ends[-1], tokenizer) == sorted(set(ends[1:]))


def test_the_judgement_by_labels(monkeypatch):
    data = dict(tokens=torch.zeros(2, 9, dtype=torch.int64), ends=torch.tensor([[1, 3, 5], [1, 4, 4]]),
                target=torch.tensor([[0.5, 1.0, 0.0], [0.5, 1.0, 1.0]]), weight=torch.tensor([[1.0, 1, 1], [1, 1, 0]]))
    values = torch.tensor([[0.5, 0.9, 0.2], [0.5, 0.6, 0.6]])
    monkeypatch.setattr("report.judge.step_values", lambda *_: values)
    quality = judge_labels(None, data)
    assert quality["judged_steps"] == 3 and quality["auc"] == quality["auc_outcome"] == 1.0
    assert quality["brier"] == pytest.approx((0.1**2 + 0.2**2 + 0.4**2) / 3)
    assert quality["brier_constant"] == pytest.approx(2 / 9)


def test_a_verifier_from_labels_without_rollouts(tmp_path, monkeypatch, capsys):
    """A step is right here if it is an A."""
    monkeypatch.chdir(tmp_path)
    task = get_task("planted")
    tokenizer = task.tokenizer()
    save_model(tmp_path / "policy", tiny_model(vocab=tokenizer.n_vocab), tokenizer)
    letters = "ABCD"
    rows = []
    for i in range(256):
        steps = [letters[(i // 4**h + h) % 4] for h in range(4)]
        prompt = letters[i % 4] + letters[i // 4 % 4] + letters[i // 16 % 4]
        rows.append(dict(prompt=prompt, completions=steps, labels=[s == "A" for s in steps]))
    write(tmp_path / "rows.jsonl", *rows)
    argv = ["--policy", "policy", "--labels", "rows.jsonl", "--run-dir", "v", "--device", "cpu", "--threads", "1"]
    pav.main([*argv, "--epochs", "40", "--learning-rate", "1e-2", "--batch-size", "64"])
    summary = json.loads((tmp_path / "v/summary.json").read_text())
    assert summary["auc"] > 0.99 and summary["brier"] < 0.05 < summary["brier_constant"] and summary["sampled_tokens"] == 0
    assert not (tmp_path / "v/rollouts").exists()
    out = capsys.readouterr().out
    assert "train_rl.py --reward pav" in out and "search.py" not in out
    verifier = load_verifier(tmp_path / "v", tokenizer)
    assert isinstance(verifier, Verifier)
    ends = torch.tensor([[4], [4]])
    good, bad = step_values(verifier, torch.tensor([tokenizer.encode("ABDA"), tokenizer.encode("ABDC")]), ends)[:, 0].tolist()
    assert good > 0.8 > 0.2 > bad

    with pytest.raises(UserError, match="leave out --prover"):
        pav.main([*argv, "--prover-k", "4"])
    write(tmp_path / "few.jsonl", rows[0])
    with pytest.raises(UserError, match="too few prompts"):
        pav.main([*argv, "--labels", "few.jsonl", "--run-dir", "w"])
    with pytest.raises(UserError, match="--task jsonl --data"):
        pav.main([*argv, "--task", "countdown", "--run-dir", "x"])
