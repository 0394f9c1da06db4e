"""Decompresses bf16 weights, bit for bit, from the planes that engine/weights/codec.py makes.

A tile is 128 lanes x 16 weights, and has these planes:

    mantissas   a byte of sign and mantissa for each weight
    indices     2 bits a weight: 0 to 2 for one of the three common exponents of the tile's window of eleven, 3 for an
                escape, which has one of the other eight
    escapes     3 bits an escape, in order: the index of its exponent among the eight
    patches     the weights that lie outside of the window, and by how many times eleven their exponent, modulo 256, is
                more than their index says
    windows     the first exponent of the window, and how many of the eight lie below the common ones

All but the patches are in stored order, chosen for the decompressor: a lane's mantissas are one 16-byte load, its
indices one word, its weights two 16-byte stores, and four exponents are made at once in the bytes of a word, already in
the positions from which they shift into two words of the output. Where a lane's escapes start is all that crosses
lanes: a prefix sum of 128 counts a tile. Its escapes, at most 16, lie in three words, from which they are shifted out.
Compiled for sm_90 this takes 32 registers, no spills, no exchange between layouts, 20 instructions a weight and three
4-byte gathers a lane. One level of 3 bits would take 10 instructions and no gather, for 3.5 % more bytes; 2 warps a
tile would take 40 registers.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.codec_tile import LANE_WEIGHTS, LANES, TILE
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
COMMON, ESCAPED = 3, 8  # numbers of exponents that take 2 bits, and 2 + 3
WINDOW = COMMON + ESCAPED
PATCH_SHIFT = 5  # bits of a patch's number of elevens, at most 23
BLOCK_TILES = 1024  # tiles that plain torch handles at a time: up to 60 bytes a weight of temporaries
NUM_WARPS = 4


class Planes(NamedTuple):
    """The planes of N tiles with P patches; all are contiguous, start at 16-byte boundaries, and lie on one device."""

    mantissas: Tensor  # (N, LANES, LANE_WEIGHTS) uint8
    indices: Tensor  # (N, LANES, 4) uint8
    escapes: Tensor  # (G, 12) uint8: ESCAPE_ROW a row, and padding to num_escape_rows
    patches: Tensor  # (P,) int16: index in the tile << PATCH_SHIFT | times
    escape_starts: Tensor  # (N + 1,) int32
    patch_starts: Tensor  # (N + 1,) int32
    windows: Tensor  # (N, 2) uint8: first exponent, number of exponents below the common ones


def stored_order(tiles: Tensor) -> Tensor:
    """Bytes (N, TILE) as the planes have them, (N, LANES, LANE_WEIGHTS). Eight of a lane's weights lie together and
    eight half a tile on; of each four that lie together the middle ones are swapped."""
    fours = tiles.view(torch.int32).view(-1, 2, LANES, 2).transpose(1, 2).contiguous()
    swapped = fours & ~0xFFFF00 | fours >> 8 & 0xFF00 | (fours & 0xFF00) << 8
    return swapped.view(torch.uint8).view(-1, LANES, LANE_WEIGHTS)


def natural_order(stored: Tensor) -> Tensor:
    """The inverse of stored_order: (N, LANES, LANE_WEIGHTS) as (N, TILE)."""
    return stored.view(-1, LANES, 2, 2, 2, 2).permute(0, 2, 1, 3, 5, 4).reshape(-1, TILE)


def decompress_weights(planes: Planes, out: Tensor) -> None:
    """Writes the weights that were compressed to `out` (N * TILE,) bf16, contiguous, from a 16-byte boundary."""
    num_tiles = len(planes.mantissas)
    of_each_tile = (planes.indices, planes.windows, planes.escape_starts[1:], planes.patch_starts[1:])
    assert all(len(plane) == num_tiles for plane in of_each_tile), "a plane is too short for its tiles"
    assert out.shape == (num_tiles * TILE,) and out.dtype == torch.bfloat16 and out.is_contiguous()
    run = _decompress_weights_triton if out.is_cuda else decompress_weights_reference
    if out.numel():
        run(planes, out)


def decompress_weights_reference(planes: Planes, out: Tensor) -> None:
    """Does the same in plain torch."""
    calls["reference"] += 1
    for first in range(0, planes.mantissas.shape[0], BLOCK_TILES):
        _decompress_tiles(planes, first, out.view(torch.int16).view(-1, TILE)[first : first + BLOCK_TILES])


def _decompress_tiles(planes: Planes, first: int, out: Tensor) -> None:
    """Decompresses the tiles from `first` on into `out` (N, TILE) int16."""
    tiles = slice(first, first + out.shape[0])
    escapes, patches = (
        starts[first : first + out.shape[0] + 1].long() for starts in (planes.escape_starts, planes.patch_starts)
    )
    start, below = planes.windows[tiles].short().split(1, 1)  # (N, 1)
    indices = torch.stack([planes.indices[tiles] >> shift & 3 for shift in (0, 2, 4, 6)], 2).view(-1, TILE)
    escaped = indices == COMMON
    late = torch.zeros_like(start).expand_as(indices).clone()
    late[escaped] = _unpack_escapes(planes.escapes, int(escapes[0]), int(escapes[-1])).short()
    exponents = start + torch.where(escaped, late + COMMON * (late >= below).short(), below + indices)
    mantissas = planes.mantissas[tiles].view(-1, TILE).short()
    out.copy_(natural_order((mantissas & 0x80) << 8 | exponents << 7 | mantissas & 0x7F))
    patched = planes.patches[patches[0] : patches[-1]].int() & 0xFFFF
    tile = torch.repeat_interleave(torch.arange(len(out), device=out.device), patches.diff())
    patched_at = tile, patched >> PATCH_SHIFT
    bits, more = out[patched_at].int(), (patched & (1 << PATCH_SHIFT) - 1) * WINDOW << 7
    out[patched_at] = (bits & ~0x7F80 | bits + more & 0x7F80).short()


def _unpack_escapes(escapes: Tensor, first: int, last: int) -> Tensor:
    """The escapes [first, last), of 3 bits each; eight of them are three bytes."""
    eights = escapes.view(-1, 3)[first // 8 : -(-last // 8)].int()
    words = eights[:, 0] | eights[:, 1] << 8 | eights[:, 2] << 16
    late = torch.stack([words >> shift & 7 for shift in range(0, 24, 3)], 1).view(-1)
    return late[first % 8 :][: last - first]


def _decompress_weights_triton(planes: Planes, out: Tensor) -> None:
    require_triton("decompress_weights on a GPU", "device='cpu'")
    assert all(t.is_contiguous() for t in (*planes, out)), "decompress_weights: strides: planes and result have no gaps"
    calls["triton"] += 1
    words = (plane.view(-1).view(torch.int32) for plane in planes[:3])
    _decompress_tile[(len(planes.mantissas),)](
        *(*words, *planes[3:], out.view(torch.int32), out.view(torch.int16), LANES),
        **options(out.device),
        num_warps=NUM_WARPS,
    )


@triton.jit
def _count(marks):
    """Counts the set bits of a word in which only even bits can be set."""
    pairs = (marks & 0x11111111) + (marks >> 2 & 0x11111111)
    return ((pairs + (pairs >> 4)) & 0x0F0F0F0F) * 0x01010101 >> 24


@triton.jit
def _bits_from(low, high, shift):
    """The word that starts at bit `shift`, 0 to 31, of two words."""
    return ((high.to(tl.uint64) << 32 | low) >> shift).to(tl.uint32)


@triton.jit
def _next_escapes(bits, marks, G: tl.constexpr):
    """The next four weights' escapes in the bytes of a word, and the bits left; a byte whose weight is not marked as an
    escape means nothing."""
    late = bits & 7
    for byte in tl.static_range(1, 4):
        bits >>= (marks * 3 >> (2 * G + 8 * byte - 8)) & 3
        late |= (bits & 7) << (8 * byte)
    return late, bits >> ((marks * 3 >> (2 * G + 24)) & 3)


@triton.jit
def _four_weights(mantissas, indices, marks, late, start, below, G: tl.constexpr):
    """Group G of a lane's weights as two words of two; start and below stand in every byte."""
    above = late + (0x80808080 - below) >> 7 & 0x01010101
    late_exponents = start + late + above * 3
    escaped = (marks >> (2 * G) & 0x01010101) * 0xFF
    common = start + below + (indices >> (2 * G) & 0x03030303)
    exponents = common ^ ((common ^ late_exponents) & escaped)
    low = (exponents & 0x00FF00FF) << 7 | mantissas & 0x007F007F | (mantissas & 0x00800080) << 8
    high = exponents >> 1 & 0x7F807F80 | mantissas >> 8 & 0x007F007F | mantissas & 0x80008000
    return low, high


