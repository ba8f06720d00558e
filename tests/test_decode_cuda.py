"""The GPU's decode loop, run on the CPU without graphs: the same completions as the plain loop."""

import gc
import itertools
import os
import weakref

import pytest
import torch
from test_sample import OPTIONS, ragged_prompts, same
from toy import EOS, tiny_model

import sample
from engines import cuda as decode_cuda
from infra.cli import UserError
from model import KVCache, Transformer
from open_weights.families import FAMILIES, Config

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("check_every", [1, 3, 8])
@pytest.mark.parametrize("slots", [1, 7, 64])
def test_the_loop_that_never_waits_gives_the_plain_loops_completions(model, slots, check_every, monkeypatch):
    """Ragged prompts and limits, more prompts than rows: rows end between two looks, rest, leave and are replaced."""
    monkeypatch.setattr(decode_cuda, "CHECK_EVERY", check_every)
    prompts = ragged_prompts()
    options = OPTIONS | dict(max_new_tokens=[1 + (5 * i) % 13 for i in range(len(prompts))])
    plain = sample.generate(model, prompts, slots=slots, **options)
    ours = decode_cuda.decode_all(model, prompts, slots=slots, **options)
    assert torch.equal(ours.tokens, plain.tokens) and torch.equal(ours.length, plain.length)
    assert ours.finish_reason == plain.finish_reason and set(ours.finish_reason) == {"stop", "length"}
    torch.testing.assert_close(ours.logprob, plain.logprob, atol=1e-5, rtol=1e-5)
    assert (ours.logprob[~ours.mask()] == 0).all()


@pytest.mark.parametrize("change", [dict(temperature=0), dict(top_k=2), dict(top_p=0.6, min_p=0.1), dict(stop_ids=[]),
                                    dict(sequence_ids=range(100, 140)), dict(max_new_tokens=99)])
def test_and_so_with_every_option(model, change):
    prompts = ragged_prompts()
    plain = sample.generate(model, prompts, slots=9, **(OPTIONS | change))
    ours = decode_cuda.decode_all(model, prompts, slots=9, **(OPTIONS | change))
    for i in range(len(prompts)):
        same(ours, i, plain, i)


