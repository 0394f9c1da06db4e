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
from penstock.engine.runtime import pass_runner
from penstock.engine.runtime.pass_runner import PassRunner
from penstock.parallel.push_reduce import MOST_BYTES, push_reduce
from penstock.parallel.triton_door import compiled_ahead
from penstock.parallel.two_step_reduce import two_step_reduce
from penstock.scheduler.batching.batch import NO_TOKEN, Batch, BatchRow, PromptScores
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
# rows (start, number of tokens) of passes that run eagerly, those of few tokens where they score, in fp32, or where
# weights stream; and how many sample
EAGER = (
    *(([(0, num_tokens)], 1) for num_tokens in (2, 3, 4, 5, 12, 33, 64, 65, 200)),
    ([(0, 50)], 0),
    ([(30, 50), (0, 9)], 1),
    ([(40, 1), (77, 1), (0, 20)], 3),
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
        patch.setattr(pass_runner, "takes_padding", lambda dtype, device: dtype != torch.float32)
        patch.setattr(Segments, "count", lambda self, lengths, num_rows: self.most(num_rows))  # rows that are cut
        hold_for_any_pass(checkpoints[0], checkpoints[2], launched, patch)
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


def hold_for_any_pass(plain: str, stored: str, launched: set[JITFunction], patch: pytest.MonkeyPatch) -> None:
    """Runs passes that are no graphs of a checkpoint of plain and one of stored weights. In fp32 prompts have no
    kernel."""
    attend = KERNELS["prompt_attention"]
    many, odd, few = (40, 4096), (13, 3000), (4, 4096)  # odd: buckets have blocks at no multiple of 16 bytes
    for case in (
        *((most, plain, resident, "bfloat16") for most in (many, odd) for resident in ("all", "none")),
        *((most, stored, "none", "bfloat16") for most in (many, few)),
        (few, stored, "none", "float32"),
    ):
        attend.put_in(patch, attend.reference if case[-1] == "float32" else attend.kernel)
        with compiled_ahead(os.cpu_count()):
            hold_for_passes_of(*case, launched)
        for kernel in launched:
            kernel.device_caches.clear()
    attend.put_in(patch, attend.kernel)


def hold_for_passes_of(
    most: tuple[int, int], checkpoint: str, resident: str, dtype: str, launched: set[JITFunction]
) -> None:
    """Runs passes of up to so many rows and tokens that are no graphs. Raises AssertionError if they launch what was
    not compiled at start: it would be compiled in front of waiting rows."""
    sizes = {"max_num_seqs": most[0], "max_num_batched_tokens": most[1], "num_pages": 400, "dtype": dtype}
    with LLM(checkpoint, **OPTIONS | sizes | {"resident": resident}) as llm, torch.inference_mode():
        runner = llm.engine.worker.runner
        runner.executor.fill_ring()
        for size, asked in runner.warmed:
            runner._warm_up(runner._bucket(size), asked)
        for batch in runner.eager_prompts:
            runner._warm_up_eager(batch)
        before, case = variants(launched), (checkpoint, resident, dtype, most)
        for rows, num_sampled in (case for case in EAGER if len(case[0]) <= most[0]):
            for num_scored in (0, 3, 40):
                run_eagerly(runner, make_batch(rows, num_sampled, num_scored, llm.config.page_size))
                new = variants(launched) - before
                assert not new, f"{case}, rows {rows}, {num_scored} scored: compiled in front of rows: {new}"


def make_batch(rows: list[tuple[int, int]], num_sampled: int, num_scored: int, page_size: int) -> Batch:
    """A batch of rows, each (start, number of tokens), of which the first ones sample; the last of them is scored
    behind so many of its last tokens."""
    batch_rows = []
    for index, (start, num_tokens) in enumerate(rows):
        samples, scores = index < num_sampled, None
        if num_scored and index == len(rows) - 1:
            scores = PromptScores(2, max(0, num_tokens - num_scored - samples), NO_TOKEN if samples else 7)
        pages = (1,) * pages_for(start + num_tokens, page_size)
        batch_rows.append(BatchRow(index, (7,) * num_tokens, start, pages, samples, None, scores=scores))
    return Batch.of(batch_rows)


def run_eagerly(runner: PassRunner, batch: Batch) -> None:
    """Runs a pass as it is, or padded, if that is no graph."""
    size = runner.sizes.find(batch)
    if size is None:
        inputs = runner.binder.bind(batch)
    elif runner._captures_prompts:
        return
    else:
        bucket = runner._bucket(size)
        bucket.load(batch)
        bucket.derive()
        inputs = bucket.inputs
    for asked in (Asked(), EVERYTHING):
        runner.executor.run(inputs, asked, lambda output: None)


def variants(kernels: set[JITFunction]) -> set[tuple[str, str]]:
    return {(each.__name__, key) for each in kernels for cached, *_ in each.device_caches.values() for key in cached}


if __name__ == "__main__":
    main(sys.argv[1:])
