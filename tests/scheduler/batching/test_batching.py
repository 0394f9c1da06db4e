"""The scheduler's decisions one by one; test_simulation.py plays whole workloads."""

import pytest
from penstock.scheduler.batching.counts import Wait
from penstock.scheduler.batching.request import ON_DEVICE, FinishReason, Request, RequestState, SamplingParams
from penstock.scheduler.batching.retention import SinksAndWindow
from penstock.scheduler.batching.scheduler import Scheduler

EOS, STOP = 2, 5
SETTINGS = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "max_model_len": 32,
    "page_size": 4,
    "num_pages": 33,
    "eos_token_ids": [EOS],
}


def scheduler(**changes):
    return Scheduler(**(SETTINGS | changes))


def request(id=0, num_prompt=3, max_tokens=4, **params):
    prompt = list(range(100, 100 + num_prompt))
    return Request(id, prompt, SamplingParams(max_tokens=max_tokens, **params))


def shape(batch):
    """A tuple (row, start, tokens, samples) for each row."""
    return [(row.index, row.start, len(row.tokens), row.samples) for row in batch.rows]


def run_pass(sched, token=9):
    batch = sched.schedule()
    sched.update(batch, [token] * batch.num_sampled)
    sched.check_integrity()
    return shape(batch)


def test_decodes_come_before_chunks_and_chunks_before_admissions():
    sched = scheduler()
    for id, num_prompt in enumerate([3, 12, 2]):
        sched.add(request(id, num_prompt))
    assert run_pass(sched) == [(0, 0, 3, True), (1, 0, 5, False)]
    assert (sched.num_running, sched.num_waiting, sched.counts.waits) == (2, 1, {Wait.TOKENS: 1})
    assert run_pass(sched) == [(0, 3, 1, True), (1, 5, 7, True)]
    assert run_pass(sched) == [(0, 4, 1, True), (1, 12, 1, True), (2, 0, 2, True)]


def test_rows_carry_tokens_pages_and_sampling_state():
    sched = scheduler(max_num_batched_tokens=5)
    sched.add(request(num_prompt=7, seed=None))
    first = sched.schedule()
    (row,) = first.rows
    assert row.tokens == (100, 101, 102, 103, 104) and row.pages == (1, 2)
    assert row.sampling.temperature == 1.0
    assert sched.update(first, []) == []
    (row,) = (last := sched.schedule()).rows
    assert row.tokens == (105, 106) and row.pages == (1, 2) and row.sampling is None
    sched.update(last, [41])
    (row,) = (decode := sched.schedule()).rows
    assert row.tokens == (41,) and row.pages == (1, 2)
    sched.update(decode, [42])
    (row,) = sched.schedule().rows
    assert row.tokens == (42,) and row.start == 8 and row.pages == (1, 2, 3)


def test_nothing_to_do():
    assert scheduler().schedule() is None and not scheduler().has_unfinished


@pytest.mark.parametrize(
    "changes, token, reason, stop_reason, num_output",
    [
        ({}, EOS, "stop", None, 1),
        ({"stop_token_ids": [EOS]}, EOS, "stop", None, 1),
        ({"ignore_eos": True}, EOS, "length", None, 4),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, EOS, "stop", EOS, 1),
        ({"stop_token_ids": [STOP]}, STOP, "stop", STOP, 1),
        ({"stop_token_ids": [STOP]}, 9, "length", None, 4),
        ({"max_tokens": 1}, EOS, "stop", None, 1),
        ({"max_tokens": 1}, 9, "length", None, 1),
        ({"max_tokens": None}, 9, "length", None, 29),
        ({"max_tokens": 1000}, 9, "length", None, 29),
    ],
)
def test_how_a_request_ends(changes, token, reason, stop_reason, num_output):
    sched, req = scheduler(), request(**changes)
    sched.add(req)
    while sched.has_unfinished:
        run_pass(sched, token)
    assert (req.finish_reason, req.stop_reason, req.output_token_ids) == (
        reason,
        stop_reason,
        [token] * num_output,
    )
    assert req.state is RequestState.FINISHED and req.row is None and req.pages == []
    assert sched.pool.num_free == sched.pool.num_usable


def test_update_returns_finished_requests_too_in_batch_order():
    sched, requests = scheduler(), [request(id, 2) for id in range(3)]
    for req in requests:
        sched.add(req)
    batch = sched.schedule()
    assert sched.update(batch, [9, EOS, 9]) == requests
    assert [req.finish_reason for req in requests] == [None, "stop", None]
    assert run_pass(sched) == [(0, 2, 1, True), (2, 2, 1, True)]


