"""Notes tokens in the state that penalties look at (penalty.py), of the rows that ask for penalties, in one launch.

Shapes: T tokens, S rows of the state, V vocab.
"""

from penstock.engine.kernels.penalty import IN_PROMPT
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
BLOCK = 256


def note_tokens(occurrences: Tensor, asks: Tensor, rows: Tensor, tokens: Tensor, sampled: bool) -> None:
    """Notes tokens (T,) int64 and their rows (T,) int64 in `occurrences` (S, V) int32, of rows whose `asks` (S,) int64
    is not 0: as sampled ones, which are counted, or as computed ones. A sampled -1 is noted as token 0."""
    run = _note_tokens_triton if occurrences.is_cuda and HAS_TRITON else note_tokens_reference
    run(occurrences, asks, rows, tokens, sampled)


def note_tokens_reference(occurrences: Tensor, asks: Tensor, rows: Tensor, tokens: Tensor, sampled: bool) -> None:
    """Does the same in plain torch."""
    calls["reference"] += 1
    flat, index = occurrences.view(-1), rows * occurrences.shape[1] + tokens.clamp(min=0)
    own = (asks[rows] > 0).int()
    if sampled:
        flat.scatter_add_(0, index, own)
    else:
        flat[index] = flat[index] | own * IN_PROMPT


def _note_tokens_triton(occurrences: Tensor, asks: Tensor, rows: Tensor, tokens: Tensor, sampled: bool) -> None:
    parts = (occurrences, asks, rows, tokens)
    assert all(part.is_contiguous() for part in parts), "the strides must be contiguous"
    assert rows.shape == tokens.shape
    calls["triton"] += 1
    if num_tokens := len(tokens):
        grid = (triton.cdiv(num_tokens, BLOCK),)
        _note[grid](occurrences, occurrences.shape[1], asks, rows, tokens, num_tokens, sampled, BLOCK)


_IN_PROMPT = tl.constexpr(IN_PROMPT)


@triton.jit(do_not_specialize=["num_tokens"])
def _note(
    occurrences, vocab_size, asks, rows, tokens, num_tokens, SAMPLED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_tokens
    row = tl.load(rows + index, mask=inside, other=0)
    inside &= tl.load(asks + row, mask=inside, other=0) > 0
    token = tl.maximum(tl.load(tokens + index, mask=inside, other=0), 0)
    if SAMPLED:
        tl.atomic_add(occurrences + row * vocab_size + token, 1, mask=inside, sem="relaxed")
    else:
        tl.atomic_or(occurrences + row * vocab_size + token, _IN_PROMPT, mask=inside, sem="relaxed")
