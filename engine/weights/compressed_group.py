"""Compresses a group without loss: the blobs of its weights (codec.py), one after the other. Raw weights lie among them
too, so that a group is moved by one copy, compressed or not, and decompressed into a span like any other."""

from collections.abc import Callable

import torch
from penstock.engine.model.compressed_size import PART_BYTES
from penstock.engine.model.group_layout import ALIGN, GroupLayout
from penstock.engine.model.shard import pad_to
from penstock.engine.weights.codec import compress
from penstock.engine.weights.kept_group import KeptGroup, KeptRows, KeptWeight, Lossless
from penstock.engine.weights.views import views
from torch import Tensor


def compress_group(
    layout: GroupLayout, span: Tensor, num_threads: int = 1, progress: Callable[[int], None] | None = None
) -> tuple[KeptGroup, Tensor]:
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
        rows = KeptRows(Lossless(compressed), 0, weight.num_rows, end, compressed.nbytes)
        weights.append(KeptWeight(weight, (rows,)))
        end = pad_to(end + len(blob), PART_BYTES)
        if progress:
            progress(weight.parts[0].nbytes)
    group = KeptGroup(tuple(weights), pad_to(end, ALIGN))
    memory[end : group.nbytes].zero_()
    return group, memory[: group.nbytes]
