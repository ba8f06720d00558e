"""Generate: one engine for reading, for evaluation and for RL rollouts.

    python sample.py --model smollm2                                          # a conversation
    python sample.py --model smollm2 --prompt "Tom has 3 apples and buys 4 more. How many?"
    python sample.py --model runs/planted/seed0/sft --task planted --n 64     # accuracy, pass@k

Siblings: search.py (spend samples on one answer), report.evaluate (a whole split, kept, with
intervals), report.show and report.chat (every step with its value under a verifier),
engines/stream.py (one completion, token by token).

How it decodes. Those that may become longest start first; prompts are prefilled in right-padded
buckets of similar length. Sequences with the same tokens so far share a row of the KV cache and are
computed once: the G samples of a prompt until they part, which in a converged policy is late. A
sequence that has finished leaves at once; rows without a sequence are filled from the end, so that
the batch is always rows 0..m-1, and waiting prompts are admitted when enough places are free.
Nothing a sequence receives depends on its neighbours: its random numbers are a function of (seed,
sequence id, index of the token).

What is left out: paging (a row owns its full length: at these sizes memory is not the limit), stop
*strings* (stop ids only; text is decoded after the fact), speculative decoding.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engines.batch import begin_batch, draw_tokens, prefill
from engines.stream import converse
from infra import parallel
from infra.cli import UserError, opt, parse, script
from infra.runs import mean, one_thread_if_tiny, setup, with_progress_bar
from kernels import packed_weights, philox_uniform
from model import KVCache, load_model, new_model
from rollouts import Rollouts, pass_at_k, widen
from tasks import TASKS, TaskFlags, adopt_task, get_task
from tasks.context import leave_out_long

COLDEST = 1e-30  # below, the likeliest token is drawn: logits divided by less overflow in float32
# Rows of a decoding step are a multiple of this: oneDNN compiles a product (0.5 ms) for each
# number of rows.
ROUND = 16
# Of keys and values, where the caller does not say how many rows are decoded at once.
CACHE_BYTES = 2**31


def generate(model, prompts, *, sequence_ids=None, max_new_tokens, engine=None, **options):
    """Complete every prompt once; see decode_all for the options. -> Rollouts.

    Under torchrun all processes call this with the same prompts, each completes its share, and all
    get all (infra/parallel.py). engine: completes the prompts instead of generate_here
    (engines/server.py).
    """
    if 0 < options["temperature"] < COLDEST:
        options["temperature"] = 0.0
    model = parallel.whole(model)
    engine = engine or generate_here
    n = len(prompts)
    if parallel.size() == 1:
        return engine(
            model, prompts, sequence_ids=sequence_ids, max_new_tokens=max_new_tokens, **options
        )
    share = parallel.share(n)
    rows = slice(share.start, share.stop)
    ids = torch.arange(n) if sequence_ids is None else torch.as_tensor(sequence_ids)
    budget = torch.as_tensor(max_new_tokens).expand(n)
    part = engine(
        model, prompts[rows], sequence_ids=ids[rows], max_new_tokens=budget[rows], **options
    )
    T = int(parallel.largest(part.tokens.shape[1]))
    stopped = torch.tensor([r == "stop" for r in part.finish_reason], dtype=torch.int64)
    return Rollouts(
        tokens=parallel.gather(widen(part.tokens, T), n),
        prompt_len=parallel.gather(part.prompt_len, n),
        length=parallel.gather(part.length, n),
        logprob=parallel.gather(widen(part.logprob, T), n),
        finish_reason=["stop" if s else "length" for s in parallel.gather(stopped, n).tolist()],
        seconds=parallel.largest(part.seconds),
    )


def generate_here(model, prompts, *, slots=0, label="", **options):
    """generate() in this process alone. The weights' packed copies (kernels/product.py) live as
    long as this call. On a GPU the loop is engines/cuda.py's, which shows no progress (label)."""
    slots = slots or slots_that_fit(model, prompts, options["max_new_tokens"])
    if model.head.is_cuda:
        from engines.cuda import decode_all as decode_on_gpu

        return decode_on_gpu(model, prompts, slots=slots, **options)
    with torch.no_grad(), packed_weights(model.parameters(), min(slots, len(prompts))):
        return decode_all(model, prompts, slots=slots, label=label, **options)


