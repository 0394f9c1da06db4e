"""Composes a pass: rows of requests that decode, chunks of others, and those that get their rows for it."""

from collections import deque
from collections.abc import Sequence

from penstock.scheduler.batching.admission import Admission
from penstock.scheduler.batching.batch import NO_HISTORY, NO_TOKEN, BatchRow, History, PromptScores, batch_row
from penstock.scheduler.batching.decode_order import keep_order
from penstock.scheduler.batching.filling import Budget, Filling, Queue, Running
from penstock.scheduler.batching.request import ON_DEVICE, Request, RowSampling
from penstock.scheduler.batching.retention import Retention

NEXT = (ON_DEVICE,)  # the tokens of a row whose last one the host has not seen yet


class Composer:
    """Composes passes of at most `most_tokens`, filled as `filling` says, one after another; `budget` is that of the
    last one."""

    def __init__(self, admission: Admission, retention: Retention, most_tokens: int, filling: Filling | None):
        self.most_tokens, self.filling = most_tokens, filling
        self._admission, self._retention, self._seats = admission, retention, admission.seats
        self._running = Running()
        self._decoding: list[Request] = []  # in the last pass, in its order
        self.budget = Budget(most_tokens, (), None)

    def compose(self) -> list[BatchRow]:
        """The rows of the next pass."""
        self._admission.make_room()
        chunks = self._sort_running()
        rows = [self._row(request, request.num_computed_tokens + 1, samples=True) for request in self._decoding]
        self.budget = Budget(self.most_tokens, rows, self.filling, self._seats.cache.num_shared_tokens)
        return rows + self._fill(chunks)

    def let_in(self) -> list[BatchRow]:
        """The rows of those that wait and still enter the last pass."""
        return self._fill(deque())

    def _fill(self, chunks: deque[Request]) -> list[BatchRow]:
        """Lets chunks of these requests and those that wait into the pass as far as it is filled."""
        rows = []
        while (queue := self._queue(chunks)) is not None and self.budget.has_room(queue):
            request = self._next(chunks)
            if request is None:
                break
            start = request.num_computed_tokens
            num_tokens = self.budget.take(request, self._end_of_pass(request) - start, queue)
            end = start + num_tokens
            rows.append(self._row(request, end, samples=end == request.num_tokens_ahead))
            self._seats.cache.announce(request, end)
        return rows

    def _next(self, chunks: deque[Request]) -> Request | None:
        """Takes the first of these requests, or admits one that waits: a more urgent one, or where these are none. None
        if nobody is left that fits."""
        head = self._admission.line.head()
        is_urgent = bool(chunks) and head is not None and head.turn[0] < chunks[0].turn[0]
        admitted = self._admission.admit_next() if is_urgent or not chunks else None
        return admitted or (chunks.popleft() if chunks else None)

    def has_room(self, cut: Sequence[tuple[BatchRow, Request]] = ()) -> bool:
        """Tells whether the last pass has tokens left for one that waits, behind the rest of rows whose chunks were
        `cut`: it comes before those alone that are less urgent."""
        queue, head = self._queue(()), self._admission.line.head()
        if queue is None:
            return False
        return self.budget.has_room(queue, sum(self._rest(*one) for one in cut if one[1].turn[0] <= head.turn[0]))

    def _rest(self, row: BatchRow, request: Request) -> int:
        """The tokens of a request that would follow its chunk if the pass had room for them."""
        return self._retention.pass_end(row.start, request.num_tokens_ahead) - row.start - len(row.tokens)

    def _sort_running(self) -> deque[Request]:
        """Finds the running requests that decode, in an order in which few move (`_decoding`), and returns the others
        that compute: the most urgent first, and prompts before what is computed again."""
        decoding, chunks, num_outputs = [], [], 0
        for request in self._seats.running.values():
            num_to_come = request.longest - request.num_tokens_ahead
            if num_to_come > 0 and request.num_tokens_ahead - request.num_computed_tokens == 1:
                decoding.append(request)
                num_outputs += num_to_come
            elif num_to_come > 0:
                chunks.append(request)
        self._decoding, self._running = keep_order(self._decoding, decoding), Running(len(decoding), num_outputs)
        chunks.sort(key=lambda request: (request.turn[0], request.num_preemptions > 0, request.turn[1]))
        return deque(chunks)

    def _queue(self, chunks: Sequence[Request]) -> Queue | None:
        """These requests, which have their rows, and those that wait and could get one now; None if there is nobody."""
        first = chunks[0] if chunks else self._admission.line.head()
        if first is None:
            return None
        num_done, num_requests = first.num_computed_tokens, len(chunks) + len(self._admission.line)
        if self.filling is not None and not chunks:
            num_done = len(self._seats.find(first)) * self._seats.page_size
        num_fitting = len(chunks) + self._admission.num_fitting
        return Queue.of(first, num_done, num_requests, num_fitting, self._running)

    def _end_of_pass(self, request: Request) -> int:
        """The end of what one pass can compute of a request."""
        return self._retention.pass_end(request.num_computed_tokens, request.num_tokens_ahead)

    def _row(self, request: Request, end: int, samples: bool) -> BatchRow:
        """The row that computes a request up to `end`, behind which it `samples` if no known token is left."""
        start, sampling, history, scores = request.num_computed_tokens, None, NO_HISTORY, None
        num_known = len(request.prompt_token_ids) + len(request.output_token_ids)
        tokens = NEXT if start == num_known else tuple(request.tokens_between(start, end))
        if not request.is_told:
            sampling = RowSampling.of(request)
            history = History.of(request) if sampling.has_penalty else NO_HISTORY
            request.is_told = True
        request.num_computed_tokens = end
        request.num_tokens_ahead += samples
        request.num_under_way += 1
        if end > request.table_tokens:
            self._make_page_table(request, end)
        if request.params.prompt_logprobs is not None:
            scores = _scores(request, start, end)
        pages, num_evicted = request.page_table, request.num_evicted
        return batch_row((request.row, tokens, start, pages, samples, sampling, num_evicted, history, scores))

    def _make_page_table(self, request: Request, end: int) -> None:
        """Makes the request's page table for its first `end` tokens. It serves until they need another page, or until
        some more are evicted."""
        retention, page_size = self._retention, self._seats.page_size
        request.page_table, request.num_evicted = retention.page_table(request.pages, end), retention.num_evicted(end)
        room_tokens = len(request.page_table) * page_size - retention.margin + request.num_evicted
        request.table_tokens = retention.pass_end(end - 1, room_tokens)


def _scores(request: Request, start: int, end: int) -> PromptScores | None:
    """The log probabilities of its prompt that a row of the request's tokens start..end gives, if any."""
    scored, prompt = request.scored_between(start, end), request.prompt_token_ids
    if not scored:
        return None
    following = prompt[end] if end < len(prompt) else NO_TOKEN
    return PromptScores(request.params.prompt_logprobs, scored.start - start, following)
