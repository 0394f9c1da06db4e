"""A padded pass as one CUDA graph: the executor runs the same plan once under capture.

The copy lane becomes a side branch of memcpy nodes. Graphs keep raw addresses: weights, ring, activations, KV cache and
the bucket's inputs never move, and every temporary lies in the one pool that all graphs share. What the sampler drew is
copied to pinned memory, and then the number of the pass, which the host polls: so the host goes on while the copies for
the next pass, which end the graph, are still on the link.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from penstock.engine.compute.sampler import SampleOutput
from penstock.engine.runtime.watch import Watches
from torch import Tensor

POLLS_A_CHECK = 200  # how often to ask whether the device has failed
# Between two polls the host sleeps, so that other threads have Python's lock: long until shortly before the pass is
# expected to end, then as short as it can. A pass that ends early is so seen no later than half a millisecond.
LONG_SLEEP_S, SHORT_SLEEP_S, SHORTLY_S = 5e-4, 2e-5, 2e-3


class Mailbox:
    """Pinned memory that the host polls, to which decode passes write their tokens. An engine has one.

    A pass writes its letter, the tokens, beside those of the passes before it, so that up to DEPTH passes may be under
    way; the pass's number is written last. A pass that may give log probabilities has a second sheet, with `width`
    numbers a row. Both are written row by row, so that a pass copies no more rows than it has.
    """

    DEPTH = 4

    def __init__(self, max_num_seqs: int, width: int, device: torch.device, check: Callable[[], None] = lambda: None):
        self.check = check  # raises PeerLost if another rank has failed
        shape, pinned = (max_num_seqs, self.DEPTH), device.type == "cuda"
        self.letters = torch.zeros(shape, dtype=torch.int64, pin_memory=pinned)
        self.scores = torch.zeros(*shape, width, dtype=torch.int32, pin_memory=pinned)
        self.device_scores = torch.zeros(*shape, width, dtype=torch.int32, device=device)
        self.number = torch.zeros(1, dtype=torch.int64, pin_memory=pinned)
        self.device_letters = torch.zeros(shape, dtype=torch.int64, device=device)
        self.device_number = torch.zeros(1, dtype=torch.int64, device=device)
        self.num_sent = 0

    def send(self, output: SampleOutput) -> None:
        """Enqueues a letter; under capture, one for each replay."""
        self.device_number.add_(1)
        index = self.device_number % self.DEPTH
        self._write(self.letters, self.device_letters, index, output.tokens)
        if output.scores is not None:
            self._write(self.scores, self.device_scores, index, output.scores)
        self.number.copy_(self.device_number, non_blocking=True)

    def _write(self, host: Tensor, device: Tensor, index: Tensor, values: Tensor) -> None:
        rows = slice(len(values))
        device[rows].index_copy_(1, index, values[:, None])
        host[rows].copy_(device[rows], non_blocking=True)

    def catch_up(self) -> None:
        """Waits for all letters that were sent, and counts them; after an interruption."""
        self.num_sent = int(self.device_number)

    def check_all(self) -> None:
        """Raises RuntimeError if the device has failed, PeerLost if another rank."""
        if self.device_number.is_cuda:
            torch.cuda.current_stream().query()
        self.check()

    def expect(self, num_tokens: int, scored: bool) -> "PendingLetter":
        """The letter of the pass that was just enqueued, to be waited for, with log probabilities if it is `scored`."""
        self.num_sent += 1
        return PendingLetter(self, self.num_sent, num_tokens, scored)


@dataclass
class PendingLetter:
    """The tokens of a pass, by its number."""

    mailbox: Mailbox
    number: int
    num_tokens: int
    scored: bool

    @property
    def has_come(self) -> bool:
        """Tells whether the letter is there."""
        return bool(self.mailbox.number[0] >= self.number)

    def wait(self, expected_s: float = 0.0) -> SampleOutput:
        """Waits for the letter, which is expected at that time of time.perf_counter. Raises RuntimeError if the device,
        PeerLost if another rank has failed."""
        came, polls = self.mailbox.number.numpy(), 0
        while came[0] < self.number:
            is_near = time.perf_counter() > expected_s - SHORTLY_S
            time.sleep(SHORT_SLEEP_S if is_near else LONG_SLEEP_S)
            polls += 1
            if polls % POLLS_A_CHECK == 0:
                self.mailbox.check_all()
        assert came[0] < self.number + Mailbox.DEPTH, "the letter was overwritten: too many passes under way"
        sheets = (self.mailbox.letters, self.mailbox.scores)
        tokens, scores = (sheet[: self.num_tokens, self.number % Mailbox.DEPTH] for sheet in sheets)
        return SampleOutput(tokens.clone(), scores.clone() if self.scored else None)


class Counts(Protocol):
    """Counts that a pass adds to, as a Counter has them; always the same object."""

    def copy(self) -> Self: ...

    def __sub__(self, before: Self) -> Self: ...

    def update(self, gain: Self) -> None: ...

    def clear(self) -> None: ...


@dataclass
class CapturedPass:
    """A graph, `gains` that each replay adds to the counts that were watched at its capture, and what the watches
    kept of it."""

    graph: torch.cuda.CUDAGraph
    gains: list[tuple[Counts, Counts]]
    watched: Any

    def note_replay(self, watches: Watches) -> None:
        """Counts a replay that was launched."""
        for count, gain in self.gains:
            count.update(gain)
        watches.replayed(self.watched)


class Graphs:
    """The captured passes of an engine, by a key of the caller's. Each has as many takes as the watches want."""

    def __init__(self, device: torch.device, watches: Watches):
        self.watches = watches
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.passes: dict[Hashable, deque[CapturedPass]] = {}
        self.latest: Hashable | None = None  # the key of the pass that was asked for last
        self.seconds = 0.0  # that capturing took, with the compilation of kernels

    def capture(
        self,
        key: Hashable,
        warm_up: Callable[[], None] | None,
        run: Callable[[], None],
        counts: list[Counts],
    ) -> None:
        """Runs `warm_up`, since a kernel's first launch compiles or loads it, which capture forbids; then `run` under
        capture. Neither is counted; each replay will count what `run` counts under capture. Without `warm_up` its
        kernels have been launched, and its temporaries fit into what earlier graphs have; else the memory that is
        cached for others is given back for them."""
        with self.aside(counts):
            if warm_up is not None:
                with self.watches.aside():
                    warm_up()
                self.stream.synchronize()
                torch.cuda.empty_cache()
            self.passes[key] = deque(self._take(run, counts) for _ in range(self.watches.num_takes))

    @contextlib.contextmanager
    def aside(self, counts: list[Counts]) -> Iterator[None]:
        """A context on the stream of captures, for what belongs to no pass: it is not counted, but for its seconds."""
        start_s, before, outside = time.perf_counter(), [count.copy() for count in counts], torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)
        for count, old in zip(counts, before):
            count.clear()
            count.update(old)
        self.seconds += time.perf_counter() - start_s

    def _take(self, run: Callable[[], None], counts: list[Counts]) -> CapturedPass:
        before = [count.copy() for count in counts]
        graph = torch.cuda.CUDAGraph()
        try:
            with self.watches.aside() as watched:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        except BaseException:
            graph.reset()  # the traceback keeps it, and it would keep NCCL's communicator
            raise
        return CapturedPass(graph, [(count, count - old) for count, old in zip(counts, before)], watched)

    def next_take(self, key: Hashable) -> CapturedPass:
        """The take whose turn it is."""
        takes, self.latest = self.passes[key], key
        takes.rotate()
        return takes[0]

    def close(self) -> None:
        """Drops the graphs, before the process group is left: it hangs if a live graph holds its collectives."""
        for takes in self.passes.values():
            for captured in takes:
                captured.graph.reset()
        self.passes.clear()
