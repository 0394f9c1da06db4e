"""Builds what one rank computes with, a Worker, from an EnginePlan: a function for each part.

A Worker runs the batches it is given and decides nothing.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from penstock.engine.compute.arena import ActivationArena, aligned_bytes, slot_of
from penstock.engine.compute.context import Embedding, ModelContext
from penstock.engine.compute.kv_cache import make_cache
from penstock.engine.compute.rope import rope_table
from penstock.engine.compute.sampler import Sampler
from penstock.engine.config import EngineConfig
from penstock.engine.model.layout import ModelLayout
from penstock.engine.model.shard import local_vocab_size, shard_heads
from penstock.engine.model.steps import activation_widths
from penstock.engine.planning.engine_plan import EnginePlan, settle_plan
from penstock.engine.planning.kv_tier import num_host_pages
from penstock.engine.planning.memory_claims import num_staged_pages
from penstock.engine.runtime.binding import bound_to, on_own_device
from penstock.engine.runtime.executor import Compressed, Executor, Weights
from penstock.engine.runtime.lanes import CudaLanes, InterleavedLanes, Lanes
from penstock.engine.runtime.page_moves import PageMover
from penstock.engine.runtime.pass_runner import PassRunner, RunAs
from penstock.engine.runtime.progress import Progress
from penstock.engine.runtime.watch import Watches
from penstock.engine.weights.host_store import LoadedWeights, WeightSource, load_weights
from penstock.engine.weights.kept_group import stored_group
from penstock.parallel.collectives import Collectives
from penstock.parallel.topology import Topology
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.units import show_bytes
from torch import Tensor
from tqdm import tqdm

_SMALLER = "max_num_seqs, max_num_batched_tokens, num_pages or page_size"


@contextlib.contextmanager
def _host_memory(plan: EnginePlan) -> Iterator[None]:
    """Raises MemoryError, with what was planned, where torch's RuntimeError says that the system has no more memory."""
    try:
        yield
    except RuntimeError as error:
        if "DefaultCPUAllocator: can't allocate memory" not in str(error):
            raise
        claims = ", ".join(f"{name} {show_bytes(nbytes)}" for name, nbytes in plan.residency.claims)
        raise MemoryError(
            f"the system refuses so much host memory ({claims}): a smaller {_SMALLER} asks for less"
        ) from None


@dataclass(frozen=True)
class Worker:
    """Holds what one rank computes with: `runner` runs batches by `executor`. `plan` has the sizes that compressed
    groups turned out to have."""

    plan: EnginePlan
    weights: LoadedWeights
    executor: Executor
    runner: PassRunner

    @property
    def device(self) -> torch.device:
        return self.executor.device

    def transfers(self) -> dict[str, Any]:
        """The bytes that were moved, for JSON: weights that were copied, by group, all-reduces, by step, KV pages."""
        moved = {"weights": self.executor.copied.to_dict(), "all_reduces": self.executor.reduced.to_dict()}
        mover = self.runner.mover
        return moved if mover is None else moved | {"kv_pages": mover.moved.to_dict()}

    @on_own_device
    def close(self) -> None:
        """Waits for the device, then frees what torch does not; idempotent."""
        self.runner.close()
        self.weights.close()


@dataclass(frozen=True)
class Ingredients:
    """Holds what the parts of a worker are built from. `ranks_on_host` share this host's memory and CPUs."""

    config: EngineConfig
    plan: EnginePlan
    topology: Topology
    collectives: Collectives
    watches: Watches
    ranks_on_host: int = 1

    @property
    def device(self) -> torch.device:
        return self.topology.device


def build_worker(given: Ingredients, source: WeightSource, progress: Progress | None = None) -> Worker:
    """Loads the weights and builds all that computes with them, and tells `progress`. Raises ValueError, or
    CompressionDoesNotPay, where compressed weights turn out not to fit, MemoryError where the host's memory is too
    small; nothing is left then."""
    progress = progress or Progress()
    with bound_to(given.device), _host_memory(given.plan):
        layout = given.plan.rank_layout(given.topology.rank)
        weights = load(given, source, layout, progress)
        try:
            progress.part = "building"
            given = replace(given, plan=settled(given, weights))
            executor = build_executor(given, layout, weights)
            worker = Worker(given.plan, weights, executor, build_runner(given, executor))
        except BaseException:
            weights.close()
            raise
        progress.part = "done"
        return worker


def load(given: Ingredients, source: WeightSource, layout: ModelLayout, progress: Progress) -> LoadedWeights:
    residency, topology = given.plan.residency, given.topology
    progress.begin_loading(layout.nbytes)
    quiet = topology.rank > 0 or None  # None: shown on a terminal only
    with tqdm(total=layout.nbytes, unit="B", unit_scale=True, desc="loading", disable=quiet, leave=False) as bar:
        return load_weights(
            source,
            layout,
            {group for group, _ in residency.streamed},
            embed_on_host=not residency.embed_resident,
            device=given.device,
            compressed=residency.compressed,
            progress=lambda nbytes: (bar.update(nbytes), progress.add(nbytes)),
            ranks_on_host=given.ranks_on_host,
            kv_bytes=num_host_pages(given.config, given.plan) * given.plan.demand.page_bytes,
        )


def settled(given: Ingredients, weights: LoadedWeights) -> EnginePlan:
    """The plan with the bytes that compressed groups have, now that they are known; the same plan on all ranks."""
    groups = sorted(weights.compressed)
    if not groups:
        return given.plan
    largest = given.collectives.largest([weights.compressed[group].nbytes for group in groups])
    return settle_plan(given.plan, dict(zip(groups, largest)))


