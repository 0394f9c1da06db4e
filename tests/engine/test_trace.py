"""Spans of captured passes without a GPU: streams and events that follow CUDA's rules of capture, and a clock.

The rules: an external event may be recorded only on a stream that is part of the capture, which a stream is from its
first wait for an event of the capture on; when capture ends, every stream must have been joined. An event that is a
node gets its time anew at each replay.
"""

import contextlib

import pytest
import torch

from engine.runtime.lanes import CudaLanes
from engine.runtime.trace import RecordingTracer, Tracer, read_spans, write_trace
from engine.runtime.trace import chrome_events as as_events
from scheduler.pass_work import PassShape
from scheduler.plan_build import lay_out_ring, make_plan
from scheduler.step_plan import COMPUTE, COPY, Compute, GroupId, Prefetch

SHAPE = PassShape(1, 1, 0)
STEP_MS, COPY_MS = 1.0, 5.0


class Device:
    """All that torch.cuda is asked for. Work is a list of (stream, what) and runs when the device is waited for."""

    def __init__(self):
        self.now_ms, self.work, self.graph, self.graph_work = 0.0, [], None, None
        self.main, self.copy = Stream(self), Stream(self)
        self.current = self.main

    def enqueue(self, what):
        (self.work if self.graph_work is None else self.graph_work).append(what)

    def synchronize(self, _=None):
        for what in self.work:
            what()
        self.work = []

    @contextlib.contextmanager
    def capture(self):
        self.graph_work, self.main.is_captured = [], True
        yield
        assert not self.copy.is_captured or self.copy.is_joined, "unjoined work on the copy stream"
        self.graph, self.graph_work = self.graph_work, None
        self.main.is_captured = self.copy.is_captured = False

    def replay(self):
        self.work += self.graph

    def run(self, milliseconds):
        self.enqueue(lambda: setattr(self, "now_ms", self.now_ms + milliseconds))


class Stream:
    def __init__(self, device):
        self.device, self.is_captured, self.is_joined = device, False, True

    def wait_event(self, event):
        self.is_captured |= event.is_captured
        if event.stream is not self:
            event.stream.is_joined = True


def event_type(device):
    class Event:
        def __init__(self, enable_timing=False, external=False):
            self.timed, self.external, self.at_ms = enable_timing, external, None

        def record(self, stream):
            capturing = device.graph_work is not None
            assert not self.external or (capturing and stream.is_captured), "invalid outside of the capture"
            assert not self.timed or self.external == capturing
            self.stream, self.is_captured, stream.is_joined = stream, stream.is_captured, False
            device.enqueue(lambda: setattr(self, "at_ms", device.now_ms))

        def elapsed_time(self, end):
            return end.at_ms - self.at_ms

    return Event


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", event_type(device))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: device.copy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: device.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.graph_work is not None)
    return device


def streamed_plan():
    groups = [GroupId(i, "attn") for i in range(4)]
    steps = [Compute("read", g.layer_idx, g, ()) for g in groups]
    return make_plan(steps, lay_out_ring([(g, 1000) for g in groups], 2000))


def run_pass(device, lanes, plan):
    def do(instruction):
        if isinstance(instruction, Compute | Prefetch):
            device.run(STEP_MS if isinstance(instruction, Compute) else COPY_MS)

    lanes.run(plan.instructions, do)


def test_a_graph_s_marks_are_its_nodes_and_are_read_after_each_replay(device):
    tracer = RecordingTracer(torch.device("cuda"))
    lanes, plan = CudaLanes(torch.device("cuda"), tracer), streamed_plan()
    tracer.begin_pass(SHAPE)
    with tracer.aside():
        run_pass(device, lanes, plan)  # a warm-up
    with tracer.aside() as marks, device.capture():
        run_pass(device, lanes, plan)
    assert [mark.instruction for mark in marks] == list(plan.instructions)
    for index in range(2):
        if index:
            tracer.begin_pass(SHAPE)
        device.replay()
        tracer.replayed(marks)
        device.run(100.0)  # between the passes
    tracer.begin_pass(SHAPE)
    run_pass(device, lanes, plan)  # an eager one after them
    device.synchronize()
    spans = tracer.spans()
    assert [span.pass_index for span in spans] == [i for i in range(3) for _ in plan.instructions]
    for index in range(3):
        mine = [span for span in spans if span.pass_index == index]
        assert [s.name.split()[0] for s in mine] == [str(i).split()[0] for i in plan.instructions]
        times = {lane: [s.end_s - s.start_s for s in mine if s.lane == lane] for lane in (COMPUTE, COPY)}
        assert times[COPY] == pytest.approx([COPY_MS / 1e3] * len(times[COPY]))
        compute = [s for s in mine if s.lane == COMPUTE]
        assert all(a.end_s == pytest.approx(b.start_s) for a, b in zip(compute, compute[1:], strict=False))
    starts = [min(s.start_s for s in spans if s.pass_index == index) for index in range(3)]
    whole_s = (4 * STEP_MS + len(times[COPY]) * COPY_MS + 100.0) / 1e3
    assert [b - a for a, b in zip(starts, starts[1:], strict=False)] == pytest.approx([whole_s] * 2)


def test_a_warm_up_leaves_no_spans(device):
    tracer = RecordingTracer(torch.device("cuda"))
    tracer.begin_pass(SHAPE)
    with tracer.aside() as marks:
        run_pass(device, CudaLanes(torch.device("cuda"), tracer), streamed_plan())
    device.synchronize()
    assert len(marks) == len(streamed_plan().instructions) and tracer.spans() == []


def test_without_a_trace_nothing_is_marked(device):
    tracer = Tracer()
    with tracer.aside() as marks, device.capture():
        run_pass(device, CudaLanes(torch.device("cuda"), tracer), streamed_plan())
    tracer.replayed(marks)
    assert marks == []


def test_spans_come_back_from_the_file(tmp_path):
    tracer = RecordingTracer(torch.device("cpu"))
    tracer.begin_pass(SHAPE)
    for instruction in streamed_plan().instructions:
        with tracer.span(instruction) as span:
            span.waited()
    file = str(tmp_path / "trace.json")
    write_trace(file, as_events(tracer.spans(), "rank 1", pid=2) + as_events(tracer.spans()[:3], "rank 1", pid=3))
    back = read_spans(file)
    assert back.keys() == {(1, False), (1, True)} and len(back[1, True]) == 3
    for ours, other in zip(back[1, False], tracer.spans(), strict=True):
        assert (ours.pass_index, ours.lane, ours.name) == (other.pass_index, other.lane, other.name)
        assert (ours.start_s, ours.end_s) == pytest.approx((other.start_s, other.end_s))
