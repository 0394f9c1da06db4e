"""Whole workloads, played on a model of the KV cache that knows behind which tokens each entry was written, and of what
a sampler remembers of its rows. Passes are scheduled one by one, or before the tokens of those under way are known."""

import random
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.scheduler.batching.batch import Batch, History, RowKind
from penstock.scheduler.batching.filling import Filling
from penstock.scheduler.batching.host_pages import HostPages, Move
from penstock.scheduler.batching.message import RowMessages
from penstock.scheduler.batching.pages import RESERVED_PAGE, pages_for
from penstock.scheduler.batching.request import (
    ON_DEVICE,
    FinishReason,
    Request,
    RequestState,
    RowSampling,
    SamplingParams,
)
from penstock.scheduler.batching.scheduler import Scheduler
from penstock.scheduler.batching.seats import HEADROOM, STRETCH
from penstock.scheduler.cost.pass_work import PassWork, StepWork
from penstock.scheduler.cost.time_model import PROFILES, Rates

VOCAB, EOS, STOP, NAN = 50, 2, 5, 7
H200 = Rates(**PROFILES["h200"] | {"link_gb_s": 55.0}, source="assumed")


class Cache:
    """Pages that remember for each of their entries the sequence, its salt first, up to the token that was last written
    there; and those of host memory that were moved there."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.written: dict[tuple[int, int], tuple[str | int | None, ...]] = {}
        self.in_host: dict[int, list[tuple[str | int | None, ...]]] = {}

    def move(self, moves: Iterable[Move]) -> None:
        """Copies whole pages, one after another; what was moved out is written by others from now on."""
        for page, host_page, is_out in moves:
            entries = [(page, offset) for offset in range(self.page_size)]
            if is_out:
                self.in_host[host_page] = [self.written.pop(entry) for entry in entries]
            else:
                self.written |= zip(entries, self.in_host[host_page], strict=True)

    def entry(self, row, position):
        return row.pages[position // self.page_size], position % self.page_size

    def write(self, row, sequence: list[int], salt: str | None) -> None:
        """Writes a row's tokens of the sequence."""
        assert RESERVED_PAGE not in row.pages
        assert list(row.tokens) == sequence[row.start : row.start + len(row.tokens)]
        for position in range(row.start, row.start + len(row.tokens)):
            self.written[self.entry(row, position)] = salt, *sequence[: position + 1]

    def read(self, row, sequence: list[int], salt: str | None) -> None:
        """Reads all that attention would see, once all rows of the pass have written."""
        for position in range(row.start + len(row.tokens)):
            assert self.written[self.entry(row, position)] == (salt, *sequence[: position + 1])


class Sampler:
    """Remembers of a row what the sampler does: its seed, its last token, and for penalties which tokens came."""

    def __init__(self, sampling: RowSampling, history: History):
        self.sampling, self.last_token = sampling, 0
        self.seen, self.outputs = set(history.cached), Counter(history.outputs)

    def draw(self, sequence: list[int]) -> int:
        noted = (sorted(self.seen), sorted(self.outputs.items())) if self.sampling.has_penalty else ()
        token = next_token(sequence, noted, self.sampling.seed)
        self.last_token = max(token, 0)
        self.outputs[self.last_token] += 1
        return token


def next_token(tokens, noted, seed):
    """The token that model and sampler would give, a function of the sequence and what was noted of it; for odd seeds
    sometimes a negative number, which is no token."""
    token = random.Random(f"{tokens} {noted} {seed}").randrange(VOCAB)
    return -1 if token == NAN and seed % 2 else token


def expected_output(request, max_model_len):
    """The tokens and the end of the request when it runs alone: the oracle."""
    output, params = [], request.params
    while True:
        tokens = request.prompt_token_ids + output
        noted = (sorted(set(tokens)), sorted(Counter(output).items())) if params.presence_penalty else ()
        token = next_token(tokens, noted, request.seed)
        if token < 0:
            return output, "error", None
        output.append(token)
        if token == EOS and not params.ignore_eos:
            return output, "stop", None
        if token in params.stop_token_ids:
            return output, "stop", token
        full = len(request.prompt_token_ids) + len(output) == max_model_len
        if full or len(output) == params.max_tokens:
            return output, "length", None


def ends_with_what_comes(request: Request, max_model_len: int) -> bool:
    """Tells whether the request's last token is under way."""
    return request.num_tokens_ahead == request.most_tokens(max_model_len)


