"""Pages that are found, by whom and for how long; test_simulation.py plays whole workloads on them."""

import pytest
from penstock.scheduler.batching.pages import PagePool
from penstock.scheduler.batching.prefix_cache import PrefixCache
from penstock.scheduler.batching.request import FinishReason, Request, SamplingParams
from penstock.scheduler.batching.retention import SinksAndWindow
from penstock.scheduler.batching.scheduler import Scheduler

PROMPT = list(range(100, 114))  # three pages and a half


def scheduler(**changes):
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 60, "page_size": 4, "num_pages": 40}
    return Scheduler(**(settings | {"prefix_caching": True} | changes))


def request(id=0, prompt=PROMPT, max_tokens=1, **params):
    return Request(id, list(prompt), SamplingParams(max_tokens=max_tokens, **params))


def run(sched, *requests, token=9):
    """Runs requests to their ends. Returns how many of each one's tokens were cached."""
    for one in requests:
        sched.add(one)
    while sched.has_unfinished:
        batch = sched.schedule()
        sched.update(batch, [token] * batch.num_sampled)
        sched.check_integrity()
    return [one.num_cached_tokens for one in requests]


@pytest.mark.parametrize(
    ("prompt", "num_cached"),
    [
        (PROMPT, 12),
        (PROMPT[:12], 8),  # a token is left to be computed
        (PROMPT[:13], 12),
        (PROMPT[:11] + [7, 8], 8),
        ([7, *PROMPT], 0),
        (PROMPT[4:], 0),  # behind other tokens it is something else
        (PROMPT[:3], 0),
    ],
)
def test_whole_pages_from_the_beginning_are_found(prompt, num_cached):
    sched = scheduler()
    assert run(sched, request()) == [0]
    assert run(sched, request(1, prompt)) == [num_cached]
    assert (sched.counts.num_asked_tokens, sched.counts.num_hit_tokens) == (14 + len(prompt), num_cached)


def test_only_what_is_not_cached_is_computed_in_pages_of_its_own():
    sched = scheduler()
    sched.add(first := request(max_tokens=20))
    batch = sched.schedule()
    sched.update(batch, [9])
    sched.add(request(1, PROMPT[:9] + [7], max_tokens=5))
    *_, row = sched.schedule().rows
    assert (row.start, row.tokens, row.samples) == (8, (108, 7), True)
    assert row.pages[:2] == tuple(first.pages[:2]) and row.pages[2] not in first.pages
    assert row.sampling is not None
    sched.check_integrity()


@pytest.mark.parametrize("num_requests", [1, 2, 3])
def test_a_pass_says_what_its_rows_share(num_requests):
    """Three pages of the prompt, which the first row computes and the others find, for each of them; and nothing once
    they have left."""
    sched = scheduler()
    assert run(sched, request(10)) == [0]  # what nobody holds is not shared
    for id in range(num_requests):
        sched.add(request(id, [*PROMPT, id], max_tokens=3))
    first = sched.schedule()
    assert len(first.rows) == num_requests and first.shape.num_shared == 12 * (num_requests - 1)
    sched.update(first, [9] * num_requests)
    decode = sched.schedule()
    assert decode.shape.is_decode and decode.shape.num_shared == 12 * (num_requests - 1)
    sched.finish(sched.seated[0], FinishReason.ABORT)
    assert sched.cache.num_shared_tokens == 12 * max(num_requests - 2, 0)


def test_output_is_found_too_but_for_its_last_token():
    sched = scheduler()
    run(sched, request(max_tokens=7), token=9)  # 20 of 21 tokens are computed
    assert run(sched, request(1, PROMPT + [9] * 7)) == [20]


@pytest.mark.parametrize(
    ("salts", "num_cached"), [((None, "a"), 0), (("a", "b"), 0), (("a", "a"), 12), (("a", None), 0)]
)
def test_only_requests_of_one_salt_share(salts, num_cached):
    first, second = (request(id, cache_salt=salt) for id, salt in enumerate(salts))
    sched = scheduler()
    assert run(sched, first) + run(sched, second) == [0, num_cached]


def test_equal_hashes_are_not_equal_tokens():
    prompt, other = [0] * 14, [0, 2**61 - 1] * 7
    assert hash(tuple(prompt[:4])) == hash(tuple(other[:4]))
    sched = scheduler()
    assert run(sched, request(0, prompt)) + run(sched, request(1, other)) == [0, 0]


def test_two_that_begin_in_one_pass_share_what_one_of_them_computes():
    sched, first, second = scheduler(), request(0), request(1)
    sched.add(first), sched.add(second)
    rows = sorted(sched.schedule().rows)
    assert [(row.start, len(row.tokens)) for row in rows] == [(0, 14), (12, 2)]
    assert rows[0].pages[:3] == rows[1].pages[:3] and rows[0].pages[3] != rows[1].pages[3]
    assert (first.num_cached_tokens, second.num_cached_tokens, sched.counts.num_hit_tokens) == (0, 12, 12)
    sched.check_integrity()


