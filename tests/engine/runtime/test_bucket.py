"""The table that a decode pass is sent by: whole, whatever it held and wherever its filling was interrupted."""

from itertools import count

import pytest
import torch
from penstock.engine.kernels.decode_inputs import PAGES
from penstock.engine.runtime.bucket import HostTable
from penstock.engine.runtime.bucket_sizes import bucket_sizes
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.request import Request, SamplingParams
from penstock.scheduler.batching.scheduler import Scheduler

PAD_ROW, NUM_ROWS, MAX_PAGES = 9, 4, 5


def batch_of(*pages: tuple[int, ...]) -> Batch:
    """A row for each page table."""
    return Batch(tuple(BatchRow(row, (7 + row,), 20 + row, own, True, None) for row, own in enumerate(pages)))


FIRST = batch_of((1, 2, 3), (4,), (5, 6))
SECOND = batch_of((8,), (4,), (5, 6, 7), (10, 11))  # shorter, the same, longer, new
THIRD = batch_of((8,))


def filled(table: HostTable, batch: Batch) -> torch.Tensor:
    table.fill(batch, len(table.values), PAD_ROW)
    return table.table.clone()


def new_table() -> HostTable:
    return HostTable(NUM_ROWS, MAX_PAGES, pinned=False)


def test_sizes_end_with_the_most_rows():
    assert bucket_sizes(1) == [1] and bucket_sizes(2) == [1, 2] and bucket_sizes(100) == [1, 8, 16, 32, 64, 96, 100]
    assert bucket_sizes(512)[8:] == [192, 224, 256, 320, 384, 416, 512]
    assert all(bucket_sizes(most)[-1] == most for most in range(1, 300))


def test_a_table_by_hand():
    table = filled(new_table(), SECOND)
    assert table[2].tolist() == [9, 22, 2, 23, 5, 6, 7, 0, 0]
    assert filled(new_table(), THIRD)[1:].tolist() == [[0, 0, PAD_ROW, 0, *[0] * MAX_PAGES]] * 3


def test_a_table_is_the_same_whatever_it_held():
    table = new_table()
    for batch in (FIRST, SECOND, THIRD, FIRST, THIRD, SECOND):
        assert torch.equal(filled(table, batch), filled(new_table(), batch))


class Counted:
    """A table's memory; `rows` are those whose pages were written to it."""

    def __init__(self, held):
        self.held, self.rows = held, set()

    def __setitem__(self, key, value) -> None:
        self.rows.add(key[0])
        self.held[key] = value


def test_one_row_that_ends_has_one_other_row_written():
    """Over many decode passes: a row is written where it comes, where it goes, and when it gets a page."""
    num_rows, page_size = 32, 8
    scheduler = Scheduler(num_rows, 256, 64, page_size, 400)
    for number in range(num_rows):
        scheduler.add(Request(number, [7] * 3, SamplingParams(max_tokens=9 + number, ignore_eos=True)))
    table, num_written, num_passes = HostTable(num_rows, MAX_PAGES + 4, pinned=False), 0, 0
    scheduler.update(batch := scheduler.schedule(), [9] * batch.num_sampled)
    while (batch := scheduler.schedule()) is not None:
        table.pages.values = counted = Counted(table.table.numpy()[:, PAGES:])
        table.fill(batch, num_rows, PAD_ROW)
        num_written, num_passes = num_written + len(counted.rows), num_passes + 1
        scheduler.update(batch, [9] * batch.num_sampled)
        assert torch.equal(table.table, filled(HostTable(num_rows, MAX_PAGES + 4, pinned=False), batch))
    pages = sum(-(-(12 + number) // page_size) for number in range(num_rows))
    assert num_passes == 39 and num_written <= pages + 2 * num_rows


class Interrupted:
    """A table's memory, or what stands in it, for which a KeyboardInterrupt comes before a use; `left` counts the uses
    that both have until then."""

    def __init__(self, held, left: list[int]):
        self.held, self.left = held, left

    def _use(self) -> None:
        if self.left[0] == 0:
            raise KeyboardInterrupt
        self.left[0] -= 1

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, key):
        self._use()
        return self.held[key]

    def __setitem__(self, key, value) -> None:
        self._use()
        self.held[key] = value


def fill_interrupted(table: HostTable, batch: Batch, number: int) -> None:
    """Fills the table up to this use of its memory, or of the pages that it remembers."""
    memory, pages, left = table.values, table.pages, [number]
    table.values, written, known = Interrupted(memory, left), pages.values, pages.pages
    pages.values, pages.pages = Interrupted(written, left), Interrupted(known, left)
    try:
        table.fill(batch, NUM_ROWS, PAD_ROW)
    finally:
        table.values, pages.values, pages.pages = memory, written, known


@pytest.mark.parametrize("after", [FIRST, SECOND, THIRD], ids=["the old rows", "the new rows", "others"])
def test_a_table_that_was_interrupted_is_not_believed(after):
    """An interrupt at any point leaves the next table whole."""
    expected = filled(new_table(), after)
    for number in count():
        table = new_table()
        table.fill(FIRST, NUM_ROWS, PAD_ROW)
        try:
            fill_interrupted(table, SECOND, number)
        except KeyboardInterrupt:
            assert torch.equal(filled(table, after), expected), f"interrupted before use {number}"
        else:
            break
    assert number > 10 and torch.equal(table.table, filled(new_table(), SECOND))


def test_pages_begin_where_the_kernel_reads_them():
    assert filled(new_table(), FIRST)[0, PAGES:].tolist() == [1, 2, 3, 0, 0]
