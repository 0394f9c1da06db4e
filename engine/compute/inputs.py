"""What is bound to a plan when it runs: the tokens of a batch and where their keys and values lie.

Shapes: T tokens in the batch, R rows, C context tokens of all rows together, N sampled rows, P pages, S page size.
The host sends a few small tensors; everything as long as T or C is made from them on the device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.request import ON_DEVICE
from torch import Tensor


@dataclass(frozen=True)
class RowRange:
    """Where a row's queries and its gathered context lie in the flat tensors, in tokens."""

    first_query: int
    num_queries: int
    first_context: int
    num_context: int


@dataclass(frozen=True)
class GatheredContext:
    """What rows of any length attend to: `addresses` are page * S + offset of all their tokens, row after row,
    `positions` their positions. Rows of `whole` have all their context in this pass and attend to it there: they have
    queries, and no gathered context."""

    addresses: Tensor  # (C,) int64
    positions: Tensor  # (C,) int64
    query_starts: Tensor  # (R + 1,) int32
    context_starts: Tensor  # (R + 1,) int32
    max_queries: int
    max_context: int
    ranges: tuple[RowRange, ...]
    whole: tuple[RowRange, ...]


@dataclass(frozen=True)
class PagedContext:
    """What rows of one token each attend to, at fixed addresses and of a bucket's size; a padded row has length 0."""

    page_table: Tensor  # (R, P) int32
    lengths: Tensor  # (R,) int32, the new token included
    partials: Tensor  # fp32 workspace of decode_attention
    num_segments: int


class CachedLayer(NamedTuple):
    """A layer's keys and values (P * S, K, E). The first `margin` entries of a row's first page are empty. `key_rope`
    is the table (2, L, F) that keys are rotated with when they are read, each by its position; it is None where keys
    were rotated before they were cached."""

    keys: Tensor
    values: Tensor
    page_size: int
    margin: int = 0
    key_rope: Tensor | None = None


@dataclass(frozen=True)
class PassInputs:
    """A batch on the device. `positions` are indices in the row's cached tokens, in order of age, and set the rotation.
    `addresses` are page * S + offset of the batch's own tokens."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    addresses: Tensor  # (T,) int64
    token_rows: Tensor  # (T,) int64: the sampler's row of each token
    context: GatheredContext | PagedContext
    select: Tensor  # (N,) int64: which tokens are sampled from
    sampled_rows: tuple[int, ...]  # the sampler's rows that are sampled
    sampled_rows_device: Tensor  # (N,) int64
    sampled_positions: Tensor  # (N,) int64: where in its sequence the token is that is being sampled


def to_device(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copies numbers from the host to the device; the host does not wait for the copy."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def bind(
    batch: Batch, page_size: int, last_tokens: Tensor, whole_tokens: range = range(0), margin: int = 0
) -> PassInputs:
    """Moves a batch to the device of `last_tokens` (max_num_seqs,), which holds the tokens named as ON_DEVICE. Rows
    that start in this pass with a number of tokens in `whole_tokens` attend without a gathered context. The first
    `margin` entries of a row's first page are empty."""
    device = last_tokens.device
    whole = [row.start == 0 and len(row.tokens) in whole_tokens for row in batch.rows]
    ranges = _ranges(batch, whole)
    lengths = [row.num_queries for row in ranges]
    contexts = [row.num_context for row in ranges]
    num_tokens, num_context = sum(lengths), sum(contexts)

    def put(values, dtype=torch.int64) -> Tensor:
        return to_device(values, dtype, device)

    query_starts = put([0, *(r.first_query + r.num_queries for r in ranges)], torch.int32)  # (R + 1,)
    context_starts = put([0, *(r.first_context + r.num_context for r in ranges)], torch.int32)
    widest = max(len(row.pages) for row in batch.rows)
    pages = put([[*row.pages, *[0] * (widest - len(row.pages))] for row in batch.rows])  # (R, P)
    of_token = torch.repeat_interleave(put(lengths), output_size=num_tokens)  # (T,) row of each token
    of_context = torch.repeat_interleave(put(contexts), output_size=num_context)  # (C,)
    num_cached = put([row.num_cached for row in batch.rows])
    positions = torch.arange(num_tokens, device=device) - query_starts[of_token] + num_cached[of_token]
    context_positions = torch.arange(num_context, device=device) - context_starts[of_context]

    tokens = put([token for row in batch.rows for token in row.tokens])
    token_rows = put([row.index for row in batch.rows])[of_token]
    if any(ON_DEVICE in row.tokens for row in batch.rows):
        tokens = torch.where(tokens == ON_DEVICE, last_tokens[token_rows], tokens)
    sampled = [(row, queries) for row, queries in zip(batch.rows, ranges) if row.samples]
    return PassInputs(
        tokens=tokens,
        positions=positions,
        addresses=_addresses(pages, of_token, positions + margin, page_size),
        token_rows=token_rows,
        context=GatheredContext(
            addresses=_addresses(pages, of_context, context_positions + margin, page_size),
            positions=context_positions,
            query_starts=query_starts,
            context_starts=context_starts,
            max_queries=max(lengths),
            max_context=max(contexts),
            ranges=ranges,
            whole=tuple(row for row, alone in zip(ranges, whole) if alone),
        ),
        select=put([queries.first_query + queries.num_queries - 1 for _, queries in sampled]),
        sampled_rows=tuple(row.index for row, _ in sampled),
        sampled_rows_device=put([row.index for row, _ in sampled]),
        sampled_positions=put([row.start + len(row.tokens) for row, _ in sampled]),
    )


def _ranges(batch: Batch, whole: list[bool]) -> tuple[RowRange, ...]:
    ranges, query, context = [], 0, 0
    for row, alone in zip(batch.rows, whole):
        num_context = 0 if alone else row.num_cached + len(row.tokens)
        ranges.append(RowRange(query, len(row.tokens), context, num_context))
        query, context = query + len(row.tokens), context + num_context
    return tuple(ranges)


def _addresses(pages: Tensor, rows: Tensor, entries: Tensor, page_size: int) -> Tensor:
    return pages[rows, entries // page_size] * page_size + entries % page_size
