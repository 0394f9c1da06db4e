"""How far sums may be apart that add up the same numbers in another order, as another CPU, BLAS or kernel does.

A sum of n numbers rounds n - 1 times, each time by half a unit in the last place of a partial sum, whose size is at
most what the sizes of the numbers add up to. No test may expect less of two orders, whatever its own machine gives.
"""

import torch
from torch import Tensor


def sums_apart(num_terms: int, total: float | Tensor, dtype: torch.dtype = torch.float32) -> float | Tensor:
    """The most by which two sums of `num_terms` numbers in `dtype` may be apart. The sizes of the numbers add up to at
    most `total`: num_terms times the largest, or less where more is known. It is twice the most by which one sum and
    the exact one may be apart."""
    return num_terms * torch.finfo(dtype).eps * total


def norm_ulps(width: int) -> float:
    """Units in the last place of float32 by which two ways to a row's norm may be apart: half of what the sum of its
    squares may be, since the root is taken, and the few roundings around it."""
    return 4 + width / 2


def attention_apart(
    query_size: Tensor, key_size: Tensor, value_size: float, scale: float, dtype: torch.dtype = torch.float32
) -> float:
    """The most by which two ways to attend may be apart that add up in float32, and round weights and result to
    `dtype`. Sizes are absolute values: those of queries (N, E) and keys (C, E) of one head, and the largest of the
    values.

    The error of a score is a relative error of its weight, and of the weights' sum; weights add up to one.
    """
    num_keys, head_dim = key_size.shape
    largest_score = float((query_size.double() @ key_size.double().t()).max()) * scale
    scores = sums_apart(head_dim + 4, largest_score)  # with those of scale, base 2 and exponential
    return value_size * (2 * scores + sums_apart(num_keys + 4, 1.0) + torch.finfo(dtype).eps)
