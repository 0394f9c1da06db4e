"""The words of quantised blocks: what a linear over stored bits reads 32 bits at a time, in Triton.

A row's blocks are cut into *units* of `lanes` words with the same scales, and a word into `sets` of four codes, a byte
each, which belong to four consecutive weights: `4 * lane` from the first of the unit's set. (block_values.py describes
the same blocks weight by weight.)

Integers are not converted to floats: that is done for 16 to 64 numbers a cycle, where 128 are multiplied. A code is put
into the mantissa of a power of two instead, the one where its lowest bit counts 1, and the power is subtracted.
Blocks of 18, 22, 34, 110 and 210 bytes start at even bytes only, so their words are read as two halves.
"""

from typing import NamedTuple

from penstock.parallel.triton_door import tl, triton


class Words(NamedTuple):
    """A layout's units: how many a block has, their lanes, the sets of a word, the weights from one set to the next,
    the halves (two bytes each) of a block before its words, what is subtracted from a code, and whether a set has a
    minimum, which is added to the products of scale and codes."""

    units: int
    lanes: int
    sets: int
    step: int
    start: int
    less: int
    minimum: bool


WORDS = {
    "Q4_0": Words(1, 4, 2, 16, 1, 8, False), "Q4_1": Words(1, 4, 2, 16, 2, 0, True),
    "Q5_0": Words(1, 4, 2, 16, 3, 16, False), "Q5_1": Words(1, 4, 2, 16, 4, 0, True),
    "Q8_0": Words(1, 8, 1, 0, 1, 128, False), "Q2_K": Words(4, 4, 4, 32, 8, 0, True),
    "Q3_K": Words(4, 4, 4, 32, 16, 4, False), "Q4_K": Words(4, 8, 2, 32, 8, 0, True),
    "Q5_K": Words(4, 8, 2, 32, 24, 0, True), "Q6_K": Words(8, 4, 2, 64, 0, 32, False),
}  # fmt: skip


@triton.jit
def load_word(rows, at, inside, NBYTES: tl.constexpr, EVEN: tl.constexpr):
    """The int32 at a half of a row; `rows` points to halves (int16), and blocks have NBYTES bytes."""
    if NBYTES % 4 == 0:
        at = tl.max_contiguous(at >> 1, [1, 1, 1])  # a word a thread: x is read so too, and no layout is exchanged
        return _load(rows.to(tl.pointer_type(tl.int32)) + at, inside, EVEN)
    else:
        return _half(rows, at, inside, EVEN) | _half(rows, at + 1, inside, EVEN) << 16


@triton.jit
def further_bits(rows, start, unit, lane, inside, KIND: tl.constexpr, NBYTES: tl.constexpr, EVEN: tl.constexpr):
    """The word with the bits of codes that are not in their own word; any number where there are none."""
    if KIND == "Q5_0":
        return load_word(rows, start + 1, inside, NBYTES, EVEN)
    elif KIND == "Q5_1":
        return load_word(rows, start + 2, inside, NBYTES, EVEN)
    elif KIND == "Q5_K":
        return load_word(rows, start + 8 + 2 * lane, inside, NBYTES, EVEN)
    elif KIND == "Q3_K":
        return load_word(rows, start + 8 * (unit & 1) + 2 * lane, inside, NBYTES, EVEN)
    elif KIND == "Q6_K":
        return load_word(rows, start + 64 + (unit >> 2) * 16 + 8 * (unit & 1) + 2 * lane, inside, NBYTES, EVEN)
    else:
        return lane


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
def set_weights(word, bits, unit, lane, SET: tl.constexpr, KIND: tl.constexpr, LESS: tl.constexpr):
    """The four codes of a set as fp32, each less LESS."""
    if KIND == "Q8_0":
        return _four_floats(word ^ -0x7F7F7F80, 0, 8, LESS)  # the sign's bit: from -128..127 to 0..255
    elif KIND == "Q2_K":
        return _four_floats(word, 2 * SET, 2, LESS)
    elif KIND == "Q3_K":
        upper = bits >> 4 * (unit >> 1) + SET & 0x01010101
        return _four_floats(word >> 2 * SET & 0x03030303 | upper << 2, 0, 3, LESS)
    elif KIND == "Q6_K":
        upper = bits >> 2 * (unit >> 1 & 1) + 4 * SET & 0x03030303
        return _four_floats(word >> 4 * SET & 0x0F0F0F0F | upper << 4, 0, 6, LESS)
    elif KIND == "Q5_K":
        upper = bits >> 2 * unit + SET & 0x01010101
        return _four_floats(word >> 4 * SET & 0x0F0F0F0F | upper << 4, 0, 5, LESS)
    elif KIND == "Q5_0" or KIND == "Q5_1":
        upper = (bits >> 16 * SET + 4 * lane & 15) * 0x00204081 & 0x01010101  # bit i to byte i
        return _four_floats(word >> 4 * SET & 0x0F0F0F0F | upper << 4, 0, 5, LESS)
    else:
        return _four_floats(word, 4 * SET, 4, LESS)


