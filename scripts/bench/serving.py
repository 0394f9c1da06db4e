"""Measures the server beside the loop that it stands on: the same requests at the same times, once fed to the loop in
one process, and once sent by HTTP, as streams, to a `penstock serve` that is started for it: its front, which starts
the engine's process.

Requests arrive at a share of the engine's capacity, which is what it does with all of them at once, by --load and
--burstiness; with --max-concurrency so many clients each send one after another instead, and latencies from arrival
(ttft, e2el) mean nothing. `rows` has the tokens a second and the latencies of both ways, and how late the client
sent requests, and `ratios` the server's over the loop's, where these are not 0. Both ways have the same warm-up: a
batch that shrinks, then all requests at once. With `--compare vllm` the same client then does the same to vLLM's
server: a row more, and in `vllm_ratios` our server's figures over its. After its row our server gets the requests once
more, and GET /health is called about every millisecond meanwhile (`health`). Then its queue is filled, and requests
are refused (`refused`). `counting` says how much a thread counts beside passes of the engine in one process (see
counting.py). All engine flags work; the last line is one JSON object.

    python -m scripts.bench.serving --model benchmarks/shapes/Llama-3-8B.json --load-format dummy \\
      --num-prompts 512 --input-len 512 --output-len 128 --random-range-ratio 0.8 --load 0.7 \\
      --compare vllm --vllm ~/vllm/bin/python
"""

import argparse
import asyncio
import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.llm import LLM
from penstock.engine.server.validation import MOST_SEQUENCES

from scripts.bench.arrivals import arrival_times, latency_fields, percentile
from scripts.bench.comparison import add_compare_arguments, check_compare, free_memory
from scripts.bench.counting import count_beside
from scripts.bench.engine_record import describe, say_machine
from scripts.bench.entry import run_script
from scripts.bench.http_client import Client, be_refused, fill, poll
from scripts.bench.job_run import run, run_arriving, shrinking, warm_up
from scripts.bench.record import add_output_argument, keep
from scripts.bench.vllm_server import run_vllm_server
from scripts.bench.vllm_side import add_vllm_arguments, find_vllm
from scripts.bench.workload import (
    Job,
    above_zero,
    add_text_argument,
    add_workload_arguments,
    greedy,
    positive,
    random_jobs,
    ratio,
    text_tokens,
)

ROOT = Path(__file__).resolve().parents[2]
START_S = 300.0  # for the server to be ready
HEALTH_CALLS, REFUSED_CALLS = 10_000, 500
LOOP, OURS, VLLM = "in process", "by HTTP", "vLLM by HTTP"  # how requests are fed
WARM_UP_S, PATIENCE = 90.0, 5  # what vLLM's server may take: for its warm-up, and times what ours took
SAID = ("num_prompts", "input_len", "output_len", "random_range_ratio", "burstiness", "max_concurrency")


