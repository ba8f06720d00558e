"""The sides that bench/kernels.py compares: ours, PyTorch's, and what other libraries offer for the same numbers.

Each is a function of (hidden [N,D], weight [V,D], target [N] int64), imported when it is called: a library that is not
there is a line in the table. exact_*: what all of them should return.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import linear_logprob, linear_logprob_loss
from kernels.logprob import linear_logprob as reference_logprob
from kernels.product import linear, matmul_nt

SEQUENCE = 512  # tokens that share an advantage


def full_logprob(hidden, weight, target, product=F.linear):
    """What everybody writes first: the logits whole."""
    return product(hidden, weight).float().log_softmax(-1).gather(1, target[:, None])[:, 0]


def _chunk_logprob(hidden, weight, target):
    z = F.linear(hidden, weight).float()
    return z.gather(1, target[:, None])[:, 0] - z.logsumexp(-1)


@cache
def _compiled_chunk():
    return torch.compile(_chunk_logprob, dynamic=False)


def compiled_logprob(hidden, weight, target, chunk=2048):
    """Chunks of rows, each compiled, and made again in backward."""
    run = _compiled_chunk()
    if torch.is_grad_enabled():
        run = partial(checkpoint, run, use_reentrant=False)
    return torch.cat([run(h, weight, t) for h, t in zip(hidden.split(chunk), target.split(chunk))])


def liger_logprob(hidden, weight, target):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, target, reduction="none")


def liger_loss(hidden, weight, target):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, target, reduction="mean")


def liger_scaled_logprob(hidden, weight, target):
    """Its per-token form for RL: on sm_90 with its CuTe kernels, if they are installed, else chunks in PyTorch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    return -Scaled.apply(hidden, weight, target, 1.0, return_entropy=True)[0]


def liger_grpo_loss(hidden, weight, target, old, advantage):
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    rows = (len(hidden) // SEQUENCE or 1, -1)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", compiled=hidden.is_cuda)
    return loss(hidden.view(*rows, hidden.shape[1]), weight, target.view(rows), torch.ones_like(target.view(rows)),
                advantage.view(rows)[:, 0], old_per_token_logps=old.view(rows))[0]  # fmt: skip


def cce_logprob(hidden, weight, target, exact):
    from cut_cross_entropy import linear_cross_entropy

    options = {}
    if exact:  # a preset of newer versions; before it, exact but for sums in bfloat16
        from cut_cross_entropy.linear_cross_entropy import LinearCrossEntropyImpl

        options = dict(impl="cce_exact") if hasattr(LinearCrossEntropyImpl, "CCE_EXACT") else dict(filter_eps=None)
    return -linear_cross_entropy(hidden, weight, target, reduction="none", **options)


def verl_logprob(hidden, weight, target):
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, target, 1.0, "none")[0]


def torch_loss(hidden, weight, target):
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def eager_draw(hidden, weight, temperature=1.0):
    """A token and its log-prob, from whole logits."""
    z = F.linear(hidden, weight).float()
    p = (z if temperature == 1 else z / temperature).softmax(-1)
    token = p.multinomial(1)
    return token, p.gather(1, token).log()


def our_logprob(hidden, weight, target):
    return linear_logprob(hidden, weight, target, 1.0)[0]


def mean_nll(logprob, entropy, scale):
    return -(logprob * scale).sum()


