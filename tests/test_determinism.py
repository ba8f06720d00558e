"""One command, twice: on a CPU the same bits; on a GPU what docs/determinism.md promises, and the rest is measured."""

import pytest
import torch
from safetensors.torch import load_file
from toy import ToyTask, tiny_model

import train_rl
from infra.runs import latest_checkpoint, read_metrics
from model import save_model, shared_prefixes, token_loss
from sample import generate

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(name, **changes) -> (weights, metrics without the clock) of a few RL steps."""
    monkeypatch.setattr(train_rl, "get_task", lambda cfg: ToyTask())
    save_model(tmp_path / "policy", tiny_model(), ToyTask().tokenizer())

    def run(name, **changes):
        settings = dict(reward="outcome", policy=str(tmp_path / "policy"), run_dir=str(tmp_path / name), num_prompts=3,
                        num_generations=4, steps=4, eval_steps=2, eval_problems=8, threads=1, device="cpu", entropy_coef=0.01)
        train_rl.train(train_rl.Config(**settings | changes))
        rows = [{k: v for k, v in row.items() if not k.startswith(("timing/", "step_time", "tokens_per_second"))}
                for row in read_metrics(tmp_path / name)]
        return load_file(latest_checkpoint(tmp_path / name) / "model.safetensors"), rows

    return run


def same(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_a_seed_fixes_every_bit_on_a_cpu(train):
    first = train("first")
    assert same(first, train("again"))
    assert not same(first, train("other", seed=1))


@CUDA
def test_generation_and_the_loss_repeat_themselves_on_a_gpu():
    model, prompts = tiny_model().cuda(), [[3, 7, 10]] * 8 + [[1, 2, 10]] * 8
    found = []
    for _ in range(2):
        out = generate(model, prompts, max_new_tokens=6, temperature=1.0, seed=3, stop_ids=[11])
        targets = out.mask().cuda()
        hidden_loss = token_loss(model, out.tokens.cuda(), targets, 1.0, lambda lp, entropy: -lp.sum())
        found.append((out.tokens, out.logprob, hidden_loss[0].detach().cpu(), hidden_loss[1].cpu()))
    for a, b in zip(*found):
        assert torch.equal(a, b)


@CUDA
def test_how_far_two_runs_on_a_gpu_drift(train, record_property):
    """Not promised to the bit (atomics in PyTorch's backward): the largest difference is written down, and must be small."""
    (a, rows_a), (b, rows_b) = train("first", device="cuda"), train("again", device="cuda")
    drift = max(float((a[k] - b[k]).abs().max()) for k in a)
    record_property("largest difference of a weight after 4 steps", drift)
    print(f"largest difference of a weight after 4 steps: {drift:.2e}; metrics equal: {rows_a == rows_b}")
    assert drift < 1e-2


@CUDA
def test_shared_prefixes_give_the_same_loss_on_a_gpu():
    model, tokens = tiny_model().cuda(), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 0]])
    length, losses = torch.tensor([4, 4, 3]), []
    targets = ((torch.arange(4) > 0) & (torch.arange(4) < length[:, None])).cuda()
    for share in (None, shared_prefixes(tokens[:, :-1], length - 1)):
        losses.append(token_loss(model, tokens.cuda(), targets, 1.0, lambda lp, entropy: -lp.sum(), share=share)[1])
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
