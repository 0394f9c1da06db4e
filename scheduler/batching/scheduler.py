"""Decides which tokens run in the next pass: continuous batching with chunked prefill.

`Scheduler` runs on rank 0; what it decides is a `Batch`, which reaches the other ranks as one packed message.
The scheduler knows token counts, rows and pages, but neither text nor tensors. A request is admitted for what it needs
now (seats.py), and its pages grow with it. When there are none left, a row gives way (preemption.py): it waits, and is
computed again from its tokens, the output too. Waiting requests are served in the order of the line (waiting.py); its
head is never overtaken because a later, smaller one would fit, so nobody starves. If it is more urgent than those that
run, it comes before their chunks.

    budget of a pass   | decodes, 1 token each | next chunks of running requests | admitted prompts ... |
                       0                                               as far as filling.py says, at most
                                                                                   max_num_batched_tokens

Passes may be scheduled ahead: schedule() counts on the tokens that passes under way will sample, and names them as
ON_DEVICE; update() takes them in later, pass by pass. Where a request ends by a token's value (end-of-sequence, a stop
token), its row in the next pass has already been scheduled and is computed for nothing.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from penstock.scheduler.batching.admission import Admission
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.composer import Composer
from penstock.scheduler.batching.counts import Counts, Wait
from penstock.scheduler.batching.filling import Filling
from penstock.scheduler.batching.host_pages import Block, HostPages, Move
from penstock.scheduler.batching.limits import Limits
from penstock.scheduler.batching.pages import PagePool
from penstock.scheduler.batching.prefix_cache import PrefixCache
from penstock.scheduler.batching.request import FinishReason, Request, RequestState
from penstock.scheduler.batching.retention import KeepAll, Retention
from penstock.scheduler.batching.seats import Seats
from penstock.scheduler.batching.waiting import Line


class UnderWay(NamedTuple):
    """A pass that has been scheduled, the requests of its rows, and the blocks that come with it."""

    batch: Batch
    requests: list[Request]
    coming: tuple[Block, ...]


class Scheduler:
    """Holds all requests and decides each pass. A caller adds requests, then schedules passes, and updates once for
    each pass in the same order.

    A pass has at most `max_num_batched_tokens`, a request at most `max_model_len` prompt and output tokens; a page has
    `page_size` tokens, and `num_pages` counts the reserved page 0. `page_order_seed` shuffles the order in which pages
    are handed out. `retention` says which tokens of a row stay cached: all of them, if it is not given. `policy`, one
    of POLICIES, says who is served first. With `prefix_caching` requests share the whole pages that they begin with,
    unless old tokens are dropped; what the device has no room for is kept in `host_pages`. `filling` knows how many
    tokens of a pass are free where weights stream; without it passes are filled as they can be. `counts` says what has
    happened so far. Raises ValueError for fewer than 2 pages.
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
        host_pages: HostPages | None = None,
        filling: Filling | None = None,
    ):
        assert max_num_seqs <= max_num_batched_tokens, "rows would starve: each computes a token in a pass"
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.page_size = page_size
        self.pool = PagePool(num_pages, page_order_seed)
        self._retention = retention or KeepAll(page_size)
        self._eos_token_ids = frozenset(eos_token_ids)
        self.cache = PrefixCache(
            self.pool, page_size, prefix_caching and self._retention.max_cached is None, host_pages
        )
        self._seats = Seats(max_num_seqs, self.cache, self._retention, max_model_len)
        self._admission = Admission(Line(policy), self._seats)
        self.counts.moves = self.cache.host.counts
        self.composer = Composer(self._admission, self._retention, max_num_batched_tokens, filling)
        self._under_way: deque[UnderWay] = deque()
        self._free_tokens = 0, 0  # counted of that pass: there are so many, and it uses so many

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
    def seated(self) -> list[Request]:
        """The requests that hold rows."""
        return list(self._seats.running.values())

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

        Raises ValueError for one that exceeds `limits`; it has then ended, with FinishReason.ERROR.
        """
        assert request.state is RequestState.WAITING and request.num_computed_tokens == 0
        params = request.params
        request.longest = request.most_tokens(self.max_model_len)
        request.ends = frozenset(params.stop_token_ids).union(() if params.ignore_eos else self._eos_token_ids)
        try:
            self.limits.check(request)
        except ValueError:
            request.finish_reason = FinishReason.ERROR
            raise
        self._admission.line.join(request)

    def predict_by(self, filling: Filling | None, pays: Callable[[int, int], bool]) -> None:
        """Fills passes, and moves pages where it pays, by these predictions from now on."""
        self.composer.filling, self.cache.host.pays = filling, pays

    @property
    def limits(self) -> Limits:
        """The limits of one request."""
        return Limits(self.max_model_len, self.pool.num_usable, self._retention)

    def abort(self) -> None:
        """Ends every request and forgets the passes under way, one of which has failed, and what they may have left."""
        for request in [*self._admission.line, *self._seats.running.values()]:
            self.finish(request, FinishReason.ABORT)
        self._under_way.clear()
        self.cache.clear()

    def schedule(self) -> Batch | None:
        """The next pass, or None when there is nothing to compute before the next update."""
        rows = self.composer.compose()
        assert rows or self._under_way or not self.has_unfinished, "nothing can run"
        if not rows:
            return None
        self._free_tokens = 0, 0
        self._note_pass()
        return self._put_under_way(rows)

    def _note_pass(self) -> None:
        """Counts the pass that was composed last: who it leaves waiting, and its free tokens, instead of those that it
        had before."""
        self.counts.note_pass(
            self.num_waiting, self._admission.why_waiting() if self.composer.has_room() else Wait.TOKENS
        )
        self.counts.note_free_tokens(self._free_tokens, self.composer.budget.free_tokens)
        self._free_tokens = self.composer.budget.free_tokens

    def _put_under_way(
        self, rows: Sequence[BatchRow], moves: tuple[Move, ...] = (), coming: tuple[Block, ...] = ()
    ) -> Batch:
        """Makes a pass of these rows, with the moves of pages and the blocks that some of them brought with them."""
        batch = Batch.of(rows, (*moves, *self.cache.host.take_moves()), self.cache.num_shared_tokens)
        requests = list(map(self._seats.running.__getitem__, batch.columns.index))
        self._under_way.append(UnderWay(batch, requests, coming + self.cache.take_coming()))
        return batch

    def revise(self, batch: Batch) -> Batch | None:
        """The pass that was scheduled last as it shall run after an update: the same one; or with those that wait and
        fit in now, without those that have ended; or None, if it is not to run: those of its requests that have not
        ended are scheduled anew. That is so if all have ended, or one whose pages others share; if one that waits is so
        urgent that others give way; and if one could enter behind the rest of chunks that were cut. Nobody enters a
        pass with such a chunk otherwise."""
        assert batch is self._under_way[-1].batch, "not the newest batch"
        _, requests, coming = self._under_way[-1]
        ended, going = [], []
        for row, request in zip(batch.rows, requests, strict=True):
            if request.finish_reason is None:
                going.append((row, request))
            else:
                self.composer.budget.give_back(row)
                ended.append(row)
        shared = self.cache.still_coming(coming) if ended else set()
        is_missed = any(self._computes_any(row, shared) for row in ended)
        cut = [(row, request) for row, request in going if not row.samples]
        if not going or is_missed or self._must_start_anew(cut):
            self.withdraw(batch)
            return None
        entered = [] if cut else self.composer.let_in()
        if not entered:
            return batch
        self._under_way.pop()
        for request in requests:
            request.num_under_way -= request.finish_reason is not None
        self.counts.take_pass_back()
        self._note_pass()
        return self._put_under_way([*(row for row, _ in going), *entered], batch.moves, coming)

    def _computes_any(self, row: BatchRow, pages: set[int]) -> bool:
        """Tells whether a row's own tokens lie in any of these pages."""
        return not pages.isdisjoint(row.pages[row.start // self.page_size :])

    def _begins_with_any(self, row: BatchRow, pages: set[int]) -> bool:
        """Tells whether a row that has just been given reads any of these pages, and another one computes it."""
        return row.sampling is not None and not pages.isdisjoint(row.pages[: row.start // self.page_size])

    def _must_start_anew(self, cut: Sequence[tuple[BatchRow, Request]]) -> bool:
        """Tells whether one that waits could enter the last pass only if others in it were changed: who gives way to
        it, or chunks that were cut. Not where their rest would take all the room: a few tokens more are not worth a
        pass that is scheduled anew, for which a GPU waits."""
        if self._admission.must_make_room():
            return self.composer.has_room()
        return bool(cut) and self.composer.has_room(cut) and self._admission.can_admit()

    def withdraw(self, batch: Batch, rows: Collection[int] = ()) -> list[Request]:
        """Takes back the pass that was scheduled last; those of its requests that have not ended are scheduled anew.
        Those that begin with what others were to compute in it wait again. Returns those of `rows`."""
        assert batch is self._under_way[-1].batch, "not the newest batch"
        _, requests, blocks = self._under_way.pop()
        coming = self.cache.still_coming(blocks)
        self.cache.forget_coming(blocks)
        self.cache.host.put_back(batch.moves)
        self.counts.note_free_tokens(self._free_tokens, (0, 0))
        self.counts.take_pass_back()
        for row, request in zip(batch.rows, requests, strict=True):
            request.num_computed_tokens = row.start
            del request.block_numbers[row.start // self.page_size :]
            request.num_tokens_ahead -= row.samples
            request.table_tokens = 0
            request.num_under_way -= 1
            request.is_told &= row.sampling is None
            if request.state is RequestState.RUNNING and self._begins_with_any(row, coming):
                self._admission.take_back(request)
        return [request for row, request in zip(batch.rows, requests) if row.index in rows]

    def scored(self, batch: Batch) -> list[Request | None]:
        """The requests whose prompts the oldest pass under way gives log probabilities of, in batch order; None for one
        that has ended meanwhile."""
        assert self._under_way and batch is self._under_way[0].batch, "not the oldest batch under way"
        both = zip(batch.rows, self._under_way[0].requests, strict=True)
        return [None if request.finish_reason else request for row, request in both if row.scores]

    def update(self, batch: Batch, sampled: Sequence[int]) -> list[Request | None]:
        """Takes in the tokens of the oldest pass under way.

        `sampled` has one token id for each row with `samples`, in batch order; a negative one means that no token
        could be sampled, and ends the request with FinishReason.ERROR. Returns the requests that got the tokens, in
        that order, with None for a request that ended meanwhile; finished ones hold no row and no pages.
        """
        assert self._under_way and batch is self._under_way[0].batch, "not the oldest batch under way"
        assert len(sampled) == batch.num_sampled, f"{len(sampled)} tokens for {batch.num_sampled} rows"
        _, requests, blocks = self._under_way.popleft()
        self.cache.has_come(blocks)
        for row, request in zip(batch.rows, requests) if any(batch.columns.scores) else ():
            if row.scores is not None and request.finish_reason is None:
                request.num_scored_tokens = row.start + row.scores.first + row.num_scored
        tokens, updated = iter(sampled), []
        for request, end, samples in zip(requests, batch.ends, batch.columns.samples, strict=True):
            token = next(tokens) if samples else None
            request.num_under_way -= 1
            if request.finish_reason is not None:
                request = None
            else:
                self._take_in(request, end, token)
            if samples:
                updated.append(request)
        return updated

    def _take_in(self, request: Request, end: int, token: int | None) -> None:
        """Notes that a pass computed a request's tokens up to `end`, and the token that it sampled behind these, if it
        did. What is behind a token that could not be sampled is for nobody else."""
        if token is not None and token < 0:
            self.cache.forget(request.pages)
            self.finish(request, FinishReason.ERROR)
            return
        if len(request.block_numbers) < end // self.page_size and request.row is not None:
            self.cache.enter(request, end)
        if token is None:
            return
        request.output_token_ids.append(token)
        if token in request.ends or end + 1 >= request.longest:
            self._end(request, token)

    def _end(self, request: Request, token: int) -> None:
        """Ends a request by its last token. As in vLLM, a stop token is kept in the output and wins over a length that
        is reached with it."""
        if token in self._eos_token_ids and not request.params.ignore_eos:
            self.finish(request, FinishReason.STOP)
        elif token in request.params.stop_token_ids:
            self.finish(request, FinishReason.STOP, stop_reason=token)
        else:
            self.finish(request, FinishReason.LENGTH)

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a request, waiting or running, and frees its row and pages at once.

        A finished request only gets the new reason: its last token can complete a stop string.
        """
        self._admission.end(request)
        request.finish_reason, request.stop_reason = reason, stop_reason

    def check_integrity(self) -> None:
        """Asserts that rows and pages are each held once, by running requests only, and that what is coming comes with
        passes under way."""
        self._admission.check_integrity()
        self.cache.check_coming(block for under_way in self._under_way for block in under_way.coming)
