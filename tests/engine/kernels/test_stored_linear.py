"""The linear over a weight as it is stored: kernel and reference against float64 on the gguf package's floats."""

import functools

import pytest
import torch
from penstock.engine.kernels import stored_linear as module
from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.engine.kernels.linear import linear
from penstock.engine.kernels.stored_linear import WORDS, StoredRun, stored_linear
from penstock.engine.model.weight_formats import AS_STORED, MOST_FEW, QUANTISED, format_in

from tests.support.ggml_blocks import oracle, random_blocks, stored
from tests.support.kernel_proof import (
    DEVICE,
    DTYPES,
    adversarial,
    counted,
    poisoned,
    prove,
    prove_faster,
    prove_refusal,
    within,
)

KERNEL, REFERENCE = module._stored_linear_triton, module.stored_linear_reference


def weight_of(kind, num_rows=10, width=1280):
    """Stored rows: no multiple of a program's, and wider than it walks at once."""
    blocks = random_blocks(kind, num_rows * width // BY_NAME[kind].block, scale=0.1)
    return stored(kind, blocks).view(num_rows, -1).to(DEVICE), oracle(kind, blocks).view(num_rows, width).to(DEVICE)


def inputs_of(num_tokens, width=1280, num_rows=10, dtype=torch.float32):
    x = adversarial(num_tokens, width, dtype)
    bias = torch.randn(num_rows).to(DEVICE, dtype)
    return {"x": x, "bias": bias, "out": poisoned((num_tokens, num_rows), dtype)}


def sizes(x, floats):
    """Sums of absolute products: what an error in ulp of fp32 is measured by."""
    return x.double().abs() @ floats.double().abs().t()


def test_what_the_table_says_is_what_the_kernel_reads():
    assert WORDS.keys() == set(QUANTISED) and MOST_FEW == module.MOST_TOKENS
    formats = [format_in(kind, dtype) for kind in QUANTISED for dtype in AS_STORED]
    assert all(1 <= each.few_tokens <= MOST_FEW <= each.as_stored for each in formats)


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 4])
def test_the_sums_are_those_of_the_packages_floats(kind, num_tokens):
    data, floats = weight_of(kind)
    for run, name in ((KERNEL, "triton"), (REFERENCE, "reference")):
        inputs = inputs_of(num_tokens)
        with counted(module.calls, **{name: 1}):
            run(inputs["x"], kind, data, inputs["bias"], inputs["out"])
        exact = inputs["x"].double() @ floats.double().t() + inputs["bias"].double()
        within(16.0, scale=sizes(inputs["x"], floats))(inputs["out"], exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_every_layout(dtype):
    data, floats = weight_of("Q4_0")
    kernel, reference = (lambda x, bias, out, run=run: run(x, "Q4_0", data, bias, out) for run in (KERNEL, REFERENCE))
    for num_tokens in (1, 3):
        inputs = inputs_of(num_tokens, dtype=dtype)
        scale = sizes(inputs["x"], floats) if dtype == torch.float32 else 0.0
        ulps = 8.0 if dtype == torch.float32 else 1.0
        prove(kernel, reference, inputs, ("out",), within(ulps, scale=scale), names=("x", "out"))
    prove_refusal(kernel, inputs, "x", "out")


def test_runs_of_other_formats_make_one_weight():
    """As q, k and v have them; without a bias too."""
    parts = [weight_of(kind, num_rows=n) for kind, n in (("Q4_0", 6), ("Q8_0", 3), ("Q4_1", 5))]
    floats = torch.cat([part for _, part in parts])
    runs = [StoredRun(kind, first, data) for kind, first, (data, _) in zip(("Q4_0", "Q8_0", "Q4_1"), (0, 6, 9), parts)]
    for has_bias in (True, False):
        inputs = inputs_of(2, num_rows=14)
        bias = inputs["bias"] if has_bias else None
        for run in runs:
            stored_linear(inputs["x"], run, bias, inputs["out"])
        exact = inputs["x"].double() @ floats.double().t() + (bias.double() if has_bias else 0.0)
        within(16.0, scale=sizes(inputs["x"], floats))(inputs["out"], exact)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", WORDS)
def test_the_kernel_is_faster_than_floats_first(kind):
    data, _ = weight_of(kind, 4096, 4096)
    inputs = inputs_of(1, 4096, 4096, torch.bfloat16)
    floats = torch.empty(4096, 4096, dtype=torch.bfloat16, device=DEVICE)

    def by_floats():
        dequantise(kind, data, floats)
        linear(inputs["x"], floats, inputs["bias"], inputs["out"])

    ours = functools.partial(KERNEL, inputs["x"], kind, data, inputs["bias"], inputs["out"])
    prove_faster(ours, by_floats, data.nbytes, f"stored linear, {kind}")
