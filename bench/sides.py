"""What bench/cpu.py times: a process that stays and does what JSON lines on its standard input say.

    python -m bench.sides       # bench/cpu.py starts it, here and in an older commit's tree

bench/cpu.py copies this file into the older tree: so it imports nothing but torch until a case
needs it, and only what has kept its name. A case is a function of `tiny` and a temporary folder
that returns its sides: "ours", and "peer", what others offer for the same.

    ["make", case, tiny, folder, peer?]    -> its sides, run once (the peer's only if asked for)
    ["run", case, side, times]             -> seconds a time: the wall's, the processor's
"""

import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from functools import cache, partial

import torch
import torch.nn.functional as F

KEPT = ExitStack()  # weights that stay packed as long as the process lives
SHARP = 0.05  # a temperature at which most exponentials underflow


def head(N, tiny, small=False):
    """hidden [N,D], weight [V,D], target [N]: SmolLM2's shapes, or small ones; random."""
    V, D = (300, 16) if tiny else (256, 64) if small else (49152, 576)
    N = min(N, 8) if tiny else N
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * D**-0.5
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def cross_entropy(hidden, weight, target, temperature, reduction):
    z = F.linear(hidden, weight)
    return F.cross_entropy(z if temperature == 1 else z / temperature, target, reduction=reduction)


def log_prob(temperature, tiny, folder):
    from kernels import linear_logprob

    hidden, weight, target = head(256, tiny)
    return dict(
        ours=lambda: linear_logprob(hidden, weight, target, temperature)[0],
        peer=lambda: -cross_entropy(hidden, weight, target, temperature, "none"),
    )


def loss(temperature, tiny, folder, N=256, small=False):
    """Mean negative log-prob with both gradients."""
    from kernels import linear_logprob_loss

    hidden, weight, target = head(N, tiny, small)
    inputs = hidden.requires_grad_(), weight.requires_grad_()

    def mean_nll(logprob, entropy):
        return -logprob.sum() / len(target)

    def ours():
        value, *_ = linear_logprob_loss(*inputs, target, temperature, mean_nll)
        return torch.autograd.grad(value, inputs)

    def peer():
        return torch.autograd.grad(cross_entropy(*inputs, target, temperature, "mean"), inputs)

    return dict(ours=ours, peer=peer)


def sampling(temperature, tiny, folder):
    """64 tokens and their log-probs."""
    from kernels import linear_draw, packed_weights, philox_uniform

    hidden, weight, _ = head(64, tiny)
    uniform = philox_uniform(0, torch.arange(len(hidden)), torch.tensor(0))
    KEPT.enter_context(packed_weights([weight], len(hidden)))

    @torch.no_grad()
    def ours():
        return linear_draw(hidden, weight, temperature, uniform)

    @torch.no_grad()
    def peer():
        from bench.peers import eager_draw

        return eager_draw(hidden, weight, temperature)

    return dict(ours=ours, peer=peer)


def rl_step(tiny, folder):
    """bench.rl_step's. TRL's trainer runs in a thread, one step whenever it is asked for one."""
    from bench import rl_step

    cfg = rl_step.Config(tiny=tiny, steps=1000)
    where, task = rl_step.starting_model(cfg, folder)

    class Turn(rl_step.Ours):
        """What TRL's trainer takes for ours: after each of its steps it waits to be asked again."""

        asked = threading.Semaphore(0)
        done = threading.Semaphore(0)

        def step(self):
            self.done.release()
            self.asked.acquire()

    turn = Turn(cfg, where, task)
    train = partial(rl_step.run_theirs, cfg, where, turn, folder)
    thread = threading.Thread(target=train, daemon=True)

    def peer():
        if thread.ident is None:
            thread.start()
        else:
            turn.asked.release()
        if not turn.done.acquire(timeout=300):
            raise RuntimeError("TRL's trainer has stopped")

    return dict(ours=rl_step.Ours(cfg, where, task).step, peer=peer)


def generation(tiny, folder):
    """8 prompts of 24 tokens, 12 new ones each, by SmolLM2 (tiny: a toy), temperature 1."""
    from bench import generate as bench_generate
    from kernels import packed_weights
    from model import load_model, resolve
    from sample import generate

    path = resolve("smollm2")
    if tiny:
        path = bench_generate.tiny_folder(folder, bench_generate.Config())
    model, _ = load_model(path)
    prompts = [[(7 * i + 13 * j) % model.cfg.vocab_size for j in range(24)] for i in range(8)]
    options = dict(max_new_tokens=12, temperature=1.0, seed=0, stop_ids=[], slots=8)
    KEPT.enter_context(packed_weights(model.parameters(), len(prompts)))
    ids, mask = bench_generate.left_padded(prompts)
    load_peer = cache(bench_generate.load_peer)

    def peer():
        load_peer(path).generate(ids, attention_mask=mask, max_new_tokens=12)

    return dict(ours=lambda: generate(model, prompts, **options), peer=peer)


CASES = {
    "log-prob, SmolLM2's head, 256 rows": partial(log_prob, 1.0),
    "log-prob, SmolLM2's head, 256 rows, temperature 0.05": partial(log_prob, SHARP),
    "loss and gradients, SmolLM2's head, 256 rows": partial(loss, 1.0),
    "loss and gradients, SmolLM2's head, 256 rows, temperature 0.05": partial(loss, SHARP),
    "loss and gradients, V = 256, 4,096 rows": partial(loss, 1.0, N=4096, small=True),
    "sampling, SmolLM2's head, 64 rows": partial(sampling, 1.0),
    "sampling, SmolLM2's head, 64 rows, temperature 0.05": partial(sampling, SHARP),
    "RL step, tiny model": rl_step,
    "generation, SmolLM2, 8 prompts of 24 tokens, 12 new ones": generation,
}
EXACT = ("log-prob", "loss")  # cases whose sides return the same numbers


def make(case, tiny, folder, peer):
    """-> the case's sides, warm, and found to agree."""
    sides = CASES[case](tiny=tiny, folder=folder)
    if not peer:
        del sides["peer"]
    values = {name: side() for name, side in sides.items()}
    if peer and case.startswith(EXACT):
        torch.testing.assert_close(values["ours"], values["peer"], atol=1e-4, rtol=1e-3)
    return sides


def main():
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    made = {}
    for line in sys.stdin:
        order, case, *rest = json.loads(line)
        if order == "make":
            made[case] = make(case, *rest)
            answer = list(made[case])
        else:
            side, times = rest
            start = time.perf_counter(), time.process_time()
            for _ in range(times):
                made[case][side]()
            end = time.perf_counter(), time.process_time()
            answer = [(b - a) / times for a, b in zip(start, end)]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
