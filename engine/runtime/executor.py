"""Runs a PassPlan: binds a batch, walks the instructions in their lanes, counts the bytes that crossed.

`submit` enqueues a pass and `collect` waits for the oldest one's tokens: two calls, so that a later pass can be
prepared and enqueued between.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from penstock.engine.compute.arena import ActivationArena, slot_of
from penstock.engine.compute.attention import whole_tokens
from penstock.engine.compute.inputs import PassInputs, bind
from penstock.engine.compute.ops import STEPS, StepContext
from penstock.engine.compute.sampler import Asked, PendingSample, SampleOutput
from penstock.engine.runtime.binding import on_own_device
from penstock.engine.runtime.graph import Counts
from penstock.engine.runtime.lanes import Lanes
from penstock.engine.runtime.trace import Tracer
from penstock.engine.weights.compressed_group import CompressedGroup, decompress_group
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.batching.batch import Batch, is_decode
from penstock.scheduler.passes.pass_plan import Compute, Decompress, GroupId, Instruction, PassPlan, Prefetch, Release
from torch import Tensor

Weights = Mapping[str, Tensor]
_NO_WEIGHTS: Weights = {}


class Compressed(NamedTuple):
    """A compressed group: its blob, resident or in its slot of the ring, and `out`, its slot in the decompression
    buffer; both uint8."""

    group: CompressedGroup
    blob: Tensor
    out: Tensor


@dataclass
class Counters:
    """Counts of a run that are not in the rank's ledger: passes, tokens, decompressed bytes, steps."""

    num_passes: int = 0
    num_tokens: int = 0
    decompressed_bytes: Counter = field(default_factory=Counter)  # by group, as they are written
    steps: Counter = field(default_factory=Counter)  # calls by step

    def clear(self) -> None:
        """Sets all to zero in the same objects: captured passes count into them."""
        self.num_passes = self.num_tokens = 0
        self.decompressed_bytes.clear()
        self.steps.clear()