@triton.jit
def _eight_weights(mantissas_0, mantissas_1, indices, marks, bits, start, below, G: tl.constexpr, LANES: tl.constexpr):
    """Groups G and G + 1 as the (LANES, 4) words that lie together in the output."""
    late, bits = _next_escapes(bits, marks, G)
    low_0, high_0 = _four_weights(mantissas_0, indices, marks, late, start, below, G)
    late, bits = _next_escapes(bits, marks, G + 1)
    low_1, high_1 = _four_weights(mantissas_1, indices, marks, late, start, below, G + 1)
    words = tl.join(tl.join(low_0, low_1), tl.join(high_0, high_1))
    return tl.reshape(words, (LANES, 4)).to(tl.int32, bitcast=True)


@triton.jit
def _decompress_tile(
    mantissas, indices, escapes, patches, escape_starts, patch_starts, windows, out_words, out,
    LANES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)  # the planes are inputs too, where a kernel has compressed them
    tile, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    four = lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    word = tl.load(indices + tile * LANES + lane).to(tl.uint32, bitcast=True)
    groups = tl.load(mantissas + tile * LANES * 4 + four).to(tl.uint32, bitcast=True)
    escape_bit = tl.load(escape_starts + tile).to(tl.int64) * 3
    first, last = tl.load(patch_starts + tile), tl.load(patch_starts + tile + 1)
    start = tl.load(windows + tile * 2).to(tl.uint32) * 0x01010101
    below = tl.load(windows + tile * 2 + 1).to(tl.uint32) * 0x01010101
    patched = tl.load(patches + first + lane, mask=first + lane < last, other=0).to(tl.int32)

    marks = word & (word >> 1) & 0x55555555
    count = _count(marks).to(tl.int32)
    bit = (tl.cumsum(count, 0) - count) * 3 + (escape_bit & 31).to(tl.int32)
    escapes += (escape_bit >> 5) + (bit >> 5)
    word_0 = tl.load(escapes).to(tl.uint32, bitcast=True)
    word_1 = tl.load(escapes + 1).to(tl.uint32, bitcast=True)
    word_2 = tl.load(escapes + 2).to(tl.uint32, bitcast=True)
    bits_0, bits_1 = _bits_from(word_0, word_1, bit & 31), _bits_from(word_1, word_2, bit & 31)
    bits_1 = _bits_from(bits_0, bits_1, _count(marks & 0x05050505) * 3)
    even, odd = tl.split(tl.reshape(groups, (LANES, 2, 2)))
    group_0, group_2 = tl.split(even)
    group_1, group_3 = tl.split(odd)
    words_0 = _eight_weights(group_0, group_1, word, marks, bits_0, start, below, 0, LANES)
    words_1 = _eight_weights(group_2, group_3, word, marks, bits_1, start, below, 2, LANES)

    out_words += tile * LANES * 8
    out += tile * LANES * 16
    tl.store(out_words + four, words_0)
    tl.store(out_words + LANES * 4 + four, words_1)
    for patch in tl.range(first, last, LANES):
        tl.debug_barrier()  # another thread has written the weight that a patch changes
        pointer = out + (patched >> 5 & 0x7FF)
        bits = tl.load(pointer, mask=patch + lane < last, other=0).to(tl.int32)
        bits = bits & ~0x7F80 | bits + ((patched & 31) * 11 << 7) & 0x7F80
        tl.store(pointer, bits.to(tl.int16), mask=patch + lane < last)
        patched = tl.load(patches + patch + LANES + lane, mask=patch + LANES + lane < last, other=0).to(tl.int32)
