"""Fused linear log-prob on a GPU: kernels/logprob.py says what is computed; here is how, without the logits.

    tile       rows x tokens: a tile of logits in registers -> each row's largest, mass and moment in it; the target's logit
    combine    those of all tiles of a row -> its log-prob, logsumexp, entropy
    d_logits   backward of linear_logprob: a tile of logits once more -> a tile of dloss/dlogits
    keep_tile  as tile, for linear_logprob_loss: also keeps 2^(z - largest), 2 bytes a logit, for the loss is a moment away
    turn       those -> dloss/dlogits, over the same bytes

The gradients are plain products of dloss/dlogits with weight and with hidden: cuBLAS. Sums are float32 throughout.

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
cache. No atomics, no locks: the same bits every time. And a row's numbers are made of that row alone: the same bits in any
batch.

Why backward walks along the vocabulary: logsumexp is known by then. A slice of the vocabulary sees all rows at once, so its
d_weight is complete after one product and is rounded once; only d_hidden [N,D] is added up. linear_logprob_loss
must walk along the rows, and adds up d_weight [V,D]. Both work through CHUNK_BYTES of dloss/dlogits at a time. Rows whose
coefficients are all 0 are taken out before (backward) or after (loss) the logits.

The tiles. A float32 sum takes a register, so 128 x 128 are 64 registers of each of 256 threads; a thread may use 128 if two
blocks are to fit, and 3 stages of (128 + 128) x 64 numbers, 96 KB a block, fit Hopper's 227 KB twice. Where D is
large, exponentials hardly count, but every tile is read through the L2 cache: 128 x 256 reads a quarter less for the
same products, and one block with 4 stages (192 KB) has the multiprocessor for itself. 64 numbers along D are 128
bytes, one line. A table and no tuner: the bits must not depend on what somebody measured.

Base 2 throughout, with squash() of sampling_triton.py: sampler and trainer turn a product into a logit by the same line. The
log-prob is (z - largest) - log2(mass), which cannot be positive, and at logits of 1e4 does not round the small second
term away.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.logprob import StoredGradients, check_temperature, token_derivatives
from kernels.sampling_triton import LN2, LOG2E, NEG, UPCAST, squash

CHUNK_BYTES = 2**30  # what keep_tile keeps, or d_logits makes, at once; cuBLAS wants some thousand rows

# BLOCK_N, BLOCK_V, BLOCK_D, and how to compile. None spills a register (tests/test_compile.py).
TILES = {
    "float32": (64, 64, 32, dict(num_warps=8, num_stages=3)),  # exact products, so no tensor cores
    "plain": (128, 128, 64, dict(num_warps=8, num_stages=3)),
    "narrow": (128, 128, 64, dict(num_warps=8, num_stages=3, maxnreg=128)),
    "wide": (128, 256, 64, dict(num_warps=8, num_stages=4)),
}
NARROW = 1024  # D up to which exponentials count
GROUP = 16  # row tiles that are finished before the next ones begin
COMBINE = (32, 64)  # rows, tiles of the vocabulary at once
TURN = 1024  # logits of one row


# ----------------------------------------------------------------------------------------------------
# What the three products share.


@triton.jit
def place(N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """program_id -> first row, first token of its tile: columns of GROUP row tiles, one after the other."""
    row_tiles, col_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    first = tl.program_id(0) // (GROUP * col_tiles) * GROUP
    inside, height = tl.program_id(0) % (GROUP * col_tiles), tl.minimum(row_tiles - first, GROUP)
    return (first + inside % height) * BLOCK_N, inside // height * BLOCK_V


@triton.jit
def logits(hidden, weight, first_row, first_col, N, V, scale, cap, D: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
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
    return squash(acc, scale, cap, SOFTCAP)


@triton.jit
def statistics(z, row, col, target_ptr, top_ptr, mass_ptr, moment_ptr, chosen_ptr, tile, N, V):
    """One tile's share of every row: top = max z, mass = sum 2^(z-top), moment = sum 2^(z-top) (z-top), at [tile,row];
    z of the target, if it is here, at chosen [row]. Returns 2^(z-top), 0 for tokens that do not exist."""
    target = tl.load(target_ptr + row, mask=row < N, other=-1).to(tl.int32)
    here = (target >= tl.min(col)) & (target <= tl.max(col)) & (target < V)
    if tl.max(here.to(tl.int32)) == 1:  # most tiles hold no row's target
        tl.store(chosen_ptr + row, tl.sum(tl.where(target[:, None] == col[None, :], z, 0.0), 1), mask=here)
    z = tl.where((col < V)[None, :], z, NEG)
    top = tl.max(z, 1)
    z -= top[:, None]
    e = tl.exp2(z)
    at = tile.to(tl.int64) * N + row
    tl.store(top_ptr + at, top, mask=row < N)
    tl.store(mass_ptr + at, tl.sum(e, 1), mask=row < N)
    tl.store(moment_ptr + at, tl.sum(e * z, 1), mask=row < N)
    return e


@triton.jit
def slope(log_p, z, hit, d_logprob, d_logsumexp, d_entropy, entropy, scale, cap, SOFTCAP: tl.constexpr):
    """dloss/d(raw logit). log_p, z in base 2; the d_* (divided by the temperature) and the entropy in nats.
    dlogprob/dz = 1[target] - p, dlogsumexp/dz = p, dentropy/dz = -p (log p + entropy)."""
    dz = tl.exp2(log_p) * (d_logsumexp - d_logprob - d_entropy * (log_p * LN2 + entropy)) + tl.where(hit, d_logprob, 0.0)
    if SOFTCAP:
        tanh = z / (scale * cap)
        dz *= 1 - tanh * tanh
    return dz


# ----------------------------------------------------------------------------------------------------
# The kernels.


@triton.jit(do_not_specialize=["N", "V"])
def tile_kernel(hidden, weight, target_ptr, top_ptr, mass_ptr, moment_ptr, chosen_ptr, N, V, scale, cap,
                D: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """hidden [N,D], weight [V,D], target [N] -> top, mass, moment [ceil(V/BLOCK_V),N], chosen [N], float32, base 2."""
    first_row, first_col = place(N, V, BLOCK_N, BLOCK_V, GROUP)
    row, col = first_row + tl.arange(0, BLOCK_N), first_col + tl.arange(0, BLOCK_V)
    z = logits(hidden, weight, first_row, first_col, N, V, scale, cap, D, SOFTCAP, TMA, BLOCK_N, BLOCK_V, BLOCK_D)
    statistics(z, row, col, target_ptr, top_ptr, mass_ptr, moment_ptr, chosen_ptr, first_col // BLOCK_V, N, V)


@triton.jit(do_not_specialize=["N", "V"])
def keep_tile_kernel(hidden, weight, target_ptr, top_ptr, mass_ptr, moment_ptr, chosen_ptr, kept_ptr, N, V, scale, cap,
                     D: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                     BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """As tile_kernel, and 2^(z - top of its tile) -> kept [N,V]: in float16, whose 11 bits are more than the 8 that
    dloss/dlogits will have, and what it cannot hold, below 2^-24 of the tile's largest, no gradient would miss."""
    first_row, first_col = place(N, V, BLOCK_N, BLOCK_V, GROUP)
    row, col = first_row + tl.arange(0, BLOCK_N), first_col + tl.arange(0, BLOCK_V)
    z = logits(hidden, weight, first_row, first_col, N, V, scale, cap, D, SOFTCAP, TMA, BLOCK_N, BLOCK_V, BLOCK_D)
    e = statistics(z, row, col, target_ptr, top_ptr, mass_ptr, moment_ptr, chosen_ptr, first_col // BLOCK_V, N, V)
    at = row.to(tl.int64)[:, None] * V + col[None, :]
    tl.store(kept_ptr + at, e.to(kept_ptr.dtype.element_ty), mask=(row < N)[:, None] & (col < V)[None, :])


@triton.jit(do_not_specialize=["N", "tiles"])
def combine_kernel(top_ptr, mass_ptr, moment_ptr, chosen_ptr, logprob_ptr, logsumexp_ptr, entropy_ptr, row_top_ptr,
                   log_mass_ptr, N, tiles, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """top, mass, moment [tiles,N], chosen [N] -> logprob, logsumexp, entropy [N] in nats; row_top, log_mass [N] in base 2,
    with which backward makes log p = z - row_top - log_mass."""
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), N - 1)  # the last one twice does no harm
    top = tl.full((ROWS,), NEG, tl.float32)
    mass, moment = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in range(0, tiles, SPAN):
        tile = first + tl.arange(0, SPAN)
        at = tile.to(tl.int64)[:, None] * N + row[None, :]
        mask = (tile < tiles)[:, None]
        one = tl.load(top_ptr + at, mask=mask, other=NEG)
        new = tl.maximum(top, tl.max(one, 0))
        # sum 2^(z-new) (z-new) = 2^(top-new) (sum 2^(z-top) (z-top) + (top-new) sum 2^(z-top)), for old and new alike
        shrink, grow = tl.exp2(top - new), tl.exp2(one - new[None, :])
        m = tl.load(mass_ptr + at, mask=mask, other=0.0)
        s = tl.load(moment_ptr + at, mask=mask, other=0.0)
        moment = shrink * (moment + (top - new) * mass) + tl.sum(grow * (s + (one - new[None, :]) * m), 0)
        mass = shrink * mass + tl.sum(grow * m, 0)
        top = new
    log_mass = tl.log2(mass)
    chosen = tl.load(chosen_ptr + row)
    tl.store(logprob_ptr + row, (chosen - top - log_mass) * LN2)
    tl.store(logsumexp_ptr + row, (top + log_mass) * LN2)
    tl.store(entropy_ptr + row, (log_mass - moment / mass) * LN2)
    tl.store(row_top_ptr + row, top)
    tl.store(log_mass_ptr + row, log_mass)


