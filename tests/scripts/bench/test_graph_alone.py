"""The replay of a graph alone: which graph, how often, and where there is none to replay."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from penstock.engine.measure import rates as measure
from penstock.parallel.collectives import Solo

from scripts.bench.graph_alone import NUM_REPLAYS, graph_alone_s

CPU = torch.device("cpu")


def llm_of(runner, done, kind="solo"):
    runner.device, runner.model = CPU, SimpleNamespace(collectives=Solo())
    runner.forget = lambda: done.append("forget")
    engine = SimpleNamespace(launch=SimpleNamespace(kind=kind), worker=SimpleNamespace(runner=runner))
    engine.together = nullcontext
    return SimpleNamespace(engine=engine)


def size_of(num_rows):
    return next(size for size in (1, 2, 4) if size >= num_rows)


def runner_of(done, num_takes=1):
    """Buckets of 2 and 4 rows; of 4 greedy graphs are captured, of which that with room for 8 items ran last."""
    take = SimpleNamespace(graph=SimpleNamespace(replay=lambda: done.append("replay")))
    other = SimpleNamespace(graph=SimpleNamespace(replay=lambda: done.append("other")))
    passes = {((4, 4), frozenset()): [other], ((4, 8), frozenset()): [take] * num_takes}
    passes[(2, 2), frozenset({"draw"})] = [take]
    buckets = {2: SimpleNamespace(key=(2, 2)), 4: SimpleNamespace(key=(4, 8))}
    return SimpleNamespace(size_of=size_of, buckets=buckets, graphs=SimpleNamespace(passes=passes))


def test_a_graph_alone(monkeypatch):
    """The graph is replayed NUM_REPLAYS times in a row, after a replay that lines the ranks up; then its letters are
    forgotten."""
    done = []
    ticks = iter([1.0, 5.0])
    monkeypatch.setattr(measure, "perf_counter", lambda: next(ticks))
    assert graph_alone_s(llm_of(runner_of(done), done), 3) == 4.0 / NUM_REPLAYS
    assert done == ["replay"] * (1 + NUM_REPLAYS) + ["forget"]


def test_none_where_there_is_none():
    """No graphs, none captured of that size, one with a trace's marks, and ranks without a script."""
    done = []
    eager = SimpleNamespace(size_of=size_of, graphs=None)
    for runner, num_rows in ((eager, 3), (runner_of(done), 1), (runner_of(done), 2), (runner_of(done, num_takes=2), 3)):
        assert graph_alone_s(llm_of(runner, done), num_rows) is None
    assert graph_alone_s(llm_of(runner_of(done), done, kind="parent"), 3) is None
    assert done == []
