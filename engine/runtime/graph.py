"""A decode pass as one CUDA graph a bucket: the executor runs the same plan once under capture.

The copy lane becomes a side branch of memcpy nodes. Graphs keep raw addresses: weights, ring, activations, KV cache and
the bucket's inputs never move, and every temporary lies in the one pool that all graphs share. What the sampler drew is
copied to pinned memory, and then a step number, which the host polls: so it goes on while the copies for the next pass,
which end the graph, are still on the link.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.runtime.sampler import SampleOutput, refuse_nan
from engine.runtime.trace import Marked, Tracer

POLLS_A_CHECK = 20_000  # how often to ask whether the device has failed
WARM_UPS = 2  # a kernel's first launch compiles or loads it, which capture forbids


class Mailbox:
    """Where captured passes put their tokens: pinned memory that the host polls. One for all graphs of an engine."""

    def __init__(self, max_num_seqs: int, device: torch.device):
        self.tokens = torch.zeros(max_num_seqs, dtype=torch.int64, pin_memory=True)
        self.nan_rows = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self.step = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self.device_step = torch.zeros(1, dtype=torch.int64, device=device)
        self.num_sent = 0

    def send(self, tokens: torch.Tensor, nan_rows: torch.Tensor) -> None:
        """Enqueues the copies; the step number goes last."""
        self.tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        self.nan_rows.copy_(nan_rows.view(1), non_blocking=True)
        self.device_step.add_(1)
        self.step.copy_(self.device_step, non_blocking=True)

    def wait(self, num_tokens: int) -> SampleOutput:
        """The tokens of the last pass that was sent. Raises ValueError if logits were NaN, RuntimeError if the device
        has failed."""
        step, polls = self.step.numpy(), 0
        while step[0] != self.num_sent:
            polls += 1
            if polls % POLLS_A_CHECK == 0:
                torch.cuda.current_stream().query()
        refuse_nan(self.nan_rows)
        return SampleOutput(self.tokens[:num_tokens].clone(), None)


@dataclass
class CapturedPass:
    """A graph, what each replay adds to the counters that were watched while it was captured, and the trace's marks."""

    graph: torch.cuda.CUDAGraph
    gains: list[tuple[Counter, Counter]]
    marks: list[Marked]


class Graphs:
    """The captured passes of an engine, by bucket size and by whether they sample."""

    def __init__(self, device: torch.device, tracer: Tracer):
        self.tracer = tracer
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.passes: dict[tuple[int, bool], CapturedPass] = {}

    def capture(self, key: tuple[int, bool], run: Callable[[], None], counters: list[Counter]) -> None:
        """Runs `run` to warm up, then once under capture, and takes its counts as those of one replay."""
        before = [counter.copy() for counter in counters]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), self.tracer.aside():
            for _ in range(WARM_UPS):
                run()
        self.stream.synchronize()
        warm = [counter.copy() for counter in counters]
        graph = torch.cuda.CUDAGraph()
        captured = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        with self.tracer.aside() as marks, captured:
            run()
        gains = [(counter, counter - old) for counter, old in zip(counters, warm)]
        for counter, old in zip(counters, before):
            counter.clear()
            counter.update(old)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.passes[key] = CapturedPass(graph, gains, marks)

    def replay(self, key: tuple[int, bool]) -> None:
        captured = self.passes[key]
        captured.graph.replay()
        for counter, gain in captured.gains:
            counter.update(gain)
        self.tracer.replayed(captured.marks)

    def close(self) -> None:
        """Drops the graphs: before the process group, which hangs if a live graph holds its collectives."""
        for captured in self.passes.values():
            captured.graph.reset()
        self.passes.clear()
