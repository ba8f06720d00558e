"""What a short run on a GPU brings home, most valuable first: correctness, then speed.

    python -m bench.gpu --out gpu.jsonl --seconds 170                # bench/gpu.sh calls it
    python -m bench.gpu --tiny                                       # toy shapes on any machine, interpreted without a GPU

One JSON line a result, flushed, so that whatever ends the run leaves the lines before it. Exit status 1 if a kernel returned
wrong numbers. Times are CUDA events, medians of rounds in which the sides take turns; inputs are drawn on the device; weights are
rotated past the L2 cache for sampling. The floor is the bare cuBLAS product of the same shape (K1) or the bytes over the GPU's
own copy speed (K2, attention). Others' libraries that are absent or fail are a line.

    ceilings    a copy, a square product
    right       log-probs and entropies against float64, both gradients against the float32 reference, every row of the tables,
                a row alone against the same row in a batch (bits), the sampler's log-prob against the trainer's
    k1          the head: forward, loss with both gradients, autograd; cuBLAS, Liger (mean, per token), CCE (exact)
    k2          a token and its log-prob, B = 1 to 256; eager PyTorch
    attention   one query a row over its cache; PyTorch's attention
    variants    one row of a table against another
"""

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():  # chosen before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton

from bench import timing
from bench.peers import eager_draw
from kernels import attention_triton as at
from kernels import logprob_triton as lp
from kernels import sampling_triton as sp
from kernels.logprob import linear_logprob as reference

HEADS = {"llama-8b": (128256, 4096), "smollm2": (49152, 576), "llama-1b": (128256, 2048), "gemma2-9b": (256000, 3584)}
K1 = [("llama-8b", 4096), ("smollm2", 16384), ("llama-1b", 16384), ("llama-8b", 16384), ("gemma2-9b", 4096)]
CACHES = {"smollm2 256x1000": (9, 3, 64, 256, 1000), "llama-8b 64x1000": (32, 8, 128, 64, 1000),
          "gemma2 16x4000": (16, 8, 256, 16, 4000), "smollm2 1x1000": (9, 3, 64, 1, 1000)}  # fmt: skip
L2_BYTES = 2**28
# Largest errors that are rounding: nats, nats, relative norms. Gradients are stored in bfloat16.
LIMITS = dict(logprob=1e-3, entropy=1e-3, gradient_autograd=0.01, gradient_loss=0.01, sampler_trainer=1e-3)


class Run:
    """The file, the clock, and the two ceilings once they are measured."""

    def __init__(self, flags):
        self.cuda, self.tiny, self.begin, self.limit = torch.cuda.is_available(), flags.tiny, time.time(), flags.seconds
        self.device, self.wrong = "cuda" if self.cuda else "cpu", []
        self.heads = {"tiny": (300, 64)} if self.tiny else HEADS
        self.file = open(flags.out, "a") if flags.out else None  # noqa: SIM115 (open for the life of the run)
        self.copy = self.peak = 1e9

    def say(self, **values):
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps(row | dict(at=round(time.time() - self.begin, 1)))
        print(line, flush=True)
        if self.file:
            print(line, file=self.file, flush=True)

    def left(self):
        return self.limit - (time.time() - self.begin)

    def randn(self, *shape, scale=1.0, seed=0, dtype=torch.bfloat16):
        return timing.normal(*shape, seed=seed, device=self.device, dtype=dtype, scale=scale)

    def head(self, name, N):
        V, D = self.heads[name]
        target = torch.arange(N, device=self.device) * 7919 % V
        return self.randn(N, D), self.randn(V, D, scale=D**-0.5), target

    def once(self, call):
        """Seconds of one call."""
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def turns(self, sides, budget=1.2):
        """{name: call} -> {name: median seconds}; ours may not fail, another that raises is named and left out."""
        live = {}
        for name, call in sides.items():
            try:
                call()
                live[name] = call
            except Exception as e:
                if name.startswith("ours"):
                    raise
                self.say(part="absent", side=name, why=f"{type(e).__name__}: {e}"[:160])
                if self.cuda:
                    torch.cuda.empty_cache()
        times, until = {name: [] for name in live}, time.time() + budget * len(live) / 4
        rounds = 1 if self.tiny else 3
        while self.left() > 0 and (time.time() < until and not self.tiny or len(next(iter(times.values()))) < rounds):
            for name, call in live.items():
                times[name].append(self.once(call))
        return {name: statistics.median(t) for name, t in times.items() if t}


