"""pav.py: which position a value is read from, what the labels are, whether the fit is calibrated, the judgement."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from toy import EOS, ToyTask, make_rollouts, tiny_model

from infra.cli import UserError
from model import save_model
from open_weights.tokenizer import alphabet_tokenizer
from pav import Config, bce_weights, choose_cuts, collect, join, value_loss
from report.judge import auc, correlation, judge, monte_carlo_value, noise_ceiling, reliability
from report.prover import agreement, centred_within, compare, describe, share_solvable
from rollouts import Rollouts, pass_at_k, step_ends
from tasks import get_task
from verifier import Verifier, best_of_k_value, load_verifier, save_verifier, step_values


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------
# Values


class Position(torch.nn.Module):
    """A backbone whose state at position t is t, and which counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.cfg, self.head, self.calls = SimpleNamespace(hidden_size=1), torch.zeros(1), 0

    def forward(self, tokens, length=None):
        self.calls += 1
        return torch.arange(tokens.shape[1]).expand(tokens.shape)[..., None].float()


@pytest.mark.parametrize("shift, k", [(0.0, 1), (1.5, 1), (0.0, 4), (-0.7, 3)])
def test_a_value_is_read_at_the_last_token_of_its_step(shift, k):
    verifier = Verifier(Position(), logit_shift=shift, k=k)
    torch.nn.init.ones_(verifier.head.weight)
    ends = torch.tensor([[2, 4, 5], [1, 3, 3]])
    logit = torch.tensor([[1.0, 3.0, 4.0], [0.0, 2.0, 2.0]]) - shift  # end 4 is exclusive: position 3
    values = step_values(verifier, torch.zeros(2, 6, dtype=torch.int64), ends)
    close(values, 1 - (1 - logit.sigmoid()) ** k)
    assert verifier.backbone.calls == 1  # V and Q of all steps come from one pass
    assert not values.requires_grad


@torch.no_grad()
def test_a_value_does_not_know_what_comes_later():
    """Q of a step is V of the longer prefix: the same number as if the text had ended there, whatever follows."""
    verifier = Verifier(tiny_model())
    torch.nn.init.normal_(verifier.head.weight, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(10, (300, 9), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([[2, 4, 6, 9]]).expand(300, -1)
    values = step_values(verifier, tokens, ends, batch_tokens=1000)  # several batches
    for h, end in enumerate([2, 4, 6, 9]):
        close(step_values(verifier, tokens[:, :end], torch.full((300, 1), end))[:, 0], values[:, h], atol=1e-5)


def test_boundaries_repeat_the_last_end(task, tokenizer):
    prompts = [[1, 3, 10], [2, 2, 10], [4, 10], [5, 10]]
    rollouts = make_rollouts(prompts, [[3, 0, 0, 0, EOS], [5, EOS], [7], []])
    ends = step_ends(task, rollouts, tokenizer)
    assert ends.tolist() == [[3, 5, 7, 8], [3, 5, 5, 5], [2, 3, 3, 3], [2, 2, 2, 2]]


@pytest.mark.parametrize("k", [1, 2, 4, 16])
def test_best_of_k_is_one_minus_all_k_fail(k):
    q = torch.linspace(0, 1, 11, dtype=torch.float64)
    close(best_of_k_value(q, k), 1 - (1 - q) ** k)
    close(best_of_k_value(q, 1), q, atol=1e-15)
    assert (best_of_k_value(q, k).diff() >= 0).all()
    draws = [pass_at_k(10_000, int(c * 10_000), k) for c in q]  # k draws of many are nearly independent
    close(best_of_k_value(q, k), torch.tensor(draws, dtype=torch.float64), atol=2e-3)


# ----------------------------------------------------------------------------------------------------
# Fit


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_the_balanced_optimum_minus_the_shift_is_the_true_probability(rate):
    """Soft labels in two kinds of states; the best logits of value_loss, found numerically."""
    g = torch.Generator().manual_seed(0)
    target = (torch.rand(2, 400, generator=g) * torch.tensor([[rate], [rate / 3]])).double()
    weight = (torch.rand(2, 400, generator=g) < 0.7).double()
    w1, w0, shift = bce_weights(target, weight)
    mass = (target * weight).sum() * w1, ((1 - target) * weight).sum() * w0
    assert float(mass[0]) == pytest.approx(float(mass[1]))  # right and wrong weigh the same
    logit = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logit], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = value_loss(logit.expand(2, 400), target, weight, w1, w0)
        value.backward()
        return value

    optimizer.step(loss)
    truth = (target * weight).sum(1) / weight.sum(1)
    close((logit.detach()[:, 0] - shift).sigmoid(), truth, atol=1e-5)
    assert abs(shift) > 0.3 and (logit.detach()[:, 0].sigmoid() - truth).abs().max() > 0.04


def test_labels_without_weight_do_not_count():
    target, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    logits = torch.tensor([[0.3, -7.0]], requires_grad=True)
    loss = value_loss(logits, target, weight, 2.0, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-0.3))) and logits.grad[0, 1] == 0
    for constant in (0.0, 1.0):  # nothing but wrong labels must not divide by zero
        assert all(math.isfinite(x) for x in bce_weights(torch.full((3, 2), constant), torch.ones(3, 2)))


