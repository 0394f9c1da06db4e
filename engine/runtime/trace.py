"""Measures when each instruction of a run began and ended, by lane, and writes it as Chrome/Perfetto JSON.

The trace is a Watch. On CUDA an interval lies between two timing events on its own stream, which are nodes of the graph
where the pass is one; on a CPU it lies between two readings of the clock. Instructions of the compute lane that wait
for the other lane (acquire, join) have the wait in their interval, where it shows as a stall.
"""

import contextlib
import json
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from penstock.engine.compute.context import PassContext
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.planning.predictions import step_seconds
from penstock.engine.runtime.watch import Watch
from penstock.engine.user_files import check_output, named_errors
from penstock.parallel.collectives import Collectives
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.timeline import predict_timeline
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY, Instruction
from penstock.scheduler.units import us

Mark = torch.cuda.Event | float


@dataclass(frozen=True)
class Interval:
    """The time of one instruction of one pass, in seconds from the start of the trace. Pass -1 fills the ring."""

    pass_index: int
    lane: str
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Marked:
    """An instruction between two marks: events on a GPU, clock readings in seconds on a CPU."""

    instruction: Instruction
    start: Mark
    end: Mark


@dataclass(frozen=True)
class PassMarks:
    """The marks of a pass. `begin` is a mark before it and after all earlier work; its event is never one of a
    graph."""

    pass_index: int
    begin: Mark
    marks: list[Marked] = field(default_factory=list)


