"""Attention of a pass over the paged KV cache.

Shapes: T tokens, R rows, C context tokens of all rows together, H/K local query/KV heads, E head dim.
Three ways behind one function: rows of one token each, in a bucket of fixed size, read the pages where they lie
(kernels/decode_attention.py); for others the context is gathered, then torch's varlen kernel (CUDA, bf16 and fp16) or
scaled_dot_product_attention row by row attends. The choice depends on the kind of pass, device and dtype alone, so
that a pass has the same bits at any residency.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from engine.kernels.decode_attention import decode_attention
from engine.model.inputs import GatheredContext, PagedContext, RowRange

Context = GatheredContext | PagedContext

# torch 2.11 takes grouped heads as they come, later versions want to be told
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attend_(q: Tensor, keys: Tensor, values: Tensor, context: Context, window: int | None, page_size: int) -> None:
    """q (T, H, E) becomes its attention over keys and values (P * S, K, E), causal, each row over its own context.

    `window`: how many tokens a token sees, itself included; None = all before it.
    """
    if isinstance(context, PagedContext):
        scale, rows = q.shape[-1] ** -0.5, q[:, None]  # (R, 1, H, E)
        table = (context.page_table, context.lengths)
        workspace = (context.partials, context.num_segments)
        decode_attention(rows, keys, values, *table, rows, scale, window, page_size, *workspace)
    else:
        q.copy_(attend(q, keys[context.places], values[context.places], context, window))


def attend(q: Tensor, k: Tensor, v: Tensor, context: GatheredContext, window: int | None) -> Tensor:
    """Attention of q (T, H, E) over the gathered k, v (C, K, E): (T, H, E)."""
    scale = q.shape[-1] ** -0.5
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        window_size = (-1 if window is None else window - 1, 0)
        bounds = (context.query_starts, context.context_starts, context.max_queries, context.max_context)
        return varlen_attn(q, k, v, *bounds, scale=scale, window_size=window_size, **_GROUPED)
    return torch.cat([_attend_row(q, k, v, row, scale, window) for row in context.ranges])


def _attend_row(q: Tensor, k: Tensor, v: Tensor, row: RowRange, scale: float, window: int | None) -> Tensor:
    """Heads first for scaled_dot_product_attention; the mask is aligned to the end of the context, which is_causal
    is not."""
    q = q[row.first_query : row.first_query + row.num_queries].transpose(0, 1)[None]  # (1, H, q, E)
    k = k[row.first_context : row.first_context + row.num_context].transpose(0, 1)[None]  # (1, K, L, E)
    v = v[row.first_context : row.first_context + row.num_context].transpose(0, 1)[None]
    query = torch.arange(row.num_context - row.num_queries, row.num_context, device=q.device)[:, None]
    key = torch.arange(row.num_context, device=q.device)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)  # (q, H, E)
