"""The values of quantised weights: one formula a layout of blocks, in torch and in Triton.

A block is `block` consecutive weights of a row in `nbytes` bytes (ggml_types.py): codes of 2 to 8 bits, and scales
that are fp16, or for the K-quants integers of 4 to 8 bits times one fp16. They lie in parts (block_parts.py). Results
are fp32. Each is the exact value rounded once, whatever the order of the operations and whether they are fused (the
products of codes and scales are exact), so that all kernels that use a formula, and the gguf package, give the same
bits.

In Triton weights are addressed as (block, group, lane): the group and the lane make the weight, group * lanes + lane,
and groups are chosen so that scales depend on block and group alone.
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


def write_values(kind: str, parts: Sequence[Tensor], out: Tensor) -> None:
    """Writes the weights of blocks to `out`, contiguous, of any float dtype: the fp32 value, cast once. `parts` are
    those of block_parts.py, each (blocks, bytes) uint8."""
    block = BY_NAME[kind].block
    step, values = max(1, CHUNK_WEIGHTS // block), out.view(-1, block)
    for first in range(0, len(values), step):
        some = [part[first : first + step] for part in parts]
        values[first : first + step] = _FORMULAS[kind](*some).view(-1, block)


def _half(part: Tensor, at: int = 0) -> Tensor:
    """The fp16 at a byte of each row, (N, 1) fp32."""
    return part[:, at : at + 2].contiguous().view(torch.float16).float()


def _shifted(part: Tensor, num_runs: int, shifts: Sequence[int], bits: int) -> Tensor:
    """The codes of so many bits in each row of bytes, in runs, of each run in turn by each shift: (N, num_runs,
    len(shifts), bytes of a run) uint8. Two bytes at a time: what a shift brings from one into the other is masked."""
    words = part.view(torch.int16).unflatten(1, (num_runs, -1))
    codes = torch.empty(len(part), num_runs, len(shifts), 2 * words.shape[2], dtype=torch.uint8, device=part.device)
    for index, shift in enumerate(shifts):
        torch.bitwise_and(words >> shift, 0x0101 * ((1 << bits) - 1), out=codes.view(torch.int16)[:, :, index])
    return codes


def _nibbles(part: Tensor) -> Tensor:
    """The codes of 16 bytes, low nibbles first: (N, 32) uint8."""
    return _shifted(part, 1, (0, 4), 4).view(-1, 32)


def _fifth_bits(part: Tensor) -> Tensor:
    """Bit i of the 32 of each row, as 0 or 16, for weight i: (N, 32) uint8."""
    bits = part[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=part.device) & 1
    return bits.reshape(-1, 32) << 4


def _q4_0(codes: Tensor, scales: Tensor) -> Tensor:
    return _nibbles(codes).float().sub_(8).mul_(_half(scales))


def _q4_1(codes: Tensor, scales: Tensor) -> Tensor:
    return _nibbles(codes).float().mul_(_half(scales)).add_(_half(scales, 2))


def _q5_0(codes: Tensor, fifth: Tensor, scales: Tensor) -> Tensor:
    return (_nibbles(codes) | _fifth_bits(fifth)).float().sub_(16).mul_(_half(scales))


def _q5_1(codes: Tensor, fifth: Tensor, scales: Tensor) -> Tensor:
    both = _nibbles(codes) | _fifth_bits(fifth)
    return both.float().mul_(_half(scales)).add_(_half(scales, 2))


def _q8_0(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.view(torch.int8).float().mul_(_half(scales))


def _q2_k(codes: Tensor, packed: Tensor, halves: Tensor) -> Tensor:
    codes = _shifted(codes, 2, (0, 2, 4, 6), 2).view(-1, 16, 16)
    scale, least = _half(halves) * (packed & 15).float(), _half(halves, 2) * (packed >> 4).float()
    return codes.float().mul_(scale[:, :, None]).sub_(least[:, :, None])


def _q3_k(codes: Tensor, third: Tensor, packed: Tensor, half: Tensor) -> Tensor:
    codes = _shifted(codes, 2, (0, 2, 4, 6), 2).view(-1, 16, 16)
    codes |= _shifted(third, 1, range(8), 1).view(-1, 16, 16) << 2
    low = _shifted(packed[:, :8], 1, (0, 4), 4).view(-1, 16)
    top = _shifted(packed[:, 8:], 1, (0, 2, 4, 6), 2).view(-1, 16)
    scale = _half(half) * (low | top << 4).float().sub_(32)
    return codes.float().sub_(4).mul_(scale[:, :, None])


def _scaled(codes: Tensor, packed: Tensor, halves: Tensor) -> Tensor:
    """The values of Q4_K and Q5_K, whose codes (N, 8, 32) have eight scales and eight minima in 12 bytes."""
    first, second, third = packed.split(4, 1)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)
    scale, least = _half(halves) * scales.float(), _half(halves, 2) * minima.float()
    return codes.float().mul_(scale[:, :, None]).sub_(least[:, :, None])


def _q4_k(codes: Tensor, packed: Tensor, halves: Tensor) -> Tensor:
    return _scaled(_shifted(codes, 4, (0, 4), 4).view(-1, 8, 32), packed, halves)


def _q5_k(codes: Tensor, fifth: Tensor, packed: Tensor, halves: Tensor) -> Tensor:
    codes = _shifted(codes, 4, (0, 4), 4).view(-1, 8, 32) | _shifted(fifth, 1, range(8), 1).view(-1, 8, 32) << 4
    return _scaled(codes, packed, halves)


def _q6_k(codes: Tensor, upper: Tensor, scales: Tensor, half: Tensor) -> Tensor:
    codes = _shifted(codes, 2, (0, 4), 4).view(-1, 16, 16)
    codes |= _shifted(upper, 2, (0, 2, 4, 6), 2).view(-1, 16, 16) << 4
    scale = _half(half) * scales.view(torch.int8).float()
    return codes.float().sub_(32).mul_(scale[:, :, None])


_FORMULAS = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


@triton.jit
def part_at(data, num_blocks, block, BEFORE: tl.constexpr, SIZE: tl.constexpr):
    """Points to a block's bytes of a part of SIZE bytes, which comes behind parts of BEFORE bytes a block."""
    return data + tl.cast(num_blocks, tl.int64) * BEFORE + block * SIZE


