"""Activations, gated and alone: the kernel against the reference and float64."""

import functools
import math

import pytest
import torch
from penstock.engine.kernels import gated_activation as module
from penstock.engine.kernels.gated_activation import ACTIVATIONS, gated_activation, gated_activation_reference
from penstock.engine.model import config_fields
from transformers.activations import ACT2FN

from tests.support.kernel_proof import (
    DEVICE,
    DTYPES,
    adversarial,
    counted,
    equal,
    prove,
    prove_faster,
    prove_refusal,
    within,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of exp, in the interpreter
KERNEL = module._gated_activation_triton
EXACT = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
}
PYTHON = ("gelu_new", "gelu_fast")  # rounded after every operation, so that a last bit of tanh may grow


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_kernel_is_the_reference(kind, gated):
    for dtype in DTYPES:
        ffn = adversarial(3, 40, dtype)
        fp32 = dtype == torch.float32
        near = within(16, scale=0.1) if fp32 else within(4 if kind in PYTHON else 1, scale=0.1)
        kernel, reference = (
            functools.partial(run, kind=kind, gated=gated) for run in (KERNEL, gated_activation_reference)
        )
        prove(kernel, reference, {"ffn": ffn}, ("ffn",), equal if kind == "relu" else near)


@pytest.mark.tolerance
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_roundings_are_those_of_transformers(kind):
    """Almost all of many values have the same bits; if a rounding were missing or added, they would not."""
    for dtype, share in ((torch.bfloat16, 0.002 if kind in PYTHON else 0.01), (torch.float16, 0.02)):
        ffn = (2 * torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)
        expected = ffn.clone()
        KERNEL(ffn, kind, True)
        gated_activation_reference(expected, kind, True)
        within(math.inf, share)(ffn[:, :2048], expected[:, :2048])


@pytest.mark.tolerance
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_kernel_is_as_near_to_float64_as_the_reference(kind, dtype):
    """Rows are of all kinds, and values of every size, with the ends of the activations."""
    ends = torch.tensor([1e-3, -1e-3, 88.0, -88.0, 104.0, -104.0, 2e3])
    sizes = torch.cat([torch.linspace(-30, 30, 500), ends])[None].to(DEVICE, dtype)
    inner = torch.finfo(dtype if kind in PYTHON else torch.float32).eps  # of 1 + tanh, times x
    for values in (adversarial(8, 24, dtype), sizes):
        kernel, reference = values.clone(), values.clone()
        KERNEL(kernel, kind, False)
        gated_activation_reference(reference, kind, False)
        exact = EXACT.get(kind, EXACT["tanh"])(values.double())
        known = exact.isfinite()
        error, allowed = ((result.double() - exact)[known].abs() for result in (kernel, reference))
        assert torch.equal(kernel.isnan(), reference.isnan())
        assert (
            error <= 1.5 * allowed + torch.finfo(dtype).eps * exact[known].abs() + inner * values[known].abs()
        ).all()


@pytest.mark.tolerance
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_reference_is_transformers(kind):
    x = torch.randn(4, 32).bfloat16()
    equal(ACTIVATIONS[kind](x), ACT2FN[kind](x))


def test_rows_wider_than_a_program(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    ffn = torch.randn(2, 100, device=DEVICE)
    expected = ffn.clone()
    gated_activation_reference(expected, "relu", True)
    KERNEL(ffn, "relu", True)
    equal(ffn, expected)


def test_strides_that_are_not_rows_are_refused():
    prove_refusal(lambda ffn: KERNEL(ffn, "silu", True), {"ffn": torch.randn(2, 8, device=DEVICE)})


def test_calls_are_counted_by_kind():
    ffn = torch.randn(2, 8, device=DEVICE)
    with counted(module.calls, triton=1):
        KERNEL(ffn, "silu", True)
    with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        gated_activation(ffn, "silu", True)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 2048])
@pytest.mark.parametrize("kind", ["silu", "gelu_pytorch_tanh"])
def test_kernel_is_faster(kind, num_tokens):
    ffn = torch.randn(num_tokens, 2 * 14336, dtype=torch.bfloat16, device="cuda")
    nbytes = ffn.numel() * ffn.element_size() * 3 // 2
    label = f"gated_activation {kind} {num_tokens}"
    prove_faster(lambda: KERNEL(ffn, kind, True), lambda: gated_activation_reference(ffn, kind, True), nbytes, label)


def test_every_activation_that_a_config_may_name_is_here():
    """The name swish is read as silu."""
    assert set(config_fields.ACTIVATIONS) - {"swish"} == set(ACTIVATIONS)
