"""The attention of rows of one token, or a few, over the paged KV cache, split along the context, for CUDA graphs.

Shapes: R rows, Q tokens a row, H/K local query/KV heads, E head dim, P pages, S page size, N items of the work, M =
H/K * Q queries of a KV head, padded to a power of two and to the 16 that tl.dot wants.

The work is a list of segments (decode_work.py). Each (segment, KV head) has a program, so that one long row among short
ones is spread over all of the GPU; it reads its segment once for all M queries. If the segment is its row's only one,
it writes the result, else fp32 partials (weighted values, maximum, sum of weights), which a second kernel merges in the
order of the segments. With room for one item a row there is no second kernel.
Sources: Dao et al. 2023, "Flash-Decoding"; vLLM's PagedAttention.

Launches depend on the number of rows and on the work's capacity alone, since lengths and pages are read on the device.
A row's bits depend on its own q, keys, values, length, Q, window and the length of a segment. They do not depend on R,
the other rows, the capacity, which pages it has, or what the workspace held.
Keys that are rotated here are read in halves, with a tl.dot for each half: this takes 133 us for 64 rows of 2048
tokens, where keys that are cached rotated take 128. Reading them twice, in two orders, took 227 us; joining the halves
for one tl.dot took 197.
Tried: 3 stages, with which only 3 programs fit an SM: 25 us instead of 21 for 256 rows of 64 tokens, 142 instead of 126
for 64 of 2048; fp32 spills registers with 4 warps, not with 8. A fixed grid of programs that walk the list, the last of
a row merging it: their loop has more registers, and read 2.5 TB/s where a program for each item reads 3.75. No checks
but those that one token without a window needs: 96 registers, so that five programs fit an SM, which helps 640 programs
(191 us instead of 217), but an SM then has five of 512 where another has three: 28.6 us instead of 27.2 for 8 rows of
2000, 134 instead of 122 for one of 64k beside 63 of 512. The last program of a row merging it: 13 us instead of 9.4 for
one row of 2000, 37.5 instead of 28.4 for 8.
"""

import torch
from penstock.engine.kernels.decode_work import FIELDS, NO_WINDOW, DecodeWork, first_seen, segment_end
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.engine.kernels.rope_append import rotate_
from penstock.engine.kernels.segments import partials_size
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
MERGED_TOKENS = 8192  # whose segments the merge reads at once
MERGED_ALONE = 64  # rows: from here on a program of the merge has all heads of a group, since most find one segment


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
    work: DecodeWork,
    margin: int = 0,
    key_rope: Tensor | None = None,
) -> None:
    """Computes out (R, Q, H, E), the attention of q (R, Q, H, E) over each row's pages of keys and values (P * S, K,
    E).

    page_table (R, max pages) int32 may hold anything behind a row's context. context_lens (R,) int32 include the row's
    Q tokens, which are the last of its context; a padded row has 0, and `out` keeps what it has there. `out` may be
    `q`. `work` was listed from context_lens, and `window` is one of its windows. The first `margin` entries of a row's
    first page hold no tokens. With key_rope (2, L, F), cos and sin, keys are rotated here, each by its index 0, 1, ...
    L - 1 in its row's context; the first 2F dims rotate, by halves. Products and sums of the rotation are rounded to
    the dtype of the keys, as if the keys had been rotated before they were cached.
    """
    common = (q, keys, values, page_table, context_lens, out, scale, window, page_size)
    if q.is_cuda:
        _decode_attention_triton(*common, work, margin, key_rope)
    else:
        decode_attention_reference(*common, margin=margin, key_rope=key_rope)


def _tuning(q: Tensor, rotates: bool) -> dict[str, int]:
    """The tokens of a turn and the warps and stages of a program: a tile has 16 KiB at E = 128. Four programs have 128
    registers a thread each, and fit an SM: an H200 holds the 512 of segments.PROGRAMS at once, evenly."""
    return {
        "BLOCK": 128 // q.element_size(),
        "num_warps": 4 if q.element_size() == 2 else 8,  # fp32 spills registers with 4
        "num_stages": 3 if rotates and q.shape[3] <= 128 else 2,  # a wide head has room for 2
    }