def test_a_freed_row_and_its_pages_are_used_in_the_next_pass():
    sched = scheduler(max_num_seqs=1, num_pages=3)
    for id in range(2):
        sched.add(request(id, 5, max_tokens=1))
    first = sched.schedule()
    sched.update(first, [9])
    second = sched.schedule()
    assert shape(second) == shape(first)
    assert sorted(second.rows[0].pages) == sorted(first.rows[0].pages) and second.rows[0].sampling is not None


def test_the_last_sampled_token_needs_no_page():
    sched = scheduler(num_pages=2)
    sched.add(request(num_prompt=3, max_tokens=2))  # 4 computed tokens: one page of 4
    assert run_pass(sched) == [(0, 0, 3, True)]
    assert run_pass(sched) == [(0, 3, 1, True)]
    assert not sched.has_unfinished


def test_waiting_requests_are_served_in_the_order_in_which_they_came():
    sched, order = scheduler(max_num_seqs=1), []
    for id, num_prompt in ((3, 9), (0, 2), (2, 5)):
        sched.add(request(id, num_prompt, max_tokens=1))
    while (batch := sched.schedule()) is not None:
        order += [request.id for request in sched.update(batch, [9] * batch.num_sampled)]
    assert order == [3, 0, 2]


def test_the_head_of_the_line_is_not_overtaken():
    sched = scheduler(num_pages=5, max_num_batched_tokens=16)
    for id, num_prompt in enumerate([9, 9, 1]):  # 3, 3 and 1 pages, of 4
        sched.add(request(id, num_prompt))
    assert run_pass(sched) == [(0, 0, 9, True)]
    assert (sched.num_running, sched.num_waiting) == (1, 2)


@pytest.mark.parametrize(
    "num_prompt, changes, message",
    [
        (0, {}, "prompt 7: is empty"),
        (32, {}, "prompt 7: has 32 tokens, and at most 31 fit .*max_model_len is 32"),
        (90, {}, "prompt 7: has 90 tokens, and at most 31 fit"),
        (20, {"num_pages": 5}, "prompt 7: 24 tokens .* need 6 pages of 4 tokens, and there are 4"),
    ],
)
def test_what_can_never_run_is_refused(num_prompt, changes, message):
    sched = scheduler(**changes)
    with pytest.raises(ValueError, match=message):
        sched.add(request(7, num_prompt))
    assert not sched.has_unfinished


def test_the_longest_prompt_gets_one_token():
    sched, req = scheduler(), request(num_prompt=31)
    sched.add(req)
    while sched.has_unfinished:
        run_pass(sched)
    assert len(req.output_token_ids) == 1 and req.finish_reason == "length"


def test_finish_of_waiting_running_and_finished_requests():
    sched, requests = scheduler(max_num_seqs=2), [request(id) for id in range(3)]
    for req in requests:
        sched.add(req)
    run_pass(sched)
    sched.finish(requests[2], FinishReason.ABORT)
    sched.finish(requests[0], FinishReason.STOP, "###")
    sched.check_integrity()
    assert (sched.num_running, sched.num_waiting) == (1, 0)
    assert requests[0].stop_reason == "###" and requests[2].finish_reason == "abort"
    while sched.has_unfinished:
        run_pass(sched)
    assert requests[1].finish_reason == "length"
    sched.finish(requests[1], FinishReason.STOP, "end")
    assert (requests[1].finish_reason, requests[1].stop_reason) == ("stop", "end")
    assert sched.pool.num_free == sched.pool.num_usable


class Compared(Request):
    """A request that counts how often one was compared with another."""

    num_comparisons = 0

    def __eq__(self, other):
        Compared.num_comparisons += 1
        return self is other

    __hash__ = Request.__hash__


def test_any_waiting_request_ends_without_a_search():
    sched = scheduler(max_num_seqs=1)
    requests = [Compared(id, [100, 101], SamplingParams(max_tokens=2)) for id in range(1000)]
    for req in requests:
        sched.add(req)
    run_pass(sched)
    Compared.num_comparisons = 0
    for req in [*requests[500:], *requests[499:1:-1]]:
        sched.finish(req, FinishReason.ABORT)
    assert Compared.num_comparisons < 1000 and sched.num_waiting == 1
    while sched.has_unfinished:
        run_pass(sched)
    assert requests[1].finish_reason == "length" and requests[1].output_token_ids == [9, 9]


