"""Fused sampling: a token from softmax(hidden @ weight.T / temperature) and its log-prob.

The draw is counter-based: uniform(seed, sequence, position) is a pure function (Philox4x32-10, Salmon
et al. 2011), so a completion depends neither on the batch it was decoded in nor on when a slot became
free, and a killed run repeats it exactly.

The choice has two levels, which is exact and lets a GPU kernel (sampling_triton.py) keep V/32 numbers per row:
    1. a group of 32 neighbouring tokens, with probability proportional to the group's mass,
    2. a token inside that group.
Both by inverse CDF: one Philox call per token, where Gumbel noise needs one per *logit*.

The log-prob that comes back is that of the untruncated policy at this temperature, made by the same
arithmetic as kernels/logprob.py: it is the `old_logp` of policy-gradient training.
"""

import torch
import torch.nn.functional as F

from kernels.logprob import blocks, exponentials, scaled_logits

GROUP = 32  # part of the contract: another size gives other (equally distributed) tokens
DRAW_BYTES = 3_200_000  # rows that are drawn together: their masses stay in the cache, and take no 12 MB of new memory a step

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Philox multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_LOW = 0xFFFFFFFF


def philox(key0, key1, c0, c1, c2, c3):
    """Philox4x32-10 on int64 tensors that hold 32-bit words. Returns the four output words."""
    for _ in range(10):
        # The product wraps modulo 2^64; the arithmetic shift is harmless under the mask.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ key0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ key1, p0 & _LOW
        key0, key1 = (key0 + _W0) & _LOW, (key1 + _W1) & _LOW
    return c0, c1, c2, c3


def philox_uniform(seed, sequence_id, position):
    """Two uniforms in [0,1) for each (sequence, position).

    seed: int in [0, 2^64); sequence_id, position: broadcastable int64 tensors. Returns [..., 2] float64
    with 53 random bits each. Draw many positions in one call: a call costs 100 small operations.
    """
    sequence_id, position = torch.broadcast_tensors(sequence_id, position)
    zero = torch.zeros_like(position)
    words = philox(seed & _LOW, (seed >> 32) & _LOW, position, sequence_id & _LOW, (sequence_id >> 32) & _LOW, zero)
    pairs = (words[0], words[1]), (words[2], words[3])
    return torch.stack([(((a >> 5) << 26) + (b >> 6)).double() * 2.0**-53 for a, b in pairs], -1)


def _pick(mass, uniform):
    """Inverse CDF on unnormalised masses. mass [B,K] >= 0, uniform [B] -> index [B]."""
    cdf = mass.double().cumsum(-1)
    index = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    return index.clamp_(max=mass.shape[1] - 1)


def _draw(mass, uniform):
    """mass [B,V] float32 >= 0, uniform [B,2] -> token [B], two levels (see above)."""
    B, V = mass.shape
    if V <= GROUP:  # one group
        return _pick(mass, uniform[:, 1])
    if V % GROUP:
        mass = F.pad(mass, (0, -V % GROUP))
    grouped = mass.view(B, -1, GROUP)
    group = _pick(grouped.sum(-1), uniform[:, 0])
    inside = grouped[torch.arange(B, device=mass.device), group]  # (B, GROUP)
    return group * GROUP + _pick(inside, uniform[:, 1])


def linear_draw(hidden, weight, temperature, uniform, softcap=None):
    """One token per row from uniforms drawn before (kernels.linear_sample draws them too). hidden [B,D], weight [V,D],
    uniform [B,2] from philox_uniform.

    Returns token [B] int64, logprob [B] float32 (nats, at this temperature).
    """
    z = scaled_logits(hidden, weight, temperature, softcap)
    token, logprob = torch.empty(len(z), dtype=torch.int64, device=z.device), z.new_empty(len(z))
    for rows, mass in blocks(z, DRAW_BYTES):
        block = z[rows]
        block -= block.amax(-1, keepdim=True)
        exponentials(block, mass, temperature)
        token[rows] = _draw(mass, uniform[rows])
        logprob[rows] = block.gather(1, token[rows, None])[:, 0] - mass.sum(-1).log_()
    return token, logprob


def linear_greedy(hidden, weight, softcap=None):
    """The likeliest token (the lowest id among equals) and its log-prob at temperature 1."""
    z = scaled_logits(hidden, weight, 1.0, softcap)
    top, token = z.max(-1)
    return token, top - z.logsumexp(-1)


def linear_draw_filtered(hidden, weight, temperature, uniform, top_k=0, top_p=1.0, min_p=0.0, softcap=None):
    """As linear_draw, from the likeliest tokens only (top_k tokens, then top_p of the mass, then min_p
    of the largest probability; the likeliest token always stays). For reading, not for training: what
    was cut away is missing from the importance ratio, so the kept mass comes back too.

    Returns token [B], logprob [B] (of the untruncated policy), kept [B] (probability that was kept).
    """
    z = scaled_logits(hidden, weight, temperature, softcap)
    logprob = z - z.logsumexp(-1, keepdim=True)
    p, order = logprob.exp().sort(dim=-1, descending=True, stable=True)  # (B, V)
    keep = torch.ones_like(p, dtype=torch.bool)
    if top_k:
        keep[:, top_k:] = False
    q = p * keep
    q = q / q.sum(-1, keepdim=True)
    keep &= (q.cumsum(-1) - q) < top_p
    keep &= p >= min_p * p[:, :1]
    keep[:, 0] = True
    mass = torch.zeros_like(p).scatter_(1, order, p * keep)
    token = _draw(mass, uniform)
    return token, logprob.gather(1, token[:, None])[:, 0], mass.sum(-1)

