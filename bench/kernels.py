"""The kernels against the bare matrix product and against what others offer for the same numbers, in one run.

    python -m bench.kernels                          # on a GPU if there is one, else on the CPU; one table, one JSON
    python -m bench.kernels --device cpu             # 2 cores: about 3 minutes (--tiny: seconds; are all values right?)
    python -m bench.kernels --shapes llama-8b --rows 16384 --parts gradients grpo      # one corner of it

logprob    hidden [N,D], weight [V,D], target [N] -> log-prob of each target, no gradient. Ours returns entropy as well.
gradients  mean negative log-prob and its gradients in hidden and weight: linear_logprob under autograd (makes the
           logits twice, 8NDV multiply-adds and as many adds) and linear_logprob_loss (once, 6NDV).
grpo       the same for the clipped loss of GRPO, one advantage for 512 tokens (the forms of RL, which weigh each token).
sampling   hidden [B,D] -> a token and its log-prob.
decode     on a GPU: one query a row over a cache of --context positions, and the whole step of bench/decode.py.

The floor of a row is made in the same rounds as the row: the bare products of its shape, one for logprob and sampling,
three for gradients (cuBLAS in bfloat16 on a GPU; on a CPU float32 by the faster library, kernels/product.py). Sampling
and decode on a GPU must also read the weight or the cache, at the speed at which this GPU copies 1 GB: the larger of the
two is the floor. "of floor" is floor over time, 1 is perfect; "ratio" is theirs over ours, above 1 ours is faster.

Every result is compared with an exact one before it is timed (float64 on a CPU, the float32 reference of
kernels/logprob.py on a GPU): "error" is the largest difference of a log-prob in nats, or of a gradient relative to its
norm, and a side beyond its tolerance is marked DIFFERS: its time is the time of something else. Logits in bfloat16 get a
wide tolerance; CCE drops gradients below 2^-12, which on random hidden states (a flat softmax) is nearly all of them.
Hence also real ones: SmolLM2's states on this repository's text, with its own head, if the package with it is there.

MiB is the peak of what the call allocates (counted by PyTorch's allocator); on a CPU without what it returns.
Weights that the L2 cache would hold are rotated on a GPU, so that each call finds another one. Not compared: soft caps,
more than one GPU, fp8; flashinfer's sampler (bench/decode.py); engines (bench/generate.py has transformers' loop).
"""

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory here, talks otherwise

import torch
import torch.nn.functional as F

from bench import decode, timing
from bench.peers import (
    COARSE,
    FINE,
    SEQUENCE,
    TOLERANCE,
    bare_products,
    eager_draw,
    exact_gradients,
    exact_logprob,
    gradient_error,
    gradients_of,
    logprob_error,
    logprob_sides,
    loss_sides,
)
from infra.cli import UserError, opt, parse, script
from infra.seeds import generator
from kernels import decode_attention, linear_draw, packed_weights, philox_uniform

# V, D of the head
SHAPES = {"smollm2": (49152, 576), "llama-1b": (128256, 2048), "llama-8b": (128256, 4096), "gemma2-9b": (256000, 3584),
          "bytes-64": (256, 64), "bytes-128": (256, 128), "planted": (19, 64), "tiny": (300, 16)}  # fmt: skip
ON_GPU, ON_CPU = ["smollm2", "llama-1b", "llama-8b", "gemma2-9b"], ["smollm2", "bytes-64", "bytes-128", "planted"]
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
L2_BYTES = 2**28  # rotate weights until they pass this


