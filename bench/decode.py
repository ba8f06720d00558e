"""A token's cost: the sampler and a whole decoding step, against PyTorch's operations and against the memory's speed.

    python -m bench.decode                  # on a GPU if there is one, else on the CPU (about 3 minutes; --tiny: does it run?)

sampling   kernels.linear_draw (token and log-prob from hidden states) against the head's product, softmax, multinomial
           and the log of the drawn probability ("eager"), and against flashinfer's sampling_from_logits behind the same
           product if it is installed (it returns no log-prob). On a GPU in bfloat16, for SmolLM2's head and an 8B model's.
step       on a GPU: decode_cuda.step of SmolLM2's shape, all rows at --context positions, as the recorded graph that
           generate() runs, against the plain loop's step, model.decode and the draw. (On a CPU with --tiny only: there
           the plain loop is the product, and this step waits for nothing in vain.)
floor      on a GPU: the bytes that must be read (the weight; for a step the weights and every row's keys and values)
           over the speed at which this GPU copies 1 GB. The time over the floor is printed beside each result.

On a GPU every side of `sampling` is a CUDA graph that goes through as many copies of the weight as it takes to pass
256 MB, so that none is found in the L2 cache and no side waits for Python. Random weights: the choice among flat
probabilities costs the same as among peaked ones. Not compared: engines (vLLM, SGLang), other samplers of a fused
kind, filtered sampling.
"""

import importlib.util
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from bench import timing
from bench.peers import eager_draw
from engines import cuda as decode_cuda
from engines.batch import draw_tokens
from infra.cli import opt, parse, script
from infra.seeds import generator
from kernels import linear_draw, packed_weights, philox_uniform
from model import KVCache, Transformer, init_weights
from open_weights.families import Config as Shape

SMOLLM2 = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, head_dim=64)  # fmt: skip
TINY = dict(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4)  # fmt: skip
HEADS = {"smollm2": (49152, 576), "8b": (128256, 4096)}  # V, D


@dataclass
class Config(timing.Flags):
    rows: list = opt([1, 16, 64, 256], "batch sizes of the sampler", "what")
    decode_rows: int = opt(256, "batch of the step", "what", low=1)
    context: int = opt(1000, "positions every row of the step has", "what", low=1)
    repeats: int = opt(7, "rounds", "timing", low=1)
    out: str = opt("", "where the numbers go (default: bench/results/CARD/decode.json)", "timing")


def gpu_bytes_per_second():
    """What a copy of 1 GB reads and writes a second."""
    x, y = torch.empty(2, 2**28, device="cuda").unbind(0)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    y.copy_(x)
    start.record()
    for _ in range(20):
        y.copy_(x)
    end.record()
    torch.cuda.synchronize()
    return 20 * 2 * 4 * 2**28 / (start.elapsed_time(end) / 1000)


def recorded(calls):
    """A function that does all the calls and waits for them; on a GPU a graph, replayed."""
    gpu = torch.cuda.is_available()
    return timing.waiting([timing.recorded(calls, gpu)], gpu)


def compare(cfg, label, ours, theirs, calls, floor_bytes, speed):
    """Time a call of both sides, and how far ours is from the floor (None on a CPU)."""
    result = timing.compare_calls(cfg, ours, theirs, 0.0 if cfg.tiny else 0.15)
    result["calls"] = calls  # the seconds above are of that many
    timing.line(label, result, lambda seconds: 1e6 * seconds / calls)
    if speed:
        result["floor_seconds"] = floor_bytes / speed
        result["over_floor"] = result["ours"]["seconds"]["median"] / calls / result["floor_seconds"]
        print(f"{'':<34}{1e6 * result['floor_seconds']:>14.4g} us is the floor; ours takes {result['over_floor']:.2f} of it")
    return result


def flashinfer_draw(hidden, weight):
    from flashinfer.sampling import sampling_from_logits

    return sampling_from_logits(F.linear(hidden, weight).float())


def sampling(cfg, device, dtype, speed):
    out = {}
    heads = {"tiny": (300, 16)} if cfg.tiny else HEADS if speed else {"smollm2": HEADS["smollm2"]}
    rivals = {"eager": eager_draw}
    if speed and importlib.util.find_spec("flashinfer"):
        rivals["flashinfer"] = flashinfer_draw
    for head, (V, D) in heads.items():
        size = V * D * dtype.itemsize
        weight = timing.normal(V, D, seed=cfg.seed, device=device, dtype=dtype, scale=D**-0.5)
        weights = [weight, *(weight.clone() for _ in range(2**28 // size if speed else 0))]
        for B in cfg.rows:
            hidden = timing.normal(B, D, seed=cfg.seed, device=device, dtype=dtype)
            uniform = philox_uniform(cfg.seed, torch.arange(B), torch.tensor(0)).to(device)
            with packed_weights(weights, B):
                ours = recorded([partial(linear_draw, hidden, w, 1.0, uniform) for w in weights])
                for name, rival in rivals.items():
                    theirs = recorded([partial(rival, hidden, w) for w in weights])
                    label = f"{head} {B} rows, {name}"
                    out[label] = compare(cfg, label, ours, theirs, len(weights), size, speed)
    return out


def step(cfg, device, dtype, speed):
    """One decoding step. The state is put back before each call, so that every call does the same."""
    context, B = (8, 4) if cfg.tiny else (cfg.context, cfg.decode_rows)
    shape = Shape(**(TINY if cfg.tiny else SMOLLM2), max_position_embeddings=max(2048, context + 2))
    model = init_weights(Transformer(shape), generator(cfg.seed, "bench")).to(device, dtype)
    rows = decode_cuda.rows_of_graph(B)
    cache, state = KVCache(shape, rows, context + 2, device, dtype), decode_cuda.empty_slots(model, rows, context + 2, 1)
    stops = torch.zeros(shape.vocab_size, dtype=torch.bool, device=device)
    length = torch.full((B,), context, device=device)

    def draw(hidden, uniform):
        return draw_tokens(model, hidden, uniform, 1.0, 0, 1.0, 0.0)

    graphs = decode_cuda.Graphs(lambda n: decode_cuda.step(model, cache, state, stops, n, draw), torch.device(device))

    def ours():
        state.length[:], state.first[:], state.limit[:], state.running[:] = context, context, context + 2, True
        graphs.run(rows)
        return state.length.cpu()

    def theirs():
        token, _ = draw(state.hidden[:B], state.draws[:B, 0])
        state.hidden[:B] = model.decode(token, cache, length, context)
        return token.cpu()

    key_values = 2 * B * (context + 1) * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    with torch.no_grad(), packed_weights(model.parameters(), B):
        ours()  # once as it stands, then recorded
        label = f"{B} rows x {context} positions"
        return {label: compare(cfg, label, ours, theirs, 1, weights + key_values, speed)}


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.tiny:
        cfg.repeats, cfg.rows = 1, [1, 3]
    device, dtype, speed = "cpu", torch.float32, None
    result = timing.about("bench.decode", argv, cfg)
    if torch.cuda.is_available():
        device, dtype, speed = "cuda", torch.bfloat16, gpu_bytes_per_second()
        result |= dict(gpu=torch.cuda.get_device_name(), copy_bytes_per_second=speed)
    for part in (sampling, step) if speed or cfg.tiny else (sampling,):
        timing.header(part.__name__, "us")
        with torch.no_grad():
            result[part.__name__] = part(cfg, device, dtype, speed)
    timing.write(cfg.out or timing.results("decode"), result)


if __name__ == "__main__":
    script(main)
