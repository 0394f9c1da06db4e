"""One rank of test_bitwise.py: each family's logits, streamed, half streamed, eager and resident, bit by bit.

Rows end one after another, so that passes of every bucket up to their number run; one run has hundreds of passes.
"""

import json
import os
import sys
from pathlib import Path

import torch

from engine.kernels import reduce_residual_norm
from parallel.launch import run_rank
from penstock import LLM, SamplingParams

LENGTHS = (14, 12, 10, 9, 7, 6, 4, 3)  # output tokens of each row
PROMPTS = [list(range(3 + row, 40 + 5 * row)) for row in range(len(LENGTHS))]
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 96, "gpu_memory": "2GiB", "page_size": 4}
VARIANTS = {
    "streamed": {"resident": "none", "poison": True},
    "half streamed": {"resident": 0.5, "poison": True},
    "eager": {"resident": "all", "enforce_eager": True},
    "streamed, eager": {"resident": "none", "poison": True, "enforce_eager": True},
}
HUNDREDS = 210


def logits_of(checkpoint: str, lengths: tuple[int, ...], **options) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Of every pass's sampled rows, on this rank, and all tokens."""
    passes = []
    with LLM(checkpoint, **OPTIONS | options) as llm:
        executor = llm.rank.worker.executor
        plain_submit = executor.submit

        def submit(batch) -> None:
            plain_submit(batch)
            passes.append(executor.arena.cut(1, batch.num_sampled)["logits"].to("cpu", copy=True))

        executor.submit = submit
        params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[: len(lengths)], params)]
        check_what_ran(executor, options)
        copied = executor.counters.copied_bytes.total()
        assert (copied > 0) == (options["resident"] != "all"), "what was to stream did not, or the other way round"
    return passes, tokens


def check_what_ran(executor, options: dict) -> None:
    """Graphs were replayed, or were not, as asked; sums over ranks took the fused kernel, in graphs and without."""
    if executor.decode is None:
        return  # a CPU, to try this file
    graphs = executor.decode.graphs
    assert bool(graphs and graphs.passes) != options.get("enforce_eager", False)
    if executor.context.collectives.size > 1:
        assert reduce_residual_norm.calls["triton"] > 0


def compare(checkpoint: str, dtype: str, lengths: tuple[int, ...], variants: tuple[str, ...]) -> dict:
    """Which of these variants have the resident run's bits, in every pass; and its tokens."""
    passes, tokens = logits_of(checkpoint, lengths, dtype=dtype, resident="all")
    same = {}
    for name in variants:
        others, _ = logits_of(checkpoint, lengths, dtype=dtype, **VARIANTS[name])
        same[name] = len(passes) == len(others) and all(torch.equal(a, b) for a, b in zip(passes, others))
    return {"same": same, "tokens": tokens, "num_passes": len(passes)}


def main() -> None:
    """argv: a folder with a checkpoint in each subfolder, and where each rank leaves its report. Several ranks compare
    fewer variants, and bf16 in the first family only: each of their engines takes a second to start."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    several = int(os.environ["WORLD_SIZE"]) > 1
    variants = ("streamed", "eager") if several else tuple(VARIANTS)
    report = {}
    for place, checkpoint in enumerate(sorted(folder.iterdir())):
        for dtype in ("float32", "bfloat16")[: 1 if several and place else 2]:
            report[f"{checkpoint.name} {dtype}"] = compare(str(checkpoint), dtype, LENGTHS, variants)
    report["hundreds"] = compare(str(min(folder.iterdir())), "bfloat16", (HUNDREDS,), ("streamed",))
    (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    sys.exit(run_rank(main))
