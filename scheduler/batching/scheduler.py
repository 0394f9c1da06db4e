"""Decides which tokens run in the next pass: continuous batching with chunked prefill.

`Scheduler` runs on rank 0; what it decides is a `Batch`, which reaches the other ranks as one packed message.
The scheduler knows token counts, rows and pages, but neither text nor tensors. A request is admitted for what it needs
now (seats.py), and its pages grow with it. When there are none left, a row gives way (preemption.py): it waits, and is
computed again from its tokens, the output too. Waiting requests are served in the order of the line (waiting.py); its
head is never overtaken because a later, smaller one would fit, so nobody starves.

    budget of a pass   | decodes, 1 token each | next chunks of running requests | admitted prompts ... |
                       0                                               as far as filling.py says, at most
                                                                                   max_num_batched_tokens

Passes may be scheduled ahead: schedule() counts on the tokens that passes under way will sample, and names them as
ON_DEVICE; update() takes them in later, pass by pass. Where a request ends by a token's value (end-of-sequence, a stop
token), its row in the next pass has already been scheduled and is computed for nothing.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from penstock.scheduler.batching.admission import Admission
from penstock.scheduler.batching.batch import Batch, BatchRow, History
from penstock.scheduler.batching.counts import Counts, Wait
from penstock.scheduler.batching.filling import Budget, Filling, Queue, Running
from penstock.scheduler.batching.pages import PagePool, pages_for
from penstock.scheduler.batching.places import in_places
from penstock.scheduler.batching.prefix_cache import PrefixCache
from penstock.scheduler.batching.request import FinishReason, Request, RequestState, RowSampling
from penstock.scheduler.batching.retention import KeepAll, Retention
from penstock.scheduler.batching.seats import Seats
from penstock.scheduler.batching.waiting import Line


class Scheduler:
    """Holds all requests and decides each pass. A caller adds requests, then schedules passes, and updates once for
    each pass in the same order.

    A pass has at most `max_num_batched_tokens`, a request at most `max_model_len` prompt and output tokens; a page has
    `page_size` tokens, and `num_pages` counts the reserved page 0. `page_order_seed` shuffles the order in which pages
    are handed out. `retention` says which tokens of a row stay cached: all of them, if it is not given. `policy`, one
    of POLICIES, says who is served first. With `prefix_caching` requests share the whole pages that they begin with,
    unless old tokens are dropped. `filling` knows how many tokens of a pass are free where weights stream; without it
    passes are filled as they can be. `counts` says what has happened so far. Raises ValueError for fewer than 2 pages.
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
        policy: str = "fcfs",
        prefix_caching: bool = False,
        filling: Filling | None = None,
    ):
        assert max_num_seqs <= max_num_batched_tokens, "rows would starve: each computes a token in a pass"
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len, self.filling = max_model_len, filling
        self.page_size = page_size
        self.pool = PagePool(num_pages, page_order_seed)
        self._retention = retention or KeepAll(page_size)
        self._eos_token_ids = frozenset(eos_token_ids)
        self.cache = PrefixCache(self.pool, page_size, prefix_caching and self._retention.max_cached is None)
        self._seats = Seats(max_num_seqs, self.cache, self._retention, max_model_len)
        self._admission = Admission(Line(policy), self._seats)
        self._running = Running()
        self._decoding: list[Request] = []  # in the pass that was scheduled last, in its order
        self._under_way: deque[tuple[Batch, list[Request]]] = deque()
        self._budget = Budget(max_num_batched_tokens, (), None)  # of the pass that was scheduled last

    @property
    def max_num_seqs(self) -> int:
        return self._seats.max_num_seqs

    @property
    def counts(self) -> Counts:
        return self._admission.counts

    @property
    def num_waiting(self) -> int:
        return len(self._admission.line)

    @property
    def num_running(self) -> int:
        return len(self._seats.running)

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds."""
        return self.cache.num_available

    @property
    def has_unfinished(self) -> bool:
        """Tells whether a request is left, or a pass under way."""
        return bool(self.num_waiting or self._seats.running or self._under_way)

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
        self._admission.line.join(request)

    def _check_possible(self, request: Request) -> None:
        request.check_length(self.max_model_len)
        most_tokens, num_pages = request.most_tokens(self.max_model_len), self._seats.most_pages(request)
        if num_pages > self.pool.num_usable:
            raise ValueError(
                f"request {request.id}: {most_tokens} tokens (prompt and max_tokens) need {num_pages} pages"
                f" of {self.page_size} tokens, and there are {self.pool.num_usable}"
            )

    def abort(self) -> None:
        """Ends every request and forgets the passes under way, one of which has failed, and what they may have left."""
        for request in [*self._admission.line, *self._seats.running.values()]:
            self.finish(request, FinishReason.ABORT)
        self._under_way.clear()
        self.cache.clear()

    def schedule(self) -> Batch | None:
        """The next pass, or None when there is nothing to compute before the next update."""
        self._admission.make_room()
        chunks = self._sort_running()
        rows = [self._next_tokens(request, request.num_tokens_ahead) for request in self._decoding]
        self._budget = budget = Budget(self.max_num_batched_tokens, rows, self.filling)
        while (queue := self._queue(chunks)) is not None and budget.has_room(queue):
            request = chunks.popleft() if chunks else self._admission.admit_next()
            if request is None:
                break
            start = request.num_computed_tokens
            num_tokens = budget.take(start, self._end_of_pass(request) - start, queue)
            rows.append(self._next_tokens(request, start + num_tokens))
        assert rows or self._under_way or not self.has_unfinished, "nothing can run"
        if not rows:
            return None
        batch = Batch.of(rows)
        requests = [self._seats.running[row.index] for row in batch.rows]
        for request in requests:
            request.num_under_way += 1
        self._under_way.append((batch, requests))
        why = Wait.TOKENS if queue is not None and not budget.has_room(queue) else self._admission.why_waiting()
        self.counts.note_pass(self.num_waiting, why, *budget.free_tokens)
        return batch

    def is_wanted(self, batch: Batch) -> bool:
        """Tells whether the pass that was scheduled last should still run after an update. It should not if all its
        requests have ended, or if a waiting request can enter it that has come since, or that fits now."""
        assert batch is self._under_way[-1][0], "not the newest batch"
        ended = all(request.state is RequestState.FINISHED for request in self._under_way[-1][1])
        queue = self._queue(())
        can_enter = queue is not None and self._budget.has_room(queue) and self._admission.can_admit()
        return not ended and not can_enter

    def withdraw(self, batch: Batch) -> None:
        """Takes back the pass that was scheduled last; those of its requests that have not ended are scheduled anew."""
        assert batch is self._under_way[-1][0], "not the newest batch"
        _, requests = self._under_way.pop()
        self.counts.take_back_pass(*self._budget.free_tokens)
        for row, request in zip(batch.rows, requests, strict=True):
            request.num_computed_tokens = row.start
            request.num_unseen_tokens -= row.samples
            request.num_under_way -= 1
            request.is_told &= row.sampling is None

    def _sort_running(self) -> deque[Request]:
        """Finds the running requests that decode, in an order in which few move (`_decoding`), and returns the others
        that compute: the most urgent first, and prompts before what is computed again."""
        decoding, chunks, num_outputs = [], [], 0
        for request in self._seats.running.values():
            num_to_come = request.most_tokens(self.max_model_len) - request.num_tokens_ahead
            if num_to_come > 0 and request.num_tokens_ahead - request.num_computed_tokens == 1:
                decoding.append(request)
                num_outputs += num_to_come
            elif num_to_come > 0:
                chunks.append(request)
        self._decoding, self._running = in_places(self._decoding, decoding), Running(len(decoding), num_outputs)
        chunks.sort(key=lambda request: (request.place[0], request.num_preemptions > 0, request.place[1]))
        return deque(chunks)

    def _queue(self, chunks: Sequence[Request]) -> Queue | None:
        """These requests, which have their rows, and those that wait and could get one now; None if there is nobody."""
        first = chunks[0] if chunks else self._admission.line.head()
        if first is None:
            return None
        num_fitting = len(chunks) + self._admission.num_fitting
        return Queue.of(first, self.max_model_len, len(chunks) + self.num_waiting, num_fitting, self._running)

    def _end_of_pass(self, request: Request) -> int:
        """The end of what one pass can compute of a request."""
        return self._retention.pass_end(request.num_computed_tokens, request.num_tokens_ahead)

    def _next_tokens(self, request: Request, end: int) -> BatchRow:
        """The row that computes a request up to `end`."""
        start, samples = request.num_computed_tokens, end == request.num_tokens_ahead
        tokens = tuple(request.tokens_between(start, end))
        sampling = None if request.is_told else RowSampling.of(request)
        history = History.of(request) if sampling is not None and sampling.has_penalty else History()
        request.num_computed_tokens = end
        request.num_unseen_tokens += samples
        num_evicted = self._retention.num_evicted(end)
        self._update_page_table(request, end, num_evicted)
        request.is_told = True
        return BatchRow(
            index=request.row,
            tokens=tokens,
            start=start,
            pages=request.page_table,
            samples=samples,
            sampling=sampling,
            num_evicted=num_evicted,
            history=history,
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
        tokens, updated = iter(sampled), []
        for row, request in zip(batch.rows, requests, strict=True):
            token = next(tokens) if row.samples else None
            request.num_under_way -= 1
            has_ended = request.finish_reason is not None
            if not has_ended:
                self._take_in(request, row, token)
            if row.samples:
                updated.append(None if has_ended else request)
        return updated

    def _take_in(self, request: Request, row: BatchRow, token: int | None) -> None:
        """Notes what a pass computed of a request, and its token if the row sampled one. What is behind a token that
        could not be sampled is for nobody else."""
        if token is not None and token < 0:
            self.cache.forget(request.pages)
        elif request.row is not None:
            self.cache.enter(request, row.start + len(row.tokens))
        if token is not None:
            request.num_unseen_tokens -= 1
            self._append(request, token)

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
        """Ends a request, waiting or running, and frees its row and pages at once.

        A finished request only gets the new reason: its last token can complete a stop string.
        """
        self._admission.end(request)
        request.finish_reason, request.stop_reason = reason, stop_reason

    def check_integrity(self) -> None:
        """Asserts that rows and pages are each held once, by running requests only."""
        self._admission.check_integrity()
