"""Fused linear log-prob: log softmax(hidden @ weight.T / temperature)[target] without the logits.

What it computes, for every row n of hidden [N,D] and the head's weight [V,D]:

    z[n,v]      = softcap(hidden[n] . weight[v]) / temperature
    logsumexp   = log sum_v exp z[n,v]
    logprob     = z[n,target[n]] - logsumexp
    entropy     = logsumexp - sum_v p[n,v] z[n,v]          p = exp(z - logsumexp)

Two functions, by who knows the gradient when:

    linear_logprob       any function of the three may come after: backward has to make z again. 2NDV operations
                         forward, 2NDV for z once more, 4NDV for the two gradients: 8NDV
    linear_logprob_loss  the loss is a sum over tokens, given as a function: its derivatives are known as soon as a chunk
                         of rows has its log-probs, while their z is still there. 2NDV + 4NDV = 6NDV

What both save is memory: z is never whole. A chunk of rows is made, reduced to three numbers a row and
overwritten, so the peak is CHUNK_BYTES rather than 4NV bytes. A chunk has the rows that the product needs to be fast; what
follows the product goes over it in blocks of BLOCK_BYTES, so that four of its five passes find the block in the cache.
Probabilities are made twice, for the sums and for dz: as fast as fetching them back, and no second chunk.

Everything behind the dot product is float32: a bfloat16 logit of size 20 has steps of 0.125, which
would move a probability ratio by 13%. So is the sum over chunks in the weight's gradient. That sum is
made in place by addmm_: where oneDNN's product is faster (product.py), writing V x D numbers and adding them costs
more than it gains.
"""

import torch

from kernels.product import first_order, matmul_nt

CHUNK_BYTES = 24 * 2**20  # one chunk of float32 logits: 128 rows of V = 49152, fewer starve the product
CHUNK_ROWS, SMALL_BYTES = 128, 4 * 2**20  # more rows than that only as long as the chunk is small
BLOCK_BYTES = 800_000  # rows of a chunk that are reduced together: they and their exponentials stay in the L2 cache


