"""Watches of tests: a function that runs in place of every instruction, and one that sees every pass."""

from collections.abc import Callable

from penstock.engine.compute.context import PassContext
from penstock.engine.runtime.watch import Watch
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.passes.pass_plan import Instruction
from torch import Tensor

Change = Callable[[Instruction, PassContext | None, Callable[[], None]], None]


class Around(Watch):
    """`change(instruction, ctx, do)` runs in place of every instruction; do() is the real one."""

    def __init__(self, change: Change):
        self.around = change


class After(Watch):
    """`note(instruction, ctx)` is called behind every instruction."""

    def __init__(self, note: Callable[[Instruction, PassContext | None], None]):
        self.note = note

    def around(self, instruction: Instruction, ctx: PassContext | None, run: Callable[[], None]) -> None:
        run()
        self.note(instruction, ctx)


class BeginPass(Watch):
    """`note(batch)` is called before every pass; not where the ring is filled."""

    def __init__(self, note: Callable[[Batch], None]):
        self.note = note

    def begin_pass(self, batch: Batch | None) -> None:
        if batch is not None:
            self.note(batch)


class EndPass(Watch):
    """`note(batch, logits)` is called behind every pass that is enqueued."""

    def __init__(self, note: Callable[[Batch, Tensor], None]):
        self.end_pass = note


def keep_logits(logits: list[Tensor]) -> Watch:
    """Adds to `logits`, on the host, those that each pass sampled from."""
    return EndPass(lambda batch, own: logits.append(own.to("cpu", copy=True)))
