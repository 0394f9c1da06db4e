"""The mass of a token, exp((logit - peak) / temperature), in fixed point: as integers, masses add up exactly in any
order, where the bits of a float sum depend on the shape of the batch.

A mass below 2**-45 of the peak's (V = 128256) is 0. It depends on the device's exp.
Shapes: R rows, V vocab.
"""

import torch
from penstock.parallel.triton_door import tl, triton
from torch import Tensor


def masses(logits: Tensor, peak: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Computes exp((logits - peak) / temperature), (R, V), as int64 in fixed point, where mass_scale() stands for 1. A
    row's sum does not overflow."""
    weights = torch.where(logits == peak, 1.0, ((logits - peak) / temperature).exp())  # not exp there: inf - inf is NaN
    return (weights * mass_scale(logits.shape[-1])).long()


def mass_scale(vocab_size: int) -> float:
    return 2.0 ** (62 - vocab_size.bit_length())


@triton.jit
def share_of(logit, peak, log2_slope):
    """Computes exp((logit - peak) * slope) as float32."""
    return tl.where(logit == peak, 1.0, tl.exp2((logit - peak) * log2_slope))


@triton.jit
def mass(logit, peak, log2_slope, scale):
    """Computes the same as int64 in fixed point, where `scale` stands for 1."""
    return (share_of(logit, peak, log2_slope) * scale).to(tl.int64)
