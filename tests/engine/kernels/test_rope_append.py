"""Norms, rotation and KV append: the kernel against the reference, float64, and the steps it replaces."""

import functools

import pytest
import torch
from penstock.engine.kernels import rope_append as module
from penstock.engine.kernels.rope_append import rope_append, rope_append_reference

from tests.support.kernel_proof import (
    DEVICE,
    DTYPES,
    PERMUTED,
    adversarial,
    counted,
    equal,
    poisoned,
    prove,
    prove_faster,
    prove_refusal,
    within,
)
from tests.support.rounding import norm_ulps

KERNEL = module._rope_append_triton
ADDRESSES = [9, 4, 3, 11, 0, 7, 8, 2]  # in no order
SHAPES = {  # H, K, E, F, norms
    "grouped": (4, 2, 16, 8, False),
    "partial": (2, 2, 20, 5, False),
    "normed": (3, 1, 16, 8, True),
    "normed partial": (5, 1, 24, 4, True),
    "more heads than a program takes": (17, 1, 64, 32, False),
}


def inputs_of(shape, dtype, num_tokens=3):
    """Makes tensors, and the sizes that go with them."""
    heads, kv_heads, dim, pairs, norms = SHAPES[shape]
    angles = torch.rand(12, pairs, generator=torch.Generator().manual_seed(1)) * 100
    tensors = {
        "attn": adversarial(num_tokens, (heads + 2 * kv_heads) * dim, dtype),
        "table": torch.stack([angles.cos(), angles.sin()]).to(DEVICE, dtype),
        "positions": (torch.arange(num_tokens, device=DEVICE) * 5 + 3) % 12,
        "addresses": torch.tensor(ADDRESSES[:num_tokens], device=DEVICE),
        "keys": poisoned((12, kv_heads, dim), dtype),
        "values": poisoned((12, kv_heads, dim), dtype),
    }
    if norms:
        tensors |= {name: torch.rand(dim, device=DEVICE).to(dtype) + 0.5 for name in ("q_norm", "k_norm")}
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "eps": 1e-6}
    return tensors, sizes | ({} if norms else {"q_norm": None, "k_norm": None})


def exact(
    attn, table, positions, addresses, keys, values, num_heads, num_kv_heads, q_norm, k_norm, eps, appends_rotated=True
):
    """Computes the result by the formula, a token and a head at a time."""
    dim, pairs = keys.shape[2], table.shape[2]
    for token, row in enumerate(attn.view(len(attn), -1, dim)):
        cos, sin = table[0, positions[token]], table[1, positions[token]]
        for index, head in enumerate(row[: num_heads + num_kv_heads]):
            weight = q_norm if index < num_heads else k_norm
            if weight is not None:
                head *= weight / (head.square().mean() + eps).sqrt()
            if index >= num_heads and not appends_rotated:
                keys[addresses[token], index - num_heads] = head
            turned = torch.complex(head[:pairs], head[pairs : 2 * pairs]) * torch.complex(cos, sin)
            head[:pairs], head[pairs : 2 * pairs] = turned.real, turned.imag
        if appends_rotated:
            keys[addresses[token]] = row[num_heads : num_heads + num_kv_heads]
        values[addresses[token]] = row[num_heads + num_kv_heads :]


@pytest.mark.tolerance
@pytest.mark.parametrize("appends_rotated", [True, False], ids=["rotated", "as it was"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_reference(shape, dtype, appends_rotated):
    """Bits are the same without norms; with norms, squares are added in another order."""
    tensors, sizes = inputs_of(shape, dtype)
    sizes["appends_rotated"] = appends_rotated
    fp32, (_, _, dim, _, norms) = dtype == torch.float32, SHAPES[shape]
    near = within(norm_ulps(dim), scale=1.0) if fp32 else within(2, share=0.1, scale=1.0)
    agree = near if norms else equal
    kernel, reference = (functools.partial(run, **sizes) for run in (KERNEL, rope_append_reference))
    prove(kernel, reference, tensors, ("attn", "keys", "values"), agree)
    prove(kernel, reference, tensors, ("attn", "keys", "values"), agree, [PERMUTED], ("table", "keys", "values"))


@pytest.mark.tolerance
@pytest.mark.parametrize("appends_rotated", [True, False], ids=["rotated", "as it was"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_near_float64(shape, dtype, appends_rotated):
    """Rows are of all kinds. The error is four roundings of values up to the head's largest."""
    tensors, sizes = inputs_of(shape, dtype, num_tokens=8)
    sizes["appends_rotated"] = appends_rotated
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    exact(**wide, **sizes)
    KERNEL(**tensors, **sizes)
    _, _, dim, _, norms = SHAPES[shape]
    ulps = norm_ulps(dim) if norms and dtype == torch.float32 else 3
    for name in ("attn", "keys", "values"):
        within(ulps, scale=1.0)(tensors[name], wide[name])


def test_strides_that_are_not_rows_are_refused():
    tensors, sizes = inputs_of("normed", torch.float32)
    prove_refusal(functools.partial(KERNEL, **sizes), tensors)


def test_calls_are_counted_by_kind():
    tensors, sizes = inputs_of("grouped", torch.float32)
    with counted(module.calls, triton=1):
        KERNEL(**tensors, **sizes)
    with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        rope_append(**tensors, **sizes)


def test_keys_rotated_later_are_the_rotated_ones():
    """Keys that are appended unrotated and then rotated by their positions have the bits of keys appended rotated."""
    tensors, sizes = inputs_of("normed partial", torch.bfloat16)
    later = {name: tensor.clone() for name, tensor in tensors.items()}
    rope_append(**tensors, **sizes)
    rope_append(**later, **sizes, appends_rotated=False)
    addresses, table = tensors["addresses"], tensors["table"]
    keys = later["keys"][addresses]
    assert not torch.equal(keys, tensors["keys"][addresses])
    module.rotate_(keys, *table[:, tensors["positions"]])
    equal(keys, tensors["keys"][addresses])
    equal(later["attn"], tensors["attn"])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 2048])
def test_kernel_is_faster(num_tokens):
    """Heads are those of Llama-3-8B, with the norms of Qwen3."""
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    attn, norm = torch.randn(num_tokens, 48 * 128, **bf16), torch.ones(128, **bf16)
    table, cache = torch.rand(2, 4096, 64, **bf16), torch.zeros(2, 4096, 8, 128, **bf16)
    addresses = torch.randperm(4096, device="cuda")[:num_tokens]
    rest = (attn, table, addresses, addresses, *cache, 32, 8, norm, norm, 1e-6)
    nbytes = 2 * attn.numel() * attn.element_size()
    prove_faster(lambda: KERNEL(*rest), lambda: rope_append_reference(*rest), nbytes, f"rope_append {num_tokens}")
