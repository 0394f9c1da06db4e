"""Times a process from its start to its first token, phase by phase, each start in a fresh process: cold, with no
compiled kernel cached, and warm.

Flags and the fields avg_{cold,warm}_startup_time, *_times and *_percentiles are those of `vllm bench startup`; all
engine flags work too. A startup time is that of constructing an LLM, captures included, as vLLM's is; `rows` has the
medians of all phases (scripts/bench/startup_phases.py), from the start of the process on. `--checkpoint` writes the
random weights as a checkpoint first and loads that, from the page cache that the writing has warmed. `--against-lazy`
starts as often with `--capture lazy` too, for what capturing at start costs: {cold,warm}_capture_cost_s. By torchrun
there is one start, in torchrun's own processes, with the caches as they are: TRITON_CACHE_DIR=$(mktemp -d) makes it
cold. The last line is one JSON object.

    python -m scripts.bench.startup --model benchmarks/shapes/Llama-3-8B.json --load-format dummy --resident none
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
from penstock.engine.commands.flags import Parser, add_config_arguments, add_groups, config_from_args
from penstock.engine.config import EngineConfig
from penstock.engine.weights.gguf_file import is_gguf
from penstock.parallel.launch import resolve_launch
from penstock.scheduler.units import GB, gb_s

from scripts.bench.engine_record import say_machine
from scripts.bench.entry import run_script
from scripts.bench.latency import PERCENTILES
from scripts.bench.record import add_output_argument, keep
from scripts.bench.startup_phases import measure_start
from scripts.bench.workload import positive

ROOT = Path(__file__).resolve().parents[2]
COLD, WARM = "cold", "warm"
LAZY = "_lazy"  # follows the kind of starts with `--capture lazy`
ITERATIONS = {"num_iters_cold": 3, "num_iters_warmup": 1, "num_iters_warm": 3}
CACHES = ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH")  # where compiled kernels are kept between processes


def main() -> None:
    imported_at_s = time.perf_counter()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    if args.child is not None:
        keep(measure_start(EngineConfig(**json.loads(args.child)), args.input_len, imported_at_s), None)
        return
    config = config_from_args(args)
    by_torchrun = resolve_launch(config.tensor_parallel_size).kind == "torchrun"
    check(args, config, by_torchrun)
    if by_torchrun:
        measured = measure_start(config, args.input_len, imported_at_s)
        starts = {WARM: [measured]} if measured else {}
    else:
        starts = measure_starts(config, args)
    if starts:
        report = summarise(starts) | {"model": Path(config.model).stem, "checkpoint": args.checkpoint}
        say_machine(report)
        print_table(report["rows"])
        keep(report, args.output_json)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    for name, default in ITERATIONS.items():
        text = f"{name.removeprefix('num_iters_')} starts (default: {default})"
        group.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help=text)
    text = "tokens of the prompt (default: 32)"
    group.add_argument("--input-len", type=positive, default=32, metavar="N", help=text)
    group.add_argument("--checkpoint", action="store_true", help="write a checkpoint of random weights and load that")
    text = "where, for the time of the run (default: the system's temporary directory)"
    group.add_argument("--checkpoint-dir", metavar="DIR", help=text)
    text = "start as often with --capture lazy, and say what capturing at start costs"
    group.add_argument("--against-lazy", action="store_true", help=text)
    group.add_argument("--child", metavar="CONFIG", help=argparse.SUPPRESS)  # a start of this benchmark
    add_output_argument(group)
    add_config_arguments(add_groups(parser))


def check(args: argparse.Namespace, config: EngineConfig, by_torchrun: bool) -> None:
    """Fills in the numbers of starts. Raises ValueError for flags that do not go together."""
    given = [name for name in ITERATIONS if getattr(args, name) is not None]
    others = [name for name in ("checkpoint", "against_lazy") if getattr(args, name)]
    if by_torchrun and (given or others):
        flag = "--" + (given + others)[0].replace("_", "-")
        raise ValueError(f"{flag}: by torchrun there is one start, of what is there; -tp N starts N ranks without it")
    vars(args).update({name: default for name, default in ITERATIONS.items() if name not in given})
    if min(getattr(args, name) for name in ITERATIONS) < 0 or not args.num_iters_cold + args.num_iters_warm:
        raise ValueError("--num-iters-cold, --num-iters-warm: expected at least one start to measure")
    if args.against_lazy and (config.capture != "start" or config.enforce_eager):
        raise ValueError("--against-lazy: expected an engine that captures at start, to compare with")
    if args.checkpoint_dir is not None and not (args.checkpoint and Path(args.checkpoint_dir).is_dir()):
        raise ValueError(
            f"--checkpoint-dir {args.checkpoint_dir}: expected --checkpoint, and a directory that is there"
        )
    if args.checkpoint and config.load_format == "dummy":
        raise ValueError("--checkpoint --load-format dummy: a checkpoint is read, or weights are made up; which one?")
    if args.checkpoint and is_gguf(config.model):
        raise ValueError(
            f"--checkpoint: it is written as safetensors, and {config.model} is a GGUF file: load that one"
        )
    if args.checkpoint and importlib.util.find_spec("safetensors") is None:
        raise ValueError("--checkpoint: safetensors is not installed (pip install safetensors)")


def measure_starts(config: EngineConfig, args: argparse.Namespace) -> dict[str, list[dict]]:
    """The records of the starts, cold and warm."""
    if not args.checkpoint:
        return start_all(config, args)
    from scripts.bench.dummy_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory(dir=args.checkpoint_dir) as directory:
        began_s = time.perf_counter()
        nbytes = write_checkpoint(config.model, config.seed, Path(directory))
        print(f"{nbytes / GB:.2f} GB written in {time.perf_counter() - began_s:.1f} s", flush=True)
        return start_all(dataclasses.replace(config, model=directory), args)


def start_all(config: EngineConfig, args: argparse.Namespace) -> dict[str, list[dict]]:
    """The records of the starts by their kind, those without any left out."""
    configs = {"": config} | ({LAZY: dataclasses.replace(config, capture="lazy")} if args.against_lazy else {})
    starts = {kind + suffix: [] for suffix in configs for kind in (COLD, WARM)}
    for suffix, one in configs.items():
        for _ in range(args.num_iters_cold):
            with tempfile.TemporaryDirectory() as cache:
                starts[COLD + suffix].append(start(one, args.input_len, dict.fromkeys(CACHES, cache)))
        for _ in range(0 if suffix else args.num_iters_warmup):
            start(one, args.input_len, {})
        starts[WARM + suffix] = [start(one, args.input_len, {}) for _ in range(args.num_iters_warm)]
    return {kind: records for kind, records in starts.items() if records}


def start(config: EngineConfig, input_len: int, environment: dict[str, str]) -> dict:
    """The record of a start in a process of its own. If that fails it has said why, and this process ends too."""
    arguments = ["--child", json.dumps(config.to_dict()), "--input-len", str(input_len)]
    command = [sys.executable, "-P", "-m", "scripts.bench.startup", *arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"a start ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def summarise(starts: dict[str, list[dict]]) -> dict[str, Any]:
    """The benchmark's record from those of the starts."""
    records = [record for kind in starts.values() for record in kind]
    report = {key: value for key, value in records[-1].items() if key not in ("startup_s", "phases")}
    for kind, measured in starts.items():
        times = [record["startup_s"] for record in measured]
        report[f"avg_{kind}_startup_time"] = statistics.mean(times)
        report[f"{kind}_startup_times"] = times
        report[f"{kind}_startup_percentiles"] = {p: float(numpy.percentile(times, p)) for p in PERCENTILES}
        if kind + LAZY in starts:
            lazy_s = statistics.median(record["startup_s"] for record in starts[kind + LAZY])
            report[f"{kind}_capture_cost_s"] = statistics.median(times) - lazy_s
    rows = [median_row(kind, phase, measured) for kind, measured in starts.items() for phase in measured[0]["phases"]]
    return report | {"rows": rows}


def median_row(kind: str, phase: str, records: list[dict]) -> dict[str, Any]:
    each = [record["phases"][phase] for record in records]
    row = {"start": kind, "phase": phase} | {key: statistics.median(one[key] for one in each) for key in each[0]}
    return row | ({"gb_s": gb_s(row["bytes"], row["seconds"])} if "bytes" in row else {})


def print_table(rows: list[dict]) -> None:
    print(f"{'start':10} {'phase':12} {'s':>9} {'since start':>12} {'GB':>8} {'GB/s':>8} {'peak GB':>8} {'graphs':>7}")
    for row in rows:
        since = f"{row['since_start_s']:.3f}" if "since_start_s" in row else ""
        size, rate = (f"{row['bytes'] / GB:.3f}", f"{row['gb_s']:.2f}") if "bytes" in row else ("", "")
        peak = f"{row['peak_host_bytes'] / GB:.3f}" if "peak_host_bytes" in row else ""
        numbers = f"{row['seconds']:9.3f} {since:>12} {size:>8} {rate:>8} {peak:>8} {row.get('num_graphs', ''):>7}"
        print(f"{row['start']:10} {row['phase']:12} {numbers}")


if __name__ == "__main__":
    sys.exit(run_script(main))
