"""Builds what one rank computes with: its shard of the weights, ring, KV cache and executor, from an EnginePlan.

A Worker runs the batches it is given and decides nothing. Nothing is allocated before plan and checkpoint are checked.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from penstock.engine.compute.arena import ActivationArena, aligned_bytes, slot_of
from penstock.engine.compute.kv_cache import make_cache
from penstock.engine.compute.ops import StepContext
from penstock.engine.compute.rope import rope_table
from penstock.engine.compute.sampler import Sampler
from penstock.engine.config import EngineConfig
from penstock.engine.model.families import tensor_names
from penstock.engine.model.layout import GroupLayout, ModelLayout, expected_tensors, model_layout
from penstock.engine.model.shard import shard_heads
from penstock.engine.model.steps import activation_widths
from penstock.engine.planning.engine_plan import EnginePlan, settle_plan
from penstock.engine.runtime.binding import on_own_device
from penstock.engine.runtime.decode import DecodePasses
from penstock.engine.runtime.executor import Compressed, Executor
from penstock.engine.runtime.lanes import CudaLanes, InterleavedLanes, Lanes
from penstock.engine.runtime.trace import RecordingTracer, Tracer
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.dummy import DummyWeights
from penstock.engine.weights.host_store import LoadedWeights, WeightSource, load_weights
from penstock.engine.weights.views import views
from penstock.parallel.collectives import Collectives
from penstock.parallel.topology import Topology
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.units import show_bytes
from tqdm import tqdm


def open_source(config: EngineConfig, path: Path, plan: EnginePlan, device: torch.device) -> WeightSource:
    """The checked checkpoint, or random weights. Raises ValueError naming the file and tensor that is wrong."""
    names = tensor_names(plan.spec)
    expected = expected_tensors(plan.spec, names)
    if config.load_format == "dummy":
        return DummyWeights(expected, config.seed)
    checkpoint = Checkpoint.open(path)
    checkpoint.check(expected, names.ignorable)
    return checkpoint


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


def pad_decode_passes(executor: Executor, config: EngineConfig, plan: EnginePlan) -> None:
    """Makes decode passes run in padded buckets, on a CUDA device as graphs. On a CPU this gains nothing: there only
    tests call it, to run the same code as on a GPU."""
    use_graphs = executor.device.type == "cuda" and not config.enforce_eager
    executor.decode = DecodePasses(executor, plan.max_num_seqs, plan.residency.max_model_len, use_graphs)


class Worker:
    """`executor` runs batches once this is built; `close` frees every byte it holds. `plan` is the given one, with the
    sizes that compressed groups turned out to have."""

    def __init__(
        self, config: EngineConfig, plan: EnginePlan, source: WeightSource, topology: Topology, collectives: Collectives
    ):
        self.plan, self.device = plan, topology.device
        self.tracer = RecordingTracer(self.device) if config.trace else Tracer()
        self.executor = None
        self._build(config, source, topology, collectives)

    @on_own_device
    def _build(self, config: EngineConfig, source: WeightSource, topology: Topology, collectives: Collectives) -> None:
        plan = self.plan
        layout = model_layout(plan.spec, tensor_names(plan.spec), plan.dtype, topology.tp_size, topology.rank)
        with _host_memory(plan):
            self.weights = self._load(source, layout, topology)
            try:
                self.plan = self._settled(collectives)
                self.executor = self._executor(config, layout, topology, collectives)
            except BaseException:
                self.close()
                raise

    def _load(self, source: WeightSource, layout: ModelLayout, topology: Topology) -> LoadedWeights:
        streamed = {group for group, _ in self.plan.residency.streamed}
        quiet = topology.rank > 0 or None  # None: shown on a terminal only
        bar = tqdm(total=layout.nbytes, unit="B", unit_scale=True, desc="loading", disable=quiet, leave=False)
        embed_on_host = not self.plan.residency.embed_resident
        with bar:
            return load_weights(
                source,
                layout,
                streamed,
                embed_on_host,
                self.device,
                compressed=self.plan.residency.compressed,
                progress=bar.update,
                ranks_on_host=topology.ranks_on_host,
            )

    def _settled(self, collectives: Collectives) -> EnginePlan:
        """The plan with the bytes that compressed groups have, now that they are known; the same plan on all ranks."""
        groups = sorted(self.weights.compressed)
        if not groups:
            return self.plan
        largest = collectives.largest([self.weights.compressed[group].nbytes for group in groups])
        return settle_plan(self.plan, dict(zip(groups, largest)))

    def _executor(
        self, config: EngineConfig, layout: ModelLayout, topology: Topology, collectives: Collectives
    ) -> Executor:
        plan, residency, device = self.plan, self.plan.residency, self.device
        dtype = getattr(torch, plan.dtype)
        ring = aligned_bytes(residency.ring.ring_bytes, device)
        compressed = self._compressed(ring, aligned_bytes(plan.pass_plan.decompression_buffer_bytes, device))
        widths = activation_widths(plan.spec, topology.tp_size)
        most = (config.max_num_batched_tokens, plan.max_num_seqs)
        arena = ActivationArena(plan.activation_offsets, plan.activations_bytes, widths, *most, dtype, device)
        executor = Executor(
            plan=plan.pass_plan,
            context=self._context(config, layout, topology, collectives, dtype),
            views=self._views(layout, ring, compressed),
            host_spans=self.weights.host_spans,
            ring=ring,
            arena=arena,
            lanes=self._lanes(config),
            tracer=self.tracer,
            compressed=compressed,
            poison=config.debug.poison,
        )
        if device.type == "cuda":
            pad_decode_passes(executor, config, plan)
        return executor

    def _context(self, config, layout: ModelLayout, topology: Topology, collectives, dtype: torch.dtype) -> StepContext:
        spec, residency, device = self.plan.spec, self.plan.residency, self.device
        heads = shard_heads(spec.num_heads, spec.num_kv_heads, topology.tp_size, topology.rank)
        num_kv_heads = len(heads.kv_heads)
        embed = self._embed(layout)
        rope = rope_table(spec.rope, residency.max_model_len, dtype, device)
        return StepContext(
            spec=spec,
            num_heads=heads.num_heads,
            num_kv_heads=num_kv_heads,
            first_vocab=topology.rank * embed.shape[0],
            embed=embed,
            rope=rope,
            kv=make_cache(self.plan, config.page_size, num_kv_heads, rope),
            sampler=Sampler(self.plan.max_num_seqs, spec.vocab_size, device),
            collectives=collectives,
        )

    def _embed(self, layout: ModelLayout) -> torch.Tensor:
        """The embedding (V, D), or the head where they are tied; on the device or in the host arena."""
        head = layout.groups[-1]
        group, name = (head, "head") if self.plan.spec.tied else (layout.embed, "embed")
        return views(group, self._span(group))[name]

    def _span(self, group: GroupLayout) -> torch.Tensor:
        resident = self.weights.resident.get(group.id)
        return self.weights.host_spans[group.id] if resident is None else resident

    def _compressed(self, ring: torch.Tensor, buffer: torch.Tensor) -> dict[GroupId, Compressed]:
        slots = dict(self.plan.residency.ring.slots)
        outs = {step.group: step.slot for step in self.plan.pass_plan.decompressions}
        compressed = {}
        for group_id, group in self.weights.compressed.items():
            held = slot_of(ring, slots[group_id]) if group_id in slots else self.weights.resident[group_id]
            compressed[group_id] = Compressed(group, held[: group.nbytes], slot_of(buffer, outs[group_id]))
        return compressed

    def _views(
        self, layout: ModelLayout, ring: torch.Tensor, compressed: dict[GroupId, Compressed]
    ) -> dict[GroupId, dict[str, torch.Tensor]]:
        spans = {group.id: self.weights.resident.get(group.id) for group in layout.groups}
        spans |= {group: slot_of(ring, slot) for group, slot in self.plan.residency.ring.slots}
        spans |= {group: one.out for group, one in compressed.items()}
        return {group.id: views(group, spans[group.id]) for group in layout.groups}

    def _lanes(self, config: EngineConfig) -> Lanes:
        if self.device.type == "cuda":
            return CudaLanes(self.device, self.tracer)
        return InterleavedLanes(config.debug.lanes, config.seed, self.tracer)

    @on_own_device
    def close(self) -> None:
        """Waits for the device, then frees; idempotent."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.executor is not None and self.executor.decode is not None:
            self.executor.decode.close()
            self.executor.decode = None
        self.executor = None
        self.weights.close()
