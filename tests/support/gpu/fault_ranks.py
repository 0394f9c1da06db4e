"""Rank 1 of two fails again and again, and rank 0 makes one engine after another:

    python -m tests.support.gpu.fault_ranks FOLDER [CASE ...]

Each must end by RankFailed, and the process must be able to go on: an engine at the end gives the tokens of one at the
beginning. Leaves FOLDER/report.json: by case what was raised, and the seconds from the failure until then. Without a
GPU nothing is captured, and the first instruction stands for one.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from penstock.parallel import push_reduce, two_step_reduce
from penstock.parallel.failure import RankFailed

from penstock import LLM, SamplingParams
from tests.support import pass_faults

TOKEN_BYTES = 4 * 256  # of a sum: the hidden states of the embedded model in float32
LARGE_TOKENS, NCCL_TOKENS = (way.MOST_BYTES // TOKEN_BYTES + 1 for way in (push_reduce, two_step_reduce))
OPTIONS = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}
OPTIONS |= {"gpu_memory": "4GiB", "capture": "lazy"}
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = [[(first + 7 * index) % 2000 + 1 for index in range(400)] for first in range(NCCL_TOKENS // 400 + 1)]
PROMPTS = [[0, 376, 268], *LONG[:3]]
DO = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "failing alone": "raise KeyError('the shard is bent')",
}
IN_A_PASS = """
import os, signal
passes = []
def begin_pass(batch):
    if batch is not None and rank == 1:
        passes.append(batch)
        if {when}:
            failing()
            {do}
"""
IN_CAPTURE = """
import os, signal, torch
def around(instruction, ctx, run):
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if rank == 1 and ctx is not None and (captured or not torch.cuda.is_available()):
        failing()
        {do}
    run()
"""
TIMES = {  # options, prompts, and when
    "streaming in graphs": ({"resident": "none"}, PROMPTS, IN_A_PASS, "len(passes) == 12"),
    "in capture": ({"resident": "none", "capture": "start"}, PROMPTS, IN_CAPTURE, ""),
    "in large sums": ({"resident": "all"}, PROMPTS, IN_A_PASS, f"batch.num_tokens >= {LARGE_TOKENS}"),
    "in sums of NCCL": (
        {"resident": "all", "max_num_seqs": len(LONG), "max_num_batched_tokens": 400 * len(LONG)},
        LONG,
        IN_A_PASS,
        f"batch.num_tokens >= {NCCL_TOKENS}",
    ),
}
CASES = [f"{how}, {when}" for when in TIMES for how in DO]


def tokens() -> list[list[int]]:
    with LLM("demo", 2, **OPTIONS) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


def fail(case: str, folder: Path) -> dict[str, str | float]:
    """Runs a case; returns what it raises on rank 0, and after how many seconds."""
    how, when = case.split(", ")
    options, prompts, fault, condition = TIMES[when]
    folder.mkdir()
    os.environ |= {pass_faults.FOLDER: str(folder), pass_faults.TEXT: fault.format(do=DO[how], when=condition)}
    try:
        with LLM("demo", 2, **OPTIONS | options | {"debug": {"watch": pass_faults.NAME}}) as llm:
            llm.generate(prompts, PARAMS)
        return {"raised": "", "text": "nothing was raised", "seconds": 0.0}
    except RankFailed as error:
        seconds = time.time() - float((folder / "failed_at").read_text())
        return {"raised": type(error).__name__, "text": str(error).splitlines()[0], "seconds": seconds}


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:] or CASES
    report = {"before": tokens(), "cases": {}}
    for index, case in enumerate(cases):
        report["cases"][case] = found = fail(case, folder / str(index))
        print(f"{case}: {found['raised']} after {found['seconds']:.1f} s: {found['text']}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # nothing is left that never ends
    report["after"] = tokens()
    print(f"the same tokens afterwards: {report['before'] == report['after']}", flush=True)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