@triton.jit
def load_scales(rows, start, unit, inside, KIND: tl.constexpr, NBYTES: tl.constexpr, EVEN: tl.constexpr):
    """Two fp32 of the block and two words of packed numbers, of which set_scales makes the scales of a unit."""
    if KIND == "Q4_K" or KIND == "Q5_K":
        at, is_late = start + 2 + (unit & 1), unit >= 2
        first, second = _half(rows, at, inside, EVEN), _half(rows, at + 2, inside, EVEN)
        third = _half(rows, at + 4, inside, EVEN)
        scales = tl.where(is_late, third & 0x0F0F | first >> 2 & 0x3030, first & 0x3F3F)
        minima = tl.where(is_late, third >> 4 & 0x0F0F | second >> 2 & 0x3030, second & 0x3F3F)
        return _float(rows, start, inside, EVEN), _float(rows, start + 1, inside, EVEN), scales, minima
    elif KIND == "Q2_K":
        at, shift = start + 4 * (unit >> 1), 8 * (unit & 1)
        first, second = load_word(rows, at, inside, NBYTES, EVEN), load_word(rows, at + 2, inside, NBYTES, EVEN)
        d, least = _float(rows, start + 40, inside, EVEN), _float(rows, start + 41, inside, EVEN)
        return d, least, first >> shift, second >> shift
    elif KIND == "Q3_K":
        shift = 8 * (unit & 1) + 4 * (unit >> 1)
        first, second = (
            load_word(rows, start + 48, inside, NBYTES, EVEN),
            load_word(rows, start + 50, inside, NBYTES, EVEN),
        )
        top = load_word(rows, start + 52, inside, NBYTES, EVEN) >> shift
        first = first >> shift & 0x000F000F | (top & 0x00030003) << 4
        second = second >> shift & 0x000F000F | (top & 0x000C000C) << 2
        d = _float(rows, start + 54, inside, EVEN)
        return d, d, first, second
    elif KIND == "Q6_K":
        at = 192 + (unit >> 2) * 8 + (unit & 3)
        d = _float(rows, start + 104, inside, EVEN)
        return d, d, _byte(rows, start, at, inside, EVEN), _byte(rows, start, at + 4, inside, EVEN)
    else:
        d = _float(rows, start, inside, EVEN)
        least = _float(rows, start + 1, inside, EVEN) if KIND == "Q4_1" or KIND == "Q5_1" else d
        return d, least, unit, unit


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
def _four_floats(codes, SHIFT: tl.constexpr, BITS: tl.constexpr, LESS: tl.constexpr):
    """Each byte's BITS bits from SHIFT on, as fp32 less LESS."""
    upper = codes >> 16
    a, b = _from_mantissa(codes, SHIFT, BITS, LESS), _from_mantissa(codes, 8 + SHIFT, BITS, LESS)
    c, d = _from_mantissa(upper, SHIFT, BITS, LESS), _from_mantissa(upper, 8 + SHIFT, BITS, LESS)
    return a, b, c, d


@triton.jit
def _from_mantissa(codes, SHIFT: tl.constexpr, BITS: tl.constexpr, LESS: tl.constexpr):
    """The BITS bits from SHIFT on as fp32 less LESS, by way of the power of two where bit SHIFT of a mantissa is 1."""
    EXPONENT: tl.constexpr = 23 - SHIFT
    placed = codes & ((1 << BITS) - 1 << SHIFT) | (127 + EXPONENT << 23)
    return placed.to(tl.float32, bitcast=True) - (2.0**EXPONENT + LESS)


@triton.jit
def _one(code):
    """The lowest byte of an int32 as fp32."""
    return _from_mantissa(code, 0, 8, 0)


@triton.jit
def _byte(rows, start, at, inside, EVEN: tl.constexpr):
    return _load(rows.to(tl.pointer_type(tl.uint8)) + (2 * start + at), inside, EVEN).to(tl.int32)


@triton.jit
def _half(rows, at, inside, EVEN: tl.constexpr):
    return _load(rows.to(tl.pointer_type(tl.uint16)) + at, inside, EVEN).to(tl.int32)


@triton.jit
def _float(rows, at, inside, EVEN: tl.constexpr):
    return _load(rows.to(tl.pointer_type(tl.float16)) + at, inside, EVEN).to(tl.float32)


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    return tl.load(pointers, mask=inside, other=None if EVEN else 0)
