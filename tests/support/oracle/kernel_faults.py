"""Mistakes of a kernel, to put into a built engine: it is not called, or takes its tensors for what they are not.

They stand in the engine's own modules, where it finds its kernels, until the test's `patch` is undone.
"""

import pytest
import torch
from penstock.engine.llm import LLM
from torch import Tensor

from tests.support.kernel_proof import Layout, poisoned
from tests.support.kernel_registry import KERNELS
from tests.support.oracle.faults import Fault

GAP = 7.0  # no NaN, which the engine would refuse before anybody could say where it came from


def without_gaps(tensor: Tensor) -> Tensor:
    """Reads a tensor as if its rows followed each other."""
    return tensor.as_strided(tensor.shape, tensor.new_empty(tensor.shape).stride(), tensor.storage_offset())


def from_16_bytes(tensor: Tensor) -> Tensor:
    """Reads a tensor as if it started at a 16-byte boundary."""
    elements = 16 // tensor.itemsize
    return tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() // elements * elements)


def bf16_as_fp16(tensor: Tensor) -> Tensor:
    return tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor


def by_kernels(patch: pytest.MonkeyPatch, *names: str, misread=None) -> Fault:
    """Runs these kernels in passes as on a GPU, which is no fault, but not what a CPU does by itself. With `misread`
    they take every float tensor for what that makes of it."""

    def fault(llm: LLM) -> None:
        for name in names:
            kernel = KERNELS[name].kernel
            KERNELS[name].put_in(patch, _misreading(kernel, misread) if misread else kernel)

    return fault


def _misreading(kernel, misread):
    def seen(given):
        return misread(given) if isinstance(given, Tensor) and given.is_floating_point() else given

    def run(*arguments, **named):
        return kernel(*map(seen, arguments), **{name: seen(given) for name, given in named.items()})

    return run


def never_called(patch: pytest.MonkeyPatch, name: str) -> Fault:
    """Lets the engine compute the same with the kernel's reference."""
    return lambda llm: KERNELS[name].put_in(patch, KERNELS[name].reference)


def laid_out(layout: Layout) -> Fault:
    """Lays activations in memory as `layout` says."""

    def fault(llm: LLM) -> None:
        arena = llm.engine.worker.executor.arena
        cut = arena.cut

        def lay_out(plain: Tensor) -> Tensor:
            view, memory = layout.lay_out(poisoned(tuple(plain.shape), plain.dtype))
            memory.fill_(GAP)
            return view

        arena.cut = lambda *sizes: {name: lay_out(plain) for name, plain in cut(*sizes).items()}

    return fault


def together(*faults: Fault) -> Fault:
    def fault(llm: LLM) -> None:
        for each in faults:
            each(llm)

    return fault
