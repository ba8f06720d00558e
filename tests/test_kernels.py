"""linear_logprob against float64, sampling against its exact distribution, products against plain ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import (
    linear,
    linear_draw,
    linear_draw_filtered,
    linear_greedy,
    linear_logprob,
    linear_logprob_loss,
    linear_sample,
    packed_weights,
    philox_uniform,
    product,
)
from kernels import logprob as logprob_file
from kernels.product import matmul_nt
from kernels.sampling import philox

# ----------------------------------------------------------------------------------------------------
# linear_logprob


def reference(hidden, weight, target, temperature, softcap=None):
    """The definition, in float64, through ordinary autograd."""
    z = hidden.double() @ weight.double().t()
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    logp = (z / temperature).log_softmax(-1)
    logsumexp = (z / temperature).logsumexp(-1)
    return logp.gather(1, target[:, None])[:, 0], logsumexp, -(logp.exp() * logp).sum(-1)


def both_gradients(function, hidden, weight, target, coefficients, **options):
    """Gradients of sum_n a_n logprob + b_n logsumexp + c_n entropy in hidden and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(hidden, weight, target, **options)
    sum((c * o).sum() for c, o in zip(coefficients, out)).backward()
    return [o.detach().double() for o in out], hidden.grad.double(), weight.grad.double()


def check_against_reference(N, V, D, function=linear_logprob, scale=1.0, tolerance=2e-5, dtype=torch.float32, device="cpu",
                            **options):
    g = torch.Generator().manual_seed(N + V)
    hidden, weight = torch.randn(N, D, generator=g) * scale, torch.randn(V, D, generator=g)
    target = torch.randint(V, (N,), generator=g)
    target[: N // 3], target[N // 3 : N // 2] = 0, V - 1  # both ends
    coefficients = torch.randn(3, N, generator=g)
    coefficients[:, 1::3] = 0  # rows without any gradient are skipped; the others must not notice
    coefficients[0, ::4] = 0  # and rows that only entropy or logsumexp pull
    hidden, weight, target, coefficients = (x.to(device) for x in (hidden.to(dtype), weight.to(dtype), target, coefficients))
    ours = both_gradients(function, hidden, weight, target, coefficients, **options)
    exact = both_gradients(reference, hidden, weight, target, coefficients, **options)
    for a, b in zip(ours[0], exact[0]):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    if dtype == torch.bfloat16:
        tolerance = 0.01  # of the largest: what the gradients themselves are rounded to
    for a, b in zip(ours[1:], exact[1:]):
        largest = max(1.0, b.abs().amax().item() if b.numel() else 0.0)
        torch.testing.assert_close(a, b, atol=tolerance * largest, rtol=0)
    assert (ours[1][1::3] == 0).all()


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 5.0])
@pytest.mark.parametrize("N, V, D", [(1, 1, 3), (1, 33, 7), (5, 2, 1), (37, 33, 16), (0, 33, 4), (64, 512, 32)])
def test_logprob_and_both_gradients(N, V, D, temperature):
    check_against_reference(N, V, D, temperature=temperature)


