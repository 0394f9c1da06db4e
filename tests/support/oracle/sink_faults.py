"""The outputs of an engine with a mistake in its attention sinks: references that a right engine must not meet."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.oracle.sink_oracle import held_indices, sink_logits

SINKS, WINDOW, CHUNK = 4, 40, 8  # the schedule that all of them miss
Wrong = Callable[[PreTrainedModel, list[int]], Tensor]  # (T, vocab)


def _schedule(sinks: int, window: int, chunk: int) -> Wrong:
    return lambda model, tokens: sink_logits(model, tokens, held_indices(len(tokens), sinks, window, chunk))


def _by_position(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    held = held_indices(len(tokens), SINKS, WINDOW, CHUNK)
    return sink_logits(model, tokens, held, absolute_positions=True)


@torch.no_grad()
def _recomputed(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits of plain runs over what is held: deep keys and values forget what was evicted."""
    by_length: dict[int, dict[int, list[int]]] = {}
    for token, held in enumerate(held_indices(len(tokens), SINKS, WINDOW, CHUNK)):
        by_length.setdefault(len(held), {})[token] = [tokens[index] for index in held]
    logits = torch.empty(len(tokens), model.config.vocab_size)
    for rows in by_length.values():
        logits[list(rows)] = model(torch.tensor(list(rows.values())), use_cache=False).logits[:, -1]
    return logits


WRONG: dict[str, Wrong] = {
    "a page more is evicted at once": _schedule(SINKS, WINDOW, 2 * CHUNK),
    "half as much is evicted at once": _schedule(SINKS, WINDOW, CHUNK // 2),
    "one token is evicted at a time": _schedule(SINKS, WINDOW, 1),
    "a sink is lost to the window": _schedule(SINKS - 1, WINDOW + 1, CHUNK),
    "a sink too many": _schedule(SINKS + 1, WINDOW - 1, CHUNK),
    "no sinks": _schedule(0, SINKS + WINDOW, CHUNK),
    "evicted a token early": _schedule(SINKS, WINDOW - 1, CHUNK),
    "evicted a token late": _schedule(SINKS, WINDOW + 1, CHUNK),
    "rotated by position": _by_position,
    "keys and values computed anew": _recomputed,
}
