"""Times other libraries for `--compare`, on the same prompts and weights, in the same run, once the engine is gone.

This file knows the names and the results; baselines.py knows how they run, and is imported only if something is
compared (transformers takes seconds to import and need not be installed).
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from penstock.engine.config import EngineConfig
from penstock.engine.weights.gguf_file import is_gguf
from penstock.parallel.launch import resolve_launch
from penstock.scheduler.units import ms

from scripts.bench.workload import Measured

# name -> the libraries that it needs
BASELINES = {
    "accelerate": ("transformers", "accelerate"),
    "transformers": ("transformers",),
    "transformers-cb": ("transformers",),
}


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(BASELINES)
    text = f"run these on the same weights as well, separated by commas: {names}"
    parser.add_argument("--compare", type=lambda text: text.split(","), default=[], metavar="NAMES", help=text)


def check_compare(names: Sequence[str], config: EngineConfig, allowed: Sequence[str] = tuple(BASELINES)) -> None:
    """Raises ValueError for an unknown name, a library that is missing, several ranks, or a GGUF file."""
    for name in names:
        if name not in allowed:
            raise ValueError(f"--compare {name}: expected some of {', '.join(allowed)}")
        for library in BASELINES.get(name, ()):
            if importlib.util.find_spec(library) is None:
                raise ValueError(f"--compare {name}: {library} is not installed (pip install 'penstock[compare]')")
    if names and resolve_launch(config.tensor_parallel_size).tp_size > 1:
        raise ValueError("--compare: the others run on one device; compare with one rank")
    if names and is_gguf(config.model):
        raise ValueError(f"--compare: the others read a directory of safetensors, and {config.model} is a GGUF file")


def compare(
    names: Sequence[str], config: EngineConfig, dtype: str, device: torch.device, batches: Sequence[Measured], num: int
) -> list[dict]:
    """A row for each baseline and batch: its times for `num` tokens a sequence, and how much faster the engine was."""
    rows = []
    for name in names:

        def measure(baselines, model, name: str = name) -> Iterator[dict]:
            for ours in batches:
                yield against(ours, baselines.generate(name, model, device, ours.prompts, num))

        rows += attempt(name, config, dtype, device, measure)
    return rows


def compare_throughput(
    config: EngineConfig, dtype: str, device: torch.device, prompts: list[list[int]], output_len: int, elapsed_s: float
) -> list[dict]:
    """A row for the continuous batching of transformers, over the whole workload, for which the engine took
    `elapsed_s`."""

    def measure(baselines, model) -> Iterator[dict]:
        their_s = baselines.elapsed_s(baselines.run_continuously(model, prompts, output_len))
        yield {
            "elapsed_time": their_s,
            "requests_per_second": len(prompts) / their_s,
            "speedup": their_s / elapsed_s,
        }

    return attempt("transformers-cb", config, dtype, device, measure)


def attempt(
    name: str, config: EngineConfig, dtype: str, device: torch.device, measure: Callable[..., Iterator[dict]]
) -> list[dict]:
    """Loads a baseline and collects the rows of `measure(baselines, model)`. An error becomes a row of its own, so that
    the rows measured before it are kept."""
    from scripts.bench import baselines

    free_memory()
    rows, versions = [], {library: importlib.metadata.version(library) for library in BASELINES[name]}
    try:
        for row in measure(baselines, baselines.load(name, config, dtype, device)):
            rows.append({"baseline": name, "versions": versions} | row)
    except Exception as error:
        traceback.print_exc()
        rows.append({"baseline": name, "error": f"{type(error).__name__}: {error}"})
    return rows


def free_memory() -> None:
    """Gives back memory that nothing refers to any more: of the engine, and of the baseline before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def against(ours: Measured, theirs: Measured) -> dict:
    """A row that compares theirs with ours. Speedups are their time over ours; `equal_tokens` of the `num_tokens`
    tokens are the same at the same index."""
    pairs = [pair for one, other in zip(ours.tokens, theirs.tokens) for pair in zip(one, other)]
    return {
        "batch_size": len(ours.prompts),
        "first_token_s": theirs.first_token_s,
        "first_token_speedup": theirs.first_token_s / ours.first_token_s,
        "token_s": theirs.token_s,
        "our_token_s": ours.token_s,
        "speedup": theirs.token_s / ours.token_s if ours.token_s else None,
        "equal_tokens": sum(one == other for one, other in pairs),
        "num_tokens": len(pairs),
    }


def print_comparisons(rows: Sequence[dict]) -> None:
    print(f"{'':16} {'batch':>6} {'token ms':>10} {'ours ms':>9} {'speedup':>8} {'equal tokens':>13}")
    for row in rows:
        if "error" in row:
            print(f"{row['baseline']:16} {row['error']}")
            continue
        ours = f"{ms(row['our_token_s']):>9.2f} {row['speedup']:>8.2f}" if row["speedup"] else f"{'-':>9} {'-':>8}"
        equal = f"{row['equal_tokens']} of {row['num_tokens']}"
        print(f"{row['baseline']:16} {row['batch_size']:>6} {ms(row['token_s']):>10.2f} {ours} {equal:>13}")
