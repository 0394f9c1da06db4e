"""Requests that arrive at a rate: their times, the loop that adds them, and their latencies."""

import statistics
import time
from itertools import pairwise

import numpy
import pytest

from scripts.bench.arrivals import arrival_times, latency_fields, serve


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_their_mean_and_their_deviation(burstiness):
    times = arrival_times(20_000, 10.0, burstiness, seed=1)
    gaps = [after - before for before, after in pairwise([0.0, *times])]
    assert times[-1] == pytest.approx(2000.0) and min(gaps) >= 0
    assert statistics.pstdev(gaps) * 10.0 == pytest.approx(burstiness**-0.5, rel=0.05)
    assert times == arrival_times(20_000, 10.0, burstiness, seed=1) != arrival_times(20_000, 10.0, burstiness, seed=2)


@pytest.mark.parametrize("hears", [False, True])
def test_requests_are_added_when_their_time_has_come(hears, monkeypatch):
    """Over a clock that only sleeping and stepping moves: three tokens a request, a second a step, the first half of
    which it rests if it hears."""
    clock = {"now": 100.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.update(now=clock["now"] + seconds))
    tokens, added, heard = {}, [], []

    def add(index: int) -> None:
        tokens[index] = 0
        added.append((index, clock["now"] - 100.0))

    def step() -> list[tuple[int, int]]:
        for receive in heard:
            clock["now"] += 0.5
            receive()
        clock["now"] += 0.5 if heard else 1.0
        tokens.update({index: num + 1 for index, num in tokens.items()})
        news = list(tokens.items())
        for index in [index for index, num in news if num == 3]:
            del tokens[index]
        return news

    times = serve([9.0, 0.5, 0.75], add, lambda: bool(tokens), step, *([heard.append] if hears else []))
    assert added == [(1, 0.5), (2, 1.0 if hears else 1.5), (0, 9.0)]
    second = [1.5, 2.5, 3.5] if hears else [2.5, 3.5, 4.5]
    assert times == [[10.0, 11.0, 12.0], [1.5, 2.5, 3.5], second]


def test_latencies_are_those_of_their_definitions():
    arrivals = [0.5, 1.0, 4.0]
    times = [[1.0, 1.5, 3.0], [1.25], [4.5, 4.75]]
    fields = latency_fields(arrivals, times)
    samples = {"ttft": [0.5, 0.25, 0.5], "tpot": [1.0, 0.25], "itl": [0.5, 1.5, 0.25], "e2el": [2.5, 0.25, 0.75]}
    for name, values in samples.items():
        assert fields[f"mean_{name}_ms"] == pytest.approx(1e3 * numpy.mean(values))
        assert fields[f"median_{name}_ms"] == pytest.approx(1e3 * numpy.percentile(values, 50))
        assert fields[f"p99_{name}_ms"] == pytest.approx(1e3 * numpy.percentile(values, 99))


def test_single_tokens_have_no_gaps():
    assert latency_fields([0.0], [[2.0]])["p99_itl_ms"] == 0.0
