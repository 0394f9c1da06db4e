"""The words of quantised blocks: what a linear over stored bits reads of a row 64 bits at a time, in Triton.

The codes of a block (block_parts.py) are cut into *units* of `lanes` words with the same scales, and a word into `sets`
of four codes, a byte each, which belong to four consecutive weights: `4 * lane` from the first of the unit's set. Words
are read in pairs, of lanes 2 i and 2 i + 1. (block_values.py describes the same blocks weight by weight.)

Integers are not converted to floats: that is done for 16 to 64 numbers a cycle, where 128 are multiplied. A code is put
into the upper mantissa bits of a power of two instead, so that the float is some power of two more than the code.
"""

from typing import NamedTuple

from penstock.engine.kernels.block_values import part_at
from penstock.parallel.triton_door import tl, triton


class Words(NamedTuple):
    """A layout's units: how many a block has, their lanes, the sets of a word, the weights from one set to the next,
    the bits of a code, how many bits higher each set lies than the one before it (0 where its bytes are put together),
    what is subtracted from a code, and whether a set has a minimum, which is added to the products of scale and
    codes."""

    units: int
    lanes: int
    sets: int
    step: int
    bits: int
    higher: int
    less: int
    minimum: bool


WORDS = {
    "Q4_0": Words(1, 4, 2, 16, 4, 4, 8, False), "Q4_1": Words(1, 4, 2, 16, 4, 4, 0, True),
    "Q5_0": Words(1, 4, 2, 16, 5, 0, 16, False), "Q5_1": Words(1, 4, 2, 16, 5, 0, 0, True),
    "Q8_0": Words(1, 8, 1, 0, 8, 0, 128, False), "Q2_K": Words(4, 4, 4, 32, 2, 2, 0, True),
    "Q3_K": Words(4, 4, 4, 32, 3, 0, 4, False), "Q4_K": Words(4, 8, 2, 32, 4, 4, 0, True),
    "Q5_K": Words(4, 8, 2, 32, 5, 0, 0, True), "Q6_K": Words(8, 4, 2, 64, 6, 0, 32, False),
}  # fmt: skip


@triton.jit
def load(pointers, dtype: tl.constexpr, SIZE: tl.constexpr):
    """A value of SIZE bytes of each row and pair, one a thread, and neighbours in a row to neighbouring threads: Triton
    gives a tensor's threads to the dim that is contiguous, so all are called so, in runs of two. Nothing else follows
    from that, as no two are said to be aligned; and as no tensor is read otherwise, none changes its layout."""
    typed = pointers.to(tl.pointer_type(dtype))
    return tl.load(tl.max_contiguous(tl.multiple_of(typed, [SIZE, SIZE]), [1, 2]))


@triton.jit
def load_pair(at):
    """Two words at 8 bytes, as an int64."""
    return load(at, tl.int64, 8)


@triton.jit
def words_of(pair):
    """The two words of a pair."""
    return pair.to(tl.int32), (pair >> 32).to(tl.int32)


@triton.jit
def _at(data, num_blocks, row, block, BEFORE: tl.constexpr, SIZE: tl.constexpr):
    """Points to the part of a block of the row that begins with block `row`: a 64-bit base that no turn of a loop
    changes, and 32 bits."""
    return part_at(data, num_blocks, row, BEFORE, SIZE) + block * SIZE


@triton.jit
def further_bits(data, num_blocks, row, block, unit, lane, KIND: tl.constexpr):
    """The pair of words with the bits of codes that are not in their own words; any numbers where there are none."""
    if KIND == "Q5_0" or KIND == "Q5_1":
        bits = load(_at(data, num_blocks, row, block, 16, 4), tl.uint32, 4).to(tl.int64)
        return bits | bits << 32
    elif KIND == "Q5_K":
        return load_pair(_at(data, num_blocks, row, block, 128, 32) + 4 * lane)
    elif KIND == "Q3_K":
        return load_pair(_at(data, num_blocks, row, block, 64, 32) + (16 * (unit & 1) + 4 * lane))
    elif KIND == "Q6_K":
        at = 32 * (unit >> 2) + 16 * (unit & 1) + 4 * lane
        return load_pair(_at(data, num_blocks, row, block, 128, 64) + at)
    else:
        return lane.to(tl.int64)


@triton.jit
def first_weight(unit, KIND: tl.constexpr):
    """The weight of the block at which a unit's first set begins."""
    if KIND == "Q4_K" or KIND == "Q5_K":
        return unit * 64
    elif KIND == "Q6_K":
        return (unit >> 2) * 128 + (unit >> 1 & 1) * 32 + (unit & 1) * 16
    elif KIND == "Q2_K" or KIND == "Q3_K":
        return (unit >> 1) * 128 + (unit & 1) * 16
    else:
        return unit * 0


@triton.jit
def set_bytes(word, bits, unit, lane, SET: tl.constexpr, KIND: tl.constexpr):
    """The four codes of a set in the bytes of a word, `higher * SET` bits up, among others where that is not 0."""
    if KIND == "Q3_K":
        return word >> 2 * SET & 0x03030303 | (bits >> 4 * (unit >> 1) + SET & 0x01010101) << 2
    elif KIND == "Q6_K":
        return word >> 4 * SET & 0x0F0F0F0F | (bits >> 2 * (unit >> 1 & 1) + 4 * SET & 0x03030303) << 4
    elif KIND == "Q5_K":
        return word >> 4 * SET & 0x0F0F0F0F | (bits >> 2 * unit + SET & 0x01010101) << 4
    elif KIND == "Q5_0" or KIND == "Q5_1":
        upper = (bits >> 4 * lane + 16 * SET & 15) * 0x00204081 & 0x01010101  # bit i to byte i
        return word >> 4 * SET & 0x0F0F0F0F | upper << 4
    else:
        return word