PREPARED = -1


class Simulation:
    """Drives a scheduler as the engine does: each batch goes through its packed message, and up to `lookahead` passes
    are under way when one more is scheduled. With PREPARED one is under way, and its tokens decide whether the next
    runs."""

    def __init__(self, scheduler: Scheduler, lookahead: int = 0):
        self.scheduler, self.lookahead = scheduler, abs(lookahead)
        self.must_wait, self.num_withdrawn, self.num_revised = lookahead == PREPARED, 0, 0
        self.under_way: deque[tuple[Batch, list[int]]] = deque()
        self.sides = RowMessages(), RowMessages()
        self.cache = Cache(scheduler.page_size)
        self.num_computed: dict[int, int] = {}  # by request id, since it got its row
        self.num_computed_in_all: Counter[int] = Counter()
        self.num_cached_in_all: Counter[int] = Counter()
        self.samplers: dict[int, Sampler] = {}  # by row
        self.sequences: dict[int, list[int]] = {}  # by request id: what was computed and sampled, seen or not
        self.gave_way: dict[int, list[int]] = {}  # by request id: how many tokens it had then
        self.scored: dict[int, list[int]] = {}  # by request id: the prompt's tokens whose log probabilities were given
        self.num_shared_in_pass = self.num_taken_back = 0  # tokens of rows, and requests
        self.cannot_send = lambda: False
        self._watch_preemptions()

    def _watch_preemptions(self):
        """Sees that nobody gives way twice without a token between, and counts who waits again without."""
        admission = self.scheduler._admission
        preempt, take_back = admission._preempt, admission.take_back

        def counted(request):
            self.num_taken_back += 1
            take_back(request)

        admission.take_back = counted

        def watched(request):
            had = self.gave_way.setdefault(request.id, [])
            assert not had or had[-1] < request.num_tokens_ahead
            had.append(request.num_tokens_ahead)
            preempt(request)

        admission._preempt = watched

    def run_pass(self, while_computing=lambda: None) -> None:
        batch = self.scheduler.schedule()
        if batch is not None:
            self.check(batch)
            if self.cannot_send():
                self.scheduler.withdraw(batch)
                self.scheduler.check_integrity()
                return
            running = dict(self.scheduler._seats.running)
            if self.must_wait and self.under_way:
                while_computing()
                self.update()
                self.sent(batch)
                self.run_revised(batch)
                self.scheduler.check_integrity()
                return
            self.submit(batch, running)
        while_computing()
        if batch is None or len(self.under_way) > self.lookahead:
            self.update()
        self.scheduler.check_integrity()

    def update(self) -> None:
        """Takes in the oldest pass under way."""
        batch, sampled = self.under_way.popleft()
        for request, row in zip(self.scheduler.scored(batch), filter(scores_of, batch.rows), strict=True):
            if request is not None:
                self.scored.setdefault(request.id, []).extend(row.scores.targets(row.tokens))
        self.scheduler.update(batch, sampled)

    def run_revised(self, batch: Batch) -> None:
        revised = self.scheduler.revise(batch)
        if revised is None:
            self.num_withdrawn += 1
            return
        before = {row.index: row for row in batch.rows}
        self.num_revised += revised is not batch
        if revised is not batch:
            self.check(revised)
            assert any(row.index not in before or row is not before[row.index] for row in revised.rows)
        running = {row.index: request for row, request in zip(revised.rows, self.scheduler._under_way[-1][1])}
        self.submit(revised, running)

    def check(self, batch: Batch) -> None:
        assert 0 < batch.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len({row.index for row in batch.rows}) == len(batch.rows) <= self.scheduler.max_num_seqs
        assert batch.is_in_order
        num_cut = sum(not row.samples for row in batch.rows)
        fills = self.scheduler.composer.filling is not None  # then each prompt has its share of a pass
        assert num_cut <= 1 or fills, "the budget of a pass ends within one sequence"
        self.check_no_budget_is_wasted(batch)
        self.scheduler.check_integrity()

    def submit(self, batch: Batch, running: dict[int, Request]) -> None:
        heard = self.sent(batch)
        rows = heard.rows
        self.cache.move(heard.moves)
        for side in self.sides:
            side.note(batch)
        before = dict(self.cache.written)
        known = [self.write(row, running[row.index]) for row in rows]
        self.num_shared_in_pass += sum(self.shares_in_pass(row, before, running[row.index]) for row in rows)
        sampled = [token for row in known for token in self.read(row, running[row.index])]
        self.under_way.append((batch, sampled))

    def shares_in_pass(self, row, before, request: Request) -> int:
        """The tokens that a row begins with, though they were not there before the pass."""
        salt, sequence = request.params.cache_salt, self.sequences[request.id]
        there = (before.get(self.cache.entry(row, at)) == (salt, *sequence[: at + 1]) for at in range(row.start))
        return row.start - sum(there)

    def sent(self, batch: Batch) -> Batch:
        """The batch as another rank hears it."""
        sender, receiver = self.sides
        heard = receiver.unpack(sender.pack(batch))
        assert heard == batch
        return heard

    def check_no_budget_is_wasted(self, batch: Batch):
        is_full = batch.num_tokens == self.scheduler.max_num_batched_tokens
        if is_full or not has_free_tokens(self.scheduler.composer.filling, batch):
            return
        ends = {row.index: row.start + len(row.tokens) for row in batch.rows}
        most, seats = self.scheduler.max_model_len, self.scheduler._seats
        running = {row: r for row, r in seats.running.items() if row in ends or not ends_with_what_comes(r, most)}
        assert ends == {row: request.num_computed_tokens for row, request in running.items()}
        assert all(request.num_computed_tokens + 1 == request.num_tokens_ahead for request in running.values())
        head = self.scheduler._admission.line.head()
        if head is not None and seats.free_rows and not head.num_under_way:
            room_tokens = min(head.num_tokens + STRETCH, head.most_tokens(most) - 1)
            growing = [one for one in seats.running.values() if one.room_tokens < one.most_tokens(most) - 1]
            num_pages = sum(pages_for(n, seats.page_size) for n in (room_tokens, len(growing) * HEADROOM))
            here = [block.page for block in seats.find(head) if block.page is not None]
            num_idle = sum(map(self.scheduler.cache.is_idle, here))
            assert num_pages - len(here) > self.scheduler.num_free_pages - num_idle

    def write(self, row, request: Request):
        """Writes a row's tokens to the cache. Returns the row with them."""
        if row.sampling is not None:
            self.samplers[row.index] = Sampler(row.sampling, row.history)
            self.num_computed[request.id] = row.start
            self.num_cached_in_all[request.id] += row.start
        assert len(row.tokens) > 0 and row.start == self.num_computed[request.id]
        self.num_computed[request.id] += len(row.tokens)
        self.num_computed_in_all[request.id] += len(row.tokens)
        sampler = self.samplers[row.index]
        known = tuple(sampler.last_token if token == ON_DEVICE else token for token in row.tokens)
        sampler.seen.update(known)
        sequence = self.sequences.setdefault(request.id, list(request.prompt_token_ids))
        row = row._replace(tokens=known)
        self.cache.write(row, sequence, request.params.cache_salt)
        return row

    def read(self, row, request: Request) -> list[int]:
        """Reads what a row attends to, and samples its next token, if it does."""
        sampler, sequence = self.samplers[row.index], self.sequences[request.id]
        self.cache.read(row, sequence, request.params.cache_salt)
        if not row.samples:
            return []
        assert row.start + len(row.tokens) == len(sequence), "a token that is known is sampled anew"
        token = sampler.draw(list(sequence))
        sequence.append(max(token, 0))
        return [token]


