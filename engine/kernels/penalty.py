"""Repetition, presence and frequency penalties of the rows that ask for them, in one launch.

Penalised logits are float32 beside the logits: those stay raw for log probabilities, and in their own dtype for rows
that ask for nothing, for which a program ends at once. Whoever reads both takes a row from where it is (load_score).

Shapes: R rows, V vocab, S rows of the state.
`occurrences` (S, V) int32 is what penalties look at: how often a token was sampled, and the bit IN_PROMPT if it stands
in what was computed. (A sampled token that is computed may have it too: what counts is whether a token occurred.)
"""

from typing import NamedTuple

import torch
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
IN_PROMPT = 1 << 30
BLOCK = 4096


class Penalties(NamedTuple):
    """The penalties of each row, and whether it asks for any."""

    asks_penalty: Tensor  # (R,) int64: 1, or 0 for none
    repetition_penalty: Tensor  # (R,) float32, as the next two
    presence_penalty: Tensor
    frequency_penalty: Tensor


class Penalised(NamedTuple):
    """Logits of the rows that ask for penalties; the other rows of `scores` mean nothing."""

    asks: Tensor  # (R,) int64
    scores: Tensor  # (R, V) float32

    def over(self, logits: Tensor) -> Tensor:
        """Logits (R, V) float32 of all rows."""
        return torch.where(self.asks[:, None] > 0, self.scores, logits.float())


def penalise_rows(
    logits: Tensor, vocab_size: int, occurrences: Tensor, rows: Tensor, penalties: Penalties
) -> Penalised:
    """Penalises the first vocab_size columns of logits (R, V or more) of any float dtype. `rows` (R,) int64 are the
    state's."""
    takes = logits.is_cuda and HAS_TRITON and logits.dtype != torch.float64
    run = _penalise_rows_triton if takes else penalise_rows_reference
    return run(logits, vocab_size, occurrences, rows, penalties)


def penalise_rows_reference(
    logits: Tensor, vocab_size: int, occurrences: Tensor, rows: Tensor, penalties: Penalties
) -> Penalised:
    """Does the same in plain torch."""
    calls["reference"] += 1
    logits, found = logits[:, :vocab_size].float(), occurrences[rows]  # (R, V)
    repetition, presence, frequency = (part[:, None] for part in penalties[1:])
    counts = found & (IN_PROMPT - 1)
    scaled = torch.where(logits < 0, logits * repetition, logits / repetition)
    scores = torch.where(found > 0, scaled, logits) - frequency * counts - presence * (counts > 0)
    return Penalised(penalties.asks_penalty, scores)


def _penalise_rows_triton(
    logits: Tensor, vocab_size: int, occurrences: Tensor, rows: Tensor, penalties: Penalties
) -> Penalised:
    num_rows = len(logits)
    assert logits.stride(1) == 1, "the last dim of the logits must have stride 1"
    assert 1 <= vocab_size <= logits.shape[1] and occurrences.shape[1] == vocab_size
    assert all(part.is_contiguous() for part in (occurrences, rows, *penalties)), "the strides must be contiguous"
    assert all(part.shape == (num_rows,) for part in (rows, *penalties))
    calls["triton"] += 1
    scores = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
    if num_rows:
        _penalise[(triton.cdiv(vocab_size, BLOCK), num_rows)](
            *(logits, logits.stride(0), vocab_size, occurrences, rows, *penalties, scores, BLOCK),
            num_warps=8,
            enable_fp_fusion=False,
        )
    return Penalised(penalties.asks_penalty, scores)


_COUNTS = tl.constexpr(IN_PROMPT - 1)


@triton.jit
def _penalise(
    logits, logits_row, vocab_size, occurrences, rows, asks, repetitions, presences, frequencies, scores,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    if tl.load(asks + row) > 0:
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < vocab_size
        logit = tl.load(logits + row * logits_row + column, mask=inside, other=0.0).to(tl.float32)
        found = tl.load(occurrences + tl.load(rows + row) * vocab_size + column, mask=inside, other=0)
        repetition, count = tl.load(repetitions + row), found & _COUNTS
        scaled = tl.where(logit < 0, logit * repetition, tl.div_rn(logit, repetition))
        score = tl.where(found > 0, scaled, logit) - tl.load(frequencies + row) * count.to(tl.float32)
        score -= tl.load(presences + row) * (count > 0).to(tl.float32)
        tl.store(scores + row * vocab_size + column, score, mask=inside)


@triton.jit
def load_score(logits, scores, is_penalised, column, vocab_size, other, BESIDE: tl.constexpr):
    """Loads logits of a row as float32, from `scores` if it is penalised; `other` behind the vocabulary. Both begin at
    the row. With BESIDE unset there are no scores."""
    inside = column < vocab_size
    if BESIDE:  # neither load waits for the other
        raw = tl.load(logits + column, mask=inside & (is_penalised == 0), other=other).to(tl.float32)
        score = tl.load(scores + column, mask=inside & (is_penalised > 0), other=other)
        return tl.where(is_penalised > 0, score, raw)
    else:
        return tl.load(logits + column, mask=inside, other=other).to(tl.float32)
