"""Sums in which each rank sums a share, against sums in fp32 and fp64, word for word, over many calls of many sizes."""

import functools
import random

import pytest
import torch
from penstock.parallel import two_step_reduce as module
from penstock.parallel.push_reduce import DTYPES, EMPTY, NUM_HALVES, WORD_BYTES
from penstock.parallel.two_step_reduce import BLOCK_WORDS, MOST_BYTES, STEPS, buffer_shape, fits_shares, two_step_reduce
from torch import Tensor

from tests.support import sharing_ranks
from tests.support.emulated_ranks import (
    DENSE,
    SIZES,
    assert_at_rest,
    connect_sharing_ranks,
    no_hang,
    run_in_steps,
    sum_of,
    write_late,
)
from tests.support.forked_ranks import fork_ranks
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

BLOCK_BYTES = BLOCK_WORDS * WORD_BYTES
MOST = 32 * BLOCK_BYTES  # of a part here


def words_of(num_words: int, dtype: torch.dtype, seed: int) -> Tensor:
    return adversarial(1, num_words * WORD_BYTES // dtype.itemsize, dtype, seed=seed)


def parts_of(size: int, num_words: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    return [words_of(num_words, dtype, 100 * seed + rank) for rank in range(size)]


def sum_everywhere(peers, parts: list[Tensor]) -> list[Tensor]:
    """Sums on all ranks; returns the result of each."""
    summed = [part.clone() for part in parts]
    run_in_steps(functools.partial(two_step_reduce, *rank) for rank in zip(peers, summed))
    return summed


@pytest.mark.parametrize(("size", "dtype"), [*((2, dtype) for dtype in DTYPES), *zip((3, 4, 8), DTYPES)], ids=str)
def test_the_sum_of_all_parts_on_all_ranks(size, dtype, monkeypatch):
    """Two programs take turns, the last of them with a part of a block, or with none for some ranks."""
    monkeypatch.setattr(module, "MAX_PROGRAMS", 2)
    peers, parts = connect_sharing_ranks(size, MOST), parts_of(size, 20 * BLOCK_WORDS + 77, dtype)
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
    part, other = parts_of(2, BLOCK_WORDS + 5, dtype)

    def kernel(part):
        pairs = zip(connect_sharing_ranks(2, MOST), (part, other.clone()))
        run_in_steps(functools.partial(two_step_reduce, *rank) for rank in pairs)

    prove(kernel, lambda part: part.copy_(sum_of([part, other])), {"part": part}, ("part",), equal, DENSE)


def test_calls_of_any_sizes_follow_each_other():
    """Halves alternate by call, whatever was summed before: a call neither finds nor awaits words of an earlier one."""
    peers, sizes = connect_sharing_ranks(2, MOST), random.Random(0)
    for index in range(5):
        num_words = MOST // WORD_BYTES if index == 2 else sizes.randint(BLOCK_WORDS + 1, 5 * BLOCK_WORDS)
        parts = parts_of(2, num_words, DTYPES[index % 3], seed=index)
        for summed in sum_everywhere(peers, parts):
            equal(summed, sum_of(parts))
        assert_at_rest(peers, index + 1)


def test_who_comes_early_waits_in_the_other_half():
    """Rank 0 is a call ahead: what it sends does not touch what rank 1 has not yet read."""
    peers = connect_sharing_ranks(2, MOST)
    first, second = (
        [torch.full((2 * BLOCK_WORDS,), value + rank, device=DEVICE) for rank in range(2)] for value in (1.0, 10.0)
    )
    with no_hang():
        two_step_reduce(peers[1], first[1], steps=(0,))
        two_step_reduce(peers[0], first[0], steps=(0, 1))
        two_step_reduce(peers[1], first[1], steps=(1,))
        two_step_reduce(peers[0], first[0], steps=(2,))
        two_step_reduce(peers[0], second[0], steps=(0,))
        two_step_reduce(peers[1], first[1], steps=(2,))
        two_step_reduce(peers[1], second[1], steps=(0, 1))
        two_step_reduce(peers[0], second[0], steps=(1, 2))
        two_step_reduce(peers[1], second[1], steps=(2,))
    assert all((part == 3.0).all() for part in first) and all((part == 21.0).all() for part in second)
    assert_at_rest(peers, 2)


@pytest.mark.skipif(DEVICE != "cpu", reason="of interpreted kernels; tests/gpu/test_push_reduce.py has real ranks")
def test_ranks_at_their_own_pace(tmp_path):
    """Three processes that share memory make the same calls one after another, in one step and in two."""
    sharing_ranks.write_buffers(tmp_path)
    done = fork_ranks(sharing_ranks.RANKS, "-m", "tests.support.sharing_ranks", tmp_path, timeout=120)
    assert done.all_ended, done.stderr
    assert all(set(path.read_bytes()) == {0xFF} for path in tmp_path.iterdir()), "a word is left that nobody took"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_part_that_holds_the_empty_word(dtype):
    """Such words are NaNs, arrive as NaNs in either step, and leave their neighbours as they are."""
    per_word, marked = WORD_BYTES // dtype.itemsize, [2, 2 * BLOCK_WORDS - 1, 2 * BLOCK_WORDS + 4]
    parts = [torch.ones(3 * BLOCK_WORDS * per_word, dtype=dtype, device=DEVICE) for _ in range(3)]
    expected = torch.full_like(parts[0], 3.0)
    for rank, word in enumerate(marked):
        parts[rank].view(torch.int32)[word] = EMPTY
        expected[word * per_word : (word + 1) * per_word] = float("nan")
    peers = connect_sharing_ranks(3, MOST)
    for summed in sum_everywhere(peers, parts):
        equal(summed, expected)
    assert_at_rest(peers, 1)


@pytest.mark.parametrize("steps", [(1,), (2,), STEPS])
def test_the_abort_word_ends_every_wait_for_a_rank_that_is_gone(steps):
    """The call ends; its result means nothing."""
    peers, part = connect_sharing_ranks(3, MOST), torch.ones(3 * BLOCK_WORDS, device=DEVICE)
    peers[0].abort_word.fill_(1)
    with no_hang():
        two_step_reduce(peers[0], part, steps)


def test_an_abort_word_that_is_not_set_ends_nothing():
    """A part and sums come late, after the word was read many times, and are taken."""
    peers, part = connect_sharing_ranks(2, MOST), torch.ones(2 * BLOCK_WORDS, device=DEVICE)
    (theirs, sums), ones = peers[0].words[0, :, 1, :BLOCK_WORDS], torch.ones(BLOCK_WORDS, device=DEVICE)
    late = [write_late(0.7, theirs, ones), write_late(1.4, sums, 5 * ones)]
    with no_hang():
        two_step_reduce(peers[0], part)
    for one in late:
        one.join()
    assert (part[:BLOCK_WORDS] == 2).all() and (part[BLOCK_WORDS:] == 5).all()


@pytest.mark.parametrize("size", SIZES)
def test_what_fits(size):
    for dtype in DTYPES:
        most = torch.empty(MOST_BYTES // dtype.itemsize, dtype=dtype)
        assert fits_shares(most, size) and not fits_shares(most.new_empty(len(most) + 2), size)
        least = (size - 1) * BLOCK_BYTES // dtype.itemsize + WORD_BYTES // dtype.itemsize
        assert fits_shares(most[:least], size) and not fits_shares(most[: least - WORD_BYTES // dtype.itemsize], size)
    assert not fits_shares(torch.empty(2**20 + 1, dtype=torch.bfloat16), size)
    assert not fits_shares(torch.empty(2**20, dtype=torch.float64), size)
    halves, buffers, ranks, words = buffer_shape(size)
    assert (halves, buffers, ranks) == (NUM_HALVES, 2, size)
    assert MOST_BYTES <= words * size * WORD_BYTES < MOST_BYTES + size * BLOCK_BYTES and words % BLOCK_WORDS == 0


def test_strides_with_gaps_are_refused():
    refused = functools.partial(two_step_reduce, connect_sharing_ranks(2, MOST)[0])
    prove_refusal(refused, {"part": torch.ones(4, 2 * BLOCK_WORDS, device=DEVICE)})


def test_calls_are_counted():
    with counted(module.calls, triton=6):
        sum_everywhere(connect_sharing_ranks(2, MOST), parts_of(2, 2 * BLOCK_WORDS, torch.float32))
