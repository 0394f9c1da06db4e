"""The work of the host for a request, counted in Python's own instructions: it depends neither on how many others wait
or run nor, before its turn, on how long its prompt is."""

import sys
from collections.abc import Callable

import numpy
import pytest
import torch
from penstock.engine.compute import bind
from penstock.engine.compute.bind import Binder
from penstock.engine.compute.page_table import PageTable
from penstock.engine.compute.paged import Cutting
from penstock.engine.kernels.decode_inputs import PAGES
from penstock.engine.kernels.decode_work import reaches_of
from penstock.engine.kernels.segments import Segments
from penstock.engine.loop import Loop
from penstock.engine.output import Sequence
from penstock.engine.runtime.bucket import HostTable
from penstock.engine.runtime.bucket_sizes import BucketSizes
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.request import FinishReason, Request, SamplingParams
from penstock.scheduler.batching.scheduler import Scheduler

from tests.support.fake_engine import FakeEngine

TOKEN, NUM_ROWS, LENGTH = 7, 4, 3
FEW, MANY = 10, 10_000
FEW_ROWS, MANY_ROWS, PAGE = 64, 256, 16


class Compared(Request):
    """A request whose comparison with another one is an instruction too, so that a search through a list is seen."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


def sequence(number: int, num_prompt: int = 5) -> Sequence:
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
    return Sequence(Compared(number, [1] * num_prompt, params), 0, None, {})


def scheduler(num_rows: int = NUM_ROWS) -> Scheduler:
    return Scheduler(num_rows, 2**16, 2**15, PAGE, num_pages=2**16, prefix_caching=True)


def loop_with(num_waiting: int) -> tuple[Loop, list[Sequence]]:
    """A loop whose rows are all taken, and those that wait."""
    loop = Loop(scheduler(), FakeEngine(TOKEN))
    sequences = [sequence(number) for number in range(NUM_ROWS + num_waiting)]
    for one in sequences:
        loop.add(one)
    loop.advance()
    assert (loop.scheduler.num_running, loop.scheduler.num_waiting) == (NUM_ROWS, num_waiting)
    return loop, sequences[NUM_ROWS:]


def work_of(call: Callable[[], object]) -> int:
    """The number of instructions of Python that `call` runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def work_a_row(work: Callable[[int], int]) -> float:
    """The instructions that a row adds to the work of so many rows."""
    return (work(MANY_ROWS) - work(FEW_ROWS)) / (MANY_ROWS - FEW_ROWS)


def work_of_pass(num_rows: int, num_passes: int) -> int:
    """The instructions of the pass behind so many, in which all rows have been since the first: it is scheduled, and
    the tokens of the one before it are taken in."""
    loop = Loop(scheduler(num_rows), FakeEngine(TOKEN))
    loop.engine.lookahead = 1
    for number in range(num_rows):
        params = SamplingParams(max_tokens=2 * PAGE, ignore_eos=True)
        loop.add(Sequence(Request(number, [number] * PAGE, params), 0, None, {}))
    for _ in range(num_passes):
        loop.advance()
    requests, events = loop.scheduler.seated, []
    num_pages = [len(request.pages) for request in requests]
    done = work_of(lambda: events.extend(loop.advance()))
    assert [(event.text, event.is_last) for event in events] == [("", False)] * num_rows
    grown = [len(request.pages) - before for request, before in zip(requests, num_pages)]
    assert grown == [num_passes == PAGE + 1] * num_rows
    return done


def test_a_row_that_decodes_on_costs_few_instructions_a_pass():
    """Nothing but its token is new. With a page more its tokens enter the prefix cache, and its page table is made."""
    assert work_a_row(lambda num_rows: work_of_pass(num_rows, PAGE - 2)) < 340
    assert work_a_row(lambda num_rows: work_of_pass(num_rows, PAGE + 1)) < 700


def decoding(num_rows: int, start: int, pages: tuple[int, ...]) -> Batch:
    return Batch.of([BatchRow(index, (TOKEN,), start, pages, True, None) for index in range(num_rows)])


