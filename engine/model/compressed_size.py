"""Describes how many bytes compressed weights take: counted where escapes and patches are known, planned before
anything is read.

Torch-free. `weights/codec.py` lays out its blobs by `part_bytes`; the planner asks `planned_bytes`.
"""

from penstock.engine.kernels.codec_tile import TILE, num_escape_rows
from penstock.engine.model.group_layout import ALIGN, GroupLayout, Rows
from penstock.engine.model.shard import pad_to

PART_BYTES = 16  # every part of a blob starts at a multiple of this, and so does every blob in its group's
WEIGHT_BITS = 10  # bits of a compressed weight that is neither escaped nor patched
ESCAPE_BITS = 3
# Planned bits of a weight in a tile: Gaussian ones take 10.76 to 10.89, Student-t(4) 10.95 to 11.04, Laplace 11.12 to
# 11.19.
PLANNED_BITS = 11.25
SPREAD_BYTES = 64  # planned besides: a tile's bytes deviate by 12, and few tiles do not reach the average
COMPRESSED_DTYPE = "bfloat16"


def part_bytes(num_weights: int, num_escapes: int, num_patches: int) -> dict[str, int]:
    """The parts of a compressed tensor of bf16 in their order, each without what pads it to PART_BYTES."""
    tiles = num_weights // TILE
    starts = 4 * (tiles + 1)
    return {
        "mantissas": TILE * tiles,
        "indices": TILE // 4 * tiles,
        "escapes": 12 * num_escape_rows(num_escapes),
        "patches": 2 * num_patches,
        "escape_starts": starts,
        "patch_starts": starts,
        "windows": 2 * tiles,
        "rest": 2 * (num_weights - TILE * tiles),
    }


def planned_bytes(layout: GroupLayout) -> int:
    """The bytes that a group's blob is planned with. It takes fewer where weights are Gaussian, Laplace or Student-t,
    and may take more where many zeros that pad a shard lie among them; never more than what is stored."""
    return pad_to(sum(map(_planned_rows_bytes, layout.rows)), ALIGN)


def _planned_rows_bytes(rows: Rows) -> int:
    """Planned bytes of rows; the difference of PLANNED_BITS and WEIGHT_BITS is planned as escapes."""
    raw = pad_to(rows.nbytes, PART_BYTES)
    if rows.format.name != COMPRESSED_DTYPE or rows.nbytes < 2 * TILE:
        return raw
    num_weights = rows.nbytes // 2
    escape_bits = int((PLANNED_BITS - WEIGHT_BITS) * TILE * (num_weights // TILE))
    sizes = part_bytes(num_weights, escape_bits // ESCAPE_BITS, num_patches=0)
    return min(raw, sum(pad_to(size, PART_BYTES) for size in sizes.values()) + SPREAD_BYTES)
