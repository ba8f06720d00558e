"""Decode attention: one new query a row over that row's cached keys and values.

What it computes, for row b, query head h and its key head h // (H/K), over the positions t that row b may see:

    s[t]   = scale * q[b,h] . k[b,t]                 softcap: s = softcap * tanh(s / softcap)
    out    = sum_t softmax(s)[t] v[b,t]              t in [0, length[b]), the last `window` of them if given

Its cost is the reading of the cache: 4 K d bytes a position in bfloat16, against 4 H d multiply-adds; with H/K
query heads sharing a key head that is H/K multiply-adds a byte, and a GPU does a few hundred in that time.
SmolLM2 at 256 rows of 1000 positions: 5.9 GB a step over 30 layers, where its weights are 0.27 GB. Hence the
cache is read once for all heads that share it, and a row reads its own length rather than the longest.

This is the reference, in float32. The Triton kernel: attention_triton.py.
"""

import torch


def decode_attention(q, k_cache, v_cache, length, scale=None, window=None, softcap=None):
    """q [B,H,d]; k_cache, v_cache [R,K,T,d], of which rows 0..B-1 are read (R >= B, K divides H); length [B] int64, at
    least 1: the positions row b sees, its own included. scale: default d^-0.5. window: only the last that many
    positions. softcap: before the softmax (Gemma 2). Returns [B,H,d] in q's dtype.
    What the cache holds beyond a row's length does not matter, as long as it is finite.
    """
    B, H, d = q.shape
    K = k_cache.shape[1]
    t = torch.arange(k_cache.shape[2], device=q.device)
    visible = t < length[:, None]  # (B, T)
    if window is not None:
        visible &= t >= length[:, None] - window
    scores = q.float().view(B, K, H // K, d) @ k_cache[:B].float().mT  # (B, K, H/K, T)
    scores *= d**-0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v_cache[:B].float()).view(B, H, d).to(q.dtype)


def repeats_keys(q):
    """float32 on CUDA: PyTorch's fused kernels share a key head among query heads in 16 bits only.
    Asked with enable_gqa in float32, it silently takes the one that stores all scores [B,H,T,T] for
    backward."""
    return q.is_cuda and q.dtype == torch.float32
