"""Normalisation, rotary positions with the cache write, and the gate, each one kernel: see kernels/layer.py.

    add_rmsnorm   a program a row: reads x and delta, 4D bytes, writes the sum and its norm, 4D bytes
    rope_write    a program a row and head: reads 2d bytes, writes 2d, to q or straight into the cache
    swiglu        a program for 1024 elements of a row: reads 4 bytes an element, writes 2

A row of add_rmsnorm lies in registers whole (D up to 16384: 64 elements a thread of 8 warps), so that it is read
once. All of it is small: at B = 256 and D = 576 a kernel moves 1 MB, 0.3 microseconds of memory time, less than
its own launch. Arithmetic is float32.
"""

import sys

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


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of row program_id(0). Two numbers of the grid rather than i // INNER and i % INNER, which would hide from
    the compiler that neighbours are neighbours: it would load them one by one."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up_ptr + row * 2 * INNER + i
    gate = tl.load(at, mask=i < INNER, other=0.0).to(tl.float32)
    up = tl.load(at + INNER, mask=i < INNER, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * INNER + i, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=i < INNER)


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
    if B:
        swiglu_kernel[(B, triton.cdiv(inner, SWIGLU_BLOCK))](gate_up.contiguous(), out, inner, SWIGLU_BLOCK)
    return out


def main():
    from kernels import demo, layer

    device, dtype = demo.start("kernels.layer_triton")
    B, D, inner, T = (256, 576, 1536, 1000) if device == "cuda" else (3, 40, 24, 9)
    x, delta, gate_up = (demo.randn(B, n, device=device, dtype=dtype, seed=n) for n in (D, D, 2 * inner))
    weight, position = torch.ones(D, device=device, dtype=dtype), torch.arange(B, device=device) % T
    qkv, angle = demo.randn(B, 15, 64, device=device, dtype=dtype), torch.rand(T, 32, device=device)
    tables = torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)
    k, v = (torch.zeros(B, 3, T, 64, device=device, dtype=dtype) for _ in range(2))
    cases = (("add_rmsnorm", (x, delta, weight, 1e-5), 4 * x.nbytes), ("swiglu", (gate_up,), 1.5 * gate_up.nbytes),
             ("rope_write", (qkv, *tables, position, k, v), 2 * qkv.nbytes))  # arguments, bytes moved
    for name, arguments, moved in cases:
        ours, reference = (getattr(module, name)(*arguments) for module in (sys.modules[__name__], layer))
        pairs = zip(ours, reference) if isinstance(ours, tuple) else [(ours, reference)]
        error = max(float((a - b).abs().max()) for a, b in pairs)
        run = getattr(sys.modules[__name__], name)
        demo.show(name, error, lambda f=run, a=arguments: f(*a), demo.copy_seconds(moved))


if __name__ == "__main__":
    main()