@triton.jit(do_not_specialize=["N", "V"])
def d_logits_kernel(hidden, weight, target_ptr, row_top_ptr, log_mass_ptr, entropy_ptr, d_logprob_ptr, d_logsumexp_ptr,
                    d_entropy_ptr, out_ptr, N, V, scale, cap, D: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """hidden [N,D], weight [V,D] (a slice of the vocabulary), target [N] counted from its first token, row statistics and
    coefficients [N] -> out [N,V], dloss/d(raw logit) in the weight's type."""
    first_row, first_col = place(N, V, BLOCK_N, BLOCK_V, GROUP)
    row, col = first_row + tl.arange(0, BLOCK_N), first_col + tl.arange(0, BLOCK_V)
    z = logits(hidden, weight, first_row, first_col, N, V, scale, cap, D, SOFTCAP, TMA, BLOCK_N, BLOCK_V, BLOCK_D)
    r = tl.minimum(row, N - 1)
    log_p = z - tl.load(row_top_ptr + r)[:, None] - tl.load(log_mass_ptr + r)[:, None]
    hit = tl.load(target_ptr + r).to(tl.int32)[:, None] == col[None, :]
    dz = slope(log_p, z, hit, tl.load(d_logprob_ptr + r)[:, None], tl.load(d_logsumexp_ptr + r)[:, None],
               tl.load(d_entropy_ptr + r)[:, None], tl.load(entropy_ptr + r)[:, None], scale, cap, SOFTCAP)
    at = row.to(tl.int64)[:, None] * V + col[None, :]
    tl.store(out_ptr + at, dz.to(out_ptr.dtype.element_ty), mask=(row < N)[:, None] & (col < V)[None, :])


@triton.jit(do_not_specialize=["N", "V"])
def turn_kernel(kept_ptr, top_ptr, target_ptr, logprob_ptr, row_top_ptr, log_mass_ptr, entropy_ptr, d_logprob_ptr,
                d_entropy_ptr, out_ptr, N, V, scale, cap, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr):
    """kept [N,V] of keep_tile_kernel and its tiles' top [ceil(V/BLOCK_V),N] -> out [N,V], dloss/d(raw logit), in the same
    memory. Row program_id(0), BLOCK tokens. The target's probability comes from its log-prob, in float32: where it is nearly
    1, the gradient is what is missing to 1."""
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = col < V
    e = tl.load(kept_ptr + row * V + col, mask=real, other=0.0).to(tl.float32)
    top = tl.load(top_ptr + (col // BLOCK_V).to(tl.int64) * N + row, mask=real, other=0.0)
    row_top, log_mass = tl.load(row_top_ptr + row), tl.load(log_mass_ptr + row)
    hit = tl.load(target_ptr + row) == col
    log_p = tl.log2(tl.maximum(e, 1e-45)) + (top - row_top) - log_mass  # 0 becomes 2^-149, which is nothing
    log_p = tl.where(hit, tl.load(logprob_ptr + row) / LN2, log_p)
    dz = slope(log_p, log_p + row_top + log_mass, hit, tl.load(d_logprob_ptr + row), 0.0, tl.load(d_entropy_ptr + row),
               tl.load(entropy_ptr + row), scale, cap, SOFTCAP)
    tl.store(out_ptr + row * V + col, dz.to(out_ptr.dtype.element_ty), mask=real)


# ----------------------------------------------------------------------------------------------------
# Their launches. cap and scale: base-2 logits are squash(raw, scale, cap).


def generation(x):
    """8: A100 and its like (and what the interpreter plays). From 9 on an engine copies tiles; 9 and 10 have 227 KB of shared
    memory, of which the larger tiles make use."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8


def tile_for(weight, heavy=False):
    """A row of the table, by type, GPU and D, never by N. heavy: what follows the product needs many registers itself."""
    if weight.dtype == torch.float32:
        return TILES["float32"]
    if heavy or generation(weight) not in (9, 10):
        return TILES["plain"]
    return TILES["narrow" if weight.shape[1] <= NARROW else "wide"]


def described(hidden, weight, block):
    """hidden, weight as the kernels want them, and whether they are descriptors for the copy engine. Where there is none, a
    kernel describes them itself, and the compiler makes asynchronous copies of that (the other way round each is slow)."""
    if generation(weight) < 9:
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


def _grid(N, V, block_n, block_v):
    return (triton.cdiv(N, block_n) * triton.cdiv(V, block_v),)


def _empty(count, *shape, device):
    """Each on its own: rows of one tensor would be aligned for some N only, and Triton compiles anew for those that are not."""
    return [torch.empty(shape, device=device) for _ in range(count)]


def tile_statistics(hidden, weight, target, temperature, softcap=None, kept=None, tile=None):
    """hidden [N,D], weight [V,D], target [N] -> (top, mass, moment) [tiles,N] each, chosen [N], of tile_kernel; fills kept
    [N,V] if given. tile: another row of the table, for tests."""
    (N, D), V = hidden.shape, weight.shape[0]
    *block, options = tile or tile_for(weight)
    part = _empty(3, triton.cdiv(V, block[1]), N, device=hidden.device)
    chosen = torch.full((N,), torch.nan, device=hidden.device)  # a target outside the vocabulary shows
    if N:
        hidden, weight, tma = described(hidden, weight, block)
        kernel, more = (tile_kernel, ()) if kept is None else (keep_tile_kernel, (kept,))
        kernel[_grid(N, V, *block[:2])](hidden, weight, target, *part, chosen, *more, N, V, LOG2E / temperature, softcap or 1.0,
                                        D, softcap is not None, tma, *block, GROUP, **options)
    return part, chosen


def combine(part, chosen):
    """-> logprob, logsumexp, entropy, row_top, log_mass [N]; see combine_kernel."""
    tiles, N = part[0].shape
    out = _empty(5, N, device=chosen.device)
    if N:
        combine_kernel[(triton.cdiv(N, COMBINE[0]),)](*part, chosen, *out, N, tiles, *COMBINE)
    return out


def d_logits(hidden, weight, target, rows, coefficients, temperature, softcap, out, tile=None):
    """rows: row_top, log_mass, entropy [N]; coefficients: of logprob, logsumexp, entropy [N]. -> out [N,V]."""
    (N, D), V = hidden.shape, weight.shape[0]
    *block, options = tile or tile_for(weight, heavy=softcap is not None)
    hidden, weight, tma = described(hidden, weight, block)
    d_logits_kernel[_grid(N, V, *block[:2])](hidden, weight, target, *rows, *(c / temperature for c in coefficients), out, N, V,
                                             LOG2E / temperature, softcap or 1.0, D, softcap is not None, tma, *block, GROUP,
                                             **options)


def product(a, b):
    """a @ b summed and returned in float32, whatever they are."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()


def add_product(total, a, b):
    """total += a @ b, all sums in float32; cuBLAS adds without a copy."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


# ----------------------------------------------------------------------------------------------------
# linear_logprob: 2NDV forward, 6NDV backward.


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, softcap):
        logprob, logsumexp, entropy, row_top, log_mass = combine(*tile_statistics(hidden, weight, target, temperature, softcap))
        ctx.save_for_backward(hidden, weight, target, row_top, log_mass, entropy)
        ctx.temperature, ctx.softcap = temperature, softcap
        return logprob, logsumexp, entropy

    @staticmethod
    def backward(ctx, *coefficients):
        hidden, weight, target, *rows = ctx.saved_tensors
        (N, D), V = hidden.shape, weight.shape[0]
        # Rows without a gradient (clipped tokens, groups in which all samples agree) cost nothing.
        busy = torch.stack([c != 0 for c in coefficients]).any(0).nonzero()[:, 0]
        d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        if not len(busy):
            return d_hidden, d_weight, None, None, None
        if len(busy) < N:
            hidden, target, *numbers = (x[busy] for x in (hidden, target, *rows, *coefficients))
            rows, coefficients = numbers[:3], numbers[3:]
        total = torch.zeros(len(busy), D, device=hidden.device)
        width = min(V, max(128, CHUNK_BYTES // (weight.element_size() * len(busy)) // 128 * 128))
        buffer = torch.empty(len(busy) * width, dtype=weight.dtype, device=hidden.device)
        for v in range(0, V, width):
            w = weight[v : v + width]
            dz = buffer[: len(busy) * len(w)].view(len(busy), len(w))
            d_logits(hidden, w, target - v, rows, coefficients, ctx.temperature, ctx.softcap, dz)
            add_product(total, dz, w)
            d_weight[v : v + width] = product(dz.t(), hidden)
        d_hidden[busy] = total.to(hidden.dtype)
        return d_hidden, d_weight, None, None, None


def linear_logprob(hidden, weight, target, temperature, softcap=None):
    """See kernels/logprob.py. Where nothing needs a gradient, three numbers a row are all that is left."""
    temperature = check_temperature(temperature)
    hidden, weight = _check(hidden, weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearLogprob.apply(hidden, weight, target.contiguous(), temperature, softcap)
    return combine(*tile_statistics(hidden, weight, target.contiguous(), temperature, softcap))[:3]


# ----------------------------------------------------------------------------------------------------
# linear_logprob_loss: 6NDV, all of it before backward.


def turn(kept, top, target, logprob, rows, coefficients, temperature, softcap, out, block_v):
    """kept [n,V] -> out [n,V], which may be the same memory. rows: row_top, log_mass, entropy; coefficients: of logprob,
    entropy."""
    n, V = kept.shape
    turn_kernel[(n, triton.cdiv(V, TURN))](kept, top, target, logprob, *rows, *(c / temperature for c in coefficients), out, n, V,
                                           LOG2E / temperature, softcap or 1.0, softcap is not None, block_v, TURN)


def _loss_chunks(hidden, weight, target, temperature, softcap, loss_fn, per_token):
    """-> loss, logprob [N], entropy [N], d_hidden [N,D] in its dtype, d_weight [V,D] float32."""
    (N, D), V = hidden.shape, weight.shape[0]
    loss, books = torch.zeros((), device=hidden.device), torch.empty(2, N, device=hidden.device)
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros(V, D, device=hidden.device)
    length = min(N, max(128, CHUNK_BYTES // (weight.element_size() * V) // 128 * 128))
    buffer = torch.empty(length * V, dtype=weight.dtype, device=hidden.device)
    small = torch.float32 if weight.dtype == torch.float32 else torch.float16
    for i in range(0, N, length or 1):
        rows = slice(i, i + length)
        h, chosen = hidden[rows], target[rows]
        kept = buffer[: len(h) * V].view(small).view(len(h), V)
        part, at_target = tile_statistics(h, weight, chosen, temperature, softcap, kept)
        logprob, _, entropy, row_top, log_mass = combine(part, at_target)
        books[0, rows], books[1, rows] = logprob, entropy
        value, *coefficients = token_derivatives(loss_fn, logprob, entropy, per_token, rows)
        loss += value
        busy = ((coefficients[0] != 0) | (coefficients[1] != 0)).nonzero()[:, 0]
        if not len(busy):
            continue
        top, numbers = part[0], [chosen, logprob, row_top, log_mass, entropy, *coefficients]
        if len(busy) < len(h):  # the others go first, and cost no product
            h, kept, top, numbers = h[busy], kept[busy], top[:, busy], [x[busy] for x in numbers]
        chosen, logprob, row_top, log_mass, entropy, *coefficients = numbers
        dz = kept.view(weight.dtype)
        turn(kept, top, chosen, logprob, (row_top, log_mass, entropy), coefficients, temperature, softcap, dz,
             tile_for(weight)[1])
        d_hidden[busy + i] = product(dz, weight).to(hidden.dtype)
        add_product(d_weight, dz.t(), h)
    return loss, *books, d_hidden, d_weight


def linear_logprob_loss(hidden, weight, target, temperature, loss_fn, *per_token, softcap=None):
    """See kernels/logprob.py."""
    temperature = check_temperature(temperature)
    hidden, weight = _check(hidden, weight)
    target = target.contiguous()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        with torch.no_grad():
            loss, logprob, entropy, *stored = _loss_chunks(hidden, weight, target, temperature, softcap, loss_fn, per_token)
        return StoredGradients.apply(hidden, weight, loss, *stored), logprob, entropy
    logprob, _, entropy = linear_logprob(hidden, weight, target, temperature, softcap)
    loss, *_ = token_derivatives(loss_fn, logprob, entropy, per_token, slice(None))
    return loss, logprob, entropy