@pytest.mark.parametrize("retention", [None, SinksAndWindow(num_sinks=2, window_tokens=8, page_size=4)])
def test_a_page_table_is_made_only_when_it_changes(retention):
    """Then it can be known by its identity; pages and positions of the tokens are those of the retention."""
    sched, req = scheduler(retention=retention), request(num_prompt=3, max_tokens=25)
    sched.add(req)
    tables = []
    while sched.has_unfinished:
        (row,) = (batch := sched.schedule()).rows
        tables.append(row.pages)
        assert row.pages == sched._retention.page_table(req.pages, row.start + len(row.tokens))
        sched.update(batch, [9])
    assert len(tables) == 25
    assert all(before is after for before, after in zip(tables, tables[1:]) if before == after)
    assert req.page_table == ()


def decoding_rows(sched):
    return [row for row, start, _, _ in run_pass(sched) if start]


def test_rows_of_a_pass_keep_their_places_when_others_end():
    """The last one moves to where one has ended, or a new one comes there."""
    sched, requests = scheduler(max_num_seqs=8, num_pages=99), [request(id, 1) for id in range(6)]
    for req in requests:
        req.params = SamplingParams(max_tokens=20)
        sched.add(req)
    run_pass(sched)
    assert decoding_rows(sched) == [0, 1, 2, 3, 4, 5]
    sched.finish(requests[1], FinishReason.ABORT)
    assert decoding_rows(sched) == [0, 5, 2, 3, 4]
    sched.finish(requests[4], FinishReason.ABORT)
    sched.finish(requests[0], FinishReason.ABORT)
    assert decoding_rows(sched) == [3, 5, 2]
    sched.add(request(6, 1, max_tokens=20))
    run_pass(sched)
    sched.finish(requests[5], FinishReason.ABORT)
    assert decoding_rows(sched) == [3, 0, 2]
    for req in (requests[2], requests[3]):
        sched.finish(req, FinishReason.ABORT)
    assert decoding_rows(sched) == [0]


def test_a_request_ended_during_the_pass_gets_nothing_from_it():
    sched, requests = scheduler(), [request(id, 2) for id in range(2)]
    for req in requests:
        sched.add(req)
    batch = sched.schedule()
    sched.finish(requests[0], FinishReason.ABORT)
    assert sched.update(batch, [8, 9]) == [None, requests[1]]
    assert requests[0].output_token_ids == [] and requests[1].output_token_ids == [9]
    sched.check_integrity()


def test_a_pass_is_scheduled_before_the_tokens_of_the_one_before_it_are_known():
    sched, req = scheduler(), request(num_prompt=3, max_tokens=3)
    sched.add(req)
    prompt, decode = sched.schedule(), sched.schedule()
    (row,) = decode.rows
    assert row.tokens == (ON_DEVICE,) and row.start == 3 and row.samples
    assert sched.update(prompt, [7]) == [req] and req.output_token_ids == [7]
    last = sched.schedule()
    assert last.rows[0].tokens == (ON_DEVICE,) and last.rows[0].start == 4
    assert sched.schedule() is None and sched.has_unfinished  # its third and last token is under way
    sched.update(decode, [8])
    sched.update(last, [9])
    assert (req.output_token_ids, req.finish_reason) == ([7, 8, 9], "length")
    assert not sched.has_unfinished


def test_a_token_that_ends_a_request_is_found_one_pass_late():
    sched, requests = scheduler(), [request(id, 2) for id in range(2)]
    for req in requests:
        sched.add(req)
    first, second = sched.schedule(), sched.schedule()
    sched.update(first, [EOS, 9])
    assert requests[0].finish_reason == "stop"
    assert sched.update(second, [8, 7]) == [None, requests[1]]
    assert requests[0].output_token_ids == [EOS] and requests[1].output_token_ids == [9, 7]
    sched.check_integrity()


def test_updates_come_in_the_order_of_the_passes():
    sched = scheduler()
    for id, num_prompt in enumerate([3, 12]):
        sched.add(request(id, num_prompt))
    first, second = sched.schedule(), sched.schedule()
    with pytest.raises(AssertionError, match="not the oldest batch"):
        sched.update(second, [9])
    sched.update(first, [9])
    with pytest.raises(AssertionError, match="1 tokens for 2 rows"):
        sched.update(second, [9])
    sched.update(second, [9, 9])
    with pytest.raises(AssertionError, match="not the oldest batch"):
        sched.update(second, [9, 9])


def test_abort_leaves_nothing_behind():
    sched, requests = scheduler(max_num_seqs=2), [request(id) for id in range(3)]
    for req in requests:
        sched.add(req)
    sched.schedule()
    sched.schedule()
    sched.abort()
    sched.check_integrity()
    assert not sched.has_unfinished and sched.schedule() is None
    assert all(req.finish_reason == "abort" for req in requests)
    sched.add(request(7))
    assert run_pass(sched) == [(0, 0, 3, True)]