@triton.jit
def code_float(codes, zero, BYTE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """A byte's BITS bits from SHIFT on as fp32, plus 2**(8 - SHIFT). `zero` is 0, which the compiler does not know: so
    the mask and the exponent are no two constants, of which an instruction takes but one. Codes of 8 bits have a sign,
    whose bit is turned over: from -128..127 to 0..255."""
    SIGN: tl.constexpr = 1 << 22 if BITS == 8 else 0
    if BYTE < 2:
        moved = codes << 15 - 8 * BYTE
    else:
        moved = codes >> 8 * BYTE - 15
    placed = moved & ((1 << BITS) - 1 << 15 + SHIFT) ^ (zero + (127 + 8 - SHIFT << 23 | SIGN))
    return placed.to(tl.float32, bitcast=True)


@triton.jit
def load_scales(data, num_blocks, row, block, unit, KIND: tl.constexpr):
    """The fp16 of the block, one or two in an int32, and three words of packed numbers, as they are stored; `halves_of`
    and `unit_scales` read them. Any numbers stand for those that a format does not have."""
    if KIND == "Q4_K" or KIND == "Q5_K":
        CODES: tl.constexpr = 160 if KIND == "Q5_K" else 128
        packed = _at(data, num_blocks, row, block, CODES, 12) + 2 * (unit & 1)
        halves = _word(_at(data, num_blocks, row, block, CODES + 12, 4))
        return halves, _short(packed), _short(packed + 4), _short(packed + 8)
    elif KIND == "Q2_K":
        first, second = words_of(load_pair(_at(data, num_blocks, row, block, 64, 16) + 8 * (unit >> 1)))
        return _word(_at(data, num_blocks, row, block, 80, 4)), first, second, second
    elif KIND == "Q3_K":
        packed = _at(data, num_blocks, row, block, 96, 12)
        halves = _short(_at(data, num_blocks, row, block, 108, 2))
        return halves, _word(packed), _word(packed + 4), _word(packed + 8)
    elif KIND == "Q6_K":
        first, second = words_of(load_pair(_at(data, num_blocks, row, block, 192, 16) + 8 * (unit >> 2)))
        return _short(_at(data, num_blocks, row, block, 208, 2)), first, second, second
    elif KIND == "Q4_1" or KIND == "Q5_1":
        return _word(_at(data, num_blocks, row, block, 20 if KIND == "Q5_1" else 16, 4)), unit, unit, unit
    else:
        CODES: tl.constexpr = 32 if KIND == "Q8_0" else 20 if KIND == "Q5_0" else 16
        return _short(_at(data, num_blocks, row, block, CODES, 2)), unit, unit, unit


@triton.jit
def halves_of(halves):
    """The two fp16 in an int32, lower one first, as fp32."""
    low, high = (halves & 0xFFFF).to(tl.int16), (halves >> 16).to(tl.int16)
    return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unit_scales(first, second, third, unit, KIND: tl.constexpr):
    """Two words of packed numbers, of which set_scales makes the scales of a unit's sets."""
    if KIND == "Q4_K" or KIND == "Q5_K":
        is_late = unit >= 2
        scales = tl.where(is_late, third & 0x0F0F | first >> 2 & 0x3030, first & 0x3F3F)
        minima = tl.where(is_late, third >> 4 & 0x0F0F | second >> 2 & 0x3030, second & 0x3F3F)
        return scales, minima
    elif KIND == "Q2_K":
        shift = 8 * (unit & 1)
        return first >> shift, second >> shift
    elif KIND == "Q3_K":
        shift = 8 * (unit & 1) + 4 * (unit >> 1)
        top = third >> shift
        return (
            first >> shift & 0x000F000F | (top & 0x00030003) << 4,
            second >> shift & 0x000F000F | (top & 0x000C000C) << 2,
        )
    elif KIND == "Q6_K":
        shift = 8 * (unit & 3)
        return first >> shift, second >> shift
    else:
        return first, second


@triton.jit
def set_scales(d, least, first, second, SET: tl.constexpr, KIND: tl.constexpr):
    """The scale of a set's codes, and what is added to their products (any number where nothing is)."""
    if KIND == "Q4_K" or KIND == "Q5_K":
        return d * _one(first >> 8 * SET), -least * _one(second >> 8 * SET)
    elif KIND == "Q2_K":
        both = (first if SET < 2 else second) >> 16 * (SET % 2)
        return d * _one(both & 15), -least * _one(both >> 4 & 15)
    elif KIND == "Q3_K":
        return d * (_one((first if SET < 2 else second) >> 16 * (SET % 2)) - 32.0), least
    elif KIND == "Q6_K":
        return d * (_one((first if SET == 0 else second) ^ 128) - 128.0), least
    else:
        return d, least


@triton.jit
def _one(code):
    """The lowest byte of an int32 as fp32: it is put into the lowest mantissa bits of 2**23."""
    return (code & 255 | 150 << 23).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _word(part):
    return load(part, tl.int32, 4)


@triton.jit
def _short(part):
    """Two bytes, in an int32."""
    return load(part, tl.uint16, 2).to(tl.int32)