def build_executor(given: Ingredients, layout: ModelLayout, weights: LoadedWeights) -> Executor:
    plan, config, device = given.plan, given.config, given.device
    ring = aligned_bytes(plan.residency.ring.ring_bytes, device)
    buffer = aligned_bytes(plan.pass_plan.decompression_buffer_bytes, device)
    compressed = find_compressed(plan, layout, weights, ring, buffer)
    return Executor(
        pass_plan=plan.pass_plan,
        model=build_model(given, find_embed(plan, layout, weights)),
        views=find_views(plan, layout, weights, ring, compressed),
        host_spans=weights.host_spans,
        ring=ring,
        arena=build_arena(given),
        lanes=build_lanes(given),
        watches=given.watches,
        compressed=compressed,
        poison=config.debug.poison,
    )


def build_model(given: Ingredients, embed: Embedding) -> ModelContext:
    """The part of a rank that embeds by `embed`."""
    plan, topology = given.plan, given.topology
    max_context, dtype = plan.residency.max_model_len, getattr(torch, plan.dtype)
    spec = plan.spec.within(max_context)
    heads = shard_heads(spec.num_heads, spec.num_kv_heads, topology.tp_size, topology.rank)
    rope = rope_table(spec.rope, max_context, dtype, given.device)
    return ModelContext(
        spec=spec,
        num_heads=heads.num_heads,
        num_kv_heads=len(heads.kv_heads),
        first_vocab=topology.rank * local_vocab_size(spec.vocab_size, topology.tp_size),
        embed=embed,
        rope=rope,
        kv=make_cache(plan, given.config.page_size, len(heads.kv_heads), rope),
        sampler=Sampler(plan.max_num_seqs, spec.vocab_size, given.device),
        collectives=given.collectives,
    )


def build_arena(given: Ingredients) -> ActivationArena:
    plan, dtype = given.plan, getattr(torch, given.plan.dtype)
    widths = activation_widths(plan.spec, given.topology.tp_size)
    most = (plan.max_num_batched_tokens, plan.max_num_seqs)
    return ActivationArena(plan.activation_offsets, plan.activations_bytes, widths, *most, dtype, given.device)


def build_lanes(given: Ingredients) -> Lanes:
    if given.device.type == "cuda":
        return CudaLanes(given.device)
    return InterleavedLanes(given.config.debug.lanes, given.config.seed)


def build_runner(given: Ingredients, executor: Executor) -> PassRunner:
    """The runner, with its graphs captured if that is wanted at start. Decode and short passes are padded on a GPU,
    where this makes them graphs; on a CPU it gains nothing, and only shows what a GPU would do."""
    config, on_gpu = given.config, given.device.type == "cuda"
    if on_gpu and not config.enforce_eager:
        run_as = RunAs.GRAPHS
    else:
        run_as = RunAs.PADDED if on_gpu or config.debug.as_on_gpu else RunAs.EAGER
    plan = given.plan
    mover = build_mover(given, executor)
    runner = PassRunner(executor, run_as, plan.max_num_seqs, plan.residency.max_model_len, mover)
    if run_as is RunAs.GRAPHS and config.capture == "start":
        try:
            runner.capture_all()
        except BaseException:
            runner.close()
            raise
    return runner


def build_mover(given: Ingredients, executor: Executor) -> PageMover | None:
    """The mover of KV pages to host memory and back; None where none will move."""
    num_pages = num_host_pages(given.config, given.plan)
    if not num_pages:
        return None
    num_staged = num_staged_pages(given.config, given.plan.demand.page_bytes)
    return PageMover(executor.model.kv.pages, num_pages, num_staged, executor.lanes, given.config.debug.poison)


def find_embed(plan: EnginePlan, layout: ModelLayout, weights: LoadedWeights) -> Embedding:
    """The embedding, or the head where they are tied; on the device or in the host arena."""
    group, name = (layout.groups[-1], "head") if plan.spec.tied else (layout.embed, "embed")
    resident = weights.resident.get(group.id)
    held = weights.host_spans[group.id] if resident is None else resident
    kept = next(each for each in stored_group(group).weights if each.weight.name == name)
    return kept.view(held, held) if kept.in_place else kept.rows[0].run(held)


def find_compressed(
    plan: EnginePlan, layout: ModelLayout, weights: LoadedWeights, ring: Tensor, buffer: Tensor
) -> dict[GroupId, Compressed]:
    """Says where each group that is compressed or quantised lies in a pass, and where its floats go."""
    slots = dict(plan.residency.ring.slots)
    outs = {step.group: step.slot for step in plan.pass_plan.decompressions}
    kept = {group.id: stored_group(group) for group in layout.groups if group.is_quantised} | weights.compressed
    compressed = {}
    for group_id, group in kept.items():
        held = slot_of(ring, slots[group_id]) if group_id in slots else weights.resident[group_id]
        compressed[group_id] = Compressed(group, held[: group.nbytes], slot_of(buffer, outs[group_id]))
    return compressed


def find_views(
    plan: EnginePlan,
    layout: ModelLayout,
    weights: LoadedWeights,
    ring: Tensor,
    compressed: Mapping[GroupId, Compressed],
) -> dict[GroupId, Weights]:
    """Every group's weights by name, where a pass reads them."""
    spans = {group.id: weights.resident.get(group.id) for group in layout.groups}
    spans |= {group: slot_of(ring, slot) for group, slot in plan.residency.ring.slots}
    plain = {group.id: stored_group(group) for group in layout.groups if group.id not in compressed}
    named = {group: kept.views(spans[group], spans[group]) for group, kept in plain.items()}
    return named | {group: one.group.views(one.blob, one.out) for group, one in compressed.items()}
