"""Rows that grow, give way and come back: who gives way to whom, and that nothing of it is seen in what they give."""

import random
from dataclasses import replace

import pytest
from penstock.scheduler.batching.counts import MoveCounts, Wait
from penstock.scheduler.batching.host_pages import HostPages
from penstock.scheduler.batching.request import FinishReason, Request, SamplingParams
from penstock.scheduler.batching.retention import SinksAndWindow
from penstock.scheduler.batching.scheduler import Scheduler
from penstock.scheduler.batching.seats import STRETCH

from tests.scheduler.batching.test_simulation import PREPARED, Simulation, play, random_request

EOS = 2


def scheduler(num_pages=20, page_size=4, **changes):
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 60, "eos_token_ids": [EOS]}
    return Scheduler(**(settings | changes), page_size=page_size, num_pages=num_pages)


def request(id, num_prompt=3, max_tokens=60, **params):
    return Request(id, list(range(100, 100 + num_prompt)), SamplingParams(max_tokens=max_tokens, **params), seed=id)


def run_pass(sched, token=9):
    batch = sched.schedule()
    sched.update(batch, [token] * batch.num_sampled)
    sched.check_integrity()


def add_all(sched, *requests):
    for one in requests:
        sched.add(one)


def test_a_request_is_admitted_for_what_it_needs_now():
    """At its longest each would take 15 pages of 19."""
    sched = scheduler()
    add_all(sched, *(request(id) for id in range(4)))
    run_pass(sched)
    assert sched.num_running == 3 and sched.counts.waits == {Wait.PAGES: 1} and sched.counts.num_waiting == 1
    assert all(len(one.pages) == -(-(3 + STRETCH) // 4) for one in sched._seats.running.values())


def test_one_with_all_it_can_need_gets_no_more():
    sched = scheduler()
    sched.add(request(0, max_tokens=2))  # the last token has no KV
    run_pass(sched)
    assert len(sched._seats.running[0].pages) == 1


def test_pages_come_one_by_one():
    """Beyond those that it got with its row, a request holds none that it does not write to yet."""
    sched, one = scheduler(), request(0)
    sched.add(one)
    run_pass(sched)
    first = len(one.pages)
    for _ in range(40):
        run_pass(sched)
        assert len(one.pages) == max(first, -(-one.num_computed_tokens // 4))
    assert len(one.pages) > first + 3


def test_the_least_computed_gives_way_and_comes_back_before_all_that_came_later():
    sched, order = scheduler(num_pages=17), [request(id, num_prompt) for id, num_prompt in enumerate([9, 3, 5])]
    add_all(sched, *order[:2])
    run_pass(sched)
    sched.add(order[2])
    while not sched.counts.num_preemptions:
        run_pass(sched)
    assert [one.num_preemptions for one in order] == [0, 1, 0] and order[1].row is None
    had = list(order[1].output_token_ids)
    assert sched._admission.line.head() is order[1]
    sched.finish(order[0], FinishReason.ABORT)
    batch = sched.schedule()
    (again,) = [row for row in batch.rows if row.start == 0 and len(row.tokens) > 5]
    assert list(again.tokens) == order[1].prompt_token_ids + had and again.samples and again.sampling is not None
    assert sched.counts.num_recomputed_tokens == len(again.tokens) - 1


def test_history_goes_with_penalties_only():
    for penalty in (0.0, 0.5):
        sched, one = scheduler(), request(0, frequency_penalty=penalty)
        sched.add(one)
        run_pass(sched)
        run_pass(sched)
        sched._admission._preempt(one)
        (row,) = sched.schedule().rows
        assert row.history == (((), (9, 9)) if penalty else ((), ()))


def test_one_that_has_given_way_may_end_while_it_waits():
    """Its last token is under way when it gives way; or it is aborted."""
    sched, one, other = scheduler(), request(0), request(1)
    add_all(sched, one, other)
    first = sched.schedule()
    sched._admission._preempt(one)
    second = sched.schedule()  # it cannot come back before its token is known
    assert [row.index for row in second.rows] == [1] and not one.pages
    assert sched.update(first, [EOS, 9]) == [one, other]
    assert (one.finish_reason, one.output_token_ids, sched.num_waiting) == ("stop", [EOS], 0)
    sched.update(second, [9])
    sched._admission._preempt(other)
    sched.finish(other, FinishReason.ABORT)
    assert not sched.has_unfinished
    sched.check_integrity()


@pytest.mark.parametrize(("prefix_caching", "num_host_pages"), [(False, 0), (True, 0), (True, 12), (True, 500)])
@pytest.mark.parametrize("lookahead", [0, 1, pytest.param(2, marks=pytest.mark.soak), PREPARED])
def test_tiny_pools(lookahead, prefix_caching, num_host_pages):
    """Requests that together need many times the pages."""
    num_preemptions = num_hits = num_evicted = 0
    moved = MoveCounts()
    for seed in range(8):
        rng = random.Random(seed)
        page_size = rng.choice([1, 2, 4])
        sched = scheduler(
            num_pages=1 + 100 // page_size,
            page_size=page_size,
            max_num_seqs=8,
            max_num_batched_tokens=rng.choice([8, 20, 64]),
            policy=rng.choice(["fcfs", "priority"]),
            prefix_caching=prefix_caching,
            host_pages=HostPages(num_host_pages, counts=moved),
        )
        late = [random_request(rng, id, 14, 14) for id in range(12)]
        for one in late[::2]:
            one.params = replace(one.params, max_tokens=45, ignore_eos=True, stop_token_ids=[])
        play(rng, sched, late, lookahead)
        num_preemptions += sched.counts.num_preemptions
        num_hits += sched.counts.num_hit_tokens
        num_evicted += next(sched.cache._numbers) - len(sched.cache._blocks)
    assert num_preemptions > 10
    assert (num_hits > 20 and num_evicted > 200) if prefix_caching else num_hits == num_evicted == 0
    assert (moved.num_out > 200 and moved.num_in > 20) if num_host_pages else moved.num_out == moved.num_in == 0


@pytest.mark.parametrize("tiers", [0, 1, 2])
@pytest.mark.parametrize("lookahead", [0, 1, PREPARED])
def test_any_row_gives_way_at_any_step(lookahead, tiers):
    for step in range(16):
        for row in range(3):
            rng, passes = random.Random(step), iter(range(1000))
            both_tiers = {"prefix_caching": tiers > 0, "host_pages": HostPages(20 if tiers > 1 else 0)}

            def give_way(simulation, step=step, row=row, passes=passes):
                victim = simulation.scheduler._seats.running.get(row)
                if next(passes) == step and victim is not None:
                    simulation.scheduler._admission._preempt(victim)

            sched = scheduler(num_pages=17, max_num_batched_tokens=8, **both_tiers)
            play(rng, sched, [random_request(rng, id, 60, 60) for id in range(4)], lookahead, give_way)


def test_an_urgent_request_computes_in_the_next_pass():
    """All rows and pages are taken by others; of the least urgent ones the least computed gives way."""
    sched = scheduler(max_num_seqs=3, policy="priority")
    others = [request(0, 3, priority=5), request(1, 4, priority=7), request(2, 9, priority=7)]
    add_all(sched, *others)
    run_pass(sched)
    urgent = request(3, 8, priority=-1)
    sched.add(urgent)
    batch = sched.schedule()
    assert urgent.row is not None and [one.num_preemptions for one in others] == [0, 1, 0]
    assert any(row.index == urgent.row and row.samples for row in batch.rows)


def test_an_urgent_prompt_comes_before_the_rest_of_others():
    """There are a row and pages for it, and one before it computes a prompt of several passes: it takes of each pass
    what it can."""
    sched = scheduler(num_pages=40, max_num_batched_tokens=8, policy="priority")
    first, urgent, computed = request(0, 40, priority=1), request(1, 12), []
    sched.add(first)
    run_pass(sched)
    sched.add(urgent)
    for _ in range(3):
        run_pass(sched)
        computed.append((first.num_computed_tokens, urgent.num_computed_tokens))
    assert computed == [(8, 8), (12, 12), (19, 13)]


def test_an_urgent_prompt_that_does_not_fit_keeps_nobody_from_computing():
    """Its pages are taken by one that is as urgent."""
    sched = scheduler(max_num_batched_tokens=8, max_num_seqs=3, policy="priority")
    as_urgent, late, urgent = request(0, 20), request(1, 20, max_tokens=1, priority=1), request(2, 40)
    add_all(sched, as_urgent, late)
    while late.num_computed_tokens == 0:
        run_pass(sched)
    sched.add(urgent)
    run_pass(sched)
    assert late.num_computed_tokens > 8 and urgent.row is None and sched.counts.num_preemptions == 0


def test_nobody_gives_way_whose_last_token_is_under_way():
    sched, one, urgent = scheduler(max_num_seqs=1, policy="priority"), request(0, max_tokens=1, priority=1), request(1)
    sched.add(one)
    batch = sched.schedule()
    sched.add(urgent)
    assert sched.schedule() is None and sched.counts.num_preemptions == 0
    sched.update(batch, [9])
    run_pass(sched)
    assert (one.finish_reason, urgent.output_token_ids) == ("length", [9])


def test_one_is_let_in_with_pages_left_for_those_that_grow():
    """Of 21 pages each takes five; a fourth one would leave one for all of them."""
    sched = scheduler(num_pages=22)
    add_all(sched, *(request(id) for id in range(4)))
    run_pass(sched)
    assert sched.num_running == 3 and sched.counts.waits == {Wait.PAGES: 1}


def test_an_urgent_request_gets_the_pages_that_others_would_grow_into():
    """It needs nine, of which five are free; one that gives way has five more."""
    sched = scheduler(num_pages=21, policy="priority")
    others = [request(id, priority=1) for id in range(3)]
    add_all(sched, *others)
    run_pass(sched)
    assert (sched.num_running, sched.num_free_pages) == (3, 5)
    sched.add(urgent := request(3, 20))
    run_pass(sched)
    assert urgent.output_token_ids == [9] and sched.counts.num_preemptions == 1


SHARED = list(range(16))


def shared(id, priority):
    """A request that begins with four pages of others, and needs a page of its own."""
    return Request(id, [*SHARED, 90 + id], SamplingParams(max_tokens=4, priority=priority), seed=id)


def test_pages_that_those_who_give_way_share_are_free_once_all_have():
    sched = scheduler(num_pages=8, policy="priority", prefix_caching=True)
    others = [shared(id, priority=1) for id in range(2)]
    for one in others:
        sched.add(one)
        run_pass(sched)
    assert others[1].num_cached_tokens == 16
    sched.add(urgent := request(2, 20, max_tokens=4))
    run_pass(sched)
    assert urgent.output_token_ids == [9] and [one.num_preemptions for one in others] == [1, 1]


def test_nobody_gives_way_for_pages_that_an_urgent_request_finds():
    """It shares all but one with one that runs; the less computed ones have three each."""
    sched, first = scheduler(num_pages=12, policy="priority", prefix_caching=True), shared(0, priority=1)
    others = [request(id, 9, max_tokens=4, priority=1) for id in (1, 2)]
    for one in (first, *others):
        one.prompt_token_ids[0] = one.id
        sched.add(one)
    run_pass(sched)
    assert sched.num_running == 3 and sched.num_free_pages == 0
    sched.add(urgent := shared(3, priority=0))
    run_pass(sched)
    assert urgent.output_token_ids == [9] and urgent.num_cached_tokens == 16
    assert [one.num_preemptions for one in (first, *others)] == [0, 0, 1]


def test_nobody_gives_way_twice_without_a_token_between():
    """Urgent requests come one after another while one that has given way is computed again, chunk by chunk."""
    sched, one = scheduler(max_num_seqs=1, max_num_batched_tokens=4, policy="priority"), request(0, 9, priority=1)
    urgent = [request(id, 3, max_tokens=1) for id in (1, 2)]
    sched.add(one)
    for _ in range(3):
        run_pass(sched)
    sched.add(urgent[0])
    run_pass(sched)
    assert urgent[0].finish_reason == "length" and one.row is None and one.output_token_ids == [9]
    run_pass(sched)
    sched.add(urgent[1])
    while one.output_token_ids == [9]:
        assert one.num_preemptions == 1 and urgent[1].row is None
        run_pass(sched)
    run_pass(sched)
    assert urgent[1].finish_reason == "length" and one.num_preemptions == 2


def test_an_urgent_request_enters_the_pass_that_is_announced():
    sched, others = scheduler(max_num_seqs=1, policy="priority"), [request(0, priority=1)]
    add_all(sched, *others)
    first, announced = sched.schedule(), sched.schedule()
    urgent = request(1)
    sched.add(urgent)
    sched.update(first, [9])
    assert sched.revise(announced) is None
    (row,) = sched.schedule().rows
    assert row.tokens == tuple(urgent.prompt_token_ids)


def test_equals_and_the_policy_fcfs_take_nobodys_row():
    for policy, priority in (("priority", 0), ("fcfs", -1)):
        sched = scheduler(max_num_seqs=1, policy=policy)
        sched.add(request(0))
        run_pass(sched)
        sched.add(request(1, priority=priority))
        run_pass(sched)
        assert sched.counts.num_preemptions == 0 and sched.counts.waits == {Wait.ROWS: 1}


def test_the_line_is_served_by_priority_then_by_arrival():
    sched, order = scheduler(max_num_seqs=1, policy="priority"), []
    add_all(sched, *(request(id, max_tokens=1, priority=n) for id, n in enumerate([3, 0, 3, -2, 0])))
    while (batch := sched.schedule()) is not None:
        order += [one.id for one in sched.update(batch, [9] * batch.num_sampled)]
    assert order == [3, 1, 4, 0, 2]


def test_where_old_tokens_are_dropped_a_row_gets_all_its_pages():
    """To compute a sequence of any length again would have no bound."""
    retention = SinksAndWindow(num_sinks=2, window_tokens=12, page_size=4)
    sched = scheduler(num_pages=9, max_model_len=1000, retention=retention)
    add_all(sched, *(request(id, max_tokens=200) for id in range(3)))
    for _ in range(100):
        run_pass(sched)
    assert sched.num_running == 2 and sched.counts.num_preemptions == 0


def test_nobody_starves_beside_a_stream_of_arrivals():
    """One that often gives way is served before those that came later."""
    sched, long = scheduler(num_pages=16), request(0, 2, max_tokens=55)
    simulation = Simulation(sched)
    sched.add(long)
    for id in range(1, 200):
        sched.add(request(id, 2 + id % 9, max_tokens=25, ignore_eos=True))
        simulation.run_pass()
        if long.finish_reason is not None:
            break
    assert long.finish_reason is not None


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_what_is_kept_does_not_grow_with_the_requests(policy):
    host, rng = HostPages(30), random.Random(0)
    sched = scheduler(num_pages=40, policy=policy, prefix_caching=True, host_pages=host)
    for id in range(3000):
        prompt = [rng.randrange(100) for _ in range(rng.randint(1, 12))]
        one = Request(id, prompt, SamplingParams(max_tokens=rng.randint(1, 3), priority=rng.randint(0, 2)))
        sched.add(one)
        if rng.random() < 0.6:
            sched.finish(one, FinishReason.ABORT)
        else:
            batch = sched.schedule()
            sched.update(batch, [9] * batch.num_sampled)
    assert len(sched._admission.line._heap) <= 2 * sched.num_waiting + 16 and sched.num_waiting < 50
    assert len(sched.cache._blocks) == len(sched.cache._by_page) < 40
    assert len(host._kept) == 30 and not host._moves and host.counts.num_out > 100
    sched.check_integrity()