def scores_of(row):
    return row.scores


def has_free_tokens(filling: Filling | None, batch: Batch) -> bool:
    """Tells whether one token more would cost no time."""
    if filling is None:
        return True
    decoding = [row for row in batch.rows if row.tokens == (ON_DEVICE,) or row.kind is RowKind.ONE_TOKEN]
    compute_s = filling.seconds(len(decoding), sum(row.num_cached for row in decoding))
    chunks = [row for row in batch.rows if row not in decoding]
    compute_s += sum(filling.chunk_s(row.start, len(row.tokens), row.num_scored) for row in chunks)
    return compute_s + 2 * (filling.token_s + filling.scored_s) <= filling.link_s


def random_request(rng, id, max_model_len, most_tokens):
    num_prompt = rng.randint(1, min(max_model_len, most_tokens) - 1)
    max_tokens = rng.choice([1, 2, rng.randint(1, 30), None])
    if max_tokens is None and most_tokens < max_model_len:
        max_tokens = 40
    if max_tokens is not None:
        max_tokens = min(max_tokens, most_tokens - num_prompt)
    stop = rng.choice([[], [STOP], [EOS, STOP]])
    params = SamplingParams(
        max_tokens=max_tokens,
        stop_token_ids=stop,
        ignore_eos=rng.random() < 0.5,
        presence_penalty=rng.choice([0, 1]),
        priority=rng.randint(-1, 1),
        cache_salt=rng.choice([None, None, "a"]),
        prompt_logprobs=rng.choice([None, None, 0, 3]),
    )
    begins = random.Random(rng.randrange(2)).choices(range(VOCAB), k=num_prompt)  # as other requests do
    prompt = begins[: rng.randint(0, num_prompt)]
    prompt += rng.choices(range(VOCAB), k=num_prompt - len(prompt))
    return Request(id, prompt, params, seed=rng.randrange(2**64))


