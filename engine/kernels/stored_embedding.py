"""Gathers rows of an embedding table that is stored quantised, and dequantises them; the table may lie in registered
host memory.

Shapes: T tokens in the batch, D hidden, V local vocab. As in embedding.py a row that another rank holds comes out as
zeros, and only the rows that are needed cross the link, as they are stored. The values are those of dequantise.py.
"""

import torch
from penstock.engine.kernels.block_parts import split_parts
from penstock.engine.kernels.block_values import GROUPS, block_values, write_values
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
PROGRAM_WEIGHTS = 1024


def embed_stored_rows(kind: str, table: Tensor, tokens: Tensor, first: int, out: Tensor) -> None:
    """Computes out (T, D) = dequantised rows `tokens - first` of `table` (V, bytes of a row) uint8, blocks of
    `kind` in parts, with zeros for tokens outside [first, first + V). `table` is on the device, or in registered host
    memory that a CUDA device can read."""
    run = _embed_stored_rows_triton if out.is_cuda else embed_stored_rows_reference
    run(kind, table, tokens, first, out)


def embed_stored_rows_reference(kind: str, table: Tensor, tokens: Tensor, first: int, out: Tensor) -> None:
    """Does the same in plain torch; table and tokens are on one device."""
    calls["reference"] += 1
    local = tokens - first
    mine = (local >= 0) & (local < len(table))
    rows = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    chosen, width = local.clamp(0, len(table) - 1), BY_NAME[kind].block
    parts = [part.view(len(table), -1).index_select(0, chosen) for part in split_parts(kind, table)]
    write_values(kind, [part.view(rows.numel() // width, -1) for part in parts], rows)
    out.copy_(rows.masked_fill_(~mine[:, None], 0))


def _embed_stored_rows_triton(kind: str, table: Tensor, tokens: Tensor, first: int, out: Tensor) -> None:
    require_triton("gathering a quantised embedding on a GPU", "device='cpu'")
    assert table.is_contiguous() and out.stride(1) == 1, "embed_stored_rows: strides: rows lie together"
    assert tokens.is_contiguous(), "embed_stored_rows: strides: tokens lie together"
    layout, groups = BY_NAME[kind], GROUPS[kind]
    row_blocks = out.shape[1] // layout.block
    assert table.shape[1] == layout.row_bytes(out.shape[1])
    calls["triton"] += 1
    blocks = PROGRAM_WEIGHTS // layout.block
    _gather_stored_rows[(len(tokens), triton.cdiv(row_blocks, blocks))](
        *(table, tokens, out, first, len(table), row_blocks, out.stride(0)),
        *(kind, blocks, groups, layout.block // groups),
    )


@triton.jit
def _gather_stored_rows(
    table, tokens, out, first, num_rows, row_blocks, out_row,
    KIND: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row) - first
    mine = (token >= 0) & (token < num_rows)
    token = tl.where(mine, token, 0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None, None]
    group, lane = tl.arange(0, GROUPS)[None, :, None], tl.arange(0, LANES)[None, None, :]
    inside = block < row_blocks
    stored = token * row_blocks + tl.minimum(block, row_blocks - 1)
    values = block_values(table, num_rows * row_blocks, stored, group, lane, KIND)
    column = (block * GROUPS + group) * LANES + lane
    tl.store(out + row * out_row + column, tl.where(mine, values, 0.0).to(out.dtype.element_ty), mask=inside)
