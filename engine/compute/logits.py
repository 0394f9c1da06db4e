"""Log probabilities whose bits depend on nothing but their row.

R rows, V vocab, N most likely tokens. Sums are taken in integers, since the bits of a float sum depend on the shape
of the batch, and ties go to the lower id, which torch.argmax and torch.topk do not promise on CUDA.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.filter import mass_scale, masses
from penstock.engine.kernels.philox import WORD
from torch import Tensor


class Logprobs(NamedTuple):
    """Log probabilities as vLLM gives them: of the raw logits, before penalties and temperature.

    N is the most that any row of the batch asked for (at most V); all rows have as many.
    """

    sampled_logprob: Tensor  # (R,) float32
    sampled_rank: Tensor  # (R,) int64, from 1: how many tokens are at least as likely
    top_logprobs: Tensor  # (R, N) float32, descending
    top_ids: Tensor  # (R, N) int64, ties by the lower id

    def at(self, index: int, num_top: int) -> tuple[float, int, list[tuple[int, float]]]:
        """The values of one row on the host: the sampled token's logprob and rank, and the `num_top` first (id,
        logprob)."""
        top = zip(self.top_ids[index, :num_top].tolist(), self.top_logprobs[index, :num_top].tolist())
        return self.sampled_logprob[index].item(), int(self.sampled_rank[index]), list(top)


def logprobs(raw: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """Logprobs of tokens (R,) and of the num_top most likely ones under raw (R, V) float32."""
    peak = raw.amax(-1, keepdim=True)
    total = masses(raw, peak).sum(-1, keepdim=True).double() / mass_scale(raw.shape[-1])
    log_total = total.log()  # (R, 1) float64
    sampled = raw.gather(-1, tokens[:, None])  # (R, 1)
    bits = (raw + 0.0).view(torch.int32)  # without -0.0, which equals 0.0 but has other bits
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)  # integers in the order of the floats
    ids = torch.arange(raw.shape[-1], device=raw.device)
    keys = (ordered.long() << 32) | (WORD - ids)  # (R, V), all different: topk has no ties to break
    top_ids = WORD - (keys.topk(min(num_top, len(ids)), dim=-1).values & WORD)  # (R, N)
    both = torch.cat((sampled, raw.gather(-1, top_ids)), dim=-1) - peak
    values = (both.double() - log_total).float()  # (R, 1 + N)
    return Logprobs(values[:, 0], (raw >= sampled).sum(-1), values[:, 1:], top_ids)
