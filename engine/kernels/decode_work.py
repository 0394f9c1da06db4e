"""The work of decode attention, as a list of items (row, segment), made on the device once a pass.

Shapes: R rows, W windows of the model's layers, M most items, H/K local query/KV heads, E head dim.

A segment is a fixed number of tokens at a multiple of that number in its row's context, so that what a row is cut into
depends on its own length alone. A row has an item for each segment that its window reaches, and a padded row, of
length 0, has none; its items follow each other, and rows come in their order. The host, which knows the lengths too,
counts the items: launches have room for `capacity` of them, and what lies behind the list's end costs them an empty
program.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
NO_WINDOW = 1 << 30
BLOCK = 256
ROW, SEGMENT, CONTEXT, SIBLINGS, FIELDS = range(5)  # of an item: SIBLINGS are all items of its row


class DecodeWork(NamedTuple):
    """`items` (W, M, FIELDS) int32 hold for each of `windows` what there is to do, those of row r from starts[w, r] on;
    `starts` is (W, R + 1) int32, and starts[w, R] is their number. `reaches` (W,) are reaches_of the windows. `segment`
    is in tokens. `partials` is the workspace of partials_size(capacity) fp32 values, which layers and lists may share.
    """

    segment: int
    capacity: int
    windows: tuple[int | None, ...]
    reaches: Tensor
    items: Tensor
    starts: Tensor
    partials: Tensor

    def room(self, window: int | None, num_queries: int) -> int:
        """The most items that the list of a window may have."""
        num_rows, num_seen = self.starts.shape[1] - 1, (NO_WINDOW if window is None else window) + num_queries - 1
        return min(self.capacity, num_rows * (-(-(num_seen - 1) // self.segment) + 1))


def reaches_of(windows: tuple[int | None, ...], device: torch.device) -> Tensor:
    """The windows as the device reads them (W,) int32."""
    reaches = [NO_WINDOW if window is None else window for window in windows]
    return torch.tensor(reaches, dtype=torch.int32, device=device)


def make_work(
    num_rows: int, segment: int, capacity: int, windows: tuple[int | None, ...], reaches: Tensor, partials: Tensor
) -> DecodeWork:
    """A list for num_rows rows that list_work is to fill."""
    items = reaches.new_empty(len(windows), capacity, FIELDS)
    starts = reaches.new_empty(len(windows), num_rows + 1)
    return DecodeWork(segment, capacity, windows, reaches, items, starts, partials)


def list_work(lengths: Tensor, work: DecodeWork, num_queries: int = 1) -> None:
    """Fills the items and starts of `work` from the lengths (R,) int32 of the rows' contexts, of which the last
    num_queries tokens attend."""
    run = _list_work_triton if lengths.is_cuda and HAS_TRITON else list_work_reference
    run(lengths, work, num_queries)


def list_work_reference(lengths: Tensor, work: DecodeWork, num_queries: int = 1) -> None:
    """Does the same in plain torch."""
    calls["reference"] += 1
    for reach, items, starts in zip(work.reaches.tolist(), work.items, work.starts):
        listed, begins = [], [0]
        for row, length in enumerate(lengths.tolist()):
            first = max(length - num_queries + 1 - reach, 0) // work.segment
            siblings = -(-length // work.segment) - first
            listed += [(row, first + index, length, siblings) for index in range(siblings)]
            begins.append(len(listed))
        items[: len(listed)] = torch.tensor(listed, dtype=torch.int32).view(-1, FIELDS)
        starts[:] = torch.tensor(begins, dtype=torch.int32)


def _list_work_triton(lengths: Tensor, work: DecodeWork, num_queries: int = 1) -> None:
    tensors = (lengths, work.reaches, work.items, work.starts)
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in tensors), "decode_work: tensors need stride 1"
    calls["triton"] += 1
    _list_work[(len(lengths), len(work.windows))](
        *(lengths, work.reaches, work.items, work.starts, work.items.shape[1], num_queries, work.segment),
        **{"BLOCK": BLOCK, **options(lengths.device)},
    )


_ROW, _SEGMENT, _CONTEXT, _SIBLINGS, _FIELDS = (tl.constexpr(field) for field in range(5))


@triton.jit
def first_seen(length, reach, Q):
    """The first token that any of the last Q of a row sees."""
    return tl.maximum(length - Q + 1 - reach, 0)


@triton.jit
def _extent(length, reach, Q, tokens):
    """The first segment that any query of a row sees, and how many items the row has."""
    first = first_seen(length, reach, Q) // tokens
    return first, tl.cdiv(length, tokens) - first


@triton.jit(do_not_specialize=["most"])
def _list_work(lengths, reaches, items, starts, most, Q, tokens, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_inputs(OVERLAPS)
    row, which, num_rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    reach, length = tl.load(reaches + which), tl.load(lengths + row)
    index, begin = tl.arange(0, BLOCK), 0
    for start in tl.range(0, row, BLOCK):  # the items of the rows before
        before = start + index < row
        _, each = _extent(tl.load(lengths + start + index, mask=before, other=0), reach, Q, tokens)
        begin += tl.sum(tl.where(before, each, 0), 0)
    first, siblings = _extent(length, reach, Q, tokens)
    own = starts + which * (num_rows + 1) + row
    if row == 0:
        tl.store(own, 0)
    tl.store(own + 1, begin + siblings)
    for start in tl.range(0, siblings, BLOCK):
        ordinal = start + index
        inside = (ordinal < siblings) & (begin + ordinal < most)
        item = items + (which * most + begin + ordinal).to(tl.int64) * _FIELDS
        nothing = tl.zeros((BLOCK,), tl.int32)
        tl.store(item + _ROW, nothing + row, mask=inside)
        tl.store(item + _SEGMENT, first + ordinal, mask=inside)
        tl.store(item + _CONTEXT, nothing + length, mask=inside)
        tl.store(item + _SIBLINGS, nothing + siblings, mask=inside)
