"""Fused sampling on a GPU: kernels/sampling.py says what is computed; here is how, without the logits.

    group_stats   hidden [B,D], weight [V,D] -> the largest logit and the mass of every group of 32 tokens
    draw          those [B,V/32] numbers and two uniforms a row -> a group; its 32 logits again; a token, its log-prob

Counted, in bfloat16: group_stats reads the weight once, 2VD bytes, the hidden states once per tile of tokens
(from the L2 cache), and writes 8 bytes a group, V/4 bytes a row; it multiplies and adds 2BVD times. With 4 TB/s
and 800 TFLOP/s the weight is the bill up to B = 200 or so: sampling costs what reading the head costs, whatever
B is. Logits in memory would add 8 bytes a logit: at B = 256 and V = 49152 more than the whole weight.
draw reads V/4 + 64D bytes a row: 5% of the weight at B = 256, D = 4096.

Why 32 tokens a group: smaller groups are more numbers to keep, larger ones more logits to make twice. Why the
choice is not made inside the product: noise per logit costs some 140 instructions (ten Philox rounds, two
logarithms), an order more than the exponential that is needed anyway.

Why the same token whatever the batch and the tile: the largest logit and the mass belong to a group, not to a
tile, a row's sums never see another row, and the log-prob is made of what the draw itself used:
log P(group) + log P(token | group), which cannot be positive and is the probability that was acted on.

The tiles. Rows: 64 is one wgmma instruction of a Hopper warpgroup; fewer rows would be padded to it, and a
smaller instruction may round otherwise. Tokens: 128, so that V = 49152 gives 384 tiles for 132 multiprocessors.
Along D: 64 elements, 128 bytes a row of the weight: whole cache lines, and three stages take 3 x (64 + 128) x 64 x 2
= 74 KB, so that three blocks share a multiprocessor and 384 tiles are one wave of 396 places (with 128 elements one
block fits, and they are three waves of 132). Rows > 64: 128 x 128 x 64, where the products begin to cost as much as the
reading. Plain pointers: there is nothing here that descriptors would speed up, and
any D works.

Of the machine code for an H100 or H200 (Triton 3.6.0; `python -m kernels.compiled`, held by tests/test_compile.py):

    model      kernel                        registers    KB  blocks  a logit
    smollm2    group_stats, 64 rows                118    72       3     14.6
    smollm2    group_stats, 256 rows               110    96       2     13.1
    smollm2    draw                                 93     0       2        -
    llama-8b   group_stats, 64 rows                118    72       3     14.2
    llama-8b   draw                                154     1       1        -

Base 2 throughout: 2^x is one instruction, so logits are scaled by log2(e) / temperature after the product.
"""

import math

import torch
import triton
import triton.language as tl

from kernels import common_triton
from kernels.common_triton import LN2, LOG2E, NEG, UPCAST, cap_and_scale
from kernels.sampling import GROUP as GROUP_TOKENS

GROUP = tl.constexpr(GROUP_TOKENS)
DRAW_WARPS = 8  # of a row's program: with 4 the masses of V = 49152 take 4 registers too many
CUT_TOKENS = 1024  # tokens that cut_kernel looks at together

# (rows up to, BLOCK_B, BLOCK_V, BLOCK_D, warps, stages): the first that holds B rows. Chosen by hand and fixed,
# so that bits do not depend on what a tuner measured. Float32 elements are twice as wide: half of BLOCK_D.
# Generation 8: its products keep both factors in registers, of which 64 numbers along D take two too many.
GROUP_STATS_TILES = {
    "float32": [(64, 64, 64, 32, 8, 3), (None, 128, 64, 32, 8, 3)],
    "generation 8": [(64, 64, 128, 64, 4, 3), (None, 128, 128, 32, 8, 4)],
    "generation 9": [(64, 64, 128, 64, 4, 3), (None, 128, 128, 64, 8, 3)],
}


def draw_block_d(D):
    """Numbers along D that draw loads at once: 32 tokens x 512 are 32 KB, so that D = 4096 is 8 loads one after the other
    instead of 32; D = 576 is 3 of 256."""
    return 512 if D >= 1024 else 256


