"""The matrix product of every layer: x @ weight.T, on a CPU through the library that is fastest there.

PyTorch's CPU wheels send float32 products to MKL, which on processors of other makers takes a slower code path, the more
so the wider their vectors. oneDNN, in the same wheel, looks at what the processor can do: with AVX-512 on a Zen 5 core its
products are 2.2 times as fast, forward and backward; with AVX2 on a Zen 3 core MKL is as fast, and cheaper to call
(bench/products.py). Three layouts of a weight, then:

    as it is     the large products of training: oneDNN with AVX-512, else MKL
    packed       a few rows (decoding): oneDNN's own layout, else it would copy the weight in every call
    transposed   one row (decoding one sequence), limited by reading the weight once: MKL reads a wide one at the speed
                 of memory when it lies transposed, and at half to two thirds of that otherwise

Generation uses each weight hundreds of times between two updates, so the copies are kept meanwhile: see packed_weights.
On CUDA, in bfloat16, or where PyTorch lacks the operator, this is F.linear.
"""

from contextlib import contextmanager
from functools import wraps

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    _product = torch.ops.mkldnn._linear_pointwise
    _pack = torch.ops.mkldnn._reorder_linear_weight
    _usable = torch.backends.mkldnn.is_available()
except (AttributeError, RuntimeError):
    _usable = False

_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
SMALL = 1_000_000  # multiply-adds below which oneDNN's call costs more than it saves (20 us)
FEW = 16  # rows up to which a packed weight beats MKL also without AVX-512: reading it is what costs
TINY = 65_536  # entries of a weight that stays in the cache whatever its layout
_packed = {}  # id(weight) -> (weight, its version, a copy in a faster layout)


def matmul_nt(x, weight):
    """x [M,K] @ weight [N,K].T -> [M,N]; no gradient of its own. Either may be a transposed view."""
    if not (_usable and x.dtype == torch.float32 and x.device.type == "cpu"):
        return x @ weight.t()
    entry = _packed.get(id(weight))
    if entry is not None and entry[0] is weight and entry[1] == weight._version:
        copy = entry[2]
        return _product(x, copy, None, "none", [], "") if copy.is_mkldnn else x @ copy
    if _wide and x.shape[0] > 1 and x.shape[0] * weight.numel() >= SMALL:
        return _product(x, weight, None, "none", [], "")
    return x @ weight.t()


def best_layout(weight, rows):
    """Which copy of weight [N,K] to keep for many products with `rows` rows: "packed", "transposed" or "" (none)."""
    N, K = weight.shape
    if N * K < TINY:
        return ""
    if rows == 1 and N >= K:
        return "transposed"
    return "packed" if _wide or 1 < rows <= FEW else ""


def first_order(backward):
    """For backward() of an autograd.Function that is no graph of its own: under create_graph=True it raises, where PyTorch would
    take its result for a constant and the second derivative for 0 (once_differentiable notices only some cases)."""
    @wraps(backward)
    def once(ctx, *gradients):
        if torch.is_grad_enabled():
            raise RuntimeError("the kernels' gradients cannot be differentiated again: create_graph=True needs plain PyTorch")
        return backward(ctx, *gradients)

    return once


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = matmul_nt(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = matmul_nt(dy.t(), x.t()) if ctx.needs_input_grad[1] else None
        return dx, dw


def linear(x, weight):
    """x [...,K], weight [N,K] -> [...,N], differentiable in both."""
    if not (_usable and x.dtype == torch.float32 and x.device.type == "cpu"):
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = _Linear.apply(rows, weight)
    else:
        y = matmul_nt(rows, weight)
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """nn.Linear without bias, through linear() above."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return linear(x, self.weight)


@contextmanager
def packed_weights(weights, rows):
    """Keep copies of these matrices in the best layout while many products with about `rows` rows are made. Costs their
    size in memory. A weight that is updated meanwhile is noticed by its version and goes the ordinary way."""
    mine = []
    if _usable:
        for w in weights:
            if w.dim() != 2 or w.dtype != torch.float32 or w.device.type != "cpu" or id(w) in _packed:
                continue
            layout = best_layout(w, rows)
            if layout:
                copy = _pack(w.detach(), rows) if layout == "packed" else w.detach().t().contiguous()
                _packed[id(w)] = (w, w._version, copy)
                mine.append(id(w))
    try:
        yield
    finally:
        for key in mine:
            del _packed[key]