class Trace(Watch):
    """Keeps every interval. `intervals()` may be called once the device is idle.

    Under capture a mark is an external event: a node of the graph that acts at each replay, and costs about a
    microsecond. The graph's next replay overwrites its time, so there are two takes of each graph, replayed in turn:
    when one has been launched, the passes before it are waited for and read while it runs. An event of a graph cannot
    be waited for, so each pass begins with an eager one, before which all earlier passes have ended.

        launch pass 5 (take 0) | begin 6, launch pass 6 (take 1), wait for begin 6, read pass 5 | begin 7, launch ...
    """

    num_takes = 2

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.shapes: list[PassShape] = []
        self.under_way: deque[PassMarks] = deque()  # not read yet
        self.current: list[Marked] = []
        self.last_end = None  # of the compute lane's last interval in the current list
        self.known: list[Interval] = []
        self.begin, self.begin_s = self._mark_begin(), 0.0  # of the last pass that was read, or of the trace

    def begin_pass(self, batch: Batch | None) -> None:
        self.under_way.append(PassMarks(-1 if batch is None else len(self.shapes), self._mark_begin()))
        self.shapes += () if batch is None else (batch.shape,)
        self.current, self.last_end = self.under_way[-1].marks, None

    def around(self, instruction: Instruction, ctx: PassContext | None, run: Callable[[], None]) -> None:
        """Marks an instruction. It starts behind what it waits for, but on a GPU's compute lane where the one before it
        ended, so that a wait is part of it. (A copy's cannot: before its first wait its stream is no part of a
        capture.)"""
        stream = torch.cuda.current_stream(self.device) if self.cuda else None
        computes = instruction.lane == COMPUTE
        follows = self.cuda and computes and self.last_end is not None
        start = self.last_end if follows else self._mark(stream)
        run()
        end = self._mark(stream)
        self.current.append(Marked(instruction, start, end))
        if computes:
            self.last_end = end

    @contextlib.contextmanager
    def aside(self) -> Iterator[list[Marked]]:
        kept, self.current, self.last_end = self.current, [], None
        try:
            yield self.current
        finally:
            self.current, self.last_end = kept, None

    def replayed(self, captured: list[Marked]) -> None:
        self.current += captured
        self.under_way[-1].begin.synchronize()
        while len(self.under_way) > 1:
            self._read(self.under_way.popleft())

    def intervals(self) -> list[Interval]:
        while self.under_way:
            self._read(self.under_way.popleft())
        return self.known

    def _read(self, ended: PassMarks) -> None:
        """Reads a pass's times as elapsed since its begin, and that since the begin of the pass before: an elapsed time
        is a float32 of milliseconds, exact only where it is short."""
        self.begin_s += self._seconds(self.begin, ended.begin)
        self.begin = ended.begin
        at_s = {
            mark: self.begin_s + self._seconds(self.begin, mark)
            for mark in dict.fromkeys(mark for marked in ended.marks for mark in (marked.start, marked.end))
        }
        self.known += [
            Interval(ended.pass_index, one.instruction.lane, label(one.instruction), at_s[one.start], at_s[one.end])
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


def predicted_intervals(plan: EnginePlan, shapes: list[PassShape], measured: list[Interval]) -> list[Interval]:
    """The intervals that the time model predicts for each pass, from where the pass really began."""
    begins: dict[int, float] = {}
    for one in measured:
        begins[one.pass_index] = min(one.start_s, begins.get(one.pass_index, one.start_s))
    intervals = []
    for index, start_s in begins.items():
        if index < 0:
            continue
        timeline = predict_timeline(plan.pass_plan, *step_seconds(plan, shapes[index]))
        for instruction, one in zip(plan.pass_plan.instructions, timeline, strict=True):
            intervals.append(Interval(index, one.lane, label(instruction), start_s + one.start_s, start_s + one.end_s))
    return intervals


def label(instruction: Instruction) -> str:
    """The name of an instruction's interval: `attn_qkv 3`, `prefetch 3.ffn`, ..."""
    layer_idx = getattr(instruction, "layer_idx", None)
    return str(instruction) if layer_idx is None else f"{instruction} {layer_idx}"


def chrome_events(intervals: list[Interval], process: str, pid: int) -> list[dict]:
    """Complete ("X") events, in microseconds, two threads a process: the lanes."""
    events = [{"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}}]
    for tid, lane in enumerate((COMPUTE, COPY)):
        events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": lane}})
    for one in intervals:
        event = {"ph": "X", "pid": pid, "tid": int(one.lane == COPY), "name": one.name}
        event |= {"ts": us(one.start_s), "dur": us(one.end_s - one.start_s), "args": {"pass": one.pass_index}}
        events.append(event)
    return events


def join_traces(path: str, trace: Trace, plan: EnginePlan, collectives: Collectives) -> None:
    """Writes what all ranks have measured, and what was predicted, to one file, on rank 0: the others, which may be on
    other hosts, send it theirs. All ranks call this together, once their devices may be waited for."""
    if trace.cuda:
        torch.cuda.synchronize(trace.device)
    rank, measured = collectives.rank, trace.intervals()
    events = chrome_events(measured, f"rank {rank}", pid=2 * rank)
    predicted = predicted_intervals(plan, trace.shapes, measured)
    events += chrome_events(predicted, f"rank {rank}, predicted", pid=2 * rank + 1)
    parts = collectives.gather_bytes(zlib.compress(json.dumps(events).encode(), level=1))
    if parts is not None:
        write_trace(path, [event for part in parts for event in json.loads(zlib.decompress(part))])


def write_trace(path: str, events: list[dict]) -> None:
    """Writes the file. Raises ValueError, naming flag and file, if that fails, or if it is a pipe or a device."""
    check_output("--trace", path)
    with named_errors(f"--trace {path}"), open(path, "w") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)


def read_intervals(path: str) -> dict[tuple[int, bool], list[Interval]]:
    """The intervals of a file that `write_trace` wrote, by rank and whether they are the predicted ones."""
    intervals: dict[tuple[int, bool], list[Interval]] = {}
    lanes = (COMPUTE, COPY)
    for event in json.loads(Path(path).read_text())["traceEvents"]:
        if event["ph"] == "X":
            start_s, end_s = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
            interval = Interval(event["args"]["pass"], lanes[event["tid"]], event["name"], start_s, end_s)
            intervals.setdefault((event["pid"] // 2, event["pid"] % 2 == 1), []).append(interval)
    return intervals