def group_stats_tile(B, weight):
    """BLOCK_B, BLOCK_V, BLOCK_D, warps, stages for B rows."""
    kind = "float32" if weight.dtype == torch.float32 else f"generation {min(9, max(8, common_triton.generation(weight)))}"
    return next(tile[1:] for tile in GROUP_STATS_TILES[kind] if tile[0] is None or tile[0] >= B)


def row_size(groups):
    """The power of two that holds one row's groups: all of them lie in registers, at most 32 a thread of DRAW_WARPS."""
    return max(32, triton.next_power_of_2(groups))


@triton.jit(do_not_specialize=["B"])
def group_stats_kernel(hidden_ptr, weight_ptr, group_max_ptr, group_mass_ptr, logits_ptr, B, V, scale,
                       D: tl.constexpr, CAP: tl.constexpr, STORE: tl.constexpr,
                       BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """group_max, group_mass [B,ceil(V/32)]: max_v z, sum_v 2^(z - max), z in base 2. STORE: also z [B,V]."""
    row_blocks = tl.cdiv(B, BLOCK_B)  # neighbours in time share a tile of the weight: it comes from memory once
    row = (tl.program_id(0) % row_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = (tl.program_id(0) // row_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_D)
    x_ptr = hidden_ptr + row.to(tl.int64)[:, None] * D + k[None, :]
    w_ptr = weight_ptr + col.to(tl.int64)[:, None] * D + k[None, :]
    acc = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        x_mask, w_mask = (row < B)[:, None], (col < V)[:, None]
        if D % BLOCK_D != 0:
            x_mask, w_mask = x_mask & (d + k < D)[None, :], w_mask & (d + k < D)[None, :]
        x, w = tl.load(x_ptr + d, mask=x_mask, other=0.0), tl.load(w_ptr + d, mask=w_mask, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    z = tl.where((col < V)[None, :], cap_and_scale(acc, scale, CAP), NEG)
    if STORE:
        at = row.to(tl.int64)[:, None] * V + col[None, :]
        tl.store(logits_ptr + at, z, mask=(row < B)[:, None] & (col < V)[None, :])
    z = tl.reshape(z, (BLOCK_B, BLOCK_V // GROUP, GROUP))
    top = tl.max(z, 2)
    mass = tl.sum(tl.exp2(z - top[:, :, None]), 2)
    groups = tl.cdiv(V, GROUP)
    group = (tl.program_id(0) // row_blocks) * (BLOCK_V // GROUP) + tl.arange(0, BLOCK_V // GROUP)
    at, mask = row[:, None] * groups + group[None, :], (row < B)[:, None] & (group < groups)[None, :]
    tl.store(group_max_ptr + at, top, mask=mask)
    tl.store(group_mass_ptr + at, mass, mask=mask)


@triton.jit
def inverse_cdf(mass, uniform):
    """First index whose cumulative mass exceeds uniform * total, and its share of the total. Sums are float64, as in
    the reference: float32 would merge the tail of a large vocabulary. A parallel sum need not rise monotonically in
    its last bit, hence `mass > 0`: a token without mass is never drawn."""
    cdf = tl.cumsum(mass.to(tl.float64), 0)
    total = tl.max(tl.where(mass > 0, cdf, 0.0))
    index = tl.arange(0, mass.shape[0])
    index = tl.min(tl.where((cdf > uniform * total) & (mass > 0), index, mass.shape[0] - 1))
    share = tl.sum(tl.where(tl.arange(0, mass.shape[0]) == index, mass, 0.0)).to(tl.float64) / total
    return index, share.to(tl.float32)


@triton.jit
def load_groups(group_max_ptr, group_mass_ptr, b, V, GROUPS: tl.constexpr):
    """One row's groups -> the largest logit, masses relative to it."""
    groups = tl.cdiv(V, GROUP)
    g = tl.arange(0, GROUPS)
    top = tl.load(group_max_ptr + b * groups + g, mask=g < groups, other=NEG)
    mass = tl.load(group_mass_ptr + b * groups + g, mask=g < groups, other=0.0)
    return tl.max(top), top, mass * tl.exp2(top - tl.max(top))


@triton.jit
def logits_of_group(hidden_ptr, weight_ptr, b, group, V, scale, D: tl.constexpr, CAP: tl.constexpr,
                    BLOCK_D: tl.constexpr):
    """The 32 logits [32] of one group of row b, made once more: 64D bytes of the weight."""
    col, k = group * GROUP + tl.arange(0, GROUP), tl.arange(0, BLOCK_D)
    acc = tl.zeros((GROUP, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        x = tl.load(hidden_ptr + b.to(tl.int64) * D + d + k, mask=d + k < D, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + col.to(tl.int64)[:, None] * D + (d + k)[None, :],
                    mask=(col < V)[:, None] & (d + k < D)[None, :], other=0.0).to(tl.float32)
        acc += w * x[None, :]
    return tl.where(col < V, cap_and_scale(tl.sum(acc, 1), scale, CAP), NEG)


@triton.jit
def draw_kernel(hidden_ptr, weight_ptr, group_max_ptr, group_mass_ptr, uniform_ptr, token_ptr, logprob_ptr, V, scale,
                D: tl.constexpr, CAP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A token and its log-prob for row program_id(0), by two inverse CDFs."""
    b = tl.program_id(0)
    _largest, _top, mass = load_groups(group_max_ptr, group_mass_ptr, b, V, GROUPS)
    group, p_group = inverse_cdf(mass, tl.load(uniform_ptr + 2 * b))
    z = logits_of_group(hidden_ptr, weight_ptr, b, group, V, scale, D, CAP, BLOCK_D)
    inside, p_inside = inverse_cdf(tl.exp2(z - tl.max(z)), tl.load(uniform_ptr + 2 * b + 1))
    tl.store(token_ptr + b, (group * GROUP + inside).to(tl.int64))
    tl.store(logprob_ptr + b, (tl.log2(p_group) + tl.log2(p_inside)) * LN2)


@triton.jit
def greedy_kernel(hidden_ptr, weight_ptr, group_max_ptr, group_mass_ptr, token_ptr, logprob_ptr, V, scale,
                  D: tl.constexpr, CAP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The likeliest token of row program_id(0), the lowest id among equals: first group, first token inside it."""
    b = tl.program_id(0)
    _largest, top, mass = load_groups(group_max_ptr, group_mass_ptr, b, V, GROUPS)
    group = tl.argmax(top, 0)
    z = logits_of_group(hidden_ptr, weight_ptr, b, group, V, scale, D, CAP, BLOCK_D)
    tl.store(token_ptr + b, (group * GROUP + tl.argmax(z, 0)).to(tl.int64))
    tl.store(logprob_ptr + b, -tl.log2(tl.sum(mass)) * LN2)


# ----------------------------------------------------------------------------------------------------
# top-k, top-p, min-p: here the logits do stand in memory, 8 bytes more a logit, because which tokens stay is
# known only after all have been seen. cut_kernel finds the smallest logit that stays by bisection, writes the
# masses of what stayed over group_mass, and the choice goes on as before.


@triton.jit
def order_key(z):
    """float32 -> int32 with the same order (no NaN), so that bisection ends after 32 halvings, exactly."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0.0 a 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def above(logits_ptr, group_max_ptr, b, key, top, V, BLOCK: tl.constexpr):
    """How many logits of row b have a key > `key`, and their mass. Blocks whose groups all lie below are not read:
    after a few halvings that is nearly all of them, and a pass costs V/8 bytes instead of 4V."""
    count, mass = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    groups = tl.cdiv(V, GROUP)
    for first in range(0, V, BLOCK):
        g = first // GROUP + tl.arange(0, BLOCK // GROUP)
        largest = tl.load(group_max_ptr + b * groups + g, mask=g < groups, other=NEG)
        if tl.max(order_key(largest)).to(tl.int64) > key:
            col = first + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + b.to(tl.int64) * V + col, mask=col < V, other=NEG)
            inside = (order_key(z).to(tl.int64) > key) & (col < V)
            count += tl.sum(inside.to(tl.int32))
            mass += tl.sum(tl.where(inside, tl.exp2(z - top), 0.0).to(tl.float64))
    return count, mass


@triton.jit(do_not_specialize=["top_k"])
def cut_kernel(logits_ptr, group_max_ptr, group_mass_ptr, total_ptr, kept_ptr, V, top_k, top_p, min_shift,
               GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Row program_id(0): top_k, then top_p of what is left, then min_p (as log2(min_p) = min_shift). Writes NEG over
    cut logits [B,V] in groups that keep some, group_mass [B,V/32] of the kept, total = log2 sum 2^z of the uncut
    row and the kept share of it."""
    b = tl.program_id(0)
    top, _group_top, mass = load_groups(group_max_ptr, group_mass_ptr, b, V, GROUPS)
    total = tl.sum(mass.to(tl.float64))
    highest = order_key(top).to(tl.int64)
    lowest = order_key(tl.full((), -3.4e38, tl.float32)).to(tl.int64)

    # The last token of top-k: the largest key with fewer than k above it. `ties` of that key may stay.
    smallest, ties, kept_mass = lowest, tl.full((), 0, tl.int32) + V, total
    if top_k < V:
        lo, hi = lowest - 1, highest  # at least k lie above lo, fewer than k above hi
        for _halving in range(33):
            middle = lo + (hi - lo) // 2
            count, _mass = above(logits_ptr, group_max_ptr, b, middle, top, V, BLOCK)
            if hi - lo > 1:
                if count >= top_k:
                    lo = middle
                else:
                    hi = middle
        smallest = hi
        count, mass_above = above(logits_ptr, group_max_ptr, b, smallest, top, V, BLOCK)
        ties = top_k - count
        at = smallest.to(tl.int32)
        at = (at ^ ((at >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        kept_mass = mass_above + ties * tl.exp2(at - top).to(tl.float64)

    # The last token of top-p: the smallest key with less than top_p of the mass above it.
    if top_p < 1.0:
        goal = kept_mass * top_p
        lo, hi = smallest - 1, highest  # above lo lies the goal or more (or it is cut already), above hi less
        for _halving in range(33):
            middle = lo + (hi - lo) // 2
            _count, mass_above = above(logits_ptr, group_max_ptr, b, middle, top, V, BLOCK)
            if hi - lo > 1:
                if mass_above >= goal:
                    lo = middle
                else:
                    hi = middle
        _count, mass_above = above(logits_ptr, group_max_ptr, b, hi, top, V, BLOCK)
        at = hi.to(tl.int32)
        at = (at ^ ((at >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        one = tl.exp2(at - top).to(tl.float64)
        fit = tl.minimum(tl.ceil((goal - mass_above) / tl.maximum(one, 1e-300)), 1.0 * V).to(tl.int32)
        ties = tl.where(hi == smallest, tl.minimum(ties, fit), fit)
        smallest = hi

    # What stayed, in the order of ids, so that the lowest ids of equal logits are the ones that stay.
    groups = tl.cdiv(V, GROUP)
    seen, kept = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    for first in range(0, V, BLOCK):
        g = first // GROUP + tl.arange(0, BLOCK // GROUP)
        largest = tl.load(group_max_ptr + b * groups + g, mask=g < groups, other=NEG)
        left = tl.zeros((BLOCK // GROUP,), tl.float32)
        if tl.max(order_key(largest)).to(tl.int64) >= smallest:
            col = first + tl.arange(0, BLOCK)
            at = logits_ptr + b.to(tl.int64) * V + col
            z = tl.load(at, mask=col < V, other=NEG)
            key = order_key(z).to(tl.int64)
            equal = ((key == smallest) & (col < V)).to(tl.int32)
            rank = seen + tl.cumsum(equal, 0)
            seen += tl.sum(equal)
            keep = ((key > smallest) | ((equal == 1) & (rank <= ties))) & (z >= top + min_shift) & (col < V)
            tl.store(at, tl.where(keep, z, NEG), mask=col < V)
            z = tl.reshape(tl.where(keep, z, NEG), (BLOCK // GROUP, GROUP))
            left = tl.sum(tl.where(z > NEG, tl.exp2(z - largest[:, None]), 0.0), 1)
            kept += tl.sum((left * tl.exp2(largest - top)).to(tl.float64))
        tl.store(group_mass_ptr + b * groups + g, left, mask=g < groups)
    tl.store(total_ptr + b, top + tl.log2(total.to(tl.float32)))
    tl.store(kept_ptr + b, (kept / total).to(tl.float32))


@triton.jit
def draw_stored_kernel(logits_ptr, group_max_ptr, group_mass_ptr, total_ptr, uniform_ptr, token_ptr, logprob_ptr, V,
                       GROUPS: tl.constexpr):
    """As draw_kernel, with the 32 logits from memory; the log-prob is the uncut policy's."""
    b = tl.program_id(0)
    _largest, _top, mass = load_groups(group_max_ptr, group_mass_ptr, b, V, GROUPS)
    group, _share = inverse_cdf(mass, tl.load(uniform_ptr + 2 * b))
    col = group * GROUP + tl.arange(0, GROUP)
    z = tl.load(logits_ptr + b.to(tl.int64) * V + col, mask=col < V, other=NEG)
    inside, _share = inverse_cdf(tl.exp2(z - tl.max(z)), tl.load(uniform_ptr + 2 * b + 1))
    chosen = tl.sum(tl.where(tl.arange(0, GROUP) == inside, z, 0.0))
    tl.store(token_ptr + b, (group * GROUP + inside).to(tl.int64))
    tl.store(logprob_ptr + b, (chosen - tl.load(total_ptr + b)) * LN2)


@triton.jit(do_not_specialize=["seed", "n"])
def philox_uniform_kernel(sequence_ptr, position_ptr, out_ptr, seed, n, BLOCK: tl.constexpr):
    """out [n,2] float64 of sequence_id, position [n]; the words and bits of kernels/sampling.py."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.load(sequence_ptr + i, mask=i < n, other=0)
    position = tl.load(position_ptr + i, mask=i < n, other=0)
    low, high = sequence.to(tl.uint32), (sequence >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, position.to(tl.uint32), low, high, tl.zeros_like(low))
    first = ((a >> 5).to(tl.int64) << 26) + (b >> 6).to(tl.int64)
    second = ((c >> 5).to(tl.int64) << 26) + (d >> 6).to(tl.int64)
    step = tl.full((), 1.1102230246251565e-16, tl.float64)  # 2^-53
    tl.store(out_ptr + 2 * i, first.to(tl.float64) * step, mask=i < n)
    tl.store(out_ptr + 2 * i + 1, second.to(tl.float64) * step, mask=i < n)


# ----------------------------------------------------------------------------------------------------
# Wrappers, with the signatures of kernels/sampling.py.


def group_stats(hidden, weight, temperature, softcap=None, logits=None, tile=None):
    """hidden [B,D], weight [V,D] of one dtype -> group_max, group_mass [B,ceil(V/32)] float32, base 2.
    logits: a [B,V] float32 tensor to fill as well. tile: another row of the table, for tests."""
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: give both in one dtype")
    (B, D), V = hidden.shape, weight.shape[0]
    hidden, weight = hidden.contiguous(), weight.contiguous()
    block_b, block_v, block_d, warps, stages = tile or group_stats_tile(B, weight)
    top, mass = torch.empty(2, B, triton.cdiv(V, 32), device=hidden.device).unbind(0)
    group_stats_kernel[(triton.cdiv(B, block_b) * triton.cdiv(V, block_v),)](
        hidden, weight, top, mass, top if logits is None else logits, B, V, LOG2E.value / temperature, D,
        softcap, logits is not None, block_b, block_v, block_d, num_warps=warps, num_stages=stages)
    return top, mass


def linear_draw(hidden, weight, temperature, uniform, softcap=None):
    """See kernels/sampling.py."""
    (B, D), V = hidden.shape, weight.shape[0]
    token, logprob = torch.empty(B, dtype=torch.int64, device=hidden.device), torch.empty(B, device=hidden.device)
    if B:
        top, mass = group_stats(hidden, weight, temperature, softcap)
        size = row_size(top.shape[1])
        draw_kernel[(B,)](hidden.contiguous(), weight.contiguous(), top, mass, uniform.contiguous(), token, logprob, V,
                          LOG2E.value / temperature, D, softcap, size, draw_block_d(D), num_warps=DRAW_WARPS)
    return token, logprob


def linear_greedy(hidden, weight, softcap=None):
    """See kernels/sampling.py."""
    (B, D), V = hidden.shape, weight.shape[0]
    token, logprob = torch.empty(B, dtype=torch.int64, device=hidden.device), torch.empty(B, device=hidden.device)
    if B:
        top, mass = group_stats(hidden, weight, 1.0, softcap)
        size = row_size(top.shape[1])
        greedy_kernel[(B,)](hidden.contiguous(), weight.contiguous(), top, mass, token, logprob, V, LOG2E.value, D, softcap, size,
                            draw_block_d(D), num_warps=DRAW_WARPS)
    return token, logprob


def linear_draw_filtered(hidden, weight, temperature, uniform, top_k=0, top_p=1.0, min_p=0.0, softcap=None):
    """See kernels/sampling.py."""
    B, V = hidden.shape[0], weight.shape[0]
    device = hidden.device
    token = torch.empty(B, dtype=torch.int64, device=device)
    logprob, total, kept = torch.empty(3, B, device=device).unbind(0)
    if B:
        logits = torch.empty(B, V, device=device)
        top, mass = group_stats(hidden, weight, temperature, softcap, logits)
        size = row_size(top.shape[1])
        cut_kernel[(B,)](logits, top, mass, total, kept, V, top_k or V, float(top_p), math.log2(max(min_p, 1e-300)), size,
                         CUT_TOKENS, num_warps=DRAW_WARPS, maxnreg=128)  # without it ptxas prefers 80 and spills
        draw_stored_kernel[(B,)](logits, top, mass, total, uniform.contiguous(), token, logprob, V, size, num_warps=DRAW_WARPS)
    return token, logprob, kept


def philox_uniform(seed, sequence_id, position):
    """See kernels/sampling.py."""
    sequence_id, position = torch.broadcast_tensors(sequence_id, position)
    out = torch.empty(*position.shape, 2, dtype=torch.float64, device=position.device)
    n, block = position.numel(), 256
    if n:
        philox_uniform_kernel[(triton.cdiv(n, block),)](sequence_id.contiguous(), position.contiguous(), out, seed, n, block)
    return out


def main():
    from kernels import demo
    from kernels.logprob import linear_logprob

    device, dtype = demo.start("kernels.sampling_triton")
    V, D = (128256, 4096) if device == "cuda" else (300, 40)
    weight = demo.randn(V, D, device=device, dtype=dtype, scale=D**-0.5)
    floor = demo.copy_seconds(weight.nbytes)  # the weight must be read
    for B in (1, 64, 256) if device == "cuda" else (3,):
        hidden = demo.randn(B, D, device=device, dtype=dtype, seed=B)
        uniform = philox_uniform(0, torch.arange(B, device=device), torch.tensor(0, device=device))
        for name, draw in {"a token and its log-prob": lambda h, u: linear_draw(h, weight, 0.8, u),
                           "the same from min-p 0.1": lambda h, u: linear_draw_filtered(h, weight, 0.8, u, min_p=0.1)}.items():
            token, logprob, *_ = draw(hidden, uniform)
            error = float((logprob - linear_logprob(hidden.float(), weight.float(), token, 0.8)[0]).abs().max())
            demo.show(f"{B} rows: {name}", error, lambda f=draw, h=hidden, u=uniform: f(h, u), floor)


if __name__ == "__main__":
    main()
