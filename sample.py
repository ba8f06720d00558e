"""Generate: one engine for reading, for evaluation and for RL rollouts.

    python sample.py --model smollm2 --prompt "Tom has 3 apples and buys 4 more. How many apples does he have?"
    python sample.py --model runs/planted/seed0/sft --task planted --n 64          # accuracy and pass@k
    python sample.py --model smollm2 --task gsm8k --data gsm8k_test.jsonl --eval --greedy --num-problems 16   # see evaluate.py
    python sample.py --model DIR --task planted --search beam --n 12 --verifier DIR --alpha 0.5   # see search.py

How it decodes. Those that may become longest start first; prompts are prefilled in right-padded buckets of similar
length. Sequences with the same tokens so far share a row of the KV cache and are computed once: the G samples of a
prompt until they part, which in a converged policy is late. A sequence that has finished leaves at once; rows without
a sequence are filled from the end, so that the batch is always rows 0..m-1, and waiting prompts are admitted when
enough places are free. Nothing a sequence receives depends on its neighbours: its random numbers are a function of
(seed, sequence id, index of the token).

What is left out: paging (a row owns its full length: at these sizes memory is not the limit), stop
*strings* (stop ids only; text is decoded after the fact), speculative decoding.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from infra import parallel
from infra.cli import TASKS, UserError, opt, parse, script
from infra.runs import setup, spare_threads
from kernels import linear_draw, linear_draw_filtered, linear_greedy, packed_weights, philox_uniform
from model import KVCache, load_model

# Padded tokens of one prefill batch: enough to fill the cores. On a CPU few enough that what they need stays in its caches and
# in memory that the process has already: 2048 take a fifth longer.
PREFILL_TOKENS = dict(cpu=512, cuda=2048)

COLDEST = 1e-30  # a temperature below draws the likeliest token, and logits divided by it are no float32 any more

ROUND = 16  # rows of a decoding step are a multiple of this: oneDNN compiles a product (0.5 ms) for each number of rows


@dataclass
class Rollouts:
    """Completions as token ids, with everything a trainer needs to know about them.

    tokens [B,T] int64: prompt, completion (its EOS included), then zeros; prompt_len [B], length [B]
    int64 (length counts prompt and completion); logprob [B,T] float32, the sampler's, 0 outside the
    completion; finish_reason: "stop" (a stop id was drawn) or "length"; seconds: time spent generating.
    """

    tokens: torch.Tensor
    prompt_len: torch.Tensor
    length: torch.Tensor
    logprob: torch.Tensor
    finish_reason: list
    seconds: float = 0.0

    def __len__(self):
        return len(self.finish_reason)

    def mask(self):
        """[B,T] bool: True on completion tokens, EOS included."""
        t = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (t >= self.prompt_len[:, None]) & (t < self.length[:, None])

    def completion(self, b):
        return self.tokens[b, self.prompt_len[b] : self.length[b]].tolist()

    def completions(self):
        return [row[a:b] for row, a, b in zip(self.tokens.tolist(), self.prompt_len.tolist(), self.length.tolist())]


def generate(model, prompts, *, sequence_ids=None, max_new_tokens, engine=None, **options):
    """Complete every prompt once; see decode_all for the options. Under torchrun all processes call this with the same
    prompts, each completes its share, and all get all (parallel.py). engine: instead of generate_here (remote.py)."""
    if 0 < options["temperature"] < COLDEST:
        options["temperature"] = 0.0
    model, n, engine = parallel.whole(model), len(prompts), engine or generate_here
    if parallel.size() == 1:
        return engine(model, prompts, sequence_ids=sequence_ids, max_new_tokens=max_new_tokens, **options)
    mine, ids = parallel.share(n), torch.arange(n) if sequence_ids is None else torch.as_tensor(sequence_ids)
    budget = torch.as_tensor(max_new_tokens).expand(n)
    part = engine(model, [prompts[i] for i in mine], sequence_ids=ids[mine.start : mine.stop],
                  max_new_tokens=budget[mine.start : mine.stop], **options)
    T = int(parallel.largest(part.tokens.shape[1]))
    wide = lambda x: parallel.gather(F.pad(x, (0, T - x.shape[1])), n)  # noqa: E731
    stopped = parallel.gather(torch.tensor([r == "stop" for r in part.finish_reason], dtype=torch.int64), n)
    return Rollouts(wide(part.tokens), parallel.gather(part.prompt_len, n), parallel.gather(part.length, n), wide(part.logprob),
                    ["stop" if s else "length" for s in stopped.tolist()], parallel.largest(part.seconds))


def generate_here(model, prompts, *, slots=128, **options):
    """generate() in this process alone. The weights' packed copies (kernels/product.py) live as long as this call. On a GPU
    the loop is decode_cuda.py's."""
    if model.head.is_cuda:
        from engines.cuda import decode_all as decode_on_gpu  # which builds on this file

        return decode_on_gpu(model, prompts, slots=slots, **options)
    with torch.no_grad(), packed_weights(model.parameters(), min(slots, len(prompts))):
        return decode_all(model, prompts, slots=slots, **options)