def _decode_attention_triton(
    q, keys, values, page_table, context_lens, out, scale, window, page_size, work, margin=0, key_rope=None, tuning=None
) -> None:
    require_triton("paged decode attention")
    (num_rows, num_queries, num_heads, head_dim), num_kv_heads = q.shape, keys.shape[1]
    assert q.shape == out.shape and q.dtype == out.dtype == keys.dtype == values.dtype
    dense = (q[0, 0], out[0, 0], page_table[0], keys, values)
    dense = dense if key_rope is None else (*dense, key_rope)
    assert all(t.is_contiguous() for t in dense), "decode_attention: strides: heads, pages, cache, table have no gaps"
    assert num_heads % num_kv_heads == 0
    assert page_table.dtype == torch.int32 and work.partials.dtype == torch.float32
    assert key_rope is None or key_rope.dtype == keys.dtype
    calls["triton"] += 1
    tuning = tuning or _tuning(q, key_rope is not None)
    assert work.segment % tuning["BLOCK"] == 0 and work.starts.shape[1] == num_rows
    which, room, group = work.windows.index(window), work.room(window, num_queries), num_heads // num_kv_heads
    size = partials_size(room, num_heads, head_dim, num_queries) if room > num_rows else 0
    count = size // (head_dim + 2)
    parts = work.partials[:size].split([count * head_dim, count, count])
    strides = (q.stride(0), q.stride(1), out.stride(0), out.stride(1))
    shape = {"Q": num_queries, "GROUP": group, "K": num_kv_heads, "E": head_dim}
    shape["E_PADDED"] = max(16, triton.next_power_of_2(head_dim))
    pairs, length = (0, 0) if key_rope is None else (key_rope.shape[2], key_rope.shape[1])
    rest = head_dim - 2 * pairs if pairs else 0
    halves = {"F": pairs, "F_PADDED": max(16, triton.next_power_of_2(pairs))}
    halves["REST"] = max(16, triton.next_power_of_2(rest)) if rest else 0
    interpreted_bf16 = q.dtype == torch.bfloat16 and not q.is_cuda  # the interpreter's tl.dot of bf16 is wrong
    _attend_segment[(room * num_kv_heads,)](
        *(q, keys, values, page_table, work.items[which], work.num_items[which:], out, parts, key_rope, length),
        *(strides, page_table.stride(0)),
        *(scale * 1.4426950408889634, NO_WINDOW if window is None else window, work.segment),  # log2(e)
        **{
            "S": page_size,
            "MARGIN": margin,
            "SPLIT": room > num_rows,
            **shape,
            **halves,
            "FIELDS": FIELDS,
        },
        WINDOWED=window is not None,
        M=max(16, triton.next_power_of_2(group * num_queries)),
        DOT=tl.float32 if interpreted_bf16 else getattr(tl, str(q.dtype).removeprefix("torch.")),
        **options(q.device),
        **tuning,
        **({"enable_fp_fusion": False} if pairs else {}),  # a fused multiply-add would not round a rotation's product
    )
    if room > num_rows:
        members = group if num_rows >= MERGED_ALONE else 1
        _merge_segments[(num_heads // members, num_queries, num_rows)](
            *(work.starts[which], work.counts[which], out, parts, strides),
            **{
                "CHUNK": triton.next_power_of_2(max(16, min(64, MERGED_TOKENS // work.segment))),
                "MEMBERS": members,
                **shape,
                **options(q.device),
            },
        )


def decode_attention_reference(
    q, keys, values, page_table, context_lens, out, scale, window, page_size, dtype=torch.float32, margin=0,
    key_rope=None,
) -> None:  # fmt: skip
    """Computes the same in plain torch, row by row, in `dtype`."""
    calls["reference"] += 1
    num_queries, group = q.shape[1], q.shape[2] // keys.shape[1]
    for row, context in enumerate(context_lens.tolist()):
        if context == 0:
            continue
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
def _load_query(
    rows, there, E: tl.constexpr, E_PADDED: tl.constexpr, F: tl.constexpr, F_PADDED: tl.constexpr,
    REST: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The tiles of a query, each for a dot of its own: the whole head, or where keys are rotated as they are read its
    two halves, and what a rotation leaves out."""
    if F:
        f = tl.arange(0, F_PADDED)
        first, second = _columns(rows, f, there, F).to(DOT), _columns(rows + F, f, there, F).to(DOT)
        if REST:
            query = first, second, _columns(rows + 2 * F, tl.arange(0, REST), there, E - 2 * F).to(DOT)
        else:
            query = first, second
    else:
        query = (_columns(rows, tl.arange(0, E_PADDED), there, E).to(DOT),)
    return query


@triton.jit
def _score(
    query, rows, key, there, rope, rope_part, E: tl.constexpr, E_PADDED: tl.constexpr, F: tl.constexpr,
    F_PADDED: tl.constexpr, REST: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The products (M, BLOCK) of a query's tiles and the keys of one turn, which lie at `rows` (BLOCK, 1)."""
    if F:
        f, angles = tl.arange(0, F_PADDED), rope + key[:, None] * F
        cos = _columns(angles, f, there, F).to(tl.float32)
        sin = _columns(angles + rope_part * F, f, there, F).to(tl.float32)
        k_first, k_second = _columns(rows, f, there, F), _columns(rows + F, f, there, F)
        turned = _turned(k_first, cos, -k_second.to(tl.float32), sin).to(DOT)
        scores = tl.dot(query[0], tl.trans(turned), input_precision="ieee")
        turned = _turned(k_second, cos, k_first.to(tl.float32), sin).to(DOT)
        scores = tl.dot(query[1], tl.trans(turned), scores, input_precision="ieee")
        if REST:
            k = _columns(rows + 2 * F, tl.arange(0, REST), there, E - 2 * F).to(DOT)
            scores = tl.dot(query[2], tl.trans(k), scores, input_precision="ieee")
    else:
        k = _columns(rows, tl.arange(0, E_PADDED), there, E).to(DOT)
        scores = tl.dot(query[0], tl.trans(k), input_precision="ieee")
    return scores


# A table is as wide as its pass's longest row: a variant by its width would be compiled in the middle of a job
@triton.jit(do_not_specialize=["table_row"], do_not_specialize_on_alignment=["num_items"])
def _attend_segment(
    q, keys, values, page_table, items, num_items, out, parts, rope, rope_part, strides, table_row, scale, window,
    tokens,
    Q: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, S: tl.constexpr, MARGIN: tl.constexpr,
    SPLIT: tl.constexpr, WINDOWED: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
    BLOCK: tl.constexpr, F: tl.constexpr, F_PADDED: tl.constexpr, REST: tl.constexpr, M: tl.constexpr,
    DOT: tl.constexpr, FIELDS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    index, kv_head = tl.program_id(0) // K, tl.program_id(0) % K
    item = items + index * FIELDS
    row, segment = tl.load(item).to(tl.int64), tl.load(item + 1)
    context, siblings = tl.load(item + 2), tl.load(item + 3)
    if index >= tl.load(num_items):
        return
    q_row, q_token, out_row, out_token = strides
    begin = segment * tokens
    end = segment_end(begin, context, tokens)
    first = 0
    if WINDOWED:
        first = first_seen(context, window, Q)
        begin += tl.maximum(first - begin, 0) // BLOCK * BLOCK
    packed, e = tl.arange(0, M), tl.arange(0, E_PADDED)
    token, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    wanted = (token < Q)[:, None] & (e < E)[None, :]  # (M, E)
    columns = head[:, None] * E + e[None, :]
    q_rows = q + row * q_row + token[:, None] * q_token + head[:, None] * E
    query = _load_query(q_rows, token < Q, E, E_PADDED, F, F_PADDED, REST, DOT)
    position = context - Q + token  # (M,)

    top, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, E_PADDED), tl.float32)
    key = begin + tl.arange(0, BLOCK)
    table = page_table + row * table_row
    pages = tl.load(table + (key + MARGIN) // S, mask=(key >= first) & (key < end), other=0)
    for start in tl.range(begin, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        entry, ahead = key + MARGIN, key + BLOCK < end
        address = pages.to(tl.int64) * S + entry % S
        pages = tl.load(table + (entry + BLOCK) // S, mask=ahead, other=0)  # one turn before k and v are read
        start_of, there = (address * K + kv_head)[:, None] * E, (key >= first) & (key < end)
        scores = _score(
            query, keys + start_of, key, there, rope, rope_part, E, E_PADDED, F, F_PADDED, REST, DOT
        )  # (M, BLOCK)
        v = _columns(values + start_of, e, there, E).to(DOT)
        scores *= scale
        seen = key[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, decay = tl.exp2(scores - _finite(higher)[:, None]), tl.exp2(top - _finite(higher))
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(DOT), v, acc * decay[:, None], input_precision="ieee")
        top = higher

    if SPLIT and siblings > 1:
        part = (index * K + kv_head).to(tl.int64) * (Q * GROUP) + packed  # (M,)
        tl.store(parts[0] + part[:, None] * E + e[None, :], acc, mask=wanted)
        tl.store(parts[1] + part, top, mask=token < Q)
        tl.store(parts[2] + part, total, mask=token < Q)
    else:
        result = (acc / tl.where(total == 0.0, 1.0, total)[:, None]).to(out.dtype.element_ty)
        tl.store(out + row * out_row + token[:, None] * out_token + columns, result, mask=wanted)


@triton.jit(do_not_specialize_on_alignment=["starts", "counts"])  # those of a second window lie anywhere
def _merge_segments(
    starts, counts, out, parts, strides,
    Q: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
    CHUNK: tl.constexpr, MEMBERS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Merges the segments of a query in MEMBERS heads, unless there is only one, whose program wrote the result."""
    wait_for_inputs(OVERLAPS)
    token, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, count = tl.load(starts + row), tl.load(counts + row)
    if count <= 1:
        return
    for member in tl.static_range(MEMBERS):
        head = tl.program_id(0) * MEMBERS + member
        _merge_head(start, start + count, head, token, row, out, parts, strides, Q, GROUP, K, E, E_PADDED, CHUNK)


@triton.jit
def _merge_head(
    start, end, head, token, row, out, parts, strides,
    Q: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    of_item, e = head // GROUP * (Q * GROUP) + token * GROUP + head % GROUP, tl.arange(0, E_PADDED)
    top, total, acc = float("-inf"), 0.0, tl.zeros((E_PADDED,), tl.float32)
    for first in tl.range(start, end, CHUNK):
        item = first + tl.arange(0, CHUNK)
        inside = item < end
        part = item.to(tl.int64) * (K * Q * GROUP) + of_item
        maxima = tl.load(parts[1] + part, mask=inside, other=float("-inf"))
        sums = tl.load(parts[2] + part, mask=inside, other=0.0)
        weighted = tl.load(
            parts[0] + part[:, None] * E + e[None, :], mask=inside[:, None] & (e < E)[None, :], other=0.0
        )
        higher = tl.maximum(top, tl.max(maxima, 0))
        factor, decay = tl.exp2(maxima - _finite(higher)), tl.exp2(top - _finite(higher))
        total = total * decay + tl.sum(sums * factor, 0)
        acc = acc * decay + tl.sum(weighted * factor[:, None], 0)
        top = higher
    result = (acc / tl.where(total == 0.0, 1.0, total)).to(out.dtype.element_ty)
    tl.store(out + row * strides[2] + token * strides[3] + head * E + e, result, mask=e < E)
