"""Timed spans of a run, by instruction and lane, as Chrome/Perfetto JSON.

On CUDA a span lies between two timing events on its own stream, which are nodes of the graph where the pass is one; on
a CPU between two readings of the clock. The span of an instruction that waits for the other lane on the compute lane
(acquire, join) includes the wait: it is the stall.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.planning import EnginePlan, step_seconds
from parallel.collectives import Collectives
from scheduler.pass_work import PassShape
from scheduler.step_plan import COMPUTE, COPY, Instruction
from scheduler.timeline import predict_timeline


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


class Tracer:
    """Does nothing: the tracer of a run without --trace."""

    @contextlib.contextmanager
    def span(self, instruction: Instruction, stream=None) -> Iterator["Tracer"]:
        yield self

    def waited(self) -> None:
        """Within a span: what the instruction waited for is there."""

    def begin_pass(self, shape: PassShape) -> None:
        """The spans that follow are those of a pass of this shape."""

    @contextlib.contextmanager
    def aside(self) -> Iterator[list[Marked]]:
        """Spans within belong to no pass (a warm-up's, a capture's), but to the list that this yields."""
        yield []

    def replayed(self, marks: list[Marked]) -> None:
        """The graph with these marks has been launched for the current pass."""


class RecordingTracer(Tracer):
    """Keeps every span. `spans()` may be called once the device is idle.

    Under capture a mark is an external event: a node of the graph that acts at each replay. The next replay overwrites
    its time, so after each the device is waited for and the times are read: tracing costs time between passes, and
    each mark about a microsecond within one.
    """

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.shapes: list[PassShape] = []
        self.passes: list[tuple[int, list[Marked]]] = [(-1, [])]  # eager ones: to be read in the end
        self.current = self.passes[0][1]
        self.known: list[Span] = []  # of replays
        self.last_end = None  # of the compute lane's last span in the current list
        self.origin = self._mark(torch.cuda.current_stream(device) if self.cuda else None)

    def begin_pass(self, shape: PassShape) -> None:
        self.shapes.append(shape)
        self.passes.append((len(self.shapes) - 1, []))
        self.current, self.last_end = self.passes[-1][1], None

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
        torch.cuda.synchronize(self.device)
        self.known += self._read(len(self.shapes) - 1, marks)

    def spans(self) -> list[Span]:
        return self.known + [span for index, marks in self.passes for span in self._read(index, marks)]

    def _read(self, pass_index: int, marks: list[Marked]) -> list[Span]:
        """Times are taken from the first mark, which is near: elapsed times are single floats of milliseconds."""
        if not marks:
            return []
        first = marks[0].start
        first_s = self._seconds(self.origin, first)
        return [
            Span(
                pass_index,
                mark.instruction.lane,
                label(mark.instruction),
                first_s + self._seconds(first, mark.start),
                first_s + self._seconds(first, mark.end),
            )
            for mark in marks
        ]

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
        timeline = predict_timeline(plan.step_plan, step_seconds(plan, shapes[index]), plan.rates)
        for instruction, span in zip(plan.step_plan.instructions, timeline, strict=True):
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
        event |= {"ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6, "args": {"pass": span.pass_index}}
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
    """Raises ValueError naming the file if it cannot be written."""
    try:
        with open(path, "w") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
    except OSError as error:
        raise ValueError(f"--trace {path}: {error.strerror}") from None


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
