"""Fused linear log-prob on a GPU: kernels/logprob.py says what is computed; here is how, without the logits.

    tile                 rows x tokens: a tile of logits in registers -> of each row its largest logit there, the sum of its
                         exponentials and their moment; the target's logit. STORE: also the exponentials, 2 bytes each
    persistent_tile      the statistics alone, from programs that go from tile to tile (Hopper, wide heads, Triton 3.6)
    combine              those of all tiles of a row -> its log-prob, logsumexp, entropy
    d_logits             backward of linear_logprob: a tile of logits once more -> a tile of dloss/dlogits
    logits_to_gradient   linear_logprob_loss: stored exponentials -> dloss/dlogits, over the same bytes

The gradients are plain products of dloss/dlogits with weight and with hidden: cuBLAS. Sums are float32 throughout.
kernels/steps.py climbs from three lines of PyTorch to `tile` and `logits_to_gradient`, one idea a step.

    python -m kernels.logprob_triton     # error, milliseconds, floor, share of it, on the machine at hand

Counted, in bfloat16. Forward: 2NDV operations, on tiles that come from the L2 cache mostly; 12 bytes are written for every
128 or 256 logits, where logits in memory would be 4 bytes each, written once and read several times. A GPU of 800 TFLOP/s
and 4 TB/s does 200 operations in the time of one byte, and a logit is 2D of them (1152 for SmolLM2, 8192 for an 8B model).
So the products are the bill, and the art is to keep them running meanwhile: an exponential takes as long as
200 operations of the tensor cores. Where D is small that is a sixth, so there two blocks share a multiprocessor, and one
multiplies while the other takes exponentials.

    linear_logprob        2NDV + 2NDV (logits again) + 4NDV;  dloss/dlogits written once, read twice: 6 bytes a logit
    linear_logprob_loss   2NDV + 4NDV;                        2 bytes written, read, written, read twice: 10 bytes a logit

If nothing overlapped, these bytes would add 24% and 53% to the products at D = 576, 3% and 8% at D = 4096, and the second
would be the faster one from D = 370 on. (Counted like all of this; bench/kernels.py measures.)

Why tiles that know nothing of each other and a second kernel, where one block could walk along the vocabulary with running
sums: tiles may then run in any order. Those that run together share 16 row tiles and a few columns, which stay in the
cache (the picture in common_triton.py). No atomics, no locks: the same bits every time. And a row's numbers are made of
that row alone: the same bits in any batch.

Why backward walks along the vocabulary: logsumexp is known by then. A slice of the vocabulary sees all rows at once, so its
d_weight is complete after one product and is rounded once; only d_hidden [N,D] is added up. linear_logprob_loss
must walk along the rows, and adds up d_weight [V,D]. Both work through CHUNK_BYTES of dloss/dlogits at a time. Rows whose
coefficients are all 0 are taken out before (backward) or after (loss) the logits; a head or hidden states that need no
gradient save their product.

The tiles. A float32 sum takes a register, so 128 x 128 are 64 registers of each of 256 threads; a thread may use 128 if two
blocks are to fit, and 3 stages of (128 + 128) x 64 numbers, 96 KB a block, fit Hopper's 227 KB twice. Where D is
large, exponentials hardly count, but every tile is read through the L2 cache: 128 x 256 reads a quarter less for the
same products, and one block with 4 stages (192 KB) has the multiprocessor for itself. Its epilogue stands bare then, as
does the start of the next tile: together 13% at D = 2048 by count. Hence the persistent form from there on: one warp copies,
two groups of four multiply (warp specialisation), and the copies of the next tile run under this one's exponentials.
64 numbers along D are 128 bytes, one line. A table and no tuner: the bits must not depend on what somebody measured.

Of the machine code for an H100 or H200 (Triton 3.6.0; `python -m kernels.compiled`, held by tests/test_compile.py): registers a
thread, shared memory and blocks a multiprocessor, instructions a logit, loops once. Nothing spills.

    model      kernel                        registers    KB  blocks  a logit
    smollm2    tile                                127    96       2     19.4
    smollm2    tile, stored                        125    96       2     21.4
    smollm2    d_logits                            122    72       3     14.8
    llama-8b   tile                                168   145       1     17.2
    llama-8b   tile, stored                        251   192       1     18.6
    llama-8b   logits_to_gradient                   32     0      16       12
    llama-8b   logits_to_gradient, entropy          32     0      16     15.5
    gemma2-9b  d_logits                            255    72       2       28
    gemma2-9b  logits_to_gradient                   40     0      12     17.5
    gemma2-9b  logits_to_gradient, entropy          40     0      12     19.5

The log-prob is (z - largest) - log2(mass), which cannot be positive, and at logits of 1e4 does not round the small second
term away. The vocabulary's size is a multiple of 16 in every model, and Triton is told so (V is specialised, N is not): only
then are rows of logits aligned, and stored by 16 bytes instead of 2. Constants stay above 2^-126: Triton 3.6 takes a smaller
literal for a float64, and everything behind it.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import common_triton
from kernels.common_triton import LN2, LOG2E, NEG, UPCAST, cap_and_scale, fast_log2, tile_origin
from kernels.logprob import StoredGradients, check_temperature, token_derivatives
from kernels.product import first_order

CHUNK_BYTES = 2**30  # what STORE keeps, or d_logits makes, at once; cuBLAS wants some thousand rows

# BLOCK_N, BLOCK_V, BLOCK_D, and how to compile. None spills a register (tests/test_compile.py).
TILES = {
    "float32": (64, 64, 32, dict(num_warps=8, num_stages=3)),  # exact products, so no tensor cores
    "plain": (128, 128, 64, dict(num_warps=8, num_stages=3)),
    "plain, stored": (64, 128, 64, dict(num_warps=8, num_stages=3)),  # under a cap 128 rows and their exponentials are too many
    "narrow": (128, 128, 64, dict(num_warps=8, num_stages=3, maxnreg=128)),
    "wide": (128, 256, 64, dict(num_warps=8, num_stages=4)),
    "gradient": (64, 128, 64, dict(num_warps=4, num_stages=3)),  # d_logits: many registers an element, three blocks
}
PERSISTENT = (128, 256, 64, dict(num_warps=4, num_stages=3))  # 4 warps: what Hopper's warp specialisation asks for
NARROW = 1024  # D up to which exponentials count
PERSISTENT_FROM = 2048  # D from which Hopper takes the persistent form, where no exponentials are stored (12 registers spill)
WARPS_SPECIALISE = triton.__version__.startswith("3.6.")  # 3.9 fails to compile it (3.7 and 3.8 were not tried)
COMBINE = (32, 64)  # rows, tiles of the vocabulary at once
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4  # logits of one row at once: 16 a thread


# ----------------------------------------------------------------------------------------------------
# What the products share.


@triton.jit
def logits(hidden, weight, first_row, first_col, N, V, scale, D: tl.constexpr, CAP: tl.constexpr, TMA: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """z [BLOCK_N,BLOCK_V] in base 2. What lies beyond the edges of hidden and weight is read as 0."""
    if not TMA:
        hidden = tl.make_tensor_descriptor(hidden, [N, D], [D, 1], [BLOCK_N, BLOCK_D])
        weight = tl.make_tensor_descriptor(weight, [V, D], [D, 1], [BLOCK_V, BLOCK_D])
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        x, w = hidden.load([first_row, d]), weight.load([first_col, d])
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return cap_and_scale(acc, scale, CAP)


@triton.jit
def tile_statistics_of(z, row, col, tile, target_ptr, stats_ptr, target_logit_ptr, N, V, BLOCK_V: tl.constexpr):
    """One tile's share of every row -> stats [3,tiles,N] at [:,tile,row]: top = max z, mass = sum 2^(z-top), moment =
    sum 2^(z-top) (z-top); z of the target, if it is here, -> target_logit [row]. Returns 2^(z-top), 0 beyond V.
    The moment is made whether or not an entropy is wanted: it is one multiply-add, and without it the compiler takes all
    exponentials at once and runs out of registers."""
    target = tl.load(target_ptr + row, mask=row < N, other=-1).to(tl.int32)
    here = (target >= tl.min(col)) & (target <= tl.max(col)) & (target < V)
    if tl.max(here.to(tl.int32)) == 1:  # most tiles hold no row's target
        tl.store(target_logit_ptr + row, tl.sum(tl.where(target[:, None] == col[None, :], z, 0.0), 1), mask=here)
    z = tl.where((col < V)[None, :], z, NEG)
    top = tl.max(z, 1)
    z -= top[:, None]
    e = tl.exp2(z)
    plane = (N * tl.cdiv(V, BLOCK_V)).to(tl.int64)
    at = stats_ptr + tile.to(tl.int64) * N + row
    tl.store(at, top, mask=row < N)
    tl.store(at + plane, tl.sum(e, 1), mask=row < N)
    tl.store(at + 2 * plane, tl.sum(e * z, 1), mask=row < N)
    return e


@triton.jit
def one_tile(tile, hidden, weight, target_ptr, stats_ptr, target_logit_ptr, exps_ptr, N, V, scale, D: tl.constexpr,
             CAP: tl.constexpr, TMA: tl.constexpr, STORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
             BLOCK_D: tl.constexpr):
    first_row, first_col = tile_origin(tile, N, V, BLOCK_N, BLOCK_V)
    row, col = first_row + tl.arange(0, BLOCK_N), first_col + tl.arange(0, BLOCK_V)
    z = logits(hidden, weight, first_row, first_col, N, V, scale, D, CAP, TMA, BLOCK_N, BLOCK_V, BLOCK_D)
    e = tile_statistics_of(z, row, col, first_col // BLOCK_V, target_ptr, stats_ptr, target_logit_ptr, N, V, BLOCK_V)
    if STORE:
        at = exps_ptr + row.to(tl.int64)[:, None] * V + col[None, :]
        tl.store(at, e.to(exps_ptr.dtype.element_ty), mask=(row < N)[:, None] & (col < V)[None, :])


@triton.jit
def d_logit(p, log_p, tanh, constant, common, slope, CAP: tl.constexpr, ENTROPY: tl.constexpr):
    """dloss/d(raw logit) of a token with probability p; log_p in base 2; tanh = z / (scale * CAP), read only under a cap.
    dlogprob/dz = 1[target] - p, dlogsumexp/dz = p, dentropy/dz = -p (log p + entropy): with the derivatives of the row over the
    temperature, constant = d_logprob for the target and 0 for others, common = d_logsumexp - d_logprob - d_entropy * entropy,
    slope = d_entropy * ln 2."""
    if ENTROPY:
        common = common - slope * log_p
    dz = constant + p * common
    if CAP is not None:
        dz *= 1 - tanh * tanh
    return dz


# ----------------------------------------------------------------------------------------------------
# The kernels.


@triton.jit(do_not_specialize=["N"])
def tile_kernel(hidden, weight, target_ptr, stats_ptr, target_logit_ptr, exps_ptr, N, V, scale, D: tl.constexpr,
                CAP: tl.constexpr, TMA: tl.constexpr, STORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                BLOCK_D: tl.constexpr):
    """hidden [N,D], weight [V,D], target [N] -> stats [3,ceil(V/BLOCK_V),N], target_logit [N], float32, base 2. STORE:
    2^(z - top of its tile) -> exps [N,V], in float16, whose 11 bits are more than the 8 that dloss/dlogits will have, and
    what it cannot hold, below 2^-24 of the tile's largest, no gradient would miss."""
    one_tile(tl.program_id(0), hidden, weight, target_ptr, stats_ptr, target_logit_ptr, exps_ptr, N, V, scale, D, CAP, TMA,
             STORE, BLOCK_N, BLOCK_V, BLOCK_D)