def test_bad_input_is_refused_and_none_is_none(model):
    with pytest.raises(UserError, match="prompt 1 has 0 tokens"):
        decode_cuda.decode_all(model, [[1], []], **OPTIONS)
    assert len(decode_cuda.decode_all(model, [], **OPTIONS)) == 0


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_decode_step_is_model_decode(family):
    """In every family, weights, norms and biases random; Gemma's windows and caps bite."""
    own = dict(query_pre_attn_scalar=8, attn_logit_softcapping=0.5, final_logit_softcapping=3.0, sliding_window=4,
               layer_types=["sliding_attention", "full_attention"]) if FAMILIES[family].gemma else {}  # fmt: skip
    model = Transformer(Config(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                               num_key_value_heads=2, head_dim=4, max_position_embeddings=32, model_type=family, **own))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.normal_(0.5 if p.dim() == 1 else 0.0, 0.5, generator=generator)
    tokens, rows = torch.randint(10, (3, 9), generator=generator), torch.arange(3)
    caches = [KVCache(model.cfg, 4, 16, "cpu", torch.float32) for _ in range(2)]
    for cache in caches:
        model.prefill(tokens, cache, rows)
    length = torch.tensor([9, 4, 1])
    a = model.decode(tokens[:, 0], caches[0], length, 9)
    b = decode_cuda.decode_step(model, tokens[:, 0], caches[1], length)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(caches[0].k, caches[1].k, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(caches[0].v, caches[1].v, atol=1e-5, rtol=1e-5)
    model.layers[1].mlp_norm.weight.add_(1.0)  # and the comparison can fail
    assert not torch.allclose(decode_cuda.decode_step(model, tokens[:, 0], caches[1], length), a, atol=1e-3)


@torch.no_grad()
def test_a_step_stays_on_the_device_and_resting_rows_stand_still(model):
    """A step must not ask the device for a number: on the meta device, where there are none, it still runs. Rows that
    have ended keep their tokens, length and flags whatever the others do."""
    meta = tiny_model().to("meta")
    cache, slots = KVCache(meta.cfg, 4, 16, "meta", torch.float32), decode_cuda.empty_slots(meta, 4, 16, 5)
    decode_cuda.step(meta, cache, slots, torch.zeros(12, dtype=torch.bool, device="meta"), 4, drawn_on("meta"))

    cache, slots = KVCache(model.cfg, 4, 16, "cpu", torch.float32), decode_cuda.empty_slots(model, 4, 16, 5)
    slots.length[:], slots.first[:], slots.limit[:] = torch.tensor([3, 3, 8, 0]), 3, torch.tensor([8, 5, 8, 0])
    slots.running[:2] = True
    stops = torch.zeros(12, dtype=torch.bool)
    stops[EOS] = True
    for _ in range(4):
        decode_cuda.step(model, cache, slots, stops, 4, drawn_on("cpu", [7, 8, 9, EOS]))
    assert slots.length.tolist() == [7, 5, 8, 0] and slots.running.tolist() == [True, False, False, False]
    assert slots.tokens[:, :8].tolist() == [[0, 0, 0, 7, 7, 7, 7, 0], [0, 0, 0, 8, 8, 0, 0, 0], [0] * 8, [0] * 8]
    assert not slots.stopped.any()
    decode_cuda.step(model, cache, slots, stops, 4, drawn_on("cpu", [EOS, EOS, EOS, EOS]))
    assert slots.stopped.tolist() == [True, False, False, False] and not slots.running.any()


def drawn_on(device, tokens=(1, 2, 3, 4)):
    """A draw that gives row i the token tokens[i]."""
    tokens = torch.tensor(tokens, device=device)
    return lambda hidden, uniform: (tokens[: len(hidden)], torch.zeros(len(hidden), device=device))


@pytest.fixture
def recorded_graphs(monkeypatch):
    """CUDA's graphs replaced by a recorder; a replay does what was recorded. -> the log."""
    log = []

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            log.append("replay")

    class Record:
        def __init__(self, graph, pool):
            log.append(("record", pool))

        def __enter__(self):
            log.append("{")

        def __exit__(self, *_):
            log.append("}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Record)
    return log


def test_graphs_record_the_second_run_of_a_size_and_replay_from_then_on(recorded_graphs):
    """Every run advances exactly once."""
    log = recorded_graphs
    graphs = decode_cuda.Graphs(lambda n: log.append(n), torch.device("cuda"))
    for n in (4, 4, 4, 2, 2, 4):
        graphs.run(n)
    recorded = lambda n, pool: [("record", pool), "{", n, "}", "replay"]  # noqa: E731
    assert log == [4, *recorded(4, None), "replay", 2, *recorded(2, "pool"), "replay"]


def test_an_engine_is_kept_between_calls_and_gives_what_a_new_one_gives(model):
    """RL: the same model, other prompts, seeds, stop ids, samplers and weights, call after call; cache and state stay."""
    prompts, calls = ragged_prompts(), []
    for change in (dict(), dict(seed=9), dict(temperature=0), dict(stop_ids=[]), dict(max_new_tokens=5), dict()):
        ours = decode_cuda.decode_all(model, prompts, slots=9, **(OPTIONS | change))
        calls.append((decode_cuda._engines[model], decode_cuda._engines[model].cache.k.data_ptr()))
        plain = sample.generate(model, prompts, slots=9, **(OPTIONS | change))
        for i in range(len(prompts)):
            same(ours, i, plain, i)
        with torch.no_grad():
            model.embed.weight.mul_(1.01)  # an optimizer's step: in place
    assert len(set(calls)) == 1
    decode_cuda.release(model)
    assert model not in decode_cuda._engines


def test_what_makes_a_new_engine(model):
    def engine(rows=4, T=model.cfg.max_position_embeddings - 1, draws=5):
        return decode_cuda.engine_for(model, rows, T, draws)

    first = engine()
    assert engine() is first is engine(rows=2, T=7) and (first.T, first.longest_draw) == (model.cfg.max_position_embeddings, 128)
    larger = engine(rows=8)
    assert larger is not first and (larger.rows, larger.T) == (8, first.T) and engine() is larger
    model.embed.weight.data = model.embed.weight.data.clone()  # loaded anew: the graphs' addresses are stale
    moved = engine()
    assert moved is not larger and moved.rows == 8


def test_an_engine_holds_no_model_and_survives_a_call_that_breaks_off(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(decode_cuda, "prefill", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode_cuda.decode_all(model, [[1, 2]], **OPTIONS)
    monkeypatch.undo()
    engine = decode_cuda._engines[model]
    assert engine.graphs.step is None
    ours, plain = decode_cuda.decode_all(model, [[4]], **OPTIONS), sample.generate(model, [[4]], **OPTIONS)
    same(ours, 0, plain, 0)
    gone = weakref.ref(model)
    del model, engine
    gc.collect()
    assert gone() is None


def test_a_large_cache_is_given_back(model, monkeypatch):
    monkeypatch.setattr(decode_cuda, "too_large_to_keep", lambda engine: True)
    decode_cuda.decode_all(model, [[1, 2]], **OPTIONS)
    assert model not in decode_cuda._engines


def test_a_recorded_graph_is_replayed_in_the_next_call(model, recorded_graphs):
    """One recording for a batch size and a sampler, however many calls; each call brings its own closure over the same memory."""
    log, graphs = [], decode_cuda.Graphs(None, torch.device("cuda"))
    for temperature in (1.0, 1.0, 0.7, 1.0):
        graphs.step = lambda *key: log.append(key)
        graphs.run(4, temperature, 0, 1.0, 0.0)
    assert log == [(4, 1.0, 0, 1.0, 0.0)] * 2 + [(4, 0.7, 0, 1.0, 0.0)]
    assert recorded_graphs.count("replay") == 2 and recorded_graphs.count("{") == 1


def test_rows_of_a_graph():
    assert [decode_cuda.rows_of_graph(n) for n in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128]


def test_the_whole_loop_through_the_triton_kernels(monkeypatch):
    """Each kernel is tested alone in test_decode_kernels.py; here they follow each other, on the interpreter."""
    pytest.importorskip("triton", reason="triton has no wheel for this machine")
    from kernels import attention_triton, layer_triton, sampling_triton

    calls = itertools.count()
    for module in (attention_triton, layer_triton, sampling_triton):
        for name in ("decode_attention", "add_rmsnorm", "rope_write", "swiglu", "linear_draw", "philox_uniform"):
            if hasattr(module, name):
                for user in (decode_cuda, sample):
                    if hasattr(user, name):
                        kernel = getattr(module, name)
                        monkeypatch.setattr(user, name, lambda *a, kernel=kernel, **k: (next(calls), kernel(*a, **k))[1])
    model, prompts = tiny_model().to(DEVICE), [[1, 2, 3], [4], [5, 6]]
    ours = decode_cuda.decode_all(model, prompts, slots=2, **(OPTIONS | dict(max_new_tokens=4)))
    assert next(calls) > 100
    monkeypatch.undo()
    plain = sample.generate(tiny_model(), prompts, **(OPTIONS | dict(max_new_tokens=4)))
    for i in range(3):
        same(ours, i, plain, i)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_completions_are_the_cpus():
    prompts = ragged_prompts()
    plain = sample.generate(tiny_model(), prompts, slots=9, **OPTIONS)
    ours = sample.generate(tiny_model().cuda(), prompts, slots=9, **OPTIONS)
    for i in range(len(prompts)):
        same(ours, i, plain, i)
