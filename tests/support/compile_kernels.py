"""Compiles every kernel that the engine launches for a Hopper GPU, on a machine that has none, and runs none of them.

    python tests/support/compile_kernels.py CHECKPOINT...

The real engine runs as on a GPU, on CPU tensors, and its kernels are compiled ahead. In the interpreter kernels may do
what Triton's compiler refuses, such as a name whose type changes from one turn of a loop to the next. The engine's
results mean nothing. It prints, in JSON, the names of the kernels that were compiled by module, each with the bytes of
shared memory that its programs take at most.
"""

import itertools
import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)  # triton reads it when it is imported

import pytest
import torch
from penstock.engine.compute.sampler import EVERYTHING, Asked
from penstock.engine.kernels.decode_attention import _attend_segment, _decode_attention_triton
from penstock.engine.kernels.segments import Segments
from penstock.engine.llm import LLM
from penstock.parallel.push_reduce import MOST_BYTES, push_reduce
from penstock.parallel.triton_door import compiled_ahead
from penstock.parallel.two_step_reduce import two_step_reduce
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.pages import pages_for
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.support.emulated_ranks import connect_ranks, connect_sharing_ranks
from tests.support.engine_proof import PROMPT
from tests.support.kernel_registry import ALL, DRAWN, GREEDY, KERNELS
from tests.support.paged_examples import work_of

OPTIONS = {"device": "cpu", "resident": "none", "max_num_seqs": 1, "max_num_batched_tokens": 8, "num_pages": 16}
OPTIONS |= {"debug": {"as_on_gpu": True}}
WAYS = (
    {"dtype": "float32"},
    {"dtype": "bfloat16", "weights_compression": "lossless"},
    {"dtype": "bfloat16", "weights_compression": "none", "attention_sinks": 2, "attention_window": 5, "page_size": 4},
    {"dtype": "float32", "attention_sinks": 2, "attention_window": 200},
)
# rows (start, number of tokens) of passes that are not padded, long ones and one of many prompts; and how many sample
EAGER = (
    ([(0, 250)] * 9, 1),
    ([(0, 250)] * 9, 2),
    ([(40, 1), (77, 1), *[(0, 250)] * 9], 11),
    ([(1, 249)] * 10, 10),
    ([(40, 1), (16, 20), (33, 3), *[(0, 250)] * 9], 12),
    ([(40, 1), (16, 20), *[(0, 230)] * 9], 5),  # whose tables are 15 pages wide
    ([(40, 1)] * 9 + [(128, 120)] * 12 + [(0, 99)] * 9, 30),
    ([(0, 3)] * 33, 33),
)


