"""Decides who gives way: whose row and pages others get when there are none left.

The one with the least computed work, since all of it is computed again: of those who are no more urgent than the one
that needs it. Nobody gives way twice without a token between, so all get on: a request that has got its row has the
pages for a token, and one that needs a page more has had one.
"""

from collections import Counter
from collections.abc import Iterable

from penstock.scheduler.batching.request import Request
from penstock.scheduler.batching.seats import Seats


def next_victim(seats: Seats, needy: Request) -> Request:
    """The request that gives way so that `needy`, a running one, can grow; it may be `needy` itself."""
    return min(_candidates(seats, needy.turn[0]), key=_reluctance)


def victims_for(seats: Seats, urgent: Request) -> list[Request]:
    """The running requests that give way to a waiting one that is more urgent: as few as make it fit. Empty where none
    need to, where all of them would not be enough, or where `urgent` cannot run yet."""
    candidates = sorted(_candidates(seats, urgent.turn[0] + 1), key=_reluctance)
    if not candidates or urgent.num_under_way or seats.offer(urgent) is not None:
        return []
    found = {block.page for block in seats.find(urgent) if block.page is not None}
    num_missing = seats.first_pages(urgent) - seats.num_free_pages
    num_missing -= sum(not seats.cache.is_idle(page) for page in found)
    victims: list[Request] = []
    left: Counter[int] = Counter()  # how many holders a page loses
    for victim in candidates:
        victims.append(victim)
        own = [page for page in victim.pages if page not in found]
        left.update(own)
        num_missing -= sum(left[page] == seats.cache.num_holders(page) for page in own)
        if num_missing <= 0:
            return victims
    return []


def _candidates(seats: Seats, urgency: int) -> Iterable[Request]:
    """Running requests that may give way to one of this urgency. Those whose last token is under way end by
    themselves."""
    return (
        request
        for request in seats.running.values()
        if request.turn[0] >= urgency and request.may_give_way and not request.ends_by_itself
    )


def _reluctance(request: Request) -> tuple:
    """The least gives way first: the least urgent, then the least computed, then the latest."""
    urgency, arrival = request.turn
    return -urgency, request.num_computed_tokens, -arrival
