"""`penstock profile` shows the share of each instruction in a real decode pass and prefill pass, with Amdahl's bound.

An interval is one instruction of the plan, also inside the captured graph of a decode pass; a mark costs about a
microsecond, so a traced pass is a little longer than others, and the shares of the shortest steps a little too large.
What lies between decode passes in a row is shown as well: `graph_s` is the median pass from its first mark to its last,
`period_s` the median from the start of one to the start of the next, both of rank 0; `copy_gap_s` is how long the copy
lane idles between two, on the rank where that is longest.

With --plot one of the passes is drawn as well, the two lanes of each rank, predicted beside measured. The trace itself,
all passes of it, is left as Chrome/Perfetto JSON.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys

from penstock.engine.commands.flags import Groups
from penstock.engine.config import EngineConfig
from penstock.engine.profile.pass_profile import PassProfile, profile_pass
from penstock.engine.profile.trace_plot import check_installed, draw, rows
from penstock.engine.profile.traced_run import PASSES, TRACE, TracedRun, add_workload_arguments, run_traced
from penstock.engine.runtime.trace import Interval
from penstock.engine.user_files import check_output
from penstock.scheduler.units import GB, ms


def add_arguments(groups: Groups) -> None:
    parser = groups.everyday
    add_workload_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--plot", metavar="FILE", help="draw the lanes of a pass there, as a PNG")
    parser.add_argument("--pass", dest="kind", choices=PASSES, help="the pass to draw (default: decode)")
    parser.add_argument("--start-ms", type=float, metavar="X", help="draw from here in the pass")
    parser.add_argument("--end-ms", type=float, metavar="X", help="draw up to here")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Runs, prints and draws. Raises ValueError, before anything is loaded, for what cannot be run or drawn."""
    _check_plot(args)
    traced = run_traced(args, config)
    if traced is None:
        return 0
    indices = {kind: traced.find(kind) for kind in PASSES}
    if args.plot is not None:
        index = indices[args.kind or PASSES[0]]
        draw(lanes(traced, index), args.start_ms, args.end_ms, f"{config.model}: {traced.describe(index)}", args.plot)
        trace = config.trace or TRACE
        print(f"{traced.describe(index)}: {args.plot}; all passes, for Perfetto: {trace}", file=sys.stderr)
    if args.json:
        profiles = {kind: as_json(profile(traced, index)) for kind, index in indices.items()}
        print(json.dumps(profiles | between(traced)))
        return 0
    for index in indices.values():
        print(table(traced.describe(index), profile(traced, index)) + "\n")
    print("\n".join([*describe_decode(traced), *traced.describe_gaps()]) + "\n")
    print(f"predictions from {traced.plan.rates.source} rates; at most: how much faster the pass would be if the step")
    print("cost nothing")
    return 0


def _check_plot(args: argparse.Namespace) -> None:
    """Raises ValueError for a picture that cannot be drawn."""
    given = {"--pass": args.kind, "--start-ms": args.start_ms, "--end-ms": args.end_ms}
    flag = next((flag for flag, value in given.items() if value is not None), None)
    if args.plot is None and flag is not None:
        raise ValueError(f"{flag}: says what is drawn, and there is no --plot")
    for flag, value in list(given.items())[1:]:
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{flag} {value}: expected a finite number")
    if args.start_ms is not None and args.end_ms is not None and args.start_ms >= args.end_ms:
        raise ValueError(f"--start-ms {args.start_ms:g}: expected less than --end-ms {args.end_ms:g}")
    if args.plot is not None:
        check_installed()
        check_output("--plot", args.plot)


def lanes(traced: TracedRun, pass_index: int) -> list[tuple[str, list[Interval]]]:
    """The rows of the picture: what was measured on each rank, then what was predicted, which is the same for all."""
    drawn = []
    for rank in range(traced.plan.tp_size):
        title = f"rank {rank} " if traced.plan.tp_size > 1 else ""
        drawn += rows(title, traced.lanes(rank, pass_index))
    return drawn + rows("predicted ", traced.lanes(0, pass_index, predicted=True))


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
    """Times between decode passes, as plain values; None where there is nothing to measure."""
    ranks = [traced.decode_times(rank) for rank in range(traced.plan.tp_size)]
    gaps_s = [times.copy_gaps_s for times in ranks if times.copy_gaps_s]
    gap = {"median": max(map(statistics.median, gaps_s)), "largest": max(map(max, gaps_s))} if gaps_s else None
    return {"graph_s": ranks[0].graph_s, "period_s": ranks[0].period_s, "copy_gap_s": gap}


def describe_decode(traced: TracedRun) -> list[str]:
    times = traced.decode_times(rank=0)
    if times.period_s is None:
        return []
    marks = f"{ms(times.graph_s):.3f} ms from its first mark to its last"
    return [f"a decode pass starts {ms(times.period_s):.3f} ms after the one before it, and takes {marks} (medians)"]


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
