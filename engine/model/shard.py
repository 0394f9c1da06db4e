"""Describes how a weight is cut over tensor-parallel ranks. Torch-free: local shapes, and the slices to read, follow
from sizes.

The shard dimension of a weight is said once, as a `ShardKind`; local shape and the slices of the checkpoint
tensor follow from it here. Nothing in this file knows a model family or a file format.
"""

from dataclasses import dataclass
from enum import Enum


class ShardKind(Enum):
    """Names which dimension of a weight (out, in) is cut: COLUMN and VOCAB cut its rows (out), ROW its columns (in)."""

    COLUMN = "column"
    ROW = "row"
    VOCAB = "vocab"
    REPLICATED = "replicated"


@dataclass(frozen=True)
class Piece:
    """The rectangle rows [row, row+num_rows) x columns [col, col+num_cols) of a checkpoint tensor, and the indices
    (to_row, to_col) of its first element in the rank's local weight. A 1-D tensor of n elements counts as (n, 1).
    """

    tensor: str
    row: int
    num_rows: int
    col: int
    num_cols: int
    to_row: int
    to_col: int = 0


@dataclass(frozen=True)
class HeadShard:
    """The attention heads of one rank: query heads [first_head, first_head + num_heads), and the global KV heads it
    holds, in the order in which its query heads use them (num_heads is a multiple of their count)."""

    first_head: int
    num_heads: int
    kv_heads: tuple[int, ...]


def tp_sizes(num_heads: int) -> tuple[int, ...]:
    """Every tp_size that divides the query heads."""
    return tuple(size for size in range(1, num_heads + 1) if num_heads % size == 0)


def check_tp_size(tp_size: int, num_heads: int) -> None:
    """Raises ValueError, with the sizes that are possible, if `num_heads` cannot be cut into `tp_size`."""
    if tp_size < 1 or num_heads % tp_size:
        sizes = ", ".join(map(str, tp_sizes(num_heads)))
        raise ValueError(
            f"tensor_parallel_size={tp_size} does not divide the {num_heads} query heads; possible: {sizes}"
        )


def shard_heads(num_heads: int, num_kv_heads: int, tp_size: int, rank: int) -> HeadShard:
    """The heads of `rank`. KV heads are cut if tp_size divides them, shared by neighbouring ranks if they divide
    tp_size, and otherwise repeated: one for each local query head."""
    check_tp_size(tp_size, num_heads)
    local = num_heads // tp_size
    first = rank * local
    group = num_heads // num_kv_heads
    if num_kv_heads % tp_size == 0 or tp_size % num_kv_heads == 0:
        kv_heads = tuple(sorted({head // group for head in range(first, first + local)}))
    else:
        kv_heads = tuple(head // group for head in range(first, first + local))
    return HeadShard(first, local, kv_heads)


def pad_to(size: int, multiple: int) -> int:
    """Rounds `size` up to a multiple."""
    return -(-size // multiple) * multiple


def local_ffn_size(ffn_size: int, tp_size: int, multiple: int) -> int:
    """FFN width of a rank, padded to a multiple."""
    return pad_to(ffn_size, multiple * tp_size) // tp_size


def local_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Padded vocabulary of a rank."""
    return pad_to(vocab_size, tp_size) // tp_size


def local_range(size: int, local_size: int, rank: int) -> tuple[int, int]:
    """The part [start, stop) of a dimension of `size` that falls to a rank which holds `local_size` of the padded
    dimension; it is empty where only padding is left."""
    start = min(rank * local_size, size)
    return start, min(start + local_size, size)
