"""Measures the throughput of many prompts at once, against the sum of the bounds of the passes that ran.

The flags and the fields elapsed_time, num_requests, total_num_tokens, requests_per_second and tokens_per_second are
those of `vllm bench throughput` (tokens are those of prompts and outputs); all engine flags work too. Tokens are drawn
greedily. A warm-up with a batch that shrinks from the largest to a single row comes first, then the rates are measured
on all ranks at once. A pass is bound by max(bytes streamed / link, bytes read / read rate, FLOPs / GEMM rate) of one
rank (scripts/bench/bound.py); the run by the sum over its passes, without what lies between them. Run it plainly, or by
torchrun over several ranks; the last line is one JSON object.

    torchrun --nproc-per-node 2 -m scripts.bench.throughput --model benchmarks/shapes/Llama-3-8B.json \\
      --load-format dummy --resident none --num-prompts 512 --input-len 128 --output-len 32
"""

import argparse
import dataclasses
import sys
import time

from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.engine.runtime.bucket import bucket_sizes

from scripts.bench.bound import against_bound
from scripts.bench.comparison import add_compare_arguments, check_compare, compare_throughput
from scripts.bench.engine_record import describe, say_machine
from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep
from scripts.bench.workload import Job, add_workload_arguments, greedy, positive, random_jobs, ratio


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    config = config_from_args(args).for_job(args.num_prompts * args.n)
    if args.compare and (args.random_range_ratio or args.n > 1):
        raise ValueError("--compare: all outputs have one length there; leave out --n and --random-range-ratio")
    check_compare(args.compare, config, allowed=("transformers-cb",))
    with LLM(**config.to_dict()) as llm:
        jobs = draw(args, llm)
        report = measure(llm, jobs, args)
        if llm.engine.topology.rank > 0:
            return
        report = describe(llm, "throughput") | report
        dtype, device = llm.engine.plan.dtype, llm.engine.topology.device
    say_machine(report)
    say(report)
    if args.compare:
        prompts = [job.prompt for job in jobs]
        elapsed_s = report["elapsed_time"]
        report["comparisons"] = compare_throughput(config, dtype, device, prompts, args.output_len, elapsed_s)
        for row in report["comparisons"]:
            print(*(f"{name} {value}" for name, value in row.items()), sep=", ")
    keep(report, args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--num-prompts", type=positive, default=1000, metavar="N", help="requests (default: 1000)")
    group.add_argument("--dataset-name", choices=("random",), default="random", help="random token ids")
    text = "both lengths vary by up to this fraction (default: 0)"
    group.add_argument("--random-range-ratio", type=ratio, default=0.0, metavar="X", help=text)
    add_workload_arguments(group, output_len=128)
    add_compare_arguments(group)
    add_output_argument(group)
    add_config_arguments(add_groups(parser))


def draw(args: argparse.Namespace, llm: LLM) -> list[Job]:
    lengths = (args.input_len, args.output_len)
    vocab_size = llm.engine.plan.spec.vocab_size
    return random_jobs(args.num_prompts, *lengths, vocab_size, llm.config.seed, args.random_range_ratio)


def shrinking(jobs: list[Job], most: int) -> list[Job]:
    """Jobs, as many as run at once, that end one after another so that each size of a decode pass comes up."""
    sizes = bucket_sizes(min(len(jobs), most))
    return [
        dataclasses.replace(job, output_len=1 + sum(size > index for size in sizes))
        for index, job in enumerate(jobs[: sizes[-1]])
    ]


def measure(llm: LLM, jobs: list[Job], args: argparse.Namespace) -> dict | None:
    """The record's figures; None on ranks other than 0."""
    engine, planned = llm.engine, llm.engine.rates
    run(llm, shrinking(jobs, llm.engine.plan.max_num_seqs))
    if engine.topology.rank == 0:
        llm.measure(llm.engine.work.streamed_bytes)
    passes, start = engine.times.keep(), time.perf_counter()
    outputs = run(llm, jobs, args.n)
    elapsed_s = time.perf_counter() - start
    if engine.topology.rank > 0:
        return None
    num_prompt_tokens = sum(len(job.prompt) for job in jobs)
    num_output_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return {
        "num_prompts": args.num_prompts,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "random_range_ratio": args.random_range_ratio,
        "n": args.n,
        "elapsed_time": elapsed_s,
        "num_requests": len(jobs),
        "total_num_tokens": num_prompt_tokens + num_output_tokens,
        "requests_per_second": len(jobs) / elapsed_s,
        "tokens_per_second": (num_prompt_tokens + num_output_tokens) / elapsed_s,
        "output_tokens_per_second": num_output_tokens / elapsed_s,
        "num_timed_passes": len(passes),
        "passes_s": sum(measured_s for _, measured_s, _ in passes),
        **against_bound(engine.work, [shape for shape, _, _ in passes], elapsed_s, engine.rates, planned),
    }


def run(llm: LLM, jobs: list[Job], n: int = 1) -> list:
    return without_errors(llm.generate([job.prompt for job in jobs], [greedy(job, n) for job in jobs]))


def say(report: dict) -> None:
    bound = f"bound {report['bound_s']:.3f} s ({report['bound']}), fraction {report['fraction_of_bound']:.3f}"
    achieved = f"{report['achieved_link_gb_s']:.2f} GB/s over the link, {report['achieved_memory_gb_s']:.1f} GB/s read"
    print(f"{report['elapsed_time']:.3f} s, {bound}, predicted {report['predicted_s']:.3f} s")
    print(f"{report['num_timed_passes']} passes: {achieved}, {report['achieved_tflops']:.2f} TFLOP/s a rank")
    rates = (report["requests_per_second"], report["tokens_per_second"], report["output_tokens_per_second"])
    print("Throughput: {:.2f} requests/s, {:.2f} total tokens/s, {:.2f} output tokens/s".format(*rates))


if __name__ == "__main__":
    sys.exit(run_script(main))