@triton.jit(do_not_specialize=["N"])
def persistent_tile_kernel(hidden, weight, target_ptr, stats_ptr, target_logit_ptr, N, V, scale, D: tl.constexpr,
                           CAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
                           PROGRAMS: tl.constexpr):
    """tile_kernel without STORE by PROGRAMS programs, one a multiprocessor, each with every PROGRAMS-th tile; the warps are
    specialised."""
    tiles, first = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V), tl.program_id(0)
    for i in tl.range(0, tl.cdiv(tiles - first, PROGRAMS), warp_specialize=True):
        one_tile(first + i * PROGRAMS, hidden, weight, target_ptr, stats_ptr, target_logit_ptr, target_logit_ptr, N, V, scale, D,
                 CAP, True, False, BLOCK_N, BLOCK_V, BLOCK_D)


@triton.jit(do_not_specialize=["N", "tiles"])
def combine_kernel(stats_ptr, target_logit_ptr, rows_ptr, N, tiles, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """stats [3,tiles,N], target_logit [N] -> rows [5,N]: logprob, logsumexp, entropy in nats; top, log_mass in base 2, with
    which backward makes log p = z - top - log_mass."""
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), N - 1)  # the last one twice does no harm
    top = tl.full((ROWS,), NEG, tl.float32)
    mass, moment = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    plane = (N * tiles).to(tl.int64)
    for first in range(0, tiles, SPAN):
        tile = first + tl.arange(0, SPAN)
        at = stats_ptr + tile.to(tl.int64)[:, None] * N + row[None, :]
        mask = (tile < tiles)[:, None]
        one = tl.load(at, mask=mask, other=NEG)
        new = tl.maximum(top, tl.max(one, 0))
        # sum 2^(z-new) (z-new) = 2^(top-new) (sum 2^(z-top) (z-top) + (top-new) sum 2^(z-top)), for old and new alike
        shrink, grow = tl.exp2(top - new), tl.exp2(one - new[None, :])
        m = tl.load(at + plane, mask=mask, other=0.0)
        s = tl.load(at + 2 * plane, mask=mask, other=0.0)
        moment = shrink * (moment + (top - new) * mass) + tl.sum(grow * (s + (one - new[None, :]) * m), 0)
        mass = shrink * mass + tl.sum(grow * m, 0)
        top = new
    log_mass = tl.log2(mass)
    n = N.to(tl.int64)
    at = rows_ptr + row
    tl.store(at, (tl.load(target_logit_ptr + row) - top - log_mass) * LN2)
    tl.store(at + n, (top + log_mass) * LN2)
    tl.store(at + 2 * n, (log_mass - moment / mass) * LN2)
    tl.store(at + 3 * n, top)
    tl.store(at + 4 * n, log_mass)


