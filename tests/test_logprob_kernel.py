"""The Triton log-prob kernels against float64: on the GPU where there is one, else interpreted."""

import os

import pytest
import torch
from test_kernels import (
    both_gradients,
    check_against_reference,
    check_logits_of_ten_thousand,
    check_loss_against_reference,
)
from test_kernels import reference as exact_logprob

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before the imports below
pytest.importorskip("triton", reason="triton has no wheel for this machine")

from kernels import common_triton, logprob_triton, sampling_triton  # noqa: E402
from kernels.logprob_triton import linear_logprob, linear_logprob_loss  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 3), (1, 33, 7), (5, 2, 1), (70, 150, 40), (0, 33, 4)]  # rows, tokens, width: never whole tiles
OPTIONS = [dict(temperature=0.1), dict(temperature=1.0), dict(temperature=5.0), dict(temperature=0.7, softcap=3.0)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("N, V, D", SHAPES)
def test_logprob_and_both_gradients(N, V, D, options, monkeypatch):
    monkeypatch.setattr(logprob_triton, "CHUNK_BYTES", 1)  # 128 tokens at once
    check_against_reference(N, V, D, linear_logprob, device=DEVICE, tolerance=5e-5, **options)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("N, V, D", SHAPES)
def test_the_loss_and_both_gradients(N, V, D, options, entropy):
    check_loss_against_reference(N, V, D, linear_logprob_loss, entropy=entropy, device=DEVICE, tolerance=5e-5, **options)


def test_a_softcap_and_probabilities_too_small_to_keep():
    check_loss_against_reference(9, 40, 8, linear_logprob_loss, device=DEVICE, scale=20.0, temperature=0.1, softcap=30.0,
                                 tolerance=2e-4)
    check_loss_against_reference(9, 40, 8, linear_logprob_loss, dtype=torch.bfloat16, device=DEVICE, scale=20.0,
                                 temperature=0.1, softcap=30.0, tolerance=2e-4)


def test_the_loss_in_several_chunks(monkeypatch):
    monkeypatch.setattr(logprob_triton, "CHUNK_BYTES", 1)  # 128 rows at once
    check_loss_against_reference(130, 9, 5, linear_logprob_loss, device=DEVICE, temperature=0.7)


@pytest.mark.parametrize("options", [dict(temperature=0.7), dict(temperature=1.0, softcap=3.0)], ids=str)
@pytest.mark.parametrize("N, V, D", [(1, 1, 3), (9, 140, 72)])
def test_bfloat16_products_are_summed_in_float32(N, V, D, options):
    bf16 = dict(dtype=torch.bfloat16, device=DEVICE)
    check_against_reference(N, V, D, linear_logprob, **bf16, **options)
    check_loss_against_reference(N, V, D, linear_logprob_loss, **bf16, **options)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_logits_of_ten_thousand(temperature):
    check_logits_of_ten_thousand(linear_logprob, temperature, DEVICE)
    check_logits_of_ten_thousand(loss_as_logprob, temperature, DEVICE)


def loss_as_logprob(hidden, weight, target, temperature):
    """linear_logprob by the other function: coefficients 1 of log-prob and entropy, 1 of logsumexp from the first."""
    loss, logprob, entropy = linear_logprob_loss(hidden, weight, target, temperature, lambda lp, h: lp.sum() + h.sum())
    _, logsumexp, _ = linear_logprob(hidden, weight, target, temperature)
    return logprob + (loss - loss.detach()) / len(target), logsumexp, entropy


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU that is here decides")
@pytest.mark.parametrize("narrow", [0, 1024])
def test_what_hopper_would_be_given(narrow, monkeypatch):
    """Its tiles, and descriptors for its copy engine, interpreted."""
    monkeypatch.setattr(common_triton, "generation", lambda x: 9)
    monkeypatch.setattr(logprob_triton, "NARROW", narrow)
    for dtype in (torch.bfloat16, torch.float32):
        check_against_reference(9, 300, 72, linear_logprob, dtype=dtype, temperature=0.7)
        check_loss_against_reference(9, 300, 71, linear_logprob_loss, dtype=dtype, temperature=0.7, tolerance=5e-5)
        check_loss_against_reference(9, 300, 71, linear_logprob_loss, dtype=dtype, temperature=0.7, softcap=3.0, tolerance=5e-5)


def test_the_persistent_form_gives_the_same_bits(monkeypatch):
    """Programs that go from tile to tile, here two of them with six tiles, against one program a tile."""
    monkeypatch.setattr(common_triton, "generation", lambda x: 9)
    monkeypatch.setattr(logprob_triton, "multiprocessors", lambda x: 2)
    hidden, weight, target = example(9, 1300, 72, torch.bfloat16)
    assert logprob_triton.tile_for(weight) is not logprob_triton.PERSISTENT  # narrow
    for softcap in (None, 3.0):
        one = logprob_triton.tile_statistics(hidden, weight, target, 0.7, softcap, tile=logprob_triton.TILES["wide"])
        two = logprob_triton.tile_statistics(hidden, weight, target, 0.7, softcap, tile=logprob_triton.PERSISTENT)
        assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_which_tile_is_taken(monkeypatch):
    """By generation, D, and what is wanted; never by the number of rows."""
    def tile(generation, D, *purpose, dtype=torch.bfloat16, specialise=True):
        monkeypatch.setattr(common_triton, "generation", lambda x: generation)
        monkeypatch.setattr(logprob_triton, "WARPS_SPECIALISE", specialise)
        return logprob_triton.tile_for(torch.empty(1, D, dtype=dtype), *purpose)

    tiles = logprob_triton.TILES
    assert tile(9, 4096) is tile(9, 2048) is logprob_triton.PERSISTENT
    assert tile(9, 4096, "store") is tile(9, 1536) is tile(10, 4096) is tile(9, 4096, specialise=False) is tiles["wide"]
    assert tile(9, 576) is tile(9, 576, "store") is tiles["narrow"] and tile(9, 576, "gradient") is tiles["gradient"]
    assert tile(8, 4096) is tile(12, 576) is tiles["plain"] and tile(9, 4096, dtype=torch.float32) is tiles["float32"]


def example(N=70, V=300, D=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g).to(DEVICE, dtype), torch.randn(V, D, generator=g).to(DEVICE, dtype)
    return hidden, weight, torch.randint(V, (N,), generator=g).to(DEVICE)


def test_a_row_knows_nothing_of_the_others():
    """Bits, not only digits: the same row in any batch and at any place of it."""
    hidden, weight, target = example()
    whole = linear_logprob(hidden, weight, target, 0.8)
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for rows in (order, order[:1], order[:65]):
        again = linear_logprob(hidden[rows], weight, target[rows], 0.8)
        for a, b in zip(whole, again):
            if DEVICE == "cuda":
                assert torch.equal(a[rows], b)
            else:
                torch.testing.assert_close(a[rows], b, atol=2e-6, rtol=2e-6)  # numpy's products differ by shape
    assert torch.equal(linear_logprob(hidden, weight, target, 0.8)[0], whole[0])


def test_another_tile_gives_the_same_numbers():
    """The products bit for bit on a GPU (the sums along D do not know the tile); sums over tokens to rounding."""
    hidden, weight, target = example(dtype=torch.bfloat16)
    whole = logprob_triton.tile_statistics(hidden, weight, target, 0.8)
    for tile in [(64, 128, 64, dict(num_warps=4)), (128, 64, 64, dict(num_warps=4)), (64, 32, 64, dict(num_warps=4))]:
        other = logprob_triton.tile_statistics(hidden, weight, target, 0.8, tile=tile)
        if DEVICE == "cuda":
            assert torch.equal(whole[1], other[1])
        for a, b in zip(logprob_triton.combine(*whole), logprob_triton.combine(*other)):
            torch.testing.assert_close(a, b, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_and_the_trainer_agree(dtype):
    hidden, weight, _ = example(9, dtype=dtype)
    uniform = torch.rand(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for softcap in (None, 4.0):
        token, sampled = sampling_triton.linear_draw(hidden, weight, 0.7, uniform, softcap)
        trained, _, _ = linear_logprob(hidden, weight, token, 0.7, softcap)
        torch.testing.assert_close(sampled, trained, atol=5e-6, rtol=5e-6)


def test_both_ways_to_a_gradient_agree_and_need_little_memory():
    """SmolLM2's head where there is a GPU to do it."""
    cuda = DEVICE == "cuda"
    N, V, D = (4099, 49152, 576) if cuda else (67, 300, 40)
    hidden, weight, target = example(N, V, D, torch.bfloat16)
    weight *= D**-0.5
    before, a = 0, torch.randn(N, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    whole = linear_logprob(hidden, weight, target, 0.8)
    assert not cuda or torch.cuda.max_memory_allocated() - before < N * V  # bytes; a tenth of that, really
    for ours, exact in zip(whole, exact_logprob(hidden[-50:], weight, target[-50:], 0.8)):
        torch.testing.assert_close(ours[-50:].double(), exact, atol=2e-5, rtol=1e-5)
    for n in (1, 50, 1000):
        assert not cuda or all(torch.equal(x[-n:], y) for x, y in
                               zip(whole, linear_logprob(hidden[-n:], weight, target[-n:], 0.8)))
    one, two = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    logprob, _, entropy = linear_logprob(*one, target, 0.8)
    (a * logprob + 0.1 * entropy).sum().backward()
    loss, *_ = linear_logprob_loss(*two, target, 0.8, lambda lp, h, a: (a * lp + 0.1 * h).sum(), a)
    loss.backward()
    for x, y in zip(one, two):
        assert float((x.grad.double() - y.grad.double()).norm() / x.grad.double().norm()) < 0.01


def test_log_probs_are_never_positive_and_certainty_is_zero():
    weight = torch.zeros(130, 1, device=DEVICE)
    weight[129] = 1e4
    logprob, _, entropy = linear_logprob(torch.ones(2, 1, device=DEVICE), weight, torch.tensor([129, 0], device=DEVICE), 1.0)
    assert float(logprob[0]) == 0.0 and float(logprob[1]) == -1e4 and entropy.tolist() == [0.0, 0.0]


def test_rows_without_a_gradient_cost_no_products(monkeypatch):
    hidden, weight, target = example(9)
    rows, original = [], logprob_triton.d_logits
    monkeypatch.setattr(logprob_triton, "d_logits", lambda h, *rest, **kw: (rows.append(len(h)), original(h, *rest, **kw)))
    coefficients = torch.zeros(3, 9, device=DEVICE)
    _, d_hidden, d_weight = both_gradients(linear_logprob, hidden, weight, target, coefficients, temperature=1.0)
    assert not rows and not d_hidden.any() and not d_weight.any()
    coefficients[0, 4] = 1.0
    both_gradients(linear_logprob, hidden, weight, target, coefficients, temperature=1.0)
    assert rows == [1]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_no_product(frozen, monkeypatch):
    """A head that is not trained needs no V x D gradient (and hidden states of a frozen model none of theirs)."""
    hidden, weight, target = example(9)
    free = weight if frozen == "hidden" else hidden
    calls, original = [], logprob_triton.product
    monkeypatch.setattr(logprob_triton, "product", lambda a, b: (calls.append(a.shape), original(a, b))[1])
    for loss in (lambda: linear_logprob_loss(hidden, weight, target, 1.0, lambda lp, h: lp.sum())[0],
                 lambda: linear_logprob(hidden, weight, target, 1.0)[0].sum()):
        hidden.requires_grad_(), weight.requires_grad_()
        expected = torch.autograd.grad(loss(), free)[0]
        (hidden if frozen == "hidden" else weight).requires_grad_(False)
        calls.clear()
        assert torch.equal(torch.autograd.grad(loss(), free)[0], expected) and len(calls) == 1


def test_an_entropy_that_nobody_asked_for_is_not_made(monkeypatch):
    hidden, weight, target = example(9)
    hidden.requires_grad_()
    asked, original = [], logprob_triton.logits_to_gradient
    monkeypatch.setattr(logprob_triton, "logits_to_gradient", lambda *a: (asked.append(a[8]), original(*a)))
    for loss in (lambda lp, h: lp.sum(), lambda lp, h: (lp + 0.0 * h).sum(), lambda lp, h: (lp + 0.1 * h).sum()):
        linear_logprob_loss(hidden, weight, target, 1.0, loss)
    assert asked == [False, False, True]


def test_a_second_derivative_is_refused():
    """The kernels' backward is no graph of its own: without this the second derivative would silently be 0."""
    hidden, weight, target = example(3)
    hidden.requires_grad_()
    for loss in (linear_logprob(hidden, weight, target, 1.0)[0].sum(),
                 linear_logprob_loss(hidden, weight, target, 1.0, lambda lp, h: lp.sum())[0]):
        with pytest.raises(RuntimeError, match="differentiated again"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_without_gradients_only_the_numbers_are_kept():
    hidden, weight, target = example(9)
    logprob, logsumexp, entropy = linear_logprob(hidden, weight.requires_grad_(), target, 1.0)
    assert logprob.requires_grad
    with torch.no_grad():
        again = linear_logprob(hidden, weight, target, 1.0)
        loss, *books = linear_logprob_loss(hidden, weight, target, 1.0, lambda lp, h: lp.sum())
    assert all(torch.equal(a, b) and b.grad_fn is None for a, b in zip((logprob, logsumexp, entropy), again))
    assert torch.equal(books[0], again[0]) and torch.equal(books[1], again[2]) and not loss.requires_grad
    exact, _, _ = exact_logprob(hidden, weight.detach(), target, 1.0)
    torch.testing.assert_close(loss.double(), exact.sum(), atol=1e-3, rtol=1e-6)


def test_what_is_refused():
    hidden, weight, target = example(3)
    with pytest.raises(ValueError, match="one dtype"):
        linear_logprob(hidden.bfloat16(), weight, target, 1.0)
    with pytest.raises(ValueError, match="float16"):
        linear_logprob(hidden.half(), weight.half(), target, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob_loss(hidden, weight, target, 0.0, lambda lp, h: lp.sum())
    assert linear_logprob(hidden, weight, torch.full_like(target, 300), 1.0)[0].isnan().all()  # outside the vocabulary
