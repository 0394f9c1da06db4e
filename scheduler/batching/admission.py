"""Decides who gets a row and pages, who waits for them, and who gives them back to others."""

from penstock.scheduler.batching.counts import Counts, Wait
from penstock.scheduler.batching.preemption import next_victim, victims_for
from penstock.scheduler.batching.request import Request, RequestState
from penstock.scheduler.batching.seats import HEADROOM, Seats
from penstock.scheduler.batching.waiting import Line


class Admission:
    """Moves requests between the line and the seats. What it does is in `counts`."""

    def __init__(self, line: Line, seats: Seats):
        self.line, self.seats, self.counts = line, seats, Counts()

    def make_room(self) -> None:
        """Before a pass: gives each running request the page of its next token, and lets in who is more urgent than
        some who run. Where there is none left, one of them gives way."""
        full = [one for one in self.seats.running.values() if one.num_computed_tokens == one.room_tokens]
        growing = [one for one in full if not one.ends_by_itself]
        num_free = self.seats.num_free_pages
        self.seats.grow(growing[:num_free])
        for request in growing[num_free:]:
            self._grow(request)
        while (urgent := self.line.head()) is not None and self._let_in(urgent):
            pass

    def _grow(self, request: Request) -> None:
        while request.row is not None and not self.seats.num_free_pages:
            self._preempt(next_victim(self.seats, request))
        if request.row is not None:
            self.seats.grow([request])

    def _let_in(self, urgent: Request) -> bool:
        """Admits a waiting request if others give way to it."""
        victims = victims_for(self.seats, urgent)
        for victim in victims:
            self._preempt(victim)
        return bool(victims) and self._admit(urgent, headroom=0)

    def admit_next(self) -> Request | None:
        """Admits the head of the line; None if it does not fit."""
        head = self.line.head()
        return head if head is not None and self._admit(head) else None

    def can_admit(self) -> bool:
        """Tells whether the head of the line could be admitted now."""
        head = self.line.head()
        return head is not None and (self.seats.offer(head) is not None or self.must_make_room())

    def must_make_room(self) -> bool:
        """Tells whether the head of the line is so urgent that others give way to it."""
        head = self.line.head()
        return head is not None and bool(victims_for(self.seats, head))

    @property
    def num_fitting(self) -> int:
        """About how many of those that wait could get a row now, if all needed as many pages as the first; at least
        that one."""
        head = self.line.head()
        if head is None:
            return 0
        most = self.seats.num_free_pages // max(self.seats.first_pages(head), 1)
        return max(min(len(self.line), len(self.seats.free_rows), most), 1)

    def why_waiting(self) -> Wait:
        """The thing that the head of the line lacks, but for a pass's tokens."""
        return Wait.PAGES if self.seats.free_rows else Wait.ROWS

    def end(self, request: Request) -> None:
        """Takes a request, waiting or running, out of line or seat."""
        if request.state is RequestState.WAITING:
            self.line.leave(request)
        elif request.state is RequestState.RUNNING:
            self.seats.leave(request)

    def _admit(self, request: Request, headroom: int = HEADROOM) -> bool:
        """Gives a waiting request its row, if it fits."""
        blocks = self.seats.offer(request, headroom)
        if blocks is None:
            return False
        self.line.leave(request)
        self.seats.take(request, blocks)
        self._count(request, 1)
        return True

    def _count(self, request: Request, times: int) -> None:
        """Counts a request that has got its row; with -1 that it had not."""
        if request.num_preemptions:
            self.counts.num_recomputed_tokens += times * max(request.num_lost_tokens - request.num_computed_tokens, 0)
        else:
            self.counts.num_asked_tokens += times * request.num_tokens
            self.counts.num_hit_tokens += times * request.num_computed_tokens

    def take_back(self, request: Request) -> None:
        """Lets a request wait again that has just got its row, and of which nothing has been computed in it."""
        self._count(request, -1)
        if request.num_preemptions == 0:
            request.num_cached_tokens = None
        request.num_computed_tokens = 0
        self.seats.leave(request)
        self.line.rejoin(request)

    def _preempt(self, request: Request) -> None:
        self.counts.note_preemption()
        request.num_preemptions += 1
        request.num_lost_tokens, request.num_computed_tokens = request.num_computed_tokens, 0
        self.seats.leave(request)
        self.line.rejoin(request)

    def check_integrity(self) -> None:
        """Asserts that rows and pages are each held once, by running requests only."""
        self.seats.check_integrity()
        assert all(one.state is RequestState.WAITING and not one.pages for one in self.line)
