"""Runs a short workload under a trace, for `penstock profile` to count and draw.

Prompts are random token ids, so that any model will do, with any weights. They run twice: the first time kernels are
loaded and passes captured; only passes of the second time are used.
"""

import argparse
import random
import statistics
from dataclasses import dataclass, replace

from penstock.engine.config import MOST_SEQS, EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.runtime.trace import Interval, read_intervals
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.passes.pass_plan import COPY
from penstock.scheduler.units import ms

PASSES = ("decode", "prefill")
TRACE = "trace.json"
WARM_UP_TOKENS = 3
MOST = 2**20  # the largest value of each flag below, for which the random tokens still fit in memory


def add_workload_arguments(parser) -> None:
    """Adds the flags of the workload, with vLLM's names."""
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="tokens a prompt (default: 128)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at once (default: 1)")
    parser.add_argument("--output-len", type=int, default=8, metavar="N", help="tokens to generate (default: 8)")


@dataclass(frozen=True)
class DecodeTimes:
    """Decode passes in a row on one rank, in seconds. `graph_s`: from a pass's first mark to its last (median of those
    that have a next one); `period_s`: from the start of one to the start of the next (median; None if there is but
    one); `copy_gaps_s`: from the end of the last copy of each to the start of the next one's first (empty where nothing
    streams)."""

    graph_s: float
    period_s: float | None
    copy_gaps_s: list[float]


@dataclass(frozen=True)
class TracedRun:
    """A run and its trace: `shapes` by pass index, `first_warm` the first pass that is warm; `intervals` by rank and
    whether predicted."""

    plan: EnginePlan
    shapes: list[PassShape]
    first_warm: int
    intervals: dict[tuple[int, bool], list[Interval]]

    def find(self, kind: str) -> int:
        """The index of the warm pass of that kind with the most tokens; of several, the one of median time. Raises
        ValueError if there is none."""
        alike = self._alike(kind)
        if not alike:
            raise ValueError(
                f"no {kind} pass ran: a longer max_model_len, or another input_len, would leave room for one"
            )
        times = {index: pass_s(self.lanes(0, index)) for index in alike}
        return next(index for index in alike if times[index] == statistics.median_low(times.values()))

    def _alike(self, kind: str) -> list[int]:
        """The warm passes of that kind with the most tokens."""
        warm = [i for i, s in enumerate(self.shapes) if i >= self.first_warm and s.is_decode == (kind == "decode")]
        most = max((self.shapes[index].num_tokens for index in warm), default=0)
        return [index for index in warm if self.shapes[index].num_tokens == most]

    def decode_times(self, rank: int) -> DecodeTimes:
        """Times of the warm decode passes over all rows."""
        passes = {index: [] for index in self._alike("decode")}
        for interval in self.intervals[rank, False]:
            if interval.pass_index in passes:
                passes[interval.pass_index].append(interval)
        starts = {index: min(interval.start_s for interval in intervals) for index, intervals in passes.items()}
        copies = {
            index: [interval for interval in intervals if interval.lane == COPY] for index, intervals in passes.items()
        }
        pairs = [(index, index + 1) for index in passes if index + 1 in passes]
        same = [before for before, _ in pairs] or list(passes)  # so that it is no longer than the period
        return DecodeTimes(
            graph_s=statistics.median(pass_s(passes[index]) for index in same),
            period_s=statistics.median(starts[after] - starts[before] for before, after in pairs) if pairs else None,
            copy_gaps_s=[
                min(interval.start_s for interval in copies[after]) - max(interval.end_s for interval in copies[before])
                for before, after in pairs
                if copies[before]
            ],
        )

    def describe_gaps(self) -> list[str]:
        """A line for each rank, where weights stream and decode passes ran."""
        lines = []
        for rank in range(self.plan.tp_size if self._alike("decode") else 0):
            gaps_s = self.decode_times(rank).copy_gaps_s
            if gaps_s:
                who = f"rank {rank}: " if self.plan.tp_size > 1 else ""
                idle = f"idles {ms(statistics.median(gaps_s)):.3f} ms between consecutive decode passes"
                lines.append(f"{who}the copy lane {idle} (median of {len(gaps_s)})")
        return lines

    def lanes(self, rank: int, pass_index: int, predicted: bool = False) -> list[Interval]:
        """A rank's intervals of one pass, in seconds from its start: the clocks of the ranks are not the same."""
        intervals = [interval for interval in self.intervals[rank, predicted] if interval.pass_index == pass_index]
        begin_s = min(interval.start_s for interval in intervals)
        return [
            replace(interval, start_s=interval.start_s - begin_s, end_s=interval.end_s - begin_s)
            for interval in intervals
        ]

    def describe(self, pass_index: int) -> str:
        """A phrase like `decode pass of 64 rows, 3136 tokens in the KV cache`."""
        shape = self.shapes[pass_index]
        rows = "1 row" if shape.num_rows == 1 else f"{shape.num_rows} rows"
        what = f"decode pass of {rows}" if shape.is_decode else f"prefill pass of {shape.num_tokens} tokens, {rows}"
        return f"{what}, {shape.context_tokens} tokens in the KV cache"


def pass_s(intervals: list[Interval]) -> float:
    """Seconds from the start of the first interval to the end of the last."""
    return max(interval.end_s for interval in intervals) - min(interval.start_s for interval in intervals)


def run_traced(args: argparse.Namespace, config: EngineConfig) -> TracedRun | None:
    """Runs the workload and leaves its trace in config.trace, or TRACE. Returns None on all ranks but 0.

    Raises ValueError naming the flag whose value makes no sense, and as LLM does.
    """
    for name, least in (("input_len", 2), ("output_len", 2), ("batch_size", 1)):
        value = getattr(args, name)
        if not least <= value <= MOST:
            raise ValueError(
                f"{name}={value}: expected at least {least}, for a prefill and a decode pass, and at most {MOST}"
            )
    if args.batch_size > (most := config.max_num_seqs or MOST_SEQS):
        raise ValueError(f"batch_size={args.batch_size}: max_num_seqs is {most}")
    config = replace(config, max_num_seqs=config.max_num_seqs or args.batch_size, trace=config.trace or TRACE)
    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
    with LLM(**config.to_dict()) as llm:
        llm.check([0] * args.input_len, params)  # before the tokens of every row are made
        numbers = random.Random(config.seed)
        vocabulary = range(llm.engine.plan.spec.vocab_size)
        prompts = [numbers.choices(vocabulary, k=args.input_len) for _ in range(args.batch_size)]
        llm.check(prompts, params)
        speaks = llm.engine.topology.rank == 0
        without_errors(llm.generate(prompts, replace(params, max_tokens=min(WARM_UP_TOKENS, args.output_len))))
        if speaks:
            llm.measure()
        shapes = llm.engine.trace.shapes
        first_warm = len(shapes)
        llm.reset_prefix_cache()  # else the prompts would hardly be computed
        without_errors(llm.generate(prompts, params))
        plan = llm.engine.plan
    return TracedRun(plan, shapes, first_warm, read_intervals(config.trace)) if speaks else None
