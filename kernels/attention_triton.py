"""Decode attention on a GPU: kernels/attention.py says what is computed and what it costs; here is how.

    split    one program for (row, key head, CHUNK positions): softmax over its chunk, not yet normalised
    combine  one program for (row, query head): the chunks' sums, weighted by their maxima

Why split: one row of one key head is work for one multiprocessor out of 132, and a few rows would leave the rest
idle. Why the chunk is a constant, where others choose the number of splits to fill the machine: then the places
at which a row's sum is cut depend on its length alone, so neighbours cannot change its bits. Programs beyond the
row's length (or before its window) end at once. What it costs: partial results, (d + 2) * 4 bytes a query head
against CHUNK * 4 d bytes of cache a key head: 2.4% for SmolLM2 (three query heads a key head, d = 64).

Float32 caches go through the tensor cores too, as three tf32 products of the high and low halves of each factor.

The tiles. The H/K query heads of a key head are the rows of one tile, so the cache is read once for all of them;
tensor cores want 16 rows, so the others are padding: idle multipliers, no bytes. 64 positions a step (8 KB of
keys at d = 64): two steps a chunk, enough loads under way from the 4 to 8 programs that fit a multiprocessor.
"""

import torch
import triton
import triton.language as tl

from kernels.common_triton import LOG2E, NEG, UPCAST, cap_and_scale

CHUNK = 128  # positions a program: part of the bits of a result
SPLIT_STAGES = 2


@triton.jit(do_not_specialize=["T", "window"])
def split_kernel(q_ptr, k_ptr, v_ptr, length_ptr, sum_ptr, top_ptr, mass_ptr, T, window, scale,
                 K: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_DIM: tl.constexpr,
                 BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr):
    """Chunk program_id(1) of row and key head program_id(0). G query heads share a key head; DIM is the head's width.
    sum [B,K,G,chunks,DIM], top, mass [B,K,G,chunks] float32: sum_t 2^(s - top) v[t], max s, sum_t 2^(s - top)."""
    bk, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    length = tl.load(length_ptr + bk // K).to(tl.int32)
    first, last = chunk * CHUNK, tl.minimum(length, (chunk + 1) * CHUNK)
    if WINDOW:
        first = tl.maximum(first, length - window)
    if first < last:
        g, i, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_T)
        q = tl.load(q_ptr + (bk * G + g)[:, None] * DIM + i[None, :], mask=(g < G)[:, None] & (i < DIM)[None, :], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        top = tl.full((BLOCK_G,), NEG, tl.float32)
        mass = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_DIM), tl.float32)
        for start in range(chunk * CHUNK, last, BLOCK_T):
            visible = (start + t >= first) & (start + t < last)
            at = (bk.to(tl.int64) * T + start + t)[:, None] * DIM + i[None, :]
            k = tl.load(k_ptr + at, mask=visible[:, None] & (i < DIM)[None, :], other=0.0)
            v = tl.load(v_ptr + at, mask=visible[:, None] & (i < DIM)[None, :], other=0.0)
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            s = cap_and_scale(tl.dot(q, k.T, input_precision="tf32x3") * scale, LOG2E, CAP)
            s = tl.where(visible[None, :], s, NEG)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.where(visible[None, :], tl.exp2(s - new[:, None]), 0.0)
            shrink = tl.exp2(top - new)
            mass = mass * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
            top = new
        at = (bk * G + g) * chunks + chunk
        tl.store(sum_ptr + at.to(tl.int64)[:, None] * DIM + i[None, :], acc, mask=(g < G)[:, None] & (i < DIM)[None, :])
        tl.store(top_ptr + at, top, mask=g < G)
        tl.store(mass_ptr + at, mass, mask=g < G)


@triton.jit(do_not_specialize=["chunks", "window"])
def combine_kernel(sum_ptr, top_ptr, mass_ptr, length_ptr, out_ptr, chunks, window, H: tl.constexpr, DIM: tl.constexpr,
                   BLOCK_DIM: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr):
    """Row and query head program_id(0): its chunks -> out [B,H,DIM]."""
    bh = tl.program_id(0)
    i = tl.arange(0, BLOCK_DIM)
    length = tl.load(length_ptr + bh // H).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(0, length - window) // CHUNK
    top, mass = tl.full((), NEG, tl.float32), tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_DIM,), tl.float32)
    for chunk in range(first, tl.cdiv(length, CHUNK)):
        at = bh * chunks + chunk
        one = tl.load(top_ptr + at)
        new = tl.maximum(top, one)
        shrink, grow = tl.exp2(top - new), tl.exp2(one - new)
        part = tl.load(sum_ptr + at.to(tl.int64) * DIM + i, mask=i < DIM, other=0.0)
        mass = mass * shrink + tl.load(mass_ptr + at) * grow
        acc = acc * shrink + part * grow
        top = new
    tl.store(out_ptr + bh * DIM + i, (acc / mass).to(out_ptr.dtype.element_ty), mask=i < DIM)


def split_tile(G, d, dtype):
    """(BLOCK_G, BLOCK_DIM, BLOCK_T), warps: query heads of one key head and their width, padded to what tensor cores
    take; positions a step, fewer where a float32 tile would not fit the registers."""
    block_g, block_dim = max(16, triton.next_power_of_2(G)), max(16, triton.next_power_of_2(d))
    if dtype.itemsize == 2:
        return (block_g, block_dim, 64), 4
    return (block_g, block_dim, max(16, min(32, 4096 // block_dim))), 4 if block_dim <= 128 else 8


def decode_attention(q, k_cache, v_cache, length, scale=None, window=None, softcap=None):
    """See kernels/attention.py. The caches must be contiguous; nothing here waits for the GPU."""
    B, H, d = q.shape
    _, K, T, _ = k_cache.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not B:
        return out
    chunks = triton.cdiv(T, CHUNK)
    sums = torch.empty(B, H, chunks, d, device=q.device)
    top, mass = torch.empty(2, B, H, chunks, device=q.device).unbind(0)
    tile, warps = split_tile(H // K, d, q.dtype)
    split_kernel[(B * K, chunks)](
        q.contiguous(), k_cache, v_cache, length, sums, top, mass, T, window or 0, d**-0.5 if scale is None else scale,
        K, H // K, d, *tile, CHUNK, window is not None, softcap,
        num_warps=warps, num_stages=SPLIT_STAGES)
    combine_kernel[(B * H,)](sums, top, mass, length, out, chunks, window or 0, H, d, tile[1], CHUNK, window is not None,
                             num_warps=1)
    return out


def main():
    from kernels import attention, demo

    device, dtype = demo.start("kernels.attention_triton")
    shapes = {"SmolLM2, 256 rows of 1000": (256, 9, 3, 64, 1000), "Llama-8B, 64 rows of 1000": (64, 32, 8, 128, 1000)}
    for name, (B, H, K, d, T) in (shapes if device == "cuda" else {"toy": (2, 6, 2, 16, 40), "toy 2": (2, 4, 4, 8, 9)}).items():
        q = demo.randn(B, H, d, device=device, dtype=dtype)
        k, v = (demo.randn(B, K, T, d, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
        length = torch.full((B,), T, device=device)
        exact = attention.decode_attention(q[:2].float(), k[:2].float(), v[:2].float(), length[:2])
        error = float((decode_attention(q, k, v, length)[:2].float() - exact).abs().max())
        demo.show(name, error, lambda x=(q, k, v, length): decode_attention(*x), demo.copy_seconds(k.nbytes + v.nbytes))


if __name__ == "__main__":
    main()
