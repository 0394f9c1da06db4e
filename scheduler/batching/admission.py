"""Who gets a row and pages, who waits for them, and who gives them back to others."""

from penstock.scheduler.batching.counts import Counts, Wait
from penstock.scheduler.batching.preemption import next_victim, victims_for
from penstock.scheduler.batching.request import Request, RequestState
from penstock.scheduler.batching.seats import Seats
from penstock.scheduler.batching.waiting import Line


class Admission:
    """Moves requests between the line and the seats. What it does is in `counts`."""

    def __init__(self, line: Line, seats: Seats):
        self.line, self.seats, self.counts = line, seats, Counts()

    def make_room(self) -> None:
        """Before a pass: gives each running request the page of its next token, and lets in who is more urgent than
        some who run. Where there is none left, one of them gives way."""
        for request in list(self.seats.running.values()):
            if request.num_tokens_ahead > request.num_places and not self.ends_by_itself(request):
                self._grow(request)
        while (urgent := self.line.head()) is not None and self._let_in(urgent):
            pass

    def _grow(self, request: Request) -> None:
        while request.row is not None and not self.seats.num_free_pages:
            self._preempt(next_victim(self.seats, request))
        if request.row is not None:
            self.seats.grow(request, 1)

    def _let_in(self, urgent: Request) -> bool:
        """Admits a waiting request if others give way to it."""
        victims = victims_for(self.seats, urgent)
        for victim in victims:
            self._preempt(victim)
        if victims:
            self._admit(urgent)
        return bool(victims)

    def admit_next(self) -> Request | None:
        """Admits the head of the line; None if it does not fit."""
        head = self.line.head()
        if head is None or not self.seats.fits(head):
            return None
        self._admit(head)
        return head

    def can_admit(self) -> bool:
        """Tells whether the head of the line could be admitted now."""
        head = self.line.head()
        return head is not None and (self.seats.fits(head) or bool(victims_for(self.seats, head)))

    def why_waiting(self) -> Wait:
        """What the head of the line lacks, but for a pass's tokens."""
        return Wait.PAGES if self.seats.free_rows else Wait.ROWS

    def end(self, request: Request) -> None:
        """Takes a request, waiting or running, out of line or seat."""
        if request.state is RequestState.WAITING:
            self.line.leave(request)
        elif request.state is RequestState.RUNNING:
            self.seats.leave(request)

    def ends_by_itself(self, request: Request) -> bool:
        """Tells whether the request's last token is under way."""
        return request.num_tokens_ahead >= request.most_tokens(self.seats.max_model_len)

    def _admit(self, request: Request) -> None:
        self.line.leave(request)
        self.seats.take(request)
        self.counts.num_recomputed_tokens += request.num_lost_tokens
        request.num_lost_tokens = 0

    def _preempt(self, request: Request) -> None:
        self.counts.num_preemptions += 1
        request.num_preemptions += 1
        request.num_lost_tokens, request.num_computed_tokens = request.num_computed_tokens, 0
        self.seats.leave(request)
        self.line.rejoin(request)

    def check_integrity(self) -> None:
        """Asserts that rows and pages are each held once, by running requests only."""
        self.seats.check_integrity()
        assert all(one.state is RequestState.WAITING and not one.pages for one in self.line)
