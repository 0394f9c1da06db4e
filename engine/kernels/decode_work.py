"""The work of decode attention, as a list of items (row, segment), made on the device once a pass.

Shapes: R rows, W windows of the model's layers, M most items, H/K local query/KV heads, E head dim.

A segment is a fixed number of tokens at a multiple of that number in its row's context, and the last one has a
remainder of up to half of that too, so that what a row is cut into depends on its own length alone. A row has an item
for each segment that its window reaches, and a padded row, of length 0, has none. A row's items follow each other; the
longest row comes first, since a GPU starts programs in their order, and long ones that started last would run alone:
256 rows of 100 to 2000 tokens take 258 us so, 280 in an order by chance. The host, which knows the lengths too, counts
the items: launches have room for `capacity` of them, and what lies behind the list's end costs them an empty program.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.engine.kernels.segments import count_seen, count_segments
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
NO_WINDOW = 1 << 30
BLOCK = 256
ROW, SEGMENT, CONTEXT, SIBLINGS, FIELDS = range(5)  # of an item: SIBLINGS are all items of its row


class DecodeWork(NamedTuple):
    """`items` (W, M, FIELDS) int32 hold for each of `windows` what there is to do: counts[w, r] items of row r from
    starts[w, r] on, both (W, R) int32, and num_items[w] of all rows, (W,) int32. `reaches` (W,) are reaches_of the
    windows. `segment` is in tokens. `partials` is the workspace of partials_size(capacity) fp32 values, which layers
    and lists may share."""

    segment: int
    capacity: int
    windows: tuple[int | None, ...]
    reaches: Tensor
    items: Tensor
    starts: Tensor
    counts: Tensor
    num_items: Tensor
    partials: Tensor

    def room(self, window: int | None, num_queries: int) -> int:
        """The most items that the list of a window may have."""
        num_seen = (NO_WINDOW if window is None else window) + num_queries - 1
        return min(self.capacity, self.starts.shape[1] * count_seen(num_seen, self.segment))


def reaches_of(windows: tuple[int | None, ...], device: torch.device) -> Tensor:
    """The windows as the device reads them (W,) int32."""
    reaches = [NO_WINDOW if window is None else window for window in windows]
    return torch.tensor(reaches, dtype=torch.int32, device=device)


def make_work(
    num_rows: int, segment: int, capacity: int, windows: tuple[int | None, ...], reaches: Tensor, partials: Tensor
) -> DecodeWork:
    """A list for num_rows rows that list_work is to fill."""
    items = reaches.new_empty(len(windows), capacity, FIELDS)
    starts, counts = (reaches.new_empty(len(windows), num_rows) for _ in range(2))
    return DecodeWork(segment, capacity, windows, reaches, items, starts, counts, torch.empty_like(reaches), partials)


def list_work(lengths: Tensor, work: DecodeWork, num_queries: int = 1) -> None:
    """Fills the lists of `work` from the lengths (R,) int32 of the rows' contexts, of which the last num_queries tokens
    attend."""
    run = _list_work_triton if lengths.is_cuda and HAS_TRITON else list_work_reference
    run(lengths, work, num_queries)


def list_work_reference(lengths: Tensor, work: DecodeWork, num_queries: int = 1) -> None:
    """Does the same in plain torch."""
    calls["reference"] += 1
    rows = sorted(enumerate(lengths.tolist()), key=lambda row: -row[1])
    for which, reach in enumerate(work.reaches.tolist()):
        listed = []
        for row, length in rows:
            end = count_segments(length, work.segment) if length else 0
            first = min(max(length - num_queries + 1 - reach, 0) // work.segment, max(end - 1, 0))
            work.starts[which, row], work.counts[which, row] = len(listed), end - first
            listed += [(row, segment, length, end - first) for segment in range(first, end)]
        work.items[which, : len(listed)] = torch.tensor(listed, dtype=torch.int32).view(-1, FIELDS)
        work.num_items[which] = len(listed)


def _list_work_triton(lengths: Tensor, work: DecodeWork, num_queries: int = 1) -> None:
    tensors = (lengths, work.reaches, work.items, work.starts, work.counts, work.num_items)
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in tensors), "decode_work: tensors need stride 1"
    calls["triton"] += 1
    _list_work[(len(lengths), len(work.windows))](
        *(*tensors, work.items.shape[1], num_queries, work.segment),
        **{"BLOCK": BLOCK, **options(lengths.device)},
    )


_ROW, _SEGMENT, _CONTEXT, _SIBLINGS, _FIELDS = (tl.constexpr(field) for field in range(5))


@triton.jit
def first_seen(length, reach, Q):
    """The first token that any of the last Q of a row sees."""
    return tl.maximum(length - Q + 1 - reach, 0)


@triton.jit
def segment_end(begin, length, tokens):
    """The end of the segment of a row that begins there: the last one has what is left (segments.count_segments)."""
    return tl.where(length - begin <= tokens + tokens // 2, length, begin + tokens)


@triton.jit
def _extent(length, reach, Q, tokens):
    """The first segment that any query of a row sees, and how many items the row has."""
    last = tl.maximum((length + tokens // 2 - 1) // tokens, 1) - 1
    first = tl.minimum(first_seen(length, reach, Q) // tokens, last)
    return first, tl.where(length > 0, last - first + 1, 0)


@triton.jit(do_not_specialize=["most"])
def _list_work(
    lengths, reaches, items, starts, counts, num_items, most, Q, tokens, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    wait_for_inputs(OVERLAPS)
    row, which, num_rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    reach, length = tl.load(reaches + which), tl.load(lengths + row)
    index, begin, total = tl.arange(0, BLOCK), 0, 0
    for start in tl.range(0, num_rows, BLOCK):
        other = start + index
        its_length = tl.load(lengths + other, mask=other < num_rows, other=0)
        _, each = _extent(its_length, reach, Q, tokens)
        before = (its_length > length) | ((its_length == length) & (other < row))
        begin += tl.sum(tl.where(before, each, 0), 0)
        total += tl.sum(each, 0)
    first, siblings = _extent(length, reach, Q, tokens)
    own = which * num_rows + row
    tl.store(starts + own, begin)
    tl.store(counts + own, siblings)
    if row == 0:
        tl.store(num_items + which, total)
    for start in tl.range(0, siblings, BLOCK):
        ordinal = start + index
        inside = (ordinal < siblings) & (begin + ordinal < most)
        item = items + (which * most + begin + ordinal).to(tl.int64) * _FIELDS
        nothing = tl.zeros((BLOCK,), tl.int32)
        tl.store(item + _ROW, nothing + row, mask=inside)
        tl.store(item + _SEGMENT, first + ordinal, mask=inside)
        tl.store(item + _CONTEXT, nothing + length, mask=inside)
        tl.store(item + _SIBLINGS, nothing + siblings, mask=inside)
