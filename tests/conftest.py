"""Tests marked gpu are skipped, with the reason, where there is no CUDA device."""

import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it; tests share two cores with their ranks
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on CPU tensors


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
