"""Passes of a prompt for whose kernels a start compiles, since they are never padded: those that score the prompt, and
in fp32 all."""

from penstock.engine.kernels import linear, stored_linear, stored_matmul
from penstock.scheduler.batching.batch import NO_TOKEN, Batch, BatchRow, PromptScores
from penstock.scheduler.batching.pages import RESERVED_PAGE, pages_for

# Tokens up to which linears have kernels of their own: each number that stored_linear takes, and the tiles of others
FEW_TOKENS = sorted({*range(2, stored_linear.MOST_TOKENS + 1), *linear.TILES, *stored_matmul.TOKENS})


def eager_prompts(index: int, most_tokens: int, page_size: int, margin: int) -> list[Batch]:
    """Prompts of up to `most_tokens` tokens, by a row of this index: one for each kernel of linears over few tokens, of
    all of which logits are wanted; and as many of one token more, of the last of which so few logits are, or all."""
    most = min(FEW_TOKENS[-1] + 1, most_tokens)
    wanted = [(few, few) for few in FEW_TOKENS if few < most]
    wanted += [(most, few) for few in sorted({1, *linear.TILES, most}) if few <= most]
    return [Batch.of([_prompt(index, *each, page_size, margin)]) for each in wanted]


def _prompt(index: int, num_tokens: int, num_logits: int, page_size: int, margin: int) -> BatchRow:
    """A prompt over the reserved page, which is scored behind its last tokens but one; that one is sampled."""
    scores = PromptScores(0, num_tokens - num_logits, NO_TOKEN) if num_logits > 1 else None
    pages = (RESERVED_PAGE,) * pages_for(margin + num_tokens, page_size)
    return BatchRow(index, (0,) * num_tokens, 0, pages, samples=True, sampling=None, scores=scores)
