"""The segments of decode attention in numbers (decode_work.py). Torch-free, for whoever plans bytes.

Shapes: R rows, M most items, H/K local query/KV heads, E head dim.
"""

from collections.abc import Iterable

LEAST_SEGMENT, MOST_SEGMENT = 128, 1024  # tokens
CAPACITY_STEP = 2


def segment_tokens(num_rows: int, num_kv_heads: int) -> int:
    """Tokens of a segment for a bucket of so many rows: fewer where rows and heads alone would not fill a GPU."""
    pairs = 1 << (max(num_rows, 1) * num_kv_heads - 1).bit_length()
    return min(MOST_SEGMENT, max(LEAST_SEGMENT, 2 * pairs))


def count_items(lengths: Iterable[int], segment: int) -> int:
    """The number of items of rows of these lengths, in a layer without a window; no fewer than with one."""
    return sum(max(1, -(-length // segment)) for length in lengths)


def choose_capacity(num_items: int, num_rows: int, most: int) -> int:
    """Room for num_items of num_rows rows, in few steps from one item a row up to `most`, so that few launches serve
    all."""
    capacity = num_rows
    while capacity < num_items:
        capacity *= CAPACITY_STEP
    return min(capacity, most)


def max_items(num_rows: int, max_context: int, num_cached: int, segment: int) -> int:
    """M for rows of at most max_context tokens, which have at most num_cached tokens together."""
    return min(num_rows * max(1, -(-max_context // segment)), num_cached // segment + num_rows)


def partials_size(items: int, num_heads: int, head_dim: int, num_queries: int = 1) -> int:
    """The number of fp32 values that the segments of so many items leave, aligned for any number of them."""
    return -(-items * num_queries * num_heads // 16) * 16 * (head_dim + 2)
