"""Decides which tokens run in the next pass: continuous batching with chunked prefill.

`Scheduler` runs on rank 0; what it decides is a `Batch`, which reaches the other ranks as one packed message.
The scheduler knows token counts, rows and pages, but neither text nor tensors. There is no preemption: a request is
admitted once all the pages it can ever need are free, so a running request never runs out of them. Waiting requests
are served in the order in which they came; the head of the line is never overtaken because a later, smaller one would
fit, so nobody starves.

    budget of a pass   | decodes, 1 token each | next chunk of a running prefill | admitted prompts ... |
                       0                                                        max_num_batched_tokens

Where short passes are graphs, a prompt that fits into one is not cut, and makes no pass longer than that: it waits for
the next pass, unless it is the first of this one. So most passes of a queue are graphs, which longer ones are not.

Passes may be scheduled ahead: schedule() counts on the tokens that passes under way will sample, and names them as
ON_DEVICE; update() takes them in later, pass by pass. Where a request ends by a token's value (end-of-sequence, a stop
token), its row in the next pass has already been scheduled and is computed for nothing.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence

from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.pages import PagePool, pages_for
from penstock.scheduler.batching.request import FinishReason, Request, RequestState, RowSampling
from penstock.scheduler.batching.retention import KeepAll, Retention


class Scheduler:
    """Holds all requests and decides each pass. A caller adds requests, then schedules passes, and updates once for
    each pass in the same order.

    A pass has at most `max_num_batched_tokens`, a request at most `max_model_len` prompt and output tokens; a page has
    `page_size` tokens, and `num_pages` counts the reserved page 0. Passes with prompts of up to `captured_tokens` are
    graphs. `page_order_seed` shuffles the order in which pages
    are handed out. `retention` says which tokens of a row stay cached: all of them, if it is not given.
    Raises ValueError for fewer than 2 pages.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        page_size: int,
        num_pages: int,
        eos_token_ids: Iterable[int] = (),
        page_order_seed: int | None = None,
        retention: Retention | None = None,
        captured_tokens: int = 0,
    ):
        assert max_num_seqs <= max_num_batched_tokens, "rows would starve: each computes a token in a pass"
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.captured_tokens = captured_tokens
        self.page_size = page_size
        self.pool = PagePool(num_pages, page_order_seed)
        self._retention = retention or KeepAll(page_size)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting: OrderedDict[Request, None] = OrderedDict()  # in order; any of them leaves at once
        self._running: dict[int, Request] = {}  # by row, in order of admission
        self._free_rows = list(range(max_num_seqs))  # a heap: low rows first
        self._decoding: list[Request] = []  # in the pass that was scheduled last, in its order
        self._under_way: deque[tuple[Batch, list[Request]]] = deque()
        self._num_filled = 0  # tokens of the pass that is being scheduled
        self._num_free_rows, self._num_waiting = max_num_seqs, 0  # at the time the last pass was scheduled

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        """Tells whether a request is left, or a pass under way."""
        return bool(self._waiting or self._running or self._under_way)

    def add(self, request: Request) -> None:
        """Lets a new request wait for its row.

        Raises ValueError if its prompt is empty or leaves no room for an output token, or if the request
        at its longest needs more pages than there are; the request has then ended, with FinishReason.ERROR.
        """
        assert request.state is RequestState.WAITING and request.num_computed_tokens == 0
        try:
            self._check_possible(request)
        except ValueError:
            request.finish_reason = FinishReason.ERROR
            raise
        self._waiting[request] = None

    def _check_possible(self, request: Request) -> None:
        request.check_length(self.max_model_len)
        most_tokens, num_pages = request.most_tokens(self.max_model_len), self._pages_needed(request)
        if num_pages > self.pool.num_usable:
            raise ValueError(
                f"request {request.id}: {most_tokens} tokens (prompt and max_tokens) need {num_pages} pages"
                f" of {self.page_size} tokens, and there are {self.pool.num_usable}"
            )

    def abort(self) -> None:
        """Ends every request and forgets the passes under way, one of which has failed."""
        for request in [*self._waiting, *self._running.values()]:
            self.finish(request, FinishReason.ABORT)
        self._under_way.clear()

    def schedule(self) -> Batch | None:
        """The next pass, or None when there is nothing to compute before the next update."""
        rows: list[BatchRow] = []
        self._num_filled = 0
        for request in self._next_requests(rows):
            rows.append(self._next_tokens(request, self.max_num_batched_tokens - self._num_filled))
            self._num_filled += len(rows[-1].tokens)
            if self._num_filled == self.max_num_batched_tokens:
                break
        assert rows or self._under_way or not self.has_unfinished, "nothing can run"
        if not rows:
            return None
        batch = Batch.of(rows)
        self._under_way.append((batch, [self._running[row.index] for row in batch.rows]))
        self._num_free_rows, self._num_waiting = len(self._free_rows), len(self._waiting)
        return batch

    def is_wanted(self, batch: Batch) -> bool:
        """Tells whether the pass that was scheduled last should still run after an update. It should not if all its
        requests have ended, or if a waiting request fits into it that has come since, or whose row has become free."""
        assert batch is self._under_way[-1][0], "not the newest batch"
        ended = all(request.state is RequestState.FINISHED for request in self._under_way[-1][1])
        return not ended and not self._may_admit_more(batch)

    def _may_admit_more(self, batch: Batch) -> bool:
        changed = len(self._free_rows) > self._num_free_rows or len(self._waiting) > self._num_waiting
        if not changed or not self._waiting or not self._free_rows:
            return False
        fits = self._pages_needed(next(iter(self._waiting))) <= self.pool.num_free
        return fits and batch.num_tokens < self.max_num_batched_tokens

    def withdraw(self, batch: Batch) -> None:
        """Takes back the pass that was scheduled last; those of its requests that have not ended are scheduled anew."""
        assert batch is self._under_way[-1][0], "not the newest batch"
        _, requests = self._under_way.pop()
        for row, request in zip(batch.rows, requests, strict=True):
            request.num_computed_tokens = row.start
            request.num_unseen_tokens -= row.samples

    def _next_requests(self, filling: Sequence[BatchRow]) -> Iterator[Request]:
        """The requests that compute, most urgent first, while their rows come to `filling`; a waiting one is admitted
        when the iterator reaches it."""
        most = self.max_model_len
        running = [
            request for request in self._running.values() if request.num_tokens_ahead < request.most_tokens(most)
        ]
        decodes = {request: request.num_tokens_ahead > len(request.prompt_token_ids) for request in running}
        self._decoding = _in_places(self._decoding, [request for request in running if decodes[request]])
        yield from self._decoding
        yield from (request for request in running if not decodes[request])
        while self._waiting and self._free_rows:
            request = next(iter(self._waiting))
            num_pages = self._pages_needed(request)
            if num_pages > self.pool.num_free or self._is_for_the_next_pass(request, filling):
                return
            del self._waiting[request]
            request.row, request.pages = heapq.heappop(self._free_rows), self.pool.allocate(num_pages)
            self._running[request.row] = request
            yield request

    def _is_for_the_next_pass(self, request: Request, filling: Sequence[BatchRow]) -> bool:
        """Tells whether a prompt would be cut, or keep a pass that has prompts from being a graph, though it fits into
        one."""
        if not filling or len(filling[-1].tokens) == 1:
            return False
        num_prompt, num_filled = len(request.prompt_token_ids), self._num_filled
        return max(num_prompt, num_filled) <= self.captured_tokens < num_prompt + num_filled

    def _next_tokens(self, request: Request, budget_tokens: int) -> BatchRow:
        start = request.num_computed_tokens
        end = self._retention.pass_end(start, min(request.num_tokens_ahead, start + budget_tokens))
        samples = end == request.num_tokens_ahead
        tokens = tuple(request.tokens_between(start, end))
        request.num_computed_tokens = end
        request.num_unseen_tokens += samples
        num_evicted = self._retention.num_evicted(end)
        self._update_page_table(request, end, num_evicted)
        return BatchRow(
            index=request.row,
            tokens=tokens,
            start=start,
            pages=request.page_table,
            samples=samples,
            sampling=RowSampling.of(request) if start == 0 else None,
            num_evicted=num_evicted,
        )

    def _update_page_table(self, request: Request, end: int, num_evicted: int) -> None:
        """Makes the request's page table anew if it is another one for its first `end` tokens."""
        num_pages = pages_for(self._retention.margin + end - num_evicted, self.page_size)
        if (num_pages, num_evicted) != (len(request.page_table), request.num_evicted):
            request.page_table, request.num_evicted = self._retention.page_table(request.pages, end), num_evicted

    def update(self, batch: Batch, sampled: Sequence[int]) -> list[Request | None]:
        """Takes in the tokens of the oldest pass under way.

        `sampled` has one token id for each row with `samples`, in batch order; a negative one means that no token
        could be sampled, and ends the request with FinishReason.ERROR. Returns the requests that got the tokens, in
        that order, with None for a request that ended meanwhile; finished ones hold no row and no pages.
        """
        assert self._under_way and batch is self._under_way[0][0], "not the oldest batch under way"
        assert len(sampled) == batch.num_sampled, f"{len(sampled)} tokens for {batch.num_sampled} rows"
        _, requests = self._under_way.popleft()
        sampling = [request for row, request in zip(batch.rows, requests, strict=True) if row.samples]
        alive = [None if request.state is RequestState.FINISHED else request for request in sampling]
        for request, token in zip(alive, sampled, strict=True):
            if request is not None:
                request.num_unseen_tokens -= 1
                self._append(request, token)
        return alive

    def _append(self, request: Request, token: int) -> None:
        """Gives a request its next token, and ends the request if that was its last."""
        if token < 0:
            self.finish(request, FinishReason.ERROR)
            return
        request.output_token_ids.append(token)
        # As in vLLM, a stop token is kept in the output and wins over a length that is reached with it.
        if token in self._eos_token_ids and not request.params.ignore_eos:
            self.finish(request, FinishReason.STOP)
        elif token in request.params.stop_token_ids:
            self.finish(request, FinishReason.STOP, stop_reason=token)
        elif request.num_tokens >= request.most_tokens(self.max_model_len):
            self.finish(request, FinishReason.LENGTH)

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a request, waiting or running, and frees its row and pages at once. (A pass under way may still write to
        them; the next owner's passes come behind it.)

        A finished request only gets the new reason: its last token can complete a stop string.
        """
        if request.state is RequestState.WAITING:
            del self._waiting[request]
        elif request.state is RequestState.RUNNING:
            del self._running[request.row]
            heapq.heappush(self._free_rows, request.row)
            self.pool.release(request.pages)
            request.row, request.pages, request.page_table = None, [], ()
        request.finish_reason, request.stop_reason = reason, stop_reason

    def _pages_needed(self, request: Request) -> int:
        # The last token is sampled and never computed, so it has no KV.
        return self._retention.num_pages(request.most_tokens(self.max_model_len) - 1)

    def check_integrity(self) -> None:
        """Asserts that rows and pages are each held once, by running requests only."""
        self.pool.check_integrity(page for request in self._running.values() for page in request.pages)
        assert sorted([*self._running, *self._free_rows]) == list(range(self.max_num_seqs)), "rows are lost"
        for row, request in self._running.items():
            assert request.row == row and len(request.pages) == self._pages_needed(request)
        assert all(r.state is RequestState.WAITING and not r.pages for r in self._waiting)


def _in_places(before: Sequence[Request], now: Sequence[Request]) -> list[Request]:
    """Those of `now` in an order in which few have moved since `before`: where one has ended a new one takes its place,
    else the last one does."""
    here, old = set(now), set(before)
    left, new = deque(before), deque(request for request in now if request not in old)
    places: list[Request] = []
    while left:
        request = left.popleft()
        if request not in here:
            while left and left[-1] not in here:
                left.pop()
            if not (new or left):
                break
            request = new.popleft() if new else left.pop()
        places.append(request)
    return [*places, *new]
