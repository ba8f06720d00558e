"""Generation: sample.generate against transformers' generate(), tokens per second on the CPU.

    python -m bench.generate                # SmolLM2-135M, float32; 3 to 4 minutes on 2 cores (--repeats 5: 15 minutes)
    python -m bench.generate --tiny         # a random tiny model: does it run?

Three workloads, each exactly --max-new-tokens a sequence (no stop ids on either side):
    batch    64 different prompts of 16 to 128 tokens
    groups   8 different prompts, 8 samples of each, sorted by prompt: one batch of RL
    single   1 prompt (five times the repeats; a token must read all weights once, and "floor" is the time that takes at the
             speed at which this machine adds up as many bytes, measured in the same run)
and one of ours against ours:
    ragged   64 prompts of one token, completions of 1 to --ragged-tokens tokens, in --ragged-rows rows, against as many
             tokens in equal completions: what uneven lengths cost ("ours" is ragged, "theirs" is equal)
Both sides read the same folder, sample at temperature 1 from the whole distribution and run in one process, in turn,
with the same number of threads. Our side also returns a log-prob for every token, theirs does not. The packed copies of
our weights are made once, before the clock starts, as in a program that answers many prompts (packed_weights around its
loop); a call of generate() outside makes them itself, every time: "packing_seconds", and "ratio_alone" is the ratio then.

Theirs: AutoModelForCausalLM in float32, attention "sdpa", its default cache (dynamic), prompts padded on the left with
an attention mask, top_k=0, no other logits processor. --peer-cache static tries its fixed cache instead.
Before anything is timed, both models must give the same log-probs for a prompt.

Not compared: torch.compile, bfloat16, int8, llama.cpp, vLLM; early stopping, where continuous batching would gain more.
"""

import random
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from bench import timing
from infra.cli import UserError, opt, parse, script
from infra.seeds import generator
from kernels import packed_weights
from model import Config as ModelConfig
from model import Transformer, init_weights, load_model, resolve, save_model
from open_weights.tokenizer import alphabet_tokenizer
from sample import generate


@dataclass
class Config(timing.Flags):
    model: str = opt("smollm2", "a folder that both sides can read, or smollm2", "what")
    workloads: list = opt(["batch", "groups", "single", "ragged"], "which", "what",
                          choices=["batch", "groups", "single", "ragged"])
    rows: int = opt(64, "sequences of a batch; a multiple of 8", "what", low=8)
    max_new_tokens: int = opt(32, "tokens a sequence", "what", low=1)
    ragged_tokens: int = opt(256, "tokens of the longest ragged completion", "what", low=2)
    ragged_rows: int = opt(16, "of the 64 ragged sequences, how many are decoded at once", "what", low=1)
    min_prompt: int = opt(16, "tokens of the shortest prompt", "what", low=1)
    max_prompt: int = opt(128, "tokens of the longest prompt", "what", low=1)
    peer_cache: str = opt("dynamic", "transformers' KV cache", "what", choices=["dynamic", "static"])
    repeats: int = opt(1, "rounds", "timing", low=1)
    threads: list = opt([2], "CPU threads of both sides, one comparison each", "timing")
    out: str = opt("bench/results/cpu/generate.json", "where the numbers go", "timing")


