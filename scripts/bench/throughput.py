"""Measures the throughput of many prompts at once, against the sum of the bounds of the passes that ran.

The flags and the fields elapsed_time, num_requests, total_num_tokens, requests_per_second and tokens_per_second are
those of `vllm bench throughput` (tokens are those of prompts and outputs); all engine flags work too. Tokens are drawn
greedily. Lengths may vary (--random-range-ratio, --random-sigma), prompts may share a prefix (--random-prefix-len), and
requests may arrive at a rate instead of at once (--request-rate, --burstiness: as in `vllm bench serve`, whose fields
of latencies the record then has). With --text prompts are stretches of a text, by the model's tokenizer. A warm-up with
a batch that shrinks from the largest to a single row comes first, then the rates are measured on all ranks at once. A
pass is bound by max(bytes streamed / link, bytes read / read rate, FLOPs / GEMM rate) of one rank
(scripts/bench/bound.py); the run by the sum over its passes, without what lies between them; `by_kind` has the same by
kind of pass. `--compare vllm` runs the same requests in an installed vLLM afterwards. Run it plainly, or by torchrun
over several ranks; the last line is one JSON object.

    torchrun --nproc-per-node 2 -m scripts.bench.throughput --model benchmarks/shapes/Llama-3-8B.json \\
      --load-format dummy --resident none --num-prompts 512 --input-len 128 --output-len 32
    python -m scripts.bench.throughput --model benchmarks/shapes/Llama-3-8B.json --load-format dummy --compare vllm \\
      --num-prompts 512 --input-len 512 --output-len 128 --random-range-ratio 0.8 --request-rate 40 --burstiness 0.3
"""

import argparse
import math
import sys
from typing import Any

from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM

from scripts.bench.arrivals import arrival_times, latency_fields
from scripts.bench.bound import against_bound, by_kind
from scripts.bench.comparison import add_compare_arguments, check_compare, compare_throughput, free_memory
from scripts.bench.engine_record import describe, say_machine
from scripts.bench.entry import run_script
from scripts.bench.job_run import run, run_arriving, timed_passes, warm_up
from scripts.bench.record import add_output_argument, keep
from scripts.bench.vllm_side import Vllm, add_vllm_arguments, find_vllm, run_of, run_vllm
from scripts.bench.workload import (
    Job,
    above_zero,
    add_text_argument,
    add_workload_arguments,
    deviation,
    greedy,
    natural,
    positive,
    random_jobs,
    ratio,
    text_tokens,
)

WORKLOAD = ("num_prompts", "input_len", "output_len", "random_range_ratio", "random_sigma", "random_prefix_len", "n")
WARM_UP = 64  # requests that vLLM runs first


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    config = config_from_args(args).for_job(args.num_prompts * args.n)
    check_arguments(args)
    check_compare(args.compare, config, allowed=("transformers-cb", "vllm"))
    vllm = find_vllm(args.vllm, args.vllm_options) if "vllm" in args.compare else None
    with LLM(**config.to_dict()) as llm:
        jobs, arrivals = draw(args, llm)
        report = measure(llm, jobs, arrivals, args)
        if llm.engine.topology.rank > 0:
            return
        report = describe(llm, "throughput") | report
        dtype, device = llm.engine.plan.dtype, llm.engine.topology.device
    say_machine(report)
    say(report)
    rows = []
    if "transformers-cb" in args.compare:
        ours = ([job.prompt for job in jobs], args.output_len, report["elapsed_time"])
        rows += compare_throughput(config, dtype, device, *ours)
    if vllm is not None:
        rows.append(against_vllm(vllm, config, report, jobs, arrivals))
    for row in rows:
        print(*(f"{name} {value}" for name, value in row.items()), sep=", ")
    keep(report | ({"comparisons": rows} if rows else {}), args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--num-prompts", type=positive, default=1000, metavar="N", help="requests (default: 1000)")
    group.add_argument("--dataset-name", choices=("random",), default="random", help="random token ids, without --text")
    add_text_argument(group)
    text = "both lengths vary by up to this fraction (default: 0)"
    group.add_argument("--random-range-ratio", type=ratio, default=0.0, metavar="X", help=text)
    text = "both lengths are long-tailed: log-normal, with this deviation of their logarithm (default: 0)"
    group.add_argument("--random-sigma", type=deviation, default=0.0, metavar="X", help=text)
    text = "tokens in front of all prompts, the same in each (default: 0)"
    group.add_argument("--random-prefix-len", "--prefix-len", type=natural, default=0, metavar="N", help=text)
    text = "requests that arrive a second (default: inf, all at once)"
    group.add_argument("--request-rate", type=above_zero, default=math.inf, metavar="X", help=text)
    text = "how arrivals vary: 1 as in a Poisson process, below it in bursts, above it evenly (default: 1)"
    group.add_argument("--burstiness", type=above_zero, default=1.0, metavar="X", help=text)
    add_workload_arguments(group, output_len=128)
    add_compare_arguments(group)
    add_vllm_arguments(group)
    add_output_argument(group)
    add_config_arguments(add_groups(parser))


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    arrives = math.isfinite(args.request_rate)
    if args.random_range_ratio and args.random_sigma:
        raise ValueError("--random-sigma: lengths vary by it or by --random-range-ratio, not by both")
    if arrives and args.n > 1:
        raise ValueError(f"--n {args.n}: expected 1 with --request-rate")
    if "transformers-cb" in args.compare and (args.random_range_ratio or args.random_sigma or args.n > 1 or arrives):
        raise ValueError(
            "--compare transformers-cb: all outputs have one length there, and all requests come at once; leave out"
            " --n, --random-range-ratio, --random-sigma and --request-rate"
        )
    if "vllm" in args.compare and args.n > 1:
        raise ValueError(f"--compare vllm: expected --n 1, got {args.n}")


def draw(args: argparse.Namespace, llm: LLM) -> tuple[list[Job], list[float] | None]:
    """The jobs, and the seconds at which they arrive (None: all at once). Raises ValueError for a long-tailed job whose
    mean is longer than a sequence may be."""
    plan, seed, longest = llm.engine.plan, llm.config.seed, llm.engine.plan.residency.max_model_len
    mean = args.random_prefix_len + args.input_len + args.output_len
    if mean > longest:
        raise ValueError(f"--input-len, --output-len: a request has {mean} tokens, more than max_model_len {longest}")
    differ = {"range_ratio": args.random_range_ratio, "sigma": args.random_sigma}
    differ |= {"prefix_len": args.random_prefix_len, "max_len": longest}
    differ |= {"text": text_tokens(llm.tokenizer, args.text)}
    jobs = random_jobs(args.num_prompts, args.input_len, args.output_len, plan.spec.vocab_size, seed, **differ)
    if not math.isfinite(args.request_rate):
        return jobs, None
    return jobs, arrival_times(len(jobs), args.request_rate, args.burstiness, seed)


def measure(llm: LLM, jobs: list[Job], arrivals: list[float] | None, args: argparse.Namespace) -> dict | None:
    """The record's figures; None on ranks other than 0."""
    engine, planned = llm.engine, llm.engine.rates
    warm_up(llm, jobs)
    if engine.topology.rank == 0:
        llm.measure(engine.work.streamed_bytes)
    latencies: dict[str, Any] = {}
    if arrivals is None:
        elapsed_s, _ = run(llm, jobs, [greedy(job, args.n) for job in jobs])
    else:
        times = run_arriving(llm, jobs, arrivals)
        if times is not None:
            elapsed_s = max(one[-1] for one in times)
            latencies = {"request_rate": args.request_rate, "burstiness": args.burstiness}
            latencies |= latency_fields(arrivals, times)
    if engine.topology.rank > 0:
        return None
    passes = timed_passes(llm)
    return {
        **{name: getattr(args, name) for name in WORKLOAD},
        **({} if args.text is None else {"text": args.text.name}),
        **rate_fields(jobs, args.n, elapsed_s),
        **latencies,
        "num_timed_passes": len(passes),
        "passes_s": sum(one.measured_s for one in passes),
        **against_bound(engine.work, [one.shape for one in passes], elapsed_s, engine.rates, planned),
        "by_kind": by_kind(engine.work, passes, engine.rates, planned),
    }


def rate_fields(jobs: list[Job], n: int, elapsed_s: float) -> dict[str, Any]:
    """Time and rates of jobs that took `elapsed_s`, `n` outputs each."""
    num_output_tokens = n * sum(job.output_len for job in jobs)
    num_tokens = sum(len(job.prompt) for job in jobs) + num_output_tokens
    return {
        "elapsed_time": elapsed_s,
        "num_requests": len(jobs),
        "total_num_tokens": num_tokens,
        "requests_per_second": len(jobs) / elapsed_s,
        "tokens_per_second": num_tokens / elapsed_s,
        "output_tokens_per_second": num_output_tokens / elapsed_s,
    }


def against_vllm(
    vllm: Vllm, config: EngineConfig, report: dict, jobs: list[Job], arrivals: list[float] | None
) -> dict[str, Any]:
    """A row of `comparisons`: the same requests in vLLM."""
    free_memory()
    run = run_of(jobs, [greedy(job) for job in jobs], WARM_UP, arrivals=arrivals)
    result = run_vllm(vllm, config, report, [run])
    row = {"baseline": "vllm", "versions": {"vllm": result["version"]}, "options": vllm.options}
    if "error" in result:
        return row | {"error": result["error"]}
    (theirs,) = result["runs"]
    elapsed_s = theirs["elapsed_s"] if arrivals is None else max(one[-1] for one in theirs["token_times"])
    latencies = {} if arrivals is None else latency_fields(arrivals, theirs["token_times"])
    return row | rate_fields(jobs, 1, elapsed_s) | latencies | {"speedup": elapsed_s / report["elapsed_time"]}


def say(report: dict) -> None:
    bound = f"bound {report['bound_s']:.3f} s ({report['bound']}), fraction {report['fraction_of_bound']:.3f}"
    achieved = f"{report['achieved_link_gb_s']:.2f} GB/s over the link, {report['achieved_memory_gb_s']:.1f} GB/s read"
    print(f"{report['elapsed_time']:.3f} s, {bound}, predicted {report['predicted_s']:.3f} s")
    print(f"{report['num_timed_passes']} passes: {achieved}, {report['achieved_tflops']:.2f} TFLOP/s a rank")
    for row in report["by_kind"]:
        times = f"{row['measured_s']:.3f} s, bound {row['bound_s']:.3f} s, predicted {row['predicted_s']:.3f} s"
        print(f"{row['num_passes']:>6} {row['kind']:8} {times}")
    for name in ("ttft", "itl", "e2el") if "request_rate" in report else ():
        print(f"{name}: median {report[f'median_{name}_ms']:.2f} ms, p99 {report[f'p99_{name}_ms']:.2f} ms")
    rates = (report["requests_per_second"], report["tokens_per_second"], report["output_tokens_per_second"])
    print("Throughput: {:.2f} requests/s, {:.2f} total tokens/s, {:.2f} output tokens/s".format(*rates))


if __name__ == "__main__":
    sys.exit(run_script(main))
