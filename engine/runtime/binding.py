"""The current CUDA device of a thread, bound to an engine's own wherever a caller comes in.

Streams, events, kernels and pinned memory belong to the current device, not to that of the tensors; and which one is
current is the caller's affair: another thread starts with the first, and anybody may have chosen a second.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


def bound_to(device: torch.device) -> AbstractContextManager:
    """Within, `device` is the current one; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def on_own_device(function: Callable) -> Callable:
    """A function, or a method, that runs bound to the `device` of its first argument."""

    @functools.wraps(function)
    def run(owner, *args, **kwargs):
        with bound_to(owner.device):
            return function(owner, *args, **kwargs)

    return run
