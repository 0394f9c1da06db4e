"""Runs tiny GGUF models on the real engine and keeps tokens and logits: in this process, or on the ranks of one launch,
each with

    -m tests.support.gguf_runs FOLDER CASE_ID...
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from penstock.engine.llm import LLM
from penstock.scheduler.batching.request import SamplingParams
from safetensors.torch import save_file
from torch import Tensor

from tests.support.forked_ranks import fork_ranks
from tests.support.oracle.cases import MAX_NUM_BATCHED_TOKENS, PROMPT_LENGTHS, prompts
from tests.support.oracle.engine_runs import capture_logits

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@dataclass(frozen=True)
class GGUFCase:
    """A run of FOLDER/model.gguf, which is one model's name; `way` is how a CPU computes, or "gpu": as on one."""

    model: str
    tp_size: int
    resident: str | float
    way: str = "gpu"

    @property
    def id(self) -> str:
        return f"{self.model}-tp{self.tp_size}-{self.resident}-{self.way}"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the engine: prompts in chunks of many tokens, then passes of three, which read stored bits."""
        return {
            "device": "cpu",
            "dtype": "float32",
            "tensor_parallel_size": self.tp_size,
            "resident": self.resident,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
            "max_num_seqs": len(PROMPT_LENGTHS),
            "debug": {"lanes": "random", "poison": True, "as_on_gpu": self.way == "gpu"},
        }


def run_gguf(case: GGUFCase, folder: Path) -> dict[str, Tensor]:
    """Tokens (prompts, n), logits (prompts, n, vocab), and the bytes that were copied and that floats were made of."""
    with LLM(str(folder / f"{case.model}.gguf"), **case.options) as llm:
        logits = capture_logits(llm)
        outputs = llm.generate(prompts(), PARAMS)
        executor = llm.engine.worker.executor
        return {
            "tokens": torch.tensor([output.outputs[0].token_ids for output in outputs]),
            "logits": torch.stack([torch.stack(logits[row]) for row in sorted(logits)]),
            "copied_bytes": torch.tensor(executor.copied.total.sent_bytes),
            "float_bytes": torch.tensor(sum(executor.counters.decompressed_bytes.values())),
        }


def launch_gguf(cases: list[GGUFCase], folder: Path) -> str:
    """Runs all cases, of one tp_size, on one launch of ranks; their results lie in FOLDER then. Returns what it wrote
    to stderr."""
    ids = (case.id for case in cases)
    return fork_ranks(cases[0].tp_size, "-m", __name__, folder, *ids, timeout=240).stderr


def main() -> None:
    folder, *ids = sys.argv[1:]
    for case_id in ids:
        model, tp, resident, way = case_id.rsplit("-", 3)
        kept = resident if resident in ("all", "none") else float(resident)
        result = run_gguf(GGUFCase(model, int(tp.removeprefix("tp")), kept, way), Path(folder))
        if os.environ["RANK"] == "0":
            save_file(result, Path(folder) / f"{case_id}.safetensors")


if __name__ == "__main__":
    main()
