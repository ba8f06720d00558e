"""Randomness as a function of (seed, purpose, step): there is no generator state to save, so a resumed run draws what the
uninterrupted one draws, and one purpose never moves another."""

import functools
import hashlib
import json
import random

import torch


def derive(seed, *purpose):
    """A 63-bit seed for one purpose: derive(0, "rollouts", 17). Other purposes do not move it."""
    text = json.dumps([seed, *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed, *purpose):
    """torch.Generator of one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def shuffled(n, seed, *purpose):
    """A permutation of range(n), the same on every machine."""
    order = list(range(n))
    random.Random(derive(seed, *purpose)).shuffle(order)
    return order


@functools.lru_cache(maxsize=4)
def _epoch_order(n, seed, purpose, epoch):
    return shuffled(n, seed, *purpose, epoch)


def batch_indices(n, size, step, seed, *purpose):
    """Which of n examples the 1-based step takes: every epoch in an order of its own, epochs joined without a gap.

    The order of an epoch is drawn once, not once an example (a shuffle of 100,000 takes as long as a tiny RL step).
    """
    positions = range((step - 1) * size, step * size)
    return [_epoch_order(n, seed, purpose, i // n)[i % n] for i in positions]
