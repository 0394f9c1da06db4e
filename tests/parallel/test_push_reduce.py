"""Sums that ranks push to each other, against sums in fp32 and fp64, word for word, over many calls of many sizes."""

import functools
import random

import pytest
import torch
from penstock.parallel import push_reduce as module
from penstock.parallel.push_reduce import (
    DTYPES,
    EMPTY,
    LEAST_BLOCK_WORDS,
    MAX_PROGRAMS,
    MOST_BYTES,
    fits,
    fits_rows,
    push_reduce,
)

from tests.support.emulated_ranks import (
    DENSE,
    SIZES,
    assert_at_rest,
    connect_ranks,
    no_hang,
    run_together,
    sum_of,
    write_late,
)
from tests.support.kernel_proof import (
    DEVICE,
    adversarial,
    counted,
    equal,
    prove,
    prove_refusal,
    same_bits,
    within,
)


def sum_everywhere(peers, parts):
    """Sums on all ranks; returns the result of each."""
    summed = [part.clone() for part in parts]
    run_together(functools.partial(push_reduce, *rank) for rank in zip(peers, summed))
    return summed


def parts_of(size, shape, dtype, seed=0):
    return [adversarial(*shape, dtype, seed=100 * seed + rank) for rank in range(size)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_sum_of_all_parts_on_all_ranks(size, dtype):
    """Rows are of all kinds; the length is no multiple of a block."""
    peers, parts = connect_ranks(size), parts_of(size, (9, 130), dtype)
    summed = sum_everywhere(peers, parts)
    assert all(same_bits(summed[0], other) for other in summed[1:])
    if size == 2:  # one addition has one order
        equal(summed[0], sum_of(parts))
    exact, sizes = sum(part.double() for part in parts), sum(part.double().abs() for part in parts)
    in_fp32 = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    within(0.5 + size * in_fp32, scale=in_fp32 * sizes.nan_to_num())(summed[0], exact)
    assert_at_rest(peers, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wherever_a_part_starts(dtype):
    """A part may start at any word; memory around it is not written."""
    part, other = parts_of(2, (3, 130), dtype)

    def kernel(part):
        here, there = connect_ranks(2)
        with no_hang():
            push_reduce(there, other, collects=False)
            push_reduce(here, part)

    prove(kernel, lambda part: part.copy_(sum_of([part, other])), {"part": part}, ("part",), equal, DENSE)


def test_strides_with_gaps_are_refused():
    prove_refusal(functools.partial(push_reduce, connect_ranks(2)[0]), {"part": torch.ones(4, 8, device=DEVICE)})


def test_calls_of_any_sizes_follow_each_other():
    """Halves alternate by call, whatever was summed before: a call neither finds nor awaits words of an earlier one."""
    peers, sizes = connect_ranks(2), random.Random(0)
    for index in range(9):
        dtype = DTYPES[index % 3]
        most = MOST_BYTES // dtype.itemsize if index == 4 else 3000
        parts = parts_of(2, (1, 2 * sizes.randint(1, most // 2)), dtype, seed=index)
        for summed in sum_everywhere(peers, parts):
            equal(summed, sum_of(parts))
        assert_at_rest(peers, index + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_that_holds_the_empty_word(dtype):
    """Such words are NaNs, arrive as NaNs, and leave their neighbours as they are."""
    parts = [torch.ones(8, dtype=dtype, device=DEVICE) for _ in range(3)]
    per_word = 4 // dtype.itemsize
    parts[1].view(torch.int32)[2] = EMPTY
    expected = torch.full((8,), 3.0, dtype=dtype, device=DEVICE)
    expected[2 * per_word : 3 * per_word] = float("nan")
    for summed in sum_everywhere(connect_ranks(3), parts):
        equal(summed, expected)


def test_words_that_look_like_others():
    """Words join every pattern of a bf16 with a half of the empty word."""
    patterns = torch.arange(1 << 16, device=DEVICE).to(torch.int16)
    part = torch.stack([patterns, torch.full_like(patterns, -1)], 1).flatten().view(torch.bfloat16)
    summed = sum_everywhere(connect_ranks(2), [part, torch.zeros_like(part)])
    equal(summed[0], part)
    assert same_bits(*summed)


def test_an_element_does_not_depend_on_what_stands_beside_it():
    peers, parts = connect_ranks(4), parts_of(4, (6, 2 * LEAST_BLOCK_WORDS), torch.bfloat16)
    whole = sum_everywhere(peers, parts)[0]
    single = sum_everywhere(peers, [part[5:].clone() for part in parts])[0]
    assert same_bits(whole[5:], single)


def test_who_comes_early_waits_in_the_other_half():
    """Rank 0 is a call ahead: its push does not touch what rank 1 has not yet read."""
    peers = connect_ranks(2)
    first, second = ([torch.full((64,), value + rank, device=DEVICE) for rank in range(2)] for value in (1.0, 10.0))
    with no_hang():
        push_reduce(peers[1], first[1], collects=False)
        push_reduce(peers[0], first[0])
        push_reduce(peers[0], second[0], collects=False)
        push_reduce(peers[1], first[1], pushes=False)
        push_reduce(peers[1], second[1])
        push_reduce(peers[0], second[0], pushes=False)
    assert all((part == 3.0).all() for part in first) and all((part == 21.0).all() for part in second)
    assert_at_rest(peers, 2)


def test_the_abort_word_ends_a_wait_for_a_rank_that_is_gone():
    """The call ends; its result means nothing."""
    peers = connect_ranks(2)
    part = torch.ones(4 * LEAST_BLOCK_WORDS, device=DEVICE)
    peers[0].abort_word.fill_(1)
    with no_hang():
        push_reduce(peers[0], part)


def test_an_abort_word_that_is_not_set_ends_nothing():
    """A part comes late, after the word was read many times, and is summed."""
    peers, part = connect_ranks(2), torch.ones(64, device=DEVICE)
    late = write_late(1.0, peers[0].words[0, 1, :64], part)
    with no_hang():
        push_reduce(peers[0], part)
    late.join()
    assert (part == 2).all()


def test_what_fits():
    for dtype in DTYPES:
        most = torch.empty(MAX_PROGRAMS, MOST_BYTES // MAX_PROGRAMS // dtype.itemsize, dtype=dtype)
        assert fits(most) and fits_rows(most) and not fits(most.new_empty(most.numel() + 2))
        assert not fits_rows(most.new_empty(MAX_PROGRAMS + 1, 2))
    assert not fits(torch.empty(3, dtype=torch.bfloat16)) and not fits(torch.empty(4, dtype=torch.float64))
    odd_rows = torch.empty(2, 3, dtype=torch.bfloat16)
    assert fits(odd_rows) and not fits_rows(odd_rows)


def test_calls_are_counted():
    with counted(module.calls, triton=4):
        sum_everywhere(connect_ranks(2), parts_of(2, (1, 8), torch.float32))