def lose_a_page(sched):
    sched._seats.running[0].pages.pop()


def share_a_page(sched):
    sched._seats.running[1].pages[0] = sched._seats.running[0].pages[0]


def lose_a_row(sched):
    sched._seats.free_rows.pop()


def lose_a_request(sched):
    sched._seats.running.pop(0)


@pytest.mark.parametrize("harm", [lose_a_page, share_a_page, lose_a_row, lose_a_request])
def test_check_integrity_detects(harm):
    sched = scheduler()
    for id in range(2):
        sched.add(request(id))
    run_pass(sched)
    harm(sched)
    with pytest.raises(AssertionError):
        sched.check_integrity()


def test_no_token_to_be_had_ends_the_request_with_an_error():
    """Ends a request that keeps its tokens and gives back its row and pages; the other request goes on."""
    sched = scheduler()
    first, second = request(0), request(1)
    sched.add(first)
    sched.add(second)
    run_pass(sched, token=9)
    batch = sched.schedule()
    assert sched.update(batch, [-1, 11]) == [first, second]
    sched.check_integrity()
    assert (first.finish_reason, first.output_token_ids, first.row, first.pages) == ("error", [9], None, [])
    assert (second.state, second.output_token_ids) == (RequestState.RUNNING, [9, 11])
    assert run_pass(sched) == [(1, 4, 1, True)]


def test_a_refused_request_has_ended():
    sched = scheduler(num_pages=2)
    refused = request(num_prompt=3, max_tokens=20)
    with pytest.raises(ValueError, match="prompt 0: 23 tokens .* need 6 pages of 4 tokens, and there are 1"):
        sched.add(refused)
    assert refused.finish_reason is FinishReason.ERROR and not sched.has_unfinished


def test_a_pass_counts_once_as_it_runs_whatever_was_announced():
    """One that is withdrawn does not count, and one that others have entered counts with those who wait then."""
    sched = scheduler(max_num_seqs=2)
    for id in range(3):
        sched.add(request(id))
    first = sched.schedule()
    announced = sched.schedule()
    assert len(announced.rows) == 2 and sched.counts.waits.total() == 2 and sched.counts.num_waiting == 1
    sched.finish(sched.seated[0], FinishReason.ABORT)
    sched.update(first, [9, 9])
    entered = sched.revise(announced)
    assert [row.start for row in entered.rows] == [3, 0]
    assert (sched.counts.num_passes, sched.counts.waits.total(), sched.counts.num_waiting) == (2, 1, 0)
    last = sched.schedule()
    for seated in sched.seated:
        sched.finish(seated, FinishReason.ABORT)
    sched.update(entered, [9, 9])
    assert sched.revise(last) is None and sched.counts.num_passes == 2


@pytest.mark.parametrize(
    ("num_prompt", "priority", "is_made_anew"),
    [(6, 1, True), (7, 1, False), (7, 0, True)],  # the rest takes less than all the room; all of it; comes behind
)
def test_an_announced_pass_is_made_anew_if_one_could_enter_behind_the_rest_of_a_cut_chunk(
    num_prompt, priority, is_made_anew
):
    sched = scheduler(policy="priority")
    sched.add(request(0))
    before = sched.schedule()
    gone, late = request(1, num_prompt=5, priority=1), request(3, num_prompt=2, priority=priority)
    for one in (gone, request(2, num_prompt, priority=1)):
        sched.add(one)
    announced = sched.schedule()
    assert shape(announced) == [(0, 3, 1, True), (1, 0, 5, True), (2, 0, 2, False)]
    sched.add(late)
    sched.finish(gone, FinishReason.ABORT)
    sched.update(before, [9])
    revised = sched.revise(announced)
    sched.check_integrity()
    assert (revised is None) == is_made_anew and late.row is None
    if is_made_anew:
        assert sched.schedule().num_tokens == 8 and late.row == 1
    else:
        assert revised is announced
        sched.update(announced, [9, 9])
        assert shape(sched.schedule()) == [(0, 4, 1, True), (2, 2, 5, True), (1, 0, 2, True)]


def test_an_announced_pass_stays_as_it_is_where_a_row_ends_whose_token_the_rest_of_a_chunk_would_take():
    sched = scheduler()
    for id, num_prompt in enumerate([3, 15, 2]):
        sched.add(request(id, num_prompt))
    before, announced = sched.schedule(), sched.schedule()
    assert shape(announced) == [(0, 3, 1, True), (1, 5, 7, False)]
    sched.update(before, [EOS])
    assert sched.revise(announced) is announced
    assert sched.update(announced, [9]) == [None]
    assert run_pass(sched) == [(1, 12, 3, True), (0, 0, 2, True)]
