"""One rank of test_binding.py: its engine is used while another GPU is the thread's current one, and by another thread.

Whatever does not hold is raised.
"""

import os
import sys
import threading

import torch
from penstock.parallel.launch import run_rank

from penstock import LLM, SamplingParams

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "gpu_memory": "4GiB", "resident": "none", "capture": "lazy"}
PROMPTS = [[5, 17, 3, 99], [7] * 20]
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, seed=3, repetition_penalty=1.2, max_tokens=8, ignore_eos=True)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, DRAWN)]


def in_another_thread(llm: LLM) -> list[list[int]]:
    found: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: found.append(tokens_of(llm)))
    thread.start()
    thread.join()
    return found[0]


def main() -> None:
    on_gpu, other = torch.cuda.is_available(), 1 - int(os.environ["LOCAL_RANK"])
    for enforce_eager in (True, False):
        with LLM("demo", enforce_eager=enforce_eager, **OPTIONS) as llm:
            expected = tokens_of(llm)
            if on_gpu:
                torch.cuda.set_device(other)
            assert tokens_of(llm) == expected and in_another_thread(llm) == expected
            llm.measure()
            assert tokens_of(llm) == expected
            assert not on_gpu or torch.cuda.current_device() == other
        if on_gpu:
            torch.cuda.set_device(1 - other)
        print(f"rank {os.environ['RANK']}, eager {enforce_eager}: the same tokens from elsewhere", flush=True)


if __name__ == "__main__":
    sys.exit(run_rank(main))
