"""update() and train() of train_rl.py with a tiny policy: what must not depend on how the work is cut up."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import EOS, ToyTask, make_rollouts, tiny_model

import train_rl
from infra import seeds
from infra.runs import read_metrics
from infra.seeds import batch_indices
from model import save_model
from report import watch
from rollouts import rows_that_fit
from sample import generate
from train_rl import Config, update
from verifier import Verifier, save_verifier

# ----------------------------------------------------------------------------------------------------
# One update


@pytest.fixture
def batch(model, task, tokenizer):
    prompts = [task.prompt_tokens(p, tokenizer) for p in task.problems("train", 4, 0) for _ in range(2)]
    rollouts = generate(model, prompts, max_new_tokens=6, temperature=0.8, seed=1, stop_ids=[EOS])
    adv = torch.randn(8, generator=torch.Generator().manual_seed(2))[:, None] * rollouts.mask()
    return rollouts, adv


def gradient_of_update(batch, reference=None, **options):
    """(what update() adds to the weights per unit of learning rate, its logs), by SGD with rate 1 and no clipping."""
    model = tiny_model()
    params = list(model.parameters())
    cfg = Config(**(dict(temperature=0.8, max_grad_norm=1e9, entropy_coef=0.0) | options))
    before = [p.detach().clone() for p in params]
    logs = update(model, reference, torch.optim.SGD(params, lr=1.0), params, *batch, cfg, 6, "cpu")
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, params)]), logs


@pytest.mark.parametrize("options", [dict(loss_type="dapo"), dict(loss_type="grpo"), dict(loss_type="dr_grpo"),
                                     dict(entropy_coef=0.1), dict(beta=0.5)])
def test_the_gradient_does_not_depend_on_the_micro_batches(batch, options):
    reference = tiny_model(seed=1) if "beta" in options else None
    whole, logs = gradient_of_update(batch, reference, **options)
    assert whole.abs().max() > 1e-3
    for size in (1, 2, 3, 8):
        part, part_logs = gradient_of_update(batch, reference, micro_batch_size=size, **options)
        torch.testing.assert_close(part, whole, atol=2e-6, rtol=1e-4)
        assert part_logs == pytest.approx(logs, rel=1e-4, abs=1e-6)


def test_a_gpu_gets_as_many_rows_as_fit(batch, monkeypatch):
    rollouts, _ = batch
    assert rows_that_fit(rollouts, "cpu") == 8
    monkeypatch.setattr("rollouts.CUDA_TOKENS", 3 * rollouts.tokens.shape[1] + 1)
    assert rows_that_fit(rollouts, "cuda:1") == 3
    monkeypatch.setattr("rollouts.CUDA_TOKENS", 1)
    assert rows_that_fit(rollouts, torch.device("cuda")) == 1


def test_one_update_is_reinforce_by_hand(batch):
    rollouts, adv = batch
    model = tiny_model()
    total = 0.0
    for b in range(8):
        row = rollouts.tokens[b, : rollouts.length[b]]
        logp = (model.logits(model(row[None]))[0] / 0.8).log_softmax(-1)
        for t in range(int(rollouts.prompt_len[b]), len(row)):
            total = total - adv[b, t] * logp[t - 1, row[t]]
    (total / rollouts.mask().sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient_of_update(batch)[0], expected, atol=1e-5, rtol=1e-4)


def test_the_ratio_is_exactly_one_until_the_first_step(batch, monkeypatch):
    ratios, original = [], train_rl.policy_loss
    monkeypatch.setattr(train_rl, "policy_loss", lambda logprob, old, *rest: (
        ratios.append((logprob - old).exp().detach()), original(logprob, old, *rest))[1])
    _, logs = gradient_of_update(batch, num_iterations=3, micro_batch_size=4)
    assert all((r == 1).all() for r in ratios[:2]) and all((r != 1).any() for r in ratios[2:]) and len(ratios) == 6
    assert logs["ratio/first_max"] == 1.0 and logs["sampling/sampling_logp_difference/max"] < 1e-5


def test_a_sampler_at_another_temperature_is_seen(batch):
    _, logs = gradient_of_update(batch, temperature=1.0)
    assert logs["sampling/sampling_logp_difference/mean"] > 0.01


# ----------------------------------------------------------------------------------------------------
# train()


@pytest.fixture
def start(tmp_path, tokenizer, monkeypatch):
    """A policy and a verifier with a random head, and train() on the toy task."""
    save_model(tmp_path / "policy", tiny_model(), tokenizer)
    verifier = Verifier(tiny_model(seed=1), fingerprint=tokenizer.fingerprint)
    torch.nn.init.normal_(verifier.head.weight, generator=torch.Generator().manual_seed(0))
    (tmp_path / "verifier").mkdir()
    save_verifier(tmp_path / "verifier", verifier, tokenizer, {})
    monkeypatch.setattr(train_rl, "get_task", lambda cfg: ToyTask())

    def run(name, **options):
        small = dict(policy=str(tmp_path / "policy"), run_dir=str(tmp_path / name), steps=3, num_prompts=4,
                     num_generations=4, eval_problems=4, eval_steps=3, device="cpu")
        train_rl.train(Config(**(small | options)))
        return load_file(tmp_path / name / "step_000003" / "model.safetensors"), read_metrics(tmp_path / name)

    run.verifier = str(tmp_path / "verifier")
    return run


def test_alpha_zero_is_the_outcome_run_bit_for_bit(start, tmp_path):
    outcome, rows = start("outcome", reward="outcome")
    watched, _ = start("watched", reward="outcome", verifier=start.verifier)
    zero, zero_rows = start("zero", reward="pav", alpha=0.0, verifier=start.verifier)
    paid, _ = start("paid", reward="pav", alpha=1.0, verifier=start.verifier)
    initial = load_file(tmp_path / "policy" / "model.safetensors")
    for name in outcome:
        assert torch.equal(outcome[name], zero[name]) and torch.equal(outcome[name], watched[name]), name
    assert any(not torch.equal(outcome[n], initial[n]) for n in initial)
    assert any(not torch.equal(outcome[n], paid[n]) for n in initial)
    assert [r.get("reward") for r in rows] == [r.get("reward") for r in zero_rows]
    assert json.loads((tmp_path / "zero" / "summary.json").read_text())["episodes"] == 48


def test_scoring_a_batch_is_one_forward_pass_of_the_verifier(start, monkeypatch):
    """Every step of every rollout: 3 training batches of 16, and the evaluations before and after."""
    batches, forward = [], Verifier.forward
    counted = lambda self, tokens, length: batches.append(len(tokens)) or forward(self, tokens, length)  # noqa: E731
    monkeypatch.setattr(Verifier, "forward", counted)
    start("counted", reward="pav", verifier=start.verifier)
    assert batches == [4, 16, 16, 16, 4]


def test_adams_epsilon_decides_what_a_small_gradient_is_worth(start, tmp_path, monkeypatch):
    """A bonus a thousand times smaller moves the policy as far, unless epsilon stands above its gradient."""
    monkeypatch.setattr(ToyTask, "grade", lambda self, problem, completion: 0.0)  # the bonus is all there is
    initial = load_file(tmp_path / "policy" / "model.safetensors")

    def moved(alpha, epsilon):
        weights, _ = start(f"{alpha}_{epsilon}", reward="pav", alpha=alpha, adam_epsilon=epsilon, verifier=start.verifier,
                           guards=["center"])
        return float(sum((weights[n] - initial[n]).square().sum() for n in initial)) ** 0.5

    assert moved(1e-3, 1e-12) == pytest.approx(moved(1.0, 1e-12), rel=0.3)
    assert moved(1e-3, 1e-2) < 0.02 * moved(1.0, 1e-2)


def test_the_waterfall_adds_up_to_the_step(start):
    _, rows = start("timed", reward="pav", verifier=start.verifier)
    names = {"generate", "grade", "verify", "logprob", "backward", "update", "evaluate", "other"}
    for row in rows[1:]:
        seconds = {k.removeprefix("timing/"): v for k, v in row.items() if k.startswith("timing/")}
        assert seconds.keys() == names and all(v > 0 for k, v in seconds.items() if k != "evaluate")
        assert sum(seconds.values()) == pytest.approx(row["step_time"], abs=1e-5)  # metrics are rounded to 1e-6
        assert (seconds["evaluate"] > 0) == ("eval/accuracy" in row)


def test_groups_stay_with_their_own_gold(start, monkeypatch):
    """A stand-in for generate() answers prompts that begin with an even digit, all samples alike: with the right
    gold every group agrees, and the mean reward is the share of such prompts. Tiled prompts would mix groups."""
    seen = []

    def answer(model, prompts, **_):
        seen.append(prompts)
        return make_rollouts(prompts, [[p[1] if p[0] % 2 == 0 else (p[1] + 1) % 10, EOS] for p in prompts])

    monkeypatch.setattr(train_rl, "generate", answer)
    _, rows = start("aligned", reward="outcome")
    steps = [p for p in seen if len(p) == 16]
    for prompts, row in zip(steps, rows[1:]):
        groups = [prompts[i : i + 4] for i in range(0, 16, 4)]
        assert all(g == [g[0]] * 4 for g in groups) and len({tuple(g[0]) for g in groups}) == 4
        assert row["frac_reward_zero_std"] == 1.0
        assert row["rewards/outcome/mean"] == sum(p[0] % 2 == 0 for p in prompts) / 16
    assert len(steps) == 3 and len({row["rewards/outcome/mean"] for row in rows[1:]} | {0.0, 1.0}) > 2


def test_every_epoch_takes_each_problem_once_in_its_own_order():
    steps = [batch_indices(10, 5, step, 3, "rl epoch") for step in range(1, 5)]
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert len(batch_indices(3, 5, 1, 3, "rl epoch")) == 5  # fewer problems than prompts: they repeat


def test_an_epoch_is_shuffled_once_and_not_once_a_prompt(monkeypatch):
    calls = []
    monkeypatch.setattr(seeds, "shuffled", lambda n, *purpose: calls.append(purpose) or list(range(n)))
    for step in range(1, 4):
        batch_indices(1000, 64, step, 123456, "rl epoch")
    assert calls == [(123456, "rl epoch", 0)]


def test_a_constant_verifier_needs_no_folder(start):
    _, rows = start("constant", reward="pav", verifier="constant")
    assert rows[1]["verifier/final_value"] == 0.5 and "eval/verifier_score" not in rows[-1]


def test_best_of_k_values_are_compared_with_accuracy_as_values_of_one_sample(start, tmp_path):
    """A verifier of Best-of-4: its score of an evaluation is 1 - (1-V)^(1/4), the value of a single sample."""
    _, plain = start("plain", reward="outcome", verifier=start.verifier)
    path = tmp_path / "verifier/verifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(prover_k=4)))
    _, best = start("best", reward="outcome", verifier=start.verifier)
    assert best[0]["eval/verifier_score"] == pytest.approx(plain[0]["eval/verifier_score"], abs=2e-6)


def test_rollouts_end_where_evaluations_end(start, monkeypatch):
    """With worked examples in the prompt a task has stop ids beside EOS; every call of generate() is given them."""
    stops = []
    original = train_rl.generate
    monkeypatch.setattr(ToyTask, "stop_ids", lambda self, tokenizer: [7, EOS], raising=False)
    for module in (train_rl, watch):
        monkeypatch.setattr(module, "generate", lambda *a, **o: stops.append(o["stop_ids"]) or original(*a, **o))
    start("stops", reward="outcome")
    assert len(stops) == 5 and all(s == [7, EOS] for s in stops)


def test_no_script_stops_at_eos_alone():
    """Everything that completes a task's prompts asks the task where a completion ends."""
    root = Path(train_rl.__file__).parent
    files = [p for p in root.rglob("*.py") if p.relative_to(root).parts[0] not in ("tests", "bench", ".venv-ci", "runs")]
    assert len(files) > 40
    offenders = [p.name for p in files if "stop_ids=tokenizer.eos_ids" in p.read_text()]
    assert offenders == []
