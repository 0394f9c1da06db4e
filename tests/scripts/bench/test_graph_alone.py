"""The replay of a graph alone: which graph, how often, and where there is none to replay."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from penstock.engine.measure import rates as measure
from penstock.engine.runtime.bucket_sizes import BucketSizes
from penstock.parallel.collectives import Solo

from scripts.bench.graph_alone import NUM_REPLAYS, graph_alone_s

CPU = torch.device("cpu")


def llm_of(runner, done, kind="solo"):
    runner.device, runner.model = CPU, SimpleNamespace(collectives=Solo())
    runner.forget = lambda: done.append("forget")
    engine = SimpleNamespace(launch=SimpleNamespace(kind=kind), worker=SimpleNamespace(runner=runner))
    engine.together = nullcontext
    return SimpleNamespace(engine=engine)


SIZES = BucketSizes(most_tokens=4, max_num_seqs=4)


def runner_of(done, num_takes=1):
    """Buckets of 1, 2, 3 and 4 rows; of 4 a greedy graph is captured."""
    take = SimpleNamespace(graph=SimpleNamespace(replay=lambda: done.append("replay")))
    passes = {(SIZES.of_rows(4), frozenset()): [take] * num_takes, (SIZES.of_rows(2), frozenset({"draw"})): [take]}
    return SimpleNamespace(sizes=SIZES, graphs=SimpleNamespace(passes=passes))


def test_a_graph_alone(monkeypatch):
    """The graph is replayed NUM_REPLAYS times in a row, after a replay that lines the ranks up; then its letters are
    forgotten."""
    done = []
    ticks = iter([1.0, 5.0])
    monkeypatch.setattr(measure, "perf_counter", lambda: next(ticks))
    assert graph_alone_s(llm_of(runner_of(done), done), 4) == 4.0 / NUM_REPLAYS
    assert done == ["replay"] * (1 + NUM_REPLAYS) + ["forget"]


def test_none_where_there_is_none():
    """No graphs, none captured of that size, one with a trace's marks, and ranks without a script."""
    done = []
    eager = SimpleNamespace(sizes=SIZES, graphs=None)
    for runner, num_rows in ((eager, 4), (runner_of(done), 2), (runner_of(done, num_takes=2), 4)):
        assert graph_alone_s(llm_of(runner, done), num_rows) is None
    assert graph_alone_s(llm_of(runner_of(done), done, kind="parent"), 4) is None
    assert done == []
