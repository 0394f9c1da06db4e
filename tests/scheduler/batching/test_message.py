"""A batch survives its packed message, which holds what changed, and a message that is not whole is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock.scheduler.batching.batch import NO_TOKEN, Batch, BatchRow, History, PromptScores
from penstock.scheduler.batching.host_pages import Move
from penstock.scheduler.batching.message import RowMessages
from penstock.scheduler.batching.request import ON_DEVICE, RowSampling
from penstock.scheduler.cost.pass_work import PassShape

INT32 = st.integers(-(2**31), 2**31 - 1)
COUNT = st.integers(0, 2**31 - 1)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
SAMPLING = st.builds(
    RowSampling, NUMBER, NUMBER, COUNT, NUMBER, NUMBER, NUMBER, NUMBER, st.integers(0, 2**64 - 1), INT32
)
INTS = st.lists(INT32, max_size=6).map(tuple)
HISTORY = st.builds(History, INTS, INTS)
SCORES = st.builds(PromptScores, COUNT, COUNT, INT32)
ROWS = st.builds(
    BatchRow,
    *(st.integers(0, 5) | COUNT, INTS, COUNT, INTS, st.booleans()),
    *(st.none() | SAMPLING, COUNT, HISTORY, st.none() | SCORES),
)
MOVES = st.lists(st.builds(Move, COUNT, COUNT, st.booleans()), max_size=3).map(tuple)
BATCHES = st.builds(Batch, st.lists(ROWS, max_size=5, unique_by=lambda row: row.index).map(tuple), MOVES)


def told(*passes: Batch) -> RowMessages:
    """A side that was told that these passes ran."""
    side = RowMessages()
    for batch in passes:
        side.note(batch)
    return side


@given(st.lists(st.tuples(BATCHES, st.booleans()), max_size=6))
def test_pack_and_unpack_are_inverse(passes):
    """Whatever ran before; a pass that was announced and did not run changes nothing."""
    sender, receiver = RowMessages(), RowMessages()
    for batch, runs in passes:
        message = sender.pack(batch)
        assert all(type(value) is int and -(2**31) <= value < 2**31 for value in message)
        assert receiver.unpack(message) == batch
        for side in (sender, receiver) if runs else ():
            side.note(batch)


def decode(start: int, pages: tuple[int, ...], num_rows: int = 3, **changes) -> Batch:
    row = BatchRow(0, (ON_DEVICE,), start, pages, True, None)
    return Batch(tuple(row._replace(index=index, **changes) for index in range(num_rows)))


def test_a_message_holds_what_changed():
    """The length of a table or of a sequence does not count, but where it is new."""
    many = tuple(range(1, 1000))
    side = told(decode(50, many))
    assert len(side.pack(decode(51, many))) == 3 + 3 * 2
    assert len(side.pack(decode(51, (*many, 5000)))) == 3 + 3 * (2 + 2 + 1)
    assert len(side.pack(decode(51, many, tokens=(7,)))) == 3 + 3 * (2 + 2)
    assert len(side.pack(decode(51, (*many[:10], *many[11:], 7), num_evicted=8))) == 3 + 3 * (2 + 2 + 2 + 989)
    assert len(RowMessages().pack(decode(51, many))) == 3 + 3 * (2 + 2 + 2 + 999)


def test_a_page_table_that_stays_is_the_same_object():
    side = told(decode(50, (1, 2)))
    side.note(first := side.unpack(side.pack(decode(51, (1, 2)))))
    second = side.unpack(side.pack(decode(52, (1, 2))))
    assert all(before.pages is after.pages for before, after in zip(first.rows, second.rows, strict=True))


def test_unpack_refuses_what_is_not_whole():
    before, batch = decode(3, (1,), num_rows=2), decode(4, (1, 2), num_rows=2, tokens=(ON_DEVICE, 9))
    side, message = told(before), told(before).pack(batch)
    for end in range(len(message)):
        with pytest.raises(ValueError, match="does not state its own length"):
            side.unpack(message[:end])
        with pytest.raises(ValueError, match="does not state|ends inside a row"):
            side.unpack([end, *message[1:end]])
    with pytest.raises(ValueError, match="goes on after its last row"):
        side.unpack([len(message) + 1, *message[1:], 0])
    with pytest.raises(ValueError, match="ends inside a row"):  # pages are kept that this side never knew
        RowMessages().unpack(message)
    message[5] = -1  # the first row's number of tokens
    with pytest.raises(ValueError, match="ends inside a row|goes on after its last row"):
        side.unpack(message)


def test_counts_of_a_batch():
    row = BatchRow(0, (1, 2, 3), 0, (1,), False, None)
    batch = Batch.of((row, row._replace(index=1, tokens=(ON_DEVICE,), samples=True)))
    assert (batch.num_tokens, batch.num_sampled) == (4, 1)
    assert batch.shape == PassShape(4, 2, 0, 3 + 2 + 1 + 1, 1, 0, num_chunks=1)
    scored = row._replace(scores=PromptScores(num_top=1, first=1, following=NO_TOKEN))
    assert Batch((scored,)).shape.num_scored == 1 and batch.shape.num_scored == 0


def test_evicted_tokens_are_no_context():
    row = BatchRow(0, (7, 8), 100, (1, 2), True, None, num_evicted=90)
    assert row.num_cached == 10 and Batch((row,)).shape == PassShape(2, 1, 10, 11 + 12, 0, 12, num_chunks=1)
