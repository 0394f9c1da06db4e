"""Timed spans of a run, by instruction and lane, as Chrome/Perfetto JSON.

On CUDA a span lies between two timing events on its own stream; on a CPU between two readings of the clock. The span
of an instruction that waits for the other lane on the compute lane (acquire, join) includes the wait: it is the stall.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from engine.planning import EnginePlan, step_seconds
from scheduler.step_plan import COMPUTE, COPY, Instruction
from scheduler.time_model import PassShape, predict_timeline


@dataclass(frozen=True)
class Span:
    """One instruction of one pass; times in seconds from the start of the trace. Pass -1 fills the ring."""

    pass_index: int
    lane: str
    name: str
    start_s: float
    end_s: float


class Tracer:
    """Does nothing: the tracer of a run without --trace."""

    @contextlib.contextmanager
    def span(self, instruction: Instruction, stream=None) -> Iterator["Tracer"]:
        yield self

    def waited(self) -> None:
        pass

    def begin_pass(self, shape: PassShape) -> None:
        pass


class RecordingTracer(Tracer):
    """Keeps every span. `spans()` may be called once the device is idle."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.shapes: list[PassShape] = []
        self.marks: list[tuple[int, Instruction, object, object]] = []
        self.origin = self._mark(torch.cuda.current_stream(device) if self.cuda else None)

    def begin_pass(self, shape: PassShape) -> None:
        self.shapes.append(shape)

    @contextlib.contextmanager
    def span(self, instruction: Instruction, stream=None) -> Iterator["_OpenSpan"]:
        opened = _OpenSpan(self, instruction, stream)
        yield opened
        self.marks.append((len(self.shapes) - 1, instruction, opened.start, self._mark(stream)))

    def spans(self) -> list[Span]:
        return [
            Span(index, instruction.lane, label(instruction), self._seconds(start), self._seconds(end))
            for index, instruction, start, end in self.marks
        ]

    def _mark(self, stream):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _seconds(self, mark) -> float:
        return self.origin.elapsed_time(mark) / 1e3 if self.cuda else mark - self.origin


class _OpenSpan:
    """A copy's span starts after its waits, a compute span before them."""

    def __init__(self, tracer: RecordingTracer, instruction: Instruction, stream):
        self.tracer, self.instruction, self.stream = tracer, instruction, stream
        self.start = tracer._mark(stream)

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
        shape = shapes[index]
        for span in predict_timeline(plan.step_plan, step_seconds(plan, shape), plan.rates):
            spans.append(Span(index, span.lane, span.name, start_s + span.start_s, start_s + span.end_s))
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


def write_trace(path: str, events: list[dict]) -> None:
    """Raises ValueError naming the file if it cannot be written."""
    try:
        with open(path, "w") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
    except OSError as error:
        raise ValueError(f"--trace {path}: {error.strerror}") from None