def random_scheduler(rng):
    page_size, max_model_len = rng.choice([1, 2, 3, 8, 16]), rng.randint(2, 60)
    max_num_seqs = rng.randint(1, 8)
    return Scheduler(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, rng.choice([1, 2, 7, 16, 100])),
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=2 + rng.randint(1, 120) // page_size,
        eos_token_ids=[EOS],
        page_order_seed=rng.choice([None, rng.randrange(100)]),
        policy=rng.choice(["fcfs", "priority"]),
        prefix_caching=rng.random() < 0.5,
        host_pages=random_host_pages(rng),
        filling=rng.choice([None, filling_of(rng.randint(1, 40))]),
    )


def random_host_pages(rng):
    """Few pages or many, to and from which all moves, or little."""
    least, most_beside = rng.choice([(0, 8), (6, 8), (0, 3)])
    pays = lambda num_tokens, beside: num_tokens >= least and beside <= most_beside  # noqa: E731
    return HostPages(rng.choice([0, 1, 3, 10, 100]), pays)


def filling_of(free_tokens: int) -> Filling:
    """Hides so many tokens of a prompt, if nothing else is computed."""
    steps = (
        (StepWork("linear", weight_bytes=10**6, token_flops=10**9), 1),
        (StepWork("attention", kv_token_bytes=1000, attention_flops=10**6), 1),
        (StepWork("score_prompts", scored_flops=10**9), 1),
    )
    made = Filling.of(PassWork(1, 0, steps), H200)
    return replace(made, link_s=made.seconds(0, 0) + made.chunk_s(0, free_tokens))


def check_workload(seed, lookahead):
    rng = random.Random(seed)
    scheduler = random_scheduler(rng)
    most_tokens = scheduler.pool.num_usable * scheduler.page_size + 1
    late = [random_request(rng, id, scheduler.max_model_len, most_tokens) for id in range(rng.randint(1, 12))]
    play(rng, scheduler, late, lookahead)


def play(rng, scheduler, late, lookahead, before_pass=lambda simulation: None):
    """Adds the requests while passes run, and compares each with itself alone."""
    requests, simulation = list(late), Simulation(scheduler, lookahead)
    while late or scheduler.has_unfinished:
        for _ in range(rng.randint(0 if scheduler.has_unfinished else 1, 3)):
            if late:
                scheduler.add(late.pop(0))
        before_pass(simulation)
        simulation.run_pass()
    for request in requests:
        outcome = request.output_token_ids, request.finish_reason, request.stop_reason
        assert outcome == expected_output(request, scheduler.max_model_len)
        # Each token but the last was computed once, and those of a row that gave way once more; the last too, if
        # nothing could be sampled after it. Where a token's value ended the request, passes that were under way then
        # computed for nothing.
        gave_way = simulation.gave_way.get(request.id, [])
        assert len(gave_way) == request.num_preemptions
        wasted = simulation.num_computed_in_all[request.id] + simulation.num_cached_in_all[request.id]
        wasted -= request.num_tokens - (request.finish_reason != "error")
        assert 0 <= wasted <= sum(gave_way) + (0 if request.finish_reason == "length" else abs(lookahead))
        assert request.state is RequestState.FINISHED and request.pages == [] and request.row is None
        # Log probabilities of a prompt come once for each token, in order, whatever was cached and who gave way.
        asks = request.params.prompt_logprobs is not None
        assert simulation.scored.get(request.id, []) == request.prompt_token_ids[1:] * asks
    assert scheduler.num_free_pages == scheduler.pool.num_usable
    assert scheduler.counts.num_preemptions == sum(map(len, simulation.gave_way.values()))


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(PREPARED, 2))
def test_every_request_gets_the_tokens_it_would_get_alone(seed, lookahead):
    check_workload(seed, lookahead)


