"""Says how far sums may be apart that add up the same numbers in another order, as another CPU, BLAS or kernel does.

A sum of n numbers rounds n - 1 times, each time by half a unit in the last place of a partial sum, whose size is at
most what the sizes of the numbers add up to. No test may expect less of two orders, whatever its own machine gives.
"""

import math

import torch
from penstock.engine.model.spec import ModelSpec
from torch import Tensor

LOUD = 200  # times a bound: what a fault has to move a result by
_RESULTS = 17  # of a layer, one computed from another: what is rounded to the dtype of activations


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


def walk_apart(num_roundings: float, dtype: torch.dtype = torch.float32) -> float:
    """Of two ways with `num_roundings` in line each, as a share of what is rounded, where up and down are as likely:
    like a random walk, n roundings add up to the root of n of them (Higham and Mary 2019), each half a unit."""
    return math.sqrt(2 * num_roundings) * torch.finfo(dtype).eps / 2


def model_apart(spec: ModelSpec, num_tokens: int, dtype: torch.dtype = torch.float32) -> float:
    """Of two runs of a whole model over `num_tokens` tokens: the largest difference of logits, or of a state between
    layers, as a share of the largest of them. Sums are in float32 at least, results are rounded to `dtype`.

    No proof but a model, since errors that all fall the same way would double in each layer: roundings are a random
    walk, and a layer hands on a relative error as large as it came. In line are, in each layer, the sums of two norms,
    of q, k, v and up (over the hidden size), of scores (a head's size), of weights and values (the keys in sight), of
    the heads' outputs and of the FFN's; at the end those of a norm and a logit.
    """
    keys = [min(num_tokens, window or num_tokens) for window in spec.windows]
    layer = 4 * spec.hidden_size + 2 * spec.head_dim + spec.num_heads * spec.head_dim + spec.ffn_size
    layer += spec.head_dim if spec.qk_norm else 0
    sums = sum(layer + 2 * num_keys for num_keys in keys) + 2 * spec.hidden_size
    results = _RESULTS * spec.num_layers + 3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return math.hypot(walk_apart(sums + results, wide), walk_apart(results, dtype) if dtype != wide else 0.0)


def logprobs_apart(largest_logit: float, vocab_size: int, apart: float = 0.0) -> float:
    """Of two ways to a log probability in float32, from logits up to `largest_logit` in size that are themselves
    `apart`, as a share of it: a logit and the logarithm of a sum err by as much, each by itself, and both round at
    twice that size."""
    own = walk_apart(vocab_size) + 2 * sums_apart(1, 2 * largest_logit)
    return math.sqrt(2) * apart * largest_logit + own


def assert_apart(difference: float | Tensor, bound: float | Tensor) -> None:
    """No more than `bound`, element by element; NaN is more."""
    difference, bound = torch.as_tensor(difference).double(), torch.as_tensor(bound).double()
    assert (difference <= bound).all(), f"{float(difference.max()):.3g} apart, {float(bound.max()):.3g} may be"
