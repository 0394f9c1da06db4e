"""Paged decode attention: the Triton kernel (interpreted where there is no GPU) against float64, in poisoned memory.

Shapes: R rows, Q tokens a row, H/K query/KV heads, E head dim, P pages, S page size.
"""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from penstock.engine.kernels import decode_attention as kernels
from penstock.engine.kernels.decode_work import list_work
from penstock.engine.kernels.rope_append import rotate_
from penstock.engine.kernels.segments import Segments
from torch import Tensor

from tests.support.kernel_proof import (
    CONTIGUOUS,
    DEVICE,
    DTYPES,
    PERMUTED,
    Layout,
    counted,
    prove,
    prove_faster,
    prove_refusal,
)
from tests.support.paged_examples import PAGE_SIZE, Example, addresses_of, make, tensors_of, work_of
from tests.support.rounding import assert_apart, attention_apart, sums_apart

KERNEL = kernels._decode_attention_triton
LAYOUTS = (CONTIGUOUS, Layout("viewed", before=64), Layout("misaligned", before=1))


def assert_close(example: Example, out: Tensor, expected: Tensor | None = None) -> None:
    """Compares the kernel with `expected`, by default the reference in float64."""
    expected = example.reference() if expected is None else expected
    assert not expected.isnan().any() and not out.isnan().any()
    assert_apart((out.double() - expected.double()).abs(), example.apart())


@pytest.mark.tolerance
@pytest.mark.parametrize("segment", [512, 64])
@pytest.mark.parametrize(
    ("heads", "context", "options"),
    [
        ((2, 2, 64), [1, 15, 16, 17], {}),
        ((2, 2, 64), [63, 64, 65, 96, 97], {"dtype": torch.float32}),
        ((8, 2, 128), [150, 3], {}),
        ((8, 2, 128), [100], {"dtype": torch.bfloat16}),
        ((4, 1, 80), [100], {"dtype": torch.float32}),
        ((7, 1, 96), [130], {"num_queries": 3}),
        ((16, 1, 64), [98, 5], {"num_queries": 3, "dtype": torch.float32}),
        ((4, 2, 64), [7, 140, 100, 40], {"window": 40}),
        ((7, 1, 64), [140, 20, 100], {"window": 40, "num_queries": 3}),
        ((2, 1, 64), [100], {"window": 1, "num_queries": 3, "dtype": torch.bfloat16}),
        ((2, 1, 64), [3, 20], {"window": 1000, "num_queries": 3}),
        ((4, 2, 64), [1, 4, 20, 100], {"margin": 12}),
        ((4, 2, 64), [1, 4, 150], {"margin": 12, "pairs": 32, "dtype": torch.float32}),
        ((4, 1, 80), [100], {"margin": 5, "pairs": 10, "dtype": torch.bfloat16}),
        ((7, 1, 96), [130, 0], {"pairs": 48, "num_queries": 3}),
    ],
)
def test_kernel_is_the_reference(heads, context, options, segment):
    """Cases are one token, page borders, block borders, a segment and a half, grouped heads, windows, several tokens a
    row, padded head sizes, pages that begin late, and keys that are rotated when they are read."""
    inputs = make(heads, context, **options)
    assert_close(inputs, inputs.run(segment))


@pytest.mark.tolerance
def test_the_reference_is_torchs_attention():
    inputs = make((4, 2, 64), [50], num_queries=3, window=20, dtype=torch.float32)
    addresses = inputs.page_table[0].cpu().long().repeat_interleave(PAGE_SIZE)[:50] * PAGE_SIZE
    addresses = (addresses + torch.arange(50) % PAGE_SIZE).to(DEVICE)
    k, v = (cache[addresses].nan_to_num(0.0).transpose(0, 1)[None] for cache in (inputs.keys, inputs.values))
    key, query = torch.arange(50), torch.arange(47, 50)[:, None]
    mask = (key <= query) & (key > query - 20)
    q = inputs.q.transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(DEVICE), enable_gqa=True).transpose(1, 2)
    assert_close(inputs, inputs.reference(torch.float32), expected)