def ceilings(run):
    n, m = (2**10, 64) if run.tiny else (2**28, 8192)
    x, y = torch.empty(2, n, device=run.device).unbind(0)
    run.copy = 8 * n / run.turns(dict(copy=lambda: y.copy_(x)))["copy"]
    a, b = run.randn(m, m), run.randn(m, m, seed=1)
    run.peak = 2 * m**3 / run.turns(dict(product=lambda: a @ b))["product"]
    run.say(part="ceilings", card=timing.card(), gpu=torch.cuda.get_device_name() if run.cuda else "none, interpreted",
            torch=torch.__version__, triton=triton.__version__, copy_TBs=run.copy / 1e12, product_TFLOPs=run.peak / 1e12)


def gradient_error(run, inputs, way):
    """Relative error of both gradients of a weighted sum of log-probs, against the float32 reference."""
    hidden, weight, target = inputs
    weights = run.randn(len(hidden), dtype=torch.float32)
    found = []
    for exact in (False, True):
        h, w = (x.float() if exact else x.clone() for x in (hidden, weight))
        h.requires_grad_(), w.requires_grad_()
        if exact:
            (weights * reference(h, w, target, 0.8)[0]).sum().backward()
        elif way == "loss":
            lp.linear_logprob_loss(h, w, target, 0.8, lambda logprob, entropy, c: (c * logprob).sum(), weights)[0].backward()
        else:
            (weights * lp.linear_logprob(h, w, target, 0.8)[0]).sum().backward()
        found.append((h.grad.float(), w.grad.float()))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found))


@torch.no_grad()
def forward_errors(run, hidden, weight, target):
    """A few rows against float64, through every tile that this GPU's table could take; bits of a row alone."""
    few = slice(0, 4)
    z = (hidden[few].double() @ weight.double().t() / 0.8).log_softmax(-1)
    exact = z.gather(1, target[few, None])[:, 0], -(z.exp() * z).sum(-1)
    ours = lp.linear_logprob(hidden, weight, target, 0.8)
    errors = dict(logprob=float((ours[0][few].double() - exact[0]).abs().max()),
                  entropy=float((ours[2][few].double() - exact[1]).abs().max()))
    alone = lp.linear_logprob(hidden[-3:], weight, target[-3:], 0.8)
    same = all(torch.equal(x[-3:], y) for x, y in zip(ours, alone))
    tiles = lp.TILES if run.cuda else {"plain": lp.TILES["plain"]}
    others = {name: tile for name, tile in tiles.items() if name != "float32"}
    if run.cuda and lp.tile_for(weight) is lp.PERSISTENT:
        others["persistent"] = lp.PERSISTENT
    by_tile = {}
    for name, tile in others.items():
        rows = lp.combine(*lp.tile_statistics(hidden, weight, target, 0.8, tile=tile))
        by_tile[name] = float((rows[0][few].double() - exact[0]).abs().max())
    errors["logprob_of_tiles"] = by_tile
    uniform = torch.rand(len(hidden), 2, dtype=torch.float64, device=run.device)
    token, logprob = sp.linear_draw(hidden[:64], weight, 0.8, uniform[:64])
    errors["sampler_trainer"] = float((lp.linear_logprob(hidden[:64], weight, token, 0.8)[0] - logprob).abs().max())
    again, _ = sp.linear_draw(hidden[:1].expand(65, -1), weight, 0.8, uniform[:1].expand(65, -1))
    return errors, same, bool((again == token[0]).all())


