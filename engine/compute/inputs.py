"""Describes what a pass runs on, once a batch is bound to the device: its tokens, and where the keys and values lie
that they attend to.

Shapes: T tokens in the batch, R rows, C context tokens of some rows together, N sampled rows, P pages, S page size.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from penstock.engine.kernels.decode_work import DecodeWork
from torch import Tensor


class RowRange(NamedTuple):
    """Says where a row's queries and its context lie in the flat tensors, in tokens."""

    first_query: int
    num_queries: int
    first_context: int
    num_context: int

    @property
    def end_context(self) -> int:
        return self.first_context + self.num_context

    def last(self, num_queries: int) -> "RowRange":
        """The row with so many of its queries, its last ones."""
        return self._replace(first_query=self.first_query + self.num_queries - num_queries, num_queries=num_queries)


@dataclass(frozen=True)
class PagedContext:
    """Holds what rows of one token each attend to: the pages where they lie. A padded row has length 0."""

    page_table: Tensor  # (R, P) int32
    lengths: Tensor  # (R,) int32, the new token included
    work: DecodeWork  # of decode_attention, listed from the lengths


@dataclass(frozen=True)
class Chunks:
    """Rows of any length, one behind another, from token `first_token` of the pass on; blocks and ranges count from
    there. A row's queries are the last tokens of its context; it may have none. Tokens that are of no row may lie among
    them. `blocks` are those of kernels/prompt_attention.py, `ranges` say the same to the host, where attention goes row
    by row."""

    first_token: int
    num_tokens: int
    blocks: Tensor  # (B, FIELDS) int32
    ranges: Sequence[RowRange]

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + self.num_tokens)


@dataclass(frozen=True)
class PagedChunks:
    """Holds what chunks of rows that have cached tokens attend to: the pages where they lie. A block's or range's place
    among its chunks is that of its row in the page table."""

    chunks: Chunks
    page_table: Tensor  # (R, P) int32


@dataclass(frozen=True)
class GatheredContext:
    """Holds what chunks of rows that have cached tokens attend to: `addresses` are page * S + offset of all their
    tokens, row after row, their own included; `positions` are those of these tokens."""

    chunks: Chunks
    addresses: Tensor  # (C,) int64
    positions: Tensor  # (C,) int64


@dataclass(frozen=True)
class MixedContext:
    """Holds what rows attend to by their kind, which is the order of their tokens in a pass:

        | one token each: paged | chunks behind cached tokens: continuing | prompts that start: starting |

    Rows of `continuing` attend to pages, or to a copy of their own context, some rows at a time; those of `starting`
    have all of it in this pass, and attend to it in the activation. `of_lasts` is there where rows are selected behind
    the last layer's attention: the part of this for rows of one token and the last tokens of others that sample, which
    is all that is read of it.
    """

    paged: PagedContext | None
    continuing: tuple[PagedChunks | GatheredContext, ...]
    starting: Chunks | None
    of_lasts: "MixedContext | None" = None


Context = PagedContext | MixedContext


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
class ScoredTokens:
    """Holds which log probabilities of prompts are asked, M of them: behind which tokens of the pass, of which tokens,
    and with how many of the most likely ones."""

    select: Tensor  # (M,) int64
    targets: Tensor  # (M,) int64
    wanted: Tensor  # (M,) int64


@dataclass(frozen=True)
class PassInputs:
    """A batch on the device. `positions` are indices in the row's cached tokens, in order of age, and set the rotation.
    `addresses` are page * S + offset of the batch's own tokens. `scored` is None where no row asks for it."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    addresses: Tensor  # (T,) int64
    token_rows: Tensor  # (T,) int64: the sampler's row of each token
    context: Context
    select: Tensor | None  # (N,) int64: which tokens are sampled from; None: all, in their order
    sampled_rows: tuple[int, ...]  # the sampler's rows that are sampled
    sampled_rows_device: Tensor  # (N,) int64
    sampled_positions: Tensor  # (N,) int64: where in its sequence the token is that is being sampled
    scored: ScoredTokens | None = None

    @functools.cached_property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.tokens.shape[0]

    @property
    def wants_logits(self) -> bool:
        """Tells whether any row is sampled or scored."""
        return bool(self.sampled_rows) or self.scored is not None


def to_device(values: list | numpy.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copies numbers from the host to the device; the host does not wait for the copy. (numpy takes a fifth of torch's
    time for the numbers of a list.)"""
    tensor = torch.from_numpy(numpy.asarray(values, getattr(numpy, str(dtype).removeprefix("torch."))))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