def start(model, prompts, max_new_tokens, sequence_ids, stop_ids):
    """What a decode loop begins with: empty Rollouts, limit [B] (the length at which each ends if nothing stops it),
    ids [B], stops [V] bool, and a queue of the prompts, longest limit first. UserError: see decode_all."""
    B, context = len(prompts), model.cfg.max_position_embeddings
    prompt_len = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    for i, p in enumerate(prompts):
        if not 0 < len(p) < context:
            raise UserError(f"prompt {i} has {len(p)} tokens; it needs 1 to {context - 1} (the model's context)")
    budget = torch.as_tensor(max_new_tokens).expand(B)
    if B and int(budget.min()) < 1:
        raise UserError("max_new_tokens must be at least 1")
    limit = (prompt_len + budget).clamp(max=context)
    T = int(limit.max()) if B else 1
    out = Rollouts(torch.zeros(B, T, dtype=torch.int64), prompt_len, prompt_len.clone(), torch.zeros(B, T), [""] * B)
    widest = max(map(len, prompts), default=0)
    out.tokens[:, :widest] = torch.tensor([p + [0] * (widest - len(p)) for p in prompts], dtype=torch.int64).view(B, widest)
    ids = torch.arange(B) if sequence_ids is None else torch.as_tensor(sequence_ids, dtype=torch.int64)
    stops = torch.zeros(model.cfg.vocab_size, dtype=torch.bool)
    stops[list(stop_ids)] = True
    room = limit.tolist()  # those that may run longest go first: a long one that starts last would end alone
    queue = deque(sorted(range(B), key=lambda i: (-room[i], prompts[i])))  # equal prompts are neighbours
    return out, limit, ids, stops, queue


def draw_tokens(model, hidden, uniform, temperature, top_k, top_p, min_p):
    """hidden [n,D], uniform [n,2] -> token [n], logprob [n]; temperature 0 is greedy."""
    cap = model.cfg.final_logit_softcapping
    if temperature == 0:
        return linear_greedy(hidden, model.head, softcap=cap)
    if top_k or top_p < 1 or min_p:
        return linear_draw_filtered(hidden, model.head, temperature, uniform, top_k, top_p, min_p, softcap=cap)[:2]
    return linear_draw(hidden, model.head, temperature, uniform, softcap=cap)


