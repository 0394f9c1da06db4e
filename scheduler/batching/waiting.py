"""The line of the requests that wait for a row, by policy.

A request keeps its turn for life: one that has given way comes before all that came later.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator

from penstock.scheduler.batching.request import Request

# How urgent a request is, by the name of the policy: the lowest number is served first. Among equals, who came first.
POLICIES: dict[str, Callable[[Request], int]] = {
    "fcfs": lambda request: 0,
    "priority": lambda request: request.params.priority,
}


class Line:
    """Requests in the order in which they are served. To leave costs O(1), to come or be served O(log n) at most."""

    def __init__(self, policy: str):
        self._urgency = POLICIES[policy]
        self._arrivals = itertools.count()
        self._waiting: dict[Request, None] = {}
        self._heap: list[tuple[tuple[int, int], Request]] = []  # some of these have left

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        """Those that wait, in no order."""
        return iter(self._waiting)

    def join(self, request: Request) -> None:
        """Gives a new request its turn, and lets it wait."""
        request.turn = self._urgency(request), next(self._arrivals)
        self.rejoin(request)

    def rejoin(self, request: Request) -> None:
        """Lets a request wait for the turn that it has."""
        self._waiting[request] = None
        heapq.heappush(self._heap, (request.turn, request))

    def leave(self, request: Request) -> None:
        del self._waiting[request]
        if len(self._heap) > 2 * len(self._waiting) + 16:  # so that those who left take no memory
            self._heap = [(waiting.turn, waiting) for waiting in self._waiting]
            heapq.heapify(self._heap)

    def head(self) -> Request | None:
        """The request that is served next."""
        while self._heap and self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None
