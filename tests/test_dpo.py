"""train_dpo.py and solutions.py: on three tokens what the method says, and what must stay frozen, masked and in order."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from toy import EOS, ToyTask, make_rollouts, tiny_model

import train_sft
from infra.cli import UserError
from infra.runs import read_metrics
from model import load_model, save_model
from papers import rft as solutions_module
from papers import train_dpo
from papers.rft import Solutions, count, keep_correct, sample_solutions
from papers.train_dpo import (
    Config,
    choose_negatives,
    completion_logps,
    dpo_loss,
    dpo_step,
    first_pit,
    load_pairs,
    make_pair,
    step_q,
    value_prefixes,
)
from tasks.chain import Chain
from tasks.stargraph import StarGraph

# ----------------------------------------------------------------------------------------------------
# The first pit, and the cut


def test_the_first_pit_is_the_first_of_the_lowest():
    assert first_pit([0.9, 0.2, 0.5, 0.0]) == 3
    assert first_pit([0.9, 0.0, 0.5, 0.0]) == 1  # it recovers by luck: the first zero counts
    assert first_pit([0.5, 0.5, 0.5]) == 0
    assert first_pit([0.7]) == 0


def test_q_counts_without_bias_and_a_wrong_solution_has_none():
    q = step_q([8, 1, 0, None], 8, 5)
    assert q == pytest.approx([1.0, 1 - math.comb(7, 5) / math.comb(8, 5), 0.0, 0.0])
    assert first_pit(q) == 2
    with pytest.raises(UserError, match="more samples or a smaller k"):
        step_q([1], 4, 5)


PROMPT, NEGATIVE, ENDS = [1, 2], [3, 4, 5, 6, EOS], [2, 4, 5]


def test_the_negative_ends_with_the_last_token_of_its_pit():
    positive = [3, 4, 9, 9, EOS]
    assert make_pair(PROMPT, NEGATIVE, ENDS, 0, [[9, EOS]]) == (PROMPT, [9, EOS], [3, 4])
    assert make_pair(PROMPT, NEGATIVE, ENDS, 1, [positive]) == (PROMPT, positive, [3, 4, 5, 6])
    assert make_pair(PROMPT, NEGATIVE, ENDS, 2, [positive]) == (PROMPT, positive, NEGATIVE)


def test_the_bridge_shares_the_steps_before_the_pit():
    bridge = [3, 4, 9, 9, EOS]
    assert make_pair(PROMPT, NEGATIVE, ENDS, 1, [], bridge=bridge) == (PROMPT + [3, 4], [9, 9, EOS], [5, 6])
    assert make_pair(PROMPT, NEGATIVE, ENDS, 0, [], bridge=[9, EOS]) == (PROMPT, [9, EOS], [3, 4])
    with pytest.raises(ValueError, match="does not share"):
        make_pair(PROMPT, NEGATIVE, ENDS, 1, [], bridge=[3, 8, 9, EOS])


def test_a_positive_that_goes_through_the_pit_refutes_it():
    through, other = [3, 4, 9, EOS], [8, EOS]
    assert make_pair(PROMPT, NEGATIVE, ENDS, 0, [through]) is None
    assert make_pair(PROMPT, NEGATIVE, ENDS, 0, []) is None
    assert make_pair(PROMPT, NEGATIVE, ENDS, 0, [through, other])[1] == other
    assert make_pair(PROMPT, NEGATIVE, ENDS, 1, [], bridge=[3, 4, 5, 6, 9, EOS]) is None


def test_positives_take_turns():
    positives = [[7, EOS], [8, EOS]]
    assert [make_pair(PROMPT, NEGATIVE, ENDS, 0, positives, turn)[1][0] for turn in range(4)] == [7, 8, 7, 8]


# ----------------------------------------------------------------------------------------------------
# The loss


def by_hand(chosen, rejected, ref_chosen, ref_rejected, beta):
    margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
    return math.log1p(math.exp(-margin))


def test_the_loss_by_hand_in_float64():
    numbers = torch.tensor([[-1.0, -2.0, -3.0, -2.5], [-4.0, -1.0, -2.0, -2.0]], dtype=torch.float64)
    loss, chosen, rejected = dpo_loss(*numbers.T, beta=0.7)
    assert loss.tolist() == pytest.approx([by_hand(*row, 0.7) for row in numbers.tolist()], rel=1e-12)
    assert chosen.tolist() == pytest.approx([0.7 * 2, -0.7 * 2]) and rejected.tolist() == pytest.approx([0.35, 0.7])
    assert loss[0] < math.log(2) < loss[1]  # swapped chosen and rejected would turn both around


def test_its_gradient_is_finite_differences_and_vanishes_with_beta():
    point = torch.tensor([-1.0, -2.0, -3.0, -2.5], dtype=torch.float64)
    for beta in (0.1, 1.0):
        x = point.clone().requires_grad_(True)
        dpo_loss(*x, beta=beta)[0].backward()
        for i in range(4):
            up, down = point.clone(), point.clone()
            up[i] += 1e-6
            down[i] -= 1e-6
            slope = (by_hand(*up.tolist(), beta) - by_hand(*down.tolist(), beta)) / 2e-6
            assert float(x.grad[i]) == pytest.approx(slope, abs=1e-8)
    x = point.clone().requires_grad_(True)
    loss = dpo_loss(*x, beta=1e-4)[0]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-3)
    assert x.grad[:2].tolist() == pytest.approx([-0.5e-4, 0.5e-4], rel=1e-3)  # beta/2: unlikelihood with a contrast


def slow_logp(model, prompt, completion):
    """Log-prob of a completion from whole logits in float64, one row at a time."""
    ids = torch.tensor(prompt + completion)
    logits = F.linear(model(ids[None])[0].double(), model.head.double())
    return sum(logits.log_softmax(-1)[t - 1, ids[t]] for t in range(len(prompt), len(ids)))


PAIRS = [([1, 2], [3, EOS], [4, 5, 6]), ([7], [7, 7, 7, EOS], [1]), ([0, 0, 3], [2, 2, EOS], [9, 9])]


def test_log_probs_are_those_of_the_completion_alone(model):
    rows = [(p, c) for p, c, _ in PAIRS]
    got = completion_logps(model, rows, "cpu")
    torch.testing.assert_close(got.double(), torch.stack([slow_logp(model, p, c) for p, c in rows]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, completion_logps(model, [(p, c[:-1]) for p, c in rows], "cpu"))  # EOS counts


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_gradient_of_a_step_by_hand(size):
    model, slow, beta = tiny_model(), tiny_model(), 0.5
    reference = (torch.tensor([-5.0, -8.0, -7.0]), torch.tensor([-6.0, -2.0, -6.5]))
    logs = dpo_step(model, PAIRS, reference, Config(beta=beta, micro_batch_size=size), "cpu")
    loss = 0.0
    for i, (p, c, r) in enumerate(PAIRS):
        margin = slow_logp(slow, p, c) - slow_logp(slow, p, r) - float(reference[0][i] - reference[1][i])
        loss = loss - torch.log(torch.sigmoid(beta * margin)) / 3
    loss.backward()
    assert logs["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for a, b in zip(model.parameters(), slow.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-6, rtol=2e-4)
    assert set(logs) == {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
                         "logps/chosen", "logps/rejected"}


def test_the_shared_prefix_cancels(model):
    """The theorem's form, prefix in the prompt, has the loss and the gradient of full solutions with that prefix."""
    whole = [([1, 2], [3, 4, 9, EOS], [3, 4, 5, 6])]
    cut = [([1, 2, 3, 4], [9, EOS], [5, 6])]
    grads = []
    for pairs in (whole, cut):
        model = tiny_model()
        reference = [completion_logps(tiny_model(seed=1), [(p[0], p[side]) for p in pairs], "cpu").detach() for side in (1, 2)]
        logs = dpo_step(model, pairs, reference, Config(), "cpu")
        grads.append((logs["loss"], torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    torch.testing.assert_close(grads[0][1], grads[1][1], atol=1e-6, rtol=1e-3)


# ----------------------------------------------------------------------------------------------------
# Samples: kept, counted, valued


def made(completions, correct, n):
    problems = ToyTask().problems("train", len(completions) // n, 0)
    prompts = [ToyTask().prompt_tokens(p, ToyTask().tokenizer()) for p in problems for _ in range(n)]
    out = make_rollouts(prompts, completions)
    finished = torch.tensor([r == "stop" for r in out.finish_reason])
    return Solutions(problems, n, out, torch.tensor(correct), finished)


def test_kept_solutions_are_right_distinct_finished_and_capped():
    found = made([[1, EOS], [1, EOS], [2, EOS], [3, 3], [4, EOS], [5, EOS], [6, EOS], [6, EOS]],
                 [True, True, False, True, True, True, False, False], n=4)
    assert keep_correct(found, 0) == [[[1, EOS]], [[4, EOS], [5, EOS]]]
    assert keep_correct(found, 1) == [[[1, EOS]], [[4, EOS]]]
    assert count(found, keep_correct(found, 0)) == dict(
        problems=2, sampled=8, sampled_tokens=16, correct=5, distinct_kept=3, problems_without_correct=0,
        problems_without_incorrect=0)


def test_negatives_are_wrong_distinct_and_capped():
    found = made([[1, EOS], [2, 2, 2, EOS], [2, 2, 2, EOS], [3, EOS], [4, EOS], [5, EOS]],
                 [True, False, False, False, True, True], n=3)
    ends = torch.tensor([[3, 5, 5], [3, 5, 7], [3, 5, 7], [3, 5, 5], [3, 5, 5], [3, 5, 5]])
    assert choose_negatives(found, ends, 8) == [[(1, [2, 4])], [(3, [2])]]


def test_prefixes_are_valued_by_fresh_continuations(tmp_path, monkeypatch, task, tokenizer):
    """A stand-in for generate() solves every prefix that begins with an even digit, and those alone."""
    seen = []

    def finish(model, prompts, max_new_tokens, **_):
        seen.extend(zip(prompts, max_new_tokens))
        tail = [[p[1] if p[3] % 2 == 0 else (p[1] + 1) % 10, EOS] for p in prompts]
        return make_rollouts(prompts, tail)

    monkeypatch.setattr(train_dpo, "generate", finish)
    # the gold of both problems stands in the prompt; the digits of the negatives are no gold
    problems = task.problems("train", 2, 0)
    wrong = [d for d in range(10) if str(d) not in {p.answer for p in problems}]
    even, odd = next(d for d in wrong if d % 2 == 0), next(d for d in wrong if d % 2)
    found = made([[even, odd, odd, odd, EOS], [odd, odd, even, even, EOS]] * 2, [False] * 4, n=2)
    negatives = choose_negatives(found, torch.tensor([[3, 5, 7, 8]] * 4), 8)
    cfg = Config(n_mc=5, shard_problems=1)
    values, spent = value_prefixes(None, tokenizer, task, found, negatives, cfg, tmp_path)
    assert len(values) == 8 and spent == 8 * 5 * 2 and len(seen) == 40
    for (i, prefix), (successes, bridge) in values.items():
        solved = prefix[0] % 2 == 0
        assert successes == 5 * solved
        gold = int(problems[i].answer)
        assert bridge == ([*prefix, gold, EOS] if solved else None)
    assert {limit for _, limit in seen} == {6 - 2, 6 - 4}  # what the task's limit leaves
    again, _ = value_prefixes(None, tokenizer, task, found, negatives, cfg, tmp_path)
    assert again == values and len(seen) == 40  # read from the shards


# ----------------------------------------------------------------------------------------------------
# train()


@pytest.fixture
def run(tmp_path, monkeypatch, tokenizer):
    save_model(tmp_path / "policy", tiny_model(), tokenizer)
    for module in (train_dpo, train_sft):
        monkeypatch.setattr(module, "get_task", lambda cfg: ToyTask())

    def go(name, **options):
        small = dict(policy=str(tmp_path / "policy"), run_dir=str(tmp_path / name), num_problems=12, num_generations=4,
                     num_negatives=2, n_mc=5, batch_size=8, epochs=4, learning_rate=1e-2, eval_problems=4, device="cpu",
                     logging_steps=1)
        return train_dpo.train(Config(**(small | options))), tmp_path / name

    return go


def test_the_reference_is_the_policy_before_training(run, tmp_path):
    summary, folder = run("dpo")
    pairs, ref_chosen, ref_rejected, counts = load_pairs(folder)
    policy, _ = load_model(tmp_path / "policy")
    trained, _ = load_model(folder)
    for side, reference in ((1, ref_chosen), (2, ref_rejected)):
        rows = [(p[0], p[side]) for p in pairs]
        torch.testing.assert_close(reference, completion_logps(policy, rows, "cpu").detach(), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(reference, completion_logps(trained, rows, "cpu"), atol=0.1)
    rows = read_metrics(folder)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(rows[0]["rewards/margins"]) < 1e-5
    assert rows[-1]["rewards/margins"] > 0.1 and rows[-1]["rewards/accuracies"] > 0.6  # not the sign of a swapped pair
    assert rows[-1]["loss"] < 0.6
    assert counts["pairs"] == len(pairs) and summary["prefix_rollouts"] == counts["prefixes"] * 5


def test_pairs_are_what_they_say(run, task, tokenizer):
    for mode, positive in (("per_step", "full"), ("per_step", "shared_prefix"), ("whole", "full")):
        _, folder = run(mode + positive, pairs=mode, positive=positive, epochs=1, num_problems=40, num_generations=8)
        pairs, *_ = load_pairs(folder)
        notes = json.loads((folder / "pairs.json").read_text())["pairs"]
        assert len(pairs) == len(notes) > 5
        gold = {p.key: p for p in task.problems("train", None, 0)}
        for (prompt, chosen, rejected), note in zip(pairs, notes):
            problem = gold[note["problem"]]
            begun = prompt[3:]  # "37=" is three tokens; then come shared steps, if any
            assert prompt[:3] == task.prompt_tokens(problem, tokenizer)
            assert task.grade(problem, tokenizer.decode(begun + chosen)) == 1 and chosen[-1] == EOS
            assert task.grade(problem, tokenizer.decode(begun + rejected)) == 0
            assert chosen[: len(rejected)] != rejected
            if mode == "whole":
                assert not note["q"] and note["pit"] == note["steps"] - 1
            else:
                assert note["pit"] == note["q"].index(min(note["q"])) and note["q"][-1] == 0
                cut = 2 * (note["pit"] + 1)
                assert len(begun + rejected) == cut or note["pit"] == note["steps"] - 1
                assert bool(begun) == (positive == "shared_prefix" and note["pit"] > 0)
        assert any(n["pit"] < n["steps"] - 1 for n in notes) == (mode == "per_step")


def test_impossible_settings_are_refused_before_any_work(run, tmp_path):
    with pytest.raises(UserError, match="--n-mc 4 .*raise --n-mc"):
        run("a", n_mc=4)
    with pytest.raises(UserError, match="shared_prefix needs a pit"):
        run("b", pairs="whole", positive="shared_prefix")
    with pytest.raises(UserError, match="--policy is missing"):
        run("c", policy="")
    with pytest.raises(UserError, match="no pair: .*raise --num-generations"):
        run("d", num_problems=1, num_generations=1)
    with pytest.raises(UserError, match="there are only"):
        run("e", num_problems=999)
    assert not any((tmp_path / name).exists() for name in "abc")


# ----------------------------------------------------------------------------------------------------
# Rejection-sampling fine-tuning


@pytest.fixture
def rft(tmp_path, monkeypatch, tokenizer):
    save_model(tmp_path / "policy", tiny_model(), tokenizer)
    monkeypatch.setattr(train_sft, "get_task", lambda cfg: ToyTask())
    trained = []
    monkeypatch.setattr(train_sft, "sft_step", lambda model, batch, *rest: (trained.extend(batch), (1.0, 1.0))[1])
    monkeypatch.setattr(train_sft.torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(0.0))

    def go(name, **options):
        trained.clear()
        small = dict(policy=str(tmp_path / "policy"), run_dir=str(tmp_path / name), num_problems=10, num_examples=10,
                     num_generations=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, steps=2,
                     batch_size=100, eval_problems=4, device="cpu")
        return solutions_module.train(solutions_module.Config(**(small | options))), list(trained)

    return go


def test_rft_trains_on_right_solutions_and_counts_them(rft, task, tokenizer, capsys):
    summary, examples = rft("rft", rft_demonstrations=False, rft_keep=2)
    answer = {tuple(task.prompt_tokens(p, tokenizer)): p for p in task.problems("train", 10, 0)}
    distinct = {(*p, -1, *c) for p, c in examples}
    assert summary["examples"] == summary["distinct_kept"] == len(distinct) > 3
    assert summary["sampled"] == 80 and summary["problems"] == 10
    for prompt, completion in examples:
        assert task.grade(answer[tuple(prompt)], tokenizer.decode(completion)) == 1 and completion[-1] == EOS
    for prompt in answer:
        assert sum(row[:3] == prompt for row in distinct) <= 2
    assert f"problems without correct {summary['problems_without_correct']}" in capsys.readouterr().out
    with_demonstrations, more = rft("both", rft_keep=2)
    assert len({(*p, -1, *c) for p, c in more}) == with_demonstrations["examples"] > summary["examples"]


def test_rft_starts_from_the_base_and_needs_a_policy(rft, tmp_path):
    rft("rft")
    weights = load_file(tmp_path / "rft" / "step_000002" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (12, 16) and len(weights) < len(
        load_file(tmp_path / "policy" / "model.safetensors"))  # one layer, the policy has two
    with pytest.raises(UserError, match="--policy is missing"):
        rft("none", policy="")


def test_solutions_do_not_depend_on_the_shards_being_there(tmp_path, task, tokenizer, monkeypatch):
    cfg, policy = Config(shard_problems=3), tiny_model()
    problems = task.problems("train", 8, 0)
    first = sample_solutions(policy, tokenizer, task, problems, 2, cfg, tmp_path)
    (tmp_path / "solutions_00001.safetensors").unlink()
    (tmp_path / ".tmp-solutions_00002.safetensors").write_bytes(b"half")
    calls = []
    monkeypatch.setattr(solutions_module, "generate", lambda *a, original=solutions_module.generate, **k: (
        calls.append(len(a[1])), original(*a, **k))[1])
    again = sample_solutions(policy, tokenizer, task, problems, 2, cfg, tmp_path)
    assert calls == [6] and not list(tmp_path.glob(".tmp*"))
    for field in ("tokens", "length", "prompt_len", "finish_reason"):
        a, b = getattr(first.rollouts, field), getattr(again.rollouts, field)
        assert a == b if isinstance(a, list) else torch.equal(a, b)
    assert torch.equal(first.correct, again.correct)
    for b in range(16):
        text = tokenizer.decode(first.rollouts.completion(b))
        assert bool(first.correct[b]) == (problems[b // 2].answer in text)


# ----------------------------------------------------------------------------------------------------
# The two tasks


def test_chain_demonstrations_end_right_and_go_wrong_on_the_way():
    task, wrong = Chain(), 0
    tokenizer = task.tokenizer()
    for i, problem in enumerate(task.problems("train", 200, 0)):
        sloppy, clean = task.demonstration(problem, 0.7, i), task.demonstration(problem, 1.0, i)
        assert task.grade(problem, sloppy) == task.grade(problem, clean) == 1
        assert task.first_illegal_step(problem, clean) is None
        wrong += task.first_illegal_step(problem, sloppy) is not None
        ids = tokenizer.encode(problem.prompt + sloppy)
        start = len(tokenizer.encode(problem.prompt))
        assert start == 6 and len(ids) == 11 and tokenizer.decode(ids[start:]) == sloppy
        with_eos = ids + [tokenizer.eos_ids[0]]
        assert task.step_ends(with_eos, 6, 12, tokenizer) == [7, 8, 9, 10, 11, 12]
        assert task.credit_ends(with_eos, 6, 12, tokenizer) == [7, 8, 9, 10, 12]
        assert task.step_ends(ids, 6, 11, tokenizer) == [7, 8, 9, 10, 11]
        assert task.step_ends(ids, 6, 6, tokenizer) == []
        other = (int(problem.answer) + 1) % 10
        for bad in (clean[:-1] + str(other), clean[:-2], clean + "=1", "", "=" * 99):
            assert task.grade(problem, bad) == 0
    assert 40 < wrong < 160
    assert not {p.key for p in task.problems("train")} & {p.key for p in task.problems("test")}


def test_chain_operations_by_hand():
    problem = dataclasses.replace(Chain().problems("train", 1, 0)[0], answer="5", data=(7, ("+5", "*3", "<2", ">5", "-7")))
    assert Chain().first_illegal_step(problem, "=2=6=2=5=8") is None
    assert [Chain().first_illegal_step(problem, t) for t in ("=3", "=2=7=2", "=2=6=2=5=9", "=2=6", "")] == [0, 1, 4, 2, 0]


def test_stargraph_has_one_way_to_the_goal():
    for degree, path in ((2, 4), (3, 3)):
        task = StarGraph(degree=degree, path=path)
        tokenizer = task.tokenizer()
        for problem in task.problems("train", 50, 0):
            graph, question = problem.prompt.split("/")
            edges = [(e[:2], e[2:]) for e in graph.split("|")]
            source, goal = question[:2], question[2:4]
            assert len(edges) == degree * (path - 1) and sum(a == source for a, _ in edges) == degree
            walk, back = [goal], {b: a for a, b in edges}
            while back[walk[0]] != source:
                walk.insert(0, back[walk[0]])
            assert task.grade(problem, "".join(walk)) == 1 and task.grade(problem, walk[0]) == 0
            ids = tokenizer.encode(problem.prompt + task.demonstration(problem))
            start = len(ids) - (path - 1)
            assert task.step_ends(ids, start, len(ids), tokenizer) == list(range(start + 1, len(ids) + 1))
    with pytest.raises(UserError, match="degree >= 2"):
        StarGraph(degree=9)
