"""In which order waiting requests get a row. A policy is one function and one entry of POLICIES.

The function gives a request's sort key; the least key is served first. A key must not change while the
request waits. The head of the line is never overtaken because a later, smaller request would fit: a policy
whose keys do not favour newcomers forever starves nobody.
"""

from collections.abc import Callable

from scheduler.request import Request


def first_come_first_served(request: Request) -> tuple[float, int]:
    return request.arrival, request.id


POLICIES: dict[str, Callable[[Request], tuple]] = {
    "fcfs": first_come_first_served,
}