def test_the_least_recently_used_goes_first_and_the_end_before_the_beginning():
    cache, requests = PrefixCache(PagePool(8), page_size=2), [request(id, range(id, id + 5)) for id in (0, 10, 20)]
    for one in requests[:2]:
        one.pages = cache.allocate(3)
        cache.enter(one, 5)
        cache.release(one.pages)
    assert [len(cache.find(one)) for one in requests] == [2, 2, 0] and cache.num_available == 7
    cache.release(cache.share(cache.find(requests[0])))
    held = cache.allocate(4)  # three free ones, and the end of the second
    assert [len(cache.find(one)) for one in requests] == [2, 1, 0]
    held += cache.allocate(2)
    assert [len(cache.find(one)) for one in requests] == [1, 0, 0]
    cache.check_integrity(held)


def test_what_is_held_is_not_evicted():
    cache, one = PrefixCache(PagePool(4), page_size=2), request(0, range(5))
    one.pages = cache.allocate(3)
    cache.enter(one, 5)
    other = cache.share(cache.find(one))
    cache.release(one.pages)
    assert cache.num_available == 1 and cache.allocate(1) == [one.pages[2]]
    assert [block.page for block in cache.find(one)] == other == one.pages[:2]


def test_the_whole_pages_of_a_pass_are_found_from_when_it_is_made_until_it_is_withdrawn():
    sched = scheduler(max_num_batched_tokens=11)
    sched.add(request(max_tokens=9))
    first = sched.schedule()
    assert len(sched.cache.find(request(1))) == 2  # of a chunk of eleven tokens
    announced = sched.schedule()
    assert len(sched.cache.find(request(1))) == 3
    sched.update(first, [])
    sched.withdraw(announced)
    assert len(sched.cache.find(request(1))) == 2
    sched.update(sched.schedule(), [9])
    sched.withdraw(sched.schedule())
    assert len(sched.cache.find(request(1, [*PROMPT, 9, 9, 9]))) == 3  # the fourth page was never whole


@pytest.mark.parametrize("num_ahead", [1, 2])
def test_what_many_begin_with_is_computed_once(num_ahead):
    """However many passes are scheduled before the tokens of the first are known."""
    sched = scheduler(max_num_seqs=30, max_num_batched_tokens=200, max_model_len=220, num_pages=6000)
    for id in range(30):
        sched.add(request(id, [*range(150), *[1000 + id] * 6]))
    batches, num_tokens = [], 0
    while sched.has_unfinished:
        while len(batches) < num_ahead and (batch := sched.schedule()) is not None:
            batches.append(batch)
            num_tokens += sum(len(row.tokens) for row in batch.rows)
        batch = batches.pop(0)
        sched.update(batch, [9] * batch.num_sampled)
        sched.check_integrity()
    assert (num_tokens, sched.counts.num_passes) == (156 + 29 * 8, 2)
    assert sched.counts.num_hit_tokens == 29 * 148


def announced_behind(sched, *requests):
    """A pass in which these requests begin, scheduled behind one that is under way, and the latter."""
    sched.add(request(99, [7] * 5, max_tokens=2))
    before = sched.schedule()
    for one in requests:
        sched.add(one)
    return before, sched.schedule()


def test_those_who_count_on_a_pass_that_is_withdrawn_wait_again():
    sched, owner, other, last = scheduler(), request(0), request(1), request(2, [50] * 6)
    before, announced = announced_behind(sched, owner, other, last)
    asked, hits = sched.counts.num_asked_tokens, sched.counts.num_hit_tokens
    assert (other.num_computed_tokens, other.num_cached_tokens, hits) == (14, 12, 12)
    assert set(sched.withdraw(announced, [other.row, owner.row])) == {owner, other}
    assert (other.row, other.pages, other.num_cached_tokens, other.num_computed_tokens) == (None, [], None, 0)
    assert owner.row is not None and last.row is not None and not sched.cache.find(request(3))
    assert (sched.counts.num_asked_tokens, sched.counts.num_hit_tokens) == (asked - 14, 0)
    sched.check_integrity()
    sched.update(before, [9])
    rows = {row.index: row for row in sched.schedule().rows}
    assert rows[owner.row].start == 0 and rows[other.row].start == 12
    assert (sched.counts.num_asked_tokens, sched.counts.num_hit_tokens) == (asked, hits)
    sched.check_integrity()


def test_an_announced_pass_is_made_anew_if_one_ends_whose_pages_others_share():
    sched, owner, others = scheduler(), request(0), [request(1), request(2)]
    before, announced = announced_behind(sched, owner, *others)
    sched.finish(owner, FinishReason.ABORT)
    sched.update(before, [9])
    sched.check_integrity()
    assert sched.revise(announced) is None
    assert all(one.row is None for one in others)
    sched.check_integrity()
    rows = sorted(row.start for row in sched.schedule().rows if row.pages[0] in others[0].pages)
    assert rows == [0, 12] and [one.num_cached_tokens for one in others] == [0, 12]


