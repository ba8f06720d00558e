"""What a run of train_rl.py needs on N GPUs, by arithmetic: bytes of every piece, and the least time a step can take.

    python -m bench.scale                     # the tables of docs/scale.md
    python -m bench.scale --hbm 80 --bandwidth 3.35 --flops 660    # an H100 instead of an H200

Nothing is measured here. Memory counts what the code allocates (parallel.py, kernels/logprob.py, sample.py); times are floors:
each token generated reads all weights and the caches once, each token trained costs 6 FLOPs a weight and each token scored 2,
at the given speed of memory and of bf16 products. Real runs take longer; by how much, bench/kernels.py and bench/decode.py
say on the GPU at hand, and their figures may stand in for the flags below.
"""

from dataclasses import dataclass

from infra.cli import opt, parse, script

GIB = 2**30


@dataclass
class Shape:
    """The numbers of config.json that memory and time depend on."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    def weights(self):
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.inner) + self.vocab * self.width * (1 if self.tied else 2)

    def cache(self):
        """Bytes of keys and values a token, bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def activations(self):
        """Bytes a token that backward keeps, bf16: what each layer's autograd nodes save (inputs of the products, the
        normalised, rotated, gated values), without recomputation."""
        per_layer = 4 * self.width + (3 * self.heads + 4 * self.kv_heads) * self.head_dim + 4 * self.inner
        return 2 * self.layers * per_layer


# Published configurations: meta-llama/Llama-3.2-1B, Llama-3.1-8B, Llama-3.1-70B.
SHAPES = [Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, True),
          Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, False),
          Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256, False)]


@dataclass
class Config:
    gpus: list = opt([1, 8, 64], "numbers of GPUs")
    prompts: int = opt(64, "prompts a step", low=1)
    generations: int = opt(16, "samples a prompt", low=1)
    length: int = opt(1024, "tokens of prompt and completion", low=2)
    micro_batch: int = opt(4, "sequences of a backward pass on a GPU", low=1)
    slots: int = opt(256, "sequences decoded at once on a GPU", low=1)
    hbm: float = opt(141, "memory of a GPU, GB", above=0)
    bandwidth: float = opt(4.3, "TB/s that a copy reaches (an H200)", above=0)
    flops: float = opt(790, "TFLOP/s that bf16 products reach (an H200)", above=0)


def memory(shape, cfg, n):
    """GB a GPU -> dict. n GPUs with --shard: weights, gradients and two moments in n pieces; the copy that generates is whole."""
    W, rows = shape.weights(), min(cfg.slots, -(-cfg.prompts * cfg.generations // n))
    layer = (W - shape.vocab * shape.width * (1 if shape.tied else 2)) / shape.layers
    root = shape.vocab * shape.width * (1 if shape.tied else 2)  # embedding and head stay gathered through forward and backward
    return dict(state=4 * 2 * W / n / 1e9, gathered=0.0 if n == 1 else 2 * (2 * layer + root) / 1e9,
                generator=0.0 if n == 1 else 2 * W / 1e9, cache=rows * cfg.length * shape.cache() / 1e9,
                activations=cfg.micro_batch * cfg.length * shape.activations() / 1e9,
                head=(2**30 + 4 * shape.vocab * shape.width) / 1e9)


def floors(shape, cfg, n):
    """Seconds of one RL step at the least -> dict."""
    W, sequences = shape.weights(), -(-cfg.prompts * cfg.generations // n)
    waves = -(-sequences // cfg.slots)
    rows = min(cfg.slots, sequences)
    tokens = sequences * cfg.length
    reading = 2 * W + rows * cfg.length / 2 * shape.cache()  # a cache is half full on average
    return dict(generate=waves * cfg.length * max(reading / cfg.bandwidth / 1e12, rows * 2 * W / cfg.flops / 1e12),
                verify=tokens * 2 * W / cfg.flops / 1e12, train=tokens * 6 * W / cfg.flops / 1e12)


def tables(cfg):
    lines = ["| model | GPUs | weights, gradients, moments | gathered layers | copy that generates | caches | activations | "
             f"head | sum | fits {cfg.hbm:g} GB |", "|---|---|---|---|---|---|---|---|---|---|"]
    for shape in SHAPES:
        for n in cfg.gpus:
            m = memory(shape, cfg, n)
            total = sum(m.values())
            lines.append(f"| {shape.name} | {n} | " + " | ".join(f"{v:.1f}" for v in m.values()) + f" | {total:.0f} | "
                         f"{'yes' if total < 0.95 * cfg.hbm else 'no'} |")
    lines += ["", "| model | GPUs | generate | verify | train | step | tokens/s a GPU |", "|---|---|---|---|---|---|---|"]
    for shape in SHAPES:
        for n in cfg.gpus:
            f = floors(shape, cfg, n)
            total = sum(f.values())
            rate = cfg.prompts * cfg.generations * cfg.length / n / total
            cells = [shape.name, str(n), *(f"{v:.1f}" for v in f.values()), f"{total:.1f}", f"{rate:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    print(tables(parse(Config, None, __doc__)))


if __name__ == "__main__":
    script(main)
