"""Rotary embedding frequencies and tables, as transformers computes them.

Shapes: L positions, F = rotary_dim / 2 frequencies.
Sources: RoFormer (Su et al. 2021), YaRN (Peng et al. 2023), Llama 3.1's frequency scaling.
"""

import math

import torch
from penstock.engine.model.spec import RopeSpec
from torch import Tensor


def inverse_frequencies(rope: RopeSpec) -> tuple[Tensor, float]:
    """Frequencies (F,) in fp32, and the factor on cos and sin."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(rope), _yarn_attention_factor(rope)
    if rope.divisors is not None:
        return plain / torch.tensor(rope.divisors), 1.0
    return plain, 1.0  # the kind is default, or dynamic, which equals it up to the trained length


def _llama3(plain: Tensor, rope: RopeSpec) -> Tensor:
    """Frequencies (F,) as Llama 3.1 scales them: those of long wavelengths are divided by the factor, those of short
    ones kept, and those between blended."""
    low_wavelength = rope.original_max_position / rope.low_freq_factor
    high_wavelength = rope.original_max_position / rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > low_wavelength, plain / rope.factor, plain)
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = ~(wavelength < high_wavelength) & ~(wavelength > low_wavelength)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeSpec) -> Tensor:
    def dim_of(rotations: float) -> float:
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)
    keep = 1 - torch.clamp(ramp, 0, 1)
    powers = rope.theta ** (torch.arange(0, rope.rotary_dim, 2).float() / rope.rotary_dim)
    return (1.0 / (rope.factor * powers)) * (1 - keep) + (1.0 / powers) * keep


def _yarn_attention_factor(rope: RopeSpec) -> float:
    def scale(mscale: float = 1.0) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale()


def rope_table(rope: RopeSpec, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Table (2, L, F) of the cos and sin of every position, computed in fp32 and rounded to `dtype`."""
    frequencies, factor = inverse_frequencies(rope)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)  # (L, F)
    return torch.stack([angles.cos() * factor, angles.sin() * factor]).to(device=device, dtype=dtype)