@pytest.mark.parametrize("softcap", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_softcap_acts_before_the_temperature(softcap, temperature):
    check_against_reference(9, 33, 8, scale=2.0, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("N", [15, 16, 17, 37])
def test_rows_that_cross_a_chunk(N, monkeypatch):
    monkeypatch.setattr(logprob_file, "CHUNK_BYTES", 1)
    assert logprob_file._chunk_rows(33) == 16
    chunks = logprob_file._chunks(N, 33)
    assert max(c.stop - c.start for c in chunks) <= 16 and [i for c in chunks for i in range(N)[c]] == list(range(N))
    monkeypatch.setattr(logprob_file, "BLOCK_BYTES", 4 * 33 * 3)  # and blocks of three rows inside
    check_against_reference(N, 33, 8, temperature=0.9)
    check_against_reference(N, 33, 8, temperature=0.9, softcap=2.0)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_logits_of_ten_thousand(temperature):
    check_logits_of_ten_thousand(linear_logprob, temperature)


def check_logits_of_ten_thousand(function, temperature, device="cpu"):
    """Nothing overflows, and float32 rounds no more than it must: z / temperature by 2^-24 of its size, and
    logsumexp, which backward reads again, as much; that is a relative error of every probability."""
    hidden, weight = torch.tensor([[1.0], [-1.0], [1.0], [1.0]]), torch.tensor([[1e4], [-1e4], [9999.0], [1e4], [0.0]])
    target, coefficients = torch.tensor([0, 1, 1, 2]), torch.ones(3, 4)
    hidden, weight, target, coefficients = (x.to(device) for x in (hidden, weight, target, coefficients))
    largest = 1e4 / temperature  # |z|, and |dz/dhidden|
    ours = both_gradients(function, hidden, weight, target, coefficients, temperature=temperature)
    exact = both_gradients(reference, hidden, weight, target, coefficients, temperature=temperature)
    for a, b in zip(ours[0], exact[0]):
        torch.testing.assert_close(a, b, atol=largest * 2.0**-23, rtol=1e-6)
    for a, b in zip(ours[1:], exact[1:]):
        torch.testing.assert_close(a, b, atol=2 * largest * largest * 2.0**-24, rtol=1e-6)


def test_bfloat16_inputs_are_computed_in_float32():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 64, generator=g).bfloat16() * 3, torch.randn(33, 64, generator=g).bfloat16()
    target = torch.arange(6)
    ours, d_hidden, d_weight = both_gradients(linear_logprob, hidden, weight, target, torch.ones(3, 6), temperature=0.7)
    exact = both_gradients(reference, hidden, weight, target, torch.ones(3, 6), temperature=0.7)
    for a, b in zip(ours, exact[0]):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)  # bfloat16 logits would be off by 0.1
    torch.testing.assert_close(d_weight, exact[2], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_without_meaning_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64), temperature)


def odd_loss(logprob, entropy, a, c, nothing):
    """Every term that training has, and one without a gradient. A sum over tokens."""
    assert nothing is None
    return (a * (logprob + 1).square()).sum() + (c * entropy * logprob).sum() + (3.0 * c).sum()


