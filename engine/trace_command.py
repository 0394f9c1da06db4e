"""`penstock trace`: one pass of a short workload as a picture, the two lanes of each rank, predicted beside measured.

The trace itself, all passes of it, is left as Chrome/Perfetto JSON. Tokens are random: see traced_run.py.
"""

import argparse
import math
import sys
from pathlib import Path

from engine.config import EngineConfig
from engine.runtime.trace import Span
from engine.trace_plot import check_installed, draw, rows
from engine.traced_run import PASSES, TRACE, TracedRun, add_workload_arguments, run_traced
from engine.user_files import check_output


def add_arguments(parser) -> None:
    add_workload_arguments(parser)
    parser.add_argument("--pass", dest="kind", choices=PASSES, default="decode", help="the pass to draw")
    parser.add_argument("--output", metavar="FILE", help="the PNG (default: beside the JSON of --trace)")
    parser.add_argument("--start-ms", type=float, default=None, metavar="X", help="draw from here in the pass")
    parser.add_argument("--end-ms", type=float, default=None, metavar="X", help="draw up to here")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Raises ValueError for what cannot be run or drawn, before anything is loaded."""
    check_installed()
    trace = config.trace or TRACE
    output = str(Path(trace).with_suffix(".png")) if args.output is None else args.output
    check_output("--output", output)
    _check_times(args.start_ms, args.end_ms)
    traced = run_traced(args, config)
    if traced is not None:
        index = traced.find(args.kind)
        draw(lanes(traced, index), args.start_ms, args.end_ms, f"{config.model}: {traced.describe(index)}", output)
        print(f"{traced.describe(index)}: {output}; all passes, for Perfetto: {trace}", file=sys.stderr)
        for line in traced.describe_gaps():
            print(line, file=sys.stderr)
    return 0


def _check_times(start_ms: float | None, end_ms: float | None) -> None:
    for flag, value in (("--start-ms", start_ms), ("--end-ms", end_ms)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{flag} {value}: expected a finite number")
    if start_ms is not None and end_ms is not None and start_ms >= end_ms:
        raise ValueError(f"--start-ms {start_ms:g}: expected less than --end-ms {end_ms:g}")


def lanes(traced: TracedRun, pass_index: int) -> list[tuple[str, list[Span]]]:
    """The rows of the picture: what was measured on each rank, then what was predicted, which is the same for all."""
    drawn = []
    for rank in range(traced.plan.tp_size):
        title = f"rank {rank} " if traced.plan.tp_size > 1 else ""
        drawn += rows(title, traced.lanes(rank, pass_index))
    return drawn + rows("predicted ", traced.lanes(0, pass_index, predicted=True))
