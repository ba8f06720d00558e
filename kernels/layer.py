"""What stands between the matrix products of a decode step: normalisation, rotary positions, the gate.

Each is a few operations an element and costs the reading and writing of its vectors, 2 bytes each: at B rows of
width D nothing against the weights, but as separate PyTorch operations each is 4 to 8 launches of 2 to 5
microseconds, and a step of SmolLM2 has 30 layers. One kernel each (layer_triton.py) leaves ten launches a layer.
These references are the same functions in plain PyTorch.
"""

import torch
import torch.nn.functional as F


def add_rmsnorm(x, delta, weight, eps):
    """x [B,D], delta [B,D] (or None: nothing to add), weight [D] -> x + delta, and rmsnorm of it (x's dtype)."""
    x = x if delta is None else x + delta
    return x, F.rms_norm(x, x.shape[-1:], weight, eps)


def rope_write(qkv, cos, sin, position, k_cache, v_cache):
    """Turn queries and keys by their position; keys and values go to the cache.

    qkv [B,H+2K,d]: heads of q, then k, then v; cos, sin [max_position,d] float32 of pointwise.rope_tables (cos twice side by
    side; -sin, sin); position [B] int64; k_cache, v_cache [R,K,T,d], of which row b < B is written at position[b].
    Returns q [B,H,d]. Rotation in float32.
    """
    B, _, d = qkv.shape
    K = k_cache.shape[1]
    qk = qkv[:, :-K].float()
    a, b = qk.chunk(2, -1)
    qk = (qk * cos[position][:, None] + torch.cat([b, a], -1) * sin[position][:, None]).to(qkv.dtype)
    rows = torch.arange(B, device=qkv.device)
    k_cache[rows, :, position] = qk[:, -K:]
    v_cache[rows, :, position] = qkv[:, -K:]
    return qk[:, :-K].contiguous()


def swiglu(gate_up):
    """gate_up [B,2F]: gate, then up -> silu(gate) * up [B,F]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
