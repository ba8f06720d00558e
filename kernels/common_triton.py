"""What the Triton kernels share: constants, one logit, the order of tiles.

Base 2 throughout. 2^x is one instruction of a GPU and e^x is two, so a logit is scaled by log2(e) / temperature after the
product, and a number in nats is made at the very end. Sampler and trainer turn a product into a logit by the same line,
cap_and_scale: what one draws is what the other scores.

The [N,V] plane of logits, of which no more than the tiles in flight exist (here N = 20 tiles of rows, GROUP = 16):

                 tokens of the vocabulary, BLOCK_V a tile
                 0     1     2          ceil(V / BLOCK_V)
            0  [  0 | 16 | 32 | ...                       ]    the numbers are the order in which tiles start: 16 tiles of
    rows,   1  [  1 | 17 | 33 | ...                       ]    rows down one column, then the next column. The 132 tiles that
    BLOCK_N :  [  :    :    :                             ]    run together on an H100 then need 16 tiles of hidden states
    a tile  15 [ 15 | 31 | 47 | ...                       ]    and 9 of the weight, which the L2 cache holds; row by row they
               -------------------------------------------     would need 1 and 132.
            16 [ 16c| 16c+4 | ...      c columns before it]    the last band has what is left of the rows: 4 here
            :  [  :    :                                  ]
            19 [16c+3|   ...                              ]
"""

import math

import torch
import triton
import triton.language as tl

UPCAST = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter keeps bfloat16 as bits: convert before any arithmetic
NEG = tl.constexpr(-1e30)  # minus infinity without its NaNs
LN2 = tl.constexpr(math.log(2.0))
LOG2E = tl.constexpr(math.log2(math.e))
ROW_GROUP = tl.constexpr(16)  # row tiles that are finished before the next ones begin


def generation(x):
    """8: A100 and its like (and what the interpreter plays). From 9 on an engine copies tiles; 9 and 10 have 227 KB of shared
    memory, of which the larger tiles make use."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8


@triton.jit
def cap_and_scale(x, scale, CAP: tl.constexpr):
    """Raw logits -> logits in base 2 over the temperature: CAP tanh(x / CAP) * scale, scale = log2(e) / temperature, CAP None:
    x * scale. tanh(x) = 1 - 2 / (e^2x + 1)."""
    if CAP is not None:
        x = CAP * (1 - 2 / (tl.exp2(x * (2 / (LN2 * CAP))) + 1))
    return x * scale


@triton.jit
def fast_log2(x):
    """log2 of x > 2^-126 to 2^-22, by the GPU's own instruction: tl.log2 is a polynomial of some 20, which is fine for a number a
    row and too much for one a logit."""
    if UPCAST:  # the interpreter knows no PTX
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def tile_origin(tile, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """The tile's number -> its first row, its first token; the order is the picture above."""
    row_tiles, col_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    first = tile // (ROW_GROUP * col_tiles) * ROW_GROUP
    inside, height = tile % (ROW_GROUP * col_tiles), tl.minimum(row_tiles - first, ROW_GROUP)
    return (first + inside % height) * BLOCK_N, inside // height * BLOCK_V