# ----------------------------------------------------------------------------------------------------
# Labels


def test_cuts_never_leave_nothing_to_continue():
    for cuts in (0, 1, 2, 9):
        for seed in range(20):
            chosen = choose_cuts([3, 5, 7, 8], cuts, seed)
            assert chosen == sorted(set(chosen)) and set(chosen) <= {0, 1, 2} and len(chosen) == min(cuts or 3, 3)
    assert {choose_cuts([3, 5, 7, 8], 1, seed)[0] for seed in range(50)} == {0, 1, 2}  # the bare prompt among them


def test_labels_are_the_provers_outcomes_from_each_cut(task, tokenizer, model):
    problems = task.problems("train", 6, 0)
    cfg = Config(n_cov=2, n_mc=3, cuts=0, seed=4)
    data, spent = collect(model, tiny_model(seed=1), tokenizer, task, problems, cfg, 0)
    again, _ = collect(model, tiny_model(seed=1), tokenizer, task, problems, cfg, 0)
    assert all(torch.equal(data[k], again[k]) for k in data) and spent > 0
    tokens, ends, target, weight = data["tokens"], data["ends"], data["target"], data["weight"]
    assert len(tokens) % 3 == 0 and set(weight.unique().tolist()) == {0.0, 1.0}
    for i in range(0, len(tokens), 3):
        problem = next(p for p in problems if tokenizer.encode(p.prompt) == tokens[i, :3].tolist())
        outcome = [task.grade(problem, tokenizer.decode(tokens[j, 3 : ends[j, -1]])) for j in range(i, i + 3)]
        for j in range(i, i + 3):
            labelled = [h for h in range(ends.shape[1]) if weight[j, h]]
            places = [int(ends[j, h]) for h in labelled]
            assert places == sorted(set(places))  # padding repeats an end and must not be counted again
            assert places[-1] == int(ends[j].max()) <= 3 + task.max_new_tokens
            cut = places[0]
            assert torch.equal(tokens[j, :cut], tokens[i, :cut])  # siblings share the prefix up to the cut
            assert target[j, labelled[0]].item() == pytest.approx(sum(outcome) / 3)  # the siblings' mean
            assert target[j, labelled[1:]].tolist() == [outcome[j - i]] * (len(labelled) - 1)
    assert 0 < float(target.mean()) < 1


def test_an_outcome_model_is_labelled_at_the_end_only(task, tokenizer, model):
    problems = task.problems("train", 20, 0)
    data, _ = collect(model, None, tokenizer, task, problems, Config(label="outcome", n_cov=1), 0)
    assert (data["weight"][:, :-1] == 0).all() and (data["weight"][:, -1] == 1).all()
    for i, problem in enumerate(problems):
        text = tokenizer.decode(data["tokens"][i, 3 : data["ends"][i, -1]])
        assert data["target"][i, -1] == task.grade(problem, text)


