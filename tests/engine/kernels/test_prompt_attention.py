"""Attention of prompts and parts of them: the Triton kernel (interpreted where there is no GPU) against float64.

Shapes: T tokens, C tokens of context, H/K query/KV heads, E head dim.
"""

import functools
import itertools

import pytest
import torch
from penstock.engine.kernels import prompt_attention as kernels
from penstock.engine.kernels.prompt_attention import BLOCK_M, FIELDS, Pages, Row, _tuning, list_blocks, most_blocks
from torch import Tensor

from tests.support.kernel_proof import CONTIGUOUS, DEVICE, Layout, counted, prove, prove_faster, prove_refusal
from tests.support.rounding import assert_apart, attention_apart

PROMPTS: list[Row] = [(3, 130, 3, 130), (140, 1, 140, 1), (150, 64, 150, 64), (214, 65, 214, 65)]  # gaps between some
TWO: list[Row] = [(0, 70, 0, 70), (70, 20, 70, 20)]


def activation(num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """The activation attn (T, H + 2K, E)."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    attn = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator)
    return attn.to(DEVICE, dtype)


def parts(attn: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return attn.split([attn.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], 1)


def run(
    q: Tensor, k: Tensor, v: Tensor, rows: list[Row], window: int | None, num_padded: int = 0, tiles: bool = False
) -> Tensor:
    blocks = torch.tensor(list_blocks(rows) + [(0,) * FIELDS] * num_padded, dtype=torch.int32, device=DEVICE)
    kernels._attend_blocks_triton(q, k, v, blocks, window, tuning=_tuning(q) | {"TILES": tiles})
    return q


def expected(q: Tensor, k: Tensor, v: Tensor, row: Row, window: int | None) -> tuple[Tensor, float]:
    """The result (n, H, E) of a row in float64, and how far another way to it may be."""
    first, num_queries, first_key, num_keys = row
    queries = q[first : first + num_queries].double()
    group = q.shape[1] // k.shape[1]
    keys, values = (part[first_key : first_key + num_keys] for part in (k, v))
    scores = torch.einsum("qhe,khe->hqk", queries, keys.double().repeat_interleave(group, 1)) * q.shape[2] ** -0.5
    query = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    key = torch.arange(num_keys, device=q.device)
    seen = (key <= query) & (key > query - (window or num_keys))
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    result = torch.einsum("hqk,khe->qhe", weights, values.double().repeat_interleave(group, 1))
    apart = [
        attention_apart(own, key, float(values.abs().max()), q.shape[2] ** -0.5, q.dtype)
        for own, key in zip(
            queries.to(q.dtype).abs().unflatten(1, (-1, group)).movedim(1, 0).flatten(1, 2), keys.abs().transpose(0, 1)
        )
    ]
    return result, max(apart)


@pytest.mark.tolerance
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("window", [None, 40, 1])
@pytest.mark.parametrize(
    "heads, dtype",
    [((4, 2, 64), torch.float16), ((2, 1, 80), torch.bfloat16), ((1, 1, 256), torch.float16)],
    ids=str,
)
def test_prompts_attend_by_the_definition(heads, dtype, window, tiles):
    """In place, among tokens of nobody, which are NaN and keep what they have, and with blocks that are none."""
    attn = activation(290, heads, dtype)
    owned = torch.zeros(len(attn), dtype=torch.bool, device=DEVICE)
    for first, num_queries, *_ in PROMPTS:
        owned[first : first + num_queries] = True
    attn[~owned] = torch.nan
    before = attn.clone()
    q, k, v = parts(attn, heads[1])
    with counted(kernels.calls, triton=1, tiles=tiles and window is None and heads[2] == 64):
        run(q, k, v, PROMPTS, window, num_padded=3, tiles=tiles)
    for row in PROMPTS:
        result, apart = expected(*parts(before, heads[1]), row, window)
        assert_apart((q[row[0] : row[0] + row[1]].double() - result).abs(), apart)
    assert attn[~owned].isnan().all() and torch.equal(k[owned], parts(before, heads[1])[1][owned])


@pytest.mark.tolerance
@pytest.mark.parametrize("window", [None, 70])
def test_chunks_that_continue_attend_to_their_whole_context(window):
    q, context = activation(150, (4, 0, 64), torch.float16), activation(260, (0, 2, 64), torch.float16)
    k, v = context[:, :2], context[:, 2:]
    rows = [(0, 100, 0, 200), (100, 50, 200, 60)]
    wanted = [expected(q, k, v, row, window) for row in rows]
    run(q, k, v, rows, window)
    for (first, num_queries, *_), (result, apart) in zip(rows, wanted):
        assert_apart((q[first : first + num_queries].double() - result).abs(), apart)


def test_a_window_that_reaches_every_key_gives_the_bits_of_none():
    attn = activation(290, (4, 2, 64), torch.float16)
    plain, windowed = (run(*parts(attn.clone(), 2), PROMPTS, window) for window in (None, 290))
    assert not torch.equal(plain, parts(attn, 2)[0]) and torch.equal(plain, windowed)


def paged(context: Tensor, lengths: list[int], page_size: int, margin: int) -> tuple[Tensor, Pages]:
    """The keys or values (C, K, E) of rows of these lengths in a cache whose other entries are NaN, and their pages,
    each row's in an order of its own."""
    needed = [-(-(margin + length) // page_size) for length in lengths]
    order = iter((1 + torch.randperm(sum(needed), generator=torch.Generator().manual_seed(5))).tolist())
    cache = torch.full(((1 + sum(needed)) * page_size, *context.shape[1:]), torch.nan).to(context)
    table = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
    for row, (number, own) in enumerate(zip(needed, context.split(lengths))):
        table[row, :number] = torch.tensor(list(itertools.islice(order, number)))
        entries = torch.arange(len(own)) + margin
        cache[(table[row].long()[entries // page_size] * page_size + entries % page_size).to(DEVICE)] = own
    return cache, Pages(table.to(DEVICE), page_size, margin)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("page_size, margin", [(16, 0), (8, 3), (128, 5)])
def test_pages_are_read_to_the_bits_of_a_copy(window, page_size, margin):
    """Among what belongs to nobody, which is NaN."""
    lengths = [200, 60, 129]
    rows = [(0, 100, 0, 200), (100, 50, 200, 60), (150, 2, 260, 129)]
    q, context = activation(152, (4, 0, 64), torch.float16), activation(389, (0, 2, 64), torch.float16)
    copied = run(q.clone(), context[:, :2], context[:, 2:], rows, window)
    caches = [paged(part, lengths, page_size, margin) for part in context.split(2, 1)]
    blocks = [*list_blocks([(first, number, 0, keys) for first, number, _, keys in rows]), (0,) * FIELDS]
    keys, values = (cache for cache, _ in caches)
    blocks = torch.tensor(blocks, dtype=torch.int32, device=DEVICE)
    kernels._attend_blocks_triton(q, keys, values, blocks, window, caches[0][1])
    assert not q.isnan().any() and torch.equal(q, copied)


@pytest.mark.parametrize("heads, dtype", [((4, 2, 64), torch.float16), ((2, 1, 128), torch.bfloat16)], ids=str)
def test_tiles_give_the_bits_of_addresses(heads, dtype):
    """For rows that begin anywhere and chunks that continue. Tokens behind a row's end may be NaN."""
    rows = [(3, 200, 3, 200), (203, 129, 210, 257), (332, 64, 3, 64)]
    attn = activation(490, heads, dtype)
    attn[467:] = torch.nan
    apart = torch.empty(len(attn) + 1, attn[0].numel() + 1).to(attn)[1:, :-1]  # not at multiples of 16 bytes
    plain, tiled, apart = attn.clone(), attn.clone(), apart.unflatten(1, attn.shape[1:]).copy_(attn)
    with counted(kernels.calls, triton=1):
        run(*parts(plain, heads[1]), rows, None)
    with counted(kernels.calls, triton=1, tiles=1):
        run(*parts(tiled, heads[1]), rows, None, tiles=True)
    with counted(kernels.calls, triton=1):
        run(*parts(apart, heads[1]), rows, None, tiles=True)
    assert not plain[:396].isnan().any() and not torch.equal(plain[:396], attn[:396])
    assert torch.equal(plain[:467], tiled[:467]) and torch.equal(plain[:467], apart[:467])


def test_tiles_are_taken_where_the_device_has_bulk_copies(monkeypatch):
    q = torch.empty(1, 1, 128)
    for overlaps in (False, True):
        monkeypatch.setattr(kernels, "options", lambda device, overlaps=overlaps: {"OVERLAPS": overlaps})
        assert _tuning(q)["TILES"] == overlaps


@pytest.mark.parametrize("window", [None, 50])
def test_a_row_does_not_depend_on_its_batch(window):
    attn = activation(290, (2, 1, 64), torch.float16)
    together = run(*parts(attn.clone(), 1), PROMPTS, window, num_padded=2)
    for first, num_queries, *_ in PROMPTS:
        alone = attn[first : first + num_queries].clone()
        run(*parts(alone, 1), [(0, num_queries, 0, num_queries)], window)
        assert torch.equal(parts(alone, 1)[0], together[first : first + num_queries])


def test_blocks_cover_each_query_once_and_those_with_most_to_do_come_first():
    rows = [*PROMPTS, (400, 70, 0, 300)]
    blocks = list_blocks(rows)
    queries = sorted(query for first, end, *_ in blocks for query in range(first, end))
    assert queries == sorted(query for first, number, *_ in rows for query in range(first, first + number))
    assert all(0 < end - first <= BLOCK_M for first, end, *_ in blocks)
    work = [end + shift - first_key for _, end, first_key, shift, _ in blocks]
    assert work == sorted(work, reverse=True) and work[0] == 300
    assert len(blocks) <= most_blocks(330, 5) and list_blocks([]) == []
    for lengths in ([1] * 9, [64, 65, 63], [128], [200, 1]):
        assert len(list_blocks([(0, n, 0, n) for n in lengths])) <= most_blocks(sum(lengths), len(lengths))


def kernel(q: Tensor, keys: Tensor, values: Tensor) -> None:
    run(q, keys, values, TWO, None)


def reference(q: Tensor, keys: Tensor, values: Tensor) -> None:
    results = [expected(q, keys, values, row, None)[0] for row in TWO]
    q.copy_(torch.cat(results))


def test_in_every_layout():
    """Tries tensors whose heads lie together; tokens may start anywhere."""
    inputs = dict(
        zip(("q", "keys", "values"), (part.clone() for part in parts(activation(90, (4, 2, 64), torch.float16), 2)))
    )
    wanted = [expected(*inputs.values(), row, None) for row in TWO]

    def near(actual: Tensor, _: Tensor) -> None:
        for (first, number, *_), (result, apart) in zip(TWO, wanted):
            assert_apart((actual[first : first + number].double() - result).abs(), apart)

    prove(
        kernel,
        reference,
        inputs,
        ("q",),
        near,
        (CONTIGUOUS, Layout("viewed", before=64), Layout("misaligned", before=1)),
    )


def test_strides_that_are_not_heads_are_refused():
    inputs = dict(zip(("q", "keys", "values"), parts(activation(90, (4, 2, 64), torch.float16), 2)))
    prove_refusal(kernel, inputs)


def test_calls_are_counted():
    with counted(kernels.calls, triton=1):
        kernel(*parts(activation(90, (1, 1, 64), torch.float16), 1))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(512,), (112,) * 16, (512,) * 8, (2000,)], ids=str)
def test_kernel_is_faster(lengths):
    """It is compared with torch's kernel for rows of any lengths and the copy of its result, with the heads of
    Llama-3-8B."""
    starts = [0, *itertools.accumulate(lengths)]
    rows = [(first, number, first, number) for first, number in zip(starts, lengths)]
    attn = activation(starts[-1], (32, 8, 128), torch.bfloat16)
    q, k, v = parts(attn, 8)
    blocks, bounds = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in (list_blocks(rows), starts))
    longest = max(lengths)

    def torchs() -> None:
        flash = torch.ops.aten._flash_attention_forward
        q.copy_(flash(q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=128**-0.5)[0])

    ours = functools.partial(kernels._attend_blocks_triton, q, k, v, blocks, None)
    prove_faster(ours, torchs, attn.nbytes + q.numel() * 2, f"prompt_attention {len(lengths)} x {longest}")
