"""The kernels of the hot loop, each one file: what it computes, its cost, a PyTorch reference.

    linear           the layers' matrix product                                      (everywhere)
    linear_logprob   hidden states -> log-prob, logsumexp, entropy of given tokens   (training, scoring)
    linear_sample    hidden states -> a token and its log-prob                       (generation)

The last two start from the hidden state, not from logits: at V = 49152 the logits of one 64 x 96 batch are
1.2 GB, and nobody needs them once the three numbers per token are known.
"""

from kernels.logprob import linear_logprob
from kernels.product import Linear, linear, packed_weights
from kernels.sampling import linear_greedy, linear_sample, linear_sample_filtered, philox_uniform

__all__ = ["Linear", "linear", "packed_weights", "linear_logprob", "linear_greedy", "linear_sample",
           "linear_sample_filtered", "philox_uniform"]
