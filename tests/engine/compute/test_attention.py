"""Rows of every kind in one pass attend as each does by itself, and read nobody else's keys."""

import random
from dataclasses import dataclass, replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.engine.compute import attention, bind
from penstock.engine.compute.bind import Binder
from penstock.engine.compute.inputs import CachedLayer, GatheredContext, PagedChunks
from penstock.engine.compute.page_table import PageTable
from penstock.engine.compute.paged import Cutting
from penstock.engine.kernels.decode_work import reaches_of
from penstock.engine.kernels.rope_append import rotate_
from penstock.engine.kernels.segments import Segments
from penstock.scheduler.batching.batch import Batch, BatchRow

from tests.support.rounding import assert_apart, attention_apart

PAGE_SIZE, NUM_PAGES, H, K = 4, 2000, 4, 2
LARGEST = 5.0  # of the normal numbers that are drawn here
Rows = list[tuple[int, int]]  # cached tokens and tokens of each row


def batch_of(rows: Rows, seed: int, margin: int = 0) -> Batch:
    """A batch of these rows, whose pages are in any order."""
    pages = list(range(1, NUM_PAGES))
    random.Random(seed).shuffle(pages)
    made = []
    for index, (start, num_tokens) in enumerate(rows):
        own = tuple(pages.pop() for _ in range(-(-(margin + start + num_tokens) // PAGE_SIZE)))
        made.append(BatchRow(index, tuple(range(num_tokens)), start, own, True, None))
    return Batch.of(made)


@dataclass
class Example:
    """One layer's tensors in a pass over `rows`; with `turns` keys are cached as they were before their rotation. What
    belongs to no row of the cache is NaN."""

    rows: Rows
    window: int | None = None
    turns: bool = False
    margin: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    head_dim: int = 8
    max_context: int = 64
    reads_pages: bool = False

    def __post_init__(self):
        self.batch = batch_of(self.rows, 3, self.margin)
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        angles = torch.arange(64 if self.turns else 0)[:, None] * torch.tensor([0.3, 0.02])
        self.rope = torch.stack([angles.cos(), angles.sin()]).to(self.device, self.dtype)
        self.contexts = [row.num_cached + len(row.tokens) for row in self.batch.rows]
        self.keys, self.values = ([normal(length, K, self.head_dim) for length in self.contexts] for _ in "kv")
        self.q = normal(self.batch.num_tokens, H, self.head_dim)

    def turned(self, keys: torch.Tensor) -> torch.Tensor:
        keys = keys.clone()
        if self.turns:
            rotate_(keys, *self.rope[:, : len(keys)])
        return keys

    def cache(self) -> CachedLayer:
        shape = (NUM_PAGES * PAGE_SIZE, K, self.head_dim)
        keys, values = (torch.full(shape, torch.nan, dtype=self.dtype, device=self.device) for _ in "kv")
        for row, k, v in zip(self.batch.rows, self.keys, self.values):
            entries = torch.arange(len(k)) + self.margin
            addresses = torch.tensor(row.pages)[entries // PAGE_SIZE] * PAGE_SIZE + entries % PAGE_SIZE
            keys[addresses], values[addresses] = k if self.turns else self.turned(k), v
        return CachedLayer(keys, values, PAGE_SIZE, self.margin, self.rope if self.turns else None)

    def heads(self) -> torch.Tensor:
        """The activation (T, H + 2K, E) behind the rotation."""
        own = [(self.turned(k)[-n:], v[-n:]) for k, v, n in zip(self.keys, self.values, self.lengths)]
        k, v = (torch.cat(parts) for parts in zip(*own))
        return torch.cat([self.q, k, v], dim=1)

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.batch.rows]

    def bound(self) -> Binder:
        last = torch.zeros(8, dtype=torch.int64, device=self.device)
        windows, partials = (self.window,), torch.empty(10**6, device=self.device)
        cutting = Cutting(Segments(K, self.max_context, 10**4), windows, reaches_of(windows, self.device), partials)
        most_pages = max(len(row.pages) for row in self.batch.rows)
        table = PageTable(numpy.zeros((len(self.lengths), most_pages), numpy.int32))
        return Binder(PAGE_SIZE, self.margin, last, self.max_context, cutting, table, reads_pages=self.reads_pages)

    def attended(self) -> torch.Tensor:
        heads = self.heads()
        context = self.bound().bind(self.batch).context
        attention.attend_(heads, self.cache(), context, self.window)
        return heads[:, :H]

    def expected(self) -> torch.Tensor:
        """The attention of each row in float64, by the definition."""
        out = []
        for q, k, v in zip(self.q.split(self.lengths), self.keys, self.values):
            k, v = (part.double().repeat_interleave(H // K, dim=1) for part in (self.turned(k), v))
            query, key = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))
            seen = (key <= query) & (key > query - (self.window or len(k)))
            scores = torch.einsum("qhe,che->hqc", q.double(), k) * self.head_dim**-0.5
            weights = scores.masked_fill(~seen.to(q.device), -torch.inf).softmax(-1)
            out.append(torch.einsum("hqc,che->qhe", weights, v))
        return torch.cat(out)

    def assert_attended(self) -> None:
        queries, keys = (torch.full((n, self.head_dim), LARGEST) for n in (1, max(self.contexts)))
        bound = attention_apart(queries, keys, LARGEST, self.head_dim**-0.5)
        assert_apart((self.attended().double() - self.expected()).abs(), bound)


ROW = st.tuples(st.just(0) | st.integers(0, 30), st.just(1) | st.integers(1, 30))


@pytest.mark.tolerance
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=7),
    window=st.none() | st.integers(1, 40),
    turns=st.booleans(),
    margin=st.integers(0, PAGE_SIZE - 1),
    max_context=st.integers(60, 130),
    reads_pages=st.booleans(),
)
def test_rows_of_every_kind_attend_by_the_definition(rows, window, turns, margin, max_context, reads_pages):
    before, reads_pages = dict(attention.calls), reads_pages and not turns
    settings = {"window": window, "turns": turns, "margin": margin, "max_context": max_context}
    Example(rows, reads_pages=reads_pages, **settings).assert_attended()
    took = {way: count - before[way] for way, count in attention.calls.items()}
    continuing = sum(start + length for start, length in rows if start and length > 1)
    assert took["paged"] == any(length == 1 for _, length in rows)
    assert took["own"] == any(start == 0 and length > 1 for start, length in rows)
    if reads_pages:
        assert (took["behind"], took["gathered"]) == (continuing > 0, 0)
    else:
        assert -(-continuing // max_context) <= took["gathered"] <= len(rows)
        assert (took["gathered"] > 0) == (continuing > 0)


@pytest.mark.parametrize("max_context, parts", [(54, [[20, 25, 9]]), (34, [[20], [25, 9]]), (33, [[20], [25], [9]])])
def test_no_more_is_copied_than_what_chunks_that_continue_attend_to(max_context, parts):
    """And no more at a time than the longest row may have, or than several may."""
    rows = [(300, 1), (12, 8), (0, 50), (1, 24), (6, 3), (70, 1)]
    context = Example(rows, max_context=max_context).bound().bind(batch_of(rows, 1)).context
    lengths = [[row.num_context for row in part.chunks.ranges] for part in context.continuing]
    assert lengths == parts
    assert all(len(part.addresses) == sum(own) <= max_context for part, own in zip(context.continuing, parts))
    many = replace(Example(rows, max_context=max_context).bound(), most_gathered=54).bind(batch_of(rows, 1)).context
    assert [len(part.addresses) for part in many.continuing] == [54]


@pytest.mark.parametrize("least, num_parts", [(1, 2), (7, 2), (8, 1)])
def test_chunks_of_few_queries_read_pages_where_they_lie(least, num_parts, monkeypatch):
    """Two parts have 15 queries; where pages cannot be read, contexts are copied all the same."""
    monkeypatch.setattr(bind, "LEAST_QUERIES", least)
    rows, settings = [(300, 1), (12, 8), (0, 50), (1, 4), (6, 3), (70, 1)], {"max_context": 20}
    reading, copying = (
        Example(rows, reads_pages=reads, **settings).bound().bind(batch_of(rows, 1)).context.continuing
        for reads in (True, False)
    )
    assert len(reading) == num_parts and isinstance(reading[0], PagedChunks) == (num_parts == 1)
    assert len(copying) == 2 and all(isinstance(part, GatheredContext) for part in copying)


@pytest.mark.tolerance
@pytest.mark.parametrize("reads_pages", [False, True])
def test_last_tokens_that_are_sampled_attend_as_with_all(reads_pages):
    example = Example([(5, 1), (7, 6), (9, 2), (20, 4), (0, 9), (0, 3)], reads_pages=reads_pages)
    rows = [row._replace(samples=index not in (2, 4)) for index, row in enumerate(example.batch.rows)]
    context = replace(example.bound(), selects_early=True).bind(Batch.of(rows)).context
    heads = example.heads()
    attention.attend_(heads, example.cache(), context.of_lasts, None)
    ends = torch.tensor(example.lengths).cumsum(0) - 1
    sampled = ends[[row.samples for row in rows]]
    torch.testing.assert_close(heads[sampled, :H].double(), example.expected()[sampled], rtol=1e-5, atol=1e-5)
    others = [token for token in range(len(heads)) if token not in sampled]
    assert torch.equal(heads[others, :H], example.q[others])


def test_rows_out_of_order_are_not_bound():
    rows = batch_of([(0, 9), (5, 1)], seed=1).rows
    with pytest.raises(AssertionError, match="one token each first"):
        Example([(0, 9)]).bound().bind(Batch(rows[::-1]))


@pytest.mark.tolerance
def test_rows_that_somebody_else_attends_see_the_same():
    example = Example([(5, 1), (0, 9), (7, 6), (0, 3), (0, 1), (11, 1)], turns=True, margin=3, max_context=64)
    heads, context = example.heads(), example.bound().bind(example.batch).context
    expected, tokens_of = example.expected(), []
    for tokens, row, k, v in attention.row_contexts(heads, example.cache(), context):
        q = example.q[tokens].transpose(0, 1)[None]
        k, v = (part.transpose(0, 1)[None] for part in (k, v))
        mask = attention.causal_mask(row, None, q.device)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(out[0].transpose(0, 1).double(), expected[tokens], rtol=1e-5, atol=1e-5)
        tokens_of += range(tokens.start, tokens.stop)
    assert tokens_of == list(range(example.batch.num_tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 5000], ids=str)
@pytest.mark.parametrize("reads_pages", [False, True], ids=["copies", "pages"])
@pytest.mark.parametrize("rows", [[(0, 4097)], [(9, 1), (0, 500), (700, 6), (0, 30), (0, 5000), (0, 1)]], ids=str)
def test_rows_on_a_gpu(rows, window, dtype, reads_pages):
    """Compares the kernels that a GPU takes, which round to the dtype once; prompts attend in one launch."""
    settings = {"window": window, "dtype": dtype, "device": "cuda", "head_dim": 128, "max_context": 5120}
    settings["reads_pages"] = reads_pages
    example, before = Example(rows, **settings), attention.calls["own"]
    torch.testing.assert_close(example.attended().double(), example.expected(), rtol=2e-2, atol=1e-2)
    assert attention.calls["own"] == before + 1