class Hopper:
    """The driver of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(checkpoints: list[str]) -> None:
    launched, run = set(), JITFunction.run

    def note(self, *arguments, **named):
        launched.add(self)
        return run(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        driver.set_active(Hopper())
        patch.setattr(JITFunction, "run", note)
        patch.setattr(torch, "empty", torch.zeros)  # nothing is ever written, and tokens have to be valid
        patch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
        for kernel in KERNELS.values():
            if kernel.names:
                kernel.put_in(patch, kernel.kernel)
            if hasattr(kernel.module, "options"):
                patch.setattr(kernel.module, "options", lambda device: {"OVERLAPS": True, "launch_pdl": True})
        patch.setattr(Segments, "count", lambda self, lengths, num_rows: self.most(num_rows))  # rows that are cut
        for most, checkpoint, resident in (
            ((40, 4096), checkpoints[0], "all"),
            ((40, 4096), checkpoints[0], "none"),
            ((13, 3000), checkpoints[0], "all"),  # whose buckets have blocks at no multiple of 16 bytes
            ((40, 4096), checkpoints[2], "none"),
        ):
            with compiled_ahead(os.cpu_count()):
                hold_for_any_pass(checkpoint, resident, *most, launched)
            for kernel in launched:
                kernel.device_caches.clear()
        with compiled_ahead(os.cpu_count()):
            launch_all(checkpoints)
            hold_for_any_table()
    compiled = {}
    for kernel in launched:
        (variants, *_), *others = kernel.device_caches.values()
        assert not others and all(isinstance(variant, CompiledKernel) for variant in variants.values())
        most = max(variant.metadata.shared for variant in variants.values())
        compiled.setdefault(kernel.fn.__module__, {})[kernel.fn.__name__] = most
    print(json.dumps(compiled))


def launch_all(checkpoints: list[str]) -> None:
    for checkpoint, options in itertools.product(checkpoints, WAYS):
        ways = {".gguf": WAYS[:2], "neox_parallel": WAYS[:3]}  # these have all of their kernels
        if options not in next((some for end, some in ways.items() if checkpoint.endswith(end)), WAYS):
            continue
        with LLM(checkpoint, enforce_eager=True, **OPTIONS | options) as llm:
            for params in (GREEDY, DRAWN, ALL):
                llm.generate([PROMPT], params)
    for dtype in (torch.float32, torch.bfloat16):  # what one rank never launches
        part = torch.zeros(MOST_BYTES // dtype.itemsize, dtype=dtype)
        push_reduce(connect_ranks(4)[0], part)
        two_step_reduce(connect_sharing_ranks(4, MOST_BYTES)[0], part)


def hold_for_any_table() -> None:
    """Attends through tables of several widths. Raises AssertionError unless one variant serves all: another would be
    compiled in the middle of a job, by the first pass whose longest row makes its table so wide."""
    caches, q = _attend_segment.device_caches, torch.zeros(2, 1, 4, 32)
    keys, lengths = torch.zeros(64, 2, 32), torch.tensor([3, 5], dtype=torch.int32)
    before = None
    for width in (1, 3, 16):
        table = torch.zeros(2, width, dtype=torch.int32)
        _decode_attention_triton(q, keys, keys, table, lengths, q, 1.0, None, 16, work_of(q, lengths, 128))
        variants = set(caches[0][0])
        assert before in (None, variants), f"a table of {width} pages has a variant of its own"
        before = variants


def hold_for_any_pass(
    checkpoint: str, resident: str, most_rows: int, most_tokens: int, launched: set[JITFunction]
) -> None:
    """Binds passes that run eagerly. Raises AssertionError if they launch what was not compiled at start: it would be
    compiled in front of waiting rows."""
    roomy = {"max_num_seqs": most_rows, "max_num_batched_tokens": most_tokens, "num_pages": 400, "dtype": "bfloat16"}
    with LLM(checkpoint, **OPTIONS | roomy | {"resident": resident}) as llm, torch.inference_mode():
        runner = llm.engine.worker.runner
        runner.executor.fill_ring()
        for size, asked in runner.warmed:
            runner._warm_up(runner._bucket(size), asked)
        before = variants(launched)
        for rows, num_sampled in (case for case in EAGER if len(case[0]) <= most_rows):
            tables = [(1,) * pages_for(start + num, llm.config.page_size) for start, num in rows]
            samples = [index < num_sampled for index in range(len(rows))]
            batch = Batch.of(
                BatchRow(index, (7,) * num, start, tables[index], samples[index], None)
                for index, (start, num) in enumerate(rows)
            )
            assert runner.sizes.find(batch) is None, "a pass that is padded"
            for asked in (Asked(), EVERYTHING):
                runner.executor.warm_up(runner.binder.bind(batch), asked)
            assert variants(launched) == before, f"{checkpoint}, {resident}, rows {rows}: compiled in front of rows"


def variants(kernels: set[JITFunction]) -> set[tuple[str, str]]:
    return {(each.__name__, key) for each in kernels for cached, *_ in each.device_caches.values() for key in cached}


if __name__ == "__main__":
    main(sys.argv[1:])
