"""Blocks that leave the device for host memory and come back; test_simulation.py plays whole workloads on them."""

import pytest
from penstock.scheduler.batching.host_pages import Block, HostPages, Move
from penstock.scheduler.batching.pages import PagePool
from penstock.scheduler.batching.prefix_cache import PrefixCache
from penstock.scheduler.batching.request import FinishReason, Request, SamplingParams
from penstock.scheduler.batching.scheduler import Scheduler


def request(id=0, num_prompt=9, max_tokens=1):
    """A prompt that begins as no other does."""
    return Request(id, [id] * num_prompt, SamplingParams(max_tokens=max_tokens))


def scheduler(host_pages, **changes):
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 20, "page_size": 4, "num_pages": 6}
    return Scheduler(**(settings | changes), prefix_caching=True, host_pages=host_pages)


def run(sched, one):
    """Runs a request to its end. Returns the moves of its passes."""
    sched.add(one)
    moves = []
    while sched.has_unfinished:
        batch = sched.schedule()
        moves += batch.moves
        sched.update(batch, [9] * batch.num_sampled)
        sched.check_integrity()
    return moves


def test_what_the_device_forgets_moves_out_and_comes_back():
    host = HostPages(4)
    sched = scheduler(host)  # five pages: three a request
    sched.add(one := request(1))
    batch = sched.schedule()
    first, second, _ = one.pages
    sched.update(batch, [9])
    assert run(sched, request(2)) == []
    assert run(sched, request(3)) == [Move(second, 0, is_out=True), Move(first, 1, is_out=True)]
    moves = run(sched, one := request(1))
    assert [(move.host_page, move.is_out) for move in moves] == [(2, True), (1, False), (0, False), (3, True)]
    assert one.num_cached_tokens == 8 and (host.counts.num_out, host.counts.num_in) == (4, 2)


def test_a_block_that_came_back_does_not_move_out_again():
    host = HostPages(8)
    sched = scheduler(host, num_pages=4, max_model_len=12)
    ids = [1, 2, 1, 2, 1, 2]
    for id in ids:
        run(sched, request(id))
    assert (host.counts.num_out, host.counts.num_in) == (4, 8)


@pytest.mark.parametrize("num_host_pages", [0, 1, 2])
def test_with_few_pages_the_least_recently_used_goes_the_end_first(num_host_pages):
    cache = PrefixCache(PagePool(4), page_size=4, host=HostPages(num_host_pages))
    one = request(1)
    one.pages = cache.allocate(3)
    cache.enter(one, 8)
    cache.release(one.pages)
    held = cache.allocate(3)
    assert [block.page for block in cache.find(one)] == [None] * num_host_pages  # the beginning
    assert cache.host.counts.num_not_moved == (0 if num_host_pages else 2)
    cache.check_integrity(held)


def blocks_of(num: int) -> list[Block]:
    return [Block(number, page=number + 1, key=(None, (number,))) for number in range(num)]


def test_in_host_memory_too_what_was_used_last_stays():
    """A block that loses its page a second time, having come back, counts as used then."""
    host, (first, second, third) = HostPages(2), blocks_of(3)
    for block in (first, second, first, third):
        host.keep(block)
    assert [host.find(block.key) is not None for block in (first, second, third)] == [True, False, True]


def test_of_what_came_back_together_the_beginning_stays_longest():
    host, (beginning, end, other) = HostPages(2), blocks_of(3)
    for block in (end, beginning):
        host.keep(block)
    host.bring([beginning, end], host.hold([beginning, end]), [7, 8])
    host.keep(other)
    assert [host.find(block.key) is not None for block in (beginning, end, other)] == [True, False, True]


def test_what_makes_room_for_a_block_does_not_take_its_place_in_host_memory():
    """The only page there is held until its block is brought: what gives way on the device is forgotten."""
    cache = PrefixCache(PagePool(2), page_size=4, host=HostPages(1))
    first, second = request(1, 5), request(2, 5)
    for one in (first, second):
        one.pages = cache.allocate(1)
        cache.enter(one, 4)
        cache.release(one.pages)
    pages = cache.share(cache.find(first))
    assert cache.host.take_moves() == (Move(pages[0], 0, is_out=True), Move(pages[0], 0, is_out=False))
    assert cache.host.counts.num_not_moved == 1 and cache.find(second) == []
    cache.check_integrity(pages)


def test_only_what_pays_comes_back_and_what_is_computed_again_keeps_its_number():
    asked = []
    host = HostPages(9, pays=lambda *numbers: asked.append(numbers))
    sched = scheduler(host, num_pages=4, max_model_len=12)
    run(sched, request(1))
    run(sched, request(2))
    again = request(1)
    assert all(move.is_out for move in run(sched, again)) and again.num_cached_tokens == 0
    assert set(asked) == {(8, 1)}  # tokens, beside one of each row
    run(sched, request(2))
    assert host.counts.num_out == 4 and host.counts.num_in == 0


def test_moving_is_weighed_beside_the_rows_that_run():
    asked = []
    sched = scheduler(HostPages(9, pays=lambda *numbers: asked.append(numbers)), num_pages=5)
    for id in (1, 2):
        run(sched, request(id))
    sched.add(request(3, num_prompt=2, max_tokens=9))
    sched.update(sched.schedule(), [9])
    sched.add(request(1))
    sched.schedule()
    assert set(asked) == {(8, 2)}


def test_moves_of_a_pass_that_is_withdrawn_go_with_the_next_one():
    sched = scheduler(HostPages(9), num_pages=5, max_num_seqs=1)
    run(sched, request(1))
    sched.add(request(2, max_tokens=2))
    first = sched.schedule()
    announced = sched.schedule()
    sched.update(first, [9])
    sched.add(later := request(3, num_prompt=10))
    sched.withdraw(announced)
    batch = sched.schedule()
    assert batch.moves == announced.moves and sched.num_waiting == 1
    sched.update(batch, [9])
    assert (batch := sched.schedule()).moves
    sched.finish(later, FinishReason.ABORT)  # its pages are free, and what was decided stays decided
    sched.withdraw(batch)
    assert run(sched, request(4))[: len(batch.moves)] == list(batch.moves)


def test_what_failed_and_all_after_an_error_is_found_in_no_tier():
    for forget in (Scheduler.abort, lambda sched: sched.cache.clear(), fail_again):
        sched = scheduler(HostPages(9), num_pages=4, max_model_len=12)
        run(sched, request(1))
        run(sched, request(2))
        forget(sched)
        again = request(1)
        run(sched, again)
        assert again.num_cached_tokens == 0


def fail_again(sched):
    """Lets the first request, which comes back from host memory, have no token."""
    sched.add(one := request(1))
    batch = sched.schedule()
    sched.update(batch, [-1])
    assert one.num_cached_tokens == 8 and one.finish_reason == "error"
