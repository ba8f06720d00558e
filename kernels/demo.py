"""What the kernels' files share when they are run: error, milliseconds, floor, share of it, on the machine at hand.

    python -m kernels.logprob_triton      python -m kernels.sampling_triton      python -m kernels.attention_triton
    python -m kernels.layer_triton        python -m kernels.steps

On a GPU at the shapes of real models; elsewhere interpreted at toy shapes, where the error counts and the time is Python's.
"""

import os
import statistics
import sys
import time

import torch


def start(module, argv=()):
    """Without a GPU: begin again under Triton's interpreter, which must be chosen before triton is imported. -> device, dtype."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", module, *argv])
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: interpreted, times mean nothing"
    print(f"{where}\n{'':<44}{'error':>10}{'ms':>10}{'floor':>10}{'share':>8}")
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def seconds(call):
    """Median time of a call: of 20 on a GPU, by its own clock; of one elsewhere."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    times = []
    for i in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times += [begin.elapsed_time(end) / 1e3] * (i > 2)
    return statistics.median(times)


def copy_seconds(count):
    """The time in which this machine reads `count` bytes, at the speed of a large copy."""
    x, y = torch.empty(2, 2**28 if torch.cuda.is_available() else 2**20, device="cuda" if torch.cuda.is_available() else "cpu")
    return seconds(lambda: y.copy_(x)) * count / (2 * x.nbytes)


def show(name, error, call, floor):
    """One line. error: a float; floor: seconds that nobody can beat."""
    took = seconds(call)
    beside = f"{1e3 * floor:>10.3f}{floor / took:>8.2f}" if torch.cuda.is_available() else ""
    print(f"{name:<44}{error:>10.1e}{1e3 * took:>10.3f}{beside}", flush=True)


def randn(*shape, device, dtype, seed=0, scale=1.0):
    """Normal numbers, drawn on the device that they are for."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)
