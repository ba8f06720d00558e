"""bfloat16 parameters with float32 masters learn as float32 does, and a resumed run goes on to the bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_sft
from infra.optimizer import optimizer_for
from infra.runs import latest_checkpoint, load_state, save_checkpoint

KINDS = [torch.optim.Adam, torch.optim.AdamW]
SETTINGS = dict(lr=1e-6, betas=(0.9, 0.99))


def problem(dtype, seed=0):
    """A layer, and a function of the step that sets its gradients: least squares on one batch after the other."""
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(32, 16, generator=g) * 0.1).bfloat16().to(dtype).requires_grad_()
    gain = torch.ones(32, dtype=dtype).requires_grad_()
    truth = torch.randn(32, 16, generator=g)

    def gradients(step):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        y = (x.to(dtype) @ weight.t()) * gain
        weight.grad, gain.grad = torch.autograd.grad((y.float() - x @ truth.t()).square().mean(), [weight, gain])

    return [weight, gain], gradients


def run(optimizer, gradients, steps):
    for step in steps:
        gradients(step)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_200_steps_of_a_millionth_move_the_masters_as_float32_moves_the_weights(kind):
    """And without masters they are lost."""
    exact, gradients = problem(torch.float32)
    start = [p.detach().clone() for p in exact]
    optimizer = optimizer_for(kind, exact, **SETTINGS)
    assert type(optimizer) is kind
    run(optimizer, gradients, range(200))
    params, gradients = problem(torch.bfloat16)
    optimizer = optimizer_for(kind, params, **SETTINGS)
    run(optimizer, gradients, range(200))
    lost, gradients = problem(torch.bfloat16)
    run(kind(lost, **SETTINGS), gradients, range(200))
    for p, e, s, without in zip(params, exact, start, lost):
        moved, expected = optimizer.state[p]["master"] - s, (e - s).detach()
        assert float((moved - expected).norm() / expected.norm()) < 0.05
        assert torch.equal(p.detach(), optimizer.state[p]["master"].bfloat16())
        assert float((without.detach().float() - s - expected).norm() / expected.norm()) > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_on_equal_gradients_the_masters_are_pytorchs_weights_to_the_bit(kind, fused):
    settings = SETTINGS | dict(lr=1e-2, eps=1e-5, fused=fused, weight_decay=0.1)
    (p, _), _ = problem(torch.bfloat16)
    q = p.detach().float().requires_grad_()
    ours, theirs = optimizer_for(kind, [dict(params=[p])], **settings), kind([q], **settings)
    for step in range(5):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        q.grad = p.grad.float()
        ours.step(), theirs.step()
    assert torch.equal(ours.state[p]["master"], q) and torch.equal(p, q.bfloat16())


def test_a_resumed_run_goes_on_to_the_bit(tmp_path):
    """Of a script: six steps, against three, a kill and three more. The weights are written in bfloat16."""
    def sft(name, steps):
        cfg = train_sft.Config(task="planted", dtype="bfloat16", steps=steps, save_steps=3, num_examples=64, batch_size=8,
                               hidden_size=16, eval_problems=4, threads=1, device="cpu", run_dir=str(tmp_path / name))
        train_sft.train(cfg)
        return {path.name: load_file(path) for path in latest_checkpoint(cfg.run_dir).glob("*.safetensors")}

    whole = sft("whole", 6)
    assert {x.dtype for x in whole["model.safetensors"].values()} == {torch.bfloat16}
    masters = [x for name, x in whole["optimizer.safetensors"].items() if name.endswith(".master")]
    assert masters and all(x.dtype == torch.float32 for x in masters)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/step_000006")
    (tmp_path / "killed/summary.json").unlink(missing_ok=True)
    for name, tensors in sft("killed", 6).items():
        assert all(torch.equal(x, whole[name][key]) for key, x in tensors.items()), name


def test_a_fused_step_count_comes_back_to_the_parameters_device(tmp_path):
    """PyTorch's fused Adam reads it there; a count left on the host would be a wild address on a GPU."""
    (p, _), gradients = problem(torch.float32)
    optimizer = torch.optim.Adam([p], lr=1e-3, fused=True)
    gradients(0)
    optimizer.step()
    folder = save_checkpoint(tmp_path, 1, lambda f: None, optimizer, [p])
    elsewhere = torch.nn.Parameter(torch.empty(p.shape, device="meta"))
    for fused, device in ((True, "meta"), (False, "cpu")):
        other = torch.optim.Adam([elsewhere], lr=1e-3, fused=False)
        other.param_groups[0]["fused"] = fused
        load_state(folder, other, [elsewhere])
        assert other.state[elsewhere]["step"].device.type == device
