"""Causal attention of chunks, prompts or parts of them, over keys and values that lie one behind another, or in the
pages of a cache: in one launch for rows of any lengths, in place, for CUDA graphs.

Shapes: T tokens, C tokens of context or of a cache, H/K local query/KV heads, E head dim, B blocks, R rows, P most
pages of a row.

The work is a list of blocks of up to BLOCK_M queries, which the host makes from the rows' lengths, those with most to
do first. Each (block, head) has a program. It holds its queries, walks its row's keys up to its last query in steps of
BLOCK_N, and writes the result where the queries were, which nobody else reads. Only the steps at the diagonal are
masked, and those of windows.
Source: Dao 2023, "FlashAttention-2".

A row's bits depend on its own queries, keys, values and the window: it is cut from its own first query on, and neither
the number of blocks nor the other rows change the order of its sums. Nor does it matter how keys and values are read:
where they lie in no pages and there is no window, bulk copies (TMA) bring them as tiles, from compute capability 9.0 on
for heads of 16, 32, 64 or 128; else each thread has addresses.
Tried, on an H200 with 32 and 8 heads of 128, us, for 1 x 512 / 4 x 448 / 15 x 512 + 212 / 1 x 2000 / 1 x 8000 tokens.
Blocks of 64 queries, steps of 64 keys, 4 warps and 3 stages take 12 / 28 / 133 / 82 / 1063 by bulk copies; others
  - 2 stages 13 / 29 / 148 / 85 / 1241
  - 128 queries, 2 stages 21 / 41 / 185 / 89 / 1141
  - 128 queries, 8 warps 13 / 37 / 173 / 84 / 1102, 2 stages 15 / 39 / 198 / 100 / 1499, 4 stages 14 / 39 / 179 / 87 /
    1100
By addresses they take 14 / 32 / 142 / 88 / 1192, and others
  - 2 stages 14 / 30 / 148 / 87 / 1296
  - 32 keys, 4 stages 15 / 34 / 150 / 98 / 1264
  - 128 queries, 2 stages 30 / 62 / 290 / 133 / 1645
  - 128 queries, 8 warps 15 / 38 / 168 / 91 / 1129, 128 keys 15 / 41 / 179 / 90 / 1186
Torch's varlen kernel, which has programs for each row as if it were the longest, took 32 / 80 / 303 / 189 / 1721 with
the copy of its result. Reading pages where they lie took 15 to 40 % more time than reading a copy by addresses, for 64
to 8000 queries behind 2048 to 32768 tokens, and the copy itself 1 to 15 %. So the engine copies for many queries; for
few, launches for a copy at a time cost more (LEAST_QUERIES in compute/bind.py), and graphs read pages.
Queries that are scaled first would be operands in registers, but were loaded from shared memory at each step all the
same. The product of the next step, put ahead of this one's weights, is waited for at once. Triton 3.7 refuses
`warp_specialize`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import TensorDescriptor, require_triton, tl, triton
from torch import Tensor

calls = {"triton": 0, "tiles": 0}  # all, and those that read keys and values by bulk copies
BLOCK_M = 64
FIRST, END, FIRST_KEY, SHIFT, ROW, FIELDS = range(6)  # of a block
NO_WINDOW = 1 << 30
Row = tuple[int, int, int, int]  # first query, number of queries, first token of context, number of those


class Pages(NamedTuple):
    """Says where rows' keys and values lie in a cache: key n of a row is entry n + margin of its pages, in their order.
    `table` (R, P) int32 may hold anything behind a row's context."""

    table: Tensor
    page_size: int
    margin: int = 0

    def addresses(self, rows: Tensor | int, positions: Tensor) -> Tensor:
        """The places in the cache (C,) of keys at `positions` (C,) int64, of one row or of `rows` (C,)."""
        entries = positions + self.margin
        return self.table[rows, entries // self.page_size].long() * self.page_size + entries % self.page_size


def list_blocks(rows: Iterable[Row]) -> list[tuple[int, int, int, int, int]]:
    """The blocks of rows, whose queries are the last tokens of their context: the block's first query; where the
    queries end, of row or block; the row's first key; what is added to a query's index for the last key that it sees;
    and which row it is. Those that see most come first."""
    blocks = []
    for row, (first, num_queries, first_key, num_keys) in enumerate(rows):
        shift, end = first_key + num_keys - first - num_queries, first + num_queries
        blocks += [(at, min(at + BLOCK_M, end), first_key, shift, row) for at in range(first, end, BLOCK_M)]
    return sorted(blocks, key=lambda block: block[FIRST_KEY] - block[END] - block[SHIFT])


def most_blocks(num_tokens: int, num_rows: int) -> int:
    """The most blocks of so many rows that have so many tokens together."""
    return num_tokens // BLOCK_M + num_rows


def attend_blocks_(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, window: int | None, pages: Pages | None = None
) -> None:
    """Overwrites q (T, H, E), bf16 or fp16, with its attention over keys and values (C, K, E). `blocks` (B, FIELDS)
    int32 are those of list_blocks; one that ends at 0 is none. With `pages` keys and values are a cache, in which the
    first key of each row is 0. Heads of a token have no gaps between them; tokens may."""
    _attend_blocks_triton(q, keys, values, blocks, window, pages)


def _tuning(q: Tensor) -> dict[str, int]:
    """The keys of a step, warps and stages: from compute capability 9.0 on two programs of heads of 128 fit an SM, and
    before one does. TILES: whether bulk copies read keys and values where they can."""
    if q.shape[2] > 128:
        return {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "TILES": False}
    newer = options(q.device)["OVERLAPS"]
    return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3 if newer else 2, "TILES": newer}


