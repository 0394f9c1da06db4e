"""`penstock plan` shows what stays, what streams and how fast that is, from a config.json alone.

It imports neither torch nor transformers, so that it answers at once, also on a laptop. engine/planning makes the plan;
this file shows it.
"""

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from penstock.engine.commands.flags import Groups
from penstock.engine.config import EngineConfig
from penstock.engine.model.spec import DTYPE_BYTES
from penstock.engine.model.steps import activation_widths
from penstock.engine.planning.device_profile import find_profile, plan_rates, ranks
from penstock.engine.planning.engine_plan import EnginePlan, longest_sequence, make_engine_plan
from penstock.engine.planning.find_model import find_model
from penstock.engine.planning.kv_tier import describe_host_pages, num_host_pages
from penstock.engine.planning.predictions import decode_time, most_seqs, pass_work, step_seconds
from penstock.engine.streams import visible
from penstock.engine.weights.read_model import read_model_to_plan
from penstock.parallel.launch import resolve_launch
from penstock.scheduler.batching.request import INT32_MAX
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.time_model import free_tokens
from penstock.scheduler.cost.timeline import predict_timeline, timeline_s
from penstock.scheduler.passes.pass_table import render
from penstock.scheduler.residency.compression_choice import Planned, choose_compression
from penstock.scheduler.residency.decide import Residency
from penstock.scheduler.residency.demand import KV_LEN, Demand
from penstock.scheduler.residency.residency_table import Prediction, Variant, gives_up, short_table, table
from penstock.scheduler.residency.search import STREAMING_GAIN
from penstock.scheduler.units import GIB, show_bytes, show_count

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # of Linux and of Windows' Subsystem for it


def add_arguments(groups: Groups) -> None:
    """Options of `plan` beside the engine's own."""
    parser = groups.everyday
    text = f"context of each sequence in the predictions (default: {KV_LEN})"
    parser.add_argument("--context", type=int, default=KV_LEN, metavar="TOKENS", help=text)
    parser.add_argument("--table", action="store_true", help="print the step table of a pass as well")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--short", action="store_true", help="print ten lines at most, without other splits and notes")
    forms.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Prints the plan; returns the exit status. Raises ValueError for what cannot be planned."""
    if not 1 <= args.context <= INT32_MAX:
        raise ValueError(f"context={args.context}: expected a positive number of tokens, at most {INT32_MAX}")
    plan = plan_of(config)
    if _is_elsewhere(config, plan):
        print("note: no GPU here: --device cpu plans for this machine", file=sys.stderr)
    context = min(args.context, plan.residency.max_model_len)
    if args.json:
        print(json.dumps(summary(config, plan, context)))
        return 0
    print(describe_shortly(config, plan, context) if args.short else describe(config, plan, args.context))
    if args.table:
        print(f"\nstep table of a pass:\n{step_table(plan)}")
    return 0


def _is_elsewhere(config: EngineConfig, plan: EnginePlan) -> bool:
    """Tells whether a GPU was planned for that nobody named and no driver of this machine has."""
    is_named = config.device != "auto" or config.device_profile is not None or config.gpu_memory is not None
    is_measured = find_profile("cuda", plan.tp_size) is not None
    return not (is_named or is_measured or any(map(os.path.exists, GPU_DRIVERS)))


def describe(config: EngineConfig, plan: EnginePlan, context: int) -> str:
    """The plan in words and tables: memory, predicted passes for `context` tokens a sequence, other splits."""
    heading = f"{_title(config, plan)}\n{_budget(config, plan)}\n\n"
    return heading + _report(config, plan, min(context, plan.residency.max_model_len), context)


def describe_shortly(config: EngineConfig, plan: EnginePlan, context: int) -> str:
    """The plan in ten lines at most, for `context` tokens a sequence, no more than the longest one."""
    this = as_variant(plan, (plan.kept, plan.residency), context, f"one sequence at {context} tokens")
    seqs = f"{plan.max_num_seqs:>12}   {why_num_seqs(config, plan)}"
    table = short_table(plan.residency, config.page_size, seqs, plan.rates, this.one, this.best)
    return f"{_title(config, plan)}\n{table}"


def plan_of(config: EngineConfig) -> EnginePlan:
    """The plan of a config on the device that its profile describes. Raises ValueError as its parts do."""
    model = read_model_to_plan(find_model(config.model), dummy=config.load_format == "dummy")
    tp_size, ranks_on_host, rank_notes = _planned_ranks(config)
    rates = plan_rates(config, tp_size, config.device, ranks_on_host=ranks_on_host)
    return make_engine_plan(config, model.spec, tp_size, rates.memory_bytes, rates, (*model.notes, *rank_notes))


def _planned_ranks(config: EngineConfig) -> tuple[int, int | None, list[str]]:
    """The number of ranks that is asked for, else torchrun's, else one; those of them on this host, None for all; and
    a note if torchrun's was ignored. Nothing is launched: a cluster may have set only a part of torchrun's
    environment."""
    if config.tensor_parallel_size is not None:
        return config.tensor_parallel_size, None, []
    try:
        launch = resolve_launch()
        return launch.tp_size, launch.num_local_ranks, []
    except ValueError as error:
        return 1, None, [f"planned for one rank; {visible(str(error))} (-tp plans for more)"]


def step_table(plan: EnginePlan) -> str:
    """The step table, with the bytes of each activation's rows."""
    element = DTYPE_BYTES[plan.dtype]
    widths = activation_widths(plan.spec, plan.tp_size)
    return render(plan.pass_plan, {name: (unit, width * element) for name, (unit, width) in widths.items()})


