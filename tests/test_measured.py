"""papers/measured.py: values by their definition. The prover is a script, so that every value is known."""

import pytest
import torch
from toy import EOS, ToyTask, make_rollouts, tiny_model

import train_rl
from infra.cli import UserError
from infra.runs import read_metrics
from model import save_model
from papers import measured
from papers.measured import Config, inner_prefixes, leave_one_out_mean, measured_values
from rollouts import grades, step_ends

TASK = ToyTask()
TOKENIZER = TASK.tokenizer()


def batch():
    """Two prompts with two samples each; steps of two tokens; right if the second digit of the prompt is written."""
    problems = [p for p in TASK.problems("train", None, 0) if p.prompt in ("13=", "22=") for _ in range(2)]
    rolled = make_rollouts([[1, 3, 10]] * 2 + [[2, 2, 10]] * 2, [[3, 0, 0, 0, EOS], [5, 5, 5], [4, 4, 2, EOS], [4, 4, 1, EOS]])
    return problems, rolled, step_ends(TASK, rolled, TOKENIZER, credit=True)


def prover(calls):
    """Writes the answer in the first half of the continuations of every prefix, and nothing right in the others."""
    def complete(prompts, max_new_tokens, seed):
        calls.append(prompts)
        rows = []
        for i, prompt in enumerate(prompts):
            wrong = next(d for d in (8, 9) if d != prompt[1])
            rows.append([prompt[1] if i % 4 < 2 else wrong, EOS])
        return make_rollouts([list(p) for p in prompts], rows)

    return complete


def test_every_distinct_inner_prefix_is_asked_once():
    problems, rolled, ends = batch()
    prefixes = inner_prefixes(problems, rolled, ends)
    assert sorted(prefixes) == [(1, 3, 10, 3, 0), (1, 3, 10, 3, 0, 0, 0), (1, 3, 10, 5, 5), (2, 2, 10, 4, 4)]
    assert all(start == 3 for *_, start in prefixes.values())


@pytest.mark.parametrize("k, half", [(1, 0.5), (2, 1 - 1 / 6), (4, 1.0)])
def test_values_are_those_of_best_of_k_and_the_end_is_the_outcome(k, half):
    problems, rolled, ends = batch()
    outcome = grades(TASK, problems, rolled, TOKENIZER)
    calls = []
    cfg = Config(num_generations=2, n_mc=4, prover_k=k)
    values, spent = measured_values(prover(calls), TASK, TOKENIZER, problems, rolled, ends, outcome, cfg, 6, 0)
    assert len(calls) == 1 and len(calls[0]) == 4 * 4 and spent == 2 * 16
    first = [1.0, half, half, half]  # row 0 has the answer in its first step already
    expected = [[0, first[0], 1, 1], [0, first[1], 0, 0], [0, first[2], 1, 1], [0, first[3], 0, 0]]
    torch.testing.assert_close(values[:, 1:], torch.tensor(expected)[:, 1:])
    assert values[:, 0].tolist() == pytest.approx([first[1], first[0], first[3], first[2]])  # the other sample's V_1


def test_the_value_of_the_prompt_cancels():
    """Whatever V(prompt) is, progress of the first step differs between samples of a prompt as their V_1 do."""
    values = torch.tensor([[0.2, 0.6, 0.7], [0.1, 0.1, 0.1]])
    centred = values - leave_one_out_mean(values)
    shifted = (values + 0.25) - leave_one_out_mean(values + 0.25)
    torch.testing.assert_close(centred, shifted)
    assert centred.sum(1).tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer, task):
    save_model(tmp_path / "policy", tiny_model(), tokenizer)
    monkeypatch.setattr(measured, "get_task", lambda cfg: task)
    monkeypatch.setattr(train_rl, "get_task", lambda cfg: task)
    return tmp_path


def small(folder, name, **options):
    return dict(policy=str(folder / "policy"), run_dir=str(folder / name), steps=2, num_prompts=4, num_generations=4,
                eval_problems=4, device="cpu", threads=1) | options


def test_a_run_counts_the_provers_tokens_and_alpha_zero_is_the_outcome_run(folder):
    paid = measured.train(Config(**small(folder, "paid", n_mc=2, prover_k=2)))
    zero = measured.train(Config(**small(folder, "zero", n_mc=2, alpha=0.0)))
    train_rl.train(train_rl.Config(**small(folder, "outcome", reward="outcome")))
    weights = {name: (folder / name / "step_000002/model.safetensors").read_bytes() for name in ("paid", "zero", "outcome")}
    assert weights["zero"] == weights["outcome"] != weights["paid"] and zero["accuracy"] is not None
    rows = read_metrics(folder / "paid")
    assert paid["measured_tokens"] == sum(r["measured/sampled_tokens"] for r in rows[1:]) > 0


def test_too_few_continuations_are_refused(folder):
    with pytest.raises(UserError, match="raise --n-mc"):
        measured.train(Config(**small(folder, "few", n_mc=2, prover_k=4)))
    with pytest.raises(UserError, match="train_rl.py --reward outcome"):
        measured.main(["--reward", "outcome"])