def work_of_binding(num_rows: int) -> int:
    """The instructions that bind a pass over rows of 40 pages, which goes on where the one before it ended."""
    lasts, windows = torch.zeros(num_rows, dtype=torch.int64), (None,)
    cutting = Cutting(Segments(1, 640, 2**16), windows, reaches_of(windows, lasts.device), torch.empty(2**16))
    binder = Binder(16, 0, lasts, 640, cutting, PageTable(numpy.zeros((num_rows, 40), numpy.int32)))
    before, batch = (decoding(num_rows, start, tuple(range(40))) for start in (600, 601))
    binder.bind(before)
    return work_of(lambda: binder.bind(batch))


def work_of_padding(num_rows: int, *pages: int) -> int:
    """The instructions that size, describe and write a padded pass over rows that get these pages more."""
    sizes = BucketSizes(0, num_rows, Segments(1, 640, 2**16))
    table, old = HostTable(num_rows, 40, pinned=False), tuple(range(1, 20))
    table.fill(decoding(num_rows, 300, old), num_rows, num_rows)
    batch = decoding(num_rows, 304, (*old, *pages) if pages else old)
    done = work_of(lambda: (sizes.find(batch), batch.shape, table.fill(batch, num_rows, num_rows)))
    assert table.table[-1, PAGES + len(old)] == sum(pages) and batch.shape.num_tokens == num_rows
    return done


def test_a_row_that_keeps_its_pages_costs_next_to_nothing_to_bind(monkeypatch):
    """The host binds passes of a thousand rows and more while others run; their pages were written when they came."""
    monkeypatch.setattr(bind, "list_work", lambda *_: None)  # a GPU's work
    assert work_a_row(work_of_binding) < 65
    assert work_a_row(work_of_padding) < 10
    assert work_a_row(lambda num_rows: work_of_padding(num_rows, 77)) < 75


EVENTS: dict[str, Callable[[Loop, list[Sequence]], None]] = {
    "one_comes": lambda loop, waiting: loop.add(sequence(10**6)),
    "the_next_is_aborted": lambda loop, waiting: loop.abort(waiting[0].request.id, "gone"),
    "one_in_the_middle_is_aborted": lambda loop, waiting: loop.abort(waiting[len(waiting) // 2].request.id, "gone"),
    "the_last_is_aborted": lambda loop, waiting: loop.abort(waiting[-1].request.id, "gone"),
    "one_that_runs_is_aborted": lambda loop, waiting: loop.abort(0, "gone"),
}


@pytest.mark.parametrize("event", EVENTS)
def test_what_happens_to_one_costs_the_same_however_many_wait(event):
    def work(num_waiting: int) -> int:
        loop, waiting = loop_with(num_waiting)
        done = work_of(lambda: (EVENTS[event](loop, waiting), loop.advance()))
        loop.scheduler.check_integrity()
        return done

    assert work(FEW) == work(MANY) > 100


def test_rows_end_and_are_taken_again_at_the_same_cost_however_many_wait():
    def work(num_waiting: int) -> int:
        loop, waiting = loop_with(num_waiting)
        done = work_of(lambda: [loop.advance() for _ in range(LENGTH)])
        assert [one.request.row is None for one in waiting[: NUM_ROWS + 1]] == [False] * NUM_ROWS + [True]
        return done

    assert work(FEW) == work(MANY) > 100


def test_the_end_of_a_row_costs_the_same_however_many_run():
    def work(num_rows: int) -> int:
        deciding = scheduler(num_rows)
        requests = [sequence(number).request for number in range(num_rows)]
        for request in requests:
            deciding.add(request)
        assert len(deciding.schedule().rows) == num_rows
        return work_of(lambda: deciding.finish(requests[num_rows // 2], FinishReason.ABORT))

    assert work(2) == work(256) > 10


def test_a_prompt_costs_nothing_before_its_turn_however_long_it_is():
    def work(num_prompt: int) -> int:
        loop, _ = loop_with(FEW)
        return work_of(lambda: (loop.add(sequence(10**6, num_prompt)), loop.advance()))

    assert work(5) == work(2**14) > 100
