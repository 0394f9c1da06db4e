"""Marks of tests that need several ranks on GPUs, or several GPUs."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

RANKS_A_GPU = int(os.environ.get("TESTS_RANKS_A_GPU", 1))  # more under tests.support.gpu.sharing


def needs_gpus(number: int) -> pytest.MarkDecorator:
    """Skips where there are fewer GPUs than `number`."""
    return pytest.mark.skipif(torch.cuda.device_count() < number, reason=f"needs {number} CUDA devices")


def needs_ranks(number: int) -> pytest.MarkDecorator:
    """Skips where there is no GPU for so many ranks, of each its own or one that they share."""
    enough = torch.cuda.device_count() * RANKS_A_GPU >= number
    return pytest.mark.skipif(not enough, reason=f"needs {number} CUDA devices, or fewer that ranks share")


def with_marks(needs: Callable[[int], pytest.MarkDecorator], *numbers: int) -> list[Any]:
    """The parameters of a test for these numbers of ranks or GPUs."""
    return [pytest.param(number, marks=needs(number)) for number in numbers]
