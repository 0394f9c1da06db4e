"""The replay of a graph alone: which graph, how often, and where there is none to replay."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from penstock.engine.compute.sampler import EVERYTHING, Asked
from penstock.engine.measure import rates as measure
from penstock.engine.runtime.bucket_sizes import BucketSize
from penstock.parallel.collectives import Solo

from scripts.bench.graph_alone import LEAST_REPLAYS, MOST_S, NUM_REPLAYS, graph_alone_s

CPU = torch.device("cpu")
GREEDY = Asked()


def llm_of(runner, done, kind="solo"):
    runner.device, runner.model = CPU, SimpleNamespace(collectives=Solo())
    runner.forget = lambda: done.append("forget")
    engine = SimpleNamespace(launch=SimpleNamespace(kind=kind), worker=SimpleNamespace(runner=runner))
    engine.together = nullcontext
    return SimpleNamespace(engine=engine)


def runner_of(done, num_takes=1, asked=GREEDY, num_rows=4):
    """A graph of a decode pass of a bucket ran last."""
    take = SimpleNamespace(graph=SimpleNamespace(replay=lambda: done.append("replay")))
    key = (BucketSize(num_rows, num_rows, 0, num_rows, num_rows), asked)
    return SimpleNamespace(graphs=SimpleNamespace(passes={key: [take] * num_takes}, latest=key))


@pytest.mark.parametrize(("first_s", "number"), [(0.01, NUM_REPLAYS), (MOST_S / 5, 5), (MOST_S, LEAST_REPLAYS)])
def test_a_graph_alone(monkeypatch, first_s, number):
    """It is replayed in a row, after a replay that is timed and one that lines the ranks up; then its letters are
    forgotten."""
    done = []
    ticks = iter([0.0, first_s, 1.0, 5.0])
    monkeypatch.setattr(measure, "perf_counter", lambda: next(ticks))
    assert graph_alone_s(llm_of(runner_of(done), done), 4) == 4.0 / number
    assert done == ["replay"] * (2 + number) + ["forget"]


def test_none_where_there_is_none():
    """No graphs, none that ran, another size, a sampled pass, one with a trace's marks, and ranks without a script."""
    done = []
    eager, fresh = SimpleNamespace(graphs=None), SimpleNamespace(graphs=SimpleNamespace(latest=None))
    drawn, marked = runner_of(done, asked=EVERYTHING), runner_of(done, num_takes=2)
    for runner, num_rows in (
        (eager, 4),
        (fresh, 4),
        (runner_of(done), 2),
        (runner_of(done), 5),
        (drawn, 4),
        (marked, 4),
    ):
        assert graph_alone_s(llm_of(runner, done), num_rows) is None
    assert graph_alone_s(llm_of(runner_of(done), done, kind="parent"), 4) is None
    assert done == []
