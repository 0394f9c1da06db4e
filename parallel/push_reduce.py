"""The sum of small tensors over ranks in one kernel: every rank writes its part into every other rank's memory.

Shapes: W 32-bit words of a program, size ranks.
The time of a sum of a few KiB is all latency. Reading peers' memory costs a barrier, a round trip and a second barrier;
a write goes one way and is its own flag, since a word that holds EMPTY has not arrived. A rank polls its own memory
until no word is EMPTY, empties the words for a later call, sums in fp32 and rounds once. Data and flag are one aligned
word of 32 bits, which nobody sees half written, and polls are volatile loads (relaxed, of system scope, past L1), so no
fence is needed. EMPTY is a NaN in every dtype; a part that holds this very word sends another NaN instead. All ranks
sum the same words in the same order, so they get the same bits, whatever other elements the tensor has.

Calls take the two halves of the buffer, h0 and h1, in turn. Which half is next is noted in device memory, where each
call, eager or replayed, flips it. Two halves are enough:

    rank 0 | call n: push h0, poll, empty h0 | call n+1: push h1, poll h1 .................... | call n+2: push h0
    rank 1 | call n: push h0, poll ................... empty h0 | call n+1: push h1, poll h1 ...
                                                                            `-> rank 0 goes on

A kernel starts when the one before it on its rank has ended. Rank 0 pushes call n+2 after its call n+1 has ended. That
call waited for a part of rank 1's call n+1, which started after rank 1's call n had ended and so had read and emptied
h0. A call may sum any size, since a half belongs to a whole call.

A program waits for the same program of every peer, and pushes before it polls. MAX_PROGRAMS programs run on a device
together, so none waits for one that cannot start. If a rank is gone, the others poll until the abort word, in their own
host memory, is 1; they read it in one of POLLS_A_CHECK turns. Their sums then mean nothing.
Tried, compiled for sm_90 only: accesses of 16 bytes; peers' addresses as arguments, since loaded ones delay the pushes.
Not tried: threads that poll their own words alone, clusters.
"""

from dataclasses import dataclass

import torch
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"triton": 0}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_BYTES = 2**20  # of a part: for larger ones sending all to every rank took longer than torch's two-shot
MAX_PROGRAMS = 128  # an H200 has 132 SMs
NUM_HALVES = 2
WORD_BYTES = 4
PART_WORDS = MOST_BYTES // WORD_BYTES
LEAST_BLOCK_WORDS = 512
EMPTY = -1  # all ones
POLLS_A_CHECK = 1024  # a turn takes less than a microsecond; the word is read over PCIe


@dataclass(frozen=True)
class PeerBuffers:
    """The buffers in which the parts of a sum meet. `words` int32 is this rank's memory. Here it is (NUM_HALVES, size,
    PART_WORDS), and each rank writes to the PART_WORDS of its own; `two_step_reduce.buffer_shape` is another shape.
    `others` are the addresses of the other ranks' `words`, the next rank's first. `half` (MAX_PROGRAMS,) int32 holds
    the next call's half in every entry; a program reads its own entry. `abort_word` (1,) int32 lies in host memory that
    the device can read."""

    rank: int
    size: int
    words: Tensor
    others: tuple[int, ...]
    half: Tensor
    abort_word: Tensor


def fits(part: Tensor) -> bool:
    """Tells whether `push_reduce` can sum such parts."""
    return HAS_TRITON and part.dtype in DTYPES and part.nbytes <= MOST_BYTES and part.nbytes % WORD_BYTES == 0


def fits_rows(rows: Tensor) -> bool:
    """Tells whether a kernel with a program a row can sum such parts (T, D)."""
    return fits(rows) and len(rows) <= MAX_PROGRAMS and rows.shape[1] * rows.itemsize % WORD_BYTES == 0


def push_reduce(peers: PeerBuffers, part: Tensor, pushes: bool = True, collects: bool = True) -> None:
    """Sums a contiguous `part` over ranks, in place, on the caller's stream. Where ranks share a process, as in a test,
    all of them push (collects=False) before any collects (pushes=False)."""
    assert part.is_contiguous(), "push_reduce: strides: a part has no gaps"
    assert fits(part)
    calls["triton"] += 1
    words = part.view(-1).view(torch.int32)
    if len(words):
        block = max(triton.next_power_of_2(triton.cdiv(len(words), MAX_PROGRAMS)), LEAST_BLOCK_WORDS)
        _push_reduce[(triton.cdiv(len(words), block),)](
            *(part, words, peers.words, peers.others, peers.half, peers.abort_word),
            *(peers.rank, peers.size, len(words)),
            *(triton.next_power_of_2(peers.size), block, pushes, collects),
            num_warps=block // 128,
        )