def clipped(logprob, old, advantage):
    """GRPO's loss a token, clipped at 0.2."""
    ratio = (logprob - old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def grpo(logprob, entropy, old, advantage, scale):
    return (clipped(logprob, old, advantage) * scale).sum()


def gradients_of(loss):
    """A loss of (hidden, weight, ...) -> a function that returns its gradients in both."""
    return lambda hidden, weight, *rest: torch.autograd.grad(loss(hidden, weight, *rest), (hidden, weight))


def bare_products(hidden, weight, *_, ways=1):
    """The floor: z = h w' and, for gradients, two as large, from z as if it were its own gradient."""
    z = matmul_nt(hidden, weight)
    return (matmul_nt(z, weight.t()), matmul_nt(z.t(), hidden.t())) if ways == 3 else z


FINE, COARSE = "fine", "coarse"  # float32 logits, or bfloat16 ones on a GPU
TOLERANCE = {  # of log-probs in nats, of gradients relative to their norm
    torch.float32: {FINE: (1e-4, 1e-4), COARSE: (1e-4, 1e-3)},
    torch.bfloat16: {FINE: (2e-3, 1e-2), COARSE: (0.25, 5e-2)},
}


def logprob_sides(gpu):
    """name -> (log-prob function, precision of its logits). What a CPU does not run is not there."""
    sides = {"ours": (our_logprob, FINE), "log_softmax": (full_logprob, COARSE)}
    if not gpu:
        return sides | {"log_softmax, our product": (partial(full_logprob, product=linear), FINE)}
    return sides | {
        "torch.compile, chunks": (compiled_logprob, COARSE), "liger FLCE": (liger_logprob, COARSE),
        "liger scaled CE": (liger_scaled_logprob, COARSE), "CCE": (partial(cce_logprob, exact=False), FINE),
        "CCE exact": (partial(cce_logprob, exact=True), FINE), "verl": (verl_logprob, COARSE),
    }  # fmt: skip


def loss_sides(gpu, part):
    """name -> (loss of (hidden, weight, target, old, advantage, scale), precision); scale is 1/N a token."""
    if part == "gradients":
        def of(f):
            return lambda h, w, t, old, advantage, scale: -(f(h, w, t) * scale).sum()

        sides = {"ours": (lambda h, w, t, o, a, scale: linear_logprob_loss(h, w, t, 1.0, mean_nll, scale)[0], FINE)}
        more = {"F.linear_cross_entropy": (lambda h, w, t, *_: torch_loss(h, w, t), COARSE)}
        if gpu:
            more["liger FLCE, mean"] = (lambda h, w, t, *_: liger_loss(h, w, t), COARSE)
    else:
        def of(f):
            return lambda h, w, t, old, advantage, scale: (clipped(f(h, w, t), old, advantage) * scale).sum()

        sides = {"ours": (lambda h, w, t, *rest: linear_logprob_loss(h, w, t, 1.0, grpo, *rest)[0], FINE)}
        more = {"liger GRPO": (lambda h, w, t, old, advantage, _: liger_grpo_loss(h, w, t, old, advantage), COARSE)}
    per_token = {("ours, autograd" if name == "ours" else name): (of(f), precision)
                 for name, (f, precision) in logprob_sides(gpu).items()}  # fmt: skip
    if part == "grpo":  # the same kernels as in `gradients` but for the loss: the slow way and the named peer will do
        per_token = {name: per_token[name] for name in ("ours, autograd", "log_softmax")}
    return sides | per_token | more


# ----------------------------------------------------------------------------------------------------
# Exact values


def exact_logprob(hidden, weight, target):
    """Log-probs in float64 (CPU), or by the reference in float32 (GPU), whose test is against float64."""
    if hidden.is_cuda:
        return reference_logprob(hidden, weight, target, 1.0)[0]
    return torch.cat([full_logprob(h.double(), weight.double(), t, lambda x, w: (x @ w.t()).double())
                      for h, t in zip(hidden.split(2048), target.split(2048))])  # fmt: skip


def exact_gradients(part, hidden, weight, target, old, advantage, scale):
    """The coefficient of each token from its log-prob, then the chain rule, in float64 (CPU) or float32 (GPU)."""
    wide = torch.float32 if hidden.is_cuda else torch.float64
    h, w = (x.detach().to(wide).requires_grad_() for x in (hidden, weight))
    logprob = reference_logprob(h, w, target, 1.0)[0] if hidden.is_cuda else exact_logprob(h, w, target)
    loss = -logprob if part == "gradients" else clipped(logprob, old, advantage)
    return torch.autograd.grad((loss * scale).sum(), (h, w))


def logprob_error(value, exact):
    """value: (log-probs,) -> the largest difference; nan where one is nan."""
    return float((value[0].detach().double() - exact.double()).abs().max())


def gradient_error(value, exact):
    """(d_hidden, d_weight) -> the larger difference, relative to the norm."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(value, exact))
