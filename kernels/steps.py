"""From three lines of PyTorch to the kernel of kernels/logprob_triton.py, one idea a step.

    python -m kernels.steps                    # each step against the first: error, milliseconds, floor, share of it

    1 whole          the logits whole, softmax, gather: three lines. [N,V] float32 is written once and read four times
    2 tiles          the product by our own tiles. Nothing is saved yet; it shows what a tile is
    3 statistics     a tile is reduced before it is thrown away: 8 bytes a row instead of 4 bytes a logit leave the chip
    4 combined       the statistics meet in a second kernel, instead of five passes of PyTorch over them
    5 described      tiles by descriptors (on Hopper the copy engine brings them), in an order that the L2 cache likes, with the
                     entropy's moment: this is linear_logprob
    6 loss inside    what follows the log-prob is known while the tiles are there, so they become dloss/dlogits in place: loss and
                     both gradients, 6NDV operations: this is linear_logprob_loss

The floor is the bare matrix product of the step's shape (cuBLAS; three of them for step 6): a share of 1 would mean that all
else is free. What every step must return is tested in tests/test_steps.py against float64.
"""

import torch
import triton
import triton.language as tl

from kernels.common_triton import LN2, LOG2E, NEG, UPCAST
from kernels.logprob_triton import combine, linear_logprob, linear_logprob_loss

BLOCK_N, BLOCK_V, BLOCK_D = 64, 128, 64


# ----------------------------------------------------------------------------------------------------
# 1. What everybody writes first.


def whole(hidden, weight, target, temperature):
    """hidden [N,D], weight [V,D], target [N] -> log-prob [N]."""
    z = hidden.float() @ weight.float().t() / temperature
    return z.log_softmax(-1).gather(1, target[:, None])[:, 0]


# ----------------------------------------------------------------------------------------------------
# 2. A program makes one tile of the logits. Its accumulator stays in registers along the whole of D.


