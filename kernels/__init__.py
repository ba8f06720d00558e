"""The kernels of the hot loop, each one file: what it computes, its cost, a PyTorch reference.

    linear           the layers' matrix product                                      (everywhere)
    linear_logprob   hidden states -> log-prob, logsumexp, entropy of given tokens   (scoring, DPO)
    linear_logprob_loss  the same with the loss inside: a quarter less to multiply   (SFT, RL)
    linear_sample    hidden states -> a token and its log-prob                       (generation)
    decode_attention one query a row over its cached past, and what stands around it (generation)

The three in the middle start from the hidden state, not from logits: at V = 49152 the logits of one 64 x 96 batch
are 1.2 GB, and nobody needs them once the three numbers per token are known.

Where the tensors are on a GPU, the Triton function of the same name and signature takes over (NAME_triton.py, imported
then and not before: a machine without triton never sees it). The same functions run on CPU tensors where
TRITON_INTERPRET=1 was set before that import, which tests/conftest.py does on a machine without a GPU; tests/test_compile.py
compiles what they launch for GPUs that are not there, in a process of its own, since the decorator decides.
"""

from functools import wraps
from importlib import import_module
from importlib.util import find_spec

import torch

from kernels import attention, layer, logprob, sampling
from kernels.product import Linear, linear, packed_weights

HAVE_TRITON = find_spec("triton") is not None  # it has no Windows or macOS wheels; the references run everywhere


def _either(reference, module):
    """`reference` for tensors on the CPU, its namesake in kernels/<module>.py for tensors on a GPU."""

    @wraps(reference)
    def pick(*args, **options):
        if HAVE_TRITON and any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
            return getattr(import_module(f"kernels.{module}"), reference.__name__)(*args, **options)
        return reference(*args, **options)

    return pick


linear_logprob = _either(logprob.linear_logprob, "logprob_triton")
linear_logprob_loss = _either(logprob.linear_logprob_loss, "logprob_triton")
philox_uniform = _either(sampling.philox_uniform, "sampling_triton")
linear_draw = _either(sampling.linear_draw, "sampling_triton")
linear_draw_filtered = _either(sampling.linear_draw_filtered, "sampling_triton")
linear_greedy = _either(sampling.linear_greedy, "sampling_triton")
decode_attention = _either(attention.decode_attention, "attention_triton")
add_rmsnorm = _either(layer.add_rmsnorm, "layer_triton")
rope_write = _either(layer.rope_write, "layer_triton")
swiglu = _either(layer.swiglu, "layer_triton")


def linear_sample(hidden, weight, temperature, seed, sequence_id, position, softcap=None):
    """One token per row, fixed by (seed, sequence_id [B], position [B]): philox_uniform, then linear_draw."""
    return linear_draw(hidden, weight, temperature, philox_uniform(seed, sequence_id, position), softcap)


__all__ = ["Linear", "add_rmsnorm", "decode_attention", "linear", "linear_draw", "linear_draw_filtered", "linear_greedy",
           "linear_logprob", "linear_logprob_loss", "linear_sample", "packed_weights", "philox_uniform", "rope_write", "swiglu"]
