"""Attention of a pass over the paged KV cache.

Shapes: T tokens, R rows, n tokens of one row, C gathered context tokens of all rows together, H/K local query/KV heads,
E head dim.

There are several ways behind one function. The kind of pass, device, dtype and the rows' own lengths choose one, so
that a pass has the same bits at any residency:
  - rows of one token each, in a bucket of fixed size, read the pages where they lie (kernels/decode_attention.py)
  - on a GPU in bf16 or fp16, a long row that starts in this pass attends to its own keys by cuDNN, which takes half the
    time of torch's varlen kernel on an H200 (0.88 against 1.70 ms for 8000 tokens and 32 heads of 128). It compiles for
    each length (45 ms), so rows are padded to few lengths: behind the causal mask nobody sees the padding
  - for other rows the context is gathered, then the varlen kernel (CUDA, bf16 and fp16) or scaled_dot_product_attention
    row by row attends
"""

import inspect

import torch
import torch.nn.functional as F
from penstock.engine.compute.inputs import CachedLayer, GatheredContext, PagedContext, RowRange
from penstock.engine.kernels.decode_attention import decode_attention
from penstock.engine.kernels.rope_append import rotate_
from penstock.engine.model.spec import ModelSpec
from penstock.engine.model.steps import KEYS_AT_ONCE
from penstock.scheduler.cost.pass_work import LEAST_WHOLE_TOKENS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Context = GatheredContext | PagedContext

WHOLE_STEP_TOKENS = 512  # lengths are padded to multiples of this for cuDNN, which pays from LEAST_WHOLE_TOKENS on
WHOLE_BACKEND = SDPBackend.CUDNN_ATTENTION
calls = {"whole": 0, "gathered": 0}

if torch.cuda.is_available():  # else nothing calls it, and torch.compile comes with it: 1 to 2 s of every rank's start
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads as they come, later versions want to be told
    _GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def whole_tokens(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> range:
    """The lengths of rows that attend without a gathered context, up to the narrowest window. The range is empty where
    cuDNN does not serve: it wants bf16 or fp16 and heads of at most 128 in steps of 8, and pays from compute capability
    9.0 on."""
    if not _has_varlen(device, dtype) or spec.head_dim > 128 or spec.head_dim % 8:
        return range(0)
    if torch.cuda.get_device_capability(device) < (9, 0) or not torch.backends.cudnn.is_available():
        return range(0)
    return range(LEAST_WHOLE_TOKENS, min((w for w in spec.windows if w is not None), default=2**31) + 1)


def attend_(heads: Tensor, cache: CachedLayer, context: Context, window: int | None) -> None:
    """Overwrites the q of heads (T, H + 2K, E) with its causal attention, each row over its own context: the pages of
    `cache`, which hold the pass's own k and v already.

    `window` is how many tokens a token sees, itself included; with None it sees all before it.
    """
    num_kv_heads = cache.keys.shape[1]
    q = heads[:, : heads.shape[1] - 2 * num_kv_heads]  # (T, H, E)
    if isinstance(context, PagedContext):
        scale, rows = q.shape[-1] ** -0.5, q[:, None]  # (R, 1, H, E)
        table = (context.page_table, context.lengths)
        workspace = (context.partials, context.num_segments)
        where = {"margin": cache.margin, "key_rope": cache.key_rope}
        pages = (cache.keys, cache.values, *table)
        decode_attention(rows, *pages, rows, scale, window, cache.page_size, *workspace, **where)
        return
    out = q
    if context.max_context:
        out = attend(q, *gather(cache, context), context, window)
    for row in context.whole:
        tokens = slice(row.first_query, row.first_query + row.num_queries)
        out[tokens] = attend_whole(heads[tokens], num_kv_heads)
    if out is not q:
        q.copy_(out)


def gather(cache: CachedLayer, context: GatheredContext) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values of the context: (C, K, E) each."""
    keys, values = cache.keys[context.addresses], cache.values[context.addresses]
    if cache.key_rope is not None:
        for part, positions in zip(keys.split(KEYS_AT_ONCE), context.positions.split(KEYS_AT_ONCE)):
            rotate_(part, *cache.key_rope[:, positions])
    return keys, values


def attend(q: Tensor, k: Tensor, v: Tensor, context: GatheredContext, window: int | None) -> Tensor:
    """Attention (T, H, E) of q (T, H, E) over the gathered k, v (C, K, E); what rows without gathered context get means
    nothing."""
    calls["gathered"] += 1
    scale = q.shape[-1] ** -0.5
    if _has_varlen(q.device, q.dtype):
        window_size = (-1 if window is None else window - 1, 0)
        bounds = (context.query_starts, context.context_starts, context.max_queries, context.max_context)
        return varlen_attn(q, k, v, *bounds, scale=scale, window_size=window_size, **_GROUPED)
    out = torch.empty_like(q)
    for row in context.ranges:
        if row.num_context:
            _attend_row(q, k, v, row, scale, window, out)
    return out


def attend_whole(heads: Tensor, num_kv_heads: int) -> Tensor:
    """Causal attention (n, H, E) of one row, heads (n, H + 2K, E), over its own keys and values."""
    num_tokens, num_heads, head_dim = heads.shape
    padding = -num_tokens % WHOLE_STEP_TOKENS
    if padding:
        padded = heads.new_empty(num_tokens + padding, num_heads, head_dim)
        padded[:num_tokens], padded[num_tokens:] = heads, 0.0
        heads = padded
    parts = heads.split([num_heads - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k, v = (part.transpose(0, 1)[None] for part in parts)  # (1, H or K, n + padding, E)
    calls["whole"] += 1
    with sdpa_kernel(WHOLE_BACKEND):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=head_dim**-0.5, enable_gqa=True)
    return out[0].transpose(0, 1)[:num_tokens]


def _has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _attend_row(q: Tensor, k: Tensor, v: Tensor, row: RowRange, scale: float, window: int | None, out: Tensor) -> None:
    """Attends one row by scaled_dot_product_attention, which takes heads first. A mask is aligned to the end of the
    context, as is_causal is not. q is copied, since the fp32 kernel on a GPU wants 16-byte alignment."""
    tokens = slice(row.first_query, row.first_query + row.num_queries)
    q = q[tokens].clone().transpose(0, 1)[None]  # (1, H, q, E)
    k = k[row.first_context : row.first_context + row.num_context].transpose(0, 1)[None]  # (1, K, L, E)
    v = v[row.first_context : row.first_context + row.num_context].transpose(0, 1)[None]
    mask = causal_mask(row, window, q.device)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    out[tokens] = attended[0].transpose(0, 1)  # (q, H, E)


def causal_mask(row: RowRange, window: int | None, device: torch.device) -> Tensor:
    """Mask (queries, context) bool: which of its context tokens each query of a row sees."""
    query = torch.arange(row.num_context - row.num_queries, row.num_context, device=device)[:, None]
    key = torch.arange(row.num_context, device=device)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask
