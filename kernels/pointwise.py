"""The elementwise parts of a layer: rotary positions and gated activations, in training with gradients written by hand.

Autograd would keep more and launch more: two operations where it makes eight (rotary), one tensor for both gradients where
it makes three (SwiGLU). The fused kernels of a decoding step are in layer.py.
"""

import math

import torch
import torch.nn.functional as F


def rope_frequencies(cfg, device):
    """Angle per position [head_dim/2] float32: theta^(-2i/head_dim). Llama 3.1 and later divide the
    slow ones, which turn less than low_freq_factor times in the context of pre-training, by
    `factor`, leave those alone that turn more than high_freq_factor times, and blend between
    (rope_type "llama3")."""
    freq = cfg.rope_theta ** -(
        torch.arange(0, cfg.head_dim, 2, device=device, dtype=torch.float32) / cfg.head_dim
    )
    if cfg.rope_scaling is None:
        return freq
    low, high = cfg.rope_scaling["low_freq_factor"], cfg.rope_scaling["high_freq_factor"]
    turns = cfg.rope_scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / cfg.rope_scaling["factor"]


def rope_tables(cfg, length, device):
    """cos and sin [length, head_dim] float32 of the angles position * rope_frequencies, twice side
    by side; the first half of sin negated, which is what apply_rotary wants."""
    freq = rope_frequencies(cfg, device)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), freq)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """(a, b) -> (a cos - b sin, b cos + a sin) on the halves of the last axis, in three
    operations. In float32 whatever x is, as in kernels.rope_write: keys of one sequence must not be
    rounded differently by the prompt's pass and by decoding."""
    if x.dtype != torch.float32:
        return rotate(x.float(), cos, sin).to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Rotate(torch.autograd.Function):
    """rotate(), whose gradient is the rotation back: two operations where autograd would make
    eight."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, -sin), None, None


def apply_rotary(x, cos, sin):
    """Rotary embedding, "rotate half" layout. x [B,T,heads,head_dim]; cos, sin of rope_tables
    broadcast to [B,T,1,head_dim]."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else rotate(x, cos, sin)


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up of one tensor [...,2F]; both gradients are written into one tensor, where
    autograd makes three."""

    @staticmethod
    def forward(ctx, gate_up):
        gate, up = gate_up.chunk(2, -1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx, dy):
        gate_up, silu = ctx.saved_tensors
        (gate, up), d_gate_up = gate_up.chunk(2, -1), torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        torch.mul(dy, silu, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return d_gate_up


def gated_silu(gate_up):
    """SwiGLU: gate_up [...,2F], gate first -> silu(gate) * up [...,F]."""
    if torch.is_grad_enabled():
        return _GatedSilu.apply(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gated_gelu(gate_up):
    """Gemma's: the same with GELU in its tanh form."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up
