"""Plans an engine before a byte is loaded: layout, residency, pass plan and predicted passes, from config and spec.

Torch-free, so that `penstock plan` runs on a laptop; the engine itself calls the same function. Everything is for one
rank; all ranks have the same plan (spans have the same sizes on every rank).
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from penstock.engine.config import EngineConfig
from penstock.engine.model.compressed_size import planned_bytes
from penstock.engine.model.families import tensor_names
from penstock.engine.model.group_layout import GroupLayout
from penstock.engine.model.layout import ModelLayout, model_layout, without_kernels
from penstock.engine.model.spec import ModelSpec
from penstock.engine.planning.decision import Decision
from penstock.engine.planning.memory_claims import (
    DeviceMemory,
    MemoryClaims,
    describe_memory,
    engine_steps,
    memory_budget,
)
from penstock.engine.planning.step_cost import dequantise_work, step_seconds_of, step_work
from penstock.scheduler.batching.request import INT32_MAX
from penstock.scheduler.batching.retention import KeepAll, Retention, SinksAndWindow
from penstock.scheduler.cost.pass_work import MOST_PADDED_TOKENS, PassShape, StepWork
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.cost.timeline import waited_s
from penstock.scheduler.passes.build import make_plan
from penstock.scheduler.passes.pass_plan import Compute, Decompress, GroupId, PassPlan
from penstock.scheduler.residency.compression_choice import CompressionOffer, choose_compression, settle
from penstock.scheduler.residency.decide import Residency, plan_residency
from penstock.scheduler.residency.demand import KV_PARTS, Demand
from penstock.scheduler.residency.family import Cost
from penstock.scheduler.residency.search import plan_fastest
from penstock.scheduler.units import GB


@dataclass(frozen=True)
class EnginePlan:
    """The plan of an engine: all that is decided before loading. `activation_offsets` are bytes in the arena of
    `activations_bytes`; a pass has at most `max_num_batched_tokens`. `demand` is what was asked for and `offer` how
    weights may be compressed, to plan variants; `kept` is the settled demand, and `residency` its residency.
    `has_kernels` tells whether quantised weights are read by kernels. `steps` are what a rank does in a pass, each with
    the number of times that it occurs. Each of `notes` says in a sentence what a user should know of the plan."""

    spec: ModelSpec
    dtype: str
    tp_size: int
    rates: Rates
    has_kernels: bool
    demand: Demand
    offer: CompressionOffer
    kept: Demand
    retention: Retention
    residency: Residency
    pass_plan: PassPlan
    steps: tuple[tuple[StepWork, int], ...]
    max_num_batched_tokens: int
    activation_offsets: dict[str, int]
    activations_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def max_num_seqs(self) -> int:
        """The most sequences in one pass: as asked for, or as planned."""
        return self.kept.max_num_seqs

    @functools.cached_property
    def layout(self) -> ModelLayout:
        """The layout of rank 0."""
        return self.rank_layout(0)

    def rank_layout(self, rank: int) -> ModelLayout:
        """The layout of a rank, as its weights are kept."""
        layout = model_layout(self.spec, tensor_names(self.spec), self.dtype, self.tp_size, rank)
        return layout if self.has_kernels else without_kernels(layout, _floats(self.kept, self.residency))

    def step_seconds(self, shape: PassShape) -> Callable[[Compute | Decompress], float]:
        """Gives the seconds of a step in a pass of this shape."""
        about = (self.spec, self.layout, self.dtype, self.tp_size, self.rates)
        return step_seconds_of(*about, shape, self.residency.compressed)

    @functools.cached_property
    def waited_bytes(self) -> int:
        """The bytes of copies that compute waits for, in a pass whose lanes take as long as each other."""
        seconds_waited = waited_s(self.pass_plan, self.step_seconds(PassShape(MOST_PADDED_TOKENS, 1, 0)), self.rates)
        return int(seconds_waited * self.rates.link_gb_s * GB)

    @property
    def decision(self) -> Decision:
        """Says what the search decided."""
        job_num_seqs = None if self.demand.plans_num_seqs else self.demand.max_num_seqs
        return Decision(job_num_seqs, self.max_num_seqs, self.max_num_batched_tokens, self.residency.split, self.rates)


def make_engine_plan(
    config: EngineConfig,
    spec: ModelSpec,
    tp_size: int,
    device_memory: DeviceMemory | int | None,
    rates: Rates,
    notes: tuple[str, ...] = (),
    decided: Decision | None = None,
) -> EnginePlan:
    """Plans one rank of `tp_size`. `device_memory` None is a CPU; a number is that of a device that is all free.
    `notes` are those of the model, which come first among the plan's. With `decided` nothing is searched.

    Raises ValueError, with what would fit, if the config asks for more than there is, and for a tp_size that the model
    cannot have.
    """
    if isinstance(device_memory, int):
        device_memory = DeviceMemory(device_memory, device_memory)
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    layout = model_layout(spec, tensor_names(spec), dtype, tp_size, 0)
    num_tokens = config.least_batched_tokens if decided is None else decided.num_tokens
    claims = MemoryClaims(config, spec, dtype, tp_size, device_memory is not None, layout, num_tokens)
    if not claims.has_kernels:
        claims = replace(claims, layout=without_kernels(layout, frozenset()))
    steps = engine_steps(spec, tp_size, claims.has_kernels)
    demand = _demand(config, claims, memory_budget(config, device_memory))
    cost = Cost(_work_of(steps, spec, claims.layout, tp_size, rates), rates)
    offer = CompressionOffer(config.weights_compression, cost)
    if decided is None:
        kept, residency = choose_compression(offer, demand)
        if config.max_num_batched_tokens is None:
            claims, demand, kept, residency = _with_free_tokens(claims, offer.cost, demand, kept, residency)
    else:
        kept = demand.planned_for(decided.num_seqs)
        residency = plan_residency(kept, decided.split)
    offsets, total = claims.activations(kept.max_num_seqs)
    if not claims.has_kernels:
        layout = without_kernels(layout, _floats(kept, residency))
    return EnginePlan(
        spec=spec,
        dtype=dtype,
        tp_size=tp_size,
        rates=rates,
        has_kernels=claims.has_kernels,
        demand=demand,
        offer=offer,
        kept=kept,
        retention=demand.retention,
        residency=residency,
        pass_plan=_pass_plan(steps, layout, residency),
        steps=cost.steps if claims.has_kernels else _work_of(steps, spec, layout, tp_size, rates),
        max_num_batched_tokens=claims.most_tokens,
        activation_offsets=offsets,
        activations_bytes=total,
        notes=(*notes, *filter(None, [demand.retention.describe(), describe_memory(config, device_memory)])),
    )


def _work_of(
    steps: list[Compute], spec: ModelSpec, layout: ModelLayout, tp_size: int, rates: Rates
) -> tuple[tuple[StepWork, int], ...]:
    """The work of a rank in a pass, each step with the number of times that it occurs."""
    works = Counter(map(step_work(spec, layout, layout.dtype, tp_size), steps))
    works.update(dequantise_work(group, rates) for group in layout.groups if group.is_quantised)
    return tuple((work, count) for work, count in works.items() if not work.is_idle)


def _floats(demand: Demand, residency: Residency) -> frozenset[GroupId]:
    """The quantised groups that are floats, since they stay where no kernel reads them."""
    return residency.resident & demand.floats.keys()


def _demand(config: EngineConfig, claims: MemoryClaims, budget: int | None) -> Demand:
    spec, layout = claims.spec, claims.layout
    retention = _retention(config, spec)
    quantised = [group for group in layout.groups if group.is_quantised]
    compressible = _compressible(config, spec, layout, claims.dtype)
    return Demand(
        groups=tuple((group.id, group.stored_bytes) for group in layout.groups),
        embed_bytes=layout.embed.stored_bytes,
        page_bytes=claims.page_bytes,
        page_size=config.page_size,
        max_num_seqs=config.most_seqs,
        max_position=spec.max_position,
        resident=config.resident,
        compressed={group.id: planned_bytes(group) for group in compressible},
        decompressed={group.id: group.float_bytes for group in compressible},
        quantised=frozenset(group.id.name for group in quantised),
        floats={group.id: group.nbytes for group in quantised} if budget is None and not claims.has_kernels else {},
        buffer_bytes=claims.decompression_buffer,
        memory_bytes=budget,
        fixed=claims.fixed(config.most_seqs),
        fixed_of=claims.fixed,
        plans_num_seqs=config.max_num_seqs is None,
        most_let_in=claims.most_tokens,
        ring_bytes=config.ring,
        max_model_len=_most_cached(config, retention),
        len_option="max_model_len" if retention.max_cached is None else "attention_sinks+attention_window",
        num_pages=config.num_pages,
        retention=retention,
        gathered_page_bytes=claims.gathered_page_bytes,
        partials_page_bytes=claims.partials_page_bytes,
    )


def _with_free_tokens(
    claims: MemoryClaims, cost: Cost, demand: Demand, kept: Demand, residency: Residency
) -> tuple[MemoryClaims, Demand, Demand, Residency]:
    """The same split for passes of all tokens that the link hides, if these are more than the passes have, and their
    activations take no more than a small part of the KV cache."""
    more = replace(claims, most_tokens=cost.free_tokens(demand, residency))
    extra_bytes = replace(kept, fixed=more.fixed(kept.max_num_seqs)).fixed_bytes - kept.fixed_bytes
    if more.most_tokens <= claims.most_tokens or extra_bytes > residency.num_pages * demand.page_bytes // KV_PARTS:
        return claims, demand, kept, residency
    demand, kept = (replace(each, fixed=more.fixed(each.max_num_seqs), fixed_of=more.fixed) for each in (demand, kept))
    return more, demand, kept, plan_residency(kept, residency.split)


def retention_of(config: EngineConfig) -> Retention:
    """The retention of a config, whatever model it is for. Raises ValueError for a window smaller than a page."""
    if config.attention_window is None:
        return KeepAll(config.page_size)
    return SinksAndWindow(config.attention_sinks, config.attention_window, config.page_size)


def _retention(config: EngineConfig, spec: ModelSpec) -> Retention:
    """The retention of a config. Raises ValueError if it keeps more positions than the model knows."""
    made = retention_of(config)
    if config.attention_window is None:
        return made
    narrowest = min((window for window in spec.windows if window is not None), default=spec.max_position)
    if made.max_cached > min(narrowest, spec.max_position):
        trained = "was trained for" if narrowest >= spec.max_position else "has layers that see"
        raise ValueError(
            f"attention_sinks={config.attention_sinks} and attention_window={config.attention_window} are"
            f" {made.max_cached} tokens, and the model {trained} {min(narrowest, spec.max_position)}"
        )
    return made


def longest_sequence(config: EngineConfig, plan: EnginePlan) -> int:
    """The most tokens of a request. Where the cache drops old tokens, only max_model_len bounds them."""
    if plan.retention.max_cached is None:
        return plan.residency.max_model_len
    return min(config.max_model_len or INT32_MAX, INT32_MAX)


def _most_cached(config: EngineConfig, retention: Retention) -> int | None:
    """Tokens of a sequence that must fit; None where as many are kept as do fit."""
    bounds = [bound for bound in (config.max_model_len, retention.max_cached) if bound is not None]
    return min(bounds, default=None)


def _pass_plan(steps: list[Compute], layout: ModelLayout, residency: Residency) -> PassPlan:
    quantised = {group.id for group in layout.groups if group.is_quantised}
    kept = residency.compressed | quantised
    decompressed = {group.id: group.nbytes for group in layout.groups if group.id in kept}
    return make_plan(steps, residency.ring, decompressed, partly=quantised)


def _compressible(config: EngineConfig, spec: ModelSpec, layout: ModelLayout, dtype: str) -> tuple[GroupLayout, ...]:
    """The groups that may be compressed: only bfloat16 shrinks enough, so one must have a matrix of it, and a tied head
    is the embedding too, whose rows are gathered from it. Raises ValueError if compression is asked for and
    impossible."""
    if dtype == "bfloat16":
        groups = layout.groups[:-1] if spec.tied else layout.groups
        return tuple(group for group in groups if group.has_float_matrix)
    if config.weights_compression == "lossless":
        raise ValueError(f"weights_compression='lossless' compresses only bfloat16 weights, but dtype is {dtype}")
    return ()


def settle_plan(plan: EnginePlan, compressed_bytes: dict[GroupId, int]) -> EnginePlan:
    """The plan with the bytes that its compressed groups really have, the most of any rank. Raises as settle does."""
    return _with(plan, *settle(plan.offer, (plan.kept, plan.residency), compressed_bytes))


def plain_plan(plan: EnginePlan) -> EnginePlan:
    """The same engine, for as many sequences, with plain weights. Raises ValueError if it does not fit."""
    return _with(plan, *plan_fastest(plan.demand.asked_for(plan.max_num_seqs), plan.offer.cost, compressed=False))


def _with(plan: EnginePlan, kept: Demand, residency: Residency) -> EnginePlan:
    steps = _pass_plan(list(plan.pass_plan.steps), plan.layout, residency)
    return replace(plan, kept=kept, residency=residency, pass_plan=steps)
