"""The parts of a decode loop that sample.py and engines/cuda.py share: begin a batch, prefill prompts, draw a token."""

from collections import deque

import torch

from infra.cli import UserError
from kernels import linear_draw, linear_draw_filtered, linear_greedy
from rollouts import Rollouts

# Padded tokens of one prefill batch: enough to fill the cores. On a CPU few enough that what they need stays in its
# caches and in memory that the process has already: 2048 take a fifth longer.
PREFILL_TOKENS = dict(cpu=512, cuda=2048)


def begin_batch(model, prompts, max_new_tokens, sequence_ids, stop_ids):
    """What a decode loop begins with: empty Rollouts, limit [B] (the length at which each ends if nothing stops it),
    ids [B], stops [V] bool, and a queue of the prompts, longest limit first. UserError: see sample.decode_all."""
    B = len(prompts)
    context = model.cfg.max_position_embeddings
    prompt_len = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    for i, p in enumerate(prompts):
        if not 0 < len(p) < context:
            raise UserError(f"prompt {i} has {len(p)} tokens; it needs 1 to {context - 1} (the model's context)")
    budget = torch.as_tensor(max_new_tokens).expand(B)
    if B and int(budget.min()) < 1:
        raise UserError("max_new_tokens must be at least 1")
    limit = (prompt_len + budget).clamp(max=context)
    T = int(limit.max()) if B else 1
    tokens = torch.zeros(B, T, dtype=torch.int64)
    widest = max(map(len, prompts), default=0)
    padded = [p + [0] * (widest - len(p)) for p in prompts]
    tokens[:, :widest] = torch.tensor(padded, dtype=torch.int64).view(B, widest)
    rollouts = Rollouts(tokens, prompt_len, prompt_len.clone(), torch.zeros(B, T), [""] * B)
    ids = torch.arange(B) if sequence_ids is None else torch.as_tensor(sequence_ids, dtype=torch.int64)
    stops = torch.zeros(model.cfg.vocab_size, dtype=torch.bool)
    stops[list(stop_ids)] = True
    room = limit.tolist()  # those that may run longest go first: a long one that starts last would end alone
    queue = deque(sorted(range(B), key=lambda i: (-room[i], prompts[i])))  # equal prompts are neighbours
    return rollouts, limit, ids, stops, queue


def draw_tokens(model, hidden, uniform, temperature, top_k, top_p, min_p):
    """hidden [n,D], uniform [n,2] -> token [n], logprob [n]; temperature 0 is greedy."""
    cap = model.cfg.final_logit_softcapping
    if temperature == 0:
        return linear_greedy(hidden, model.head, softcap=cap)
    if top_k or top_p < 1 or min_p:
        filters = (top_k, top_p, min_p)
        return linear_draw_filtered(hidden, model.head, temperature, uniform, *filters, softcap=cap)[:2]
    return linear_draw(hidden, model.head, temperature, uniform, softcap=cap)


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
        bucket = unique[:fit]
        unique = unique[fit:]
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