def slots_that_fit(model, prompts, max_new_tokens):
    """Rows decoded at once: as many as CACHE_BYTES hold, 16 to 512. It changes the speed, never a
    completion."""
    cfg = model.cfg
    longest = max(map(len, prompts), default=1) + int(torch.as_tensor(max_new_tokens).max())
    token_bytes = (
        2
        * cfg.num_hidden_layers
        * cfg.num_key_value_heads
        * cfg.head_dim
        * model.head.element_size()
    )
    return max(16, min(512, CACHE_BYTES // (token_bytes * longest)))


def decode_all(
    model,
    prompts,
    *,
    max_new_tokens,
    temperature,
    seed,
    stop_ids,
    sequence_ids=None,
    slots=128,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    label="",
):
    """Complete every prompt once. prompts: B lists of token ids; temperature 0 means greedy.

    max_new_tokens: an int, or B of them. sequence_ids: B ints (default 0..B-1); with seed they fix
    each completion, whatever the batch, the order or `slots` (the rows decoded at once).
    top_k/top_p/min_p cut the distribution; the log-probs stay those of the uncut one. label: of a
    progress bar over the rounds, one token a sequence each ("": none). Returns Rollouts. UserError:
    empty prompt, prompt longer than the context.
    """
    begin = time.time()
    device = model.head.device
    out, limit, ids, stops, queue = begin_batch(
        model, prompts, max_new_tokens, sequence_ids, stop_ids
    )
    B, T = out.tokens.shape
    prompt_len = out.prompt_len
    longest_draw = int((limit - prompt_len).max()) if B else 1
    slots = min(slots, B)
    cache = KVCache(model.cfg, slots, T, device, model.head.dtype)
    draws = torch.zeros(slots, longest_draw, 2, dtype=torch.float64)
    free = list(range(slots))
    # Of every live sequence: its index in the batch, its row of the cache, its row of draws.
    seq = row = slot = torch.zeros(0, dtype=torch.int64)
    # Of every row of the cache: its tokens, and its last hidden state.
    length = torch.zeros(0, dtype=torch.int64)
    hidden = torch.zeros(0, model.cfg.hidden_size, device=device, dtype=model.head.dtype)

    def rounds():
        while queue or len(seq):
            yield

    most = longest_draw if slots == B else None  # rounds there can be
    for _ in with_progress_bar(rounds(), label, most) if label else rounds():
        # 1. Admit: a few at a time, so that a prefill is worth its call. Equal prompts share a row.
        if queue and len(free) >= min(len(queue), max(1, slots // 8)):
            new = [queue.popleft() for _ in range(min(len(queue), len(free)))]
            first = [k == 0 or prompts[i] != prompts[new[k - 1]] for k, i in enumerate(new)]
            distinct = [i for i, is_first in zip(new, first) if is_first]
            places = torch.tensor([free.pop() for _ in new])
            draws[places] = philox_uniform(seed, ids[new][:, None], torch.arange(longest_draw))
            row = torch.cat([row, torch.tensor(first).cumsum(0) - 1 + len(length)])
            hidden = torch.cat(
                [hidden, prefill(model, [prompts[i] for i in distinct], cache, len(length))]
            )
            seq = torch.cat([seq, torch.tensor(new)])
            slot = torch.cat([slot, places])
            length = torch.cat([length, prompt_len[distinct]])
        # 2. Draw a token for every sequence.
        at = length[row]
        uniform = draws.view(-1, 2)[slot * longest_draw + at - prompt_len[seq]].to(device)
        token, logprob = draw_tokens(model, hidden[row], uniform, temperature, top_k, top_p, min_p)
        token = token.cpu()
        out.tokens.view(-1)[seq * T + at] = token
        out.logprob.view(-1)[seq * T + at] = logprob.cpu()
        # 3. Finished sequences leave.
        stopped = stops[token]
        done = stopped | (at + 1 >= limit[seq])
        left = bool(done.any())
        if left:
            out.length[seq[done]] = at[done] + 1
            for i, reason in zip(seq[done].tolist(), stopped[done].tolist()):
                out.finish_reason[i] = "stop" if reason else "length"
            free += slot[done].tolist()
            seq, row, slot, token = (x[~done] for x in (seq, row, slot, token))
        # 4. Advance the rows of the others.
        if len(seq) and (left or len(seq) > len(length)):
            row, token, length = regroup(row, token, length, cache, model.cfg.vocab_size)
        elif len(seq):  # one sequence a row, and none has left
            token = torch.empty_like(token).index_copy_(0, row, token)
        else:
            length = length[:0]
        hidden = advance(model, token, cache, length, slots)
        length = length + 1
    out.seconds = time.time() - begin
    used = int(out.length.max()) if B else 1
    out.tokens = out.tokens[:, :used].clone()
    out.logprob = out.logprob[:, :used].clone()
    return out


def advance(model, token, cache, length, slots):
    """Write token [m] to the cache's first m rows, of length [m] -> their hidden states [m,D]. The
    batch is padded to a multiple of ROUND with idle rows, as far as the cache has them."""
    m = len(length)
    if m == 0:
        return torch.zeros(0, model.cfg.hidden_size, device=cache.k.device, dtype=cache.k.dtype)
    longest = int(length.max())
    idle = min(-m % ROUND, slots - m)
    token = F.pad(token, (0, idle)).to(cache.k.device)
    length = F.pad(length, (0, idle), value=longest).to(cache.k.device)
    return model.decode(token, cache, length, longest)[:m]


def regroup(row, token, length, cache, vocab):
    """Which cache row every sequence has from now on: those that shared one and drew the same token
    go on sharing.

    row, token [n]: of every live sequence, its row and what it drew; length: of every row. Rows are
    copied so that those in use are 0..m-1, the fewest that will do. Returns row [n], and token [m]
    (to be written next), length [m] of the rows.
    """
    pairs, which = (row * vocab + token).unique(return_inverse=True)  # sorted by row
    source = pairs // vocab
    token = pairs % vocab
    m = len(pairs)
    stays = source < m  # the first of a row's heirs keeps it, unless it must move down
    stays[1:] &= source[1:] != source[:-1]
    empty = torch.ones(m, dtype=torch.bool)
    empty[source[stays]] = False
    target = source.clone()
    moves = ~stays
    target[moves] = empty.nonzero()[:, 0]
    if moves.any():
        cache.copy_rows(source[moves], target[moves], int(length.max()))
    order = target.argsort()
    return target[which], token[order], length[source[order]]


# ------------------------------------------------------------------------------------------------
# Command line.


@dataclass
class SampleFlags(TaskFlags):
    """The flags of every script that samples from one model: sample.py, search.py, report.evaluate,
    report.show."""

    model: str = opt(
        "smollm2",
        "a folder, a run directory, smollm2, or a hub id such as Qwen/Qwen2.5-0.5B",
        "what",
    )
    task: str = opt(
        "", "answer the problems of a task and grade them", "problems", choices=["", *TASKS]
    )
    split: str = opt("test", "whose problems", "what", choices=["train", "val", "test"])
    num_problems: int = opt(64, "how many (0: all)", "what", low=0)
    n: int = opt(1, "samples a prompt", "sampling", low=1)
    temperature: float = opt(
        -1.0, "0 is greedy (default: 0 for --prompt, 1 for --task)", "sampling"
    )
    greedy: bool = opt(False, "the same as --temperature 0", "sampling")
    top_k: int = opt(0, "only the k likeliest tokens (0: all)", "sampling", low=0)
    top_p: float = opt(
        1.0, "only the likeliest tokens up to this mass", "sampling", above=0, high=1
    )
    min_p: float = opt(
        0.0,
        "only tokens with this share of the likeliest one's probability",
        "sampling",
        low=0,
        high=1,
    )
    max_new_tokens: int = opt(
        0, "tokens a completion may have (0: 256, or the task's)", "sampling", low=0
    )
    seed: int = opt(0, "fixes every draw", "sampling", low=0)
    slots: int = opt(64, "sequences decoded at once", "sampling", low=1)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N", "run")
    dtype: str = opt(
        "float32", "of weights and activations", "run", choices=["float32", "bfloat16"]
    )
    threads: int = opt(0, "CPU threads (0: torch's choice)", "run", low=0)


@dataclass
class Config(SampleFlags):
    prompt: str = opt("", "text to answer (in the model's chat format where it has one)", "what")
    raw: bool = opt(False, "continue the text as it stands, without the chat format", "what")
    verifier: str = opt("", "not here: python -m report.show (or report.chat) reads values", "what")
    smoke: bool = opt(False, "a tiny random model answers the planted task: does it run?", "run")


def start(cfg):
    """SampleFlags -> task (None: --prompt), model, tokenizer, the options of generate(). Fails
    before weights are read where the data is wrong."""
    temperature_of(cfg)
    device = setup(cfg.device, cfg.threads)
    adopt_task(cfg, cfg.model, getattr(cfg, "verifier", ""))
    task = get_task(cfg) if cfg.task else None
    if task:
        task.problems(cfg.split, 1)
    model, tokenizer = load_model(cfg.model, device, getattr(torch, cfg.dtype))
    one_thread_if_tiny(model, cfg.threads)
    if task:
        task.left_out = leave_out_long(task, tokenizer, model, cfg.split)
    return task, model, tokenizer, sampling_options(cfg, task, tokenizer)


def temperature_of(cfg):
    """What --temperature and --greedy ask for. UserError: a negative one, or samples that would be
    all the same."""
    temperature = cfg.temperature
    if temperature < 0 and temperature != -1:
        raise UserError(f"--temperature must be at least 0, got {temperature:g}")
    if temperature == -1:
        temperature = 1.0 if cfg.task else 0.0
    if cfg.greedy:
        temperature = 0.0
    if temperature == 0 and cfg.n > 1:
        raise UserError(
            f"--n {cfg.n} samples at temperature 0 are all the same: give --temperature 0.7, or "
            "leave out --n"
        )
    return temperature


def sampling_options(cfg, task, tokenizer):
    """The options of generate() that the flags ask for; max_new_tokens among them."""
    return dict(
        temperature=temperature_of(cfg),
        max_new_tokens=cfg.max_new_tokens or (task.max_new_tokens if task else 256),
        seed=cfg.seed,
        stop_ids=task.stop_ids(tokenizer) if task else tokenizer.eos_ids,
        slots=cfg.slots,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
    )


def prompt_ids(cfg, tokenizer):
    """Token ids of --prompt: in the model's chat format where it has one, unless --raw."""
    if tokenizer.chat_format and not cfg.raw:
        return tokenizer.chat([dict(role="user", content=cfg.prompt)])
    return tokenizer.prompt(cfg.prompt)


def print_speed(rolled):
    tokens = rolled.num_tokens()
    print(f"-- {tokens / rolled.seconds:.1f} tokens/s ({tokens} tokens in {rolled.seconds:.2f} s)")


def answer_prompt(cfg, model, tokenizer, options):
    """Print --n completions of --prompt."""
    prompts = [prompt_ids(cfg, tokenizer)] * cfg.n
    rolled = generate(model, prompts, label="tokens", **options)
    for i in range(cfg.n):
        print(tokenizer.decode(rolled.completion(i)).strip())
        print(f"-- {len(rolled.completion(i))} tokens, finish reason: {rolled.finish_reason[i]}")
    print_speed(rolled)


def answer_task(cfg, task, model, tokenizer, options):
    """Print some graded answers, accuracy and pass@k of --n samples of --num-problems problems."""
    problems = task.problems(cfg.split, cfg.num_problems or None, cfg.seed)
    prompts = [task.prompt_tokens(p, tokenizer) for p in problems for _ in range(cfg.n)]
    rolled = generate(model, prompts, label="tokens", **options)
    right = [[] for _ in problems]
    for i, ids in enumerate(rolled.completions()):
        problem = problems[i // cfg.n]
        text = tokenizer.decode(ids)
        right[i // cfg.n].append(task.grade(problem, text))
        if i % cfg.n == 0 and i < 3 * cfg.n:
            verdict = "right" if right[i // cfg.n][-1] else "wrong"
            print(
                f"[{verdict}] {problem.prompt.strip()!r} -> {text.strip()!r} (gold "
                f"{problem.answer!r})"
            )
    print(f"accuracy {mean(map(mean, right)):.3f} ({len(problems)} problems x {cfg.n})")
    if cfg.n > 1:
        print(f"pass@{cfg.n} {mean(pass_at_k(cfg.n, int(sum(r)), cfg.n) for r in right):.3f}")
    print_speed(rolled)


def check(cfg):
    """UserError: flags that mean nothing here, before weights are read."""
    if cfg.verifier:
        module = "report.show" if cfg.prompt or cfg.task else "report.chat"
        raise UserError(f"sample.py reads no verifier: python -m {module} with the same flags does")
    if cfg.n > 1 and not cfg.prompt and not cfg.task:
        raise UserError("--n is of --prompt or --task: a conversation has one answer a line")


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.smoke:
        cfg.task = cfg.task or "planted"
        cfg.num_problems = 16
        task = get_task(cfg)
        tokenizer = task.tokenizer()
        model = new_model(tokenizer.n_vocab).to(setup(cfg.device, cfg.threads))
        return answer_task(cfg, task, model, tokenizer, sampling_options(cfg, task, tokenizer))
    check(cfg)
    task, model, tokenizer, options = start(cfg)
    if task:
        answer_task(cfg, task, model, tokenizer, options)
    elif cfg.prompt:
        answer_prompt(cfg, model, tokenizer, options)
    else:
        converse(model, tokenizer, options, plain=cfg.raw)


if __name__ == "__main__":
    script(main)
