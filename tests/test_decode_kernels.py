"""The Triton kernels of generation against their references: on the GPU where there is one, else interpreted."""

import math
import os

import pytest
import torch
from test_kernels import check_frequencies, plain_filter
from test_kernels import reference as exact_logprob

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton", reason="triton has no wheel for this machine")

from kernels import attention, attention_triton, layer, layer_triton, sampling, sampling_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def uniforms(n, seed=0):
    return sampling.philox_uniform(seed, torch.arange(n), torch.tensor(0)).to(DEVICE)


# ----------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31 + 3, 2**32 + 7, 2**63 + 11, 2**64 - 1])
def test_the_uniforms_are_the_references_bit_for_bit(seed):
    sequence, position = torch.tensor([[0], [5], [2**33 + 1], [2**62]]), torch.tensor([0, 1, 999])
    ours = sampling_triton.philox_uniform(seed, sequence.to(DEVICE), position.to(DEVICE))
    assert torch.equal(ours.cpu(), sampling.philox_uniform(seed, sequence, position))


@pytest.mark.parametrize("B, V, D", [(1, 1, 3), (1, 31, 8), (5, 33, 7), (3, 500, 33), (2, 1100, 5)])
@pytest.mark.parametrize("temperature, softcap", [(0.1, None), (1.0, None), (5.0, None), (0.7, 8.0)])
def test_tokens_are_the_references(B, V, D, temperature, softcap):
    hidden, weight, uniform = randn(B, D), randn(V, D, seed=1), uniforms(B)
    token, logprob = sampling_triton.linear_draw(hidden, weight, temperature, uniform, softcap)
    assert torch.equal(token, sampling.linear_draw(hidden, weight, temperature, uniform, softcap)[0])
    exact, _, _ = exact_logprob(hidden, weight, token, temperature, softcap)
    torch.testing.assert_close(logprob.double(), exact, atol=5e-6 / min(temperature, 1), rtol=5e-6)
    assert (logprob <= 0).all()
    token, logprob = sampling_triton.linear_greedy(hidden, weight, softcap)
    assert torch.equal(token, sampling.linear_greedy(hidden, weight, softcap)[0])
    exact, _, _ = exact_logprob(hidden, weight, token, 1.0, softcap)
    torch.testing.assert_close(logprob.double(), exact, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("V, temperature, softcap", [(33, 0.7, 1.5), (100, 3.0, None)])
def test_frequencies_are_exact(V, temperature, softcap):
    """Few draws where the interpreter makes them; what 20000 look like on a CPU is tested on the reference, whose
    tokens these are (above)."""
    n = 20_000 if DEVICE == "cuda" else 200
    hidden, weight = randn(1, 6), randn(V, 6, seed=1)
    token, _ = sampling_triton.linear_draw(hidden.expand(n, -1), weight, temperature, uniforms(n, seed=V), softcap)
    exact, _, _ = exact_logprob(hidden.expand(V, -1), weight, torch.arange(V, device=DEVICE), temperature, softcap)
    check_frequencies(token.cpu(), exact.exp().cpu())


@pytest.mark.parametrize("V, D", [(33, 5), (500, 12)])
def test_equal_logits_give_equal_tokens(V, D):
    """Small integers: every logit is the same number in both, so every token has to be, whatever its uniforms."""
    B = 24
    hidden, weight, uniform = (randn(B, D) * 2).round(), randn(V, D, seed=1).round() / 4, uniforms(B, seed=9)
    token, _ = sampling_triton.linear_draw(hidden, weight, 1.0, uniform)
    assert torch.equal(token, sampling.linear_draw(hidden, weight, 1.0, uniform)[0])
    assert len(token.unique()) > 5  # and they are many
    token, _ = sampling_triton.linear_greedy(hidden, weight)
    assert torch.equal(token, sampling.linear_greedy(hidden, weight)[0])
    filters = (7, 0.9, 0.02)
    few = hidden[:4], weight, 1.0, uniform[:4]  # the interpreter needs a second for a row of the cut
    token, _, kept = sampling_triton.linear_draw_filtered(*few, *filters)
    want, _, want_kept = sampling.linear_draw_filtered(*few, *filters)
    assert torch.equal(token, want)
    torch.testing.assert_close(kept, want_kept, atol=1e-5, rtol=0)


def test_neither_batch_nor_tile_nor_order_changes_a_token(monkeypatch):
    """Each row's numbers are made of that row: the same bits in any company, and in any tile of the table."""
    B, V, D = 66, 160, 24
    hidden, weight, uniform = randn(B, D), randn(V, D, seed=1), uniforms(B)
    token, logprob = sampling_triton.linear_draw(hidden, weight, 0.8, uniform)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for rows in (order, order[:1], order[:33]):
        again, again_logprob = sampling_triton.linear_draw(hidden[rows], weight, 0.8, uniform[rows])
        assert torch.equal(again, token[rows])
        torch.testing.assert_close(again_logprob, logprob[rows], atol=2e-6, rtol=0)  # numpy's products differ by shape
    few, last = order[:4], order[3:4]
    filtered, _, _ = sampling_triton.linear_draw_filtered(hidden[few], weight, 0.8, uniform[few], 9)
    assert torch.equal(sampling_triton.linear_draw_filtered(hidden[last], weight, 0.8, uniform[last], 9)[0], filtered[3:])
    whole = sampling_triton.group_stats(hidden, weight, 0.8)
    for tile in [t[1:] for t in sampling_triton.GROUP_STATS_TILES["float32"]] + [(16, 32, 16, 4, 2)]:
        with monkeypatch.context() as patch:
            patch.setattr(sampling_triton, "group_stats_tile", lambda B, weight, tile=tile: tile)
            assert torch.equal(sampling_triton.linear_draw(hidden[:9], weight, 0.8, uniform[:9])[0], token[:9])
        for a, b in zip(whole, sampling_triton.group_stats(hidden, weight, 0.8, tile=tile)):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_logits_of_ten_thousand_and_corners(temperature):
    """Tokens without mass are never drawn, not by the uniforms 0 and 1 - 2^-53 either; V = 33: one token in group 2."""
    weight = torch.zeros(33, 1, device=DEVICE)
    weight[0] = weight[32] = -1e4
    corners = [[a, b] for a in (0.0, 1 - 2.0**-53) for b in (0.0, 1 - 2.0**-53)]
    corners = torch.tensor(corners, dtype=torch.float64, device=DEVICE)
    one = torch.ones(4, 1, device=DEVICE)
    token, logprob = sampling_triton.linear_draw(one, weight, temperature, corners)
    assert token.tolist() == [1, 31, 1, 31] and logprob.isfinite().all()
    weight[1:32], weight[32] = -1e4, 1e4
    token, logprob = sampling_triton.linear_draw(one, weight, temperature, corners)
    assert token.tolist() == [32] * 4 and logprob.tolist() == [0.0] * 4
    assert sampling_triton.linear_greedy(-one, weight)[0].tolist() == [0] * 4  # 0..31 are equal: the lowest


@pytest.mark.parametrize("top_k, top_p, min_p", [
    (3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (4, 0.8, 0.05), (1, 1.0, 0.0), (0, 1e-6, 0.0), (0, 1.0, 1.0), (9999, 1.0, 0.0),
])
@pytest.mark.parametrize("V", [1, 33, 1100])  # 1100: two blocks of cut_kernel
def test_what_is_cut_is_what_a_plain_filter_cuts(V, top_k, top_p, min_p):
    """Logits are small multiples of 1/4, exact in float32, so that there are many ties."""
    hidden = torch.tensor([[1.0], [-0.5]], device=DEVICE)
    weight = (randn(V, 1) * 6).round() / 2
    uniform = uniforms(2, seed=V)
    logits = torch.empty(2, V, device=DEVICE)
    sampling_triton.group_stats(hidden, weight, 1.0, logits=logits)
    torch.testing.assert_close(logits, hidden @ weight.t() * sampling_triton.LOG2E.value, atol=1e-6, rtol=1e-6)
    token, logprob, kept = sampling_triton.linear_draw_filtered(hidden, weight, 1.0, uniform, top_k, top_p, min_p)
    want = sampling.linear_draw_filtered(hidden, weight, 1.0, uniform, top_k, top_p, min_p)
    for b in range(2):
        exact = (hidden[b].double() @ weight.double().t()).softmax(-1)
        keep = plain_filter(exact.tolist(), top_k, top_p, min_p)
        assert int(token[b]) in keep and math.isclose(float(kept[b]), sum(float(exact[v]) for v in keep), abs_tol=1e-5)
        assert math.isclose(float(logprob[b]), math.log(float(exact[token[b]])), abs_tol=1e-5)
    assert torch.equal(token, want[0])


def test_bfloat16_products_are_summed_in_float32():
    hidden, weight, uniform = randn(6, 64, dtype=torch.bfloat16), randn(50, 64, seed=1, dtype=torch.bfloat16), uniforms(6)
    token, logprob = sampling_triton.linear_draw(hidden, weight, 0.7, uniform)
    exact, _, _ = exact_logprob(hidden, weight, token, 0.7)
    torch.testing.assert_close(logprob.double(), exact, atol=2e-5, rtol=1e-5)
    assert torch.equal(token, sampling.linear_draw(hidden, weight, 0.7, uniform)[0])
    with pytest.raises(ValueError, match="one dtype"):
        sampling_triton.linear_draw(hidden.float(), weight, 0.7, uniform)


def test_an_empty_batch():
    token, logprob = sampling_triton.linear_draw(randn(0, 4), randn(9, 4), 1.0, uniforms(0))
    assert token.shape == logprob.shape == (0,)


# ----------------------------------------------------------------------------------------------------
# Attention


def exact_attention(q, k, v, length, scale, window, softcap):
    """Position by position, row by row, head by head, in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    B, H, d = q.shape
    for b in range(B):
        n = int(length[b])
        first = max(0, n - window) if window else 0
        for h in range(H):
            kh = h * k.shape[1] // H
            s = k[b, kh, first:n].double() @ q[b, h].double() * (scale or d**-0.5)
            if softcap:
                s = softcap * (s / softcap).tanh()
            out[b, h] = s.softmax(0) @ v[b, kh, first:n].double()
    return out


@pytest.mark.parametrize("H, K, d", [(1, 1, 16), (6, 2, 64), (8, 2, 5), (16, 2, 24)])  # 1, 3, 4, 8 heads a key head
@pytest.mark.parametrize("window, softcap, scale", [(None, None, None), (3, None, 0.3), (200, 2.0, None)])
# Float32 on a GPU is three tf32 products, 1e-6 to 3e-6 off.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5 if DEVICE == "cuda" else 2e-6), (torch.bfloat16, 0.02)])
def test_decode_attention(H, K, d, window, softcap, scale, dtype, tolerance):
    T = 270  # three chunks, the last one short
    length = torch.tensor([1, T, 128, 129, 2], device=DEVICE)
    q, k, v = randn(5, H, d, dtype=dtype), randn(6, K, T, d, seed=1, dtype=dtype), randn(6, K, T, d, seed=2, dtype=dtype)
    exact = exact_attention(q, k, v, length, scale, window, softcap)
    for function in (attention.decode_attention, attention_triton.decode_attention):
        out = function(q, k, v, length, scale, window, softcap)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


def test_neither_neighbours_nor_what_lies_beyond_the_length_matter():
    length = torch.tensor([130, 7, 256], device=DEVICE)
    q, k, v = randn(3, 4, 16), randn(3, 2, 256, 16, seed=1), randn(3, 2, 256, 16, seed=2)
    whole = attention_triton.decode_attention(q, k, v, length)
    for b in range(3):
        alone = attention_triton.decode_attention(*(x[b : b + 1] for x in (q, k, v, length)))
        assert torch.equal(alone[0], whole[b])
    k[0, :, 130:], v[0, :, 130:] = math.nan, math.inf
    longer = torch.cat([k, torch.full_like(k, math.nan)], 2), torch.cat([v, torch.full_like(v, math.nan)], 2)
    assert torch.equal(attention_triton.decode_attention(q, *longer, length), whole)


# ----------------------------------------------------------------------------------------------------
# What stands between the products


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("D", [1, 37, 576])
def test_add_rmsnorm(D, dtype, tolerance):
    x, delta, weight = randn(3, D, dtype=dtype), randn(3, D, seed=1, dtype=dtype), randn(D, seed=2, dtype=dtype)
    for change in (None, delta):
        total = x.double() + (0 if change is None else change.double())
        norm = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        for function in (layer.add_rmsnorm, layer_triton.add_rmsnorm):
            for ours, exact in zip(function(x, change, weight, 1e-5), (total, norm)):
                torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("inner", [1, 700, 1024])
def test_swiglu(inner, dtype, tolerance):
    x = randn(3, 2 * inner, dtype=dtype) * 3
    gate, up = x.double().chunk(2, -1)
    for function in (layer.swiglu, layer_triton.swiglu):
        torch.testing.assert_close(function(x).double(), gate / (1 + (-gate).exp()) * up, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_rope_write_writes_one_position_of_each_row(dtype, tolerance):
    H, K, d, T = 6, 2, 10, 20
    qkv, position = randn(3, H + 2 * K, d, dtype=dtype), torch.tensor([0, 7, 19], device=DEVICE)
    angle = torch.outer(torch.arange(T, dtype=torch.float64), torch.tensor([1.0, 0.5, 0.1, 0.01, 0.001])).to(DEVICE)
    cos, sin = angle.cos().float(), angle.sin().float()
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    a, b = qkv[:, : H + K].double().chunk(2, -1)
    c, s = angle[position].cos()[:, None], angle[position].sin()[:, None]
    turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    for function in (layer.rope_write, layer_triton.rope_write):
        k, v = (torch.full((4, K, T, d), 7.0, device=DEVICE, dtype=dtype) for _ in range(2))
        q = function(qkv, cos, sin, position, k, v)
        torch.testing.assert_close(q.double(), turned[:, :H], atol=tolerance, rtol=tolerance)
        rows = torch.arange(3, device=DEVICE)
        torch.testing.assert_close(k[rows, :, position].double(), turned[:, H:], atol=tolerance, rtol=tolerance)
        assert torch.equal(v[rows, :, position], qkv[:, H + K :])
        assert int((k != 7).any(-1).sum()) == int((v != 7).any(-1).sum()) == 3 * K


def test_a_prompt_and_a_step_rotate_alike():
    """bfloat16 keys: model.rotate (the prompt's pass) and rope_write (a step) both turn in float32 and round once, by
    at most 2^-8. Tables in bfloat16 would add as much again, and more where the two terms cancel."""
    from kernels.pointwise import rotate

    T, d = 19, 16
    angle = torch.outer(torch.arange(T, dtype=torch.float64), 0.5 ** torch.arange(d // 2, dtype=torch.float64))
    cos, sin = angle.cos().float().to(DEVICE), angle.sin().float().to(DEVICE)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    x = randn(T, 2, d, dtype=torch.bfloat16)
    half = x.double().roll(d // 2, -1)
    exact = x.double() * cos.double()[:, None] + half * sin.double()[:, None]
    k, v = (torch.zeros(T, 2, T, d, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    position = torch.arange(T, device=DEVICE)
    layer.rope_write(torch.cat([x, x, x], 1), cos, sin, position, k, v)
    for turned in (rotate(x, cos[:, None], sin[:, None]), k[position, :, position]):
        assert turned.dtype == torch.bfloat16
        assert ((turned.double() - exact).abs() <= 2.0**-8 * 1.001 * exact.abs() + 1e-6).all()
