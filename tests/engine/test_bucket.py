"""The table that a decode pass is sent by: whole, whatever it held and wherever its filling was interrupted."""

import sys
from itertools import count

import pytest
import torch

from engine.kernels.decode_inputs import PAGES
from engine.runtime.bucket import HostTable, bucket_sizes
from engine.runtime.sampler import Sampler
from scheduler.batch import Batch, BatchRow
from scheduler.request import RowSampling

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
    """A KeyboardInterrupt before the instruction of `function` with a number, counted as they run."""

    def __init__(self, function, number: int):
        self.code, self.left = function.__code__, number

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, *exc) -> None:
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        if frame.f_code is not self.code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        return self.trace


@pytest.mark.parametrize("after", [FIRST, SECOND, THIRD], ids=["the old rows", "the new rows", "others"])
def test_a_table_that_was_interrupted_is_not_believed(after):
    """Anywhere: what is filled next is whole."""
    expected = filled(new_table(), after)
    for number in count():
        table = new_table()
        table.fill(FIRST, PAD_ROW)
        try:
            with Interrupted(HostTable.fill, number):
                table.fill(SECOND, PAD_ROW)
        except KeyboardInterrupt:
            assert torch.equal(filled(table, after), expected), f"interrupted before instruction {number}"
        else:
            break
    assert number > 100 and torch.equal(table.table, filled(new_table(), SECOND))


def test_penalties_survive_an_interrupt_while_their_state_is_made():
    asked = {0: RowSampling(0.0, 1.0, 0, 0.0, 1.5, 0.0, 0.0, 0, -1)}
    for number in count():
        sampler = Sampler(2, 8, "cpu")
        try:
            with Interrupted(Sampler.set_rows, number):
                sampler.set_rows(asked)
        except KeyboardInterrupt:
            sampler.set_rows(asked)
        else:
            break
        rows = torch.zeros(1, dtype=torch.int64)
        assert sampler(torch.eye(8)[:1], rows, rows, sampler.asked([0])).tokens.tolist() == [0]
    assert number > 100


def test_pages_begin_where_the_kernel_reads_them():
    assert filled(new_table(), FIRST)[0, PAGES:].tolist() == [1, 2, 3, 0, 0]
