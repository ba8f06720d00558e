"""Fused linear log-prob: log softmax(hidden @ weight.T / temperature)[target] without the logits.

What it computes, for every row n of hidden [N,D] and the head's weight [V,D]:

    z[n,v]      = softcap(hidden[n] . weight[v]) / temperature
    logsumexp   = log sum_v exp z[n,v]
    logprob     = z[n,target[n]] - logsumexp
    entropy     = logsumexp - sum_v p[n,v] z[n,v]          p = exp(z - logsumexp)

Its cost: 2NDV multiply-adds forward, 2NDV to make z again in backward, 4NDV for the two gradients, 8NDV
in all. What it saves is memory: z is never whole. A chunk of rows is made, reduced to three numbers a
row and overwritten, so the peak is CHUNK_BYTES rather than 4NV bytes, and the chunk stays near the
cache, where the exponentials find it.

Everything behind the dot product is float32: a bfloat16 logit of size 20 has steps of 0.125, which
would move a probability ratio by 13%.
"""

import torch

from kernels.product import matmul_nt

CHUNK_BYTES = 25_000_000  # one chunk of float32 logits; larger falls out of the cache, smaller starves the product


def _chunk_rows(vocab):
    return max(16, CHUNK_BYTES // (4 * vocab))


def scaled_logits(hidden, weight, temperature, softcap=None):
    """[n,D] x [V,D] -> z [n,V] float32, a fresh tensor that the caller may overwrite.

    The one place where logits meet the temperature: the sampler (sampling.py) calls it too.
    """
    z = matmul_nt(hidden.float(), weight.float())
    if softcap is not None:  # Gemma 2: the cap acts on raw logits, before the temperature
        z.div_(softcap).tanh_().mul_(softcap)
    return z.div_(temperature) if temperature != 1 else z


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, softcap):
        N, V = hidden.shape[0], weight.shape[0]
        logprob, logsumexp, entropy = (torch.empty(N, device=hidden.device) for _ in range(3))
        weight32 = weight.float()
        for i in range(0, N, _chunk_rows(V)):
            rows = slice(i, i + _chunk_rows(V))
            z = scaled_logits(hidden[rows], weight32, temperature, softcap)  # (n, V)
            top = z.amax(-1)
            chosen = z.gather(1, target[rows, None])[:, 0] - top
            z -= top[:, None]
            p = z.exp()
            total = p.sum(-1)
            log_total = total.log()
            logsumexp[rows] = log_total + top
            logprob[rows] = chosen - log_total
            entropy[rows] = log_total - torch.linalg.vecdot(p, z) / total
        ctx.save_for_backward(hidden, weight, target, logsumexp, entropy)
        ctx.temperature, ctx.softcap = temperature, softcap
        return logprob, logsumexp, entropy

    @staticmethod
    def backward(ctx, d_logprob, d_logsumexp, d_entropy):
        hidden, weight, target, logsumexp, entropy = ctx.saved_tensors
        V = weight.shape[0]
        weight32 = weight.float()
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight32)
        # Rows without a gradient (clipped tokens, groups in which all samples agree) cost nothing.
        busy = ((d_logprob != 0) | (d_logsumexp != 0) | (d_entropy != 0)).nonzero()[:, 0]
        for rows in busy.split(_chunk_rows(V)):
            h = hidden[rows].float()
            z = scaled_logits(h, weight32, ctx.temperature, ctx.softcap)  # (n, V)
            log_p = z - logsumexp[rows, None]
            # dlogprob/dz = 1[target] - p,  dlogsumexp/dz = p,  dentropy/dz = -p (log p + entropy)
            dz = log_p + entropy[rows, None]
            dz *= -d_entropy[rows, None]
            dz += (d_logsumexp - d_logprob)[rows, None]
            dz *= log_p.exp_()
            dz.scatter_add_(1, target[rows, None], d_logprob[rows, None])
            if ctx.softcap is not None:  # d tanh
                dz *= 1 - (z * (ctx.temperature / ctx.softcap)).square_()
            dz /= ctx.temperature
            d_hidden[rows] = matmul_nt(dz, weight32.t()).to(hidden.dtype)
            d_weight += matmul_nt(dz.t(), h.t())
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def linear_logprob(hidden, weight, target, temperature, softcap=None):
    """Log-probabilities of given tokens, straight from hidden states.

    hidden [N,D], weight [V,D] (any float type), target [N] int64 in [0,V), temperature > 0 (no default:
    a silent one is how samplers and trainers come to disagree), softcap None or > 0.
    Returns logprob, logsumexp, entropy: [N] float32, nats, differentiable in hidden and weight.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature} (greedy decoding has no log-probs to train on)")
    return _LinearLogprob.apply(hidden, weight, target, float(temperature), softcap)
