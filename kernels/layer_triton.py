"""Normalisation, rotary positions with the cache write, and the gate, each one kernel: see kernels/layer.py.

    add_rmsnorm   a program a row: reads x and delta, 4D bytes, writes the sum and its norm, 4D bytes
    rope_write    a program a row and head: reads 2d bytes, writes 2d, to q or straight into the cache
    swiglu        a program for 1024 elements: reads 4 bytes an element, writes 2

A row of add_rmsnorm lies in registers whole (D up to 16384: 64 elements a thread of 8 warps), so that it is read
once. All of it is small: at B = 256 and D = 576 a kernel moves 1 MB, 0.3 microseconds of memory time, less than
its own launch. Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl

SWIGLU_BLOCK = 1024


def rmsnorm_tile(D):
    """(elements, warps) of a row's program."""
    size = triton.next_power_of_2(D)
    return size, 4 if size <= 2048 else 8


@triton.jit
def add_rmsnorm_kernel(x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, eps, D: tl.constexpr, ADD: tl.constexpr,
                       BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at, inside = tl.program_id(0) * D + i, i < D
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # The stream is kept in its own dtype; the norm sees what the next layer will add to.
        tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), mask=inside)
        x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def rope_write_kernel(qkv_ptr, cos_ptr, sin_ptr, position_ptr, q_ptr, k_ptr, v_ptr, T, H: tl.constexpr, K: tl.constexpr,
                      HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Row program_id(0), head program_id(1) of H + 2K."""
    b, h = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    position = tl.load(position_ptr + b)
    at = qkv_ptr + (b * (H + 2 * K) + h) * 2 * HALF + i
    x, y = tl.load(at, mask=inside, other=0.0), tl.load(at + HALF, mask=inside, other=0.0)
    if h < H + K:
        c = tl.load(cos_ptr + position * 2 * HALF + i, mask=inside, other=0.0)
        s = tl.load(sin_ptr + position * 2 * HALF + HALF + i, mask=inside, other=0.0)
        a, b2 = x.to(tl.float32), y.to(tl.float32)
        x, y = (a * c - b2 * s).to(x.dtype), (b2 * c + a * s).to(x.dtype)
    if h < H:
        to = q_ptr + (b * H + h) * 2 * HALF + i
    elif h < H + K:
        to = k_ptr + ((b * K + h - H).to(tl.int64) * T + position) * 2 * HALF + i
    else:
        to = v_ptr + ((b * K + h - H - K).to(tl.int64) * T + position) * 2 * HALF + i
    tl.store(to, x, mask=inside)
    tl.store(to + HALF, y, mask=inside)


@triton.jit(do_not_specialize=["n"])
def swiglu_kernel(gate_up_ptr, out_ptr, n, INNER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = i // INNER, i % INNER
    gate = tl.load(gate_up_ptr + row * 2 * INNER + col, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * INNER + INNER + col, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=i < n)


def add_rmsnorm(x, delta, weight, eps):
    """See kernels/layer.py."""
    B, D = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    size, warps = rmsnorm_tile(D)
    add_rmsnorm_kernel[(B,)](x, x if delta is None else delta.contiguous(), weight, total, out, eps, D, delta is not None,
                             size, num_warps=warps)
    return total, out


def rope_write(qkv, cos, sin, position, k_cache, v_cache):
    """See kernels/layer.py."""
    B, heads, d = qkv.shape
    _, K, T, _ = k_cache.shape
    q = torch.empty(B, heads - 2 * K, d, dtype=qkv.dtype, device=qkv.device)
    rope_write_kernel[(B, heads)](qkv.contiguous(), cos, sin, position, q, k_cache, v_cache, T, heads - 2 * K, K, d // 2,
                                  triton.next_power_of_2(d // 2), num_warps=1)
    return q


def swiglu(gate_up):
    """See kernels/layer.py."""
    B, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(B, inner, dtype=gate_up.dtype, device=gate_up.device)
    n = out.numel()
    swiglu_kernel[(triton.cdiv(n, SWIGLU_BLOCK),)](gate_up.contiguous(), out, n, inner, SWIGLU_BLOCK)
    return out
