"""Attention of a pass over the paged KV cache.

Shapes: T tokens, R rows, n tokens of some rows, C context tokens of some rows together, H/K local query/KV heads,
E head dim.

There are several ways behind one function. What a row has cached and computes (RowKind), device and dtype choose one,
and the shape of the pass: never residency, so that a pass has the same bits at any.
  - rows of one token each read the pages where they lie (kernels/decode_attention.py)
  - prompts that start in this pass attend to their own keys and values in the activation: all of them in one launch
    (kernels/prompt_attention.py; CUDA, bf16 and fp16), or by scaled_dot_product_attention row by row
  - chunks of several tokens that continue behind cached ones read pages where they lie, if the pass is padded, so that
    a graph may run it for any lengths, or if they are short. Other chunks attend to a copy of their own context, which
    takes less time for many queries (kernels/prompt_attention.py). Their bits are the same either way
"""

import itertools
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from penstock.engine.compute.inputs import (
    CachedLayer,
    Chunks,
    Context,
    MixedContext,
    PagedChunks,
    PagedContext,
    RowRange,
)
from penstock.engine.kernels.decode_attention import decode_attention
from penstock.engine.kernels.prompt_attention import Pages, attend_blocks_
from penstock.engine.kernels.rope_append import rotate_
from penstock.engine.model.steps import KEYS_AT_ONCE
from torch import Tensor

calls = {"paged": 0, "behind": 0, "gathered": 0, "own": 0}  # of attention by each way


def takes_padding(dtype: torch.dtype, device: torch.device) -> bool:
    """Tells whether chunks may be padded: the kernel reads where they start on the device, so that a graph may run it
    for others. Row by row they are known to the host, which serves a CPU, and never a graph."""
    return device.type == "cpu" or _has_kernel(device, dtype)


def attend_(heads: Tensor, cache: CachedLayer, context: Context, window: int | None) -> None:
    """Overwrites the q of heads (T, H + 2K, E) with its causal attention, each row over its own context. The pages of
    `cache` hold the pass's own k and v already; k in `heads` is rotated.

    `window` is how many tokens a token sees, itself included; with None it sees all before it.
    """
    num_kv_heads = cache.keys.shape[1]
    q, own_k, own_v = _split_heads(heads, num_kv_heads)
    if isinstance(context, PagedContext):
        attend_paged(q, cache, context, window, q)
        return
    for part in context.continuing:
        if isinstance(part, PagedChunks):
            calls["behind"] += 1
            assert cache.key_rope is None, "keys in pages are rotated"
            pages = Pages(part.page_table, cache.page_size, cache.margin)
            attend_chunks_(q[part.chunks.tokens], cache.keys, cache.values, part.chunks, window, pages)
        else:
            calls["gathered"] += 1
            attend_chunks_(q[part.chunks.tokens], *gather(cache, part.addresses, part.positions), part.chunks, window)
    if context.starting is not None:
        calls["own"] += 1
        tokens = context.starting.tokens
        attend_chunks_(q[tokens], own_k[tokens], own_v[tokens], context.starting, window)
    if context.paged is not None:
        single = q[: len(context.paged.lengths)]
        attend_paged(single, cache, context.paged, window, single)


def attend_paged(q: Tensor, cache: CachedLayer, context: PagedContext, window: int | None, out: Tensor) -> None:
    """Computes out (R, H, E), which may be q, the attention of q (R, H, E), one token a row, over the row's pages; of
    padded rows `out` keeps what it has."""
    calls["paged"] += 1
    scale = q.shape[-1] ** -0.5
    pages = (cache.keys, cache.values, context.page_table, context.lengths)
    where = {"margin": cache.margin, "key_rope": cache.key_rope}
    decode_attention(q[:, None], *pages, out[:, None], scale, window, cache.page_size, context.work, **where)


