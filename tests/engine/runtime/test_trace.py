"""Intervals and counts of captured passes without a GPU: streams and events that follow CUDA's rules of capture; a
clock.

The rules: an external event may be recorded only on a stream that is part of the capture, which a stream is from its
first wait for an event of the capture on; when capture ends, every stream must have been joined. An event that is a
node gets its time anew at each replay.
"""

import contextlib
import functools
from collections import Counter

import pytest
import torch
from penstock.engine.runtime.graph import Graphs
from penstock.engine.runtime.lanes import CudaLanes
from penstock.engine.runtime.trace import Trace, read_intervals, write_trace
from penstock.engine.runtime.trace import chrome_events as as_events
from penstock.engine.runtime.watch import Watches
from penstock.parallel.ledger import Site, Transfer, TransferLedger
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.passes.build import lay_out_ring, make_plan
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY, Compute, GroupId, Prefetch

BATCH = Batch((BatchRow(0, (5,), 0, (1,), samples=True, sampling=None),))
STEP_MS, COPY_MS = 1.0, 5.0


class Device:
    """All that torch.cuda is asked for. Work is a list of closures in one order, and runs as far as is waited for."""

    def __init__(self):
        self.now_ms, self.work, self.capturing = 0.0, [], None
        self.main, self.copy = Stream(self), Stream(self)
        self.current = self.main

    def enqueue(self, what):
        (self.work if self.capturing is None else self.capturing.work).append(what)

    def synchronize(self, until=lambda: False):
        while self.work and not until():
            self.work.pop(0)()

    def begin_capture(self, graph):
        self.capturing, self.main.is_captured = graph, True

    def end_capture(self):
        assert not self.copy.is_captured or self.copy.is_joined, "unjoined work on the copy stream"
        self.capturing = None
        self.main.is_captured = self.copy.is_captured = False

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def run(self, milliseconds):
        self.enqueue(lambda: setattr(self, "now_ms", self.now_ms + milliseconds))


class Stream:
    def __init__(self, device):
        self.device, self.is_captured, self.is_joined = device, False, True

    def wait_event(self, event):
        self.is_captured |= event.is_captured
        if event.stream is not self:
            event.stream.is_joined = True

    def wait_stream(self, _):
        """Work runs in one order anyway."""

    def synchronize(self):
        self.device.synchronize()


def event_type(device):
    class Event:
        def __init__(self, enable_timing=False, external=False):
            self.timed, self.external, self.at_ms, self.num_ahead = enable_timing, external, None, 0

        def record(self, stream):
            capturing = device.capturing is not None
            assert not self.external or (capturing and stream.is_captured), "invalid outside of the capture"
            assert not self.timed or self.external == capturing
            self.stream, self.is_captured, stream.is_joined = stream, stream.is_captured, False
            if capturing:
                device.capturing.events.append(self)
            else:
                self.num_ahead += 1
            device.enqueue(self.happen)

        def happen(self):
            self.at_ms, self.num_ahead = device.now_ms, self.num_ahead - 1

        def synchronize(self):
            assert not self.is_captured, "an event of a graph cannot be waited for"
            device.synchronize(until=lambda: self.num_ahead == 0)

        def elapsed_time(self, end):
            assert self.num_ahead == end.num_ahead == 0, "its time may be overwritten while it is read"
            return end.at_ms - self.at_ms

    return Event


def graph_type(device):
    class Graph:
        def __init__(self):
            self.work, self.events = [], []

        def capture_begin(self, **_):
            device.begin_capture(self)

        def capture_end(self):
            device.end_capture()

        def reset(self):
            self.work = None

        def replay(self):
            device.work += self.work
            for event in self.events:
                event.num_ahead += 1

    return Graph


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", event_type(device))
    streams = iter([device.copy, device.main])  # that of the copy lane, and then that of captures
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: next(streams))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph_type(device))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: device.current)
    monkeypatch.setattr(torch.cuda, "stream", device.on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.capturing is not None)
    monkeypatch.delattr(torch.cuda, "synchronize")
    return device


def streamed_plan():
    groups = [GroupId(i, "attn") for i in range(4)]
    steps = [Compute("read", g.layer_idx, g, ()) for g in groups]
    return make_plan(steps, lay_out_ring([(g, 1000) for g in groups], 2000))


def run_pass(device, lanes, plan, watches):
    def run(instruction):
        if isinstance(instruction, Compute | Prefetch):
            device.run(STEP_MS if isinstance(instruction, Compute) else COPY_MS)

    lanes.run(plan.instructions, lambda instruction: watches.around(instruction, None, lambda: run(instruction)))


def captured(device, watches, plan):
    lanes, graphs = CudaLanes(torch.device("cuda")), Graphs(torch.device("cuda"), watches)
    run = functools.partial(run_pass, device, lanes, plan, watches)
    graphs.capture("decode", run, run, counts=[])  # a warm-up, then the pass
    return lanes, graphs


def replay(graphs, key):
    take = graphs.next_take(key)
    take.graph.replay()
    take.note_replay(graphs.watches)


def test_an_error_drops_the_graph_that_was_captured(device, monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda kind=torch.cuda.CUDAGraph: made.append(kind()) or made[-1])

    def fail() -> None:
        raise KeyError("the shard is bent")

    graphs = Graphs(torch.device("cuda"), Watches())
    with pytest.raises(KeyError):
        graphs.capture("decode", None, fail, counts=[])
    assert [graph.work for graph in made] == [None] and not graphs.passes


