"""The ladder of kernels/steps.py, and that every kernel file can be run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import reference as exact_logprob

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton has no wheel for this machine")

from kernels import steps  # noqa: E402

ROOT, DEVICE = Path(__file__).parent.parent, "cuda" if torch.cuda.is_available() else "cpu"


def example(N, V, D, dtype=torch.float32):
    g = torch.Generator().manual_seed(N)
    hidden, weight, target = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g), torch.randint(V, (N,), generator=g)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), target.to(DEVICE)


@pytest.mark.parametrize("N, V, D", [(1, 1, 8), (9, 300, 40), (70, 130, 72)])
@pytest.mark.parametrize("step", steps.FORWARD)
def test_every_step_gives_the_exact_log_prob(step, N, V, D):
    hidden, weight, target = example(N, V, D)
    exact, _, _ = exact_logprob(hidden, weight, target, 0.7)
    torch.testing.assert_close(steps.FORWARD[step](hidden, weight, target, 0.7).double(), exact, atol=2e-5, rtol=1e-5)


def test_the_last_step_gives_the_gradients_of_the_first():
    hidden, weight, target = example(9, 300, 40)
    for a, b in zip(*(steps.gradients(f, hidden, weight, target, 0.7) for f in (steps.loss_inside, steps.loss_of_whole))):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["logprob_triton", "sampling_triton", "attention_triton", "layer_triton", "steps"])
def test_a_kernel_file_can_be_run(name):
    """It says on what machine, and its errors are small: the second column."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", f"kernels.{name}"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line[44:].split() for line in done.stdout.splitlines()[2:] if len(line) > 60]
    assert len(rows) >= 2 and all(float(error) < 2e-2 and float(ms) > 0 for error, ms, *_ in rows), done.stdout
