"""The values of quantised weights: one formula a layout of blocks, in torch and in Triton.

A block is `block` consecutive weights of a row in `nbytes` bytes (ggml_types.py): codes of 2 to 8 bits, and scales
that are fp16, or for the K-quants integers of 4 to 8 bits times one fp16. Results are fp32. Each is the exact value
rounded once, whatever the order of the operations and whether they are fused (the products of codes and scales are
exact), so that all kernels that use a formula, and the gguf package, give the same bits.

In Triton weights are addressed as (block, group, lane): the group and the lane make the weight, group * lanes + lane,
and groups are chosen so that scales depend on block and group alone. Blocks are even numbers of bytes, so a pointer to
halves reads the fp16.
"""

from collections.abc import Sequence

import torch
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.parallel.triton_door import tl, triton
from torch import Tensor

GROUPS = {  # of a block, and so its lanes
    "Q4_0": 2, "Q4_1": 2, "Q5_0": 2, "Q5_1": 2, "Q8_0": 1,
    "Q2_K": 16, "Q3_K": 16, "Q4_K": 8, "Q5_K": 8, "Q6_K": 16,
}  # fmt: skip
CHUNK_WEIGHTS = 1 << 18  # that plain torch handles at a time: its temporaries stay in the cache


def write_values(kind: str, data: Tensor, out: Tensor) -> None:
    """Writes the weights of `data` (uint8, whole blocks) to `out`, contiguous, of any float dtype: the fp32 value, cast
    once."""
    layout = BY_NAME[kind]
    step = max(1, CHUNK_WEIGHTS // layout.block)
    blocks, values = data.reshape(-1, layout.nbytes), out.view(-1, layout.block)
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step]
        values[first : first + step] = _FORMULAS[kind](part).view(len(part), layout.block)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 at a byte of each block, (N, 1) fp32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifted(blocks: Tensor, at: int, runs: tuple[int, int], shifts: Sequence[int], bits: int) -> Tensor:
    """The codes of so many bits in (h, n) bytes of each block, h runs of n, in turn by each shift: (N, h, len(shifts),
    n) uint8. Two bytes at a time: what a shift brings from one into the other is masked."""
    words = blocks.view(torch.int16)[:, at // 2 :][:, : runs[0] * runs[1] // 2].unflatten(1, (runs[0], -1))
    codes = torch.empty(len(blocks), runs[0], len(shifts), runs[1], dtype=torch.uint8, device=blocks.device)
    for index, shift in enumerate(shifts):
        torch.bitwise_and(words >> shift, 0x0101 * ((1 << bits) - 1), out=codes.view(torch.int16)[:, :, index])
    return codes


def _nibbles(blocks: Tensor, at: int) -> Tensor:
    """The codes of 16 bytes, low nibbles first: (N, 32) uint8."""
    return _shifted(blocks, at, (1, 16), (0, 4), 4).view(-1, 32)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Bit i of the 32 at a byte, as 0 or 16, for weight i: (N, 32) uint8."""
    bits = blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8, device=blocks.device) & 1
    return bits.reshape(-1, 32) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks, 2).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks, 4).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks, 6) | _fifth_bits(blocks, 2)).float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks, 8) | _fifth_bits(blocks, 4)
    return codes.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    codes = _shifted(blocks, 16, (2, 32), (0, 2, 4, 6), 2).view(-1, 16, 16)
    scale, least = _half(blocks, 80) * (scales & 15).float(), _half(blocks, 82) * (scales >> 4).float()
    return codes.float().mul_(scale[:, :, None]).sub_(least[:, :, None])


def _q3_k(blocks: Tensor) -> Tensor:
    codes = _shifted(blocks, 32, (2, 32), (0, 2, 4, 6), 2).view(-1, 16, 16)
    codes |= _shifted(blocks, 0, (1, 32), range(8), 1).view(-1, 16, 16) << 2
    low = _shifted(blocks, 96, (1, 8), (0, 4), 4).view(-1, 16)
    top = _shifted(blocks, 104, (1, 4), (0, 2, 4, 6), 2).view(-1, 16)
    scale = _half(blocks, 108) * (low | top << 4).float().sub_(32)
    return codes.float().sub_(4).mul_(scale[:, :, None])


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and the eight minima in 12 bytes, each (N, 8) uint8."""
    first, second, third = packed.split(4, 1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)
    return scales, torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)