@dataclass
class Config(timing.Flags):
    device: str = opt("", "cuda or cpu (default: cuda if there is one)", "what", choices=["", "cuda", "cpu"])
    parts: list = opt([""], "what to measure (default: all of it; on a CPU without grpo and decode)", "what",
                      choices=["logprob", "gradients", "grpo", "sampling", "decode"])  # fmt: skip
    shapes: list = opt([""], f"of {', '.join(SHAPES)} (default: the four models on a GPU)", "what")
    rows: list = opt([0], "N (default: 4096 16384; on a CPU 512 of SmolLM2, 8192 of the small ones)", "what")
    batch: list = opt([1, 16, 64, 256], "B of sampling", "what", low=1)
    hidden: list = opt([""], "hidden states; real: SmolLM2's, its shape only (default: random real; on a CPU random)", "what",
                       choices=["random", "real"])  # fmt: skip
    context: int = opt(1024, "positions in the cache", "what", low=1)
    decode_rows: int = opt(256, "B of decode", "what", low=1)
    threads: list = opt([1, 2], "CPU threads, one comparison each", "timing")
    repeats: int = opt(5, "rounds", "timing", low=1)
    clock: str = opt("wall", "processor: seconds of the CPU, for one thread on a machine that is not quiet", "timing",
                     choices=["wall", "processor"])  # fmt: skip
    out: str = opt("", "where the numbers go (default: bench/results/CARD/kernels.json)", "timing")


# ----------------------------------------------------------------------------------------------------
# Inputs and exact values


def random_inputs(cfg, shape, N, device, dtype):
    V, D = SHAPES[shape]
    hidden = timing.normal(N, D, seed=cfg.seed, device=device, dtype=dtype)
    weight = timing.normal(V, D, seed=cfg.seed, device=device, dtype=dtype, scale=D**-0.5)
    return hidden, weight, torch.randint(V, (N,), generator=generator(cfg.seed, "bench", N)).to(device)


