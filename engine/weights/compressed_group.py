"""Compresses a group without loss: the blobs of its rows (codec.py), one after the other. Rows that are raw or
quantised lie among them as they are, so that a group is moved by one copy, compressed or not."""

from collections.abc import Callable

import torch
from penstock.engine.model.compressed_size import PART_BYTES
from penstock.engine.model.group_layout import ALIGN, GroupLayout, Rows, Weight
from penstock.engine.model.shard import pad_to
from penstock.engine.weights.codec import compress
from penstock.engine.weights.kept_group import KeptGroup, KeptRows, KeptWeight, Lossless, stored_rows
from penstock.engine.weights.views import TORCH_DTYPES, byte_range
from torch import Tensor


def compress_group(
    layout: GroupLayout, stored: Tensor, num_threads: int = 1, progress: Callable[[int], None] | None = None
) -> tuple[KeptGroup, Tensor]:
    """Compresses what is stored of a group (uint8, on any device, layout.stored_bytes long) to a blob on its device; on
    a CPU by `num_threads`.

    The blob is the start of memory as long as what is stored; a caller that wants to keep no more copies it. `progress`
    is called with the bytes of rows when they are compressed.
    """
    assert not any("norm" in weight.name for weight in layout.weights[-1:]), "kernels read norms before they wait"
    memory = torch.empty_like(stored)
    weights, end = [], 0
    for weight in layout.weights:
        kept = []
        for rows in layout.rows_of(weight.name):
            kept.append(_keep(weight, rows, stored, memory, end, num_threads))
            end = pad_to(end + kept[-1].nbytes, PART_BYTES)
            if progress:
                progress(rows.nbytes)
        weights.append(KeptWeight(weight, tuple(kept)))
    group = KeptGroup(tuple(weights), pad_to(end, ALIGN))
    memory[end : group.nbytes].zero_()
    return group, memory[: group.nbytes]


def _keep(weight: Weight, rows: Rows, stored: Tensor, memory: Tensor, start: int, num_threads: int) -> KeptRows:
    """Writes rows to memory from `start` on, compressed if they are floats; what pads them to PART_BYTES is zero."""
    values = byte_range(stored, rows.offset, rows.nbytes)
    if not rows.format.is_quantised:
        values = values.view(TORCH_DTYPES[rows.format.name]).view(rows.num_rows, *weight.shape[1:])
    code, _ = compress(values, memory[start:], num_threads)  # bytes are copied
    if rows.format.is_quantised:
        return stored_rows(rows)._replace(offset=start)
    return KeptRows(Lossless(code), rows.first_row, rows.num_rows, start, code.nbytes)
