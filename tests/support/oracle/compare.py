"""The reference's logits for what the engine generated, and how far the engine's are from them.

The reference is fed the engine's own tokens (one forward pass for each prompt, batch of one, no cache). Where every
token is the reference's best, greedy generation by the reference gives the same tokens, by induction.
"""

from dataclasses import dataclass

import torch
from penstock.engine.model.families import read_spec
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.oracle.cases import prompts
from tests.support.rounding import model_apart


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits (prompts, n, vocab) fp32 of the reference for tokens (prompts, n) that the engine generated."""
    rows = []
    for prompt, generated in zip(prompts(), tokens.tolist()):
        logits = model(torch.tensor([[*prompt, *generated[:-1]]]), use_cache=False).logits
        rows.append(logits[0, len(prompt) - 1 :].float())
    return torch.stack(rows)


def apart(model: PreTrainedModel, num_tokens: int, dtype: torch.dtype | None = None) -> float:
    """The relative difference that two runs of the model over so many tokens may have, in its dtype or another one."""
    return model_apart(read_spec(model.config.to_diff_dict(), "the model"), num_tokens, dtype or model.dtype)


def relative_difference(logits: Tensor, reference: Tensor) -> Tensor:
    """Errors max|difference| / max|logit| at each position: (...,) for (..., vocab)."""
    difference = (logits.float() - reference).abs().amax(-1)
    return difference / reference.abs().amax(-1)


def shared_prefix(tokens: Tensor, others: Tensor) -> Tensor:
    """Mask (prompts, n) bool: where all earlier tokens are the same."""
    same = (tokens == others).cumprod(dim=-1).roll(1, dims=-1).bool()
    same[:, 0] = True
    return same


@dataclass(frozen=True)
class Choices:
    """Tokens of the engine that are not the reference's best (`differ`), and where they may differ: `gaps` are the
    reference's top-2 gaps over max|logit|."""

    differ: Tensor  # (prompts, n) bool
    gaps: Tensor  # (prompts, n)

    def num_near_ties(self, gap: float) -> int:
        return int((self.gaps < gap).sum())

    def wrong(self, gap: float) -> Tensor:
        """Prompt and position, (k, 2), of each token that differs where the gap is not under `gap`."""
        return (self.differ & (self.gaps >= gap)).nonzero()


def choices(tokens: Tensor, reference: Tensor) -> Choices:
    first, second = reference.topk(2, dim=-1).values.unbind(-1)
    return Choices(tokens != reference.argmax(-1), (first - second) / reference.abs().amax(-1))