def _tiles(part: Tensor, num_keys: int) -> "TensorDescriptor | None":
    """Keys or values (C, K, E) as tiles of so many of them and a head, for bulk copies; None where these do not serve:
    they want multiples of 16 bytes, and a tile of another width would have columns of the next head."""
    (num_tokens, num_kv_heads, head_dim), token = part.shape, part.stride(0)
    if head_dim not in (16, 32, 64, 128) or part.data_ptr() % 16 or token * part.element_size() % 16:
        return None
    return TensorDescriptor(part, [num_tokens, num_kv_heads * head_dim], [token, 1], [num_keys, head_dim])


def _attend_blocks_triton(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    window: int | None,
    pages: Pages | None = None,
    tuning: dict[str, int] | None = None,
) -> None:
    require_triton("attention of prompts on a GPU", "device='cpu'")
    (_, num_heads, head_dim), num_kv_heads = q.shape, keys.shape[1]
    assert keys.shape == values.shape and q.dtype == keys.dtype == values.dtype and num_heads % num_kv_heads == 0
    assert all(t.stride(2) == 1 and t.stride(1) == head_dim for t in (q, keys, values)), "strides: heads have no gaps"
    assert blocks.dtype == torch.int32 and blocks.is_contiguous()
    table, page_size, margin = pages or (None, 0, 0)
    assert pages is None or (table.dtype == torch.int32 and table.stride(1) == 1), "strides: a row's pages have no gaps"
    calls["triton"] += 1
    interpreted_bf16 = q.dtype == torch.bfloat16 and not q.is_cuda  # the interpreter's tl.dot of bf16 is wrong
    tuning, tiles = tuning or _tuning(q), (None, None)
    if tuning["TILES"] and pages is None and window is None:
        tiles = tuple(_tiles(part, tuning["BLOCK_N"]) for part in (keys, values))
    calls["tiles"] += None not in tiles
    if len(blocks):
        _attend_block[(num_heads, len(blocks))](
            *(q, keys, values, *tiles, blocks, table, q.stride(0), keys.stride(0), values.stride(0)),
            0 if table is None else table.stride(0),
            *(head_dim**-0.5 * 1.4426950408889634, NO_WINDOW if window is None else window),  # log2(e)
            **{"GROUP": num_heads // num_kv_heads, "E": head_dim, "WINDOWED": window is not None},
            **{"E_PADDED": max(16, triton.next_power_of_2(head_dim)), "BLOCK_M": BLOCK_M, "FIELDS": FIELDS},
            **{"S": page_size, "MARGIN": margin},
            DOT=tl.float32 if interpreted_bf16 else getattr(tl, str(q.dtype).removeprefix("torch.")),
            **options(q.device),
            **tuning | {"TILES": None not in tiles},
        )


@triton.jit
def _pages_of(pages, start, end, BLOCK_N: tl.constexpr, S: tl.constexpr, MARGIN: tl.constexpr):
    """Reads the pages (BLOCK_N,) of the keys from `start` on, before `end`."""
    key = start + tl.arange(0, BLOCK_N)
    return tl.load(pages + (key + MARGIN) // S, mask=key < end, other=0)


@triton.jit
def _step(
    q, keys, values, key_tiles, value_tiles, column, pages, page, key_token, value_token, start, end, last_seen, window,
    scale, top, total, acc,
    E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
    S: tl.constexpr, MARGIN: tl.constexpr, TILES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Adds what queries see of the keys from `start` on, before `end`; all see all of them unless MASKED. `page` are
    their pages, if they lie in any; returns those of the next step, which are read before its keys are."""
    n, e = tl.arange(0, BLOCK_N), tl.arange(0, E_PADDED)
    if S:
        token = page.to(tl.int64) * S + (start + n + MARGIN) % S
        key_rows, value_rows = keys + token[:, None] * key_token, values + token[:, None] * value_token
        page = _pages_of(pages, start + BLOCK_N, end, BLOCK_N, S, MARGIN)
    else:
        key_rows = keys + start.to(tl.int64) * key_token + n[:, None] * key_token
        value_rows = values + start.to(tl.int64) * value_token + n[:, None] * value_token
    key_rows, value_rows = key_rows + e[None, :], value_rows + e[None, :]
    if TILES:
        k, v = key_tiles.load([start, column]), value_tiles.load([start, column])
        if MASKED:
            v = tl.where((start + n < end)[:, None], v, 0.0)  # what lies behind the end may be NaN
    elif MASKED:
        inside = (start + n < end)[:, None] & (e < E)[None, :]
        k, v = tl.load(key_rows, mask=inside, other=0.0), tl.load(value_rows, mask=inside, other=0.0)
    elif E == E_PADDED:
        k, v = tl.load(key_rows), tl.load(value_rows)
    else:
        inside = (n >= 0)[:, None] & (e < E)[None, :]
        k, v = tl.load(key_rows, mask=inside, other=0.0), tl.load(value_rows, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee")  # (BLOCK_M, BLOCK_N), not yet scaled
    if MASKED:
        key = (start + n)[None, :]
        seen = (key <= last_seen[:, None]) & (key < end)
        if WINDOWED:
            seen = seen & (key > last_seen[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher) if WINDOWED else higher  # of a query that saw no key yet
    weights, decay = tl.exp2(scores * scale - (finite * scale)[:, None]), tl.exp2((top - finite) * scale)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(DOT), v.to(DOT), acc * decay[:, None], input_precision="ieee")
    return higher, total, acc, page


# A table is as wide as its pass's longest row, and begins at any of its rows; blocks of a bucket begin anywhere.
# Variants by these would be compiled in the middle of a job
@triton.jit(do_not_specialize=["table_row"], do_not_specialize_on_alignment=["table", "blocks"])
def _attend_block(
    q, keys, values, key_tiles, value_tiles, blocks, table, q_token, key_token, value_token, table_row, scale, window,
    GROUP: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr, S: tl.constexpr, MARGIN: tl.constexpr, TILES: tl.constexpr, DOT: tl.constexpr,
    FIELDS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    head, block = tl.program_id(0), blocks + tl.program_id(1) * FIELDS
    first, last, begin, shift = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    if last == 0:
        return
    query, e = first + tl.arange(0, BLOCK_M), tl.arange(0, E_PADDED)
    rows = q + query.to(tl.int64)[:, None] * q_token + head * E + e[None, :]
    inside = (query < last)[:, None] & (e < E)[None, :]
    tile = tl.load(rows, mask=inside, other=0.0).to(DOT)
    column = head // GROUP * E
    keys, values = keys + column, values + column
    last_seen, end = query + shift, last + shift  # (BLOCK_M,)
    if WINDOWED:
        begin += tl.maximum(first + shift - window + 1 - begin, 0) // BLOCK_N * BLOCK_N
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, E_PADDED), tl.float32)
    pages, page, diagonal = table, 0, begin
    if S:
        pages = table + tl.load(block + 4).to(tl.int64) * table_row
        page = _pages_of(pages, begin, end, BLOCK_N, S, MARGIN)
    if not WINDOWED:
        diagonal += (first + shift + 1 - begin) // BLOCK_N * BLOCK_N  # before it all queries see all keys
        for offset in tl.range(0, diagonal - begin, BLOCK_N):
            top, total, acc, page = _step(
                tile, keys, values, key_tiles, value_tiles, column, pages, page, key_token, value_token,
                begin + offset, end, last_seen, window, scale, top, total, acc,
                E, E_PADDED, BLOCK_N, False, False, S, MARGIN, TILES, DOT,
            )  # fmt: skip
    # A third stage of these few steps would take the room of a second program in an SM.
    for offset in tl.range(0, end - diagonal, BLOCK_N, num_stages=2 if TILES else None):
        top, total, acc, page = _step(
            tile, keys, values, key_tiles, value_tiles, column, pages, page, key_token, value_token,
            diagonal + offset, end, last_seen, window, scale, top, total, acc,
            E, E_PADDED, BLOCK_N, True, WINDOWED, S, MARGIN, TILES, DOT,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # behind the last query, where a window sees nothing
    tl.store(rows, (acc / total[:, None]).to(q.dtype.element_ty), mask=inside)
