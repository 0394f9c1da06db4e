"""The order of the rows of a pass that decode: few of them move from pass to pass, since what is sent of a row that
stays where it was is little."""

from collections import deque
from collections.abc import Sequence

from penstock.scheduler.batching.request import Request


def keep_order(before: Sequence[Request], now: Sequence[Request]) -> list[Request]:
    """Those of `now` in an order in which few have moved since `before`: where one has ended a new one stands there,
    else the last one."""
    here, old = set(now), set(before)
    if here == old:
        return list(before)
    left, new = deque(before), deque(request for request in now if request not in old)
    ordered: list[Request] = []
    while left:
        request = left.popleft()
        if request not in here:
            while left and left[-1] not in here:
                left.pop()
            if not (new or left):
                break
            request = new.popleft() if new else left.pop()
        ordered.append(request)
    return [*ordered, *new]