class Executor:
    """Runs batches through a plan. Plan, spans, ring and activations are given, at fixed addresses; it owns none of
    them.

    `views`: every group's weights by name, resident or in its slot of the ring. `host_spans`: where the streamed groups
    are copied from. `ring` (ring_bytes,) uint8. `compressed`: where compressed groups lie and are decompressed to. With
    `poison`, freed slots are filled with NaN, and so is a slot before a group is decompressed to it.
    """

    def __init__(
        self,
        plan: PassPlan,
        context: StepContext,
        views: Mapping[GroupId, Weights],
        host_spans: Mapping[GroupId, Tensor],
        ring: Tensor,
        arena: ActivationArena,
        lanes: Lanes,
        tracer: Tracer,
        compressed: Mapping[GroupId, Compressed],
        poison: bool = False,
    ):
        self.plan, self.context, self.views, self.host_spans = plan, context, views, host_spans
        self.ring, self.arena, self.lanes, self.tracer = ring, arena, lanes, tracer
        self.compressed, self.poison = compressed, poison
        self.device = context.rope.device
        self.counters = Counters()
        self.copy_sites = {group: Site(group.name, group.layer_idx) for group in host_spans}
        self.whole_tokens = whole_tokens(context.spec, arena.dtype, self.device)
        self.ring_is_filled = False
        self.under_way = deque()  # what collect() waits for, pass by pass; None where no row samples
        self.decode = None  # DecodePasses, where decode passes are padded
        self.on_sampled: Callable[[SampleOutput], None] | None = None

    @property
    def ledger(self) -> TransferLedger:
        """The bytes that this rank moved: a call is a copy of a streamed group, or an all-reduce."""
        return self.context.collectives.ledger

    @property
    def copied(self) -> TransferLedger:
        """The ledger's part for the copy lane: by group, host to device."""
        sites = set(self.copy_sites.values())
        return self.ledger.only(lambda site: site in sites)

    @property
    def reduced(self) -> TransferLedger:
        """The ledger's part for all-reduces: by step, all layers together."""
        sites = set(self.copy_sites.values())
        return self.ledger.only(lambda site: site not in sites)

    @property
    def counted(self) -> list[Counts]:
        """All counts that a pass adds to."""
        return [self.counters.steps, self.counters.decompressed_bytes, self.ledger]

    @on_own_device
    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        """Enqueues a pass over `batch`. On a CPU it has run when this returns."""
        self.context.sampler.set_rows({row.index: row.sampling for row in batch.rows if row.sampling is not None})
        self.fill_ring()
        self.tracer.begin_pass(batch.shape)
        if self.decode is not None and is_decode(batch):
            self.under_way.append(self.decode.run(batch))
        else:
            self.under_way.append(self._run_bound(batch))
        self.counters.num_passes += 1
        self.counters.num_tokens += batch.num_tokens

    @on_own_device
    def collect(self) -> SampleOutput | None:
        """The tokens of the oldest pass under way, one for each row that samples, on the host; None if no row did.
        Returns when they are there: before the pass's last copies have ended, unless a decode pass has to give log
        probabilities."""
        pending = self.under_way.popleft()
        return None if pending is None else pending.wait()

    @on_own_device
    def forget(self) -> None:
        """Gives up the passes under way, after an interruption."""
        self.under_way.clear()
        if self.decode is not None:
            self.decode.mailbox.catch_up()

    def _run_bound(self, batch: Batch) -> PendingSample | None:
        """Runs a pass of any shape, eagerly."""
        context = self.context
        kv, last_tokens = context.kv, context.sampler.last_tokens
        inputs = bind(batch, kv.page_size, last_tokens, self.whole_tokens, kv.margin)
        pending: list[PendingSample] = []
        asked = context.sampler.asked([row.index for row in batch.rows])
        self.run_plan(inputs, asked, lambda output: pending.append(PendingSample(output)))
        return pending[0] if pending else None

    @on_own_device
    def run_plan(
        self, inputs: PassInputs, asked: Asked, on_sampled: Callable[[SampleOutput], None], copies: bool = True
    ) -> None:
        """Enqueues a pass over `inputs`. `on_sampled` takes its tokens, if a row samples, behind `sample` and before
        the pass is joined. Without `copies` the compute lane runs alone, on what the ring holds."""
        context = self.context
        context.inputs, context.asked, context.sampled, self.on_sampled = inputs, asked, None, on_sampled
        context.act = self.arena.cut(len(inputs.tokens), len(inputs.sampled_rows))
        if "penalty" in asked.stages:
            context.sampler.observe(inputs.token_rows, inputs.tokens)
        if copies:
            self.ring_is_filled = False  # an abort within the pass leaves the ring in an unknown state
            self.lanes.run(self.plan.instructions, self.do)
            self.ring_is_filled = True
        else:
            ring = self.plan.ring
            later = {group for group, _ in ring.slots[ring.num_wrapped :]}  # what their slots hold now is no blob
            for instruction in self.plan.instructions:
                decompresses = isinstance(instruction, Decompress) and instruction.group not in later
                if decompresses or isinstance(instruction, Compute):
                    self.do(instruction)
        self.on_sampled = None  # it may be our own method: closing must free the ring at once

    @on_own_device
    def fill_ring(self) -> None:
        """Runs the prologue, which copies the first groups of a pass to the ring, if the last pass did not leave them
        there."""
        if not self.ring_is_filled:
            self.tracer.begin_pass(None)
            self.lanes.run(self.plan.prologue, self.do)
        self.ring_is_filled = True

    def stretch(self, nbytes: int) -> list[tuple[Tensor, Tensor]]:
        """The copy lane's first copies of at least `nbytes` together (all, if they are fewer): (host span, slot)."""
        copies, total = [], 0
        for instruction in self.plan.instructions:
            if isinstance(instruction, Prefetch) and total < nbytes:
                span = self.host_spans[instruction.group]
                copies.append((span, self.slot(instruction)[: span.nbytes]))
                total += span.nbytes
        return copies

    def do(self, instruction: Instruction) -> None:
        if isinstance(instruction, Compute):
            self._compute(instruction)
        elif isinstance(instruction, Prefetch):
            span = self.host_spans[instruction.group]
            self.ledger.add(self.copy_sites[instruction.group], span.nbytes)
            self.slot(instruction)[: span.nbytes].copy_(span, non_blocking=True)
        elif isinstance(instruction, Decompress):
            self._decompress(instruction)
        elif isinstance(instruction, Release) and self.poison:
            self.slot(instruction).fill_(0xFF)  # all ones are a NaN in every float format

    def _decompress(self, instruction: Decompress) -> None:
        compressed = self.compressed[instruction.group]
        if self.poison:
            compressed.out.fill_(0xFF)
        decompress_group(*compressed)
        self.counters.decompressed_bytes[instruction.group] += compressed.out.nbytes

    def _compute(self, step: Compute) -> None:
        self.counters.steps[step.step] += 1
        STEPS[step.step](self.context, self.views.get(step.group, _NO_WEIGHTS), step.layer_idx)
        if step.step == "sample" and self.context.sampled is not None:
            self.on_sampled(self.context.sampled)

    def slot(self, instruction: Prefetch | Release) -> Tensor:
        return slot_of(self.ring, instruction.slot)
