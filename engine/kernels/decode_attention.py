"""The attention of a decode pass over the paged KV cache, split along the context, for CUDA graphs.

Shapes: R rows, Q tokens a row, H/K local query/KV heads, E head dim, P pages, S page size, N segments a row,
M = H/K * Q queries of a KV head, padded to a power of two and to the 16 that tl.dot wants.

Each (KV head, segment, row) has a program, which reads its part of the context once for all M queries and leaves fp32
partials (weighted values, maximum, sum of weights); a second kernel merges them. With one segment a row the first
kernel writes the result.
Sources: Dao et al. 2023, "Flash-Decoding"; vLLM's PagedAttention.

Launches depend on the bucket alone, since lengths and pages are read on the device. A row's bits depend on its own q,
keys, values, length, Q, window, N and min_segment. They do not depend on R, the other rows, which pages it has, or what
the workspace held. choose_segments depends on R, so a row's last bits may differ from bucket to bucket.
Keys that are rotated here are read in halves, with a tl.dot for each half: this takes 133 us for 64 rows of 2048
tokens, where keys that are cached rotated take 128. Reading them twice, in two orders, took 227 us; joining the halves
for one tl.dot took 197.
Tried: 3 stages, with which only 3 programs fit an SM: 25 us instead of 21 for 256 rows of 64 tokens, 142 instead of 126
for 64 of 2048; fp32 spills registers with 4 warps, not with 8. Not tried: to let the last program of a head merge,
which would save a node of the graph.
"""

import torch
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.engine.kernels.rope_append import rotate_
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
NO_WINDOW = 1 << 30
NUM_PROGRAMS = 2 * 132  # 2 on each SM of an H200


