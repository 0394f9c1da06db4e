"""Describes what `penstock generate` says on standard error: a line before the text and a line after it, with --verbose
the plan and what was measured as well. Nothing is measured for the two lines: without --verbose they go by the rates of
the plan."""

import sys
from collections import Counter

import torch
from penstock.engine.commands.plan import describe, predict, step_table
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.output import RequestOutput
from penstock.engine.planning.device_profile import ranks
from penstock.engine.planning.predictions import most_seqs
from penstock.engine.streams import visible
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.residency.demand import KV_LEN
from penstock.scheduler.residency.residency_table import how_streamed
from penstock.scheduler.units import GIB, MIB, gb_s, show_bytes, show_time

SLOW = 0.05  # the share of the bound below which a CPU's threads are suspected


def say_before(llm: LLM, num_seqs: int, asked: EngineConfig | None = None, table: bool = False) -> None:
    """The line before the text of `num_seqs` sequences, and the plan's notes; with the config that was `asked` for the
    whole plan at measured rates, with `table` its step table."""
    if asked:
        llm.measure()
    plan = llm.engine.plan
    context = min(KV_LEN, plan.residency.max_model_len)
    lines = [describe(asked, plan, context), ""] if asked else [f"note: {note}" for note in plan.notes]
    lines += [step_table(plan), ""] if table else []
    print(*lines, _prediction(llm, num_seqs, context), sep="\n", file=sys.stderr)


def _prediction(llm: LLM, num_seqs: int, context: int) -> str:
    plan = llm.engine.plan
    residency = plan.residency
    num_seqs = max(1, min(num_seqs, most_seqs(plan.kept, residency, context)))
    tokens_s = predict(plan, residency, num_seqs, context, "").tokens_s
    many = "1 sequence" if num_seqs == 1 else f"{num_seqs} sequences at once"
    streams = "nothing streams"
    if residency.streamed_bytes:
        how = how_streamed(residency)
        streams = f"{show_bytes(residency.streamed_bytes)} of weights stream to each rank in a pass"
        streams += f", {how}" if how else ""
    where = f"{visible(llm.config.model)} on {ranks(plan.tp_size)} ({llm.engine.topology.device.type})"
    return f"{where}: {streams}; predicted {_speed(tokens_s)} for {many} ({plan.rates.source})"


def say_after(llm: LLM, outputs: list[RequestOutput], elapsed_s: float, verbose: bool) -> None:
    """The line after the text; with `verbose` those of what moved and how long it took."""
    num_tokens = sum(len(sequence.token_ids) for output in outputs for sequence in output.outputs)
    lines = [f"{num_tokens} tokens in {show_time(elapsed_s)}: {_speed(num_tokens / elapsed_s)}"]
    if llm.engine.times.num_passes:  # none ran if no sequence could
        share, bound = _share_of_bound(llm)
        lines[0] += f", {share:.2f} of the {bound} bound at the {_kind(llm.engine.rates)} rates"
        if llm.engine.device.type == "cpu" and share < SLOW and torch.get_num_threads() > 1:
            lines.append("note: threads may wait for each other where others use the CPU: OMP_NUM_THREADS=1 may help")
    print(*lines, *(_measurements(llm) if verbose else ()), sep="\n", file=sys.stderr)


def _share_of_bound(llm: LLM) -> tuple[float, str]:
    """The share that the passes reached of the bound that the time model gives each of them, and which it was."""
    engine, bounds = llm.engine, Counter()
    for _, _, predicted, _ in engine.times.passes:
        bounds[predicted.bound] += predicted.bound_s
    ((bound, _),) = bounds.most_common(1)
    return bounds.total() / engine.times.measured_s, bound


def _kind(rates: Rates) -> str:
    return "measured" if rates.source.startswith("measured") else "assumed"


def _speed(tokens_s: float) -> str:
    return f"{tokens_s:.{1 if tokens_s >= 10 else 2}f} tokens/s"


def _measurements(llm: LLM) -> list[str]:
    """Lines about the bytes that were moved and the time that the passes took, beside the prediction."""
    times, rates, executor = llm.engine.times, llm.engine.rates, llm.engine.worker.executor
    moved = executor.copied.total.sent_bytes
    lines = [f"{times.num_passes} passes over {executor.counters.num_tokens} tokens"]
    if moved:
        lines.append(
            f"moved {moved / GIB:.3f} GiB a rank over the link, {moved / times.num_passes / MIB:.2f} MiB a pass, "
            f"{gb_s(moved, times.measured_s):.2f} GB/s of {rates.link_gb_s:.2f} GB/s {_kind(rates)}"
        )
    weights = llm.engine.worker.weights
    if weights.compressed:
        share = sum(group.nbytes for group in weights.compressed.values()) / weights.compressed_from_bytes
        lines.append(
            f"{weights.compressed_from_bytes / GIB:.3f} GiB of weights a rank were compressed without loss"
            f" to {share:.1%}, at {gb_s(weights.compressed_from_bytes, weights.compress_s):.3g} GB/s"
        )
    if llm.engine.topology.tp_size > 1:
        reduced = executor.reduced.total
        lines.append(f"{reduced.num_calls} all-reduces, {reduced.sent_bytes / MIB:.2f} MiB a rank")
    lines += llm.loop.scheduler.counts.describe()
    predicted = f"predicted {times.predicted_s:.3f} s ({rates.source} rates)"
    return [*lines, f"passes took {times.measured_s:.3f} s, {predicted}"]
