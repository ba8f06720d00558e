"""The matrix product of every layer: x @ weight.T, and on a CPU through oneDNN instead of BLAS.

PyTorch's CPU wheels send float32 products to MKL, which on many non-Intel processors takes a slow code
path. oneDNN, in the same wheel, looks at what the processor can do: on a Zen 5 core its products are 2.2
times as fast, forward and backward (bench/products.py). A product of a few rows has a second cost: oneDNN
first copies the weight into the layout that it likes. Generation uses each weight hundreds of times between
two updates, so there the copies are kept: see packed_weights. A single row is limited by reading the weight
once, which MKL does at the speed of memory when the matrix lies transposed, and at two thirds of it otherwise.

On CUDA, in bfloat16, or where PyTorch lacks the operator, this is F.linear.
"""

from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    _product = torch.ops.mkldnn._linear_pointwise
    _pack = torch.ops.mkldnn._reorder_linear_weight
    _usable = torch.backends.mkldnn.is_available()
except (AttributeError, RuntimeError):
    _usable = False

SMALL = 500_000  # multiply-adds below which oneDNN's call costs more than it saves
_packed = {}  # id(weight) -> (weight, its version, a copy in a faster layout)


def matmul_nt(x, weight):
    """x [M,K] @ weight [N,K].T -> [M,N]; no gradient of its own. Either may be a transposed view."""
    if not (_usable and x.dtype == torch.float32 and x.device.type == "cpu"):
        return x @ weight.t()
    entry = _packed.get(id(weight))
    if entry is not None and entry[0] is weight and entry[1] == weight._version:
        copy = entry[2]
        return _product(x, copy, None, "none", [], "") if copy.is_mkldnn else x @ copy
    if x.shape[0] * weight.numel() < SMALL or x.shape[0] == 1:
        return x @ weight.t()
    return _product(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight)

    @staticmethod
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
            if w.dim() == 2 and w.dtype == torch.float32 and w.device.type == "cpu" and id(w) not in _packed:
                copy = _pack(w.detach(), rows) if rows > 1 else w.detach().t().contiguous()
                _packed[id(w)] = (w, w._version, copy)
                mine.append(id(w))
    try:
        yield
    finally:
        for key in mine:
            del _packed[key]
