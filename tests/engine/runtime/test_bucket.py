"""The table that a decode pass is sent by: whole, whatever it held and wherever its filling was interrupted."""

from itertools import count

import pytest
import torch
from penstock.engine.compute.sampler import Sampler
from penstock.engine.kernels.decode_inputs import PAGES
from penstock.engine.runtime.bucket import HostTable, bucket_sizes
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.request import RowSampling

PAD_ROW, NUM_ROWS, MAX_PAGES = 9, 4, 5


def batch_of(*pages: tuple[int, ...]) -> Batch:
    """A row for each page table."""
    return Batch(tuple(BatchRow(row, (7 + row,), 20 + row, own, True, None) for row, own in enumerate(pages)))


FIRST = batch_of((1, 2, 3), (4,), (5, 6))
SECOND = batch_of((8,), (4,), (5, 6, 7), (10, 11))  # shorter, the same, longer, new
THIRD = batch_of((8,))


def filled(table: HostTable, batch: Batch) -> torch.Tensor:
    table.fill(batch, PAD_ROW)
    return table.table.clone()


def new_table() -> HostTable:
    return HostTable(NUM_ROWS, MAX_PAGES, pinned=False)


def test_sizes_end_with_the_most_rows():
    assert bucket_sizes(1) == [1] and bucket_sizes(2) == [1, 2] and bucket_sizes(9) == [1, 2, 3, 4, 6, 8, 9]
    assert all(bucket_sizes(most)[-1] == most for most in range(1, 300))


def test_a_table_by_hand():
    table = filled(new_table(), SECOND)
    assert table[2].tolist() == [9, 22, 2, 23, 5, 6, 7, 0, 0]
    assert filled(new_table(), THIRD)[1:].tolist() == [[0, 0, PAD_ROW, 0, *[0] * MAX_PAGES]] * 3


def test_a_table_is_the_same_whatever_it_held():
    table = new_table()
    for batch in (FIRST, SECOND, THIRD, FIRST, THIRD, SECOND):
        assert torch.equal(filled(table, batch), filled(new_table(), batch))


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
    memory, pages, left = table.table, table.pages, [number]
    table.table, table.pages = Interrupted(memory, left), Interrupted(pages, left)
    try:
        table.fill(batch, PAD_ROW)
    finally:
        table.table, table.pages = memory, pages


@pytest.mark.parametrize("after", [FIRST, SECOND, THIRD], ids=["the old rows", "the new rows", "others"])
def test_a_table_that_was_interrupted_is_not_believed(after):
    """An interrupt at any point leaves the next table whole."""
    expected = filled(new_table(), after)
    for number in count():
        table = new_table()
        table.fill(FIRST, PAD_ROW)
        try:
            fill_interrupted(table, SECOND, number)
        except KeyboardInterrupt:
            assert torch.equal(filled(table, after), expected), f"interrupted before use {number}"
        else:
            break
    assert number > 10 and torch.equal(table.table, filled(new_table(), SECOND))


@pytest.mark.parametrize("allocated", [0, 1])
def test_penalties_survive_an_interrupt_while_their_state_is_made(allocated, monkeypatch):
    asked = {0: RowSampling(0.0, 1.0, 0, 0.0, 1.5, 0.0, 0.0, 0, -1)}
    sampler = Sampler(2, 8, "cpu")
    allocate, left = sampler._zeros, iter(range(allocated))

    def interrupted(*shape, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return allocate(*shape, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sampler, "_zeros", interrupted)
        sampler.set_rows(asked)
    sampler.set_rows(asked)
    rows = torch.zeros(1, dtype=torch.int64)
    assert sampler(torch.eye(8)[:1], rows, rows, sampler.asked([0])).tokens.tolist() == [0]


def test_pages_begin_where_the_kernel_reads_them():
    assert filled(new_table(), FIRST)[0, PAGES:].tolist() == [1, 2, 3, 0, 0]
