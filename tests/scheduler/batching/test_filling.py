"""The filling of passes: the costs against the time model, the rule against brute force over fixed budgets."""

from dataclasses import replace

import pytest
from penstock.scheduler.batching.batch import Batch, RowKind
from penstock.scheduler.batching.filling import Budget, Filling, Queue
from penstock.scheduler.batching.request import FinishReason, Request, SamplingParams
from penstock.scheduler.batching.scheduler import Scheduler
from penstock.scheduler.cost.pass_work import KV_SHARE, SHARED_KV_SHARE, PassShape, PassWork, StepWork
from penstock.scheduler.cost.time_model import PROFILES, Rates, free_tokens, pass_s, steps_s

H200 = Rates(**PROFILES["h200"] | {"link_gb_s": 55.0, "pass_latency_s": 0.0}, source="assumed")
STEPS = (  # about those of 8 billion weights
    (StepWork("linear", weight_bytes=15 * 10**9, token_flops=16 * 10**9), 1),
    (StepWork("attention", kv_token_bytes=131072, attention_flops=524288), 1),
)
SCORING = StepWork("score_prompts", scored_flops=4 * 10**9)
WORK = PassWork(10 * 10**9, 0, (*STEPS, (SCORING, 1)))


def scheduler_of(work: PassWork, most_tokens: int = 8192, max_num_seqs: int = 256, num_pages: int = 60_000):
    return Scheduler(max_num_seqs, most_tokens, 4096, 16, num_pages, filling=Filling.of(work, H200))


def add(scheduler: Scheduler, num: int, num_prompt: int, num_outputs: int, **asked) -> list[Request]:
    params = SamplingParams(max_tokens=num_outputs, ignore_eos=True, **asked)
    requests = [Request(id, [1] * num_prompt, params) for id in range(num)]
    for request in requests:
        scheduler.add(request)
    return requests


def passes(scheduler: Scheduler, most: int = 10**6) -> list[Batch]:
    found = []
    while scheduler.has_unfinished and len(found) < most:
        found.append(scheduler.schedule())
        scheduler.update(found[-1], [9] * found[-1].num_sampled)
    return found


def seconds_of(work: PassWork, batch: Batch) -> float:
    return pass_s(work.streamed_bytes, steps_s(work.steps, batch.shape, H200), 0.0, H200)


def test_where_nothing_streams_passes_are_filled_as_they_can_be():
    resident = replace(WORK, streamed_bytes=0)
    assert Filling.of(resident, H200) is None
    scheduler = scheduler_of(resident, most_tokens=1000)
    add(scheduler, 50, 300, 4)
    assert [batch.num_tokens for batch in passes(scheduler, 3)] == [1000] * 3
    assert scheduler.counts.num_free_tokens == 0


