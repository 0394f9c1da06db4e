"""Gathers rows of the embedding table on the device; the table may lie in registered host memory.

Shapes: T tokens in the batch, D hidden, V local vocab.
The vocabulary is split over ranks: a row that another rank holds comes out as zeros here, so that a sum over ranks
completes the rows. From host memory only the rows that are needed cross the link: on an H200 that takes 17 us for 1 row
of 8 KiB, 50 us for 256.
Tried: nothing else yet.
"""

import torch
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}


def embed_rows(table: Tensor, tokens: Tensor, first: int, out: Tensor) -> None:
    """Computes out (T, D) = table (V, D)[tokens - first], with zeros for tokens outside [first, first + V).

    `table` is on the device, or in registered host memory that a CUDA device can read.
    """
    if out.is_cuda and not table.is_cuda:
        _embed_rows_triton(table, tokens, first, out)
    else:
        embed_rows_reference(table, tokens, first, out)


def embed_rows_reference(table: Tensor, tokens: Tensor, first: int, out: Tensor) -> None:
    """Does the same in plain torch; table and tokens are on one device."""
    calls["reference"] += 1
    local = tokens - first
    mine = (local >= 0) & (local < table.shape[0])
    torch.index_select(table, 0, local.clamp(0, table.shape[0] - 1), out=out)
    out.masked_fill_(~mine[:, None], 0)


def _embed_rows_triton(table: Tensor, tokens: Tensor, first: int, out: Tensor) -> None:
    require_triton("reading the embedding from host memory", "resident='all'")
    assert table.stride(1) == out.stride(1) == 1, "embed_rows: the last dim of table and out must have stride 1"
    assert table.dtype == out.dtype and tokens.is_contiguous()
    calls["triton"] += 1
    num_rows, width = table.shape
    block = 1024
    _gather_rows[(tokens.shape[0], triton.cdiv(width, block))](
        table, tokens, out, first, num_rows, width, table.stride(0), out.stride(0), block
    )


@triton.jit
def _gather_rows(table, tokens, out, first, num_rows, width, table_row, out_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row) - first
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = (token >= 0) & (token < num_rows)
    values = tl.load(table + token * table_row + columns, mask=mine & (columns < width), other=0.0)
    tl.store(out + row * out_row + columns, values, mask=columns < width)
