"""A batch survives its packed message, and a message that is not whole is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.request import ON_DEVICE, RowSampling
from penstock.scheduler.cost.pass_work import PassShape

INT32 = st.integers(-(2**31), 2**31 - 1)
COUNT = st.integers(0, 2**31 - 1)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
SAMPLING = st.builds(
    RowSampling, NUMBER, NUMBER, COUNT, NUMBER, NUMBER, NUMBER, NUMBER, st.integers(0, 2**64 - 1), INT32
)
INTS = st.lists(INT32, max_size=6).map(tuple)
ROWS = st.builds(BatchRow, COUNT, INTS, COUNT, INTS, st.booleans(), st.none() | SAMPLING, COUNT)
BATCHES = st.builds(Batch, st.lists(ROWS, max_size=5).map(tuple))


@given(BATCHES)
def test_pack_and_unpack_are_inverse(batch):
    message = batch.pack()
    assert all(type(value) is int and -(2**31) <= value < 2**31 for value in message)
    assert Batch.unpack(message) == batch


def test_unpack_refuses_what_is_not_whole():
    rows = tuple(BatchRow(row, (ON_DEVICE,), 4, (1, 2), True, None) for row in range(2))
    message = Batch(rows).pack()
    for end in range(len(message)):
        with pytest.raises(ValueError, match="does not state its own length"):
            Batch.unpack(message[:end])
        with pytest.raises(ValueError, match="does not state|ends inside a row"):
            Batch.unpack([end, *message[1:end]])
    with pytest.raises(ValueError, match="goes on after its last row"):
        Batch.unpack([len(message) + 1, *message[1:], 0])
    message[5] = -1  # the first row's number of tokens
    with pytest.raises(ValueError, match="ends inside a row"):
        Batch.unpack(message)


def test_counts_of_a_batch():
    row = BatchRow(0, (1, 2, 3), 0, (1,), False, None)
    batch = Batch((row, dataclasses.replace(row, index=1, tokens=(ON_DEVICE,), samples=True)))
    assert (batch.num_tokens, batch.num_sampled) == (4, 1)
    assert batch.shape == PassShape(4, 2, 0, 3 + 2 + 1 + 1, 1, 0)


def test_evicted_tokens_are_no_context():
    row = BatchRow(0, (7, 8), 100, (1, 2), True, None, num_evicted=90)
    assert row.num_cached == 10 and Batch((row,)).shape == PassShape(2, 1, 10, 11 + 12, 0, 12)