def check_loss_against_reference(N, V, D, function=linear_logprob_loss, scale=1.0, tolerance=2e-5, entropy=True, seed=0,
                                 dtype=torch.float32, device="cpu", **options):
    """Loss, log-prob, entropy and both gradients of odd_loss against float64 and ordinary autograd."""
    g = torch.Generator().manual_seed(seed + N + V)
    hidden, weight = torch.randn(N, D, generator=g) * scale, torch.randn(V, D, generator=g)
    target, (a, c) = torch.randint(V, (N,), generator=g), torch.randn(2, N, generator=g)
    target[: N // 3], target[N // 3 : N // 2] = 0, V - 1  # both ends
    c *= entropy
    a[1::3] = c[1::3] = 0  # rows without any gradient
    a[::4] = 0  # and rows that only the entropy's term pulls
    hidden, weight, a, c, target = (x.to(device) for x in (hidden.to(dtype), weight.to(dtype), a, c, target))
    ours, exact = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    loss, logprob, entropies = function(*ours, target, options["temperature"], odd_loss, a, c, None,
                                        softcap=options.get("softcap"))
    assert loss.shape == () and not logprob.requires_grad and not entropies.requires_grad
    (loss * -2).backward()
    exact_logprob, _, exact_entropy = reference(*exact, target, **options)
    exact_loss = odd_loss(exact_logprob, exact_entropy, a, c, None)
    (exact_loss * -2).backward()
    torch.testing.assert_close(loss.double(), exact_loss, atol=tolerance * max(1, N), rtol=tolerance)
    torch.testing.assert_close(logprob.double(), exact_logprob, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(entropies.double(), exact_entropy, atol=tolerance, rtol=tolerance)
    if dtype == torch.bfloat16:
        tolerance = 0.01
    for x, y in zip(ours, exact):
        largest = max(1.0, y.grad.abs().amax().item() if y.grad.numel() else 0.0)
        torch.testing.assert_close(x.grad.double(), y.grad.double(), atol=tolerance * largest, rtol=0)
    assert (ours[0].grad[1::3] == 0).all()


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("temperature, softcap", [(0.1, None), (1.0, None), (5.0, None), (0.7, 3.0)])
@pytest.mark.parametrize("N, V, D", [(1, 1, 3), (1, 33, 7), (5, 2, 1), (37, 33, 16), (0, 33, 4), (64, 512, 32)])
def test_the_loss_and_its_gradients(N, V, D, temperature, softcap, entropy, monkeypatch):
    check_loss_against_reference(N, V, D, temperature=temperature, softcap=softcap, entropy=entropy, tolerance=5e-5)
    monkeypatch.setattr(logprob_file, "CHUNK_BYTES", 1)  # 16 rows a chunk
    monkeypatch.setattr(logprob_file, "BLOCK_BYTES", 4 * V * 3)  # 3 rows a block
    check_loss_against_reference(N, V, D, temperature=temperature, softcap=softcap, entropy=entropy, tolerance=5e-5)


def test_the_loss_of_bfloat16_weights_sums_in_float32():
    check_loss_against_reference(9, 33, 64, temperature=0.7, dtype=torch.bfloat16)


def test_the_loss_is_called_once_a_chunk_and_never_sees_others(monkeypatch):
    monkeypatch.setattr(logprob_file, "CHUNK_BYTES", 1)
    hidden, weight, seen = torch.randn(37, 4), torch.randn(9, 4), []

    def loss_fn(logprob, entropy, index):
        seen.append(index.tolist())
        return logprob.sum()

    loss, logprob, entropy = linear_logprob_loss(hidden, weight, torch.zeros(37).long(), 1.0, loss_fn, torch.arange(37))
    assert sum(seen, []) == list(range(37)) and [len(rows) for rows in seen] == [12, 12, 13] and not loss.requires_grad
    expected = linear_logprob(hidden, weight, torch.zeros(37).long(), 1.0)
    assert torch.equal(logprob, expected[0]) and torch.equal(entropy, expected[2])


def test_what_the_loss_refuses():
    hidden, weight, target = torch.randn(3, 4).requires_grad_(), torch.randn(9, 4), torch.zeros(3).long()
    with pytest.raises(ValueError, match="scalar"):
        linear_logprob_loss(hidden, weight, target, 1.0, lambda logprob, entropy: logprob)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob_loss(hidden, weight, target, 0.0, lambda logprob, entropy: logprob.sum())
    loss, _, _ = linear_logprob_loss(hidden, weight, target, 1.0, lambda logprob, entropy: logprob.sum())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()
    with torch.no_grad():
        assert not linear_logprob_loss(hidden, weight, target, 1.0, lambda logprob, entropy: logprob.sum())[0].requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen, monkeypatch):
    hidden, weight, target = torch.randn(9, 4), torch.randn(33, 4), torch.arange(9)
    free, calls, original = weight if frozen == "hidden" else hidden, [], logprob_file._add_product
    monkeypatch.setattr(logprob_file, "_add_product", lambda *a: (calls.append(1), original(*a))[1])
    for loss in (lambda: linear_logprob_loss(hidden, weight, target, 1.0, lambda lp, h: lp.sum())[0],
                 lambda: linear_logprob(hidden, weight, target, 1.0)[0].sum()):
        hidden.requires_grad_(), weight.requires_grad_()
        expected = torch.autograd.grad(loss(), free)[0]
        (hidden if frozen == "hidden" else weight).requires_grad_(False)
        calls.clear()
        assert torch.equal(torch.autograd.grad(loss(), free)[0], expected) and len(calls) == (frozen == "hidden")


def test_a_second_derivative_is_refused():
    hidden, weight, target = torch.randn(3, 4).requires_grad_(), torch.randn(9, 4), torch.arange(3)
    for loss in (linear_logprob(hidden, weight, target, 1.0)[0].sum(),
                 linear_logprob_loss(hidden, weight, target, 1.0, lambda lp, h: lp.sum())[0]):
        with pytest.raises(RuntimeError, match="differentiated again"):
            torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.49])