@pytest.mark.parametrize("traced", [False, True])  # a trace wants a pass captured twice
def test_replays_count_what_their_capture_did(device, traced):
    """A counter and a ledger alike; neither a warm-up nor a capture counts, and each graph adds its own."""
    watches = Watches(*[Trace(torch.device("cuda"))] * traced)
    graphs, steps, ledger = Graphs(torch.device("cuda"), watches), Counter(head=5), TransferLedger()
    attn, reduce = Site("attn", 0), Site("attn_allreduce", -1)
    ledger.add(attn, 100)

    def count(nbytes: int) -> None:
        steps["attention"] += 1
        for _ in range(2):
            ledger.add(attn, 100)
        ledger.add(reduce, nbytes)

    for nbytes in (8, 16):
        graphs.capture(nbytes, *[lambda nbytes=nbytes: count(nbytes)] * 2, counts=[steps, ledger])
    assert steps == Counter(head=5) and ledger.sites == {attn: Transfer(1, 100)}
    for nbytes in (8, 16, 16):
        watches.begin_pass(BATCH)
        replay(graphs, nbytes)
    assert steps == Counter(head=5, attention=3)
    assert ledger.sites == {attn: Transfer(7, 700), reduce: Transfer(3, 40)}
    ledger.clear()  # in place: graphs go on counting into it
    for _ in range(2):
        watches.begin_pass(BATCH)
        replay(graphs, 8)
    assert ledger.sites == {attn: Transfer(4, 400), reduce: Transfer(2, 16)}


def test_passes_that_follow_each_other_are_read_while_later_ones_run(device):
    """Eager passes beside replays, all but the first enqueued before the one before it has ended."""
    trace, plan = Trace(torch.device("cuda")), streamed_plan()
    lanes, graphs = captured(device, Watches(trace), plan)
    assert [len(graphs.passes[key]) for key in graphs.passes] == [2]
    kinds = ["graph", "graph", "graph", "eager", "graph", "eager", "eager", "graph", "graph"]
    for index, kind in enumerate(kinds):
        trace.begin_pass(BATCH)
        if kind == "graph":
            replay(graphs, "decode")
            assert {interval.pass_index for interval in trace.known} == set(range(index))
            assert len(device.work) >= len(plan.instructions) or index == 0, "the pass just launched was waited for"
        else:
            run_pass(device, lanes, plan, trace)
        device.run(index)  # between the passes
    device.synchronize()
    intervals = trace.intervals()
    assert intervals == trace.intervals()
    assert [interval.pass_index for interval in intervals] == [i for i in range(len(kinds)) for _ in plan.instructions]
    for index in range(len(kinds)):
        mine = [interval for interval in intervals if interval.pass_index == index]
        assert [s.name.split()[0] for s in mine] == [str(i).split()[0] for i in plan.instructions]
        times = {lane: [s.end_s - s.start_s for s in mine if s.lane == lane] for lane in (COMPUTE, COPY)}
        assert times[COPY] == pytest.approx([COPY_MS / 1e3] * len(times[COPY]))
        compute = [s for s in mine if s.lane == COMPUTE]
        assert all(a.end_s == pytest.approx(b.start_s) for a, b in zip(compute, compute[1:], strict=False))
    starts = [min(s.start_s for s in intervals if s.pass_index == index) for index in range(len(kinds))]
    whole_s = (4 * STEP_MS + len(times[COPY]) * COPY_MS) / 1e3
    gaps_s = [b - a - whole_s for a, b in zip(starts, starts[1:], strict=False)]
    assert gaps_s == pytest.approx([index / 1e3 for index in range(len(kinds) - 1)])


def test_a_warm_up_and_captures_leave_no_intervals(device):
    trace = Trace(torch.device("cuda"))
    trace.begin_pass(BATCH)
    plan = streamed_plan()
    _, graphs = captured(device, Watches(trace), plan)
    device.synchronize()
    assert trace.intervals() == []
    for take in graphs.passes["decode"]:
        assert [mark.instruction for ((_, marks),) in [take.watched] for mark in marks] == list(plan.instructions)


def test_without_a_trace_nothing_is_marked_and_a_pass_is_captured_once(device):
    _, graphs = captured(device, Watches(), streamed_plan())
    replay(graphs, "decode")
    (only,) = graphs.passes["decode"]
    assert only.watched == []


def test_copies_that_fill_the_ring_belong_to_no_pass(device):
    trace, plan = Trace(torch.device("cuda")), streamed_plan()
    lanes = CudaLanes(torch.device("cuda"))
    for batch, instructions in ((None, plan.prologue), (BATCH, plan.instructions), (None, plan.prologue)):
        trace.begin_pass(batch)
        lanes.run(instructions, lambda instruction: trace.around(instruction, None, lambda: None))
    device.synchronize()
    indices = [-1] * len(plan.prologue) + [0] * len(plan.instructions) + [-1] * len(plan.prologue)
    assert [interval.pass_index for interval in trace.intervals()] == indices and trace.shapes == [BATCH.shape]


def test_intervals_come_back_from_the_file(tmp_path):
    trace = Trace(torch.device("cpu"))
    trace.begin_pass(BATCH)
    for instruction in streamed_plan().instructions:
        trace.around(instruction, None, lambda: None)
    file = str(tmp_path / "trace.json")
    write_trace(file, as_events(trace.intervals(), "rank 1", pid=2) + as_events(trace.intervals()[:3], "rank 1", pid=3))
    back = read_intervals(file)
    assert back.keys() == {(1, False), (1, True)} and len(back[1, True]) == 3
    for ours, other in zip(back[1, False], trace.intervals(), strict=True):
        assert (ours.pass_index, ours.lane, ours.name) == (other.pass_index, other.lane, other.name)
        assert (ours.start_s, ours.end_s) == pytest.approx((other.start_s, other.end_s))
