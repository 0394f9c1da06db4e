"""Residual addition and norm: the kernel against the reference, float64, and its own rows in other batches."""

import functools

import pytest
import torch
from penstock.engine.kernels import residual_norm as module
from penstock.engine.kernels.residual_norm import residual_norm, residual_norm_reference

from tests.support.kernel_proof import (
    DEVICE,
    DTYPES,
    adversarial,
    counted,
    poisoned,
    prove,
    prove_faster,
    prove_refusal,
    same_bits,
    within,
)
from tests.support.norm_oracle import assert_normed
from tests.support.rounding import norm_ulps

KERNEL = module._residual_norm_triton


def inputs_of(kind, dtype, width, num_rows=3, delta=True):
    """Makes tensors, and the arguments that go with them."""
    tensors = {
        "x": adversarial(num_rows, width, dtype),
        "delta": adversarial(num_rows, width, dtype, seed=1),
        "weight": (torch.rand(width, device=DEVICE) + 0.5).to(dtype),
        "bias": torch.randn(width, device=DEVICE).to(dtype),
        "out": poisoned((num_rows, width), dtype),
    }
    absent = ([] if delta else ["delta"]) + ([] if kind == "layer" else ["bias"])
    rest = {"eps": 1e-5, "kind": kind} | dict.fromkeys(absent)
    return {name: t for name, t in tensors.items() if name not in absent}, rest


@pytest.mark.tolerance
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("delta", [True, False], ids=["delta", "alone"])
def test_kernel_is_the_reference(kind, dtype, delta):
    """The sum has the same bits; the norm's sums are added in another order, which may change a last bit."""
    tensors, rest = inputs_of(kind, dtype, 40, delta=delta)
    fp32 = dtype == torch.float32
    near = within(norm_ulps(40) if fp32 else 2, share=1.0 if fp32 else 0.05, scale=1.0 if kind == "layer" else 0.0)
    kernel, reference = (functools.partial(run, **rest) for run in (KERNEL, residual_norm_reference))
    prove(kernel, reference, tensors, ("x", "out"), near)
    added = {name: t.clone() for name, t in tensors.items()}
    kernel(**added)
    assert same_bits(added["x"], tensors["x"] + tensors["delta"] if delta else tensors["x"])


@pytest.mark.tolerance
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [1, 96, 1500])
def test_kernel_is_near_float64(kind, dtype, width):
    """Rows are of all kinds; float64 starts from the rounded sum."""
    tensors, rest = inputs_of(kind, dtype, width, num_rows=8)
    KERNEL(**tensors, **rest)
    bias = tensors.get("bias")
    assert_normed(tensors["out"], tensors["x"], tensors["weight"], bias, rest["eps"], kind)


def test_the_result_may_replace_the_delta():
    tensors, rest = inputs_of("rms", torch.bfloat16, 96)
    apart = {name: t.clone() for name, t in tensors.items()}
    KERNEL(**apart, **rest)
    KERNEL(**tensors | {"out": tensors["delta"]}, **rest)
    assert same_bits(tensors["delta"], apart["out"]) and same_bits(tensors["x"], apart["x"])


def test_a_row_does_not_depend_on_its_batch():
    tensors, rest = inputs_of("rms", torch.float32, 700, num_rows=4)
    single = {name: t[2:3].clone() if t.ndim == 2 else t for name, t in tensors.items()}
    KERNEL(**tensors, **rest)
    KERNEL(**single, **rest)
    assert same_bits(single["out"][0], tensors["out"][2])


def test_what_the_kernel_cannot_take_is_refused():
    tensors, rest = inputs_of("layer", torch.float32, 16)
    prove_refusal(functools.partial(KERNEL, **rest), tensors)
    tensors, rest = inputs_of("rms", torch.bfloat16, 16385, num_rows=1)
    with pytest.raises(ValueError, match="16385"):
        KERNEL(**tensors, **rest)


def test_calls_are_counted_by_kind():
    tensors, rest = inputs_of("rms", torch.float32, 8)
    with counted(module.calls, triton=1):
        KERNEL(**tensors, **rest)
    with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        residual_norm(**tensors, **rest)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 2048])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_kernel_is_faster(kind, num_tokens):
    x, delta, out = torch.randn(3, num_tokens, 4096, dtype=torch.bfloat16, device="cuda")
    bias = x.new_ones(4096) if kind == "layer" else None
    rest = (x, delta, x.new_ones(4096), bias, 1e-5, out, kind)
    nbytes = 4 * x.numel() * x.element_size()
    label = f"residual_norm {kind} {num_tokens}"
    prove_faster(lambda: KERNEL(*rest), lambda: residual_norm_reference(*rest), nbytes, label)
