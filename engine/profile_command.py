"""`penstock profile`: the share of each instruction of a real decode pass and a real prefill pass, with Amdahl's bound.

The spans are the plan's own, of the captured graph where decode passes are graphs; a mark in it costs about a
microsecond, so a traced pass is a little longer than others, and the shares of the shortest steps a little too large.
What lies between decode passes in a row is shown as well: `graph_s` is the median pass from its first mark to its last,
`step_s` the median from the start of one to the start of the next, both of rank 0; `copy_gap_s` is how long the copy
lane idles between two, on the rank where that is longest.
"""

import argparse
import dataclasses
import json
import statistics

from engine.config import EngineConfig
from engine.pass_profile import PassProfile, profile_pass
from engine.traced_run import PASSES, TracedRun, add_workload_arguments, run_traced
from scheduler.units import GB, ms


def add_arguments(parser) -> None:
    add_workload_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Raises ValueError for what cannot be run."""
    traced = run_traced(args, config)
    if traced is None:
        return 0
    indices = {kind: traced.find(kind) for kind in PASSES}
    if args.json:
        profiles = {kind: as_json(profile(traced, index)) for kind, index in indices.items()}
        print(json.dumps(profiles | between(traced)))
        return 0
    for index in indices.values():
        print(table(traced.describe(index), profile(traced, index)) + "\n")
    print("\n".join([*describe_steps(traced), *traced.describe_gaps()]) + "\n")
    print(f"predictions from {traced.plan.rates.source} rates; at most: the pass would be that much faster if the step")
    print("cost nothing")
    return 0


def profile(traced: TracedRun, pass_index: int) -> PassProfile:
    ranks = [traced.lanes(rank, pass_index) for rank in range(traced.plan.tp_size)]
    predicted = traced.lanes(0, pass_index, predicted=True)
    return profile_pass(traced.plan, traced.shapes[pass_index], ranks, predicted)


def as_json(profiled: PassProfile) -> dict:
    """The profile as plain values; units are in the names."""
    values = dataclasses.asdict(profiled) | {"slowest_rank": profiled.slowest_rank}
    if profiled.copy_lane is not None:
        values["copy_lane"]["gb_s"] = profiled.copy_lane.gb_s
    return values


def between(traced: TracedRun) -> dict:
    """What lies between decode passes, as plain values; None where there is nothing to measure."""
    steps = [traced.decode_steps(rank) for rank in range(traced.plan.tp_size)]
    gaps_s = [step.copy_gaps_s for step in steps if step.copy_gaps_s]
    gap = {"median": max(map(statistics.median, gaps_s)), "largest": max(map(max, gaps_s))} if gaps_s else None
    return {"graph_s": steps[0].graph_s, "step_s": steps[0].step_s, "copy_gap_s": gap}


def describe_steps(traced: TracedRun) -> list[str]:
    step = traced.decode_steps(rank=0)
    if step.step_s is None:
        return []
    marks = f"{ms(step.graph_s):.3f} ms from its first mark to its last"
    return [f"a decode pass starts {ms(step.step_s):.3f} ms after the one before it, and takes {marks} (medians)"]


def table(title: str, profiled: PassProfile) -> str:
    lines = [f"{title}: {ms(profiled.pass_s):.3f} ms, predicted {ms(profiled.predicted_s):.3f} ms"]
    if len(profiled.rank_s) > 1:
        slowest = profiled.slowest_rank
        lines[0] += f" (rank 0; the slowest, rank {slowest}: {ms(profiled.rank_s[slowest]):.3f} ms)"
    head = f"{'calls':>7}{'ms':>10}{'share':>9}{'at most':>10}{'predicted ms':>14}{'GB/s':>9}{'TFLOP/s':>9}"
    width = max(len(step.step) for step in profiled.steps) + 1
    lines.append(f"  {'step':<{width}}{head}")
    for step in profiled.steps:
        rates = "".join(f"{'' if rate is None else f'{rate:.1f}':>9}" for rate in (step.gb_s, step.tflops))
        times = f"{step.num_calls:>7}{ms(step.seconds):>10.3f}{step.share:>9.1%}{step.at_most:>8.2f} x"
        lines.append(f"  {step.step:<{width}}{times}{ms(step.predicted_s):>14.3f}{rates}".rstrip())
    copy = profiled.copy_lane
    if copy is not None:
        moved = f"{copy.copied_bytes / GB:.3f} GB in {ms(copy.busy_s):.3f} ms, {copy.gb_s:.2f} GB/s"
        lines.append(f"  copy lane: {moved}, idle for {ms(copy.idle_s):.3f} ms")
    return "\n".join(lines)
