"""Notes on a CPU what a pass would launch on a GPU: kernels of ours, and the operations of torch between them."""

from functools import partial
from typing import Any

import pytest
import torch
from penstock.engine.kernels import linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.kernel_registry import KERNELS, EngineKernel


class Launches(TorchDispatchMode):
    """Notes in `found` what is launched inside: by name, with the shapes and types of tensors, and what else it gets.
    Copies between tensors of one type are not noted: they need no kernel. Kernels run by their references; a linear
    that has none is torch's."""

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__()
        self.found: set[tuple] = set()
        self.is_inside = False  # a kernel, where its reference calls torch
        for name, kernel in KERNELS.items():
            if kernel.names:
                kernel.put_in(patch, partial(self._run, name, kernel))

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_copy = function is torch.ops.aten.copy_.default and args[0].dtype == args[1].dtype
        if not (self.is_inside or is_copy or function.is_view):
            self._note(str(function), args, tuple((kwargs or {}).items()))
        return function(*args, **(kwargs or {}))

    def _run(self, name: str, kernel: EngineKernel, *args: Any, **named: Any) -> Any:
        if name == "linear" and not linear.has_kernel(args[0]):
            return kernel.reference(*args, **named)
        self._note(name, args, tuple(named.items()))
        self.is_inside = True
        result = kernel.reference(*args, **named)
        self.is_inside = False
        return result

    def _note(self, name: str, *arguments: Any) -> None:
        self.found.add((name, *map(_form, arguments)))


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(map(_form, value))
    return value if isinstance(value, (str, int, float, type(None))) else type(value)
