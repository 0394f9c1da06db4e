"""Norms q and k heads, rotates them and appends to the KV cache, in one launch where plain torch takes 20.

Shapes: T tokens, H/K local query/KV heads, E head dim, F rotated pairs (2F <= E), L positions, P pages, S page size.
It rounds where transformers does: the norm is in fp32, cast, then multiplied by the weight; each product and each sum
of the rotation is rounded to the model's dtype. So without norms the bits are the reference's; with norms the squares
are added in another order. A program has one token and a few whole heads, and the thread that writes a pair is the one
that read it, so working in place is safe.
Tried: nothing else yet.
"""

import torch
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
TILE, NUM_WARPS = 1024, 2  # elements of a program: 16 a thread, 16 bytes of each half in bf16


def rope_append(
    attn: Tensor,
    table: Tensor,
    positions: Tensor,
    addresses: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    appends_rotated: bool = True,
) -> None:
    """Rotates q and k in attn (T, (H + 2K) E) in place and writes k and v to keys and values (P * S, K, E) at addresses
    (T,). Without `appends_rotated` it writes k as it was before the rotation. `table` (2, L, F) holds cos and sin,
    which `positions` (T,) index; `q_norm`, `k_norm` (E,) are both given or both None."""
    run = _rope_append_triton if attn.is_cuda else rope_append_reference
    run(attn, table, positions, addresses, keys, values, num_heads, num_kv_heads, q_norm, k_norm, eps, appends_rotated)


def rope_append_reference(
    attn, table, positions, addresses, keys, values, num_heads, num_kv_heads, q_norm, k_norm, eps, appends_rotated=True
):
    """Does the same in plain torch."""
    calls["reference"] += 1
    heads = attn.unflatten(1, (num_heads + 2 * num_kv_heads, keys.shape[2]))  # (T, H + 2K, E)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = table[:, positions]  # (T, F) each
    for part, weight in ((q, q_norm), (k, k_norm)):
        if weight is not None:
            x32 = part.float()
            scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
            part.copy_(weight * scaled.to(part.dtype))
    if not appends_rotated:
        keys.index_copy_(0, addresses, k)
    for part in (q, k):
        rotate_(part, cos, sin)
    if appends_rotated:
        keys.index_copy_(0, addresses, k)
    values.index_copy_(0, addresses, v)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates the first 2F dims of `heads` (T, N, E) in place, by halves; cos and sin are (T, F)."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = heads[..., :half].clone(), heads[..., half : 2 * half].clone()
    heads[..., :half] = first * cos + (-second) * sin
    heads[..., half : 2 * half] = second * cos + first * sin


def _rope_append_triton(
    attn, table, positions, addresses, keys, values, num_heads, num_kv_heads, q_norm, k_norm, eps, appends_rotated=True
):
    require_triton("rope_append on a GPU", "device='cpu'")
    dim, half, total = keys.shape[2], table.shape[2], num_heads + 2 * num_kv_heads
    assert attn.shape[1] == total * dim and 2 * half <= dim, "attn is not (T, (H + 2K) E), or more rotates than E"
    assert (q_norm is None) == (k_norm is None), "norms of q and k come together"
    rows = [t for t in (attn, table, keys, values, q_norm, k_norm, positions, addresses) if t is not None]
    assert all(t.stride(-1) == 1 for t in rows), "rope_append: the last dim of every tensor must have stride 1"
    assert len({t.dtype for t in rows[:-2]}) == 1, "rope_append: attn, table, cache and norms have one dtype"
    calls["triton"] += 1
    heads = min(max(TILE // triton.next_power_of_2(dim), 1), triton.next_power_of_2(total))
    _rotate_and_append[(attn.shape[0], triton.cdiv(total, heads))](
        *(attn, table, positions, addresses, keys, values, q_norm, k_norm, eps),
        *(attn.stride(0), *table.stride()[:2], *keys.stride()[:2], *values.stride()[:2]),
        *(num_heads, num_kv_heads, dim, half, q_norm is not None, appends_rotated),
        *(heads, triton.next_power_of_2(half), triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0),
        **options(attn.device),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # a fused multiply-add would not round the product in fp32
    )


@triton.jit
def _load(row, column, inside):
    return tl.load(row + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm_part(x, scale, q_norm, k_norm, column, size, is_q, is_v, dtype: tl.constexpr):
    """Norms some columns of q and k heads; those of v stay as they are."""
    q_weight = tl.load(q_norm + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    k_weight = tl.load(k_norm + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    normed = (x * scale[:, None]).to(dtype).to(tl.float32) * tl.where(is_q[:, None], q_weight, k_weight)
    return tl.where(is_v[:, None], x, normed.to(dtype).to(tl.float32))


@triton.jit
def _append(x, key, value, column, inside, is_k, is_v):
    tl.store(key + column[None, :], x, mask=inside & is_k[:, None])
    tl.store(value + column[None, :], x, mask=inside & is_v[:, None])


@triton.jit
def _rotate_and_append(
    attn, table, positions, addresses, keys, values, q_norm, k_norm, eps,
    attn_row, table_part, table_row, key_row, key_head, value_row, value_head,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, F: tl.constexpr, NORMS: tl.constexpr, ROTATED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    dtype: tl.constexpr = attn.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head, half = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    is_q, is_k, is_v = head < H, (head >= H) & (head < H + K), head >= H + K
    there, turns = (head < H + 2 * K)[:, None], (head < H + K)[:, None]
    row = attn + token * attn_row + head[:, None] * E
    paired = there & (half < F)[None, :]
    first, second = _load(row, half, paired), _load(row, half + F, paired)
    angles = table + tl.load(positions + token) * table_row + half
    cos = tl.load(angles, mask=half < F, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angles + table_part, mask=half < F, other=0.0).to(tl.float32)[None, :]
    address = tl.load(addresses + token)
    key = keys + address * key_row + (head - H)[:, None] * key_head
    value = values + address * value_row + (head - H - K)[:, None] * value_head
    if REST:
        rest = 2 * F + tl.arange(0, REST)
        beside = there & (rest < E)[None, :]
        others = _load(row, rest, beside)
    if NORMS:
        squares = tl.sum(first * first + second * second, axis=1)
        if REST:
            squares += tl.sum(others * others, axis=1)
        scale = tl.rsqrt(squares * (1.0 / E) + eps)
        first = _norm_part(first, scale, q_norm, k_norm, half, F, is_q, is_v, dtype)
        second = _norm_part(second, scale, q_norm, k_norm, half + F, 2 * F, is_q, is_v, dtype)
        if REST:
            others = _norm_part(others, scale, q_norm, k_norm, rest, E, is_q, is_v, dtype)
            tl.store(row + rest[None, :], others.to(dtype), mask=beside & turns)
    turned = (first * cos).to(dtype).to(tl.float32) + (-second * sin).to(dtype).to(tl.float32)
    turned_second = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    turned, turned_second = turned.to(dtype), turned_second.to(dtype)
    tl.store(row + half[None, :], turned, mask=paired & turns)
    tl.store(row + half[None, :] + F, turned_second, mask=paired & turns)
    if ROTATED:
        first, second = tl.where(turns, turned, first).to(dtype), tl.where(turns, turned_second, second).to(dtype)
    _append(first.to(dtype), key, value, half, paired, is_k, is_v)
    _append(second.to(dtype), key, value, half + F, paired, is_k, is_v)
    if REST:
        _append(others.to(dtype), key, value, rest, beside, is_k, is_v)
