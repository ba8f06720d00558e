"""docs/scale.md is what bench/scale.py prints, and its arithmetic is the code's."""

from pathlib import Path

import torch

from bench.scale import GIB, SHAPES, Config, Shape, memory, tables
from model import Config as ModelConfig
from model import KVCache, Transformer

ROOT = Path(__file__).parent.parent


def test_weights_and_cache_are_those_of_the_model():
    for tied in (True, False):
        shape = Shape("toy", 3, 16, 40, 4, 2, 8, 50, tied)
        cfg = ModelConfig(vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied)
        assert shape.weights() == sum(p.numel() for p in Transformer(cfg).parameters() if p.dim() == 2)  # without the norms
        cache = KVCache(cfg, 5, 7, "cpu", torch.bfloat16)
        assert 5 * 7 * shape.cache() == cache.k.nbytes + cache.v.nbytes


def test_published_sizes():
    assert [round(s.weights() / 1e9, 2) for s in SHAPES] == [1.24, 8.03, 70.55]


def test_memory_shrinks_with_processes_but_not_the_copy_that_generates():
    one, eight = (memory(SHAPES[1], Config(), n) for n in (1, 8))
    assert eight["state"] == one["state"] / 8 and one["generator"] == 0 and eight["generator"] * 1e9 == 2 * SHAPES[1].weights()
    assert GIB == 2**30


def test_the_page_is_up_to_date():
    assert tables(Config()) in (ROOT / "docs/scale.md").read_text()
