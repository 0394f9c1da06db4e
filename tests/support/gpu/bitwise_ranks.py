"""One rank of test_bitwise.py: each family's logits, streamed, half streamed, eager and resident, bit by bit.

    -m tests.support.gpu.bitwise_ranks FOLDER OUT [CASE ...]

FOLDER has a checkpoint in each subfolder; each rank leaves its report in OUT, on these cases or on all. A CPU runs them
padded, as a GPU does. Rows end one after another, so that passes of every bucket up to their number run, in one run up
to 40; one has hundreds of passes.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from penstock.engine.kernels import decompress_weights, reduce_residual_norm
from penstock.engine.runtime.pass_runner import PassRunner
from penstock.parallel.launch import run_rank
from penstock.scheduler.batching.batch import Batch

from penstock import LLM, SamplingParams
from tests.support.compressed_runs import least_memory
from tests.support.streaming_runs import fill_alike
from tests.support.watches import EndPass, keep_logits

LENGTHS = (14, 12, 10, 9, 7, 6, 4, 3)  # output tokens of each row
MANY_LENGTHS = tuple(range(2, 42))  # one row fewer in each pass, from the largest bucket to the smallest
PROMPTS = [[(3 + row + index) % 128 for index in range(37 + 4 * (row % 8))] for row in range(len(MANY_LENGTHS))]
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 96, "gpu_memory": "2GiB", "page_size": 4}
OPTIONS |= {"capture": "lazy"}  # of all graphs few are used, and the kernels of the others would be compiled too
PLAIN = {"weights_compression": "none"}
VARIANTS = {
    "streamed": {"resident": "none", "debug": {"poison": True}, **PLAIN},
    "half streamed": {"resident": 0.5, "debug": {"poison": True}, **PLAIN},
    "eager": {"resident": "all", "enforce_eager": True},
    "streamed, eager": {"resident": "none", "debug": {"poison": True}, "enforce_eager": True, **PLAIN},
}
COMPRESSED = {"weights_compression": "lossless", "debug": {"poison": True}, "num_pages": 1200}
COMPRESSED_VARIANTS = {  # bfloat16 only; in the last two some groups stay compressed, for want of memory
    "compressed": {"resident": "none", **COMPRESSED},
    "compressed, eager": {"resident": "none", "enforce_eager": True, **COMPRESSED},
    "compressed resident": {"resident": "all", "gpu_memory": "least", **COMPRESSED},
    "half compressed resident": {"resident": 0.5, "gpu_memory": "least", **COMPRESSED},
}
SINKS = {"attention_sinks": 2, "attention_window": 30}  # shorter than the prompts
GPU = {"memory_bytes": 141 * 10**9, "device": "cuda"} if torch.cuda.is_available() else {}
HUNDREDS = 210


def logits_of(checkpoint: str, lengths: tuple[int, ...], **options) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits of every pass's sampled rows, on this rank, and all tokens."""
    passes, tp_size, decompressed = [], int(os.environ.get("WORLD_SIZE", 1)), decompress_weights.calls["triton"]
    if options.get("gpu_memory") == "least":
        del options["gpu_memory"]
        options |= {"gpu_memory": least_memory(checkpoint, tp_size, **GPU, **OPTIONS | options)}
    options["debug"] = {"as_on_gpu": not torch.cuda.is_available()} | options.get("debug", {})
    with LLM(checkpoint, **OPTIONS | {"max_num_seqs": max(8, len(lengths))} | options) as llm:
        fill_alike(llm)
        runner, executor = llm.engine.worker.runner, llm.engine.worker.executor
        short = []
        llm.engine.watches.add(keep_logits(passes))
        llm.engine.watches.add(EndPass(lambda batch, _: short.append(is_short(runner, batch))))
        params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[: len(lengths)], params)]
        check_what_ran(runner, options, short)
        check_what_was_compressed(llm, decompress_weights.calls["triton"] > decompressed)
        copied = executor.copied.total.sent_bytes
        assert (copied > 0) == (options["resident"] != "all"), "what was to stream did not, or the other way round"
    return passes, tokens


def is_short(runner: PassRunner, batch: Batch) -> bool:
    """Tells whether a pass leaves out what is computed for sampled rows alone: it has none, and is not padded."""
    return not batch.num_sampled and (runner.staging is None or runner.sizes.find(batch) is None)


