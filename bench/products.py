"""The kernels on the CPU against plain PyTorch: matrix products, fused log-prob, sampler.

    python -m bench.products                # about 5 minutes on 2 cores
    python -m bench.products --tiny         # small shapes: does it run?

products   kernels.product.matmul_nt (oneDNN) against x @ w.T (MKL in PyTorch's wheels; what nn.Linear calls), for the
           matrices of SmolLM2-135M and of the tiny model: forward, both gradients, and "packed": the forward of
           generation, where the weight lies in oneDNN's layout already (packing itself is not timed here).
logprob    kernels.linear_logprob, forward and backward to hidden states and weight, against log_softmax of whole logits
           with autograd: "plain" (log-prob only) and "entropy" (with the entropy, as ours always returns it). Time, and
           the peak memory above the inputs, each side in a fresh process (resident set, so Linux only).
sampler    kernels.linear_sample with a packed weight, as generate() calls it, its random numbers drawn before (as
           there), against softmax, torch.multinomial and the log of the drawn probability, the head's product in both.

float32 throughout. Not compared: bfloat16, CUDA, torch.compile, chunked cross-entropies of other libraries.
"""

import resource
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import torch

from bench import timing
from common import generator, opt, parse, script
from kernels import linear_logprob, linear_sample, packed_weights, philox_uniform
from kernels.product import matmul_nt

# name, inputs K, outputs N of each matrix; rows M of one decoding step and of one training or prefill batch
MODELS = {
    "smollm2": ([("qkv", 576, 960), ("out", 576, 576), ("gate_up", 576, 3072), ("down", 1536, 576)], (64, 2048)),
    "smollm2 head": ([("head", 576, 49152)], (64, 1024)),
    "tiny": ([("qkv", 64, 192), ("out", 64, 64), ("gate_up", 64, 340), ("down", 170, 64)], (128, 1536)),
}
LOGPROB_ROWS = 1024


@dataclass
class Config:
    parts: list = opt(["products", "logprob", "sampler"], "which", "what", choices=["products", "logprob", "sampler"])
    threads: list = opt([1, 2], "CPU threads, one comparison each", "timing")
    repeats: int = opt(7, "rounds", "timing", low=1)
    wait: float = opt(0.0, "seconds to wait for a quiet machine", "timing", low=0)
    seed: int = opt(0, "fixes the numbers", "timing", low=0)
    tiny: bool = opt(False, "small shapes, one round", "timing")
    memory_of: str = opt("", "only print the peak memory of one side of logprob, in MiB", "timing")
    out: str = opt("bench/results/products.json", "where the numbers go", "timing")


def compare(cfg, label, ours, theirs):
    with timing.Others() as others:
        times = timing.alternate(dict(ours=ours, theirs=theirs), cfg.repeats, 0.0 if cfg.tiny else 0.1)
    result = timing.compare(times, others)
    timing.line(label, result, lambda seconds: 1000 * seconds)
    return result


def product(cfg, gen, label, M, K, N, packed):
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
    out = {}
    for model, (matrices, (decoding, training)) in MODELS.items():
        if cfg.tiny and model != "tiny":
            continue
        for name, K, N in matrices:
            for M in (1, decoding, training):
                label = f"{model.split()[0]} {name} {M}x{K}x{N}"
                out |= product(cfg, gen, label, M, K, N, packed=M != training)
    return out


def head_inputs(cfg, gen, N):
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
    """MiB that a step adds to the process's peak: gradients of the inputs (108 MiB of weight) are among them."""
    inputs = head_inputs(cfg, generator(cfg.seed, "bench"), LOGPROB_ROWS)
    small = [x[:16].detach().requires_grad_(x.is_floating_point()) for x in (inputs[0], inputs[1], inputs[2] * 0)]
    logprob_step(side, *small)  # libraries load now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    logprob_step(side, *inputs)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def logprob(cfg, gen):
    inputs, out = head_inputs(cfg, gen, LOGPROB_ROWS), {}
    for side in ("plain", "entropy"):
        out[side] = compare(cfg, f"logprob against {side}", partial(logprob_step, "ours", *inputs),
                            partial(logprob_step, side, *inputs))
        out[side]["loss_difference"] = abs(logprob_step("entropy", *inputs) - logprob_step("ours", *inputs))
    for side in ("ours", "plain", "entropy"):
        command = [sys.executable, "-m", "bench.products", "--memory-of", side, *(["--tiny"] if cfg.tiny else [])]
        out[f"{side}_peak_mib"] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{'logprob peak memory, ' + side:<34}{out[f'{side}_peak_mib']:>14.0f} MiB")
    return out


def plain_sample(hidden, weight):
    p = (hidden @ weight.t()).softmax(-1)
    token = p.multinomial(1)
    return token, p.gather(1, token).log()


def sampler(cfg, gen):
    out = {}
    for rows in (1, 64):
        hidden, weight, _ = (x.detach() for x in head_inputs(cfg, gen, rows))
        uniform = philox_uniform(cfg.seed, torch.arange(len(hidden)), torch.tensor(0))

        with torch.no_grad(), packed_weights([weight], rows):
            out[f"rows_{rows}"] = compare(cfg, f"sampler, {rows} rows", partial(linear_sample, hidden, weight, 1.0, uniform),
                                          partial(plain_sample, hidden, weight))
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
        result[f"threads_{n}"] = {f.__name__: f(cfg, generator(cfg.seed, "bench"))
                                  for f in (products, logprob, sampler) if f.__name__ in cfg.parts}
    timing.write(cfg.out, result)


if __name__ == "__main__":
    script(main)