@triton.jit
def product_tile(hidden_ptr, weight_ptr, row, col, N, V, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    """hidden[row] @ weight[col].T [BLOCK_N,BLOCK_V] float32; rows and tokens beyond the edges are 0."""
    k, acc = tl.arange(0, BLOCK_D), tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        inside = (d + k < D)[None, :]
        x = tl.load(hidden_ptr + row.to(tl.int64)[:, None] * D + d + k[None, :], mask=(row < N)[:, None] & inside, other=0.0)
        w = tl.load(weight_ptr + col.to(tl.int64)[:, None] * D + d + k[None, :], mask=(col < V)[:, None] & inside, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def logits_kernel(hidden_ptr, weight_ptr, out_ptr, N, V, scale, D: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """-> out [N,V] float32 = the logits times scale."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = product_tile(hidden_ptr, weight_ptr, row, col, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D) * scale
    at = out_ptr + row.to(tl.int64)[:, None] * V + col[None, :]
    tl.store(at, z, mask=(row < N)[:, None] & (col < V)[None, :])


def grid(N, V):
    return triton.cdiv(N, BLOCK_N), triton.cdiv(V, BLOCK_V)


def tiles(hidden, weight, target, temperature):
    (N, D), V = hidden.shape, weight.shape[0]
    z = torch.empty(N, V, device=hidden.device)
    logits_kernel[grid(N, V)](hidden, weight, z, N, V, 1 / temperature, D, BLOCK_N, BLOCK_V, BLOCK_D)
    return z.log_softmax(-1).gather(1, target[:, None])[:, 0]


# ----------------------------------------------------------------------------------------------------
# 3. Of a tile only what the softmax needs: each row's largest logit and the sum of 2^(z - largest). In base 2.


@triton.jit
def statistics_kernel(hidden_ptr, weight_ptr, target_ptr, stats_ptr, target_logit_ptr, N, V, scale, D: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """-> stats [3,tiles,N]: top, mass (and 0, where linear_logprob has the moment); target_logit [N]."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = product_tile(hidden_ptr, weight_ptr, row, col, N, V, D, BLOCK_N, BLOCK_V, BLOCK_D) * scale
    hit = tl.load(target_ptr + row, mask=row < N, other=-1)[:, None] == col[None, :]
    tl.store(target_logit_ptr + row, tl.sum(tl.where(hit, z, 0.0), 1), mask=(row < N) & (tl.sum(hit.to(tl.int32), 1) == 1))
    z = tl.where((col < V)[None, :], z, NEG)
    top = tl.max(z, 1)
    mass = tl.sum(tl.exp2(z - top[:, None]), 1)
    at, plane = stats_ptr + tl.program_id(1) * N + row, tl.num_programs(1) * N
    tl.store(at, top, mask=row < N)
    tl.store(at + plane, mass, mask=row < N)
    tl.store(at + 2 * plane, 0 * mass, mask=row < N)


def tile_statistics(hidden, weight, target, temperature):
    (N, D), V = hidden.shape, weight.shape[0]
    stats = torch.empty(3, triton.cdiv(V, BLOCK_V), N, device=hidden.device)
    target_logit = torch.empty(N, device=hidden.device)
    statistics_kernel[grid(N, V)](hidden, weight, target, stats, target_logit, N, V, LOG2E.value / temperature, D, BLOCK_N,
                                  BLOCK_V, BLOCK_D)
    return stats, target_logit


def statistics(hidden, weight, target, temperature):
    (top, mass, _), target_logit = tile_statistics(hidden, weight, target, temperature)
    row_top = top.amax(0)
    total = (mass * (top - row_top).exp2()).sum(0)
    return (target_logit - row_top - total.log2()) * LN2.value


# ----------------------------------------------------------------------------------------------------
# 4. The statistics of a row's tiles meet in combine_kernel: one pass, all of it in registers.


def combined(hidden, weight, target, temperature):
    return combine(*tile_statistics(hidden, weight, target, temperature))[0]


# ----------------------------------------------------------------------------------------------------
# 5. and 6. kernels/logprob_triton.py.


def described(hidden, weight, target, temperature):
    return linear_logprob(hidden, weight, target, temperature)[0]


FORWARD = {"1 whole": whole, "2 tiles": tiles, "3 statistics": statistics, "4 combined": combined, "5 described": described}


def loss_inside(hidden, weight, target, temperature):
    """-> sum of the log-probs, with its gradients inside (step 6)."""
    return linear_logprob_loss(hidden, weight, target, temperature, lambda logprob, entropy: logprob.sum())[0]


def loss_of_whole(hidden, weight, target, temperature):
    return whole(hidden, weight, target, temperature).sum()


def gradients(loss, hidden, weight, target, temperature):
    """-> dloss/dhidden, dloss/dweight."""
    inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
    return torch.autograd.grad(loss(*inputs, target, temperature), inputs)


def main():
    from kernels import demo

    device, dtype = demo.start("kernels.steps")
    for name, (N, V, D) in {"SmolLM2": (4096, 49152, 576), "Llama-8B": (4096, 128256, 4096)}.items():
        if device == "cpu":
            name, (N, V, D) = "toy", (9, 300, 40)
        print(f"{name}: {N} rows, V = {V}, D = {D}")
        hidden, weight = (demo.randn(n, D, device=device, dtype=dtype, seed=n, scale=D**-0.25) for n in (N, V))
        inputs = hidden, weight, torch.arange(N, device=device) * 7919 % V, 0.8
        product, first = demo.seconds(lambda h=hidden, w=weight: h @ w.t()), FORWARD["1 whole"](*inputs)
        for step, function in FORWARD.items():
            demo.show(step, float((function(*inputs) - first).abs().max()), lambda f=function, x=inputs: f(*x), product)
        exact = gradients(loss_of_whole, *inputs)
        for step, loss in {"1 with autograd": loss_of_whole, "6 loss inside": loss_inside}.items():
            found = gradients(loss, *inputs)
            error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, exact))
            demo.show(step, error, lambda f=loss, x=inputs: gradients(f, *x), 3 * product)
        if device == "cpu":
            break


if __name__ == "__main__":
    main()