_EMPTY = tl.constexpr(EMPTY)
_OTHER_NAN = tl.constexpr(0x7FFFFFFF)
_PART_WORDS = tl.constexpr(PART_WORDS)
_POLLS_A_CHECK = tl.constexpr(POLLS_A_CHECK)
_MAX_PROGRAMS = tl.constexpr(MAX_PROGRAMS)


@triton.jit
def as_sent(words):
    """Returns words (W,) as they are sent: EMPTY becomes another NaN."""
    return tl.where(words == _EMPTY, _OTHER_NAN, words)


@triton.jit
def load_part(words, offset, inside):
    """Loads this rank's words (W,) as they are sent."""
    return as_sent(tl.load(words + offset, mask=inside, other=0))


@triton.jit
def push(own, others, offset, inside, half, rank, size):
    """Writes `own` (W,) to the offsets (W,) of this rank's words in the memory of every other rank."""
    start = (half * size + rank) * _PART_WORDS
    for peer in tl.static_range(len(others)):
        there = tl.multiple_of(others[peer].to(tl.pointer_type(tl.int32)), 16) + start
        tl.store(there + offset, own, mask=inside)


@triton.jit
def collect(own, words, offset, inside, half, abort_word, rank, size, RANKS: tl.constexpr):
    """Returns the words (RANKS, W) of all ranks and empties them, once they have arrived."""
    peer = tl.arange(0, RANKS)[:, None]
    theirs = words + (half * size + peer) * _PART_WORDS + offset[None, :]
    awaited = (peer != rank) & (peer < size) & inside[None, :]
    return take(theirs, awaited, tl.where(peer == rank, own[None, :], 0), abort_word)


@triton.jit
def take(theirs, awaited, kept, abort_word):
    """Returns the words (RANKS, W) at `theirs` and empties them, once all that are awaited have arrived or the abort
    word is 1; `kept` where none is awaited. All threads leave the loop together, so none empties or flips what another
    has yet to read."""
    parts = tl.load(theirs, mask=awaited, other=kept, volatile=True)
    turn, aborted = 0, 0
    while (tl.max(tl.max((parts == _EMPTY).to(tl.int32), 0), 0) > 0) & (aborted == 0):
        parts = tl.load(theirs, mask=awaited, other=kept, volatile=True)
        turn += 1
        if turn == _POLLS_A_CHECK:
            turn = 0
            aborted = tl.load(abort_word, volatile=True)
    tl.store(theirs, _EMPTY, mask=awaited)
    return parts


@triton.jit
def sum_parts(parts, dtype: tl.constexpr):
    """Sums words (RANKS, W), of one or two elements each, over ranks, and rounds to dtype."""
    if dtype.primitive_bitwidth == 32:
        total = tl.sum(parts.to(dtype, bitcast=True), 0)
    else:
        low = tl.sum(parts.to(tl.int16).to(dtype, bitcast=True).to(tl.float32), 0)
        high = tl.sum((parts >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32), 0)
        total = tl.reshape(tl.join(low, high), (2 * low.shape[0],)).to(dtype)
    return total


@triton.jit
def flip(halves, half):
    """Writes the next call's half to this program's entry, and to its share of the unread entries."""
    offset = tl.arange(0, _MAX_PROGRAMS)
    tl.store(halves + offset, 1 - half, mask=offset % tl.num_programs(0) == tl.program_id(0))


@triton.jit(do_not_specialize=["rank"])
def _push_reduce(
    out, part, words, others, halves, abort_word, rank, size, num_words,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, PUSHES: tl.constexpr, COLLECTS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    PER_WORD: tl.constexpr = 32 // dtype.primitive_bitwidth
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < num_words
    half = tl.load(halves + tl.program_id(0))
    own = load_part(part, offset, inside)
    if PUSHES:
        push(own, others, offset, inside, half, rank, size)
    if COLLECTS:
        parts = collect(own, words, offset, inside, half, abort_word, rank, size, RANKS)
        element = tl.program_id(0) * BLOCK * PER_WORD + tl.arange(0, BLOCK * PER_WORD)
        tl.store(out + element, sum_parts(parts, dtype), mask=element < num_words * PER_WORD)
        flip(halves, half)
