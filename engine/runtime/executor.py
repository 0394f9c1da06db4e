"""Walks a PassPlan: runs each instruction in its lane, and counts the bytes that crossed and the steps that ran.

What it does not know: batches, graphs, and where the tokens go.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from penstock.engine.compute.arena import ActivationArena, slot_of
from penstock.engine.compute.context import ModelContext, PassContext
from penstock.engine.compute.inputs import PassInputs
from penstock.engine.compute.ops import STEPS, Weights
from penstock.engine.compute.sampler import Asked, SampleOutput
from penstock.engine.runtime.binding import on_own_device
from penstock.engine.runtime.graph import Counts
from penstock.engine.runtime.lanes import Lanes
from penstock.engine.runtime.watch import Watches
from penstock.engine.weights.kept_group import KeptGroup
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.passes.pass_plan import Compute, Decompress, GroupId, Instruction, PassPlan, Prefetch, Release
from torch import Tensor

_NO_WEIGHTS: Weights = {}


class Compressed(NamedTuple):
    """A group that is kept compressed or quantised: `blob` is what is kept, resident or in its slot of the ring, and
    `out` its slot in the decompression buffer; both uint8."""

    group: KeptGroup
    blob: Tensor
    out: Tensor


@dataclass
class Counters:
    """Counts of a run that are not in the rank's ledger: passes, tokens, decompressed bytes, steps."""

    num_passes: int = 0
    num_tokens: int = 0
    decompressed_bytes: Counter = field(default_factory=Counter)  # by group, as they are written
    steps: Counter = field(default_factory=Counter)  # calls by step

    def add_pass(self, num_tokens: int) -> None:
        self.num_passes += 1
        self.num_tokens += num_tokens

    def clear(self) -> None:
        """Sets all to zero in the same objects: captured passes count into them."""
        self.num_passes = self.num_tokens = 0
        self.decompressed_bytes.clear()
        self.steps.clear()