@triton.jit(do_not_specialize=["N"])
def d_logits_kernel(hidden, weight, target_ptr, rows_ptr, d_rows_ptr, out_ptr, N, V, scale, D: tl.constexpr,
                    CAP: tl.constexpr, TMA: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """hidden [N,D], weight [V,D] (a slice of the vocabulary), target [N] counted from its first token, rows [5,N] of
    combine_kernel, d_rows [3,N] = dloss/d(logprob, logsumexp, entropy) / temperature -> out [N,V], dloss/d(raw logit)."""
    first_row, first_col = tile_origin(tl.program_id(0), N, V, BLOCK_N, BLOCK_V)
    row, col = first_row + tl.arange(0, BLOCK_N), first_col + tl.arange(0, BLOCK_V)
    z = logits(hidden, weight, first_row, first_col, N, V, scale, D, CAP, TMA, BLOCK_N, BLOCK_V, BLOCK_D)
    r, n = tl.minimum(row, N - 1), N.to(tl.int64)
    log_p = z - (tl.load(rows_ptr + 3 * n + r) + tl.load(rows_ptr + 4 * n + r))[:, None]
    d_logprob, d_entropy = tl.load(d_rows_ptr + r), tl.load(d_rows_ptr + 2 * n + r)
    common = tl.load(d_rows_ptr + n + r) - d_logprob - d_entropy * tl.load(rows_ptr + 2 * n + r)
    hit = tl.load(target_ptr + r).to(tl.int32)[:, None] == col[None, :]
    constant = tl.where(hit, d_logprob[:, None], 0.0)
    tanh = 0.0 if CAP is None else z * (1 / (scale * CAP))
    dz = d_logit(tl.exp2(log_p), log_p, tanh, constant, common[:, None], (d_entropy * LN2)[:, None], CAP, ENTROPY)
    at = out_ptr + row.to(tl.int64)[:, None] * V + col[None, :]
    tl.store(at, dz.to(out_ptr.dtype.element_ty), mask=(row < N)[:, None] & (col < V)[None, :])


@triton.jit(do_not_specialize=["N"])
def logits_to_gradient_kernel(exps_ptr, stats_ptr, target_ptr, rows_ptr, d_rows_ptr, out_ptr, N, V, per_cap,
                              CAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr):
    """exps [N,V] of tile_kernel and stats [3,tiles,N], of which the tops count -> out [N,V], dloss/d(raw logit), in the same
    memory. rows [5,N] as in d_logits_kernel, d_rows [2,N] = dloss/d(logprob, entropy) / temperature; per_cap turns z into its
    tanh. A program takes TILES tiles of row program_id(0). d_logit as a polynomial in e = 2^(z - top of its tile) and log2 e:
    all that the row and the tile have in common is in its coefficients, made once a tile. With share = 2^(top - log_total),

        p (common - slope log_p) = e (share (common - slope (top - log_total)) - share slope log2 e)
        tanh                     = per_cap top + per_cap log2 e

    The target's probability comes from its log-prob, in float32: where it is nearly 1, the gradient is what is missing to 1."""
    row, n = tl.program_id(0).to(tl.int64), N.to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    col = tile[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    e = tl.load(exps_ptr + row * V + col, mask=col < V, other=0.0).to(tl.float32)
    top = tl.load(stats_ptr + tile.to(tl.int64) * n + row, mask=tile * BLOCK_V < V, other=0.0)
    log_total = tl.load(rows_ptr + 3 * n + row) + tl.load(rows_ptr + 4 * n + row)
    d_logprob = tl.load(d_rows_ptr + row)
    common, slope = -d_logprob, 0.0
    if ENTROPY:
        d_entropy = tl.load(d_rows_ptr + n + row)
        common, slope = common - d_entropy * tl.load(rows_ptr + 2 * n + row), d_entropy * LN2
    share = tl.exp2(top - log_total)
    factor = (share * (common - slope * (top - log_total)))[:, None]
    if ENTROPY or CAP is not None:
        log_e = fast_log2(tl.maximum(e, 1e-30))  # of 0: e makes nothing of it
    if ENTROPY:
        factor -= (share * slope)[:, None] * log_e
    dz = e * factor
    if CAP is not None:
        tanh = (per_cap * top)[:, None] + per_cap * log_e
        dz *= 1 - tanh * tanh
    log_p = tl.load(rows_ptr + row) * (1 / LN2)
    at_target = d_logit(tl.exp2(log_p), log_p, per_cap * (log_p + log_total), d_logprob, common, slope, CAP, ENTROPY)
    dz = tl.where(col == tl.load(target_ptr + row).to(tl.int32), at_target, dz)
    tl.store(out_ptr + row * V + col, dz.to(out_ptr.dtype.element_ty), mask=col < V)


# ----------------------------------------------------------------------------------------------------
# Their launches.


def multiprocessors(x):
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def tile_for(weight, purpose="statistics"):
    """A row of the table, by type, GPU and D, never by N. purpose: statistics, store (them and the exponentials) or gradient
    (d_logits)."""
    if weight.dtype == torch.float32:
        return TILES["float32"]
    if common_triton.generation(weight) not in (9, 10):
        return TILES["plain, stored" if purpose == "store" else "plain"]
    if purpose == "gradient":
        return TILES["gradient"]
    if weight.shape[1] <= NARROW:
        return TILES["narrow"]
    specialised = purpose == "statistics" and weight.shape[1] >= PERSISTENT_FROM
    return PERSISTENT if specialised and common_triton.generation(weight) == 9 and WARPS_SPECIALISE else TILES["wide"]


def described(hidden, weight, block):
    """hidden, weight as the kernels want them, and whether they are descriptors for the copy engine. Where there is none, a
    kernel describes them itself, and the compiler makes asynchronous copies of that (the other way round each is slow)."""
    if common_triton.generation(weight) < 9:
        return hidden, weight, False
    return *(TensorDescriptor.from_tensor(x, [rows, block[2]]) for x, rows in zip((hidden, weight), block)), True


def _aligned(x, pad):
    x = F.pad(x, (0, pad)) if pad else x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _check(hidden, weight):
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: give both in one dtype")
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"log-probs on a GPU come from bfloat16 or float32 weights, not {weight.dtype}")
    pad = -weight.shape[1] % (16 // weight.element_size())  # tiles are copied in units of 16 bytes; zeros add nothing
    return _aligned(hidden, pad), _aligned(weight, pad)


def _grid(N, V, block):
    return (triton.cdiv(N, block[0]) * triton.cdiv(V, block[1]),)


def tile_statistics(hidden, weight, target, temperature, softcap=None, exps=None, tile=None):
    """hidden [N,D], weight [V,D], target [N] -> stats [3,tiles,N] (top, mass, moment), target_logit [N] of tile_kernel; fills
    exps [N,V] if given. tile: another row of the table, for tests; PERSISTENT stands for its kernel."""
    (N, D), V = hidden.shape, weight.shape[0]
    tile = tile or tile_for(weight, "statistics" if exps is None else "store")
    *block, options = tile
    stats = torch.empty(3, triton.cdiv(V, block[1]), N, device=hidden.device)
    target_logit = torch.full((N,), torch.nan, device=hidden.device)  # a target outside the vocabulary shows
    if N:
        programs, (hidden, weight, tma) = multiprocessors(hidden), described(hidden, weight, block)
        given = hidden, weight, target, stats, target_logit
        numbers = N, V, LOG2E.value / temperature, D, softcap
        if tile is PERSISTENT:
            grid = (min(programs, *_grid(N, V, block)),)
            persistent_tile_kernel[grid](*given, *numbers, *block, programs, **options)
        else:
            store = exps is not None
            tile_kernel[_grid(N, V, block)](*given, exps if store else target_logit, *numbers, tma, store, *block, **options)
    return stats, target_logit


def combine(stats, target_logit):
    """-> rows [5,N]: logprob, logsumexp, entropy, top, log_mass; see combine_kernel."""
    _, tiles, N = stats.shape
    rows = torch.empty(5, N, device=stats.device)
    if N:
        combine_kernel[(triton.cdiv(N, COMBINE[0]),)](stats, target_logit, rows, N, tiles, *COMBINE)
    return rows


def d_logits(hidden, weight, target, rows, d_rows, temperature, softcap, out, entropy=True, tile=None):
    """rows [5,N] of combine; d_rows [3,N]: over the temperature already. -> out [N,V]. entropy: whether d_rows[2] counts."""
    (N, D), V = hidden.shape, weight.shape[0]
    *block, options = tile or tile_for(weight, "gradient")
    hidden, weight, tma = described(hidden, weight, block)
    d_logits_kernel[_grid(N, V, block)](hidden, weight, target, rows, d_rows, out, N, V, LOG2E.value / temperature, D, softcap,
                                        tma, entropy, *block, **options)


def logits_to_gradient(exps, stats, target, rows, d_rows, temperature, softcap, out, entropy=True, block_v=None):
    """exps [n,V] -> out [n,V], which may be the same memory. rows [5,n] of combine; d_rows [2,n]: of logprob, entropy, over the
    temperature already. block_v: the width of the tiles that stats [>=1,tiles,n] is of."""
    n, V = exps.shape
    tiles, per_cap = GRADIENT_BLOCK // block_v, temperature * LN2.value / softcap if softcap else 0.0
    logits_to_gradient_kernel[(n, triton.cdiv(V, GRADIENT_BLOCK))](
        exps, stats, target, rows, d_rows, out, n, V, per_cap, softcap, entropy, block_v, tiles, num_warps=GRADIENT_WARPS)


def product(a, b):
    """a @ b summed and returned in float32, whatever they are."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()


def add_product(total, a, b):
    """total + a @ b, all sums in float32, in total's memory; None stands for a total of zero. cuBLAS adds without a copy."""
    if total is None:
        return product(a, b)
    if a.is_cuda and a.dtype != torch.float32:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a.float(), b.float())


# ----------------------------------------------------------------------------------------------------
# linear_logprob: 2NDV forward, 6NDV backward.


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, softcap):
        rows = combine(*tile_statistics(hidden, weight, target, temperature, softcap))
        ctx.save_for_backward(hidden, weight, target, rows)
        ctx.temperature, ctx.softcap = temperature, softcap
        return rows[0].clone(), rows[1].clone(), rows[2].clone()  # outputs must not share the memory that is saved

    @staticmethod
    @first_order
    def backward(ctx, *d_rows):
        hidden, weight, target, rows = ctx.saved_tensors
        N, V = len(hidden), len(weight)
        d_rows = torch.stack(d_rows)  # (3, N)
        # Rows without a gradient (clipped tokens, groups in which all samples agree) cost nothing.
        count, entropy = torch.stack([(d_rows != 0).any(0).sum(), (d_rows[2] != 0).sum()]).tolist()
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        if not count:
            return d_hidden, torch.zeros_like(weight) if need_weight else None, None, None, None
        d_weight = torch.empty_like(weight) if need_weight else None
        busy = slice(None)
        if count < N:
            busy = (d_rows != 0).any(0).nonzero()[:, 0]
            hidden, target, rows, d_rows = hidden[busy], target[busy], rows[:, busy], d_rows[:, busy]
        d_rows = d_rows / ctx.temperature
        d_busy, width = None, min(V, max(128, CHUNK_BYTES // (weight.element_size() * count) // 128 * 128))
        buffer = torch.empty(count * width, dtype=weight.dtype, device=hidden.device)
        for v in range(0, V, width):
            w = weight[v : v + width]
            dz = buffer[: count * len(w)].view(count, len(w))
            d_logits(hidden, w, target - v, rows, d_rows, ctx.temperature, ctx.softcap, dz, entropy > 0)
            if need_hidden:
                d_busy = add_product(d_busy, dz, w)
            if need_weight:
                d_weight[v : v + width] = product(dz.t(), hidden)
        if need_hidden:
            d_hidden[busy] = d_busy.to(hidden.dtype)
        return d_hidden, d_weight, None, None, None


def linear_logprob(hidden, weight, target, temperature, softcap=None):
    """See kernels/logprob.py. Where nothing needs a gradient, three numbers a row are all that is left."""
    temperature = check_temperature(temperature)
    hidden, weight = _check(hidden, weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearLogprob.apply(hidden, weight, target.contiguous(), temperature, softcap)
    return tuple(combine(*tile_statistics(hidden, weight, target.contiguous(), temperature, softcap))[:3])


# ----------------------------------------------------------------------------------------------------
# linear_logprob_loss: 6NDV, all of it before backward.


def _loss_chunks(hidden, weight, target, temperature, softcap, loss_fn, per_token, need_hidden, need_weight):
    """-> loss, logprob [N], entropy [N], d_hidden [N,D] in its dtype, d_weight [V,D] float32; None for what is not needed."""
    N, V = hidden.shape[0], weight.shape[0]
    loss, outputs = torch.zeros((), device=hidden.device), torch.empty(2, N, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden) if need_hidden else None, None
    length = min(N, max(128, CHUNK_BYTES // (weight.element_size() * V) // 128 * 128))
    buffer = torch.empty(length * V, dtype=weight.dtype, device=hidden.device)
    small = torch.float32 if weight.dtype == torch.float32 else torch.float16
    for i in range(0, N, length or 1):
        chunk = slice(i, i + length)
        h, chosen = hidden[chunk], target[chunk]
        exps = buffer[: len(h) * V].view(small).view(len(h), V)
        stats, at_target = tile_statistics(h, weight, chosen, temperature, softcap, exps)
        rows = combine(stats, at_target)
        outputs[0, chunk], outputs[1, chunk] = rows[0], rows[2]
        value, *d_rows = token_derivatives(loss_fn, rows[0], rows[2], per_token, chunk)
        loss += value
        d_rows = torch.stack(d_rows)  # (2, n)
        count, entropy = torch.stack([(d_rows != 0).any(0).sum(), (d_rows[1] != 0).sum()]).tolist()
        busy = chunk
        if count < len(h):  # rows without a gradient go now, and cost no product
            if need_hidden:
                d_hidden[chunk] = 0
            if not count:
                continue
            at = (d_rows != 0).any(0).nonzero()[:, 0]
            busy = at + i
            h, exps, chosen = h[at], exps[at], chosen[at]
            stats, rows, d_rows = stats[:1, :, at], rows[:, at], d_rows[:, at]
        dz = exps.view(weight.dtype)
        logits_to_gradient(exps, stats, chosen, rows, d_rows / temperature, temperature, softcap, dz, entropy > 0,
                           tile_for(weight, "store")[1])
        if need_hidden:
            d_hidden[busy] = product(dz, weight).to(hidden.dtype)
        if need_weight:
            d_weight = add_product(d_weight, dz.t(), h)
    if need_weight and d_weight is None:
        d_weight = torch.zeros(weight.shape, device=weight.device)
    return loss, *outputs, d_hidden, d_weight


def linear_logprob_loss(hidden, weight, target, temperature, loss_fn, *per_token, softcap=None):
    """See kernels/logprob.py."""
    temperature = check_temperature(temperature)
    hidden, weight = _check(hidden, weight)
    target = target.contiguous()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        with torch.no_grad():
            loss, logprob, entropy, *stored = _loss_chunks(hidden, weight, target, temperature, softcap, loss_fn, per_token,
                                                           hidden.requires_grad, weight.requires_grad)
        return StoredGradients.apply(hidden, weight, loss, *stored), logprob, entropy
    logprob, _, entropy = linear_logprob(hidden, weight, target, temperature, softcap)
    loss, *_ = token_derivatives(loss_fn, logprob, entropy, per_token, slice(None))
    return loss, logprob, entropy


def main():
    from kernels import demo
    from kernels.logprob import linear_logprob as reference

    device, dtype = demo.start("kernels.logprob_triton")
    for name, (N, V, D) in {"SmolLM2": (4096, 49152, 576), "Llama-8B": (4096, 128256, 4096)}.items():
        name, (N, V, D) = (name, (N, V, D)) if device == "cuda" else ("toy", (9, 300, 40))
        hidden, weight = (demo.randn(n, D, device=device, dtype=dtype, seed=n, scale=D**-0.25) for n in (N, V))
        target, some = torch.arange(N, device=device) * 7919 % V, slice(0, 64)
        product = demo.seconds(lambda h=hidden, w=weight: h @ w.t())
        exact = reference(hidden[some].float(), weight.float(), target[some], 0.8)
        error = max(float((a[some] - b).abs().max()) for a, b in zip(linear_logprob(hidden, weight, target, 0.8), exact))
        demo.show(f"{name}: forward", error, lambda x=(hidden, weight, target): linear_logprob(*x, 0.8), product)

        def both(x=(hidden, weight, target)):
            h, w = (y.detach().requires_grad_() for y in x[:2])
            linear_logprob_loss(h, w, x[2], 0.8, lambda logprob, entropy: logprob.sum())[0].backward()
            return h.grad

        free = hidden[some].float().requires_grad_()
        (slope,) = torch.autograd.grad(reference(free, weight.float(), target[some], 0.8)[0].sum(), free)
        error = float((both()[some].float() - slope).norm() / slope.norm())
        demo.show(f"{name}: loss and both gradients", error, both, 3 * product)


if __name__ == "__main__":
    main()