def _chunk_rows(vocab):
    return max(16, min(CHUNK_BYTES // (4 * vocab), max(CHUNK_ROWS, SMALL_BYTES // (4 * vocab))))


def _chunks(rows, vocab):
    """`rows` rows in chunks of equal size, as slices: a short last one would cost nearly as much as a whole one."""
    count = -(-rows // _chunk_rows(vocab))
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def blocks(z, size):
    """z [n,V] -> pairs of a slice of rows that takes `size` bytes, and scratch memory of that shape."""
    n = max(1, size // (4 * z.shape[1]))
    scratch = torch.empty_like(z[:n])
    return [(slice(i, i + n), scratch[: min(n, len(z) - i)]) for i in range(0, len(z), n)]


def scaled_logits(hidden, weight, temperature, softcap=None):
    """[n,D] x [V,D] -> z [n,V] float32, a fresh tensor that the caller may overwrite.

    The one place where logits meet the temperature: the sampler (sampling.py) calls it too.
    """
    z = matmul_nt(hidden.float(), weight.float())
    if softcap is not None:  # Gemma 2: the cap acts on raw logits, before the temperature
        z.div_(softcap).tanh_().mul_(softcap)
    return z.div_(temperature) if temperature != 1 else z


LOW = 0.5  # temperatures below which many exponentials underflow
UNDERFLOW = -87.0  # e^-87 = 1.6e-38 is the smallest normal float32, nearly


def exponentials(z, out, temperature):
    """e^z of z <= 0 -> out, which is returned. Below UNDERFLOW the vector units' exp takes another, slow path: 10 to 40 times
    the time where temperatures are low and most logits far from the largest. There it gets clamped ones; they become 0 after."""
    if temperature >= LOW:
        return torch.exp(z, out=out)
    return torch.threshold_(torch.clamp(z, min=UNDERFLOW, out=out).exp_(), 2e-38, 0.0)


def _reduce(z, target, temperature):
    """z [n,V], target [n] -> logprob, logsumexp, entropy, total [n]. z itself becomes z - max, whose exp sums to total."""
    top, total, mean = (z.new_empty(len(z)) for _ in range(3))
    for rows, p in blocks(z, BLOCK_BYTES):
        block = z[rows]
        torch.amax(block, -1, out=top[rows])
        block -= top[rows, None]
        torch.sum(exponentials(block, p, temperature), -1, out=total[rows])
        mean[rows] = torch.linalg.vecdot(p, block)
    log_total = total.log()
    logprob = z.gather(1, target[:, None])[:, 0] - log_total
    return logprob, log_total + top, log_total - mean / total, total


def _times_exp(z, a, b, temperature):
    """z [n,V] <- (a z + b) exp z, in place; a [n], or None where it is zero, b [n]."""
    for rows, p in blocks(z, BLOCK_BYTES):
        block = z[rows]
        exponentials(block, p, temperature)
        if a is None:
            torch.mul(p, b[rows, None], out=block)
        else:
            block.mul_(a[rows, None]).add_(b[rows, None]).mul_(p)
    return z


def _cap_slope(z, temperature, softcap):
    """d softcap(x) / dx = 1 - tanh(x / softcap)^2 from z = softcap(x) / temperature; None without a cap."""
    return None if softcap is None else 1 - (z * (temperature / softcap)).square_()


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, softcap):
        N, V = hidden.shape[0], weight.shape[0]
        logprob, logsumexp, entropy = (torch.empty(N, device=hidden.device) for _ in range(3))
        weight32 = weight.float()
        for rows in _chunks(N, V):
            z = scaled_logits(hidden[rows], weight32, temperature, softcap)  # (n, V)
            logprob[rows], logsumexp[rows], entropy[rows], _ = _reduce(z, target[rows], temperature)
            del z  # before the next one is made
        ctx.save_for_backward(hidden, weight, target, logsumexp, entropy)
        ctx.temperature, ctx.softcap = temperature, softcap
        return logprob, logsumexp, entropy

    @staticmethod
    @first_order
    def backward(ctx, d_logprob, d_logsumexp, d_entropy):
        hidden, weight, target, logsumexp, entropy = ctx.saved_tensors
        V = weight.shape[0]
        weight32 = weight.float()
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = None
        # Rows without a gradient (clipped tokens, groups in which all samples agree) cost nothing.
        busy = ((d_logprob != 0) | (d_logsumexp != 0) | (d_entropy != 0)).nonzero()[:, 0]
        for chunk in _chunks(len(busy), V):
            rows = busy[chunk]
            h = hidden[rows].float()
            d_logp, d_lse, d_ent = (d[rows] / ctx.temperature for d in (d_logprob, d_logsumexp, d_entropy))
            z = scaled_logits(h, weight32, ctx.temperature, ctx.softcap)  # (n, V)
            slope = _cap_slope(z, ctx.temperature, ctx.softcap)
            z -= logsumexp[rows, None]
            # dlogprob/dz = 1[target] - p,  dlogsumexp/dz = p,  dentropy/dz = -p (log p + entropy)
            dz = _times_exp(z, -d_ent if d_ent.any() else None, d_lse - d_logp - d_ent * entropy[rows], ctx.temperature)
            dz.scatter_add_(1, target[rows, None], d_logp[:, None])
            if slope is not None:
                dz *= slope
            if need_hidden:
                d_hidden[rows] = matmul_nt(dz, weight32.t()).to(hidden.dtype)
            if need_weight:
                d_weight = _add_product(d_weight, dz.t(), h)
            del z, dz, slope
        if need_weight:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None


def _add_product(total, a, b):
    """total + a @ b in total's memory; None stands for a total of zero, which need not be written and read first."""
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


def check_temperature(temperature):
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature} (greedy decoding has no log-probs to train on)")
    return float(temperature)


def linear_logprob(hidden, weight, target, temperature, softcap=None):
    """Log-probabilities of given tokens, straight from hidden states.

    hidden [N,D], weight [V,D] (any float type), target [N] int64 in [0,V), temperature > 0 (no default:
    a silent one is how samplers and trainers come to disagree), softcap None or > 0.
    Returns logprob, logsumexp, entropy: [N] float32, nats, differentiable in hidden and weight.
    """
    return _LinearLogprob.apply(hidden, weight, target, check_temperature(temperature), softcap)


# ----------------------------------------------------------------------------------------------------
# The loss inside.


def token_derivatives(loss_fn, logprob, entropy, per_token, rows):
    """loss_fn on one chunk, `rows` of the N -> its value (a scalar tensor), dloss/dlogprob [n], dloss/dentropy [n]."""
    with torch.enable_grad():
        logprob, entropy = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
        loss = loss_fn(logprob, entropy, *(None if x is None else x[rows] for x in per_token))
        if loss.dim() != 0:
            raise ValueError(f"loss_fn must return a scalar, the sum over its tokens, got shape {tuple(loss.shape)}")
        found = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True) if loss.requires_grad else (None, None)
    return loss.detach(), *(torch.zeros_like(logprob) if g is None else g for g in found)


def _d_logits(z, total, d_logprob, d_entropy, target, entropy, temperature):
    """What _reduce left of a chunk, and the loss's derivatives [n] -> dloss/dz [n,V], written over z."""
    # dlogprob/dz = 1[target] - p, dentropy/dz = -p (log p + entropy); p = exp(z) / total, log p = z - log total
    a = -d_entropy / total if d_entropy.any() else None
    dz = _times_exp(z, a, (d_entropy * (total.log() - entropy) - d_logprob) / total, temperature)
    return dz.scatter_add_(1, target[:, None], d_logprob[:, None])


def _loss_chunks(hidden, weight, target, temperature, softcap, loss_fn, per_token, need_hidden, need_weight):
    """-> loss, logprob [N], entropy [N], d_hidden [N,D] in its dtype, d_weight [V,D] float32; None for what is not needed."""
    N, V, gradients = hidden.shape[0], weight.shape[0], need_hidden or need_weight
    weight32, loss = weight.float(), torch.zeros((), device=hidden.device)
    logprob, entropy = torch.empty(N, device=hidden.device), torch.empty(N, device=hidden.device)
    d_hidden = torch.zeros_like(hidden) if need_hidden else None
    d_weight = None
    for rows in _chunks(N, V):
        z = dz = chunk = slope = None  # the last chunk's memory goes before this one's is taken
        h, chosen = hidden[rows].float(), target[rows]
        z = scaled_logits(h, weight32, temperature, softcap)  # (n, V)
        slope = _cap_slope(z, temperature, softcap) if gradients else None
        logprob[rows], _, entropy[rows], total = _reduce(z, chosen, temperature)
        part, d_logprob, d_entropy = token_derivatives(loss_fn, logprob[rows], entropy[rows], per_token, rows)
        loss += part
        # Rows without a gradient (clipped tokens, groups in which all samples agree) cost no further product.
        busy = ((d_logprob != 0) | (d_entropy != 0)).nonzero()[:, 0]
        if not gradients or not len(busy):
            continue
        chunk = [z, total, d_logprob / temperature, d_entropy / temperature, chosen, entropy[rows]]
        if len(busy) < len(h):
            h, chunk, slope = h[busy], [x[busy] for x in chunk], None if slope is None else slope[busy]
        dz = _d_logits(*chunk, temperature)
        if slope is not None:
            dz *= slope
        where = rows if len(busy) == rows.stop - rows.start else busy + rows.start
        if need_hidden:
            d_hidden[where] = matmul_nt(dz, weight32.t()).to(hidden.dtype)
        if need_weight:
            d_weight = _add_product(d_weight, dz.t(), h)
    if need_weight and d_weight is None:
        d_weight = torch.zeros_like(weight32)
    return loss, logprob, entropy, d_hidden, d_weight


class StoredGradients(torch.autograd.Function):
    """loss, d_hidden, d_weight -> loss whose gradients in hidden and weight are the stored ones, times what comes in."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, d_hidden, d_weight):
        ctx.stored, ctx.dtype = [d_hidden, d_weight], weight.dtype
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx, d_loss):
        if ctx.stored is None:
            raise RuntimeError("linear_logprob_loss gives its gradients away in the first backward; call it again")
        (d_hidden, d_weight), ctx.stored = ctx.stored, None  # they become .grad as they are: no second copy of V x D
        return _scaled(d_hidden, d_loss, ctx.dtype), _scaled(d_weight, d_loss, ctx.dtype), None, None, None


def _scaled(x, factor, dtype):
    """x * factor in dtype, in x's memory where the dtype is x's; else by one pass, 6 bytes an element of a float32 x and a
    bfloat16 result. None stays None."""
    if x is None:
        return None
    return torch.mul(x, factor, out=x if x.dtype == dtype else torch.empty_like(x, dtype=dtype))


def linear_logprob_loss(hidden, weight, target, temperature, loss_fn, *per_token, softcap=None):
    """A loss that is a sum over tokens, with its gradients, in 6NDV: what training calls where it can.

    hidden, weight, target, temperature, softcap as in linear_logprob; per_token: tensors [N,...] of what the loss needs
    to know of each token (advantage, weight, old log-prob), or None, which stays None. loss_fn(logprob [n], entropy [n],
    *rows of per_token [n,...]) -> scalar, the SUM over these n tokens: it is called once a chunk and must not look beyond
    it (a mean is a sum with weights 1/N; a ratio of whole sequences cannot be written this way: linear_logprob can).
    Returns loss (scalar float32, differentiable once in hidden and weight) and, detached, logprob [N], entropy [N].
    Where nothing needs a gradient only the forward half is done. Tokens whose derivatives are exactly 0 skip the rest too.
    """
    temperature = check_temperature(temperature)
    need = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    with torch.no_grad():
        loss, logprob, entropy, *stored = _loss_chunks(hidden, weight, target, temperature, softcap, loss_fn, per_token, *need)
    return StoredGradients.apply(hidden, weight, loss, *stored) if any(need) else loss, logprob, entropy