def right(run):
    for name in run.heads:
        inputs = run.head(name, 9 if run.tiny else 512)
        errors, alone, batch = forward_errors(run, *inputs)
        errors |= {f"gradient_{way}": gradient_error(run, inputs, way) for way in ("autograd", "loss")}
        by_tile = errors.pop("logprob_of_tiles")
        wrong = [k for k, v in errors.items() if not v <= LIMITS[k]]
        wrong += [f"tile {k}" for k, v in by_tile.items() if not v <= LIMITS["logprob"]]
        run.wrong += [f"{name}: {k}" for k in wrong]
        run.say(part="right", shape=name, **errors, of_tiles=by_tile, row_alone_same_bits=alone, same_token_in_a_batch=batch,
                wrong=wrong)


def summed(logprob, entropy, weights):
    return -(logprob * weights).sum()


def with_backward(make, hidden, weight):
    def call():
        hidden.grad = weight.grad = None
        make().backward()

    return call


def liger_mean(h, w, t):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(h, w, t, reduction="mean")


def liger_per_token(h, w, t, weights):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    return (Scaled.apply(h, w, t, 1.0, return_entropy=True)[0] * weights).sum()


def cce(h, w, t):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, w, t, filter_eps=None)


def k1(run):
    for shape, N in [("tiny", 64)] if run.tiny else K1:
        if run.left() < 15:
            return
        h, w, t = run.head(shape, N)
        h.requires_grad_(), w.requires_grad_()
        weights, hd, wd = torch.full((N,), 1 / N, device=run.device), h.detach(), w.detach()

        def products(hd=hd, wd=wd, N=N):
            for i in range(0, N, 4096):
                z = hd[i : i + 4096] @ wd.t()
                z @ wd, z.t() @ hd[i : i + 4096]

        back = partial(with_backward, hidden=h, weight=w)
        sides = dict(
            product=lambda hd=hd, wd=wd, N=N: [hd[i : i + 4096] @ wd.t() for i in range(0, N, 4096)],
            three_products=products,
            ours_forward=lambda hd=hd, wd=wd, t=t: lp.linear_logprob(hd, wd, t, 1.0),
            ours_loss=back(lambda h=h, w=w, t=t, s=weights: lp.linear_logprob_loss(h, w, t, 1.0, summed, s)[0]),
            ours_autograd=back(lambda h=h, w=w, t=t, s=weights: -(lp.linear_logprob(h, w, t, 1.0)[0] * s).sum()))
        if not run.tiny:
            sides |= dict(liger_mean=back(lambda h=h, w=w, t=t: liger_mean(h, w, t)),
                          liger_per_token=back(lambda h=h, w=w, t=t, s=weights: liger_per_token(h, w, t, s)),
                          cce_exact=back(lambda h=h, w=w, t=t: cce(h, w, t)))
        T = run.turns(sides)
        flop = 2.0 * N * w.numel()
        run.say(part="k1", shape=shape, N=N, **{f"{k}_ms": 1e3 * v for k, v in T.items()},
                forward_of_cublas=T["product"] / T["ours_forward"], loss_of_cublas=T["three_products"] / T["ours_loss"],
                forward_TFLOPs=flop / T["ours_forward"] / 1e12, loss_TFLOPs_6NDV=3 * flop / T["ours_loss"] / 1e12)
        del h, w, hd, wd, sides, back
        if run.cuda:
            torch.cuda.empty_cache()