@pytest.mark.tolerance
@pytest.mark.parametrize("segment", [512, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_rotated_when_read_are_keys_rotated_before(dtype, segment):
    """Only the order of sums differs."""
    inputs = make((4, 2, 64), [100, 7], margin=12, pairs=24, dtype=dtype)
    keys = inputs.keys.clone()
    for row, length in enumerate(inputs.context_lens.tolist()):
        addresses = addresses_of(inputs, row)
        rotated = keys[addresses]
        rotate_(rotated, *inputs.key_rope[:, :length])
        keys[addresses] = rotated
    before = replace(inputs, keys=keys, key_rope=None).run(segment)
    assert_close(inputs, inputs.run(segment), before)


@pytest.mark.tolerance
@pytest.mark.parametrize("options", [{}, {"window": 100, "num_queries": 2}])
def test_any_length_of_segments(options):
    inputs = make((4, 1, 64), [200, 33], dtype=torch.float32, **options)
    for segment in (32, 64, 96, 128, 192, 224):
        assert_close(inputs, inputs.run(segment))


@pytest.mark.parametrize("segment", [512, 64])
def test_a_window_that_reaches_every_key_gives_the_bits_of_none(segment):
    plain = make((4, 2, 64), [150, 16, 40])
    assert torch.equal(plain.run(segment), replace(plain, window=150).run(segment))


@pytest.mark.tolerance
def test_more_segments_than_the_merge_reads_at_once():
    inputs = make((2, 1, 64), [66 * 32], dtype=torch.float32)
    inputs.keys[addresses_of(inputs, 0)[-32:]] *= 3.0  # the largest score comes last
    assert_close(inputs, inputs.run(32))


@pytest.mark.tolerance
@pytest.mark.parametrize("segment", [512, 64])
@pytest.mark.parametrize("size", [0.0, 1.0, -1.0, 240.0, -240.0, -65504.0])
def test_equal_keys_give_the_mean(size, segment):
    """Scores are all 0, or all huge, or all as low as fp16 goes."""
    inputs = make((4, 1, 64), [130])
    inputs.attn[:] = 240.0
    inputs.keys[addresses_of(inputs, 0)] = size
    out = inputs.run(segment)
    values = inputs.values[addresses_of(inputs, 0)].double()
    largest, half = float(values.abs().max()), torch.finfo(torch.float16)
    assert_apart((out.double() - values.mean(0)).abs(), sums_apart(130, largest) + half.eps * largest)


@pytest.mark.tolerance
@pytest.mark.parametrize("segment", [512, 64])
def test_float32_products_keep_their_bits(segment):
    """Tries queries of 13 bits, of which ten would make equal scores; values of 13 bits come out as they are."""
    inputs = make((1, 1, 64), [2], dtype=torch.float32)
    first, second = addresses_of(inputs, 0)
    inputs.attn[:], inputs.keys[first], inputs.keys[second] = 0.0, 0.0, 0.0
    inputs.q[0, 0, 0, :2] = torch.tensor([4097.0, 4096.0])
    inputs.keys[first, 0, 0] = inputs.keys[second, 0, 1] = 1.0
    inputs.values[first], inputs.values[second] = 1.0, 0.0
    queries, keys = inputs.q[0, 0, :, :2], torch.eye(2, device=DEVICE)  # all that is not zero
    bound = attention_apart(queries, keys, 1.0, 64**-0.5)
    assert_apart((inputs.run(segment) - torch.tensor(0.125).sigmoid().item()).abs(), bound)
    inputs.values[first] = inputs.values[second] = value = 1 + 2**-12
    assert_apart((inputs.run(segment) - value).abs(), sums_apart(2 + 4, value))


@pytest.mark.parametrize("segment", [512, 64])
@pytest.mark.parametrize("token", [0, 15, 16, 63, 64, 129])
def test_one_huge_score_takes_all(token, segment):
    inputs = make((4, 1, 64), [130])
    inputs.attn[:] = 100.0
    addresses = addresses_of(inputs, 0)
    inputs.keys[addresses] = -100.0
    inputs.keys[addresses[token]] = 100.0
    out = inputs.run(segment)
    assert torch.equal(out, inputs.values[addresses[token]].expand_as(out))


@pytest.mark.tolerance
@pytest.mark.parametrize("segment", [512, 64])
def test_scores_that_rise_or_fall_steeply(segment):
    """Tries keys by which the maximum moves at every turn, or never again after the first."""
    for slope in (0.5, -0.5):
        inputs = make((2, 1, 64), [200], dtype=torch.float32)
        inputs.attn[:] = 1.0
        inputs.keys[addresses_of(inputs, 0)] = (slope * torch.arange(200.0, device=DEVICE))[:, None, None]
        assert_close(inputs, inputs.run(segment))


@pytest.mark.parametrize("segment", [512, 64])
@pytest.mark.parametrize("options", [{}, {"window": 60, "num_queries": 3}, {"margin": 12, "pairs": 32}])
def test_a_row_does_not_depend_on_its_batch(segment, options, monkeypatch):
    """Bits are the same alone, where each head has a program of the merge, and in a batch with longer, shorter and
    padded rows, where a group has one, whatever the room for items."""
    monkeypatch.setattr(kernels, "MERGED_ALONE", 4)
    inputs = make((4, 2, 64), [3, 100, 0, 150], **options)
    together = inputs.run(segment)
    assert torch.equal(inputs.run(segment, room=3), together)
    for row in range(4):
        assert torch.equal(inputs.row(row).run(segment)[0], together[row])
        assert torch.equal(inputs.row(row).run(segment, room=4)[0], together[row])


def test_bits_do_not_depend_on_pages():
    inputs = make((4, 1, 64), [150])
    order = torch.randperm(len(inputs.keys) // PAGE_SIZE, device=DEVICE)
    addresses = (order[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=DEVICE)).flatten()
    moved = replace(
        inputs,
        keys=inputs.keys[addresses].contiguous(),
        values=inputs.values[addresses].contiguous(),
        page_table=order.argsort()[inputs.page_table.long()].int(),
    )
    assert not torch.equal(moved.page_table, inputs.page_table)
    assert torch.equal(moved.run(64), inputs.run(64))


@pytest.mark.parametrize("segment", [512, 64])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_padded_rows_are_not_written(num_queries, segment):
    """Nor are all rows of a batch of padding. Queries of a row that has fewer tokens than Q are zeros."""
    inputs = make((4, 2, 64), [0, 40, 1], num_queries=num_queries)
    out = inputs.run(segment)
    assert torch.equal(out[0], inputs.q[0]) and not out[2, : num_queries - 1].any()
    assert_close(inputs, out)
    padding = make((4, 2, 64), [0], num_queries=num_queries)
    assert torch.equal(padding.run(segment), padding.q)


@pytest.mark.parametrize("segment", [512, 64])
def test_entries_behind_the_context_are_never_followed(segment):
    inputs = make((4, 2, 64), [40, 64, 0])
    expected = inputs.run(segment)
    for row, used in enumerate((3, 4, 0)):
        inputs.page_table[row, used:] = 2**31 - 1
    assert torch.equal(inputs.run(segment), expected)


@pytest.mark.parametrize("segment", [512, 64])
def test_in_place_and_elsewhere(segment):
    """Overwrites q, beside which the keys and values of its activation stay, and a poisoned output of other strides,
    which gets the same bits."""
    inputs = make((4, 2, 64), [100, 20], num_queries=2)
    expected, before = inputs.run(segment), inputs.attn.clone()
    elsewhere = torch.full((5, 2, 640), float("nan"), dtype=torch.float16, device=DEVICE)
    out = elsewhere[1:3, :, 128:384].unflatten(2, (4, 64))
    caches, shared = inputs.arguments
    work = work_of(inputs.q, inputs.context_lens, segment)
    KERNEL(inputs.q, *caches, out, *shared, work)
    assert torch.equal(out, expected) and torch.equal(inputs.attn, before)
    assert elsewhere.isnan().sum() == elsewhere.numel() - out.numel()
    KERNEL(inputs.q, *caches, inputs.q, *shared, work)
    assert torch.equal(inputs.q, expected) and torch.equal(inputs.attn[:, 256:], before[:, 256:])


def kernel(q, keys, values, page_table, context_lens, out, segment=64, run=KERNEL, **reading):
    rest = (q.shape[3] ** -0.5, None, PAGE_SIZE, work_of(q, context_lens, segment))
    run(q, keys, values, page_table, context_lens, out, *rest, **reading)


def reference(q, keys, values, page_table, context_lens, out, **reading):
    kernels.decode_attention_reference(
        q, keys, values, page_table, context_lens, out, q.shape[3] ** -0.5, None, PAGE_SIZE, **reading
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_every_layout_of_queries_and_result(dtype):
    """Tries tensors whose heads lie together; tokens may lie apart, and start anywhere."""
    inputs = make((4, 2, 64), [100, 20], num_queries=2, dtype=dtype)
    near = functools.partial(assert_close, inputs)
    prove(kernel, reference, tensors_of(inputs), ("out",), near, LAYOUTS, ("q", "out"))
    rotating = make((4, 2, 64), [100, 20], num_queries=2, dtype=dtype, margin=3, pairs=8)
    run, slow = (functools.partial(each, margin=3) for each in (kernel, reference))
    tensors = {**tensors_of(rotating), "key_rope": rotating.key_rope}
    near = functools.partial(assert_close, rotating)
    prove(run, slow, tensors, ("out",), near, LAYOUTS, ("q", "out", "key_rope"))


def test_strides_that_are_not_rows_are_refused():
    inputs = make((4, 2, 64), [40, 20], pairs=8)
    tensors = {**tensors_of(inputs), "key_rope": inputs.key_rope}
    prove_refusal(kernel, tensors, "q", "out", "keys", "values", "page_table", "key_rope")
    for name in ("keys", "values", "key_rope"):
        with pytest.raises(AssertionError, match="stride"):
            kernel(**{**tensors, name: PERMUTED.lay_out(tensors[name])[0]})


def test_calls_are_counted_by_kind():
    tensors = tensors_of(make((1, 1, 64), [1]))
    with counted(kernels.calls, triton=1):
        kernel(**tensors)
    with counted(kernels.calls, reference=1):
        reference(**tensors)
    with counted(kernels.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        kernel(**tensors, run=kernels.decode_attention)


@pytest.mark.gpu
@pytest.mark.parametrize("pairs", [0, 64])
@pytest.mark.parametrize("num_rows, context", [(1, 2048), (64, 1024)])
def test_kernel_is_faster(num_rows, context, pairs):
    """It is compared with a gather of the pages, the rotation of keys if they rotate, and torch's attention, with the
    heads of Llama-3-8B."""
    inputs = make((32, 8, 128), [context] * num_rows, pairs=pairs, dtype=torch.bfloat16)
    caches, _ = inputs.arguments
    ordered = (inputs.q, *caches, torch.empty_like(inputs.q))
    addresses = torch.stack([addresses_of(inputs, row) for row in range(num_rows)])

    def gathered():
        keys, values = (cache[addresses] for cache in (inputs.keys, inputs.values))  # (R, C, K, E)
        if pairs:
            rotate_(keys.flatten(0, 1), *inputs.key_rope.repeat(1, num_rows, 1))
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        F.scaled_dot_product_attention(inputs.q.transpose(1, 2), keys, values, enable_gqa=True)

    work = work_of(inputs.q, inputs.context_lens, Segments(8, 1, 1).tokens(num_rows))
    rest = (128**-0.5, None, PAGE_SIZE, work)
    nbytes = 2 * addresses.numel() * inputs.keys[0].nbytes
    label = f"decode_attention {num_rows} x {context}" + " rotating" * (pairs > 0)
    run = functools.partial(KERNEL, *ordered, *rest, **inputs.reading)
    prove_faster(run, gathered, nbytes, label)


@pytest.mark.gpu
@pytest.mark.parametrize("segment", [512, 128])
def test_a_captured_launch_serves_any_context(segment):
    """A launch captured at one context and replayed at others gives the bits of eager launches."""
    inputs = make((8, 2, 128), [500, 200, 0], dtype=torch.bfloat16)
    lengths = torch.tensor([[500, 200, 0], [1, 0, 0], [333, 64, 0]], dtype=torch.int32, device=DEVICE)
    expected = []
    for context_lens in lengths:
        inputs.context_lens.copy_(context_lens)
        expected.append(inputs.run(segment))
    out = torch.full_like(inputs.q.contiguous(), float("nan"))
    inputs.context_lens.copy_(lengths[0])
    work, (caches, shared) = work_of(inputs.q, inputs.context_lens, segment), inputs.arguments
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        list_work(inputs.context_lens, work)
        KERNEL(inputs.q, *caches, out, *shared, work)
    for context_lens, bits in zip(lengths, expected):
        inputs.context_lens.copy_(context_lens)
        graph.replay()
        there = context_lens > 0  # padded rows keep what `out` has
        assert torch.equal(out[there], bits[there])
