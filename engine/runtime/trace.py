"""Timed spans of a run, by instruction and lane, as Chrome/Perfetto JSON.

On CUDA a span lies between two timing events on its own stream, which are nodes of the graph where the pass is one; on
a CPU between two readings of the clock. The span of an instruction that waits for the other lane on the compute lane
(acquire, join) includes the wait: it is the stall.
"""

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from penstock.engine.planning.engine_plan import EnginePlan, step_seconds
from penstock.engine.user_files import check_output, named_errors
from penstock.parallel.collectives import Collectives
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.timeline import predict_timeline
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY, Instruction
from penstock.scheduler.units import us


@dataclass(frozen=True)
class Span:
    """One instruction of one pass; times in seconds from the start of the trace. Pass -1 fills the ring."""

    pass_index: int
    lane: str
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Marked:
    """An instruction between two marks: events on a GPU, clock readings in seconds on a CPU."""

    instruction: Instruction
    start: object
    end: object


@dataclass(frozen=True)
class PassMarks:
    """`begin` is a mark before the pass, behind all that came before it; an event there is never one of a graph."""

    pass_index: int
    begin: object
    marks: list[Marked] = field(default_factory=list)


class Tracer:
    """Does nothing: the tracer of a run without --trace."""

    num_takes = 1  # how often a pass is captured, for replays in turn

    @contextlib.contextmanager
    def span(self, instruction: Instruction, stream=None) -> Iterator["Tracer"]:
        yield self

    def waited(self) -> None:
        """Within a span: what the instruction waited for is there."""

    def begin_pass(self, shape: PassShape | None) -> None:
        """The spans that follow are those of a pass of this shape; None: of copies that fill the ring."""

    @contextlib.contextmanager
    def aside(self) -> Iterator[list[Marked]]:
        """Spans within belong to no pass (a warm-up's, a capture's), but to the list that this yields."""
        yield []

    def replayed(self, marks: list[Marked]) -> None:
        """The graph with these marks has been launched for the current pass."""


