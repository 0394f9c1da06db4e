"""A window into a running engine: a Watch sees every pass and every instruction, and may run something else in place of
one.

    class Slow(Watch):
        def around(self, instruction, ctx, run):
            time.sleep(0.01)
            run()

    with llm.engine.watched_by(Slow()):          # in this process, from now on
        llm.generate(...)
    LLM(..., debug={"watch": "my_tests:Slow"})   # on every rank, from its start

The trace is a watch, and so are the counts of a split execution and the faults that tests inject.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from penstock.engine.compute.context import PassContext
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.passes.pass_plan import Instruction
from torch import Tensor


class Watch:
    """Sees everything and changes nothing; subclasses define what they want to see.

    A graph runs its instructions on the device alone: a watch sees them once, at the capture, and each replay as a
    pass. So instructions are replaced in eager passes, or from an engine's start on.
    """

    num_takes = 1  # graphs that are made of each pass; replays take them in turn

    def begin_pass(self, batch: Batch | None) -> None:
        """Says that a pass over `batch` begins, to which the instructions that follow belong; None: copies that fill
        the ring."""

    def around(self, instruction: Instruction, ctx: PassContext | None, run: Callable[[], None]) -> None:
        """Runs an instruction, on the stream of its lane and behind the events that it waits for. `ctx` is None for
        copies that fill the ring."""
        run()

    def end_pass(self, batch: Batch, logits: Tensor) -> None:
        """Says that a pass is enqueued. `logits` (N, V or more) are those of its sampled rows, once it has run."""

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """A context around a warm-up or a capture, whose instructions are of no pass. What it yields is given to
        `replayed` at each replay of that graph."""
        return contextlib.nullcontext()

    def replayed(self, captured: Any) -> None:
        """Says that a graph was launched for the current pass, with what `aside` gave when it was captured."""


class Watches(Watch):
    """Several as one; the last one added is the outermost."""

    def __init__(self, *watches: Watch):
        self._watches = list(watches)

    def __len__(self) -> int:
        return len(self._watches)

    def add(self, watch: Watch) -> None:
        self._watches.append(watch)

    @contextlib.contextmanager
    def with_one_more(self, watch: Watch) -> Iterator[None]:
        self.add(watch)
        try:
            yield
        finally:
            self._watches.remove(watch)

    @property
    def num_takes(self) -> int:
        return max((watch.num_takes for watch in self._watches), default=1)

    def begin_pass(self, batch: Batch | None) -> None:
        for watch in self._watches:
            watch.begin_pass(batch)

    def around(self, instruction: Instruction, ctx: PassContext | None, run: Callable[[], None]) -> None:
        for watch in self._watches:
            run = functools.partial(watch.around, instruction, ctx, run)
        run()

    def end_pass(self, batch: Batch, logits: Tensor) -> None:
        for watch in self._watches:
            watch.end_pass(batch, logits)

    @contextlib.contextmanager
    def aside(self) -> Iterator[list[tuple[Watch, Any]]]:
        with contextlib.ExitStack() as stack:
            yield [(watch, stack.enter_context(watch.aside())) for watch in self._watches]

    def replayed(self, captured: list[tuple[Watch, Any]]) -> None:
        for watch, own in captured:
            if watch in self._watches:
                watch.replayed(own)


def load_watch(name: str) -> Watch:
    """A new watch of the class that `name` means, `module:Class`. Raises ValueError if there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module raises as it is imported
        raise ValueError(f"watch={name!r}: expected module:Class of a Watch ({error!r})") from error
    if not (isinstance(found, type) and issubclass(found, Watch)):
        raise ValueError(f"watch={name!r}: is no subclass of Watch")
    return found()
