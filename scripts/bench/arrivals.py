"""Requests that arrive one after another: when they do, when their tokens come, and the latencies that users feel.

Names and meaning are those of `vllm bench serve`. It imports nothing of ours, so that the process in which vLLM runs
can serve by the same loop.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise


def arrival_times(num_requests: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which requests arrive, `rate` of them a second. The gaps are gamma distributed: with a
    burstiness of 1 as in a Poisson process, below it in bursts, above it more evenly. The last one comes after exactly
    num_requests / rate seconds."""
    rng, now, times = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        now += rng.gammavariate(burstiness, 1.0)
        times.append(now)
    return [one * num_requests / (rate * now) for one in times]


def serve(
    arrivals: Sequence[float],
    add: Callable[[int], None],
    is_busy: Callable[[], bool],
    step: Callable[[], Iterable[tuple[int, int]]],
    hear: Callable[[Callable[[], None]], None] = lambda receive: None,
) -> list[list[float]]:
    """Adds each request when its time has come, and steps while there is anything to do.

    `step` returns the requests that may have new tokens, each with the number of all its tokens. `hear` is given what
    adds those whose time has come, for a step to call where it can still take them. Returns the seconds from the start
    at which the tokens of each request came.
    """
    start, coming = time.perf_counter(), deque(sorted(range(len(arrivals)), key=arrivals.__getitem__))
    times: list[list[float]] = [[] for _ in arrivals]

    def receive() -> None:
        while coming and arrivals[coming[0]] <= time.perf_counter() - start:
            add(coming.popleft())

    hear(receive)
    while coming or is_busy():
        receive()
        if not is_busy():
            time.sleep(max(start + arrivals[coming[0]] - time.perf_counter(), 0.0))
            continue
        news = step()
        now = time.perf_counter() - start
        for index, num_tokens in news:
            times[index] += [now] * (num_tokens - len(times[index]))
    return times


def latency_fields(arrivals: Sequence[float], times: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean, median and 99th percentile, in ms, of the time to first token (ttft), a request's mean time between tokens
    (tpot), that between any two tokens (itl), and from arrival to last token (e2el). Each request has at least one
    token."""
    figures = {
        "ttft": [one[0] - arrival for arrival, one in zip(arrivals, times)],
        "tpot": [(one[-1] - one[0]) / (len(one) - 1) for one in times if len(one) > 1],
        "itl": [after - before for one in times for before, after in pairwise(one)],
        "e2el": [one[-1] - arrival for arrival, one in zip(arrivals, times)],
    }
    fields = {}
    for name, values in figures.items():
        values = sorted(1e3 * value for value in values) or [0.0]
        fields[f"mean_{name}_ms"] = sum(values) / len(values)
        fields[f"median_{name}_ms"] = percentile(values, 50)
        fields[f"p99_{name}_ms"] = percentile(values, 99)
    return fields


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of values in order, interpolated between two of them as numpy does."""
    at = (len(ordered) - 1) * percent / 100
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)
