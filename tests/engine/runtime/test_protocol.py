"""The messages of ranks about passes: heard as they were said, also where some never run; nothing is made for
nobody."""

import random
from collections import deque

import pytest
from penstock.engine.runtime.calls import MEASURE, Call
from penstock.engine.runtime.protocol import Kind, Messages
from penstock.parallel.collectives import Solo
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.request import ON_DEVICE


class Pipe:
    """Two ranks' way for ints: what rank 0 has said, the other one takes."""

    size = 2

    def __init__(self):
        self.said: deque[list[int]] = deque()
        self.num_ints = 0

    def broadcast_ints(self, ints: list[int] | None) -> list[int]:
        if ints is None:
            return self.said.popleft()
        self.said.append(list(ints))
        self.num_ints += len(ints)
        return ints


def decode(step: int, num_rows: int, num_pages: int) -> Batch:
    """A decode pass: a row gets a page every 16 steps."""
    pages = tuple(range(1, num_pages + step // 16))
    return Batch(tuple(BatchRow(row, (ON_DEVICE,), 100 + step, pages, True, None) for row in range(num_rows)))


def test_an_announced_pass_counts_once_it_runs():
    pipe, rng = Pipe(), random.Random(0)
    rank_0, other = Messages(pipe), Messages(pipe)
    step = 0
    for _ in range(200):
        batch, choice = decode(step, num_rows=rng.randint(1, 4), num_pages=5), rng.random()
        kind = Kind.BATCH if choice < 0.4 else Kind.ANNOUNCED
        rank_0.say_batch(kind, batch)
        assert other.hear() == (kind, batch)
        if choice > 0.7:
            rank_0.say_run()
            assert other.hear() == (Kind.RUN, batch)
        step += choice < 0.4 or choice > 0.7  # else it is withdrawn
    assert step > 50 and not pipe.said


def test_a_row_that_decodes_costs_two_numbers():
    pipe = Pipe()
    rank_0 = Messages(pipe)
    rank_0.say_batch(Kind.BATCH, decode(0, num_rows=256, num_pages=100))
    before = pipe.num_ints
    for step in range(1, 17):
        rank_0.say_batch(Kind.BATCH, decode(step, num_rows=256, num_pages=100))
    assert pipe.num_ints - before <= 16 * (256 * 2 + 4) + 256 * 3


def test_an_announced_pass_that_never_runs_changes_nothing():
    """The rows of the pass that runs instead go on from the one that ran last."""
    pipe = Pipe()
    rank_0 = Messages(pipe)
    rank_0.say_batch(Kind.BATCH, decode(0, num_rows=256, num_pages=100))
    rank_0.say_batch(Kind.ANNOUNCED, decode(1, num_rows=256, num_pages=100))
    before = pipe.num_ints
    rank_0.say_batch(Kind.BATCH, decode(1, num_rows=256, num_pages=100))
    assert pipe.num_ints - before == 256 * 2 + 4


@pytest.mark.parametrize(
    "call", [Call("generate", b"12\1", number=3), Call(MEASURE, argument=-1), Call("", refusal="é")]
)
def test_a_call_is_heard_as_it_was_said(call):
    pipe = Pipe()
    Messages(pipe).say_call(call)
    assert Messages(pipe).hear() == (Kind.CALL, call)


class Untouched:
    """A thing that a single rank must neither pack nor turn into JSON."""

    def __getattr__(self, name: str):
        raise AssertionError(f"{name} of something that nobody reads")


def test_one_rank_packs_nothing():
    messages = Messages(Solo())
    messages.say_batch(Kind.BATCH, Untouched())
    messages.say_batch(Kind.ANNOUNCED, Untouched())
    messages.say_run()
    messages.say_call(Untouched())
    assert messages.give_outputs([Untouched()], {"rank": 0}) == [{"rank": 0}]