@torch.no_grad()
def k2(run):
    for shape in run.heads:
        V, D = run.heads[shape]
        copies = [run.randn(V, D, scale=D**-0.5, seed=i) for i in range(1 if run.tiny else 1 + L2_BYTES // (2 * V * D))]
        for B in [3] if run.tiny else [1, 16, 64, 256]:
            if run.left() < 8:
                return
            h, u = run.randn(B, D), torch.rand(B, 2, dtype=torch.float64, device=run.device)
            ways = dict(ours=lambda w, h=h, u=u: sp.linear_draw(h, w, 1.0, u),
                        group_stats=lambda w, h=h: sp.group_stats(h, w, 1.0),
                        product=lambda w, h=h: F.linear(h, w), eager=lambda w, h=h: eager_draw(h, w))  # fmt: skip
            T = run.turns({name: timing.recorded([partial(f, w) for w in copies], run.cuda) for name, f in ways.items()}, 0.5)
            floor = max(2 * V * D / run.copy, 2.0 * B * V * D / run.peak)
            run.say(part="k2", shape=shape, B=B, **{f"{k}_us": 1e6 * v / len(copies) for k, v in T.items()},
                    floor_us=1e6 * floor, of_floor=floor * len(copies) / T["ours"])


@torch.no_grad()
def attention(run):
    for name, (H, K, d, B, n) in (dict(tiny=(6, 2, 16, 2, 40)) if run.tiny else CACHES).items():
        if run.left() < 5:
            return
        count = 1 if run.tiny else 1 + L2_BYTES // (4 * B * K * n * d)
        copies = [(run.randn(B, K, n, d, seed=i), run.randn(B, K, n, d, seed=-1 - i)) for i in range(count)]
        q, length = run.randn(B, H, d), torch.full((B,), n, device=run.device)
        ways = dict(ours=lambda k, v, q=q, n=length: at.decode_attention(q, k, v, n),
                    sdpa=lambda k, v, q=q: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True))  # fmt: skip
        T = run.turns({m: timing.recorded([partial(f, k, v) for k, v in copies], run.cuda) for m, f in ways.items()}, 0.5)
        floor = 4 * B * K * n * d / run.copy
        run.say(part="attention", shape=name, **{f"{k}_us": 1e6 * v / count for k, v in T.items()}, floor_us=1e6 * floor,
                of_floor=floor * count / T["ours"])


@torch.no_grad()
def variants(run):
    """One row of a table against another: which to keep."""
    for shape in [s for s in ("smollm2", "llama-8b", "tiny") if s in run.heads]:
        h, w, t = run.head(shape, 64 if run.tiny else 4096)
        tiles = {"plain": lp.TILES["plain"]} if run.tiny else {k: v for k, v in lp.TILES.items() if k != "float32"}
        if run.cuda and lp.WARPS_SPECIALISE and lp.common_triton.generation(w) == 9:
            tiles |= {"persistent": lp.PERSISTENT}
        T = run.turns({k: partial(lp.tile_statistics, h, w, t, 1.0, tile=tile) for k, tile in tiles.items()}, 0.5)
        run.say(part="variants", what="forward tile", shape=shape, **{f"{k}_ms": 1e3 * v for k, v in T.items()})
        copies = [w] + [w.clone() for _ in range(0 if run.tiny else L2_BYTES // w.nbytes)]
        for B in [3] if run.tiny else [16, 256]:
            tiles = [(64, 128, 128, 4, 3), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)]
            few = h[:B].contiguous()
            tiles = tiles[: 1 if run.tiny else None]
            calls = {str(x): [partial(sp.group_stats, few, c, 1.0, tile=x) for c in copies] for x in tiles}
            T = run.turns({name: timing.recorded(c, run.cuda) for name, c in calls.items()}, 0.4)
            run.say(part="variants", what=f"group_stats tile, B={B}", shape=shape,
                    **{f"{k}_us": 1e6 * v / len(copies) for k, v in T.items()})


PARTS = dict(ceilings=ceilings, right=right, k1=k1, k2=k2, attention=attention, variants=variants)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="a file that the lines are added to")
    parser.add_argument("--seconds", type=float, default=170, help="no part begins after these")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="toy shapes: does it run?")
    flags = parser.parse_args()
    if not torch.cuda.is_available() and not flags.tiny:
        sys.exit("PyTorch sees no GPU here: --tiny runs the same parts interpreted")
    if flags.out:
        Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    run = Run(flags)
    for name in flags.parts:
        if run.left() < 3:
            run.say(part=name, skipped="no time left")
            continue
        try:
            PARTS[name](run)
        except Exception as e:
            run.wrong.append(f"{name}: {type(e).__name__}")
            run.say(part=name, error=f"{type(e).__name__}: {e}"[:300])
    run.say(part="end", wrong=run.wrong)
    sys.exit(1 if run.wrong else 0)


if __name__ == "__main__":
    main()