def choose_segments(num_rows: int, num_kv_heads: int, max_context: int) -> int:
    """The segments of each row in a bucket: as many as NUM_PROGRAMS allow, and at most one for every 64 tokens."""
    return max(1, min(NUM_PROGRAMS // (num_rows * num_kv_heads), -(-max_context // 64), 128))


def partials_size(num_tokens: int, num_heads: int, head_dim: int, num_segments: int) -> int:
    """The number of fp32 values in the workspace of R * Q tokens; layers and buckets may share a workspace."""
    count = -(-num_tokens * num_heads * num_segments // 16) * 16  # aligned for any R, so that R changes no layout
    return count * (head_dim + 2) if num_segments > 1 else 0


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    scale: float,
    window: int | None,
    page_size: int,
    partials: Tensor,
    num_segments: int,
    min_segment: int = 1,
    margin: int = 0,
    key_rope: Tensor | None = None,
) -> None:
    """Computes out (R, Q, H, E), the attention of q (R, Q, H, E) over each row's pages of keys and values (P * S, K,
    E).

    page_table (R, max pages) int32 may hold anything behind a row's context. context_lens (R,) int32 include the row's
    Q tokens, which are the last of its context; a padded row has 0, and its result is zeros. `out` may be `q`. partials
    is the workspace of partials_size fp32 values. No segment is shorter than min_segment tokens. The first `margin`
    entries of a row's first page hold no tokens. With key_rope (2, L, F), cos and sin, keys are rotated here, each by
    its index 0, 1, ... L - 1 in its row's context; the first 2F dims rotate, by halves. Products and sums of the
    rotation are rounded to the dtype of the keys, as if the keys had been rotated before they were cached.
    """
    common = (scale, window, page_size)
    if q.is_cuda:
        workspace = (partials, num_segments, min_segment)
        _decode_attention_triton(q, keys, values, page_table, context_lens, out, *common, *workspace, margin, key_rope)
    else:
        rest = {"margin": margin, "key_rope": key_rope}
        decode_attention_reference(q, keys, values, page_table, context_lens, out, *common, **rest)


def _decode_attention_triton(
    q, keys, values, page_table, context_lens, out, scale, window, page_size, partials, num_segments, min_segment=1,
    margin=0, key_rope=None,
) -> None:  # fmt: skip
    require_triton("paged decode attention")
    (num_rows, num_queries, num_heads, head_dim), num_kv_heads = q.shape, keys.shape[1]
    assert q.shape == out.shape and q.dtype == out.dtype == keys.dtype == values.dtype
    dense = (q[0, 0], out[0, 0], page_table[0], keys, values)
    dense = dense if key_rope is None else (*dense, key_rope)
    assert all(t.is_contiguous() for t in dense), "decode_attention: strides: heads, pages, cache, table have no gaps"
    assert num_heads % num_kv_heads == 0
    assert page_table.dtype == context_lens.dtype == torch.int32 and partials.dtype == torch.float32
    assert key_rope is None or key_rope.dtype == keys.dtype
    calls["triton"] += 1
    group, split = num_heads // num_kv_heads, num_segments > 1
    size = partials_size(num_rows * num_queries, num_heads, head_dim, num_segments)
    count = size // (head_dim + 2)
    parts = partials[:size].split([count * head_dim, count, count])
    # a tile has 16 KiB at E = 128, so K and V of two turns are in flight and three programs fit an SM
    shape = {"E": head_dim, "E_PADDED": max(16, triton.next_power_of_2(head_dim)), "BLOCK": 128 // q.element_size()}
    segmenting = (num_segments, max(min_segment, 1), NO_WINDOW if window is None else window)
    pairs, length = (0, 0) if key_rope is None else (key_rope.shape[2], key_rope.shape[1])
    rest = head_dim - 2 * pairs if pairs else 0
    halves = {"F": pairs, "F_PADDED": max(16, triton.next_power_of_2(pairs))}
    halves["REST"] = max(16, triton.next_power_of_2(rest)) if rest else 0
    interpreted_bf16 = q.dtype == torch.bfloat16 and not q.is_cuda  # the interpreter's tl.dot of bf16 is wrong
    _attend_segment[(num_kv_heads, num_segments, num_rows)](
        *(q, keys, values, page_table, context_lens, out, parts, key_rope, length),
        (q.stride(0), q.stride(1), out.stride(0), out.stride(1), page_table.stride(0)),
        *(scale * 1.4426950408889634, segmenting),  # log2(e), for exp2
        **{"Q": num_queries, "GROUP": group, "S": page_size, "MARGIN": margin, "SPLIT": split, **shape, **halves},
        M=max(16, triton.next_power_of_2(group * num_queries)),
        DOT=tl.float32 if interpreted_bf16 else getattr(tl, str(q.dtype).removeprefix("torch.")),
        **options(q.device),
        num_warps=4 if q.element_size() == 2 else 8,  # fp32 spills registers with 4
        num_stages=3 if pairs and head_dim <= 128 else 2,  # a wide head has room for 2
        **({"enable_fp_fusion": False} if pairs else {}),  # a fused multiply-add would not round a rotation's product
    )
    if split:
        _merge_segments[(num_heads, num_queries, num_rows)](
            *(context_lens, out, parts, (out.stride(0), out.stride(1)), segmenting),
            **{"CHUNK": min(64, triton.next_power_of_2(num_segments)), **shape, **options(q.device)},
        )


def decode_attention_reference(
    q, keys, values, page_table, context_lens, out, scale, window, page_size, dtype=torch.float32, margin=0,
    key_rope=None,
) -> None:  # fmt: skip
    """Computes the same in plain torch, row by row, in `dtype`."""
    calls["reference"] += 1
    num_queries, group = q.shape[1], q.shape[2] // keys.shape[1]
    for row, context in enumerate(context_lens.tolist()):
        reach = NO_WINDOW if window is None else window
        key = torch.arange(max(0, context - num_queries + 1 - reach), context, device=q.device)  # (C,) those seen
        addresses = page_table[row].long()[(key + margin) // page_size] * page_size + (key + margin) % page_size
        k, v = keys[addresses], values[addresses]  # (C, K, E)
        if key_rope is not None:
            rotate_(k, *key_rope[:, key])
        k, v = (part.to(dtype).repeat_interleave(group, dim=1) for part in (k, v))  # (C, H, E)
        query = torch.arange(context - num_queries, context, device=q.device)[:, None]
        hidden = (key > query) | (key <= query - reach)  # (Q, C)
        scores = torch.einsum("qhe,che->hqc", q[row].to(dtype), k) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)  # no key: zeros
        out[row] = torch.einsum("hqc,che->qhe", weights, v).to(out.dtype)


@triton.jit
def _split(context, Q, segmenting, BLOCK: tl.constexpr):
    """Returns the first token that any query of the row sees, and the tokens of a segment."""
    segments, shortest, window = segmenting
    first = tl.maximum(context - Q + 1 - window, 0)
    length = tl.maximum(tl.cdiv(context - first, segments), shortest)
    return first, tl.cdiv(length, BLOCK) * BLOCK


@triton.jit
def _finite(top):
    """Replaces a maximum of -inf, where no key was seen yet, by 0: -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _columns(rows, column, there, size):
    """Loads columns of rows (N, 1): (N, columns), with 0 for columns from `size` on and for rows that are not there."""
    return tl.load(rows + column[None, :], mask=there[:, None] & (column < size)[None, :], other=0.0)


@triton.jit
def _turned(x, cos, y, sin):
    """Computes x cos + y sin in float32, and rounds to the dtype of x after each operation."""
    dtype: tl.constexpr = x.dtype
    return ((x.to(tl.float32) * cos).to(dtype).to(tl.float32) + (y * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _attend_segment(
    q, keys, values, page_table, context_lens, out, parts, rope, rope_part, strides, scale, segmenting,
    Q: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr, MARGIN: tl.constexpr, SPLIT: tl.constexpr,
    E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK: tl.constexpr, F: tl.constexpr, F_PADDED: tl.constexpr,
    REST: tl.constexpr, M: tl.constexpr, DOT: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    kv_head, segment, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_kv_heads, segments = tl.num_programs(0), tl.num_programs(1)
    q_row, q_token, out_row, out_token, table_row = strides
    context = tl.load(context_lens + row)
    first, length = _split(context, Q, segmenting, BLOCK)
    begin = first + segment * length
    end = tl.minimum(begin + length, context)
    if SPLIT and begin >= end:  # the merge does not read empty segments
        return
    packed, e = tl.arange(0, M), tl.arange(0, E_PADDED)
    token, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    wanted = (token < Q)[:, None] & (e < E)[None, :]  # (M, E)
    columns = head[:, None] * E + e[None, :]
    q_rows = q + row * q_row + token[:, None] * q_token + head[:, None] * E
    if F:
        f = tl.arange(0, F_PADDED)
        q_first = _columns(q_rows, f, token < Q, F).to(DOT)
        q_second = _columns(q_rows + F, f, token < Q, F).to(DOT)
        if REST:
            beside = tl.arange(0, REST)
            q_rest = _columns(q_rows + 2 * F, beside, token < Q, E - 2 * F).to(DOT)
    else:
        q_tile = _columns(q_rows, e, token < Q, E).to(DOT)
    position = context - Q + token  # (M,)

    top, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, E_PADDED), tl.float32)
    key = begin + tl.arange(0, BLOCK)
    table = page_table + row * table_row
    pages = tl.load(table + (key + MARGIN) // S, mask=key < end, other=0)
    for start in tl.range(begin, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        entry, ahead = key + MARGIN, key + BLOCK < end
        address = pages.to(tl.int64) * S + entry % S
        pages = tl.load(table + (entry + BLOCK) // S, mask=ahead, other=0)  # one turn before k and v are read
        start_of, there = (address * num_kv_heads + kv_head)[:, None] * E, key < end
        if F:
            angles = rope + key[:, None] * F
            cos = _columns(angles, f, there, F).to(tl.float32)
            sin = _columns(angles + rope_part * F, f, there, F).to(tl.float32)
            k_first, k_second = _columns(keys + start_of, f, there, F), _columns(keys + start_of + F, f, there, F)
            turned = _turned(k_first, cos, -k_second.to(tl.float32), sin).to(DOT)
            scores = tl.dot(q_first, tl.trans(turned), input_precision="ieee")
            turned = _turned(k_second, cos, k_first.to(tl.float32), sin).to(DOT)
            scores = tl.dot(q_second, tl.trans(turned), scores, input_precision="ieee")
            if REST:
                k = _columns(keys + start_of + 2 * F, beside, there, E - 2 * F).to(DOT)
                scores = tl.dot(q_rest, tl.trans(k), scores, input_precision="ieee")
        else:
            k = _columns(keys + start_of, e, there, E).to(DOT)
            scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee")  # (M, BLOCK)
        v = _columns(values + start_of, e, there, E).to(DOT)
        scores *= scale
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - segmenting[2])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, decay = tl.exp2(scores - _finite(higher)[:, None]), tl.exp2(top - _finite(higher))
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(DOT), v, acc * decay[:, None], input_precision="ieee")
        top = higher

    if SPLIT:
        index = ((row * Q + token) * (num_kv_heads * GROUP) + head) * segments + segment  # (M,)
        tl.store(parts[0] + index[:, None] * E + e[None, :], acc, mask=wanted)
        tl.store(parts[1] + index, top, mask=token < Q)
        tl.store(parts[2] + index, total, mask=token < Q)
    else:
        result = (acc / tl.where(total == 0.0, 1.0, total)[:, None]).to(out.dtype.element_ty)
        tl.store(out + row * out_row + token[:, None] * out_token + columns, result, mask=wanted)


@triton.jit
def _merge_segments(
    context_lens,
    out,
    parts,
    strides,
    segmenting,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_inputs(OVERLAPS)
    head, token, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_heads, num_queries = tl.num_programs(0), tl.num_programs(1)
    context = tl.load(context_lens + row)
    first, length = _split(context, num_queries, segmenting, BLOCK)
    filled = tl.cdiv(context - first, length)
    index = ((row * num_queries + token) * num_heads + head) * segmenting[0]
    e, top, total = tl.arange(0, E_PADDED), float("-inf"), 0.0
    acc = tl.zeros((E_PADDED,), tl.float32)
    for start in tl.range(0, filled, CHUNK):
        segment = start + tl.arange(0, CHUNK)
        inside = segment < filled
        maxima = tl.load(parts[1] + index + segment, mask=inside, other=float("-inf"))
        sums = tl.load(parts[2] + index + segment, mask=inside, other=0.0)
        rows = parts[0] + (index + segment)[:, None] * E + e[None, :]  # (CHUNK, E)
        weighted = tl.load(rows, mask=inside[:, None] & (e < E)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(maxima, 0))
        factor, decay = tl.exp2(maxima - _finite(higher)), tl.exp2(top - _finite(higher))
        total = total * decay + tl.sum(sums * factor, 0)
        acc = acc * decay + tl.sum(weighted * factor[:, None], 0)
        top = higher
    result = (acc / tl.where(total == 0.0, 1.0, total)).to(out.dtype.element_ty)
    tl.store(out + row * strides[0] + token * strides[1] + head * E + e, result, mask=e < E)