def _scaled(blocks: Tensor, codes: Tensor) -> Tensor:
    """The values of Q4_K and Q5_K, whose codes (N, 8, 32) have the same scales."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    scale, least = _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()
    return codes.float().mul_(scale[:, :, None]).sub_(least[:, :, None])


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(blocks, _shifted(blocks, 16, (4, 32), (0, 4), 4).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    codes = _shifted(blocks, 48, (4, 32), (0, 4), 4).view(-1, 8, 32)
    return _scaled(blocks, codes | _shifted(blocks, 16, (1, 32), range(8), 1).view(-1, 8, 32) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    codes = _shifted(blocks, 0, (2, 64), (0, 4), 4).view(-1, 16, 16)
    codes |= _shifted(blocks, 128, (2, 32), (0, 2, 4, 6), 2).view(-1, 16, 16) << 4
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return codes.float().sub_(32).mul_(scale[:, :, None])


_FORMULAS = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


@triton.jit
def block_values(data, halves, block, group, lane, KIND: tl.constexpr):
    """The fp32 values at (block, group, lane), which broadcast; `data` points to bytes and `halves` to the same bytes
    as fp16."""
    if KIND == "Q8_0":
        code = tl.load(data + block * 34 + 2 + lane).to(tl.int8, bitcast=True).to(tl.float32)
        value = tl.load(halves + block * 17).to(tl.float32) * code
    elif KIND == "Q4_0" or KIND == "Q4_1" or KIND == "Q5_0" or KIND == "Q5_1":
        value = _of_32(data, halves, block, group, lane, KIND)
    elif KIND == "Q4_K" or KIND == "Q5_K":
        value = _of_8_groups(data, halves, block, group, lane, KIND)
    elif KIND == "Q2_K":
        value = _q2_k_values(data, halves, block, group, lane)
    elif KIND == "Q3_K":
        value = _q3_k_values(data, halves, block, group, lane)
    else:
        tl.static_assert(KIND == "Q6_K")
        value = _q6_k_values(data, halves, block, group, lane)
    return value


@triton.jit
def _of_32(data, halves, block, group, lane, KIND: tl.constexpr):
    """Q4_0, Q4_1, Q5_0, Q5_1: scale, minimum if there is one, fifth bits if there are any, nibbles."""
    MINIMUM: tl.constexpr = KIND == "Q4_1" or KIND == "Q5_1"
    FIVE: tl.constexpr = KIND == "Q5_0" or KIND == "Q5_1"
    HEAD: tl.constexpr = 4 if MINIMUM else 2
    CODES: tl.constexpr = HEAD + 4 if FIVE else HEAD
    start = data + block * (CODES + 16)
    code = tl.load(start + CODES + lane).to(tl.int32) >> (4 * group) & 15
    if FIVE:
        bits = tl.load(start + HEAD + 2 * group + lane // 8).to(tl.int32)
        code += (bits >> lane % 8 & 1) << 4
    scale = tl.load(halves + block * ((CODES + 16) // 2)).to(tl.float32)
    if MINIMUM:
        value = scale * code.to(tl.float32) + tl.load(halves + block * ((CODES + 16) // 2) + 1).to(tl.float32)
    else:
        value = scale * (code - (16 if FIVE else 8)).to(tl.float32)
    return value


@triton.jit
def _of_8_groups(data, halves, block, group, lane, KIND: tl.constexpr):
    """Q4_K and Q5_K: two fp16, scales and minima of six bits, fifth bits if there are any, nibbles."""
    FIVE: tl.constexpr = KIND == "Q5_K"
    NBYTES: tl.constexpr = 176 if FIVE else 144
    start = data + block * NBYTES
    code = tl.load(start + (NBYTES - 128) + group // 2 * 32 + lane).to(tl.int32) >> (group % 2 * 4) & 15
    if FIVE:
        code += (tl.load(start + 16 + lane).to(tl.int32) >> group & 1) << 4
    is_late = group >= 4
    first = tl.load(start + 4 + group).to(tl.int32)  # of groups 4 to 7: second
    second = tl.load(start + 8 + group).to(tl.int32)  # of groups 4 to 7: third
    before = tl.load(start + 4 + group % 4).to(tl.int32)
    scale = tl.where(is_late, second & 15 | before >> 6 << 4, first & 63)
    least = tl.where(is_late, second >> 4 | first >> 6 << 4, second & 63)
    d = tl.load(halves + block * (NBYTES // 2)).to(tl.float32)
    d_least = tl.load(halves + block * (NBYTES // 2) + 1).to(tl.float32)
    return d * scale.to(tl.float32) * code.to(tl.float32) - d_least * least.to(tl.float32)


@triton.jit
def _two_bits(codes, group, lane):
    """The codes of two bits of Q2_K and Q3_K, and the upper bits of Q6_K: halves of 32 bytes, by shifts."""
    return tl.load(codes + group // 8 * 32 + group % 2 * 16 + lane).to(tl.int32) >> (group // 2 % 4 * 2) & 3


@triton.jit
def _q2_k_values(data, halves, block, group, lane):
    start = data + block * 84
    code, scales = _two_bits(start + 16, group, lane), tl.load(start + group).to(tl.int32)
    d, d_least = tl.load(halves + block * 42 + 40).to(tl.float32), tl.load(halves + block * 42 + 41).to(tl.float32)
    return d * (scales & 15).to(tl.float32) * code.to(tl.float32) - d_least * (scales >> 4).to(tl.float32)


@triton.jit
def _q3_k_values(data, halves, block, group, lane):
    start = data + block * 110
    code = _two_bits(start + 32, group, lane)
    code += (tl.load(start + group % 2 * 16 + lane).to(tl.int32) >> (group // 2) & 1) << 2
    low = tl.load(start + 96 + group % 8).to(tl.int32) >> (group // 8 * 4) & 15
    top = tl.load(start + 104 + group % 4).to(tl.int32) >> (group // 4 * 2) & 3
    scale = (low + (top << 4) - 32).to(tl.float32)
    return tl.load(halves + block * 55 + 54).to(tl.float32) * scale * (code - 4).to(tl.float32)


@triton.jit
def _q6_k_values(data, halves, block, group, lane):
    start = data + block * 210
    low = tl.load(start + group // 8 * 64 + group % 4 * 16 + lane).to(tl.int32) >> (group // 4 % 2 * 4) & 15
    code = low + (_two_bits(start + 128, group, lane) << 4)
    scale = tl.load(start + 192 + group).to(tl.int8, bitcast=True).to(tl.float32)
    return tl.load(halves + block * 105 + 104).to(tl.float32) * scale * (code - 32).to(tl.float32)