@triton.jit
def half_at(part, INDEX: tl.constexpr):
    """The fp16 of that index at a part's bytes, as fp32."""
    return tl.load(part.to(tl.pointer_type(tl.float16)) + INDEX).to(tl.float32)


@triton.jit
def block_values(data, num_blocks, block, group, lane, KIND: tl.constexpr):
    """The fp32 values at (block, group, lane), which broadcast, of `num_blocks` blocks in parts at `data`."""
    if KIND == "Q8_0":
        code = tl.load(data + block * 32 + lane).to(tl.int8, bitcast=True).to(tl.float32)
        value = half_at(part_at(data, num_blocks, block, 32, 2), 0) * code
    elif KIND == "Q4_0" or KIND == "Q4_1" or KIND == "Q5_0" or KIND == "Q5_1":
        value = _of_32(data, num_blocks, block, group, lane, KIND)
    elif KIND == "Q4_K" or KIND == "Q5_K":
        value = _of_8_groups(data, num_blocks, block, group, lane, KIND)
    elif KIND == "Q2_K":
        value = _q2_k_values(data, num_blocks, block, group, lane)
    elif KIND == "Q3_K":
        value = _q3_k_values(data, num_blocks, block, group, lane)
    else:
        tl.static_assert(KIND == "Q6_K")
        value = _q6_k_values(data, num_blocks, block, group, lane)
    return value