def test_shards_of_other_widths_are_padded_without_weight():
    shard = lambda T, S: dict(tokens=torch.ones(2, T, dtype=torch.int64), ends=torch.arange(S).expand(2, S) + 1,  # noqa: E731
                              target=torch.ones(2, S), weight=torch.ones(2, S))
    whole = join([shard(4, 3), shard(6, 5)])
    assert whole["tokens"][0].tolist() == [1, 1, 1, 1, 0, 0] and whole["ends"][0].tolist() == [1, 2, 3, 3, 3]
    assert whole["weight"].sum(1).tolist() == [3, 3, 5, 5] and whole["tokens"].dtype == torch.int64


# ----------------------------------------------------------------------------------------------------
# Judgement


def test_auc_equals_a_double_loop_with_ties():
    g = torch.Generator().manual_seed(0)
    for levels in (2, 5, 1000):
        score, positive = torch.randint(levels, (60,), generator=g).float(), torch.rand(60, generator=g) < 0.3
        right, wrong = score[positive].tolist(), score[~positive].tolist()
        pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(right, wrong)]
        assert auc(score, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(auc(torch.rand(5), torch.ones(5, dtype=torch.bool)))


def test_reliability_and_correlation():
    rows = reliability(torch.tensor([0.0, 0.05, 0.55, 1.0, 0.95]), torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    assert [r[2] for r in rows] == [2, 1, 2]
    assert [x for r in rows for x in r[:2]] == pytest.approx([0.025, 0.5, 0.55, 1.0, 0.975, 0.5])
    a = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(a, 3 - 2 * a) == pytest.approx(-1.0) and math.isnan(correlation(a, torch.ones(3)))


def test_a_verifier_that_knows_is_told_from_one_that_does_not(task, tokenizer, model):
    """Its value is 1 exactly where the answer has been written; the prover then never loses it again."""
    class Knows(torch.nn.Module):
        cfg, head = SimpleNamespace(hidden_size=1), torch.zeros(1)

        def forward(self, tokens, length=None):
            hit = (tokens == tokens[:, 1:2]) & (torch.arange(tokens.shape[1]) > 2)
            return hit.cumsum(1).clamp(max=1)[..., None] * 12.0 - 6.0

    knows, blind = Verifier(Knows()), Verifier(tiny_model(seed=2))
    torch.nn.init.ones_(knows.head.weight)
    cfg = Config(eval_problems=64, eval_mc=8, seed=1)
    good, bad = (judge(v, model, model, tokenizer, task, cfg) for v in (knows, blind))
    assert good["auc_outcome"] == 1.0 and bad["auc_outcome"] == 0.5  # a head of zeros
    assert good["corr_advantage"] > 0.5 and math.isnan(bad["corr_advantage"])
    assert good["brier"] < bad["brier"] and good["judged_steps"] > 20


@pytest.mark.parametrize("k", [1, 4])
def test_the_noise_ceiling_is_what_the_true_advantage_gets(k):
    gen = torch.Generator().manual_seed(3)
    p = torch.rand(20000, 2, generator=gen)
    right = (torch.rand(20000, 2, 16, generator=gen) < p[..., None]).float()
    advantage, noisy = (v[:, 1] - v[:, 0] for v in (1 - (1 - p) ** k, monte_carlo_value(right, k)))
    assert noise_ceiling(right, k) == pytest.approx(correlation(advantage, noisy), abs=0.02)
    assert noise_ceiling((torch.rand(20000, 2, 16, generator=gen) < 0.5).float(), k) < 0.25  # nothing but noise
    assert math.isnan(noise_ceiling(right[..., :1], k))


def test_solutions_of_one_step_leave_no_step_to_judge(tokenizer, model):
    task = ToyTask()
    task.step_ends = lambda tokens, prompt_len, length, tokenizer: [length]
    out = judge(Verifier(tiny_model()), model, model, tokenizer, task, Config(eval_problems=8, eval_mc=2))
    assert out["judged_steps"] == 0 and math.isnan(out["corr_advantage"])


def test_an_advantage_is_centred_within_its_prompt():
    values, prompt = torch.tensor([1.0, 3.0, 10.0, 20.0, 60.0]), torch.tensor([0, 0, 2, 2, 2])
    assert centred_within(values, prompt).tolist() == [-1.0, 1.0, -20.0, -10.0, 30.0]


def test_within_a_prompt_the_error_of_its_value_does_not_count():
    """Two prompts, whose own values are off by 0.9: the batch's correlation falls, the one within a prompt stays 1."""
    truth, prompt = torch.tensor([0.1, 0.3, 0.2, 0.4]), torch.tensor([0, 0, 1, 1])
    found = agreement(truth + torch.tensor([0.9, 0.9, 0.0, 0.0]), truth, prompt, "_exact")
    assert found["corr_first_within_exact"] == pytest.approx(1.0) and found["corr_first_exact"] < 0.0


def test_base_and_prover_side_by_side(task, tokenizer, model):
    """A prover that is the base has no numbers of its own; another has, and what is printed names both."""
    cfg = Config(eval_problems=32, eval_mc=4, seed=1)
    verifier, other = Verifier(tiny_model(seed=3)), tiny_model(seed=5)
    torch.nn.init.normal_(verifier.head.weight)
    alone = compare(verifier, model, model, tokenizer, task, cfg)
    both = compare(verifier, model, other, tokenizer, task, cfg)
    assert "success_prover" not in alone and "corr_policies" not in alone
    assert 0 <= both["greedy_base"] == alone["greedy_base"] and 0 <= both["greedy_prover"] <= 1
    assert both["success_base"] == alone["success_base"] and both["success_prover"] != both["success_base"]
    assert both["solvable_base"] is None and -1 <= both["corr_policies"] <= 1 and "corr_first_within" in both
    text = describe(both | dict(labels=7, auc=0.5, brier=0.1, brier_constant=0.2, corr_advantage=0.3))
    assert [line.split(":")[0] for line in text.splitlines()] == ["base", "prover", "first step", "verifier"]
    never = both | dict(labels=7, auc=0.5, brier=0.1, brier_constant=0.2, corr_advantage=0.3, corr_policies=math.nan)
    assert "nan" not in describe(never).splitlines()[1]


def test_a_solver_says_which_first_steps_keep_a_problem_solvable():
    grid = get_task("grid")
    problem = grid.problems("val", 1, 0)[0]
    (row, column, _), (r, c) = problem.data
    towards = f"{row + (r > row) - (r < row)} {column} \n" if r != row else f"{row} {column + (1 if c > column else -1)} \n"
    tokenizer = grid.tokenizer()
    prompt = grid.prompt_tokens(problem, tokenizer)
    rows = [prompt + tokenizer.encode(text) for text in (towards, "9 9 \n")]
    rolled = Rollouts(torch.tensor(rows), torch.tensor([len(prompt)] * 2), torch.tensor([len(r) for r in rows]),
                      torch.zeros(2, len(rows[0])), ["length"] * 2)
    assert share_solvable(grid, tokenizer, [problem] * 2, rolled) == 0.5


# ----------------------------------------------------------------------------------------------------
# Files


def test_a_verifier_returns_from_its_folder_with_every_bit(tmp_path, tokenizer):
    verifier = Verifier(tiny_model(), logit_shift=-0.4, k=3, fingerprint=tokenizer.fingerprint)
    torch.nn.init.normal_(verifier.head.weight, generator=torch.Generator().manual_seed(0))
    save_verifier(tmp_path, verifier, tokenizer, dict(task="toy"))
    tokens, ends = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 3, 4]])
    again = load_verifier(tmp_path, tokenizer)
    assert torch.equal(step_values(again, tokens, ends), step_values(verifier, tokens, ends))
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(UserError, match="another tokenizer"):
        load_verifier(tmp_path, alphabet_tokenizer(list("0123456789-")))
    whole = (tmp_path / "value_head.safetensors").read_bytes()
    (tmp_path / "value_head.safetensors").write_bytes(whole[:-3])
    with pytest.raises(UserError, match="value_head.safetensors cannot be read"):
        load_verifier(tmp_path, tokenizer)
    save_model(tmp_path / "lm", tiny_model(), tokenizer)
    with pytest.raises(UserError, match="holds a language model, not a verifier"):
        load_verifier(tmp_path / "lm", tokenizer)
    assert json.loads((tmp_path / "verifier.json").read_text())["prover_k"] == 3