def predict(plan: EnginePlan, residency: Residency, num_seqs: int, context: int, label: str) -> Prediction:
    return Prediction(label, num_seqs, decode_time(pass_work(plan, residency), num_seqs, context, plan.rates))


def as_variant(plan: EnginePlan, planned: Planned, context: int, label: str) -> Variant | None:
    """Another split of the same engine's memory; None if not one sequence of the context fits."""
    demand, residency = planned
    context = min(context, residency.max_model_len)
    best = most_seqs(demand, residency, context)
    if not best:
        return None
    one, many = (predict(plan, residency, n, context, label) for n in (1, best))
    return Variant(label, residency.streamed_bytes, residency.max_model_len, one, many)


def variant(plan: EnginePlan, demand: Demand, context: int, label: str, choice: str | None = None) -> Variant | None:
    """The split of another demand, with the same choice of compression or another; None if it does not fit."""
    offer = plan.offer if choice is None else dataclasses.replace(plan.offer, choice=choice)
    try:
        return as_variant(plan, choose_compression(offer, demand), context, label)
    except ValueError:
        return None


def variants(plan: EnginePlan, context: int) -> list[Variant]:
    """Other splits: with one more GiB, with other uses of the same memory, and with the other compression."""
    demand, made = plan.demand, []
    if demand.memory_bytes is not None:
        larger = dataclasses.replace(demand, memory_bytes=demand.memory_bytes + GIB)
        made.append(variant(plan, larger, context, "one more GiB a rank"))
        free = dataclasses.replace(demand, resident="auto", num_pages=None)
        for num_seqs in (1, 16):
            if num_seqs < plan.max_num_seqs:
                made.append(variant(plan, free.asked_for(num_seqs), context, f"auto, max_num_seqs={num_seqs}"))
        for choice in ("none", 0.5, "all"):
            made.append(variant(plan, dataclasses.replace(demand, resident=choice), context, f"resident={choice}"))
    if demand.compressed and (demand.memory_bytes is not None or plan.residency.streamed):
        other = "none" if plan.residency.compressed else "lossless"
        made.append(variant(plan, demand, context, f"weights_compression={other}", other))
    return [each for each in made if each is not None]


def why_num_seqs(config: EngineConfig, plan: EnginePlan) -> str:
    """A phrase that says where the number of sequences comes from; the config is the one that was asked for."""
    if not plan.demand.plans_num_seqs:
        if config.max_num_seqs is None:
            return "as many as the job has, or as a pass takes"
        return "max_num_seqs as asked"
    if plan.max_num_seqs == plan.demand.max_num_seqs:
        return "as many as are planned without max_num_seqs"
    if plan.max_num_seqs > plan.kept.seqs_in(plan.residency.num_pages):
        return "planned: as many short ones as fit and pay; max_num_seqs says otherwise"
    return f"planned: the most tokens/s at {plan.kept.kv_len} tokens each; max_num_seqs says otherwise"