def _read_pages(cache: CachedLayer, page_table: Tensor, row: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values (C, K, E) of the first tokens of a row of a page table (R, P)."""
    positions = torch.arange(num_tokens, device=page_table.device)
    return gather(cache, Pages(page_table, cache.page_size, cache.margin).addresses(row, positions), positions)


def gather(cache: CachedLayer, addresses: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values (C, K, E) of cached tokens."""
    keys, values = cache.keys[addresses], cache.values[addresses]
    if cache.key_rope is not None:
        for part, at in zip(keys.split(KEYS_AT_ONCE), positions.split(KEYS_AT_ONCE)):
            rotate_(part, *cache.key_rope[:, at])
    return keys, values


def attend_chunks_(
    q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, window: int | None, pages: Pages | None = None
) -> None:
    """Overwrites q (n, H, E), the queries of `chunks`, with its attention over their context k, v (C, K, E). Tokens
    that are in no chunk stay as they are. With `pages` k and v are a cache, and each row's context begins at 0."""
    if _has_kernel(q.device, q.dtype):
        attend_blocks_(q, k, v, chunks.blocks, window, pages)
        return
    for index, row in enumerate(chunks.ranges):
        if not row.num_queries:
            continue
        own = slice(None)
        if pages is not None:
            own = pages.addresses(index, torch.arange(row.num_context, device=q.device))
        _attend_row_(q, k[own], v[own], row, q.shape[-1] ** -0.5, window)


def row_contexts(
    heads: Tensor, cache: CachedLayer, context: MixedContext
) -> Iterator[tuple[slice, RowRange, Tensor, Tensor]]:
    """Each row of a pass in its order, for those who attend by themselves: its tokens, its range, and the keys,
    rotated, and values (C, K, E) that it attends to. The host waits for the lengths of paged rows."""
    _, own_k, own_v = _split_heads(heads, cache.keys.shape[1])
    lengths = [] if context.paged is None else context.paged.lengths.tolist()
    for row, length in enumerate(lengths):
        context_of = _read_pages(cache, context.paged.page_table, row, length)
        yield slice(row, row + 1), RowRange(0, 1, 0, length), *context_of
    for part in context.continuing:
        if isinstance(part, PagedChunks):
            rows = enumerate(part.chunks.ranges)
            own = (_read_pages(cache, part.page_table, index, row.num_context) for index, row in rows)
            yield from _own_contexts(part.chunks, own)
        else:
            k, v = gather(cache, part.addresses, part.positions)
            yield from _own_contexts(part.chunks, itertools.repeat((k, v)))
    if context.starting is not None:
        tokens = context.starting.tokens
        yield from _own_contexts(context.starting, itertools.repeat((own_k[tokens], own_v[tokens])))


def _own_contexts(
    chunks: Chunks, contexts: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[slice, RowRange, Tensor, Tensor]]:
    """Rows of chunks as row_contexts gives them, each with tensors in which its keys and values lie where its range
    says."""
    for row, (k, v) in zip(chunks.ranges, contexts):
        first, seen = chunks.first_token + row.first_query, slice(row.first_context, row.end_context)
        yield slice(first, first + row.num_queries), row, k[seen], v[seen]


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _split_heads(heads: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The q, k and v of heads (n, H + 2K, E)."""
    return heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)


def _attend_row_(q: Tensor, k: Tensor, v: Tensor, row: RowRange, scale: float, window: int | None) -> None:
    """Attends one row by scaled_dot_product_attention, which takes heads first. A mask is aligned to the end of the
    context, as is_causal is not. What is read is copied, since the fp32 kernel on a GPU wants 16-byte alignment."""
    tokens = slice(row.first_query, row.first_query + row.num_queries)
    seen = slice(row.first_context, row.end_context)
    parts = (q[tokens], k[seen], v[seen])
    own_q, k, v = (part.clone().transpose(0, 1)[None] for part in parts)  # (1, H or K, q or L, E)
    mask = causal_mask(row, window, q.device)
    attended = F.scaled_dot_product_attention(own_q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    q[tokens] = attended[0].transpose(0, 1)  # (q, H, E)


def causal_mask(row: RowRange, window: int | None, device: torch.device) -> Tensor:
    """Mask (queries, context) bool: which of its context tokens each query of a row sees."""
    query = torch.arange(row.num_context - row.num_queries, row.num_context, device=device)[:, None]
    key = torch.arange(row.num_context, device=device)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask
