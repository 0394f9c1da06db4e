"""Measures the latency of batches: whole requests, the time of the first token, and a decode pass, against bounds of
the same run.

The flags and the fields avg_latency, latencies and percentiles are those of `vllm bench latency`; all engine flags work
too (--load-format dummy, --resident, -tp, --trace, ...). Several batch sizes share one engine: each has its own row in
`passes`, and vLLM's fields at the top are the first one's. Tokens are drawn greedily. For each batch size, after its
warm-up, link, memory and GEMM rates are measured on all ranks at once, the link over all copies of a pass (a shorter
run would not do: four H200s reach 44.5 GB/s a rank over 2 GiB and sustain 40). Where weights stream, these say how far
passes are filled, so the batch is warmed up once more. A pass is bound by

    max(bytes streamed / link, bytes read / read rate, FLOPs / GEMM rate)      of one rank (scripts/bench/bound.py)

The graph of a decode pass is replayed alone as well, back to back, as it ran: `pass_over_graph` says what the host
adds. (With several ranks under torchrun only: ranks that are launched by `-tp` run no script.) The prediction is that
of the rates which the plan had (`predicted_by`), before anything was measured; of a first token it has what the first
pass of a call takes beside those that follow, too, measured where nothing streams (`start_s`). `by_pass` has each pass
up to the first token of a usual run, with the prediction by the measured rates. Run it plainly, or by torchrun over
several ranks; the last line is one JSON object.

    python -m scripts.bench.latency --model benchmarks/shapes/Llama-3-8B.json --load-format dummy --resident none \\
      --batch-size 1 64 --input-len 128 --output-len 12 --num-iters-warmup 1 --num-iters 1 --compare accelerate
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

import numpy
from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.engine.runtime.pass_times import Timed
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.units import ms

from scripts.bench.bound import against_bound, host_fields
from scripts.bench.call_time import start_s
from scripts.bench.comparison import add_compare_arguments, check_compare, compare, print_comparisons
from scripts.bench.engine_record import describe, say_machine
from scripts.bench.entry import run_script
from scripts.bench.graph_alone import graph_alone_s
from scripts.bench.record import add_output_argument, keep
from scripts.bench.workload import Job, Measured, add_workload_arguments, greedy, positive, random_jobs

PERCENTILES = (10, 25, 50, 75, 90, 99)
VLLM_FIELDS = ("avg_latency", "latencies", "percentiles")


@dataclass(frozen=True)
class Iteration:
    """One whole request: its seconds and, on rank 0, its passes."""

    latency_s: float
    passes: list[Timed]
    tokens: list[list[int]]

    def split(self) -> tuple[list[Timed], list[Timed]]:
        """Passes up to the last one with a part of a prompt in it, and the decode passes behind it."""
        prompt = [i for i, one in enumerate(self.passes) if one.shape.num_tokens > one.shape.num_rows]
        first_decode = max(prompt, default=0) + 1
        return self.passes[:first_decode], self.passes[first_decode:]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    most = max(args.batch_size) * args.n
    config = config_from_args(args, max_num_seqs=most)
    if config.max_num_seqs < most:
        raise ValueError(f"--max-num-seqs {config.max_num_seqs}: the largest batch has {most} sequences")
    if args.compare_tokens < 2:
        raise ValueError(f"--compare-tokens {args.compare_tokens}: expected at least 2, to time one after another")
    check_compare(args.compare, config)
    with LLM(**config.to_dict()) as llm:
        planned = llm.engine.rates
        rows = [measure_batch(llm, batch_size, planned, args) for batch_size in args.batch_size]
        if llm.engine.topology.rank > 0:
            return
        report = describe(llm, "latency") | {"predicted_by": planned.source}
        report |= {"input_len": args.input_len, "output_len": args.output_len, "n": args.n}
        dtype, device = llm.engine.plan.dtype, llm.engine.topology.device
    report |= {name: rows[0][0][name] for name in VLLM_FIELDS} | {"passes": [row for row, _ in rows]}
    say_machine(report)
    print_table(report["passes"])
    if args.compare:
        measured = [theirs for _, theirs in rows]
        report["comparisons"] = compare(args.compare, config, dtype, device, measured, args.compare_tokens)
        print_comparisons(report["comparisons"])
    keep(report, args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--batch-size", type=positive, nargs="+", default=[8], metavar="N", help="one or more")
    add_workload_arguments(group, output_len=128)
    group.add_argument("--num-iters-warmup", type=positive, default=10, metavar="N", help="not timed (default: 10)")
    group.add_argument("--num-iters", type=positive, default=30, metavar="N", help="timed (default: 30)")
    add_compare_arguments(group)
    text = "tokens that each of them generates from a prompt, at least 2 (default: 4)"
    group.add_argument("--compare-tokens", type=positive, default=4, metavar="N", help=text)
    add_output_argument(group)
    add_config_arguments(add_groups(parser))


def measure_batch(llm: LLM, batch_size: int, planned: Rates, args: argparse.Namespace) -> tuple[dict, Measured] | None:
    """A row of the record, and what others are compared with; None on ranks other than 0."""
    speaks, vocab_size = llm.engine.topology.rank == 0, llm.engine.plan.spec.vocab_size
    jobs = random_jobs(batch_size, args.input_len, args.output_len, vocab_size, llm.config.seed + batch_size)
    for _ in range(args.num_iters_warmup):
        run_once(llm, jobs, args.n)
    llm.measure(llm.engine.work.streamed_bytes)
    if llm.engine.work.streamed_bytes:
        run_once(llm, jobs, args.n)
    graph_s, beside_s = graph_alone_s(llm, batch_size * args.n), start_s(llm)
    runs = [run_once(llm, jobs, args.n) for _ in range(args.num_iters)]
    if not speaks:
        return None
    first_token = first_token_fields(llm, runs, planned, beside_s)
    decode = decode_fields(llm, runs, batch_size * args.n, planned)
    latencies = [run.latency_s for run in runs]
    row = {
        "batch_size": batch_size,
        "avg_latency": statistics.mean(latencies),
        "latencies": latencies,
        "percentiles": {p: float(numpy.percentile(latencies, p)) for p in PERCENTILES},
        **decode,
        **graph_fields(decode, graph_s),
        "first_token": first_token,
    }
    prompts = [job.prompt for job in jobs]
    return row, Measured(prompts, runs[0].tokens, first_token["first_token_s"], decode.get("decode_pass_s"))


def run_once(llm: LLM, jobs: list[Job], n: int) -> Iteration:
    llm.reset_prefix_cache()
    kept, start = llm.engine.times.keep(), time.perf_counter()
    outputs = without_errors(llm.generate([job.prompt for job in jobs], [greedy(job, n) for job in jobs]))
    latency_s = time.perf_counter() - start
    return Iteration(latency_s, kept, [output.outputs[0].token_ids for output in outputs])


def first_token_fields(llm: LLM, runs: list[Iteration], planned: Rates, beside_s: float) -> dict:
    """Median time until the last sequence of the batch has its first token: all passes with a prompt in them, the first
    of which takes `beside_s` more than one that follows."""
    prefills = [run.split()[0] for run in runs]
    times = [sum(one.measured_s for one in passes) for passes in prefills]
    shapes, median_s = [one.shape for one in prefills[0]], statistics.median(times)
    usual = prefills[times.index(statistics.median_high(times))]
    num_tokens = sum(shape.num_tokens for shape in shapes)
    return {
        "first_token_s": median_s,
        "first_token_best_s": min(times),
        "num_passes": len(shapes),
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / median_s,
        "start_s": beside_s,
        **against_bound(llm.engine.work, shapes, median_s, llm.engine.rates, planned, beside_s),
        "by_pass": [
            {
                "num_tokens": one.shape.num_tokens,
                "num_rows": one.shape.num_rows,
                "measured_s": one.measured_s,
                "predicted_s": one.predicted.total_s,
            }
            for one in usual
        ],
    }


def decode_fields(llm: LLM, runs: list[Iteration], num_seqs: int, planned: Rates) -> dict:
    """Median decode pass over the whole batch, bound by the one in the middle of the output; no fields where there was
    none."""
    decodes = [one for run in runs for one in run.split()[1] if one.shape.num_tokens == num_seqs]
    if not decodes:
        return {}
    median_s = statistics.median(one.measured_s for one in decodes)
    middle = sorted((one.shape for one in decodes), key=lambda shape: shape.context_tokens)[len(decodes) // 2]
    return {
        "decode_pass_s": median_s,
        "decode_pass_best_s": min(one.measured_s for one in decodes),
        "num_timed_passes": len(decodes),
        **host_fields(decodes),
        "tokens_per_second": num_seqs / median_s,
        **against_bound(llm.engine.work, [middle], median_s, llm.engine.rates, planned),
    }


def graph_fields(decode: dict, graph_s: float | None) -> dict:
    """Fields that say how much longer a decode pass takes than its graph alone, replayed back to back; none where
    either is missing."""
    if not decode or graph_s is None:
        return {}
    return {"graph_s": graph_s, "pass_over_graph": decode["decode_pass_s"] / graph_s}


def print_table(rows: list[dict]) -> None:
    titles = f"{'time ms':>10} {'bound ms':>10} {'bound':>8} {'fraction':>9} {'predicted ms':>13} {'tokens/s':>10}"
    print(f"{'batch':>6} {'':12}{titles} {'TFLOP/s':>8}")
    for row in rows:
        print(f"{row['batch_size']:>6} {'request':12}{ms(row['avg_latency']):>10.2f}")
        parts = [("first token", "first_token_s", row["first_token"]), ("decode pass", "decode_pass_s", row)]
        for name, key, part in parts:
            if key in part:
                print(
                    f"{'':>6} {name:12}{ms(part[key]):>10.2f} {ms(part['bound_s']):>10.2f} {part['bound']:>8} "
                    f"{part['fraction_of_bound']:>9.3f} {ms(part['predicted_s']):>13.2f} "
                    f"{part['tokens_per_second']:>10.1f} {part['achieved_tflops']:>8.2f}"
                )
        if "graph_s" in row:
            print(f"{'':>6} {'graph alone':12}{ms(row['graph_s']):>10.2f}   pass / graph {row['pass_over_graph']:.3f}")


if __name__ == "__main__":
    sys.exit(run_script(main))