class Executor:
    """Runs passes of one plan. Plan, spans, ring and activations are given, at fixed addresses; it owns none of them.

    `views`: every group's weights by name, resident or in its slot of the ring. `host_spans`: where the streamed groups
    are copied from. `ring` (ring_bytes,) uint8. `compressed`: where compressed groups lie and are decompressed to. With
    `poison`, freed slots are filled with NaN, and so is a slot before a group is decompressed to it. `ring_is_filled`:
    whether the first groups of a pass are in the ring.
    """

    def __init__(
        self,
        pass_plan: PassPlan,
        model: ModelContext,
        views: Mapping[GroupId, Weights],
        host_spans: Mapping[GroupId, Tensor],
        ring: Tensor,
        arena: ActivationArena,
        lanes: Lanes,
        watches: Watches,
        compressed: Mapping[GroupId, Compressed],
        poison: bool = False,
    ):
        self.pass_plan, self.model, self.views, self.host_spans = pass_plan, model, views, host_spans
        self.ring, self.arena, self.lanes, self.watches = ring, arena, lanes, watches
        self.compressed, self.poison = compressed, poison
        self.device = model.rope.device
        self.counters = Counters()
        # by group, since a pass copies and restores hundreds of times: where it is copied to, and its restorer
        slots = {group: slot_of(ring, slot) for group, slot in pass_plan.ring.slots if group in host_spans}
        self._targets = {group: slot[: host_spans[group].nbytes] for group, slot in slots.items()}
        self._restorers = {group: one.group.restorer(one.blob, one.out) for group, one in compressed.items()}
        self.copy_sites = {group: Site(group.name, group.layer_idx) for group in host_spans}
        self.ring_is_filled = False
        self._forms = {group: _form(own) for group, own in views.items()}

    @property
    def ledger(self) -> TransferLedger:
        """The bytes that this rank moved: a call is a copy of a streamed group, or an all-reduce."""
        return self.model.collectives.ledger

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
    def run(self, inputs: PassInputs, asked: Asked, take: Callable[[SampleOutput], None]) -> None:
        """Enqueues a pass over `inputs`. `take` gets its tokens, if a row samples, behind `sample` and before the pass
        is joined."""
        ctx = self._context(inputs, asked, take)
        with self.filling():
            self.lanes.run(self.pass_plan.instructions, partial(self._watched, ctx))

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """A context around what leaves the ring filled, as a pass does at its end; an error leaves it in an unknown
        state."""
        self.ring_is_filled = False
        yield
        self.ring_is_filled = True

    @on_own_device
    @torch.inference_mode()
    def warm_up(self, inputs: PassInputs, asked: Asked) -> None:
        """Runs the kernels of the compute lane, on what the ring holds, and drops what is sampled. Layers of one window
        whose weights have one form launch the same kernels, so the first of them runs for all."""
        ctx, ring = self._context(inputs, asked, lambda output: None), self.pass_plan.ring
        later = {group for group, _ in ring.slots[ring.num_wrapped :]}  # what their slots hold now is no blob
        windows, launched = dict(enumerate(self.model.spec.windows)), set()
        for instruction in self.pass_plan.instructions:
            if isinstance(instruction, Compute):
                window, form = windows.get(instruction.layer_idx), self._forms.get(instruction.group)
                kernels = (instruction.step, instruction.of_rows, window, form)
                if kernels not in launched:
                    self._watched(ctx, instruction)
                launched.add(kernels)
            elif isinstance(instruction, Decompress):
                if instruction.group not in later:
                    self._watched(ctx, instruction)
                else:
                    one = self.compressed[instruction.group]
                    one.group.only_blocks().restore(one.blob, one.out, ctx.inputs.num_tokens)

    @on_own_device
    @torch.inference_mode()
    def fill_ring(self) -> None:
        """Runs the prologue, which copies the first groups of a pass to the ring, if the last pass did not leave them
        there."""
        if self.ring_is_filled:
            return
        with self.filling():
            if prologue := self.pass_plan.prologue:
                self.watches.begin_pass(None)
                self.lanes.run(prologue, partial(self._watched, None))

    def empty_ring(self) -> None:
        """Says that the ring was written to, so that it is filled anew before the next pass."""
        self.ring_is_filled = False

    def stretch(self, nbytes: int) -> list[tuple[Tensor, Tensor]]:
        """The copy lane's first copies of at least `nbytes` together (all, if they are fewer): (host span, slot)."""
        copies, total = [], 0
        for instruction in self.pass_plan.instructions:
            if isinstance(instruction, Prefetch) and total < nbytes:
                span = self.host_spans[instruction.group]
                copies.append((span, self._targets[instruction.group]))
                total += span.nbytes
        return copies

    def slot(self, instruction: Prefetch | Release) -> Tensor:
        return slot_of(self.ring, instruction.slot)

    def _context(self, inputs: PassInputs, asked: Asked, take: Callable[[SampleOutput], None]) -> PassContext:
        act = self.arena.cut(len(inputs.tokens), len(inputs.sampled_rows))
        return PassContext(self.model, inputs, act, asked, take)

    def _watched(self, ctx: PassContext | None, instruction: Instruction) -> None:
        self.watches.around(instruction, ctx, partial(self._do, ctx, instruction))

    def _do(self, ctx: PassContext | None, instruction: Instruction) -> None:
        if isinstance(instruction, Compute):
            self.counters.steps[instruction.step] += 1
            self._compute(ctx, instruction)
        elif isinstance(instruction, Prefetch):
            span = self.host_spans[instruction.group]
            self.ledger.add(self.copy_sites[instruction.group], span.nbytes)
            self._targets[instruction.group].copy_(span, non_blocking=True)
        elif isinstance(instruction, Decompress):
            self._decompress(ctx, instruction)
        elif isinstance(instruction, Release) and self.poison:
            self.slot(instruction).fill_(0xFF)  # all ones are a NaN in every float format

    def _compute(self, ctx: PassContext, step: Compute) -> None:
        if ctx.inputs.wants_logits or not step.of_rows:
            STEPS[step.step](ctx, self.views.get(step.group, _NO_WEIGHTS), step.layer_idx)

    def _decompress(self, ctx: PassContext, instruction: Decompress) -> None:
        if self.poison:
            self.compressed[instruction.group].out.fill_(0xFF)
        self.counters.decompressed_bytes[instruction.group] += self._restorers[instruction.group](ctx.inputs.num_tokens)


def _form(weights: Weights) -> Hashable:
    """The properties of a group's weights that choose the kernels which read them, as they may differ from layer to
    layer: which there are, of which shape, and how they are stored."""
    return frozenset(
        (name, weight.shape if isinstance(weight, Tensor) else weight.form) for name, weight in weights.items()
    )