@pytest.mark.parametrize("scored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_rows, num_cached", [(0, 0), (1, 100), (64, 64 * 500), (1000, 640_000)])
def test_costs_are_those_of_the_time_model(num_rows, num_cached, scored):
    """Compares passes of rows with chunks beside them, a share of which is scored, near T* and past it."""
    filling, seen = Filling.of(WORK, H200), num_rows + num_cached
    for chunks in ([(0, 4000)], [(0, 512)] * 9, [(2000, 3000)], [(0, 5000), (3000, 2000)]):
        num_tokens = sum(length for _, length in chunks)
        pairs = sum(length * (2 * start + length + 1) // 2 for start, length in chunks)
        copied = sum(start + length for start, length in chunks if start)
        cached = num_cached + sum(start for start, _ in chunks)
        num_scored = [int(scored * length) for _, length in chunks]
        sums = seen + pairs, seen, copied, sum(num_scored)
        shape = PassShape(num_rows + num_tokens, num_rows + len(chunks), cached, *sums)
        chunks_s = sum(filling.chunk_s(*chunk, of_it) for chunk, of_it in zip(chunks, num_scored))
        found = filling.seconds(num_rows, num_cached) + chunks_s
        assert found == pytest.approx(steps_s(WORK.steps, shape, H200), rel=0.05)


@pytest.mark.parametrize("asked", [{}, {"prompt_logprobs": 1}])
def test_beside_many_rows_a_pass_ends_where_the_link_does(asked):
    """Of a few prompts that are still to come, each would delay all rows for longer than it gains; one whose tokens are
    scored for longer than another."""
    scheduler = scheduler_of(WORK, max_num_seqs=1024)
    add(scheduler, 1000, 64, 3000)
    passes(scheduler, 40)
    before = scheduler.counts.num_free_tokens, scheduler.counts.num_free_tokens_used
    assert scheduler.num_running == 1000
    add(scheduler, 24, 1024, 5, **asked)
    (batch,) = passes(scheduler, 1)
    assert (batch.shape.num_scored > 2000) == bool(asked)
    assert 1000 + 1024 < batch.num_tokens < 8192 and scheduler.num_waiting > 0
    assert seconds_of(WORK, batch) == pytest.approx(WORK.streamed_bytes / 55e9, rel=0.02)
    counts = scheduler.counts
    num_free, num_used = counts.num_free_tokens - before[0], counts.num_free_tokens_used - before[1]
    assert num_free == num_used == batch.num_tokens and "that the link hid" in counts.describe()[-1]


def test_what_others_of_a_pass_compute_takes_no_room_in_it():
    """Of prompts that begin alike all but the first count with their own tokens, in the pass and in the queue: so their
    passes end where the link does, as those of short prompts."""
    scheduler = Scheduler(256, 8192, 4096, 16, 60_000, prefix_caching=True, filling=Filling.of(WORK, H200))
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    for id in range(300):
        scheduler.add(Request(id, [*range(2000), *[5000 + id] * 64], params))
    first, second = passes(scheduler, 2)
    num_shared, num_free = len(first.rows) - 1, free_tokens(WORK, H200)
    assert num_shared > 30 and first.num_tokens == 2064 + 64 * num_shared < 1.05 * num_free
    assert len(first.rows) + 30 < second.num_tokens < 1.05 * num_free
    assert scheduler.counts.num_hit_tokens == 2000 * (scheduler.num_running - 1)


def test_what_rows_share_leaves_tokens_free_for_prompts():
    """Rows behind the same 2,000 tokens read these in less time than rows of as many tokens of their own."""

    def num_free(prefix: int, own: int) -> int:
        scheduler = Scheduler(256, 8192, 4096, 16, 60_000, prefix_caching=True, filling=Filling.of(WORK, H200))
        for id in range(200):
            prompt = [*range(prefix), *[5000 + id] * own]
            scheduler.add(Request(id, prompt, SamplingParams(max_tokens=2000, ignore_eos=True)))
        *_, last = passes(scheduler, 100)
        assert last.shape.is_decode and last.num_tokens == 200
        assert last.shape.num_shared == 199 * prefix
        return scheduler.composer.budget.free_tokens[0]

    saved_s = 199 * 2000 * WORK.kv_token_bytes * (1 / KV_SHARE - 1 / SHARED_KV_SHARE) / (H200.memory_gb_s * 1e9)
    more = saved_s / Filling.of(WORK, H200).token_s
    assert num_free(2000, 64) - num_free(0, 2064) == pytest.approx(more, rel=0.1) and more > 300


def test_a_single_prompt_takes_no_second_pass():
    """Its few tokens past T* cost less than another pass would."""
    num_free = free_tokens(WORK, H200)
    scheduler = scheduler_of(WORK, most_tokens=num_free + 900)
    scheduler.add(Request(0, [1] * 4000, SamplingParams(max_tokens=2)))
    assert passes(scheduler, 1)[0].num_tokens == 4000
    tight = scheduler_of(replace(WORK, streamed_bytes=4 * 10**9))
    tight.add(Request(0, [1] * 4000, SamplingParams(max_tokens=2)))
    (batch,) = passes(tight, 1)
    assert batch.num_tokens == 4000 > free_tokens(replace(WORK, streamed_bytes=4 * 10**9), H200)


@pytest.mark.parametrize("num_free", [-10, 0, 5, 60, 100])
def test_a_prompt_is_spread_over_a_few_passes_at_most(num_free):
    """Beside 200 rows that leave few tokens free, or none: up to 256 the pass would be padded."""
    scheduler = scheduler_of(WORK)
    add(scheduler, 200, 16, 3000)
    passes(scheduler, 10)
    filling, num_cached = scheduler.composer.filling, sum(r.num_tokens for r in scheduler._seats.running.values())
    link_s = filling.seconds(200, num_cached) + num_free * filling.token_s
    scheduler.composer.filling = replace(filling, link_s=link_s)
    scheduler.add(Request(1000, [1] * 800, SamplingParams(max_tokens=2)))
    found = passes(scheduler, 9)
    chunks = [batch.num_tokens - 200 for batch in found if batch.num_tokens > 201]
    assert sum(chunks) == 800 and (len(chunks) == 1 if num_free < 56 else 1 < len(chunks) <= 8)


def makespan_s(work: PassWork, most_tokens: int, is_filled: bool, jobs: tuple[int, int, int]) -> float:
    """Seconds of a whole job, by the time model."""
    scheduler = scheduler_of(work, most_tokens, max_num_seqs=64)
    scheduler.composer.filling = scheduler.composer.filling if is_filled else None
    add(scheduler, *jobs)
    return sum(seconds_of(work, batch) for batch in passes(scheduler))


@pytest.mark.parametrize("streamed_gb", [0.8, 3, 10])
@pytest.mark.parametrize("jobs", [(100, 400, 12), (100, 128, 40)], ids=str)
def test_no_fixed_budget_is_faster(streamed_gb, jobs):
    """Whole jobs, with a link that hides 600 to 8,000 tokens: the rule against the best of all numbers of tokens."""
    work = replace(WORK, streamed_bytes=int(streamed_gb * 10**9))
    best, *_, worst = sorted(makespan_s(work, n, False, jobs) for n in (512, 1024, 2048, 8192))
    assert makespan_s(work, 8192, True, jobs) <= 1.05 * best < worst


def test_prompts_come_before_what_is_computed_again():
    """Both are chunks of requests that have their rows; the one that had given way came first."""
    scheduler = scheduler_of(replace(WORK, streamed_bytes=10**9), most_tokens=512, num_pages=400)
    first, second = add(scheduler, 2, 1500, 4)
    first.num_preemptions = 1
    passes(scheduler, 1)  # admits the first, and computes a part of it
    scheduler._admission.admit_next()
    (batch,) = passes(scheduler, 1)
    assert batch.rows[0].index == second.row and scheduler.num_running == 2


def test_a_budget_lets_in_a_token_wherever_it_has_room():
    """Whatever is spare, a chunk that may enter gets on."""
    filling, queue = Filling.of(WORK, H200), Queue(1, 0.0)
    for spare in (-1.0, 0.0, 1.0, 1.5, 700.0):
        budget = Budget(100, (), replace(filling, link_s=filling.seconds(0, 0) + spare * filling.token_s))
        while budget.has_room(queue) and budget.num_rows < 200:
            left, request = budget.num_left, Request(0, [1] * 9, SamplingParams(), num_computed_tokens=5)
            assert 1 <= budget.take(request, 3, queue) <= 3 and budget.num_left < left
        assert budget.num_left >= 0


@pytest.mark.parametrize(("prompt_tokens", "most_before"), [(0.0, 99), (300.0, 299), (9000.0, 999)])
def test_behind_others_there_is_room_as_long_as_these_leave_some(prompt_tokens, most_before):
    """Of what the link hides, of what is due in a pass, and of all its tokens."""
    filling, queue = Filling.of(WORK, H200), Queue(0, prompt_tokens)
    budget = Budget(1000, (), replace(filling, link_s=filling.seconds(0, 0) + 100.5 * filling.token_s))
    assert budget.has_room(queue, most_before) and not budget.has_room(queue, most_before + 1)


def test_rows_of_one_token_that_are_chunks_count_as_chunks():
    scheduler = scheduler_of(WORK)
    add(scheduler, 3, 1, 2)
    (batch,) = passes(scheduler, 1)
    assert [row.kind for row in batch.rows] == [RowKind.ONE_TOKEN] * 3
    assert scheduler.counts.num_free_tokens_used == 3


def counted(scheduler: Scheduler) -> tuple[int, int]:
    return scheduler.counts.num_free_tokens, scheduler.counts.num_free_tokens_used


def test_a_chunk_that_has_ended_gives_its_free_tokens_to_another():
    """One that enters the announced pass in its place, in which there is no room for both. A pass that never runs has
    no tokens."""
    scheduler = scheduler_of(replace(WORK, streamed_bytes=7 * 10**9), max_num_seqs=2)
    (first,) = add(scheduler, 1, 100, 9)
    before = scheduler.schedule()
    gone, late = add(scheduler, 2, 4000, 9)
    announced, free = scheduler.schedule(), counted(scheduler)
    scheduler.finish(gone, FinishReason.ABORT)
    scheduler.update(before, [9])
    revised = scheduler.revise(announced)
    assert late.row == 1 and announced.num_tokens == revised.num_tokens == 4001
    assert counted(scheduler) == free and free[1] == 100 + 4001
    last = scheduler.schedule()
    for one in (first, late):
        scheduler.finish(one, FinishReason.ABORT)
    scheduler.update(revised, [9, 9])
    assert scheduler.revise(last) is None and counted(scheduler) == free


def test_a_row_that_has_ended_uses_no_free_token():
    scheduler = scheduler_of(WORK, max_num_seqs=2)
    first, _, late = add(scheduler, 3, 100, 9)
    before, announced = scheduler.schedule(), scheduler.schedule()
    scheduler.finish(first, FinishReason.ABORT)
    scheduler.update(before, [9, 9])
    assert scheduler.revise(announced).num_tokens == 101 and late.row == 0
    assert counted(scheduler)[1] == 200 + 101


def test_tokens_are_free_whether_or_not_there_is_anybody_to_use_them():
    scheduler = scheduler_of(WORK)
    add(scheduler, 1, 100, 1)
    (batch,) = passes(scheduler, 1)
    most = PassShape(scheduler.counts.num_free_tokens, 1, 0, num_pairs=0, num_behind=0)
    assert scheduler.counts.num_free_tokens_used == batch.num_tokens == 100
    assert steps_s(WORK.steps, most, H200) == pytest.approx(WORK.streamed_bytes / 55e9, rel=0.02)
