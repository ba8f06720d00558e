"""How time and memory grow: each cost against tokens, batch, vocabulary or steps, with the exponent fitted to it.

    python -m bench.growth                  # about 3 minutes on one core (--tiny: does it run?)

A cost that is a straight line has exponent 1, one that does not depend on the axis 0; fixed costs of a call pull an
exponent down, attention (its share grows with the square of the length) pulls one up.

logprob    kernels.linear_logprob, forward and backward         against tokens N and vocabulary V
generate   sample.generate, different prompts                   against batch, new tokens and vocabulary
update     train_rl.update: forward, backward, optimizer        against batch and tokens a sequence
rl step    generation, grading and update of the planted task   against prompts a step (8 samples of each)
verify     pav.step_values                                      against batch, tokens and steps a solution
run        memory of a whole train_rl.train, at several steps: a line that rises is a leak

One thread. Seconds are CPU seconds of this process, the least of some repeats: other processes disturb them little. Memory
is what a call adds to the process's peak (Linux; the C library hands back what is free before each call).
Random weights, width 128, 2 layers. No peer: this is about the shape of the curves.
"""

import ctypes
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import train_rl
from bench import timing
from bench.rl_step import Config as StepConfig
from bench.rl_step import Ours, starting_model
from infra.cli import opt, parse, script
from infra.seeds import generator
from kernels import linear_logprob
from model import Transformer, init_weights
from open_weights.families import Config as Shape
from rollouts import Rollouts
from sample import generate
from verifier import Verifier, step_values


@dataclass
class Config(timing.Flags):
    budget: float = opt(1.5, "CPU seconds a point may take to repeat itself (at least one repeat)", "timing", above=0)
    run_steps: int = opt(1000, "steps of the run whose memory is watched; at least 10", "what", low=10)
    out: str = opt("bench/results/cpu/growth.json", "where the numbers go", "timing")


def hand_back():
    """Give the C library's free memory to the system, where it knows how (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim and trim(0)


def resident(field="VmRSS"):
    """MiB of this process: now, or at its peak (VmHWM); None where /proc does not say."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(field + ":")[1].split()[0]) / 1024 if status.exists() else None


def peak_of(call):
    """MiB that call() adds to the resident memory at its peak, or None."""
    if not Path("/proc/self/clear_refs").exists():
        return call() and None
    hand_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident()
    call()
    return resident("VmHWM") - before


def seconds_of(call, budget):
    """The least CPU seconds of a call."""
    times = []
    while not times or sum(times) + min(times) < budget:
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def exponent(x, y):
    """Slope of log y over log x by least squares: y ~ x^slope."""
    if None in y or min(y) <= 0:
        return None
    x, y = ([math.log(v) for v in values] for values in (x, y))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def transformer(cfg, vocab=512, context=1024):
    shape = Shape(vocab_size=vocab, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=4, head_dim=32, max_position_embeddings=context)  # fmt: skip
    return init_weights(Transformer(shape), generator(cfg.seed, "bench")).requires_grad_(True)


def logprob(cfg, tokens=1024, vocabulary=4096):
    gen = generator(cfg.seed, "bench")
    hidden, weight = (torch.randn(n, 128, generator=gen).requires_grad_() for n in (tokens, vocabulary))
    target = torch.randint(vocabulary, (tokens,), generator=gen)

    def call():
        hidden.grad = weight.grad = None
        linear_logprob(hidden, weight, target, 1.0)[0].sum().backward()

    return call


def generation(cfg, batch=64, tokens=64, vocabulary=512):
    model, gen = transformer(cfg, vocabulary), generator(cfg.seed, "bench")
    prompts = torch.randint(vocabulary, (batch, 8), generator=gen).tolist()
    return lambda: generate(model, prompts, max_new_tokens=tokens, temperature=1.0, seed=cfg.seed, stop_ids=[], slots=batch)


def rollouts(cfg, batch, tokens, vocabulary=512):
    """Completions of random tokens after prompts of 8."""
    ids = torch.randint(vocabulary, (batch, 8 + tokens), generator=generator(cfg.seed, "bench"))
    prompt, length = torch.full((batch,), 8), torch.full((batch,), 8 + tokens)
    return Rollouts(ids, prompt, length, torch.zeros(ids.shape), ["length"] * batch)


def update(cfg, batch=64, tokens=64):
    model, rolled = transformer(cfg), rollouts(cfg, batch, tokens)
    params = list(model.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-6, fused=True)
    adv = torch.randn(rolled.tokens.shape, generator=generator(cfg.seed, "advantage")) * rolled.mask()
    settings = train_rl.Config(num_generations=8)
    return lambda: train_rl.update(model, None, optimizer, params, rolled, adv, settings, tokens, "cpu")


def verify(cfg, batch=64, tokens=64, steps=8):
    verifier, rolled = Verifier(transformer(cfg)).requires_grad_(False), rollouts(cfg, batch, tokens)
    ends = torch.linspace(8, 8 + tokens, steps + 1).round().long().expand(batch, -1).contiguous()
    return lambda: step_values(verifier, rolled.tokens, ends)


