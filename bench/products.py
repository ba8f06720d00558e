"""The kernels on the CPU against plain PyTorch: matrix products, fused log-prob, sampler. float32 throughout.

    python -m bench.products                # about 6 minutes on 2 cores (--tiny: does it run?)

products   kernels.product.matmul_nt (oneDNN) against x @ w.T (MKL in PyTorch's wheels; what nn.Linear calls), for the
           matrices of SmolLM2-135M and of the tiny model: forward, both gradients, and "packed": the forward of
           generation, where the weight lies in oneDNN's layout already (packing itself is not timed here).
logprob    kernels.linear_logprob, forward and backward, against log_softmax of whole logits with autograd: "plain"
           (log-prob only) and "entropy" (as ours always returns it). Time, and peak memory above the inputs (Linux).
sampler    kernels.linear_draw with a packed weight and random numbers drawn before, as in generate(), against
           softmax, torch.multinomial and the log of the drawn probability; the head's product is in both.
Not compared: bfloat16, CUDA, torch.compile, chunked cross-entropies of other libraries.
"""

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from bench import timing
from infra.cli import opt, parse, script
from infra.seeds import generator
from kernels import linear_draw, linear_logprob, packed_weights, philox_uniform
from kernels.product import matmul_nt

# name, inputs K, outputs N of each matrix; rows M of one decoding step and of one training or prefill batch
MODELS = {
    "smollm2": ([("qkv", 576, 960), ("out", 576, 576), ("gate_up", 576, 3072), ("down", 1536, 576)], (64, 2048)),
    "smollm2 head": ([("head", 576, 49152)], (64, 1024)),
    "tiny": ([("qkv", 64, 192), ("out", 64, 64), ("gate_up", 64, 340), ("down", 170, 64)], (128, 1536)),
}


@dataclass
class Config(timing.Flags):
    threads: list = opt([1, 2], "CPU threads, one comparison each", "timing")
    repeats: int = opt(7, "rounds", "timing", low=1)
    memory_of: str = opt("", "only print the peak memory of one side of logprob, in MiB", "timing")
    out: str = opt("bench/results/cpu/products.json", "where the numbers go", "timing")


def compare(cfg, label, ours, theirs):
    result = timing.compare_calls(cfg, ours, theirs, 0.0 if cfg.tiny else 0.15)
    timing.line(label, result, lambda seconds: 1000 * seconds)
    return result


def one_product(cfg, gen, label, M, K, N, packed):
    """One matrix: weight [N,K], x [M,K], dy [M,N]. Decoding has a packed forward, training a forward and gradients."""
    w, x, dy = (torch.randn(shape, generator=gen) for shape in ((N, K), (M, K), (M, N)))
    ways = {"forward": (lambda: matmul_nt(x, w), lambda: x @ w.t()),
            "d_input": (lambda: matmul_nt(dy, w.t()), lambda: dy @ w),
            "d_weight": (lambda: matmul_nt(dy.t(), x.t()), lambda: dy.t() @ x)}
    if packed:
        with packed_weights([w], M):
            return {f"{label} packed": compare(cfg, f"{label} packed", *ways["forward"])}
    return {f"{label} {way}": compare(cfg, f"{label} {way}", *sides) for way, sides in ways.items()}


def products(cfg, gen):
    out, models = {}, dict(tiny=MODELS["tiny"]) if cfg.tiny else MODELS
    for model, (matrices, (decoding, training)) in models.items():
        for (name, K, N), M in product(matrices, (1, decoding, training)):
            label = f"{model.split()[0]} {name} {M}x{K}x{N}"
            out |= one_product(cfg, gen, label, M, K, N, packed=training != M)
    return out


def head_inputs(cfg, gen, N=1024):
    """hidden [N,D], weight [V,D] of SmolLM2's head, both with gradients, targets [N]."""
    D, V = (16, 64) if cfg.tiny else (576, 49152)
    hidden, weight = torch.randn(N, D, generator=gen), torch.randn(V, D, generator=gen) / D**0.5
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,), generator=gen)


def logprob_step(side, hidden, weight, target):
    """Loss and gradients of one side: "ours", "plain" or "entropy". The loss uses what the side computes."""
    hidden.grad = weight.grad = None
    if side == "ours":
        logprob, _, entropy = linear_logprob(hidden, weight, target, 1.0)
        loss = -(logprob + 0.003 * entropy).mean()
    else:
        log_p = (hidden @ weight.t()).log_softmax(-1)
        loss = -log_p.gather(1, target[:, None]).mean()
        if side == "entropy":
            loss = loss + 0.003 * (log_p.exp() * log_p).sum(-1).mean()
    loss.backward()
    return loss.item()


def peak_memory(cfg, side):
    """MiB that a step adds to the process's peak. The gradients of the inputs (110 MiB) are among them."""
    inputs = head_inputs(cfg, generator(cfg.seed, "bench"))
    logprob_step(side, *head_inputs(replace(cfg, tiny=True), generator(cfg.seed, "bench"), 16))  # libraries load now
    peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024  # noqa: E731
    before = peak()  # ru_maxrss would not do: a child starts with its parent's
    logprob_step(side, *inputs)
    return peak() - before


def logprob(cfg, gen):
    inputs, out = head_inputs(cfg, gen), {}
    for side in ("plain", "entropy"):
        ours, theirs = (partial(logprob_step, s, *inputs) for s in ("ours", side))
        out[side] = compare(cfg, f"logprob against {side}", ours, theirs)
    out["loss_difference"] = abs(logprob_step("entropy", *inputs) - logprob_step("ours", *inputs))
    for side in ("ours", "plain", "entropy"):  # each in a fresh process
        command = [sys.executable, "-m", "bench.products", f"--memory-of={side}", *["--tiny"] * cfg.tiny]
        out[f"{side}_peak_mib"] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{'logprob peak memory, ' + side:<34}{out[f'{side}_peak_mib']:>14.0f} MiB")
    return out


def plain_sample(hidden, weight):
    token = (p := (hidden @ weight.t()).softmax(-1)).multinomial(1)
    return token, p.gather(1, token).log()


def sampler(cfg, gen):
    out = {}
    for rows in (1, 64):
        hidden, weight, _ = (x.detach() for x in head_inputs(cfg, gen, rows))
        uniform = philox_uniform(cfg.seed, torch.arange(len(hidden)), torch.tensor(0))

        with torch.no_grad(), packed_weights([weight], rows):
            ours = partial(linear_draw, hidden, weight, 1.0, uniform)
            out[f"rows_{rows}"] = compare(cfg, f"sampler, {rows} rows", ours, partial(plain_sample, hidden, weight))
    return out


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.memory_of:
        return print(peak_memory(cfg, cfg.memory_of))
    if cfg.tiny:
        cfg.threads, cfg.repeats = [1], 1
    result = timing.about("bench.products", argv, cfg)
    for n in cfg.threads:
        torch.set_num_threads(n)
        timing.header(f"{n} thread{'s' * (n > 1)}: rows x inputs x outputs", "ms")
        gen = generator(cfg.seed, "bench")
        result[f"threads_{n}"] = {part.__name__: part(cfg, gen) for part in (products, logprob, sampler)}
    timing.write(cfg.out, result)


if __name__ == "__main__":
    script(main)
