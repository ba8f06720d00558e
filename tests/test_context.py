"""Questions that the model's context cannot hold are left out of training, labels and evaluation,
and counted."""

import json
import string

import pytest
from toy import tiny_model

import pav
import sample
import train_rl
from infra.cli import UserError
from model import save_model
from open_weights.tokenizer import alphabet_tokenizer
from report import evaluate
from tasks import get_task
from tasks.context import leave_out_long

SYMBOLS = sorted({*string.ascii_letters, *string.digits, *" .:?#+=\n"})
CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that reads letters, in a context of 64 tokens."""
    tokenizer = alphabet_tokenizer(SYMBOLS)
    folder = tmp_path_factory.mktemp("context") / "m"
    save_model(folder, tiny_model(vocab=tokenizer.n_vocab, context=CONTEXT), tokenizer)
    return folder


@pytest.fixture
def files(tmp_path):
    """Twelve problems a split, of which one (the sixth) is too long."""
    out = []
    for split in ("train", "val", "test"):
        rows = [dict(question=f"{split} {i}+1?", answer=f"it is\n#### {i + 1}") for i in range(12)]
        rows[5]["question"] = split + "x" * 200
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        out.append(f"{split}={path}")
    return out


def flags(**changes):
    return [f"--{k.replace('_', '-')}={v}" for k, v in changes.items()]


def test_the_longest_prompt_that_fits_stays(folder, files):
    task, tokenizer = get_task("jsonl", data=files, template="plain"), alphabet_tokenizer(SYMBOLS)
    lengths = [len(task.prompt_tokens(p, tokenizer)) for p in task.by_split["val"]]
    second = sorted(lengths)[-2]
    for context, left in ((max(lengths) + 1, 12), (max(lengths), 11), (second + 1, 11)):
        some = get_task("jsonl", data=files, template="plain")
        model = tiny_model(vocab=tokenizer.n_vocab, context=context)
        assert leave_out_long(some, tokenizer, model, "val", "val") == 12 - left
        problems = some.problems("val")
        assert len(problems) == left
        assert len(some.by_split["train"]) == 12  # which nobody asked about
        prompts = [some.prompt_tokens(p, tokenizer) for p in problems]
        sample.generate(model, prompts, max_new_tokens=1, temperature=1.0, seed=0, stop_ids=())


def test_none_left_is_refused(folder, files):
    tokenizer = alphabet_tokenizer(SYMBOLS)
    model = tiny_model(vocab=tokenizer.n_vocab, context=8)
    with pytest.raises(UserError, match="^12 of 12 train problems .* context of 8 tokens"):
        leave_out_long(get_task("jsonl", data=files), tokenizer, model, "train", "val")


ARGS = dict(task="jsonl", task_args="template=plain", device="cpu", threads=1)


def test_rl_runs_through_a_whole_epoch(folder, files, tmp_path, capsys):
    summary = train_rl.main(["--data", *files, *flags(
        **ARGS, reward="outcome", policy=folder, run_dir=tmp_path / "run", num_prompts=2,
        num_generations=2, steps=7, eval_problems=12, eval_steps=7, save_steps=7,
        max_completion_length=4)])
    assert summary["episodes"] == 28
    err = capsys.readouterr().err
    assert err.count("warning: 1 of 12 train problems have prompts") == 1
    assert err.count("warning: 1 of 12 val problems have prompts") == 1


def test_labels_are_made_of_the_others(folder, files, tmp_path, capsys):
    pav.main(["--data", *files, *flags(
        **ARGS, policy=folder, run_dir=tmp_path / "run", num_problems=0, n_mc=1, cuts=1, epochs=1,
        batch_size=8, eval_problems=12, eval_mc=1, max_completion_length=4)])
    assert "warning: 1 of 12 train problems have prompts" in capsys.readouterr().err


def test_an_evaluation_says_how_many_it_left_out(folder, files, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    evaluate.main(["--data", *files, "--greedy", *flags(
        **ARGS, model=folder, num_problems=0, out=out, max_new_tokens=4)])
    assert "warning: 1 of 12 test problems have prompts" in capsys.readouterr().err
    results = json.loads(out.with_suffix(".json").read_text())["results"]
    assert (results["problems"], results["left_out"]) == (11, 1)
