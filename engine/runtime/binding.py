"""Binds the current CUDA device of a thread to the engine's own wherever a caller comes in.

Streams, events, kernels and pinned memory belong to the current device, not to that of the tensors; and the caller
decides which one is current: a new thread starts with the first, and any code may have chosen another.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


def bound_to(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is the current one; on a CPU it changes nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def on_own_device(function: Callable) -> Callable:
    """A function, or a method, that runs bound to the `device` of its first argument."""

    @functools.wraps(function)
    def run(owner, *args, **kwargs):
        with bound_to(owner.device):
            return function(owner, *args, **kwargs)

    return run
