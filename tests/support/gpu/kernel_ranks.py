"""One rank of test_kernel_ranks.py: the engine with its kernels that sum over ranks, and with what they replace.

Without the fused kernel a pass sums and then norms; without the pushed sum it goes the way of larger ones.
"""

import os
import sys
import time

import pytest
from penstock.engine.llm import LLM
from penstock.parallel import symmetric
from penstock.parallel.launch import run_rank
from torch import Tensor

from tests.support.engine_proof import PROMPT, Run, apart, first_difference, prove_calls, watched
from tests.support.kernel_registry import DRAWN, GREEDY

OPTIONS = {"resident": "all", "max_num_seqs": 1, "max_num_batched_tokens": 16, "gpu_memory": "2GiB"}
OPTIONS |= {"capture": "lazy"}  # of all graphs one is used, and the kernels of the others would be compiled too
KERNELS = ("push_reduce", "reduce_residual_norm")


def generate(checkpoint: str, dtype: str, replaced: str | None = None, eager: bool = True) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        if replaced == "push_reduce":
            patch.setattr(symmetric, "fits", _never)
        if replaced == "reduce_residual_norm":
            patch.setattr(symmetric, "fits_rows", _never)
        with LLM(checkpoint, dtype=dtype, enforce_eager=eager, **OPTIONS) as llm:
            assert llm.engine.worker.executor.model.collectives.size > 1
            return watched(llm, PROMPT, DRAWN if eager else GREEDY, states=eager)


def _never(tensor: Tensor) -> bool:
    return False


def say(what: str) -> None:
    """Says what begins now, and the seconds of this process: compiling takes most of them."""
    if os.environ["RANK"] == "0":
        print(f"{time.process_time():7.1f} s  {what}", flush=True)


def main() -> None:
    """argv: a checkpoint. Whatever does not hold is raised."""
    for dtype in ("float32", "bfloat16"):
        say(f"{dtype}: all kernels, eager")
        plain = generate(sys.argv[1], dtype)
        prove_calls(plain, (*KERNELS, "residual_norm"))
        for name in KERNELS:
            say(f"{dtype}: without {name}, eager")
            other = generate(sys.argv[1], dtype, name)
            assert other.made[name]["triton"] == 0
            assert first_difference(plain, other, apart(plain, dtype)) is None
            assert dtype == "bfloat16" or plain.tokens == other.tokens
        say(f"{dtype}: all kernels, in graphs")
        prove_calls(generate(sys.argv[1], dtype, eager=False), KERNELS)
    say("done")


if __name__ == "__main__":
    sys.exit(run_rank(main))