def check_what_ran(runner: PassRunner, options: dict, short: list[bool]) -> None:
    """Graphs were replayed, or were not, as asked; sums over ranks took the fused kernel, in graphs and without, and
    replays count theirs: as many a pass as the plan has, without those that a pass leaves out if it is `short`."""
    executor, several = runner.executor, runner.model.collectives.size > 1
    assert len(short) == executor.counters.num_passes
    predicted = Counter()
    for step in executor.pass_plan.steps if several else ():
        num_passes = short.count(False) if step.of_rows else len(short)
        predicted.update({part: num_passes for part in step.parts if part.endswith("allreduce")})
    counted = {site.operation: moved.num_calls for site, moved in executor.reduced.sites.items()}
    assert counted == predicted, f"sums over ranks: {counted} counted, {dict(predicted)} predicted, passes {short}"
    if "attention_sinks" in options:
        assert any(short), "no pass had a chunk of a prompt alone, behind keys that are not rotated"
    if runner.device.type == "cpu":
        return
    graphs = runner.graphs
    assert bool(graphs and graphs.passes) != options.get("enforce_eager", False)
    if several:
        assert reduce_residual_norm.calls["triton"] > 0


def check_what_was_compressed(llm: LLM, decompressor_ran: bool) -> None:
    compressed, counters = llm.engine.plan.residency.compressed, llm.engine.worker.executor.counters
    sizes = {group.id: group.nbytes for group in llm.engine.plan.layout.groups}
    assert bool(compressed) == (llm.config.weights_compression == "lossless")
    assert bool(compressed & llm.engine.plan.residency.resident) == (llm.config.gpu_memory != 2**31)
    assert counters.decompressed_bytes == {group: sizes[group] * counters.num_passes for group in compressed}
    if llm.engine.worker.runner.device.type == "cuda":
        assert decompressor_ran == bool(compressed)


def compare(checkpoint: str, dtype: str, lengths: tuple[int, ...], variants: tuple[str, ...], **options) -> dict:
    """Finds which of these variants have the resident run's bits, in every pass; and its tokens."""
    began_s, what = time.perf_counter(), f"{Path(checkpoint).name} {dtype}, {len(lengths)} rows {options or ''}"
    passes, tokens = logits_of(checkpoint, lengths, dtype=dtype, resident="all", **options)
    same = {}
    for name in variants:
        others, _ = logits_of(checkpoint, lengths, dtype=dtype, **(VARIANTS | COMPRESSED_VARIANTS)[name], **options)
        same[name] = len(passes) == len(others) and all(torch.equal(a, b) for a, b in zip(passes, others))
    if os.environ.get("RANK", "0") == "0":
        print(f"{what}: {same}, {time.perf_counter() - began_s:.1f} s", flush=True)
    return {"same": same, "tokens": tokens, "num_passes": len(passes)}


def cases(folder: Path) -> dict[str, tuple[str, str, tuple[int, ...], tuple[str, ...], dict]]:
    """Arguments of `compare`, by case. Several ranks compare fewer variants, and bf16 in the first family only: each of
    their engines takes a second to start."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    variants = ("streamed", "eager") if several else tuple(VARIANTS)
    compressed = ("compressed", "half compressed resident") if several else tuple(COMPRESSED_VARIANTS)
    found = {}
    for index, checkpoint in enumerate(sorted(folder.iterdir())):
        name, path = checkpoint.name, str(checkpoint)
        for dtype in ("float32", "bfloat16")[: 1 if several and index else 2]:
            tried = variants + compressed if dtype == "bfloat16" else variants
            found[f"{name} {dtype}"] = path, dtype, LENGTHS, tried, {}
        if name in ("llama_gqa", "neox_parallel")[several:]:
            found[f"{name} sinks"] = path, "bfloat16", LENGTHS, variants, SINKS
            found[f"{name} sinks float32"] = path, "float32", LENGTHS, variants[:1], SINKS
    first, buckets = str(min(folder.iterdir())), ("streamed", "half streamed", "eager", "compressed")
    found["buckets"] = first, "bfloat16", MANY_LENGTHS, buckets, {}
    found["hundreds"] = first, "bfloat16", (HUNDREDS,), ("streamed", "compressed"), {}
    return found


def main() -> None:
    folder, out, *chosen = sys.argv[1:]
    found = cases(Path(folder))
    report = {name: compare(*found[name][:4], **found[name][4]) for name in chosen or found}
    out = Path(out)
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    sys.exit(run_rank(main))