@pytest.mark.parametrize("lookahead", [0, 1, PREPARED])
@pytest.mark.parametrize("seed", range(50))
def test_every_request_gets_the_tokens_it_would_get_alone_fixed_seeds(seed, lookahead):
    check_workload(seed, lookahead)


def test_a_batch_four_times_the_page_pool_finishes():
    scheduler = Scheduler(8, 32, 64, page_size=4, num_pages=17)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    requests = [Request(id, [1] * 13, params) for id in range(16)]
    for request in requests:
        scheduler.add(request)  # 16 tokens with KV: 4 pages each, 64 in all, and there are 16
    most_running, simulation = 0, Simulation(scheduler)
    while scheduler.has_unfinished:
        simulation.run_pass()
        most_running = max(most_running, scheduler.num_running)
    assert most_running == 4
    assert all(len(request.output_token_ids) == 4 for request in requests)
    assert scheduler.num_free_pages == scheduler.pool.num_usable


@pytest.mark.parametrize("lookahead", [0, 1, PREPARED])
@pytest.mark.parametrize("seed", range(30))
def test_ends_at_any_moment_leave_nothing_behind(seed, lookahead):
    rng = random.Random(seed)
    scheduler = random_scheduler(rng)
    most_tokens = scheduler.pool.num_usable * scheduler.page_size + 1
    requests = [random_request(rng, id, scheduler.max_model_len, most_tokens) for id in range(12)]
    simulation = Simulation(scheduler, lookahead)

    def end_some():
        for request in requests:
            if request.state is not RequestState.FINISHED and rng.random() < 0.05:
                scheduler.finish(request, FinishReason.ABORT)

    for request in requests:
        scheduler.add(request)
    while scheduler.has_unfinished:
        simulation.run_pass(while_computing=end_some)
        end_some()
        scheduler.check_integrity()
    assert scheduler.num_free_pages == scheduler.pool.num_usable
    assert all(request.row is None and request.pages == [] for request in requests)
    for request in requests:
        expected, reason, _ = expected_output(request, scheduler.max_model_len)
        assert request.output_token_ids == expected[: len(request.output_token_ids)]
        assert request.finish_reason in (reason, FinishReason.ABORT)


def prompts_that_begin_alike(rng, num_requests, most_tokens, max_model_len):
    """Requests that begin with more or less of one text, all at once."""
    begins = rng.choices(range(VOCAB), k=max_model_len)
    for id in range(num_requests):
        num_prompt = min(rng.randint(2, max_model_len - 1), most_tokens - 1)
        alike = rng.choice([num_prompt, rng.randint(0, num_prompt)])
        params = SamplingParams(
            max_tokens=min(rng.choice([1, 3, 10]), most_tokens - num_prompt),
            presence_penalty=rng.choice([0, 1]),
            priority=rng.choice([0, 0, 0, 1, -1]),
            cache_salt=rng.choice([None, None, None, "a"]),
            prompt_logprobs=rng.choice([None, None, None, 0]),
        )
        prompt = begins[:alike] + rng.choices(range(VOCAB), k=num_prompt - alike)
        yield Request(id, prompt, params, seed=rng.randrange(2**64))


