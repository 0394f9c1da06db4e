"""Tensors by name as views of a group's span, wherever it lies: resident, in a ring slot, or in the host arena."""

import torch
from penstock.engine.model.group_layout import GroupLayout, Weight
from torch import Tensor

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def byte_range(memory: Tensor, offset: int, nbytes: int) -> Tensor:
    """A view of `nbytes` bytes of `memory` (uint8, 1-D) from `offset`. Asserts that they are all there: a slice past
    the end would be shorter without a word, and a kernel that counts on its length would read on."""
    assert 0 <= offset <= offset + nbytes <= len(memory), (offset, nbytes, len(memory))
    return memory[offset : offset + nbytes]


def view_of(weight: Weight, span: Tensor) -> Tensor:
    """A view of a weight in the span of its group."""
    part = weight.parts[0]
    return byte_range(span, part.offset, part.nbytes).view(TORCH_DTYPES[part.dtype]).view(part.shape)


def views(layout: GroupLayout, span: Tensor) -> dict[str, Tensor]:
    """Views by name of the weights in `span`, uint8 (layout.nbytes,) or longer, with their dtypes and shapes."""
    return {weight.name: view_of(weight, span) for weight in layout.weights}