def summary(config: EngineConfig, plan: EnginePlan, context: int) -> dict[str, Any]:
    """The plan as plain values; units are in the names; all but tokens_s is for one rank."""
    residency = plan.residency
    best = most_seqs(plan.kept, residency, context)
    return {
        "num_parameters": plan.spec.num_parameters,
        "formats": sorted({kind for _, kind in plan.spec.formats}),
        "dtype": plan.dtype,
        "tp_size": plan.tp_size,
        "context_tokens": context,
        "rates": dataclasses.asdict(plan.rates),
        "memory_bytes": residency.memory_bytes,
        "claims_bytes": dict(residency.claims),
        "resident": [str(group) for group, _ in plan.demand.groups if group in residency.resident],
        "compressed": [str(group) for group, _ in plan.demand.groups if group in residency.compressed],
        "streamed": [str(group) for group, _ in residency.streamed],
        "embed_resident": residency.embed_resident,
        "ring_bytes": residency.ring.ring_bytes,
        "num_pages": residency.num_pages,
        "max_model_len": longest_sequence(config, plan),
        "max_context": residency.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "max_num_seqs_is": why_num_seqs(config, plan),
        "host_bytes": residency.host_bytes,
        "num_host_pages": num_host_pages(config, plan),
        "streamed_bytes": residency.streamed_bytes,
        "free_tokens": free_tokens(pass_work(plan), plan.rates),
        "predictions": [_as_json(predict(plan, residency, n, context, "")) for n in sorted({1, best} - {0})],
        "timeline_s": timeline_s(predict_timeline(plan.pass_plan, *step_seconds(plan, PassShape(1, 1, context)))),
        "attention_sinks": config.attention_sinks,
        "attention_window": config.attention_window,
        "notes": [*residency.notes, *_notes(plan)],
    }


def _notes(plan: EnginePlan) -> list[str]:
    """The plan's notes, and why all weights stay where that was for the planner to choose."""
    residency, demand = plan.residency, plan.demand
    chosen = demand.resident == "auto" and demand.memory_bytes is not None
    if not chosen or residency.streamed or residency.compressed:
        return list(plan.notes)
    why = f"streaming some of them would gain less than {STREAMING_GAIN:.0%} of the tokens/s"
    return [f"all weights fit and stay: {why}", *plan.notes]


def _as_json(prediction: Prediction) -> dict[str, Any]:
    times = dataclasses.asdict(prediction.time)
    return {"num_seqs": prediction.num_seqs, "tokens_s": prediction.tokens_s, **times}


def _title(config: EngineConfig, plan: EnginePlan) -> str:
    size = f"{plan.spec.num_layers} layers, {show_count(plan.spec.num_parameters)} weights, {plan.dtype}"
    formats = sorted({kind for _, kind in plan.spec.formats})
    size += f" (stored as {', '.join(formats)})" if formats else ""
    weights = f"{show_bytes(plan.layout.nbytes)} of weights a rank"
    return f"{visible(config.model)} ({plan.spec.family}): {size}, {ranks(plan.tp_size)}, {weights}"


def _budget(config: EngineConfig, plan: EnginePlan) -> str:
    if config.gpu_memory is not None:
        return "device memory as asked"
    if plan.rates.memory_bytes is None:
        return f"device memory unlimited ({plan.rates.source})"
    share, whole = f"{config.gpu_memory_utilization:.0%}", show_bytes(plan.rates.memory_bytes)
    return f"device memory {share} of {whole} ({plan.rates.source})"


def _report(config: EngineConfig, plan: EnginePlan, context: int, asked: int) -> str:
    this = as_variant(plan, (plan.kept, plan.residency), context, f"batch 1 at {context} tokens of context")
    rows = [] if this is None else [this.one]
    if this is not None and this.best.num_seqs > 1:
        rows.append(dataclasses.replace(this.best, label=f"batch {this.best.num_seqs}, the most that fit"))
    others = [(each, gives_up(this, each)) for each in variants(plan, context)] if this else []
    seqs = f"{plan.max_num_seqs:>12}   {why_num_seqs(config, plan)}"
    free = free_tokens(pass_work(plan), plan.rates)
    text = table(
        plan.residency, config.page_size, seqs, plan.rates, rows, others, free, describe_host_pages(config, plan)
    )
    text += "".join(f"\nnote: {note}" for note in _notes(plan))
    return text + (f"\nnote: context cut from {asked} to {context}, the longest one" if asked > context else "")