def rl_step(cfg, where, prompts=16):
    """The planted task with a learning rate that changes nothing, so that every repeat does the same."""
    folder, task = where
    ours = Ours(StepConfig(seed=cfg.seed), folder, task)
    ours.cfg = replace(ours.cfg, num_prompts=prompts)
    for group in ours.optimizer.param_groups:
        group["lr"] = 1e-12
    return ours.step


def curve(cfg, name, axis, values, make, expected):
    """One cost along one axis -> seconds and MiB at each value, and their exponents; prints a row."""
    seconds, memory = [], []
    for value in values:
        call = make(**{axis: value})
        call()  # warms up: buffers, compiled products
        memory.append(peak_of(call))
        seconds.append(seconds_of(call, cfg.budget))
    slopes = [exponent(values, y) for y in (seconds, memory)]
    row = dict(cost=name, axis=axis, values=values, seconds=seconds, expected_exponent=expected, time_exponent=slopes[0],
               peak_mib=memory, memory_exponent=slopes[1])
    show = lambda v, form: "-" if v is None else format(v, form)  # noqa: E731
    print(f"{name:<9} {axis:<11}{values[0]:>6} ..{values[-1]:>6}{1e3 * seconds[0]:>10.4g}{1e3 * seconds[-1]:>10.4g}"
          f"{show(slopes[0], '8.2f')}  ({expected}){show(memory[0], '9.1f')}{show(memory[-1], '9.1f')}"
          f"{show(slopes[1], '8.2f')}", flush=True)
    return row


def memory_of_run(cfg, folder):
    """Resident MiB of train_rl.train after some of its steps: of the policy in `folder`, outcome rewards."""
    watched, steps = {}, [max(1, cfg.run_steps * i // 10) for i in range(1, 11)]

    class Watching(train_rl.Run):
        def log(self, step, **values):
            super().log(step, **values)
            if step in steps:
                hand_back()
                watched[step] = resident()

    plain, train_rl.Run = train_rl.Run, Watching
    try:
        with tempfile.TemporaryDirectory() as run:
            train_rl.train(train_rl.Config(reward="outcome", policy=folder, run_dir=run, steps=cfg.run_steps, num_prompts=2,
                                           num_generations=4, eval_steps=cfg.run_steps, eval_problems=8, device="cpu",
                                           save_steps=max(1, cfg.run_steps // 5), threads=1, seed=cfg.seed))
    finally:
        train_rl.Run = plain
    first, last = watched[steps[0]], watched[steps[-1]]
    if first is not None:
        print(f"a run of {cfg.run_steps} steps: {first:.1f} MiB at step {steps[0]}, {last:.1f} at the end")
    return dict(steps=steps, resident_mib=[watched[s] for s in steps], grown_mib=None if first is None else last - first)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    torch.set_num_threads(1)
    if cfg.tiny:
        cfg.budget, cfg.run_steps = 1e-6, 10
    few = (lambda a, b, *_: [1 + a // 16, 2 + b // 16]) if cfg.tiny else (lambda *v: list(v))
    result = timing.about("bench.growth", argv, cfg)
    print(f"{'cost':<9} {'axis':<11}{'range':>14}{'ms':>10}{'ms':>10}{'exponent':>9} (line){'MiB':>7}{'MiB':>9}{'exponent':>9}")
    with tempfile.TemporaryDirectory() as where:
        folder, task = starting_model(StepConfig(tiny=True, seed=cfg.seed), where)
        on_task = lambda **k: rl_step(cfg, (folder, task), **k)  # noqa: E731
        plan = [("logprob", "tokens", few(512, 1024, 2048, 4096), logprob, 1),
                ("logprob", "vocabulary", few(2048, 4096, 8192, 16384), logprob, 1),
                ("generate", "batch", few(64, 128, 256, 512), generation, 1),
                ("generate", "tokens", few(64, 128, 256, 512), generation, 1),
                ("generate", "vocabulary", few(2048, 4096, 8192, 16384), generation, 1),
                ("update", "batch", few(32, 64, 128, 256), update, 1),
                ("update", "tokens", few(32, 64, 128, 256), update, 1),
                ("rl step", "prompts", few(16, 32, 64, 128), on_task, 1),
                ("verify", "batch", few(64, 128, 256, 512), verify, 1),
                ("verify", "tokens", few(64, 128, 256, 512), verify, 1),
                ("verify", "steps", few(4, 8, 16, 32), verify, 0)]
        result["curves"] = [
            curve(cfg, name, axis, values, f if f is on_task else lambda f=f, **k: f(cfg, **k), expected)
            for name, axis, values, f, expected in plan]
        result["run"] = memory_of_run(cfg, folder)
    timing.write(cfg.out, result)


if __name__ == "__main__":
    script(main)