def decode_all(model, prompts, *, max_new_tokens, temperature, seed, stop_ids, sequence_ids=None, slots=128, top_k=0,
               top_p=1.0, min_p=0.0):
    """Complete every prompt once. prompts: B lists of token ids; temperature 0 means greedy.

    max_new_tokens: an int, or B of them. sequence_ids: B ints (default 0..B-1); with seed they fix each completion,
    whatever the batch, the order or `slots` (the rows decoded at once). top_k/top_p/min_p cut the distribution; the
    log-probs stay those of the uncut one. Returns Rollouts. UserError: empty prompt, prompt longer than the context.
    """
    begin, B, device = time.time(), len(prompts), model.head.device
    out, limit, ids, stops, queue = start(model, prompts, max_new_tokens, sequence_ids, stop_ids)
    prompt_len, longest_draw = out.prompt_len, int((limit - out.prompt_len).max()) if B else 1
    slots, T = min(slots, B), out.tokens.shape[1]
    cache = KVCache(model.cfg, slots, T, device, model.head.dtype)
    draws, free = torch.zeros(slots, longest_draw, 2, dtype=torch.float64), list(range(slots))
    seq = row = slot = torch.zeros(0, dtype=torch.int64)  # of every live sequence: which it is, its cache row, its row of draws
    length = torch.zeros(0, dtype=torch.int64)  # tokens in each cache row
    hidden = torch.zeros(0, model.cfg.hidden_size, device=device, dtype=model.head.dtype)  # the last state of each
    while queue or len(seq):
        # 1. Admit: a few at a time, so that a prefill is worth its call. Equal prompts share a row.
        if queue and len(free) >= min(len(queue), max(1, slots // 8)):
            new = [queue.popleft() for _ in range(min(len(queue), len(free)))]
            first = [k == 0 or prompts[i] != prompts[new[k - 1]] for k, i in enumerate(new)]
            distinct = [i for i, is_first in zip(new, first) if is_first]
            places = torch.tensor([free.pop() for _ in new])
            draws[places] = philox_uniform(seed, ids[new][:, None], torch.arange(longest_draw))
            row = torch.cat([row, torch.tensor(first).cumsum(0) - 1 + len(length)])
            hidden = torch.cat([hidden, prefill(model, [prompts[i] for i in distinct], cache, len(length))])
            seq, slot, length = (torch.cat(x) for x in ((seq, torch.tensor(new)), (slot, places), (length, prompt_len[distinct])))
        # 2. Draw a token for every sequence.
        at = length[row]
        uniform = draws.view(-1, 2)[slot * longest_draw + at - prompt_len[seq]].to(device)
        token, logprob = draw_tokens(model, hidden[row], uniform, temperature, top_k, top_p, min_p)
        token, logprob = token.cpu(), logprob.cpu()
        out.tokens.view(-1)[seq * T + at], out.logprob.view(-1)[seq * T + at] = token, logprob
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
        if len(seq):
            if left or len(seq) > len(length):
                row, token, length = regroup(row, token, length, cache, model.cfg.vocab_size)
            else:  # one sequence a row, and none has left
                token = torch.empty_like(token).index_copy_(0, row, token)
            m, longest = len(length), int(length.max())
            idle = min(-m % ROUND, slots - m)
            token, at = F.pad(token, (0, idle)).to(device), F.pad(length, (0, idle), value=longest).to(device)
            hidden, length = model.decode(token, cache, at, longest)[:m], length + 1
        else:
            hidden, length = hidden[:0], length[:0]
    out.seconds = time.time() - begin
    used = int(out.length.max()) if B else 1
    out.tokens, out.logprob = out.tokens[:, :used].clone(), out.logprob[:, :used].clone()
    return out


def regroup(row, token, length, cache, vocab):
    """Which cache row every sequence has from now on: those that shared one and drew the same token go on sharing.

    row, token [n]: of every live sequence, its row and what it drew; length: of every row. Rows are copied so that those
    in use are 0..m-1, the fewest that will do. Returns row [n], and token [m] (to be written next), length [m] of the rows.
    """
    pairs, which = (row * vocab + token).unique(return_inverse=True)  # sorted by row
    source, token, m = pairs // vocab, pairs % vocab, len(pairs)
    stays = source < m  # the first of a row's heirs keeps it, unless it must move down
    stays[1:] &= source[1:] != source[:-1]
    empty = torch.ones(m, dtype=torch.bool)
    empty[source[stays]] = False
    target, moves = source.clone(), ~stays
    target[moves] = empty.nonzero()[:, 0]
    if moves.any():
        cache.copy_rows(source[moves], target[moves], int(length.max()))
    order = target.argsort()
    return target[which], token[order], length[source[order]]


def prefill(model, prompts, cache, first_row):
    """Write prompts (neighbours may be equal) to cache rows first_row...; returns last hidden states [n,D]."""
    source = []  # prompt i shares the prefill of prompt source[i]
    for i, p in enumerate(prompts):
        source.append(source[i - 1] if i and p == prompts[i - 1] else i)
    unique = sorted(set(source), key=lambda i: -len(prompts[i]))
    hidden = torch.empty(len(prompts), model.cfg.hidden_size, device=cache.k.device, dtype=cache.k.dtype)
    while unique:
        longest = len(prompts[unique[0]])
        fit = max(1, PREFILL_TOKENS[cache.k.device.type] // longest)
        bucket, unique = unique[:fit], unique[fit:]
        tokens = torch.zeros(len(bucket), longest, dtype=torch.int64)
        for row, i in enumerate(bucket):
            tokens[row, : len(prompts[i])] = torch.tensor(prompts[i])
        rows = torch.tensor(bucket) + first_row
        last = torch.tensor([len(prompts[i]) - 1 for i in bucket])
        states = model.prefill(tokens.to(cache.k.device), cache, rows)
        hidden[bucket] = states[torch.arange(len(bucket)), last]
    twins = [i for i, j in enumerate(source) if i != j]
    if twins:
        origins = torch.tensor([source[i] for i in twins])
        cache.copy_rows(origins + first_row, torch.tensor(twins) + first_row, max(len(p) for p in prompts))
        hidden[twins] = hidden[origins]
    return hidden


def pass_at_k(num_samples, num_correct, k):
    """Probability that k of num_samples, drawn without replacement, hold a correct one: 1 - C(n-c,k)/C(n,k)
    (Chen et al. 2021, unbiased; k <= n). With step counts it is Q under the Best-of-k prover."""
    n, c = num_samples, num_correct
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} needs 1 <= k <= {n} samples; take more samples or a smaller k")
    if n - c < k:
        return 1.0
    miss = 1.0
    for i in range(k):
        miss *= (n - c - i) / (n - i)
    return 1.0 - miss


# ----------------------------------------------------------------------------------------------------
# Command line.


@dataclass
class Config:
    model: str = opt("smollm2", "a folder, a run directory, smollm2, or a hub id such as Qwen/Qwen2.5-0.5B", "what")
    prompt: str = opt("", "text to answer (in the model's chat format where it has one)", "what")
    raw: bool = opt(False, "continue --prompt as plain text, without the chat format", "what")
    task: str = opt("", "answer the problems of a task and grade them", "what", choices=["", *TASKS])
    data: list = opt([], "files of --task gsm8k, math or jsonl; train=, val=, test=FILE name a split", "what")
    question_field: str = opt("", "name of the question in --data (default: guessed)", "what")
    answer_field: str = opt("", "name of the answer in --data (default: guessed)", "what")
    template: str = opt("auto", "prompts for problems from files (auto: chat where the model has a format, else plain)", "what",
                        choices=["auto", "chat", "plain", "fewshot"])
    shots: int = opt(0, "worked examples before each problem, from the training split (0: 4 with fewshot)", "what", low=0)
    planted_prompts: int = opt(4, "prompts of --task planted", "what", low=1, high=26)
    planted_length: int = opt(6, "letters of each hidden sequence", "what", low=1, high=12)
    split: str = opt("test", "whose problems", "what", choices=["train", "val", "test"])
    num_problems: int = opt(64, "how many (0: all)", "what", low=0)
    eval: bool = opt(False, "keep every completion and the results under runs/eval; a killed evaluation goes on", "what")
    out: str = opt("", "keep them in this jsonl file instead", "what")
    n: int = opt(1, "samples a prompt", "sampling", low=1)
    temperature: float = opt(-1.0, "0 is greedy (default: 0 for --prompt, 1 for --task)", "sampling")
    greedy: bool = opt(False, "the same as --temperature 0", "sampling")
    top_k: int = opt(0, "only the k likeliest tokens (0: all)", "sampling", low=0)
    top_p: float = opt(1.0, "only the likeliest tokens up to this mass", "sampling", above=0, high=1)
    min_p: float = opt(0.0, "only tokens with this share of the likeliest one's probability", "sampling", low=0, high=1)
    max_new_tokens: int = opt(0, "tokens a completion may have (0: 256, or the task's)", "sampling", low=0)
    seed: int = opt(0, "fixes every draw (and the planted task's sequences)", "sampling", low=0)
    search: str = opt("", "spend --n samples a problem on one answer; what each does: search.py", "search",
                      choices=["", "best-of-n", "beam", "majority"])
    verifier: str = opt("", "Q^pi that ranks (pav.py --label q --prover base); best-of-n: also --label outcome", "search")
    alpha: float = opt(0.5, "beam: rank by Q^pi + alpha * A^mu", "search", low=0)
    prover_k: int = opt(0, "A^mu of the Best-of-K prover (0: the verifier's own K)", "search", low=0)
    prover_verifier: str = opt("", "A^mu of another prover (default: Best-of-K of --verifier)", "search")
    width: int = opt(0, "beam: elements kept a step; must divide --n (0: n/3)", "search", low=0)
    show: bool = opt(False, "print every step with its value and its progress under --verifier (viewer.py)", "search")
    slots: int = opt(64, "sequences decoded at once", "sampling", low=1)
    device: str = opt("auto", "auto, cpu, cuda or cuda:N", "run")
    dtype: str = opt("float32", "of weights and activations", "run", choices=["float32", "bfloat16"])
    threads: int = opt(0, "CPU threads (0: torch's choice)", "run", low=0)
    smoke: bool = opt(False, "a tiny random model answers the planted task: does it run?", "run")


def answer_prompt(cfg, model, tokenizer, options):
    """Print --n completions of --prompt."""
    chat = tokenizer.chat_format and not cfg.raw
    ids = tokenizer.chat([dict(role="user", content=cfg.prompt)]) if chat else tokenizer.prompt(cfg.prompt)
    out = generate(model, [ids] * cfg.n, max_new_tokens=cfg.max_new_tokens or 256, **options)
    for i in range(cfg.n):
        print(tokenizer.decode(out.completion(i)).strip())
        print(f"-- {len(out.completion(i))} tokens, finish reason: {out.finish_reason[i]}")
    tokens = int((out.length - out.prompt_len).sum())
    print(f"-- {tokens / out.seconds:.1f} tokens/s ({tokens} tokens in {out.seconds:.2f} s)")


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    device = setup(cfg.device, cfg.threads)
    if cfg.smoke:
        from tasks.files import get_task
        from train_sft import Config as SftConfig
        from train_sft import start_model

        cfg.task, cfg.num_problems = cfg.task or "planted", 16
        model, tokenizer = start_model(SftConfig(task=cfg.task), get_task(cfg), device)
    else:
        if not cfg.prompt and not cfg.task:
            raise UserError("nothing to do: give --prompt TEXT, or --task NAME")
        if cfg.task:  # what is wrong with the data is said before the weights are read
            from tasks.files import get_task

            get_task(cfg).problems(cfg.split, 1)
        model, tokenizer = load_model(cfg.model, device, getattr(torch, cfg.dtype))
    spare_threads(model, cfg.threads)
    temperature = 0.0 if cfg.greedy else cfg.temperature if cfg.temperature >= 0 else (1.0 if cfg.task else 0.0)
    options = dict(temperature=temperature, seed=cfg.seed, stop_ids=tokenizer.eos_ids, slots=cfg.slots, top_k=cfg.top_k,
                   top_p=cfg.top_p, min_p=cfg.min_p)
    if cfg.show:
        from report.show import show as answer
    elif cfg.search:
        from search import answer
    elif cfg.task:
        from report.evaluate import evaluate as answer
    else:
        answer = answer_prompt
    answer(cfg, model, tokenizer, options)


if __name__ == "__main__":
    script(main)