def test_exponentials_that_underflow_are_zero_at_low_temperatures(temperature):
    """Below e^-87 float32 runs out and exp is 10 to 40 times slower, so those are not asked of it; they count as 0 all the same:
    no such token is drawn by any uniform, and the numbers are the exact ones."""
    hidden, weight, target = torch.ones(2, 1), torch.linspace(-60, 0, 70)[:, None] * 2, torch.tensor([69, 0])
    for ours, exact in zip(linear_logprob(hidden, weight, target, temperature), reference(hidden, weight, target, temperature)):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)
    corners = torch.tensor([[0.0, 0.0], [1 - 2.0**-53] * 2], dtype=torch.float64)
    token, logprob = linear_draw(hidden, weight, temperature, corners)
    p = (weight[:, 0].double() / temperature).softmax(0)
    assert (p[token] > 1e-38).all() and token[1] == 69
    torch.testing.assert_close(logprob.double(), p[token].log(), atol=1e-4, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------
# Random numbers


@pytest.mark.parametrize("key, counter, words", [
    ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_philox_gives_the_known_words(key, counter, words):
    """kat_vectors of the Random123 distribution, philox4x32-10."""
    out = philox(*key, *(torch.tensor([c]) for c in counter))
    assert " ".join(f"{int(w):08x}" for w in out) == words


def test_uniforms_are_uniform_and_differ_by_seed_sequence_and_position():
    u = philox_uniform(7, torch.arange(100)[:, None], torch.arange(200))
    assert u.shape == (100, 200, 2) and u.dtype == torch.float64
    assert float(u.min()) >= 0 and float(u.max()) < 1 and u.unique().numel() == u.numel()
    n = u.numel()
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(float(u.var()) - 1 / 12) < 5 / math.sqrt(180 * n)
    assert abs(float(((u[..., 0] - 0.5) * (u[..., 1] - 0.5)).mean())) < 5 / 12 / math.sqrt(n / 2)
    big = 2**40 + 3  # both halves of a 64-bit seed and of a 64-bit id count
    one, zero = torch.tensor([5]), torch.tensor([0])
    other = [philox_uniform(7 + 2**32, one, zero), philox_uniform(7, one + 2**40, zero), philox_uniform(big, one, zero)]
    assert torch.cat([u[5, :1], *other]).unique().numel() == 8


# ----------------------------------------------------------------------------------------------------
# Sampling


def check_frequencies(tokens, p):
    """Chi-square with cells of expectation >= 5; the bound is 5 standard deviations of the statistic."""
    n = len(tokens)
    assert (p[tokens] > 0).all()
    count = torch.bincount(tokens, minlength=len(p)).double()
    expected = p.double() * n
    big = expected >= 5
    observed, expected = [torch.cat([x[big], x[~big].sum()[None]]) for x in (count, expected)]
    cells = expected > 0
    statistic = float(((observed - expected).square() / expected)[cells].sum())
    freedom = int(cells.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * max(freedom, 1)), (statistic, freedom)


def head_and_uniforms(V, n=20_000, D=6):
    g = torch.Generator().manual_seed(V)
    weight, hidden = torch.randn(V, D, generator=g), torch.randn(1, D, generator=g)
    return hidden, weight, philox_uniform(V, torch.arange(n), torch.tensor(0))


def test_the_check_of_frequencies_notices_what_is_a_little_wrong():
    """The right tokens pass; those of another temperature, of a lost group and of a shifted id do not."""
    hidden, weight, uniform = head_and_uniforms(100)
    rows = hidden.expand(len(uniform), -1)
    p = reference(hidden.expand(100, -1), weight, torch.arange(100), 0.7)[0].exp()
    token = linear_draw(rows, weight, 0.7, uniform)[0]
    check_frequencies(token, p)
    for wrong in (linear_draw(rows, weight, 0.75, uniform)[0], token.clamp(max=95), (token + 1) % 100):
        with pytest.raises(AssertionError):
            check_frequencies(wrong, p)


@pytest.mark.parametrize("V", [1, 5, 32, 33, 100, 1100])
@pytest.mark.parametrize("temperature, softcap", [(0.7, None), (1.0, 1.5), (3.0, None)])
def test_sampled_frequencies_are_exact(V, temperature, softcap):
    hidden, weight, uniform = head_and_uniforms(V)
    token, logprob = linear_draw(hidden.expand(len(uniform), -1), weight, temperature, uniform, softcap)
    exact, _, _ = reference(hidden.expand(V, -1), weight, torch.arange(V), temperature, softcap)
    check_frequencies(token, exact.exp())
    torch.testing.assert_close(logprob.double(), exact[token], atol=1e-5, rtol=1e-5)


def test_a_sample_is_a_draw_with_the_uniforms_of_its_place():
    hidden, weight, _ = head_and_uniforms(33)
    rows, ids, positions = hidden.expand(50, -1), torch.arange(50), torch.arange(50) % 7
    token, logprob = linear_sample(rows, weight, 0.7, 11, ids, positions)
    again, again_logprob = linear_draw(rows, weight, 0.7, philox_uniform(11, ids, positions))
    assert torch.equal(token, again) and torch.equal(logprob, again_logprob)


def test_extreme_uniforms_stay_on_tokens_with_mass():
    """V = 33: the second group of 32 is padding but for one token; token 0 and 32 have no mass here."""
    weight = torch.zeros(33, 1)
    weight[0] = weight[32] = -1e4
    corners = torch.tensor([[a, b] for a in (0.0, 1 - 2.0**-53) for b in (0.0, 1 - 2.0**-53)], dtype=torch.float64)
    token, logprob = linear_draw(torch.ones(4, 1), weight, 1.0, corners)
    assert token.tolist() == [1, 31, 1, 31] and logprob.isfinite().all()
    weight[1:32] = -1e4
    weight[32] = 0.0
    assert linear_draw(torch.ones(4, 1), weight, 1.0, corners)[0].tolist() == [32] * 4


def test_a_draw_does_not_depend_on_the_batch_around_it():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(200, 16, generator=g), torch.randn(100, 16, generator=g)
    uniform = philox_uniform(0, torch.arange(200), torch.tensor(3))
    token, logprob = linear_draw(hidden, weight, 0.8, uniform)
    filtered = linear_draw_filtered(hidden, weight, 0.8, uniform, 20, 0.9, 0.01)
    assert not torch.equal(filtered[0], token)  # it does cut something
    for rows in (torch.arange(7), torch.randperm(200, generator=g), torch.tensor([199]), torch.arange(0, 200, 3)):
        again, again_logprob = linear_draw(hidden[rows], weight, 0.8, uniform[rows])
        assert torch.equal(again, token[rows])
        torch.testing.assert_close(again_logprob, logprob[rows], atol=1e-5, rtol=1e-5)
        again = linear_draw_filtered(hidden[rows], weight, 0.8, uniform[rows], 20, 0.9, 0.01)
        assert torch.equal(again[0], filtered[0][rows])
        torch.testing.assert_close(again[2], filtered[2][rows], atol=1e-5, rtol=1e-5)


def plain_filter(p, top_k, top_p, min_p):
    """Which tokens stay, one after the other, likeliest first (ties: lower id first)."""
    order = sorted(range(len(p)), key=lambda v: (-p[v], v))
    first = order[:top_k] if top_k else order
    total, seen, keep = sum(p[v] for v in first), 0.0, set()
    for v in first:
        if seen / total < top_p and p[v] >= min_p * p[order[0]]:
            keep.add(v)
        seen += p[v]
    return keep | {order[0]}


@pytest.mark.parametrize("V", [5, 33, 100])
@pytest.mark.parametrize("top_k, top_p, min_p", [
    (3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (4, 0.8, 0.05), (1, 1.0, 0.0),
    (0, 1e-6, 0.0), (0, 1.0, 1.0), (999, 1.0, 0.0),
])
def test_filters_agree_with_a_plain_one(V, top_k, top_p, min_p):
    hidden, weight, uniform = head_and_uniforms(V, n=5000)
    rows = hidden.expand(len(uniform), -1)
    token, logprob, kept = linear_draw_filtered(rows, weight, 0.9, uniform, top_k, top_p, min_p)
    exact, _, _ = reference(hidden.expand(V, -1), weight, torch.arange(V), 0.9)
    keep = torch.zeros(V, dtype=torch.bool)
    keep[list(plain_filter(exact.exp().tolist(), top_k, top_p, min_p))] = True
    p = exact.exp() * keep
    torch.testing.assert_close(kept.double(), p.sum().expand(len(kept)), atol=1e-5, rtol=0)
    check_frequencies(token, p / p.sum())
    torch.testing.assert_close(logprob.double(), exact[token], atol=1e-5, rtol=1e-5)  # of the uncut policy


def test_greedy_takes_the_lowest_id_among_equals():
    weight = torch.tensor([[0.0], [2.0], [2.0], [1.0]])
    token, logprob = linear_greedy(torch.tensor([[1.0], [-1.0]]), weight)
    assert token.tolist() == [1, 0]
    exact, _, _ = reference(torch.tensor([[1.0], [-1.0]]), weight, token, 1.0)
    torch.testing.assert_close(logprob.double(), exact, atol=1e-6, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------
# Products


@pytest.mark.parametrize("wide", [True, False])  # what a processor with and without AVX-512 takes
@pytest.mark.parametrize("M, N, K", [(1, 3, 5), (7, 3, 5), (64, 128, 96), (1, 1024, 600)])
def test_products_equal_plain_ones_forward_and_backward(M, N, K, wide, monkeypatch):
    monkeypatch.setattr(product, "_wide", wide)
    g = torch.Generator().manual_seed(0)
    x, weight, dy = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g), torch.randn(M, N, generator=g)
    for a, b in [(x, weight), (x.t().contiguous().t(), weight.t().contiguous().t())]:  # and transposed views
        torch.testing.assert_close(matmul_nt(a, b), x @ weight.t(), atol=1e-4, rtol=1e-4)
    results = []
    for function in (linear, F.linear):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(a.view(1, M, K), b)
        y.backward(dy.view(1, M, N))
        results.append((y, a.grad, b.grad))
    for ours, plain in zip(*results):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("wide, rows, layout", [(True, 1, "transposed"), (True, 64, "packed"), (False, 1, "transposed"),
                                                (False, 8, "packed"), (False, 64, "")])
def test_packed_copies_are_equal_and_stale_ones_are_not_used(wide, rows, layout, monkeypatch):
    monkeypatch.setattr(product, "_wide", wide)
    g = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(768, 96, generator=g))
    x = torch.randn(rows, 96, generator=g)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    assert product.best_layout(weight, rows) == layout
    with torch.no_grad(), packed_weights([weight], rows):
        assert (id(weight) in product._packed) == (product._usable and layout != "")
        for m in (rows, 1, 3):
            torch.testing.assert_close(matmul_nt(x[:1].expand(m, -1).contiguous(), weight),
                                       x[:1].expand(m, -1) @ weight.t(), atol=1e-4, rtol=1e-4)
        for update in (lambda: weight.mul_(2), lambda: weight.copy_(torch.randn(768, 96, generator=g)), optimizer.step):
            weight.grad = torch.ones_like(weight)
            before = x @ weight.t()
            update()
            assert not torch.allclose(x @ weight.t(), before, atol=1e-2)
            torch.testing.assert_close(matmul_nt(x, weight), x @ weight.t(), atol=1e-4, rtol=1e-4)
    assert not product._packed


def test_packed_copies_go_with_an_exception_and_nest():
    weight = torch.randn(768, 96)
    with pytest.raises(RuntimeError), packed_weights([weight], 8):
        with packed_weights([weight], 8):
            pass
        assert (id(weight) in product._packed) == product._usable  # the inner one did not take the outer's away
        raise RuntimeError
    assert not product._packed
