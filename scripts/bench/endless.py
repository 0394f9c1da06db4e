"""Measures one sequence without an end in constant memory (--attention-sinks, --attention-window): the time of a token,
and memory, as it grows.

All engine flags work. The token's time is that of its decode pass, the median over each stretch of --every tokens;
memory is the process's resident set and what the device's allocator holds at the end of each stretch. Both have to stay
flat, so the record compares the last stretch with the first one after the first eviction. Rates are measured once the
cache is full; the bound is that of a pass over the fullest cache (scripts/bench/bound.py). The last line is one JSON
object.

    python -m scripts.bench.endless --model demo --attention-sinks 4 --attention-window 252 --output-len 100000
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.engine.runtime.pass_times import Timed
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.units import MIB, ms

from scripts.bench.bound import against_bound
from scripts.bench.engine_record import describe, say_machine
from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep
from scripts.bench.workload import greedy, positive, random_jobs


class Stretches:
    """Stands in for a ledger's list of passes: it keeps a figure for each stretch of `every` decode passes, and not the
    passes."""

    def __init__(self, every: int, device: torch.device):
        self.every, self.device = every, device
        self.rows: list[dict] = []
        self.shape: PassShape | None = None  # of the pass with the most context
        self._times: list[float] = []

    def append(self, one: Timed) -> None:
        shape, measured_s, *_ = one
        if not shape.is_decode:
            return
        if self.shape is None or shape.context_tokens > self.shape.context_tokens:
            self.shape = shape
        self._times.append(measured_s)
        if len(self._times) == self.every:
            self.rows.append(self._row())
            self._times.clear()

    def _row(self) -> dict:
        cuda = self.device.type == "cuda"
        return {
            "output_tokens": (len(self.rows) + 1) * self.every,
            "decode_pass_s": statistics.median(self._times),
            "mean_decode_pass_s": statistics.fmean(self._times),
            "resident_set_bytes": resident_set_bytes(),
            "device_bytes": torch.cuda.memory_allocated(self.device) if cuda else None,
        }


def resident_set_bytes() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    config = config_from_args(args, max_num_seqs=1)
    if config.attention_window is None:
        raise ValueError("--attention-window: without one a sequence ends where the KV cache does")
    with LLM(**config.to_dict()) as llm:
        planned, stretches = llm.engine.rates, Stretches(args.every, llm.engine.topology.device)
        first = first_evicting(args, llm.engine.plan.retention.max_cached)
        run(llm, args.input_len, 2 * llm.engine.plan.retention.max_cached)
        if llm.engine.topology.rank == 0:
            llm.measure(llm.engine.work.streamed_bytes)
        llm.engine.times.keep(stretches)
        run(llm, args.input_len, args.output_len)
        if llm.engine.topology.rank > 0:
            return
        workload = {name: getattr(args, name) for name in ("input_len", "output_len", "every")}
        report = describe(llm, "endless") | workload | figures(llm, stretches, first, planned)
    say_machine(report)
    say(report)
    keep(report, args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--input-len", type=positive, default=32, metavar="N", help="tokens of the prompt (default: 32)")
    text = "tokens to generate (default: 100000)"
    group.add_argument("--output-len", type=positive, default=100_000, metavar="N", help=text)
    text = "tokens of a stretch, whose median counts (default: 5000)"
    group.add_argument("--every", type=positive, default=5000, metavar="N", help=text)
    add_output_argument(group)
    add_config_arguments(add_groups(parser))


def run(llm: LLM, input_len: int, output_len: int) -> None:
    (job,) = random_jobs(1, input_len, output_len, llm.engine.plan.spec.vocab_size, llm.config.seed)
    without_errors(llm.generate([job.prompt], [greedy(job)]))


def first_evicting(args: argparse.Namespace, max_cached: int) -> int:
    """The first stretch that begins when the cache is full. Raises ValueError if there will not be two of them."""
    num_stretches = (args.output_len - 1) // args.every  # the first token comes from the prefill
    first = -(-max(max_cached - args.input_len, 0) // args.every)
    if num_stretches - first < 2:
        raise ValueError(
            f"--output-len {args.output_len}: expected two stretches of {args.every} tokens (--every) beyond the"
            f" {max_cached} that are cached: more tokens, or a smaller --every"
        )
    return first


def figures(llm: LLM, stretches: Stretches, first_evicting: int, planned: Rates) -> dict:
    """Fields of the record that only this benchmark has."""
    retention, engine, evicting = llm.engine.plan.retention, llm.engine, stretches.rows[first_evicting:]
    first, last = evicting[0], evicting[-1]
    median_s = statistics.median(row["decode_pass_s"] for row in evicting)
    return {
        "eviction_tokens": retention.eviction_tokens,
        "kv_bytes_per_rank": engine.worker.executor.model.kv.data.nbytes,
        "decode_pass_s": median_s,
        "last_pass_over_first": last["decode_pass_s"] / first["decode_pass_s"],
        "resident_set_growth_bytes": last["resident_set_bytes"] - first["resident_set_bytes"],
        "device_growth_bytes": _difference(last["device_bytes"], first["device_bytes"]),
        **against_bound(engine.work, [stretches.shape], median_s, engine.rates, planned),
        "rows": stretches.rows,
    }


def _difference(last: int | None, first: int | None) -> int | None:
    return None if last is None or first is None else last - first


def say(report: dict) -> None:
    print(f"{'output tokens':>14}{'ms a token':>12}{'resident set MiB':>18}{'device MiB':>12}")
    for row in report["rows"]:
        device = "" if row["device_bytes"] is None else f"{row['device_bytes'] / MIB:.1f}"
        resident_set = row["resident_set_bytes"] / MIB
        print(f"{row['output_tokens']:>14}{ms(row['decode_pass_s']):>12.3f}{resident_set:>18.1f}{device:>12}")
    kept = f"{report['attention_sinks']} sinks and a window of {report['attention_window']}"
    print(f"{kept}: {report['kv_bytes_per_rank'] / MIB:.1f} MiB of KV cache a rank")
    growth = report["resident_set_growth_bytes"] / MIB
    print(f"last stretch over first: {report['last_pass_over_first']:.3f}; resident set grew by {growth:.1f} MiB")
    print(f"bound {ms(report['bound_s']):.3f} ms ({report['bound']}), fraction {report['fraction_of_bound']:.3f}")


if __name__ == "__main__":
    sys.exit(run_script(main))
