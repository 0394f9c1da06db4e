"""Measures the time to the first token of prompts whose prefixes are used in turn and are more than the KV cache holds,
with KV pages in host memory (--kv-host-memory) and without.

Of prefixes of --prefix-len tokens there are as many as --prefix-gb hold; the device's KV cache has room for a --share
of them, unless --num-pages says otherwise. One request after another has a prefix, --own-len tokens of its own, and one
token of output. The first round computes every prefix; the median over the rounds after it counts. All engine flags
work; where the link binds no page moves, and the record says how many might have. The bound of a reused prefix is its
bytes over the link. The last line is one JSON object, with a row for either engine in `rows`.

    python -m scripts.bench.reuse --model benchmarks/shapes/Llama-3-8B.json --load-format dummy --kv-host-memory 24GiB
"""

import argparse
import dataclasses
import random
import statistics
import sys
import time
from typing import Any

from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.commands.plan import plan_of
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.scheduler.batching.pages import pages_for
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.cost.time_model import link_s
from penstock.scheduler.units import GB, ms

from scripts.bench.comparison import free_memory
from scripts.bench.engine_record import describe, say_machine
from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep
from scripts.bench.workload import above_zero, positive

FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    config, num_prefixes = sized(args, config_from_args(args, max_num_seqs=1))
    if config.kv_host_memory is None:
        raise ValueError("--kv-host-memory: without it there is nothing to compare")
    workload = {name: getattr(args, name) for name in ("prefix_len", "own_len", "rounds")}
    report: dict[str, Any] = {}
    rows = []
    for name, own in (("off", dataclasses.replace(config, kv_host_memory=None)), ("on", config)):
        free_memory()
        with LLM(**own.to_dict()) as llm:
            rows.append({"host_tier": name} | measure(llm, num_prefixes, args))
            if llm.engine.topology.rank == 0:
                report = describe(llm, "reuse") | workload | {"num_prefixes": num_prefixes}
    if report:
        off, on = rows
        speedup = off["reused_first_token_s"] / on["reused_first_token_s"]
        report |= {"num_pages": config.num_pages, "speedup": speedup, "rows": rows}
        say_machine(report)
        say(report)
        keep(report, args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    text = "1e9 bytes a rank of all prefixes' keys and values (default: 20)"
    group.add_argument("--prefix-gb", type=above_zero, default=20.0, metavar="X", help=text)
    text = "tokens of a prefix (default: 8000)"
    group.add_argument("--prefix-len", type=positive, default=8000, metavar="N", help=text)
    text = "tokens of a prompt behind its prefix (default: 64)"
    group.add_argument("--own-len", type=positive, default=64, metavar="N", help=text)
    text = "part of the prefixes for which the device has KV pages (default: 0.25)"
    group.add_argument("--share", type=above_zero, default=0.25, metavar="X", help=text)
    text = "times that each prefix is used again (default: 2)"
    group.add_argument("--rounds", type=positive, default=2, metavar="N", help=text)
    add_output_argument(group)
    add_config_arguments(add_groups(parser))


def sized(args: argparse.Namespace, config: EngineConfig) -> tuple[EngineConfig, int]:
    """The config with pages for a share of the prefixes, and their number. Raises ValueError if there are fewer than
    two, or if a prompt has no room in the share."""
    page_bytes = plan_of(config).demand.page_bytes
    pages_each = pages_for(args.prefix_len, config.page_size)
    num_prefixes = int(args.prefix_gb * GB / (pages_each * page_bytes))
    if num_prefixes < 2:
        raise ValueError(f"--prefix-gb {args.prefix_gb:g}: expected two prefixes of {args.prefix_len} tokens at least")
    num_pages = config.num_pages or 1 + int(args.share * num_prefixes * pages_each)
    prompt_pages = pages_for(args.prefix_len + args.own_len + 1, config.page_size)
    if num_pages <= prompt_pages:
        raise ValueError(f"--share {args.share:g}: {num_pages} KV pages are too few for a prompt of {prompt_pages}")
    return dataclasses.replace(config, num_pages=num_pages), num_prefixes


def measure(llm: LLM, num_prefixes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Uses each prefix in turn, round after round: medians of the seconds to a first token, and what moved."""
    rng, ids = random.Random(llm.config.seed), range(llm.engine.plan.spec.vocab_size)
    prefixes = [rng.choices(ids, k=args.prefix_len) for _ in range(num_prefixes)]
    for _ in range(2):  # what is compiled and captured, for prompts of both kinds
        first_token_s(llm, prefixes[0] + rng.choices(ids, k=args.own_len))
    llm.reset_prefix_cache()
    counts = llm.loop.scheduler.counts
    before = counts.to_dict()["moves"]
    rounds = [
        [first_token_s(llm, prefix + rng.choices(ids, k=args.own_len)) for prefix in prefixes]
        for _ in range(args.rounds + 1)
    ]
    reused = [seconds for one in rounds[1:] for seconds in one]
    moves = {name: value - before[name] for name, value in counts.to_dict()["moves"].items() if "page_" not in name}
    return {
        "computed_first_token_s": statistics.median(rounds[0]),
        "reused_first_token_s": statistics.median(reused),
        "slowest_reused_first_token_s": max(reused),
        "bound_s": link_s(args.prefix_len * llm.engine.work.kv_token_bytes, llm.engine.rates),
        "num_hit_tokens": counts.num_hit_tokens,
        "num_asked_tokens": counts.num_asked_tokens,
        **moves,
    }


def first_token_s(llm: LLM, prompt: list[int]) -> float:
    """Seconds until a prompt, alone, has its first token."""
    start = time.perf_counter()
    without_errors(llm.generate([prompt], FIRST_TOKEN))
    return time.perf_counter() - start


def say(report: dict) -> None:
    columns = ("computed ms", "reused ms", "slowest ms", "bound ms")
    print(f"{'host tier':12}" + "".join(f"{name:>14}" for name in (*columns, "pages out", "pages in", "not moved")))
    for row in report["rows"]:
        names = ("computed_first_token_s", "reused_first_token_s", "slowest_reused_first_token_s", "bound_s")
        times = "".join(f"{ms(row[name]):>14.2f}" for name in names)
        moved = "".join(f"{row[name]:>14}" for name in ("num_out", "num_in", "num_not_moved"))
        print(f"{row['host_tier']:12}{times}{moved}")
    prefixes = f"{report['num_prefixes']} prefixes of {report['prefix_len']} tokens"
    print(
        f"{prefixes}, {report['num_pages']} KV pages: {report['speedup']:.2f} times less time to a reused first token"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