@triton.jit
def _of_32(data, num_blocks, block, group, lane, KIND: tl.constexpr):
    """Q4_0, Q4_1, Q5_0, Q5_1: nibbles, fifth bits if there are any, scale, minimum if there is one."""
    MINIMUM: tl.constexpr = KIND == "Q4_1" or KIND == "Q5_1"
    FIVE: tl.constexpr = KIND == "Q5_0" or KIND == "Q5_1"
    code = tl.load(data + block * 16 + lane).to(tl.int32) >> (4 * group) & 15
    if FIVE:
        bits = tl.load(part_at(data, num_blocks, block, 16, 4) + 2 * group + lane // 8).to(tl.int32)
        code += (bits >> lane % 8 & 1) << 4
    scales = part_at(data, num_blocks, block, 20 if FIVE else 16, 4 if MINIMUM else 2)
    if MINIMUM:
        value = half_at(scales, 0) * code.to(tl.float32) + half_at(scales, 1)
    else:
        value = half_at(scales, 0) * (code - (16 if FIVE else 8)).to(tl.float32)
    return value


@triton.jit
def _of_8_groups(data, num_blocks, block, group, lane, KIND: tl.constexpr):
    """Q4_K and Q5_K: nibbles, fifth bits if there are any, scales and minima of six bits, two fp16."""
    FIVE: tl.constexpr = KIND == "Q5_K"
    CODES: tl.constexpr = 160 if FIVE else 128
    code = tl.load(data + block * 128 + group // 2 * 32 + lane).to(tl.int32) >> (group % 2 * 4) & 15
    if FIVE:
        code += (tl.load(part_at(data, num_blocks, block, 128, 32) + lane).to(tl.int32) >> group & 1) << 4
    packed, halves = part_at(data, num_blocks, block, CODES, 12), part_at(data, num_blocks, block, CODES + 12, 4)
    is_late = group >= 4
    first = tl.load(packed + group).to(tl.int32)  # of groups 4 to 7: second
    second = tl.load(packed + 4 + group).to(tl.int32)  # of groups 4 to 7: third
    before = tl.load(packed + group % 4).to(tl.int32)
    scale = tl.where(is_late, second & 15 | before >> 6 << 4, first & 63)
    least = tl.where(is_late, second >> 4 | first >> 6 << 4, second & 63)
    return half_at(halves, 0) * scale.to(tl.float32) * code.to(tl.float32) - half_at(halves, 1) * least.to(tl.float32)


@triton.jit
def _two_bits(codes, group, lane):
    """The codes of two bits of Q2_K and Q3_K, and the upper bits of Q6_K: halves of 32 bytes, by shifts."""
    return tl.load(codes + group // 8 * 32 + group % 2 * 16 + lane).to(tl.int32) >> (group // 2 % 4 * 2) & 3


@triton.jit
def _q2_k_values(data, num_blocks, block, group, lane):
    code = _two_bits(data + block * 64, group, lane)
    scales = tl.load(part_at(data, num_blocks, block, 64, 16) + group).to(tl.int32)
    halves = part_at(data, num_blocks, block, 80, 4)
    scale, least = half_at(halves, 0) * (scales & 15).to(tl.float32), half_at(halves, 1) * (scales >> 4).to(tl.float32)
    return scale * code.to(tl.float32) - least


@triton.jit
def _q3_k_values(data, num_blocks, block, group, lane):
    code = _two_bits(data + block * 64, group, lane)
    third = tl.load(part_at(data, num_blocks, block, 64, 32) + group % 2 * 16 + lane).to(tl.int32)
    code += (third >> (group // 2) & 1) << 2
    packed = part_at(data, num_blocks, block, 96, 12)
    low = tl.load(packed + group % 8).to(tl.int32) >> (group // 8 * 4) & 15
    top = tl.load(packed + 8 + group % 4).to(tl.int32) >> (group // 4 * 2) & 3
    scale = (low + (top << 4) - 32).to(tl.float32)
    return half_at(part_at(data, num_blocks, block, 108, 2), 0) * scale * (code - 4).to(tl.float32)


@triton.jit
def _q6_k_values(data, num_blocks, block, group, lane):
    low = tl.load(data + block * 128 + group // 8 * 64 + group % 4 * 16 + lane).to(tl.int32)
    upper = _two_bits(part_at(data, num_blocks, block, 128, 64), group, lane)
    code = (low >> (group // 4 % 2 * 4) & 15) + (upper << 4)
    scale = tl.load(part_at(data, num_blocks, block, 192, 16) + group).to(tl.int8, bitcast=True).to(tl.float32)
    return half_at(part_at(data, num_blocks, block, 208, 2), 0) * scale * (code - 32).to(tl.float32)
