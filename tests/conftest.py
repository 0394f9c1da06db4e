"""Tests marked gpu are skipped, with the reason, where there is no CUDA device."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; tests share two cores with their ranks

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on CPU tensors


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
