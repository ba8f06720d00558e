"""Fixtures: a toy task whose answer stands in the prompt, its tokenizer, a tiny random model (see toy.py)."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels are interpreted then; read when a kernel is decorated, so first of all
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are flat modules beside this folder
torch.set_num_threads(1)  # one thread adds floats in one order, and two pools on two cores only fight

from toy import ToyTask, tiny_model  # noqa: E402


@pytest.fixture
def task():
    return ToyTask()


@pytest.fixture
def tokenizer(task):
    return task.tokenizer()


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def matmul_precision():
    """What a test sets through infra.runs.setup ("high" on a GPU) ends with it."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
