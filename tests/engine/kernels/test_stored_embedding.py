"""The gather of rows of a quantised embedding: kernel and reference give the gguf package's bits."""

import functools

import pytest
import torch
from penstock.engine.kernels import stored_embedding as module
from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.kernels.embedding import embed_rows
from penstock.engine.kernels.ggml_types import BY_NAME

from tests.support.ggml_blocks import QUANTISED, oracle, random_blocks, stored
from tests.support.kernel_proof import (
    DEVICE,
    DTYPES,
    counted,
    equal,
    poisoned,
    prove,
    prove_faster,
    prove_refusal,
    same_bits,
)

KERNEL, REFERENCE = module._embed_stored_rows_triton, module.embed_stored_rows_reference
TOKENS = [0, 7, 8, 11, 13, 14, 99, 11]  # of this rank, rows 8 to 13


def inputs_of(kind, num_rows=6, width=1280, dtype=torch.float32):
    """A table of more than one program a row, and no multiple of it."""
    blocks = random_blocks(kind, num_rows * width // BY_NAME[kind].block, scale=0.1)
    table = stored(kind, blocks).view(num_rows, -1).to(DEVICE)
    tokens = torch.tensor(TOKENS, device=DEVICE)
    return {"table": table, "tokens": tokens, "out": poisoned((len(TOKENS), width), dtype)}, oracle(kind, blocks)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_the_packages_bitwise(kind, dtype):
    for run, name in ((KERNEL, "triton"), (REFERENCE, "reference")):
        inputs, floats = inputs_of(kind, dtype=dtype)
        with counted(module.calls, **{name: 1}):
            run(kind, inputs["table"], inputs["tokens"], 8, inputs["out"])
        expected = floats.view(6, -1).to(DEVICE, dtype)
        assert same_bits(inputs["out"][[2, 3, 4, 7]], expected[[0, 3, 5, 3]]), name
        assert not inputs["out"][[0, 1, 5, 6]].any()


def test_in_every_layout():
    kernel, reference = (
        lambda table, tokens, out, run=run: run("Q4_K", table, tokens, 8, out) for run in (KERNEL, REFERENCE)
    )
    prove(kernel, reference, inputs_of("Q4_K")[0], ("out",), equal)
    prove_refusal(kernel, inputs_of("Q4_K")[0], "out")


@pytest.mark.gpu
def test_the_kernel_is_faster_than_floats_first():
    """As if the whole table were dequantised, and rows gathered from it."""
    inputs, _ = inputs_of("Q8_0", num_rows=128256, width=4096, dtype=torch.bfloat16)
    table, tokens, out = inputs.values()
    floats = torch.empty(128256, 4096, dtype=torch.bfloat16, device=DEVICE)

    def whole():
        dequantise("Q8_0", table, floats)
        embed_rows(floats, tokens, 8, out)

    prove_faster(functools.partial(KERNEL, "Q8_0", table, tokens, 8, out), whole, out.nbytes, "stored embedding")
