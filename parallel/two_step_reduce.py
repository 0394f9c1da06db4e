"""The sum of larger tensors over ranks in one kernel, in two steps: every rank sums its share of the elements, and
sends the sums to all.

Shapes: W 32-bit words of a block, size ranks.
push_reduce.py sends each rank's whole part to every other one, which takes longest where parts are large. Here a rank
sends a share of its part to each, and a share of the sums: less in all from three ranks on. Both ways words are their
own flags, halves are taken in turn and the abort word ends a wait, as push_reduce.py explains. So a rank that dies in
such a sum ends no other one, which torch's two-shot kernel cannot promise: it waits for signals and reads no such word.

    rank 0 | send share 1 | sum share 0, send it | take share 1          share: every size-th block of words
    rank 1 | send share 0 | sum share 1, send it | take share 0

Two halves are enough here too: before a rank's call n+1 has ended it has had words from every other rank's call n+1,
since each rank has a share of every sum (`fits_shares`), and those ranks' call n had ended then. A program sends all
that it has before it waits for the first word, and waits for the same program of other ranks alone.
Compiled for sm_90 only, where accesses are of 16 bytes. Not tried: other blocks; sums while parts are still sent.
"""

import torch
from penstock.parallel.push_reduce import (
    DTYPES,
    MAX_PROGRAMS,
    NUM_HALVES,
    WORD_BYTES,
    PeerBuffers,
    as_sent,
    flip,
    load_part,
    take,
)
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"triton": 0}
MOST_BYTES = 16 * 2**20  # of a part
BLOCK_WORDS = 1024
STEPS = (0, 1, 2)  # parts are sent; sums are made and sent; sums are taken
NUM_BUFFERS = 2  # of a half: one for parts, one for sums


def buffer_shape(size: int, most_bytes: int = MOST_BYTES) -> tuple[int, int, int, int]:
    """The shape of PeerBuffers' `words` for parts of so many bytes at most: (NUM_HALVES, NUM_BUFFERS, size, S), where S
    are the words of a share, whole blocks. Each rank writes to its own index of the third dimension: what it has of
    this rank's share, and the sums of its own share."""
    num_blocks = triton.cdiv(most_bytes, BLOCK_WORDS * WORD_BYTES)
    return NUM_HALVES, NUM_BUFFERS, size, triton.cdiv(num_blocks, size) * BLOCK_WORDS


def fits_shares(part: Tensor, size: int) -> bool:
    """Tells whether `two_step_reduce` can sum such parts: each rank has a share."""
    is_whole = part.dtype in DTYPES and part.nbytes % WORD_BYTES == 0
    return HAS_TRITON and is_whole and (size - 1) * BLOCK_WORDS * WORD_BYTES < part.nbytes <= MOST_BYTES


def two_step_reduce(buffers: PeerBuffers, part: Tensor, steps: tuple[int, ...] = STEPS) -> None:
    """Sums a contiguous `part` over ranks, in place, on the caller's stream. Where ranks share a process, as in a test,
    all of them do a step before any does the next one."""
    assert part.is_contiguous(), "two_step_reduce: strides: a part has no gaps"
    assert fits_shares(part, buffers.size)
    calls["triton"] += 1
    words = part.view(-1).view(torch.int32)
    num_turns = triton.cdiv(len(words), BLOCK_WORDS * buffers.size)
    _two_step_reduce[(min(num_turns, MAX_PROGRAMS),)](
        *(part, words, buffers.words, buffers.others, buffers.half, buffers.abort_word),
        *(buffers.rank, buffers.size, len(words), buffers.words.shape[-1]),
        *(triton.next_power_of_2(buffers.size), BLOCK_WORDS, *(step in steps for step in STEPS)),
        num_warps=BLOCK_WORDS // 128,
    )


_NUM_BUFFERS = tl.constexpr(NUM_BUFFERS)


@triton.jit
def _send(own, address, offset, inside):
    """Writes words (W,) to the offsets (W,) of another rank's memory."""
    tl.store(tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16) + offset, own, mask=inside)


@triton.jit
def _sum_as_words(parts, dtype: tl.constexpr):
    """Sums words (RANKS, W), of one or two elements each, over ranks in fp32, rounds to dtype, and returns words that
    may be sent."""
    if dtype.primitive_bitwidth == 32:
        total = tl.sum(parts.to(dtype, bitcast=True), 0).to(tl.int32, bitcast=True)
    else:
        low = tl.sum(parts.to(tl.int16).to(dtype, bitcast=True).to(tl.float32), 0).to(dtype)
        high = tl.sum((parts >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32), 0).to(dtype)
        bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
        total = bits | (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    return as_sent(total)


@triton.jit(do_not_specialize=["rank"])
def _two_step_reduce(
    typed, part, words, others, halves, abort_word, rank, size, num_words, share,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, SENDS: tl.constexpr, SUMS: tl.constexpr, TAKES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = typed.dtype.element_ty
    first, step = tl.program_id(0), tl.num_programs(0)
    num_turns = tl.cdiv(num_words, BLOCK * size)
    word, peer = tl.arange(0, BLOCK), tl.arange(0, RANKS)[:, None]
    half = tl.load(halves + first)
    parts_at, sums_at = half * _NUM_BUFFERS * size * share, (half * _NUM_BUFFERS + 1) * size * share
    if SENDS:
        for turn in tl.range(first, num_turns, step):
            for distance in tl.static_range(len(others)):
                offset = (turn * size + (rank + 1 + distance) % size) * BLOCK + word
                own = load_part(part, offset, offset < num_words)
                _send(own, others[distance], parts_at + rank * share + turn * BLOCK + word, offset < num_words)
    if SUMS:
        for turn in tl.range(first, num_turns, step):
            offset = (turn * size + rank) * BLOCK + word
            inside = offset < num_words
            own = load_part(part, offset, inside)
            awaited = (peer != rank) & (peer < size) & inside[None, :]
            theirs = words + parts_at + peer * share + turn * BLOCK + word[None, :]
            total = _sum_as_words(take(theirs, awaited, tl.where(peer == rank, own[None, :], 0), abort_word), dtype)
            for distance in tl.static_range(len(others)):
                _send(total, others[distance], sums_at + rank * share + turn * BLOCK + word, inside)
            tl.store(part + offset, total, mask=inside)
    if TAKES:
        for turn in tl.range(first, num_turns, step):
            offset = (turn * size + peer) * BLOCK + word[None, :]
            awaited = (peer != rank) & (peer < size) & (offset < num_words)
            theirs = words + sums_at + peer * share + turn * BLOCK + word[None, :]
            sums = take(theirs, awaited, tl.zeros((RANKS, BLOCK), tl.int32), abort_word)
            tl.store(part + offset, sums, mask=awaited)
        flip(halves, half)