class RecordingTracer(Tracer):
    """Keeps every span. `spans()` may be called once the device is idle.

    Under capture a mark is an external event: a node of the graph that acts at each replay, and costs about a
    microsecond. The graph's next replay overwrites its time, so there are two takes of each graph, replayed in turn:
    when one has been launched, the passes before it are waited for and read while it runs. Nothing can wait for an
    event of a graph; all passes before are behind the eager one that each pass begins with.

        launch pass 5 (take 0) | begin 6, launch pass 6 (take 1), wait for begin 6, read pass 5 | begin 7, launch ...
    """

    num_takes = 2

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.shapes: list[PassShape] = []
        self.under_way: deque[PassMarks] = deque()  # not read yet
        self.current: list[Marked] = []
        self.last_end = None  # of the compute lane's last span in the current list
        self.known: list[Span] = []
        self.begin, self.begin_s = self._mark_begin(), 0.0  # of the last pass that was read, or of the trace

    def begin_pass(self, shape: PassShape | None) -> None:
        self.under_way.append(PassMarks(-1 if shape is None else len(self.shapes), self._mark_begin()))
        self.shapes += () if shape is None else (shape,)
        self.current, self.last_end = self.under_way[-1].marks, None

    @contextlib.contextmanager
    def span(self, instruction: Instruction, stream=None) -> Iterator["_OpenSpan"]:
        opened = _OpenSpan(self, instruction, stream)
        yield opened
        end = self._mark(stream)
        self.current.append(Marked(instruction, opened.start, end))
        if instruction.lane == COMPUTE:
            self.last_end = end

    @contextlib.contextmanager
    def aside(self) -> Iterator[list[Marked]]:
        kept, self.current, self.last_end = self.current, [], None
        try:
            yield self.current
        finally:
            self.current, self.last_end = kept, None

    def replayed(self, marks: list[Marked]) -> None:
        self.current += marks
        self.under_way[-1].begin.synchronize()
        while len(self.under_way) > 1:
            self._read(self.under_way.popleft())

    def spans(self) -> list[Span]:
        while self.under_way:
            self._read(self.under_way.popleft())
        return self.known

    def _read(self, ended: PassMarks) -> None:
        """Times are taken from the begin of the pass, and that from the one before it: an elapsed time is a single
        float of milliseconds, exact only where it is short."""
        self.begin_s += self._seconds(self.begin, ended.begin)
        self.begin = ended.begin
        at_s = {
            mark: self.begin_s + self._seconds(self.begin, mark)
            for mark in dict.fromkeys(mark for marked in ended.marks for mark in (marked.start, marked.end))
        }
        self.known += [
            Span(ended.pass_index, one.instruction.lane, label(one.instruction), at_s[one.start], at_s[one.end])
            for one in ended.marks
        ]

    def _mark_begin(self):
        return self._mark(torch.cuda.current_stream(self.device) if self.cuda else None)

    def _mark(self, stream):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record(stream)
        return event

    def _seconds(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


class _OpenSpan:
    """A copy's span starts after its waits: under capture its stream is no part of the capture before the first of
    them. A compute span starts before them, on a GPU where the one before it ended: one mark less."""

    def __init__(self, tracer: RecordingTracer, instruction: Instruction, stream):
        self.tracer, self.instruction, self.stream = tracer, instruction, stream
        self.start = None
        if instruction.lane == COMPUTE:
            self.start = tracer.last_end if tracer.cuda and tracer.last_end is not None else tracer._mark(stream)

    def waited(self) -> None:
        if self.instruction.lane == COPY:
            self.start = self.tracer._mark(self.stream)


def predicted_spans(plan: EnginePlan, shapes: list[PassShape], measured: list[Span]) -> list[Span]:
    """What the time model said of each pass, put where the pass really began."""
    begins: dict[int, float] = {}
    for span in measured:
        begins[span.pass_index] = min(span.start_s, begins.get(span.pass_index, span.start_s))
    spans = []
    for index, start_s in begins.items():
        if index < 0:
            continue
        timeline = predict_timeline(plan.pass_plan, *step_seconds(plan, shapes[index]))
        for instruction, span in zip(plan.pass_plan.instructions, timeline, strict=True):
            spans.append(Span(index, span.lane, label(instruction), start_s + span.start_s, start_s + span.end_s))
    return spans


def label(instruction: Instruction) -> str:
    """`attn_qkv 3`, `prefetch 3.ffn`, ..."""
    layer_idx = getattr(instruction, "layer_idx", None)
    return str(instruction) if layer_idx is None else f"{instruction} {layer_idx}"


def chrome_events(spans: list[Span], process: str, pid: int) -> list[dict]:
    """Complete ("X") events, in microseconds, two threads a process: the lanes."""
    events = [{"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}}]
    for tid, lane in enumerate((COMPUTE, COPY)):
        events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": lane}})
    for span in spans:
        event = {"ph": "X", "pid": pid, "tid": int(span.lane == COPY), "name": span.name}
        event |= {"ts": us(span.start_s), "dur": us(span.end_s - span.start_s), "args": {"pass": span.pass_index}}
        events.append(event)
    return events


def join_traces(path: str, tracer: "RecordingTracer", plan: EnginePlan, collectives: Collectives) -> None:
    """Each rank leaves its part, as measured and as predicted, beside the file, and rank 0 joins them. All ranks call
    this together, once their devices may be waited for."""
    if tracer.cuda:
        torch.cuda.synchronize(tracer.device)
    rank, measured = collectives.rank, tracer.spans()
    events = chrome_events(measured, f"rank {rank}", pid=2 * rank)
    events += chrome_events(predicted_spans(plan, tracer.shapes, measured), f"rank {rank}, predicted", pid=2 * rank + 1)
    if rank > 0:
        write_trace(f"{path}.rank{rank}", events)
    collectives.barrier()
    if rank == 0:
        for other in range(1, collectives.size):
            part = Path(f"{path}.rank{other}")
            events += json.loads(part.read_text())["traceEvents"]
            part.unlink()
        write_trace(path, events)


def write_trace(path: str, events: list[dict]) -> None:
    """Raises ValueError, naming flag and file, if it cannot be written, or is a pipe or a device."""
    check_output("--trace", path)
    with named_errors(f"--trace {path}"), open(path, "w") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


def read_spans(path: str) -> dict[tuple[int, bool], list[Span]]:
    """The spans of a file that `write_trace` wrote, by rank and whether they are the predicted ones."""
    spans: dict[tuple[int, bool], list[Span]] = {}
    lanes = (COMPUTE, COPY)
    for event in json.loads(Path(path).read_text())["traceEvents"]:
        if event["ph"] == "X":
            start_s, end_s = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
            span = Span(event["args"]["pass"], lanes[event["tid"]], event["name"], start_s, end_s)
            spans.setdefault((event["pid"] // 2, event["pid"] % 2 == 1), []).append(span)
    return spans
