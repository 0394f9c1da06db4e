"""The right outputs of attention sinks (StreamingLLM, Xiao et al. 2023), on transformers' modules and without a cache.

One forward pass over all tokens: un-rotated K and V of every token are computed once in each layer, and each query
attends densely to those that an eviction schedule would hold by then, rotated by their indices among the held. A deep K
or V is thus what it was when its token was new, made with tokens that may since be evicted; nothing is recomputed.
Knows nothing of pages, batches, chunks of a prompt or ranks: the engine's logits may depend on none of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "sink_oracle"
_NOBODY = -1
_QUERIES_AT_ONCE = 512  # bounds what is gathered: queries * held * KV heads * head_dim


def eviction_chunk(window: int, page_size: int) -> int:
    """Number of tokens that are evicted at once: the whole pages in a quarter of the window, at least one page."""
    return max(1, window // 4 // page_size) * page_size


def held_indices(num_tokens: int, sinks: int, window: int, chunk: int) -> list[list[int]]:
    """The tokens that are held when each token is computed, in order of age, itself the last."""
    held: list[int] = []
    held_by_token = []
    for token in range(num_tokens):
        while len(held) + 1 > sinks + window:
            del held[sinks : sinks + chunk]
        held.append(token)
        held_by_token.append(list(held))
    return held_by_token


@torch.no_grad()
def sink_logits(
    model: PreTrainedModel,
    tokens: list[int],
    held_by_token: list[list[int]],
    absolute_positions: bool = False,
    layer_windows: bool = False,
) -> Tensor:
    """Logits (T, vocab) of `model` (fp32, eval) for T tokens, each of which attends to its `held_by_token`.

    A held token's position is its index among the held. `absolute_positions` rotates by positions in the sequence
    instead, a mistake that is to be found. `layer_windows` also hides what a sliding-window layer's own window hides,
    counted in held tokens. By default all that is held is seen; both are the same where no window is shorter than what
    is held.
    """
    held = pad_sequence([torch.tensor(row) for row in held_by_token], batch_first=True, padding_value=_NOBODY)
    positions = held.clamp(min=0) if absolute_positions else torch.arange(held.shape[1]).expand(held.shape)
    attend = SinkAttention(held, positions, model.base_model.rotary_emb, layer_windows)
    unrotated = torch.zeros(1, len(tokens), dtype=torch.long)
    with _attention_of(model, attend):
        return model(torch.tensor([tokens]), position_ids=unrotated, use_cache=False).logits[0]


@contextmanager
def _attention_of(model: PreTrainedModel, attend: Callable) -> Iterator[None]:
    """Lets the model attend by `attend`; transformers builds no mask for an implementation that it does not know."""
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[_NAME]


@dataclass(frozen=True)
class SinkAttention:
    """An attention function for transformers. `held` (T, W) is padded with -1 behind; `positions` (T, W) are those of
    the held tokens."""

    held: Tensor
    positions: Tensor
    rotary: torch.nn.Module
    layer_windows: bool

    def __call__(
        self, module, query, key, value, attention_mask, scaling: float, sliding_window: int | None = None, **_
    ) -> tuple[Tensor, None]:
        """Attention (1, T, H, E) of query (1, H, T, E) over key and value (1, K, T, E). A rotation by position 0 has
        left them as they were, but for the factor that yarn puts on cos."""
        assert attention_mask is None, "the schedule alone says who sees whom"
        window = sliding_window if self.layer_windows else None
        rotation = self._rotation(query)
        blocks = torch.arange(query.shape[2]).split(_QUERIES_AT_ONCE)
        out = [self._attend(query[0], key[0], value[0], block, rotation, scaling, window) for block in blocks]
        return torch.cat(out)[None], None

    def _rotation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of cos and sin, (number of positions, R) each, without yarn's factor, which is on the queries and keys
        already."""
        every_position = torch.arange(int(self.positions.max()) + 1)[None]
        cos, sin = self.rotary(like, every_position)
        return cos[0] / self.rotary.attention_scaling, sin[0] / self.rotary.attention_scaling

    def _attend(self, query, key, value, block: Tensor, rotation, scaling: float, window: int | None) -> Tensor:
        """Attention (B, H, E) of a block (B,) of queries (H, T, E) over key and value (K, T, E)."""
        held, positions = self.held[block], self.positions[block]
        present = held != _NOBODY
        own_position = positions.gather(1, present.sum(1, keepdim=True) - 1)
        if window is not None:
            present = present & (own_position - positions < window)
        cos, sin = rotation
        queries = rotate(query[:, block], cos[own_position[:, 0]], sin[own_position[:, 0]])
        keys = rotate(key[:, held], cos[positions], sin[positions])  # (K, B, W, E)
        queries = queries.unflatten(0, (len(key), -1))  # (K, H / K, B, E)
        scores = torch.einsum("kgbe,kbwe->kgbw", queries, keys) * scaling
        weights = scores.masked_fill(~present, -torch.inf).softmax(-1)
        return torch.einsum("kgbw,kbwe->bkge", weights, value[:, held]).flatten(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first R of E dimensions, i together with i + R / 2: x (..., E), cos and sin (..., R)."""
    turned, kept = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)
