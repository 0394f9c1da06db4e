"""Dequantisation: kernel and reference give the gguf package's bits, for every type, dtype and number of blocks."""

import pytest
import torch
from penstock.engine.kernels import dequantise as module
from penstock.engine.kernels.block_values import GROUPS
from penstock.engine.kernels.dequantise import _dequantise_triton, dequantise, dequantise_reference
from penstock.engine.kernels.ggml_types import BY_NAME

from tests.support.ggml_blocks import QUANTISED, oracle, random_blocks, stored
from tests.support.kernel_proof import (
    CONTIGUOUS,
    DEVICE,
    DTYPES,
    Layout,
    counted,
    poisoned,
    prove,
    prove_faster,
    prove_refusal,
    same_bits,
)


def test_every_quantised_type_has_a_formula():
    assert set(GROUPS) == set(QUANTISED)


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_bits_are_those_of_the_gguf_package(kind):
    """300 blocks of any bits: more than a program handles, and no multiple of it."""
    blocks = random_blocks(kind, 300)
    expected, data = oracle(kind, blocks).to(DEVICE), stored(kind, blocks).to(DEVICE)
    for dtype in DTYPES:
        for run, name in ((_dequantise_triton, "triton"), (dequantise_reference, "reference")):
            memory = poisoned((expected.numel() + 16,), dtype)
            out = memory[: expected.numel()].view(expected.shape)
            with counted(module.calls, **{name: 1}):
                run(kind, data, out)
            assert same_bits(out, expected.to(dtype)), (dtype, name)
            assert memory[expected.numel() :].isnan().all()


def tensors_of(kind, num_blocks=40, dtype=torch.float32):
    data = stored(kind, random_blocks(kind, num_blocks, scale=0.1)).to(DEVICE)
    return {"data": data, "out": poisoned((num_blocks, BY_NAME[kind].block), dtype)}


def agree(actual, expected):
    assert same_bits(actual, expected)


def test_in_every_layout_that_is_allowed():
    """Tries blocks and results without gaps; nothing around the result is written."""
    layouts = (CONTIGUOUS, Layout("viewed", before=64))
    kernel, reference = (
        lambda data, out, run=run: run("Q6_K", data, out) for run in (_dequantise_triton, dequantise_reference)
    )
    prove(kernel, reference, tensors_of("Q6_K"), ("out",), agree, layouts, names=("data", "out"))


def test_what_does_not_fit_is_refused():
    prove_refusal(lambda data, out: dequantise("Q4_K", data, out), tensors_of("Q4_K"), "data", "out")
    data = torch.zeros(2, BY_NAME["Q4_K"].nbytes, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="sizes"):
        dequantise("Q4_K", data, torch.empty(256))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", QUANTISED)
def test_the_kernel_is_faster_than_plain_torch(kind):
    tensors = tensors_of(kind, 4096 * 4096 // BY_NAME[kind].block, torch.bfloat16)
    ours, theirs = (lambda run=run: run(kind, **tensors) for run in (_dequantise_triton, dequantise_reference))
    prove_faster(ours, theirs, tensors["data"].nbytes + tensors["out"].nbytes, f"dequantise, {kind}")