def main() -> None:
    own, engine = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter), Parser()
    add_arguments(own)
    add_config_arguments(add_groups(engine))
    args, flags = own.parse_known_args()
    config = config_from_args(engine.parse_args(flags)).for_job(args.max_concurrency or args.num_prompts)
    check_compare(args.compare, config, allowed=("vllm",))
    vllm = find_vllm(args.vllm, args.vllm_options) if args.compare else None
    with LLM(**config.to_dict()) as llm:
        plan = llm.engine.plan
        vary = {"range_ratio": args.random_range_ratio, "max_len": plan.residency.max_model_len}
        vary |= {"text": text_tokens(llm.tokenizer, args.text)}
        jobs = random_jobs(args.num_prompts, args.input_len, args.output_len, plan.spec.vocab_size, config.seed, **vary)
        warm_up(llm, jobs)
        elapsed_s, _ = run(llm, jobs, [greedy(job) for job in jobs])
        rate = args.load * len(jobs) / elapsed_s
        arrivals = arrival_times(len(jobs), rate, args.burstiness, config.seed)
        if args.max_concurrency is not None:
            arrivals = [0.0] * len(jobs)  # in one process its rows are the clients
        fed = run_arriving(llm, jobs, arrivals)
        limits = {name: getattr(plan, name) for name in ("max_num_seqs", "max_num_batched_tokens")}
        report = describe(llm, "serving") | {"counting": count_beside(llm, jobs)}
    free_memory()
    report |= {name: getattr(args, name) for name in SAID}
    report |= {} if args.text is None else {"text": args.text.name}
    report |= {"load": args.load, "requests_per_second_at_once": len(jobs) / elapsed_s, "request_rate": rate}
    ask = functools.partial(by_http, jobs, arrivals, limits["max_num_seqs"], args.max_concurrency)
    with served(flags, limits) as address:
        sent, late_s, answers_s = asyncio.run(ask(True, address))
    loop, ours = row_of(LOOP, jobs, arrivals, fed), row_of(OURS, jobs, arrivals, sent, late_s)
    report |= {"rows": [loop, ours], "ratios": ratios_of(loop, ours)}
    if args.max_concurrency is not None:
        report["share_of_full_passes"] = share_of_full_passes(ours, jobs, args.max_concurrency)
    if vllm is not None:
        most_s = WARM_UP_S + PATIENCE * max(one[-1] for one in sent)
        result = run_vllm_server(vllm, config, report, functools.partial(ask, False), most_s)
        if "sent" in result:
            theirs, late_s, _ = result.pop("sent")
            report["rows"].append(row_of(VLLM, jobs, arrivals, theirs, late_s))
            report["vllm_ratios"] = ratios_of(report["rows"][-1], ours)
        report["vllm"] = result
    report |= {name: percentiles_of(seconds) for name, seconds in answers_s.items()}
    say_machine(report)
    say(report)
    keep(report, args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument("--num-prompts", type=positive, default=512, metavar="N", help="requests (default: 512)")
    text = "both lengths vary by up to this fraction (default: 0)"
    group.add_argument("--random-range-ratio", type=ratio, default=0.0, metavar="X", help=text)
    text = "requests that arrive, as a share of what the engine does with all of them at once (default: 0.7)"
    group.add_argument("--load", type=above_zero, default=0.7, metavar="X", help=text)
    text = "how arrivals vary: 1 as in a Poisson process, below it in bursts, above it evenly (default: 1)"
    group.add_argument("--burstiness", type=above_zero, default=1.0, metavar="X", help=text)
    text = "clients that send one request after another, instead of arrivals"
    group.add_argument("--max-concurrency", type=positive, default=None, metavar="N", help=text)
    add_text_argument(group)
    add_workload_arguments(group, output_len=128)
    add_compare_arguments(group)
    add_vllm_arguments(group)
    add_output_argument(group)


async def by_http(
    jobs: Sequence[Job],
    arrivals: Sequence[float],
    rows: int,
    num_clients: int | None,
    is_ours: bool,
    address: tuple[str, int],
) -> tuple[list[list[float]], list[float], dict[str, list[float]]]:
    """The seconds from the start at which the tokens of each request came from the server, those by which requests were
    sent late, and, of our server, those that its short answers took: of /health while it gets the requests once more,
    and of requests that find its queue full."""
    client, num_clients = Client(address), num_clients or len(jobs)
    bodies, at_once = [body_of(job) for job in jobs], [0.0] * len(jobs)
    warming = [body_of(job) for job in shrinking(list(jobs), rows)]
    await client.send(salted(warming, "warm-up"), at_once, len(warming))
    await client.send(salted(bodies, "at once"), at_once, num_clients)
    times, late_s = await client.send(bodies, arrivals, num_clients), client.late_s
    answers_s = {}
    if is_ours:
        ended = asyncio.Event()
        watching = asyncio.create_task(poll(address, "/health", HEALTH_CALLS, ended))
        await client.send(salted(bodies, "health"), arrivals, num_clients)
        ended.set()
        answers_s = {"health": await watching, "refused": await refusals(address, bodies[0])}
    client.close()
    return times, late_s, answers_s


async def refusals(address: tuple[str, int], body: dict[str, Any]) -> list[float]:
    """Seconds in which requests are refused while all rows run and the queue is full. Each is of as many sequences as a
    request may have, so that those which end meanwhile make no room for another."""
    many = body | {"n": MOST_SEQUENCES}
    connections = await fill(address, many)
    try:
        return await be_refused(address, many, REFUSED_CALLS)
    finally:
        for connection in connections:
            connection.close()


def salted(bodies: list[dict[str, Any]], salt: str) -> list[dict[str, Any]]:
    """Requests whose prompts no later ones find in the prefix cache."""
    return [body | {"cache_salt": salt} for body in bodies]


def body_of(job: Job) -> dict[str, Any]:
    return {"prompt": job.prompt, "max_tokens": job.output_len, "temperature": 0, "ignore_eos": True}


@contextlib.contextmanager
def served(flags: Sequence[str], limits: dict[str, int]) -> Iterator[tuple[str, int]]:
    """A server in a process of its own, ready; its address. Raises RuntimeError, with what it said, if it is not ready
    in START_S or ends before."""
    limit_flags = [part for name, value in limits.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "penstock", "serve", *flags, *limit_flags, "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            yield wait_for(process, log)
        finally:
            process.terminate()
            process.wait()


def wait_for(process: subprocess.Popen, log) -> tuple[str, int]:
    """The address of a server, once it says that it is ready."""
    end_s = time.monotonic() + START_S
    while True:
        log.seek(0)
        said = log.read()
        if "ready after" in said:
            address = said.partition("http://")[2].partition(",")[0]
            host, _, port = address.rpartition(":")
            return host, int(port)
        if process.poll() is not None or time.monotonic() > end_s:
            raise RuntimeError(f"the server is not ready: {said[-2000:]}")
        time.sleep(0.1)


def row_of(
    fed: str,
    jobs: Sequence[Job],
    arrivals: Sequence[float],
    times: list[list[float]],
    late_s: Sequence[float] | None = None,
) -> dict[str, Any]:
    elapsed_s = max(one[-1] for one in times)
    num_tokens = sum(len(job.prompt) + job.output_len for job in jobs)
    row = {"fed": fed, "tokens_per_second": num_tokens / elapsed_s, **latency_fields(arrivals, times)}
    if late_s is not None:
        row |= {f"{name}_late_ms": 1e3 * percentile(sorted(late_s), at) for name, at in (("median", 50), ("p99", 99))}
    return row


def share_of_full_passes(row: dict[str, Any], jobs: Sequence[Job], num_clients: int) -> float:
    """The server's output tokens a second, over those of passes that each give every client a token."""
    num_outputs = sum(job.output_len for job in jobs)
    outputs_s = row["tokens_per_second"] * num_outputs / (num_outputs + sum(len(job.prompt) for job in jobs))
    return outputs_s * row["median_tpot_ms"] / 1e3 / num_clients


def percentiles_of(seconds: list[float]) -> dict[str, float]:
    seconds = sorted(seconds)
    figures = {"median_ms": percentile(seconds, 50), "p99_ms": percentile(seconds, 99), "longest_ms": seconds[-1]}
    return {"num_calls": len(seconds)} | {name: 1e3 * figure for name, figure in figures.items()}


def ratios_of(other: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Our server's figures over another row's, but the client's own, and those that are 0 there, as gaps are where
    outputs have one token."""
    return {name: ours[name] / other[name] for name in other if name != "fed" and "late" not in name and other[name]}


def say(report: dict[str, Any]) -> None:
    names = [f"{what}_{name}_ms" for name in ("ttft", "tpot") for what in ("median", "p99")]
    print(f"{'':14}{'tokens/s':>12}" + "".join(f"{name:>16}" for name in names))
    ratios = {"ratio": "ratios", "over vLLM's": "vllm_ratios"}
    lines = [(row["fed"], row, 2) for row in report["rows"]]
    lines += [(title, report[name], 3) for title, name in ratios.items() if name in report]
    for title, row, digits in lines:
        figures = [row.get(name) for name in ("tokens_per_second", *names)]
        first, *others = ("-" if figure is None else f"{figure:.{digits}f}" for figure in figures)
        print(f"{title:14}{first:>12}" + "".join(f"{one:>16}" for one in others))
    calls = "{num_calls} calls, median {median_ms:.2f} ms, p99 {p99_ms:.2f} ms"
    for title, name in {"GET /health": "health", "refused": "refused"}.items():
        print(f"{title}: {calls.format(**report[name])}")
    passes = "{alone:.2f} ms alone, {beside:.2f} ms beside it".format(**report["counting"]["median_pass_ms"])
    print(f"a thread beside passes counts {report['counting']['share']:.0%} of what it does alone; passes: {passes}")
    if "share_of_full_passes" in report:
        print(f"output tokens/s: {report['share_of_full_passes']:.3f} of passes that give every client one")
    if "vllm" in report:
        print("vLLM", *report["vllm"].values())


if __name__ == "__main__":
    sys.exit(run_script(main))
