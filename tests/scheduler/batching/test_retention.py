"""The tokens that a row keeps and where they lie, against a plain simulation: a list of tokens, and memory that is
written to."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock.scheduler.batching.request import FinishReason, Request, SamplingParams
from penstock.scheduler.batching.retention import KeepAll, SinksAndWindow
from penstock.scheduler.batching.scheduler import Scheduler


@dataclass
class Simulated:
    """A cache that holds tokens in order of age, and evicts the oldest that are no sinks when one more has no room."""

    num_sinks: int
    window_tokens: int
    eviction_tokens: int
    held: list[int] = field(default_factory=list)

    def append(self, token: int) -> list[int]:
        while len(self.held) + 1 > self.num_sinks + self.window_tokens:
            del self.held[self.num_sinks : self.num_sinks + self.eviction_tokens]
        self.held.append(token)
        return list(self.held)


@st.composite
def retentions(draw) -> SinksAndWindow:
    page_size = draw(st.integers(1, 8))
    return SinksAndWindow(draw(st.integers(0, 20)), draw(st.integers(page_size, 70)), page_size)


def entries(retention, pages: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """The entries (page, offset) of a row's cached tokens, in order."""
    cached = range(retention.margin, retention.margin + count)
    return [(pages[entry // retention.page_size], entry % retention.page_size) for entry in cached]


@given(retentions(), st.lists(st.integers(1, 40), min_size=1, max_size=30), st.randoms())
def test_passes_of_any_length_write_and_read_what_the_simulation_holds(retention, asked, random):
    """Runs passes of as many tokens as each may have. For each token, what is cached up to it is what the simulation
    holds when the token is its last: nothing that is held was written over."""
    num_tokens = sum(asked)
    pages = random.sample(range(1000), retention.num_pages(num_tokens))
    simulated = Simulated(retention.num_sinks, retention.window_tokens, retention.eviction_tokens)
    memory, start = {}, 0
    for length in asked:
        wanted = start + length
        while start < wanted:
            end = retention.pass_end(start, wanted)
            assert start < end <= wanted
            first = start - retention.num_evicted(end)
            table = retention.page_table(pages, end)
            cached = entries(retention, table, first + end - start)
            assert len(set(cached)) == len(cached)
            for token in range(start, end):
                memory[cached[first + token - start]] = token
            for token in range(start, end):
                held = simulated.append(token)
                assert [memory[entry] for entry in cached[: first + token - start + 1]] == held
            start = end
    assert len(memory) <= len(pages) * retention.page_size


@given(retentions(), st.integers(1, 3000))
def test_pages_are_as_many_as_are_ever_used(retention, num_tokens):
    used = max(len(retention.page_table(range(100), end)) for end in range(1, num_tokens + 1))
    assert retention.num_pages(num_tokens) == used
    assert used <= -(-retention.num_sinks // retention.page_size) - (-retention.window_tokens // retention.page_size)


@given(retentions(), st.integers(1, 500))
def test_the_window_is_never_shorter_than_it_says(retention, num_tokens):
    """Holds three quarters of the window, or all but a page where it has few pages."""
    held = num_tokens - retention.num_evicted(num_tokens)
    least = retention.num_sinks + retention.window_tokens - retention.eviction_tokens + 1
    assert min(num_tokens, least) <= held <= retention.max_cached


@given(st.integers(1, 8), st.integers(1, 300))
def test_all_are_kept(page_size, num_tokens):
    retention, pages = KeepAll(page_size), list(range(5, 400))
    assert retention.num_evicted(num_tokens) == 0 and retention.pass_end(3, num_tokens) == num_tokens
    assert retention.page_table(pages, num_tokens) == tuple(pages[: retention.num_pages(num_tokens)])


def test_a_window_within_a_page_is_refused():
    with pytest.raises(ValueError, match=r"attention_window=15: expected at least page_size=16"):
        SinksAndWindow(4, 15, 16)


def scheduler_of(retention: SinksAndWindow, num_pages: int, **options) -> Scheduler:
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 2**31 - 1, "num_pages": num_pages}
    return Scheduler(**sizes, page_size=retention.page_size, retention=retention, **options)


def test_a_thousand_tokens_in_the_pages_of_fifty():
    """Withdraws passes, too: they leave nothing to undo."""
    retention = SinksAndWindow(4, 40, 8)
    scheduler = scheduler_of(retention, 1 + retention.num_pages(10**6))
    request = Request(0, list(range(300)), SamplingParams(max_tokens=700, ignore_eos=True))
    scheduler.add(request)
    rows = []
    while scheduler.has_unfinished:
        withdrawn = scheduler.schedule()
        scheduler.withdraw(withdrawn)
        batch = scheduler.schedule()
        assert batch == withdrawn
        scheduler.check_integrity()
        rows += batch.rows
        scheduler.update(batch, [7] * batch.num_sampled)
    assert request.finish_reason is FinishReason.LENGTH and request.num_tokens == 1000
    assert sum(len(row.tokens) for row in rows) == 999
    assert max(row.num_cached + len(row.tokens) for row in rows) == retention.max_cached
    assert len({page for row in rows for page in row.pages}) == retention.num_pages(10**6) == 6
    assert scheduler.pool.num_free == scheduler.pool.num_usable


def test_a_sequence_that_ends_early_takes_the_pages_of_what_it_has():
    retention = SinksAndWindow(4, 400, 8)
    scheduler = scheduler_of(retention, 8)
    scheduler.add(Request(0, [1, 2, 3], SamplingParams(max_tokens=10)))
    scheduler.schedule()
    assert scheduler.pool.num_usable - scheduler.pool.num_free == 2  # sinks, and eight tokens
    with pytest.raises(ValueError, match="need 51 pages of 8 tokens, and there are 7"):
        scheduler.add(Request(1, [1], SamplingParams(max_tokens=10**6)))
