"""Sizes and ranges of ranks: together they are the whole, and each is what the others expect."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock.engine.model.shard import (
    HeadShard,
    check_tp_size,
    local_ffn_size,
    local_range,
    local_vocab_size,
    pad_to,
    shard_heads,
    tp_sizes,
)


@st.composite
def heads(draw):
    """Triples num_heads, num_kv_heads, tp_size that are possible at all."""
    num_kv_heads = draw(st.integers(1, 16))
    num_heads = num_kv_heads * draw(st.integers(1, 12))
    return num_heads, num_kv_heads, draw(st.sampled_from(tp_sizes(num_heads)))


@given(heads())
def test_ranks_hold_every_query_head_once_and_in_order(sizes):
    num_heads, _, tp_size = sizes
    shards = [shard_heads(*sizes, rank) for rank in range(tp_size)]
    held = [head for s in shards for head in range(s.first_head, s.first_head + s.num_heads)]
    assert held == list(range(num_heads))


@given(heads())
def test_local_query_heads_find_their_kv_head_by_position(sizes):
    num_heads, num_kv_heads, tp_size = sizes
    for rank in range(tp_size):
        shard = shard_heads(*sizes, rank)
        assert shard.num_heads % len(shard.kv_heads) == 0
        per_kv_head = shard.num_heads // len(shard.kv_heads)
        for local in range(shard.num_heads):
            global_kv_head = (shard.first_head + local) // (num_heads // num_kv_heads)
            assert shard.kv_heads[local // per_kv_head] == global_kv_head


@given(heads())
def test_kv_heads_are_held_no_more_often_than_needed(sizes):
    num_heads, num_kv_heads, tp_size = sizes
    counts = {len(shard_heads(*sizes, rank).kv_heads) for rank in range(tp_size)}
    if num_kv_heads % tp_size == 0:
        assert counts == {num_kv_heads // tp_size}
    elif tp_size % num_kv_heads == 0:
        assert counts == {1}
    else:
        assert counts == {num_heads // tp_size}


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, tp_size, rank, expected",
    [
        (32, 8, 4, 1, HeadShard(8, 8, (2, 3))),  # cut
        (32, 8, 16, 3, HeadShard(6, 2, (1,))),  # shared by two ranks
        (32, 1, 2, 1, HeadShard(16, 16, (0,))),  # MQA
        (12, 3, 2, 0, HeadShard(0, 6, (0, 0, 0, 0, 1, 1))),  # 3 over 2 ranks: repeated
        (12, 3, 2, 1, HeadShard(6, 6, (1, 1, 2, 2, 2, 2))),
        (6, 2, 3, 1, HeadShard(2, 2, (0, 1))),
        (8, 8, 1, 0, HeadShard(0, 8, tuple(range(8)))),
    ],
)
def test_known_shards(num_heads, num_kv_heads, tp_size, rank, expected):
    assert shard_heads(num_heads, num_kv_heads, tp_size, rank) == expected


@given(st.integers(1, 400), st.integers(1, 16))
def test_ranges_of_ffn_and_vocab_join_to_the_whole(size, tp_size):
    for local in (local_ffn_size(size, tp_size, 16), local_vocab_size(size, tp_size)):
        ranges = [local_range(size, local, rank) for rank in range(tp_size)]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
        assert all(0 <= stop - start <= local for start, stop in ranges)
        assert all(start == rank * local for rank, (start, stop) in enumerate(ranges) if stop > start)


@given(st.integers(1, 400), st.integers(1, 16))
def test_padding_is_the_least_that_fits(size, tp_size):
    ffn, vocab = local_ffn_size(size, tp_size, 16), local_vocab_size(size, tp_size)
    assert ffn % 16 == 0 and ffn * tp_size >= size > (ffn - 16) * tp_size
    assert vocab * tp_size >= size > (vocab - 1) * tp_size


def test_sizes_of_known_models():
    assert local_ffn_size(14336, 8, 256) == 14336 // 8
    assert local_vocab_size(128256, 8) == 128256 // 8
    assert local_range(5, 2, 3) == (5, 5)  # only padding is left
    assert (pad_to(0, 16), pad_to(1, 16), pad_to(16, 16)) == (0, 16, 16)


@pytest.mark.parametrize("tp_size", [0, -1, 5, 64])
def test_impossible_tp_size_is_refused_with_the_possible_ones(tp_size):
    message = f"tensor_parallel_size={tp_size} does not divide the 12 query heads; possible: 1, 2, 3, 4, 6, 12$"
    with pytest.raises(ValueError, match=message):
        check_tp_size(tp_size, 12)
    with pytest.raises(ValueError, match=message):
        shard_heads(12, 4, tp_size, 0)