def play_alike(seed, lookahead) -> Counter:
    """Plays requests that begin alike, in few pages, of which some end at any moment. Returns what happened."""
    rng = random.Random(f"alike {seed}")
    page_size, max_model_len, max_num_seqs = rng.choice([1, 2, 4]), rng.randint(20, 50), rng.randint(3, 16)
    scheduler = Scheduler(
        max_num_seqs,
        max(max_num_seqs, rng.choice([20, 60, 200])),
        max_model_len,
        page_size,
        num_pages=2 + rng.randint(40, 300) // page_size,
        eos_token_ids=[EOS],
        page_order_seed=rng.randrange(100),
        policy=rng.choice(["fcfs", "priority"]),
        prefix_caching=True,
        host_pages=random_host_pages(rng),
        filling=rng.choice([None, filling_of(rng.randint(1, 40))]),
    )
    most_tokens = scheduler.pool.num_usable * scheduler.page_size + 1
    requests = list(prompts_that_begin_alike(rng, 16, most_tokens, max_model_len))
    simulation, late, ends = Simulation(scheduler, lookahead), deque(requests), rng.choice([0, 0.02, 0.2])
    simulation.cannot_send = lambda: rng.random() < 0.15

    def come_and_go():
        for _ in range(rng.choice([0, 1, 8])):
            if late:
                scheduler.add(late.popleft())
        for request in requests[: len(requests) - len(late)]:
            if request.state is not RequestState.FINISHED and rng.random() < ends:
                scheduler.finish(request, FinishReason.ABORT)
                scheduler.check_integrity()

    while late or scheduler.has_unfinished:
        come_and_go()
        if scheduler.has_unfinished:
            simulation.run_pass(while_computing=come_and_go)
    for request in requests:
        expected, reason, _ = expected_output(request, max_model_len)
        assert request.finish_reason in (reason, FinishReason.ABORT)
        is_whole = request.finish_reason == reason
        assert request.output_token_ids == (expected if is_whole else expected[: len(request.output_token_ids)])
        num_computed = simulation.num_computed_in_all[request.id] + simulation.num_cached_in_all[request.id]
        assert not is_whole or num_computed >= request.num_tokens - (reason != "error")
        asks = request.params.prompt_logprobs is not None
        assert not is_whole or simulation.scored.get(request.id, []) == request.prompt_token_ids[1:] * asks
    assert scheduler.num_free_pages == scheduler.pool.num_usable
    scheduler.check_integrity()
    begun = [request for request in requests if request.num_cached_tokens is not None]
    assert scheduler.counts.num_asked_tokens == sum(len(request.prompt_token_ids) for request in begun)
    assert scheduler.counts.num_hit_tokens == sum(request.num_cached_tokens for request in begun)
    return Counter(
        shared=simulation.num_shared_in_pass,
        taken_back=simulation.num_taken_back,
        preempted=scheduler.counts.num_preemptions,
        withdrawn=simulation.num_withdrawn,
        revised=simulation.num_revised,
        moved=scheduler.counts.moves.num_in,
    )


@pytest.mark.parametrize("lookahead", [0, 1, PREPARED])
def test_rows_that_share_what_their_pass_computes_get_the_tokens_they_would_get_alone(lookahead):
    happened = sum((play_alike(seed, lookahead) for seed in range(150)), Counter())
    assert happened["shared"] > 1000
    assert all(happened[what] > 10 for what in ("taken_back", "preempted", "moved"))
    assert lookahead != PREPARED or all(happened[what] > 10 for what in ("withdrawn", "revised"))


def test_order_of_pages_changes_no_decision():
    def decisions(page_order_seed):
        scheduler = Scheduler(4, 16, 40, 4, 30, page_order_seed=page_order_seed)
        for id in range(8):
            scheduler.add(Request(id, [1] * (3 * id + 1), SamplingParams(max_tokens=6)))
        batches = []
        while (batch := scheduler.schedule()) is not None:
            batches.append(batch)
            scheduler.update(batch, [9] * batch.num_sampled)
        shapes = [[(row.index, row.start, row.tokens, row.samples) for row in b.rows] for b in batches]
        return shapes, [row.pages for batch in batches for row in batch.rows]

    (shapes, pages), (shapes_shuffled, pages_shuffled) = decisions(None), decisions(3)
    assert shapes == shapes_shuffled and pages != pages_shuffled


@pytest.mark.parametrize(
    ("max_tokens", "stop", "num_withdrawn", "num_revised"),
    [
        ([5, 5], [], 0, 0),  # both ends are foreseen
        ([5, 9], [], 0, 0),
        ([5, 9, 4], [], 0, 1),  # one waits for the row that is free after five
        ([9, 9], range(VOCAB), 1, 0),  # nobody foresaw the end of both
    ],
)
def test_a_prepared_pass_is_changed_only_where_it_must_be(max_tokens, stop, num_withdrawn, num_revised):
    scheduler = Scheduler(2, 32, 64, page_size=4, num_pages=40)
    for id, most in enumerate(max_tokens):
        params = SamplingParams(max_tokens=most, stop_token_ids=list(stop), ignore_eos=True)
        scheduler.add(Request(id, [1, 2, 3], params))
    simulation = Simulation(scheduler, PREPARED)
    while scheduler.has_unfinished:
        simulation.run_pass()
    assert (simulation.num_withdrawn, simulation.num_revised) == (num_withdrawn, num_revised)