def prompts_of(workload, cfg, vocab):
    """Lists of random token ids. Which tokens does not matter to the time; how many does."""
    rng = random.Random(cfg.seed)
    draw = lambda: [rng.randrange(vocab) for _ in range(rng.randint(cfg.min_prompt, cfg.max_prompt))]  # noqa: E731
    if workload == "single":
        return [[rng.randrange(vocab) for _ in range((cfg.min_prompt + cfg.max_prompt) // 2)]]
    if workload == "groups":
        return [p for p in (draw() for _ in range(cfg.rows // 8)) for _ in range(8)]
    return [draw() for _ in range(cfg.rows)]


def left_padded(prompts):
    """-> input_ids, attention_mask [B,T], as transformers wants them."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def load_peer(folder):
    """transformers' model, told to sample plainly and never to stop."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    peer.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)
    return peer


def tiny_folder(where, cfg):
    cfg.rows, cfg.max_new_tokens, cfg.max_prompt, cfg.threads, cfg.ragged_tokens = 8, 4, 20, [1], 8
    tokenizer = alphabet_tokenizer(list("0123456789="))
    shape = ModelConfig(vocab_size=tokenizer.n_vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64)
    save_model(Path(where) / "tiny", init_weights(Transformer(shape), generator(cfg.seed, "init")), tokenizer)
    return Path(where) / "tiny"


@torch.no_grad()
def check_same(model, peer, prompt):
    ours = model.logits(model(torch.tensor([prompt]))).log_softmax(-1)
    theirs = peer(torch.tensor([prompt])).logits.log_softmax(-1)
    gap = float((ours - theirs).abs().max())
    if not gap < 1e-2:
        raise UserError(f"the two sides compute different models: log-probs differ by {gap:.3g}")
    return gap


def measure(workload, cfg, model, peer):
    """One workload -> times, tokens per second and their ratio."""
    prompts = prompts_of(workload, cfg, model.cfg.vocab_size)
    ids, mask = left_padded(prompts)
    extra = {} if cfg.peer_cache == "dynamic" else dict(cache_implementation="static", disable_compile=True)
    new = cfg.max_new_tokens

    def ours():
        out = generate(model, prompts, max_new_tokens=new, temperature=1.0, seed=cfg.seed, stop_ids=[],
                       slots=len(prompts))
        assert bool((out.length - out.prompt_len == new).all())

    def theirs():
        out = peer.generate(ids, attention_mask=mask, max_new_tokens=new, **extra)
        assert out.shape == (len(prompts), ids.shape[1] + new)

    tokens, weights = len(prompts) * new, list(model.parameters())
    result = dict(sequences=len(prompts), prompt_tokens=sum(map(len, prompts)), new_tokens=tokens)
    start = time.perf_counter()
    with packed_weights(weights, len(prompts)):
        result["packing_seconds"] = time.perf_counter() - start
        result |= timing.compare_calls(cfg if workload != "single" else replace(cfg, repeats=5 * cfg.repeats), ours, theirs)
    mine, other = (result[side]["seconds"]["median"] for side in ("ours", "theirs"))
    result["ratio_alone"] = other / (mine + result["packing_seconds"])
    if workload == "single":
        size = sum(w.numel() * w.element_size() for w in weights)
        result["bytes_per_second"] = reading_speed(size)
        result["floor"] = dict(seconds=new * size / result["bytes_per_second"])
        result["floor"]["ours_over_floor"] = mine / result["floor"]["seconds"]
        print(f"{'':<34}{new / result['floor']['seconds']:>14.4g} is the floor ({result['bytes_per_second'] / 1e9:.1f} GB/s); "
              f"alone {result['ratio_alone']:.2f}")
    return with_rates(result, tokens, tokens)


def with_rates(result, ours, theirs):
    for side, tokens in (("ours", ours), ("theirs", theirs)):
        result[side]["tokens_per_second"] = round(tokens / result[side]["seconds"]["median"], 1)
    return result


def reading_speed(size):
    """Bytes a second at which a sum reads that many bytes: the best of some."""
    x, times = torch.ones(size // 4), []
    for _ in range(8):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return size / min(times)


def measure_ragged(cfg, model):
    """The same number of tokens in completions of 1 to ragged_tokens tokens, and in equal ones."""
    rng = random.Random(cfg.seed)
    ragged = [1 + i * (cfg.ragged_tokens - 1) // 63 for i in range(64)]
    rng.shuffle(ragged)
    equal = round(sum(ragged) / 64)
    prompts = [[t] for t in rng.choices(range(model.cfg.vocab_size), k=64)]

    def side(lengths):
        out = generate(model, prompts, max_new_tokens=lengths, temperature=1.0, seed=cfg.seed, stop_ids=[], slots=cfg.ragged_rows)
        assert (out.length - 1).tolist() == torch.as_tensor(lengths).expand(64).tolist()

    result = dict(sequences=64, longest=cfg.ragged_tokens, new_tokens=sum(ragged))
    with packed_weights(model.parameters(), cfg.ragged_rows):
        result |= timing.compare_calls(cfg, lambda: side(ragged), lambda: side(equal))
    with_rates(result, sum(ragged), 64 * equal)
    result["cost_of_ragged"] = result["theirs"]["tokens_per_second"] / result["ours"]["tokens_per_second"]
    return result


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    timing.need("transformers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny_folder(temporary, cfg) if cfg.tiny else resolve(cfg.model)
        model, _ = load_model(folder)
        peer = load_peer(folder)
    torch.manual_seed(cfg.seed)
    gap = check_same(model, peer, prompts_of("single", cfg, model.cfg.vocab_size)[0])
    result = timing.about("bench.generate", argv, cfg, "transformers") | dict(largest_logprob_difference=gap)
    timing.header("workload", "tok/s")
    for n, workload in product(cfg.threads, cfg.workloads):
        torch.set_num_threads(n)
        r = measure_ragged(cfg, model) if workload == "ragged" else measure(workload, cfg, model, peer)
        result.setdefault(f"threads_{n}", {})[workload] = r
        timing.line(f"{workload}, {n} thread{'s' * (n > 1)}", r, lambda seconds: r["new_tokens"] / seconds)  # noqa: B023
    timing.write(cfg.out, result)


if __name__ == "__main__":
    script(main)