def test_an_announced_pass_stays_if_nobody_shares_the_pages_of_one_that_ends():
    sched, owner, other = scheduler(), request(0), request(1)
    before, announced = announced_behind(sched, owner, other)
    sched.finish(other, FinishReason.ABORT)
    sched.update(before, [9])
    assert sched.revise(announced) is announced
    sched.update(announced, [9] * announced.num_sampled)
    assert owner.finish_reason == "length" and run(sched, request(2)) == [12]


def test_one_who_enters_an_announced_pass_shares_what_it_computes():
    sched, owner, late = scheduler(), request(0), request(1)
    before, announced = announced_behind(sched, owner)
    sched.add(late)
    sched.update(before, [9])
    revised = sched.revise(announced)
    assert sorted(row.start for row in revised.rows if len(row.tokens) > 1) == [0, 12]
    sched.finish(owner, FinishReason.ABORT)  # it runs: what it computes is there for the other one
    sched.check_integrity()
    sched.update(revised, [9] * revised.num_sampled)
    assert late.finish_reason == "length" and late.num_cached_tokens == 12
    assert run(sched, request(2)) == [12]


def test_what_is_coming_is_nobodys_once_its_holders_have_ended():
    sched, owner = scheduler(), request(0)
    sched.add(owner)
    batch = sched.schedule()
    sched.finish(owner, FinishReason.ABORT)
    sched.check_integrity()
    assert not sched.cache.find(request(1)) and sched.pool.num_free == sched.pool.num_usable
    sched.update(batch, [9])
    assert run(sched, request(1)) == [0]


def test_a_pass_that_cannot_be_made_leaves_nothing_that_is_coming(monkeypatch):
    sched, requests = scheduler(), [request(0), request(1)]
    for one in requests:
        sched.add(one)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sched, "_note_pass", lambda: 1 / 0)
        sched.schedule()
    assert requests[1].num_cached_tokens == 12
    for one in sched.seated:
        sched.finish(one, FinishReason.ERROR)
    sched.check_integrity()
    assert run(sched, request(2)) == [0]


def test_who_asks_for_log_probabilities_of_a_prompt_computes_it_and_others_share_it():
    sched = scheduler()
    asks = [request(id, prompt_logprobs=0) for id in range(2)]
    for one in (*asks, request(2)):
        sched.add(one)
    assert sorted(row.start for row in sched.schedule().rows) == [0, 0, 12]


def test_what_had_no_token_is_found_by_nobody():
    """Its keys and values may be NaN. What it began with as others did is forgotten too."""
    sched = scheduler()
    run(sched, request(0, PROMPT[:9]))
    sched.add(failed := request(1))
    sched.update(sched.schedule(), [-1])
    assert (failed.finish_reason, failed.num_cached_tokens) == ("error", 8)
    assert run(sched, request(2)) == [0]


def test_an_error_and_a_reset_forget_all():
    for forget in (Scheduler.abort, lambda sched: sched.cache.clear()):
        sched = scheduler()
        run(sched, request())
        forget(sched)
        sched.check_integrity()
        assert sched.pool.num_free == sched.pool.num_usable and run(sched, request(1)) == [0]


@pytest.mark.parametrize(
    "changes", [{"prefix_caching": False}, {"retention": SinksAndWindow(num_sinks=0, window_tokens=20, page_size=4)}]
)
def test_it_is_off_if_asked_and_where_old_tokens_are_dropped(changes):
    sched = scheduler(**changes)
    assert run(sched, request()) + run(sched, request(1)) == [0, 0]
    assert sched.pool.num_free == sched.pool.num_usable


def test_penalties_are_told_of_cached_tokens():
    sched = scheduler()
    run(sched, request())
    sched.add(request(1, repetition_penalty=1.1))
    (row,) = sched.schedule().rows
    assert row.start == 12 and row.history == (tuple(PROMPT[:12]), ())


def test_one_that_gave_way_finds_its_own_pages():
    sched, one = scheduler(), request(max_tokens=20)
    sched.add(one)
    for _ in range(4):
        batch = sched.schedule()
        sched.update(batch, [9])
    sched._admission._preempt(one)
    (row,) = sched.schedule().rows
    assert row.start == 16 and row.tokens == (9, 9) and one.num_cached_tokens == 0
    assert sched.counts.num_recomputed_tokens == 1 and sched.counts.num_hit_tokens == 0


def test_what_the_cache_keeps_is_room_for_all():
    """A request that needs every page gets them, and those that begin alike need fewer."""
    sched = scheduler(num_pages=16, max_model_len=60)
    run(sched, *(request(id, [id] * 14) for id in range(4)))
    assert sched.num_free_pages == 15 > sched.pool.num_free
    assert run(sched, request(5, max_tokens=46)) == [0]
    sched.add(aborted := request(6))
    sched.schedule()
    sched.finish(aborted, FinishReason.ABORT)
    sched.check_integrity()
