"""A group's weights as one blob: the blobs of its weights (codec.py), one after the other. Raw weights lie in it too,
so that a group is moved by one copy, compressed or not, and decompressed into a span like any other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from penstock.engine.model.compressed_size import PART_BYTES
from penstock.engine.model.group_layout import ALIGN, GroupLayout
from penstock.engine.model.shard import pad_to
from penstock.engine.weights.codec import CompressedLayout, compress, decompress
from penstock.engine.weights.views import byte_range, views
from torch import Tensor


@dataclass(frozen=True)
class CompressedWeight:
    """Holds where a compressed weight lies. `offset` is its first byte in the span, `blob_offset` the first byte of
    its blob in the group's blob."""

    layout: CompressedLayout
    offset: int
    blob_offset: int


@dataclass(frozen=True)
class CompressedGroup:
    """Holds how a group's span is compressed; `nbytes` is the length of its blob, a multiple of ALIGN and never
    more than the span's."""

    weights: tuple[CompressedWeight, ...]
    nbytes: int

    def restore(self, blob: Tensor, span: Tensor, num_tokens: int) -> int:
        """Decompresses the group for a pass of any number of tokens; returns the bytes of the span."""
        decompress_group(self, blob, span)
        return span.nbytes


def compress_group(
    layout: GroupLayout, span: Tensor, num_threads: int = 1, progress: Callable[[int], None] | None = None
) -> tuple[CompressedGroup, Tensor]:
    """Compresses a span (uint8, on any device, layout.nbytes long) to a blob on its device; on a CPU by `num_threads`.

    The blob is the start of memory as long as the span; a caller that wants to keep no more copies it. `progress` is
    called with the bytes of each weight when it is compressed.
    """
    assert not any("norm" in weight.name for weight in layout.weights[-1:]), "kernels read norms before they wait"
    memory = torch.empty_like(span)
    weights, end = [], 0
    named = views(layout, span)
    for weight in layout.weights:
        compressed, blob = compress(named[weight.name], memory[end:], num_threads)
        weights.append(CompressedWeight(compressed, weight.parts[0].offset, end))
        end = pad_to(end + len(blob), PART_BYTES)
        if progress:
            progress(weight.parts[0].nbytes)
    group = CompressedGroup(tuple(weights), pad_to(end, ALIGN))
    memory[end : group.nbytes].zero_()
    return group, memory[: group.nbytes]


def decompress_group(group: CompressedGroup, blob: Tensor, span: Tensor) -> None:
    """Decompresses every weight, bit for bit, to its offset in an uncompressed span (uint8) on the blob's device; the
    gaps between weights are not written. Both start at 256-byte boundaries, and may be longer. A weight takes one
    kernel, or one device copy if it is raw, or both if it does not end with a tile; nothing is allocated and the host
    waits for nothing, so that a CUDA graph can hold it (once the kernel has been compiled by a call)."""
    for weight in group.weights:
        layout = weight.layout
        out = (
            byte_range(span, weight.offset, layout.numel * layout.dtype.itemsize).view(layout.dtype).view(layout.shape)
        )
        decompress(layout, byte_range(blob, weight.blob_offset, layout.nbytes), out)
