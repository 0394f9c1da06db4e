"""Derives the inputs of a decode pass from the one table that the host sends, in one launch where torch takes 14.

Shapes: R rows, P pages of a row, S page size.
The table (R, PAGES + P) int32 has for each row: its token (or a number that stands for the row's last sampled one), the
token's index in its sequence, the row's index in the sampler, the length of its context, whose last token this is, and
its page table.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
TOKEN, START, ROW, LENGTH, PAGES = range(5)  # columns of the table; pages fill those from PAGES on
BLOCK = 128


class DecodeInputs(NamedTuple):
    """The inputs of each row: all are (R,) int64, except that lengths are int32. None stands for what nobody reads."""

    tokens: Tensor
    positions: Tensor
    addresses: Tensor  # page * S + offset
    rows: Tensor
    sampled_positions: Tensor | None
    lengths: Tensor


class Reading(NamedTuple):
    """Says how a table is read. A token equal to `on_device` stands for its row's last sampled one. The first `margin`
    entries of a row's first page are empty. With `keeps_padding` a row of length 0 has its length written and nothing
    else."""

    on_device: int
    page_size: int
    margin: int = 0
    keeps_padding: bool = False


def derive_inputs(table: Tensor, last_tokens: Tensor, reading: Reading, out: DecodeInputs) -> None:
    """Fills `out` from the table; last_tokens (rows of the sampler,) int64 are the last sampled ones."""
    run = _derive_inputs_triton if table.is_cuda and HAS_TRITON else derive_inputs_reference
    run(table, last_tokens, reading, out)


def derive_inputs_reference(table: Tensor, last_tokens: Tensor, reading: Reading, out: DecodeInputs) -> None:
    """Does the same in plain torch."""
    calls["reference"] += 1
    on_device, page_size, margin, keeps_padding = reading
    tokens, starts, rows, lengths = table[:, :PAGES].long().unbind(1)
    positions = (lengths - 1).clamp_(min=0)
    entries = positions + margin
    pages = table[:, PAGES:].gather(1, (entries // page_size)[:, None])[:, 0]
    values = DecodeInputs(
        tokens=torch.where(tokens == on_device, last_tokens[rows], tokens),
        positions=positions,
        addresses=pages * page_size + entries % page_size,
        rows=rows,
        sampled_positions=starts + 1,
        lengths=lengths,
    )
    written = torch.ones_like(lengths, dtype=torch.bool) if not keeps_padding else lengths > 0
    for target, value in zip(out, values):
        if target is not None:
            target.copy_(value if target is out.lengths else torch.where(written, value, target))


def _derive_inputs_triton(table: Tensor, last_tokens: Tensor, reading: Reading, out: DecodeInputs) -> None:
    assert table.stride(1) == 1, "decode_inputs: the last dim of the table must have stride 1"
    assert table.dtype == torch.int32 and all(t.is_contiguous() for t in (last_tokens, *out) if t is not None)
    calls["triton"] += 1
    _derive[(triton.cdiv(len(table), BLOCK),)](
        *(table, table.stride(0), last_tokens, *out, len(table), *reading, BLOCK),
        **options(table.device),
    )


_TOKEN, _START, _ROW, _LENGTH, _PAGES = (tl.constexpr(column) for column in (TOKEN, START, ROW, LENGTH, PAGES))


@triton.jit(do_not_specialize=["num_rows"])
def _derive(
    table, table_row, last_tokens, tokens, positions, addresses, rows, sampled_positions, lengths, num_rows,
    ON_DEVICE: tl.constexpr, S: tl.constexpr, MARGIN: tl.constexpr, KEEPS_PADDING: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    entry = table + row.to(tl.int64) * table_row
    token = tl.load(entry + _TOKEN, mask=inside, other=0).to(tl.int64)
    start = tl.load(entry + _START, mask=inside, other=0).to(tl.int64)
    owner = tl.load(entry + _ROW, mask=inside, other=0).to(tl.int64)
    length = tl.load(entry + _LENGTH, mask=inside, other=0)
    position = tl.maximum(length - 1, 0).to(tl.int64)
    page = tl.load(entry + _PAGES + (position + MARGIN) // S, mask=inside, other=0).to(tl.int64)
    waiting = token == ON_DEVICE
    token = tl.where(waiting, tl.load(last_tokens + owner, mask=inside & waiting, other=0), token)
    written = inside & (length > 0) if KEEPS_PADDING else inside
    tl.store(tokens + row, token, mask=written)
    tl.store(positions + row, position, mask=written)
    tl.store(addresses + row, page * S + (position + MARGIN) % S, mask=written)
    tl.store(rows + row, owner, mask=written)
    if sampled_positions is not None:
        tl.store(sampled_positions + row, start + 1, mask=written)
    tl.store(lengths + row, length, mask=inside)