def real_inputs(N, device, dtype):
    """SmolLM2's hidden states before each next token of this repository's Markdown and Python, its head, those tokens."""
    from model import load_model

    model, tokenizer = load_model("smollm2", device, dtype)
    root, ids = Path(__file__).parent.parent, []
    for path in sorted([*root.glob("*.md"), *root.glob("*.py")]):
        ids += tokenizer.encode(path.read_text(encoding="utf-8"))
    ids = torch.tensor((ids * (N // len(ids) + 1))[: N + 1], device=device)
    with torch.no_grad():
        hidden = torch.cat([model(piece[None])[0] for piece in ids[:-1].split(SEQUENCE)])
    return hidden, model.head.detach().clone(), ids[1:]


def loss_inputs(cfg, hidden, weight, target):
    """... and the old log-probs (the policy's own, moved a little), an advantage for each sequence, 1/N a token."""
    N, gen = len(target), generator(cfg.seed, "bench", 1)
    with torch.no_grad():
        old = exact_logprob(hidden, weight, target).float() + 0.02 * torch.randn(N, generator=gen).to(hidden.device)
    advantage = torch.randn(N // SEQUENCE + 1, generator=gen).repeat_interleave(SEQUENCE)[:N].to(hidden.device)
    return hidden.requires_grad_(), weight.requires_grad_(), target, old, advantage, torch.full_like(old, 1 / N)


# ----------------------------------------------------------------------------------------------------
# Measuring


def peak_bytes(call, gpu):
    """The tensors that `call` returns, and the most that it holds at once; on a CPU without those tensors."""
    if gpu:
        call()  # what libraries keep for themselves is not the call's
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        return kept, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    events, todo = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    events.sort()
    last = {ptr: i for i, (_, ptr, size) in enumerate(events) if size > 0}  # of a returned tensor: its own memory
    returned = {last.get(x.untyped_storage().data_ptr()) for x in kept}
    now = peak = 0
    for i, (_, _, size) in enumerate(events):
        now += 0 if i in returned else size
        peak = max(peak, now)
    return kept, peak


def attempt(call):
    """-> (result, ""), or (None, why not): others' code may be missing, or fail here in ways of its own."""
    try:
        return call(), ""
    except ImportError as e:
        return None, f"absent: {e}".split("\n")[0]
    except torch.OutOfMemoryError:
        why = "out of memory"
    except Exception as e:
        return None, f"fails: {type(e).__name__}: {e}".split("\n")[0][:120]
    torch.cuda.empty_cache()  # what it had got by then
    return None, why


def checked(name, function, inputs, error, exact, tolerance):
    """A side's error and memory. Ours may not fail: what it raises is raised."""
    def call():
        value = function(*inputs)
        return value if isinstance(value, tuple) else (value,)

    run = partial(peak_bytes, call, inputs[0].is_cuda)
    found, why = (run(), "") if name.startswith("ours") else attempt(run)
    if why:
        return dict(absent=why)
    out = dict(peak_mib=round(found[1] / 2**20, 2))
    if error:
        wrong = error(found[0], exact)
        out |= dict(error=wrong, tolerance=tolerance, agrees=wrong <= tolerance)
    return out


def measure(cfg, calls, floor_seconds):
    """calls {side: function}, "ours" and "product" among them -> seconds, ratio to ours, share of the floor."""
    def once():
        start = time.perf_counter()
        calls["ours"]()
        slow = cfg.tiny or time.perf_counter() - start > 0.05
        with timing.Others() as others:
            times = timing.alternate(calls, cfg.repeats, 0.0 if slow else 0.05, CLOCKS[cfg.clock])
        sides = {name: dict(seconds=timing.spread(t), ratio=timing.ratio(t, times["ours"])) for name, t in times.items()}
        for name, t in times.items():
            if "product" in times:
                sides[name]["of_floor"] = timing.ratio(times["product"], t)["median"]
            if floor_seconds > sides.get("product", sides["ours"])["seconds"]["median"] * ("product" in sides):
                sides[name]["of_floor"] = float(f"{floor_seconds / sides[name]['seconds']['median']:.4g}")
        return dict(sides=sides, others=others.cores)

    return timing.undisturbed(cfg, once)


def show(cfg, label, result):
    print(f"\n{label:<52}{'ms':>10}{'of floor':>10}{'ratio':>8}  {'quartiles':<14}{'MiB':>9}{'error':>10}")
    for name, r in result["sides"].items():
        if "absent" in r:
            print(f"  {name:<26} {r['absent']}")
            continue
        low, high = r["ratio"]["quartiles"]
        floor = f"{r['of_floor']:.3f}" if "of_floor" in r else ""
        error = f"{r['error']:.1e}" if "error" in r else ""
        print(f"  {name:<50}{1000 * r['seconds']['median']:>10.4g}{floor:>10}{r['ratio']['median']:>8.2f}"
              f"  {f'{low:.2f} - {high:.2f}':<14}{r['peak_mib']:>9.4g}{error:>10}"
              f"{'' if r.get('agrees', True) else '  DIFFERS: not a comparison'}", flush=True)  # fmt: skip
    if result["disturbed"] and cfg.clock == "wall":
        print(f"  * disturbed: others used {result['others']} cores meanwhile")


def compare(cfg, label, sides, copies, error, exact, floor_bytes=0, speed=None, record=False):
    """sides {name: (function, tolerance)}; copies: the function's arguments, several times where weights are rotated."""
    found = {name: checked(name, f, copies[0], error if name != "product" else None, exact, tolerance)
             for name, (f, tolerance) in sides.items()}  # fmt: skip
    calls = {name: [partial(sides[name][0], *inputs) for inputs in copies] for name, r in found.items() if "absent" not in r}
    calls = {name: decode.recorded(c) if record else timing.waiting(c, copies[0][0].is_cuda) for name, c in calls.items()}
    result = measure(cfg, calls, len(copies) * floor_bytes / speed if speed else 0.0)
    for timed in result["sides"].values():  # of one call, where a round makes several
        timed["seconds"] = {k: [x / len(copies) for x in v] if isinstance(v, list) else v / len(copies)
                            for k, v in timed["seconds"].items()}  # fmt: skip
    result["sides"] = {name: result["sides"].get(name, {}) | r for name, r in found.items()}
    show(cfg, label, result)
    return result


def rotated(inputs):
    """The arguments, with as many copies of the weight (the second) as it takes to pass the L2 cache of a GPU."""
    hidden, weight, *rest = inputs
    copies = L2_BYTES // weight.nbytes if weight.is_cuda else 0
    return [inputs, *((hidden, weight.detach().clone().requires_grad_(weight.requires_grad), *rest) for _ in range(copies))]


# ----------------------------------------------------------------------------------------------------
# Parts


def heads(cfg, gpu, rows=None):
    """(label, inputs) of every shape, kind of hidden states and N. rows: of sampling."""
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    for shape in cfg.shapes:
        default = [4096, 16384] if gpu else [512 if shape == "smollm2" else 8192]
        for kind in cfg.hidden if rows is None else ["random"]:
            for N in rows or ([n for n in cfg.rows if n] or default):
                if kind == "random":
                    yield f"{shape} {N} rows", random_inputs(cfg, shape, N, device, dtype)
                elif shape == "smollm2":
                    try:
                        yield f"{shape} {N} rows of text", real_inputs(N, device, dtype)
                    except UserError as e:
                        print(f"\n{shape}, real hidden states: absent: {e}")


def logprob(cfg, gpu, speed):
    out = {}
    for label, inputs in heads(cfg, gpu):
        tolerance = TOLERANCE[inputs[0].dtype]
        sides = {name: (f, tolerance[precision][0]) for name, (f, precision) in logprob_sides(gpu).items()}
        sides["product"] = (bare_products, None)
        with torch.no_grad():
            exact = exact_logprob(*inputs)
            out[label] = compare(cfg, f"logprob {label}", sides, rotated(inputs), logprob_error, exact)
    return out


def with_gradients(part, cfg, gpu, speed):
    out = {}
    for label, inputs in heads(cfg, gpu):
        inputs = loss_inputs(cfg, *inputs)
        tolerance = TOLERANCE[inputs[0].dtype]
        sides = {name: (gradients_of(f), tolerance[precision][1]) for name, (f, precision) in loss_sides(gpu, part).items()}
        sides["product"] = (torch.no_grad()(partial(bare_products, ways=3)), None)
        exact = exact_gradients(part, *inputs)
        out[label] = compare(cfg, f"{part} {label}", sides, rotated(inputs), gradient_error, exact)
    return out


def draw_error(value, exact):
    """How far the returned log-prob of the drawn token is from that token's."""
    token, logprob = (x.reshape(-1, 1) for x in value)
    return float((logprob.double() - exact.gather(1, token).double()).abs().max())


def sampling(cfg, gpu, speed):
    out = {}
    for label, (hidden, weight, _) in heads(cfg, gpu, cfg.batch):
        uniform = philox_uniform(cfg.seed, torch.arange(len(hidden)), torch.tensor(0)).to(hidden.device)
        tolerance = TOLERANCE[hidden.dtype]
        sides = {"ours": (lambda h, w, u: linear_draw(h, w, 1.0, u), tolerance[FINE][0]),
                 "softmax, multinomial": (lambda h, w, u: eager_draw(h, w), tolerance[COARSE][0]),
                 "product": (bare_products, None)}  # fmt: skip
        copies = rotated((hidden, weight, uniform))
        with torch.no_grad(), packed_weights([w for _, w, _ in copies], len(hidden)):
            exact = (hidden.float() if gpu else hidden.double()) @ (weight.float() if gpu else weight.double()).t()
            out[label] = compare(cfg, f"sampling {label}", sides, copies, draw_error, exact.log_softmax(-1), weight.nbytes,
                                 speed, record=gpu)  # fmt: skip
    return out


def sdpa(q, k, v, length):
    """All rows are equally long here, so PyTorch's attention needs no mask."""
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def attention(cfg, gpu, speed):
    """SmolLM2's heads over a cache of --context positions: one layer a call, as many layers as pass the L2 cache."""
    H, K, d, B, T = 9, 3, 64, *((4, 8) if cfg.tiny else (cfg.decode_rows, cfg.context))
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    q = timing.normal(B, H, d, seed=cfg.seed, device=device, dtype=dtype)
    k, v = (timing.normal(B, K, T, d, seed=cfg.seed + i, device=device, dtype=dtype) for i in range(2))
    length = torch.full((B,), T, device=device)
    exact = sdpa(q.double(), k.double(), v.double(), length)
    layers = 1 + (L2_BYTES // (k.nbytes + v.nbytes) if gpu else 0)
    copies = [(q, k, v, length), *((q, k.clone(), v.clone(), length) for _ in range(layers - 1))]
    tolerance = 2e-2 if gpu else 1e-5
    sides = {"ours": (decode_attention, tolerance), "scaled_dot_product_attention": (sdpa, tolerance)}
    label = f"{B} rows x {T} positions, one layer"
    with torch.no_grad():
        return {label: compare(cfg, f"decode {label}", sides, copies, logprob_error, exact, k.nbytes + v.nbytes, speed,
                               record=gpu)}  # fmt: skip


def decoding(cfg, gpu, speed):
    """On a GPU. (On a CPU model.decode takes PyTorch's attention, and --tiny only looks whether ours is right.)"""
    if not (gpu or cfg.tiny):
        return {}
    out = attention(cfg, gpu, speed)
    if gpu:
        step = decode.Config(context=cfg.context, decode_rows=cfg.decode_rows, repeats=cfg.repeats, seed=cfg.seed)
        timing.header("decode, the whole step", "us")
        out["step"] = decode.step(step, "cuda", torch.bfloat16, speed)
    return out


PARTS = {"logprob": logprob, "gradients": partial(with_gradients, "gradients"), "grpo": partial(with_gradients, "grpo"),
         "sampling": sampling, "decode": decoding}  # fmt: skip


def goals(result):
    """What the reference should reach on a CPU: printed with what it reached, met or not."""
    out = {}
    for label, r in result.get("logprob", {}).items():
        over = 1 / r["sides"]["ours"]["of_floor"]
        out[f"logprob {label}: time over the bare product"] = dict(goal=1.15, reached=round(over, 3), met=over <= 1.15)
    for label, r in result.get("gradients", {}).items():
        ours, full = (r["sides"][name] for name in ("ours", "log_softmax"))
        time, memory = ours["seconds"]["median"] / full["seconds"]["median"], ours["peak_mib"] / full["peak_mib"]
        time = 1 / full["ratio"]["median"]
        out[f"gradients {label}: time over full autograd"] = dict(goal=1.0, reached=round(time, 3), met=time <= 1)
        out[f"gradients {label}: memory over full autograd"] = dict(goal=0.1, reached=round(memory, 3), met=memory <= 0.1)
    print()
    for name, g in out.items():
        print(f"{name:<64}{g['reached']:>8.3f}   goal {g['goal']}: {'met' if g['met'] else 'MISSED'}")
    return out


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    gpu = (cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    if cfg.clock == "processor" and (gpu or cfg.threads != [1]):
        raise UserError("--clock processor counts what all threads of a CPU do: give --device cpu --threads 1")
    if gpu and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; --device cpu measures the reference")
    if cfg.tiny:
        cfg.shapes, cfg.rows, cfg.batch, cfg.repeats, cfg.threads, cfg.hidden = ["tiny"], [64], [1, 3], 1, [1], ["random"]
    cfg.shapes = [s for s in cfg.shapes if s] or (ON_GPU if gpu else ON_CPU)
    cfg.hidden = [h for h in cfg.hidden if h] or (["random", "real"] if gpu else ["random"])
    cfg.parts = [p for p in cfg.parts if p] or (list(PARTS) if gpu or cfg.tiny else ["logprob", "gradients", "sampling"])
    if unknown := [s for s in cfg.shapes if s not in SHAPES]:
        raise UserError(f"--shapes {unknown[0]}: known are {', '.join(SHAPES)}")
    result, speed = timing.about("bench.kernels", argv, cfg), None
    if gpu:
        speed = decode.gpu_bytes_per_second()
        result |= dict(gpu=torch.cuda.get_device_name(), copy_bytes_per_second=speed)
    for n in [0] if gpu else cfg.threads:
        if n:
            torch.set_num_threads(n)
            print(f"\n{n} thread{'s' * (n > 1)}")
        here = {part: PARTS[part](cfg, gpu, speed) for part in cfg.parts}
        result |= here if gpu else {f"threads_{n}": here | dict(goals=goals(here))}
        where = cfg.out or timing.results("kernels", "" if gpu else "cpu")
        timing.write(where, result)  # after each, so that an interrupted run keeps what it has


if __name__ == "__main__":
    script(main)
