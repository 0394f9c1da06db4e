"""One rank of test_kernel_ranks.py: the engine with its kernels that sum over ranks, and with what they replace.

Without the fused kernel a pass sums and then norms; without the pushed sum it goes the way of larger ones.
"""

import sys

import pytest
from penstock.engine.llm import LLM
from penstock.parallel import symmetric
from penstock.parallel.launch import run_rank
from torch import Tensor

from tests.support.engine_proof import PROMPT, Run, apart, first_difference, prove_calls, watched
from tests.support.kernel_registry import DRAWN, GREEDY

OPTIONS = {"resident": "all", "max_num_seqs": 1, "max_num_batched_tokens": 16, "gpu_memory": "2GiB"}
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


def main() -> None:
    """argv: a checkpoint. Whatever does not hold is raised."""
    for dtype in ("float32", "bfloat16"):
        plain = generate(sys.argv[1], dtype)
        prove_calls(plain, (*KERNELS, "residual_norm"))
        for name in KERNELS:
            other = generate(sys.argv[1], dtype, name)
            assert other.made[name]["triton"] == 0
            assert first_difference(plain, other, apart(plain, dtype)) is None
            assert dtype == "bfloat16" or plain.tokens == other.tokens
        prove_calls(generate(sys.argv[1], dtype, eager=False), KERNELS)


if __name__ == "__main__":
    sys.exit(run_rank(main))
