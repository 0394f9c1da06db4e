"""Plans an engine before a byte is loaded: layout, residency, pass plan and predicted passes, from config and spec.

Torch-free, so that `penstock plan` runs on a laptop; the engine itself calls the same function. Everything is for one
rank; all ranks plan alike (spans have the same sizes on every rank).
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.engine.config import EngineConfig
from penstock.engine.model.compressed_size import planned_bytes
from penstock.engine.model.families import tensor_names
from penstock.engine.model.layout import GroupLayout, ModelLayout, model_layout
from penstock.engine.model.spec import ModelSpec
from penstock.engine.planning.device_profile import ASSUMED, find_profile, load_profile, read_device
from penstock.engine.planning.memory_claims import (
    DeviceMemory,
    MemoryClaims,
    describe_memory,
    engine_steps,
    memory_budget,
)
from penstock.engine.planning.step_cost import step_work
from penstock.engine.user_files import named_errors, refuse_cache_root
from penstock.scheduler.batching.request import INT32_MAX
from penstock.scheduler.batching.retention import KeepAll, Retention, SinksAndWindow
from penstock.scheduler.cost.pass_work import PassShape, PassWork, StepWork
from penstock.scheduler.cost.time_model import PassTime, Rates, launch_s, predict_pass, step_s
from penstock.scheduler.passes.build import make_plan
from penstock.scheduler.passes.pass_plan import Compute, GroupId, PassPlan
from penstock.scheduler.residency.compression_choice import CompressionOffer, choose_compression, settle
from penstock.scheduler.residency.decide import Residency
from penstock.scheduler.residency.demand import Demand
from penstock.scheduler.residency.family import Cost
from penstock.scheduler.residency.search import plan_fastest


@dataclass(frozen=True)
class EnginePlan:
    """The plan of an engine: all that is decided before loading. `layout` is rank 0's; `activation_offsets` are bytes
    in the arena of `activations_bytes`. `demand` is what was asked for and `offer` how weights may be compressed, to
    plan variants; `kept` is the settled demand, and `residency` its residency. `steps` are what a rank does in a pass,
    each with the number of times that it occurs. Each of `notes` says in a sentence what a user should know of the
    plan."""

    spec: ModelSpec
    dtype: str
    tp_size: int
    rates: Rates
    layout: ModelLayout
    demand: Demand
    offer: CompressionOffer
    kept: Demand
    retention: Retention
    residency: Residency
    pass_plan: PassPlan
    steps: tuple[tuple[StepWork, int], ...]
    activation_offsets: dict[str, int]
    activations_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def max_num_seqs(self) -> int:
        """The most sequences in one pass: as asked for, or as planned."""
        return self.kept.max_num_seqs


def make_engine_plan(
    config: EngineConfig,
    spec: ModelSpec,
    tp_size: int,
    device_memory: DeviceMemory | int | None,
    rates: Rates,
    notes: tuple[str, ...] = (),
) -> EnginePlan:
    """Plans one rank of `tp_size`. `device_memory` None stands for a CPU, a number for the bytes of a device that is
    all free. `notes` are those of the model, which come first among the plan's.

    Raises ValueError, with what would fit, if the config asks for more than there is, and for a tp_size that the model
    cannot have.
    """
    if isinstance(device_memory, int):
        device_memory = DeviceMemory(device_memory, device_memory)
    dtype = spec.dtype if config.dtype == "auto" else config.dtype
    layout = model_layout(spec, tensor_names(spec), dtype, tp_size, rank=0)
    claims = MemoryClaims(config, spec, dtype, tp_size, device_memory is not None, layout)
    steps = engine_steps(spec, tp_size, device_memory is not None)
    works = Counter(map(step_work(spec, layout, dtype, tp_size), steps))
    counted = tuple((work, count) for work, count in works.items() if not work.is_idle)
    demand = _demand(config, claims, memory_budget(config, device_memory))
    offer = CompressionOffer(config.weights_compression, Cost(counted, rates))
    kept, residency = choose_compression(offer, demand)
    offsets, total = claims.activations(kept.max_num_seqs)
    return EnginePlan(
        spec=spec,
        dtype=dtype,
        tp_size=tp_size,
        rates=rates,
        layout=layout,
        demand=demand,
        offer=offer,
        kept=kept,
        retention=demand.retention,
        residency=residency,
        pass_plan=_pass_plan(steps, layout, residency),
        steps=counted,
        activation_offsets=offsets,
        activations_bytes=total,
        notes=(*notes, *filter(None, [demand.retention.describe(), describe_memory(config, device_memory)])),
    )


def _demand(config: EngineConfig, claims: MemoryClaims, budget: int | None) -> Demand:
    spec, layout = claims.spec, claims.layout
    retention = _retention(config, spec)
    return Demand(
        groups=tuple((group.id, group.nbytes) for group in layout.groups),
        embed_bytes=layout.embed.nbytes,
        page_bytes=claims.page_bytes,
        page_size=config.page_size,
        max_num_seqs=config.most_seqs,
        max_position=spec.max_position,
        resident=config.resident,
        compressed={group.id: planned_bytes(group) for group in _compressible(config, spec, layout, claims.dtype)},
        buffer_bytes=claims.decompression_buffer,
        memory_bytes=budget,
        fixed=claims.fixed(config.most_seqs),
        fixed_of=claims.fixed,
        plans_num_seqs=config.max_num_seqs is None,
        ring_bytes=config.ring,
        max_model_len=_most_cached(config, retention),
        len_option="max_model_len" if retention.max_cached is None else "attention_sinks+attention_window",
        num_pages=config.num_pages,
        retention=retention,
    )


def _retention(config: EngineConfig, spec: ModelSpec) -> Retention:
    """The retention of a config. Raises ValueError if it keeps more positions than the model knows."""
    if config.attention_window is None:
        return KeepAll(config.page_size)
    made = SinksAndWindow(config.attention_sinks, config.attention_window, config.page_size)
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
    decompressed = {group.id: group.nbytes for group in layout.groups if group.id in residency.compressed}
    return make_plan(steps, residency.ring, decompressed)


def _compressible(config: EngineConfig, spec: ModelSpec, layout: ModelLayout, dtype: str) -> tuple[GroupLayout, ...]:
    """The groups that may be compressed: only bfloat16 shrinks enough, and a tied head is the embedding too, whose rows
    are gathered from it. Raises ValueError if compression is asked for and impossible."""
    if dtype == "bfloat16":
        return layout.groups[:-1] if spec.tied else layout.groups
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


def find_model(model: str) -> Path:
    """The directory or config.json that `model` names; "demo" is the model inside the package.

    Raises ValueError if there is none, and for the root of a Hugging Face cache.
    """
    with named_errors(model):
        path = Path(__file__).parents[1] / "demo_model" if model == "demo" else Path(os.path.expanduser(model))
        if not path.exists():
            raise ValueError(f"model={model!r}: no such file or directory (nothing is downloaded; 'demo' is built in)")
        refuse_cache_root(path)
    return path


def plan_rates(config: EngineConfig, tp_size: int, device: str, device_name: str | None = None) -> Rates:
    """The profile that the config names, else what `penstock probe` saved for this type of device, else a built-in one;
    with the link rate that the config gives, and without graphs if it wants none.

    `device_name`, where it is known, must be that of the saved probe; if it is not, `source` says so. Raises ValueError
    as load_profile does.
    """
    rates = _load_rates(config, tp_size, "cpu" if device == "cpu" else "cuda", device_name)
    return replace(rates, node_latency_s=None) if config.enforce_eager else rates


def _load_rates(config: EngineConfig, tp_size: int, kind: str, device_name: str | None) -> Rates:
    if config.device_profile is not None:
        return load_profile(config.device_profile, tp_size, config.link_gb_s)
    saved = find_profile(kind, tp_size)
    if saved is None:
        return load_profile(ASSUMED[kind], tp_size, config.link_gb_s)
    measured = read_device(saved)
    if device_name in (None, measured):
        return load_profile(str(saved), tp_size, config.link_gb_s)
    rates = load_profile(ASSUMED[kind], tp_size, config.link_gb_s)
    return replace(rates, source=f"{rates.source}; the saved probe is of {measured}, not {device_name}")


def pass_work(plan: EnginePlan, residency: Residency | None = None) -> PassWork:
    """What a rank does in a pass, by the plan's residency or by another one of the same demand."""
    residency = residency or plan.residency
    embed_bytes = plan.layout.embed.nbytes if residency.embed_resident else 0  # no group: few of its rows are read
    decompressed_bytes = sum(group.nbytes for group in plan.layout.groups if group.id in residency.compressed)
    resident_bytes = residency.resident_bytes - embed_bytes
    return PassWork(residency.streamed_bytes, resident_bytes, plan.steps, len(residency.compressed), decompressed_bytes)


def step_seconds(plan: EnginePlan, shape: PassShape) -> tuple[Callable[[Compute], float], Rates, float]:
    """What predict_timeline takes for a pass of this shape: the seconds of a step, the rates, the seconds of a
    launch."""
    work = step_work(plan.spec, plan.layout, plan.dtype, plan.tp_size)
    return lambda step: step_s(work(step), shape, plan.rates), plan.rates, launch_s(shape, plan.rates)


def decode_time(work: PassWork, num_seqs: int, context_tokens: int, rates: Rates) -> PassTime:
    """The time of a decode pass of `num_seqs` rows, each of which attends to `context_tokens`."""
    return predict_pass(work, PassShape(num_seqs, num_seqs, num_seqs * context_tokens), rates)


def most_seqs(demand: Demand, residency: Residency, context_tokens: int) -> int:
    """The most sequences of `context_tokens` that decode at once, as the KV cache and max_num_seqs allow. That many
    give most tokens/s, since each more lengthens a pass by less than its share."""
    return min(demand.max_num_seqs, (residency.num_pages - 1) // demand.pages(context_tokens))
