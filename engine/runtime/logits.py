"""Pure functions of logits: filters and log probabilities whose bits depend on nothing but their row.

R rows, V vocab, N most likely tokens. Sums are taken in integers, since the bits of a float sum depend on the shape
of the batch, and ties go to the lower id, which torch.argmax and torch.topk do not promise on CUDA.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.philox import WORD

KEEP_ALL = -1.0  # no cumulative probability is at or below it


class Logprobs(NamedTuple):
    """As vLLM's: of the raw logits, before penalties and temperature.

    N is the most that any row of the batch asked for (at most V); all rows have as many.
    """

    sampled_logprob: Tensor  # (R,) float32
    sampled_rank: Tensor  # (R,) int64, from 1: how many tokens are at least as likely
    top_logprobs: Tensor  # (R, N) float32, descending
    top_ids: Tensor  # (R, N) int64, ties by the lower id

    def at(self, place: int, num_top: int) -> tuple[float, int, list[tuple[int, float]]]:
        """Of one row, on the host: the sampled token's logprob and rank, and the `num_top` first (id, logprob)."""
        top = zip(self.top_ids[place, :num_top].tolist(), self.top_logprobs[place, :num_top].tolist())
        return self.sampled_logprob[place].item(), int(self.sampled_rank[place]), list(top)


def kept(scores: Tensor, top_k: Tensor, drop_mass: Tensor, min_p: Tensor) -> Tensor:
    """What transformers' TopK, TopP and MinPLogitsWarper keep, one after another: (R, V) -> (R, V) bool.

    top_k (R, 1) int64 is 1..V; drop_mass (R, 1) is 1 - top_p, or KEEP_ALL; min_p (R, 1) is 0..1. Ties
    with the k-th score are kept; of ties at the border of top_p the lower ids (transformers: any).
    """
    ascending, ids = (part.flip(-1) for part in scores.sort(dim=-1, descending=True, stable=True))
    keep = ascending >= ascending.gather(-1, scores.shape[-1] - top_k)
    probs = _softmax(ascending.masked_fill(~keep, -torch.inf))
    mass = (probs * 2.0**60).long().cumsum(-1)  # (R, V) exact, then rounded to float32 once
    keep &= mass.float() * 2.0**-60 > drop_mass
    keep[:, -1] = True
    probs = _softmax(ascending.masked_fill(~keep, -torch.inf))
    keep &= ~(probs < min_p * probs[:, -1:])  # not >=: a NaN, sorted last, is to be found by the argmax
    return torch.empty_like(keep).scatter_(-1, ids, keep)


def logprobs(raw: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """Logprobs of tokens (R,) and of the num_top most likely ones under raw (R, V) float32."""
    peak = raw.amax(-1, keepdim=True)
    log_total = _exact_sum(_weights(raw, peak)).log()  # (R, 1) float64
    sampled = raw.gather(-1, tokens[:, None])  # (R, 1)
    bits = (raw + 0.0).view(torch.int32)  # no -0.0: it equals 0.0, its bits do not
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)  # integers in the order of the floats
    ids = torch.arange(raw.shape[-1], device=raw.device)
    keys = (ordered.long() << 32) | (WORD - ids)  # (R, V), all different: topk has no ties to break
    top_ids = WORD - (keys.topk(min(num_top, len(ids)), dim=-1).values & WORD)  # (R, N)
    both = torch.cat((sampled, raw.gather(-1, top_ids)), dim=-1) - peak
    values = (both.double() - log_total).float()  # (R, 1 + N)
    return Logprobs(values[:, 0], (raw >= sampled).sum(-1), values[:, 1:], top_ids)


def _softmax(scores: Tensor) -> Tensor:
    weights = _weights(scores, scores.amax(-1, keepdim=True))
    return weights / _exact_sum(weights).float()


def _weights(scores: Tensor, peak: Tensor) -> Tensor:
    return torch.where(scores == peak, 1.0, (scores - peak).exp())  # where: inf - inf is NaN


def _exact_sum(weights: Tensor) -> Tensor:
    """Sums weights (R, V) of 0..1 in fixed point, exactly in any order: (R, 1) float64."""
    scale = 2.0 ** (62 - weights.shape[-1].bit_length())
    return (weights * scale).long().sum(-1, keepdim=True).double() / scale
