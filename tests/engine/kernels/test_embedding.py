"""The gather of embedding rows: the Triton kernel (interpreted where there is no GPU) against the reference."""

import pytest
import torch
from penstock.engine.kernels import embedding

from tests.support.kernel_proof import (
    DEVICE,
    DTYPES,
    adversarial,
    counted,
    equal,
    poisoned,
    prove,
    prove_faster,
    prove_refusal,
    same_bits,
)

KERNEL = embedding._embed_rows_triton


def inputs_of(table, tokens):
    tokens = torch.tensor(tokens, device=DEVICE)
    out = poisoned((len(tokens), table.shape[1]), table.dtype)
    return {"table": table.to(DEVICE), "tokens": tokens, "out": out}


def gather(table, tokens, first):
    inputs = inputs_of(table, tokens)
    KERNEL(**inputs, first=first)
    return inputs["out"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 96, 1500])
def test_kernel_is_the_reference_bitwise(dtype, width):
    """Rows of other ranks, before and behind this one's, come out as zeros; every element is written."""
    inputs = inputs_of(adversarial(50, width, dtype), [0, 7, 8, 30, 57, 58, 99, 30])
    kernel, reference = (
        lambda table, tokens, out, run=run: run(table, tokens, 8, out)
        for run in (KERNEL, embedding.embed_rows_reference)
    )
    prove(kernel, reference, inputs, ("out",), equal)
    kernel(**inputs)
    assert same_bits(inputs["out"][3], inputs["table"][22])
    assert not inputs["out"][[0, 1, 5, 6]].any()


def test_ranks_complete_each_other():
    table, tokens = torch.randn(64, 8), [0, 31, 32, 63]
    parts = [gather(table[start : start + 32], tokens, start) for start in (0, 32)]
    assert torch.equal(sum(parts).cpu(), table[tokens])


def test_strides_that_are_not_rows_are_refused():
    inputs = inputs_of(torch.randn(6, 8), [1, 5])
    prove_refusal(lambda **tensors: KERNEL(**tensors, first=0), inputs)


def test_calls_are_counted_by_kind():
    inputs = inputs_of(torch.randn(4, 4), [1])
    with counted(embedding.calls, triton=1):
        KERNEL(**inputs, first=0)
    with counted(embedding.calls, reference=1):  # the table is on the device
        embedding.embed_rows(**inputs, first=0)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 32])
def test_kernel_is_faster(num_tokens):
    """It gathers rows of 8 KiB; plain torch gathers them from the same table, which is on the device here."""
    table = torch.randn(128256, 4096, dtype=torch.bfloat16, device="cuda")
    tokens, out = torch.arange(num_tokens, device="cuda") * 4001, table.new_empty(num_tokens, 4096)
    runs = [lambda run=run: run(table, tokens, 0, out) for run in (KERNEL, embedding.embed_rows_reference)]
    prove_faster(*runs, 2 * out.nbytes, f"embedding {num_tokens}")
