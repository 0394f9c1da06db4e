"""Decompression of weights: the kernel and the reference give the bits that were compressed."""

import pytest
import torch
from penstock.engine.kernels import decompress_weights as module
from penstock.engine.kernels.decompress_weights import (
    TILE,
    Planes,
    decompress_weights,
    decompress_weights_reference,
    natural_order,
    stored_order,
)
from penstock.engine.weights.codec import compress

from tests.support.kernel_proof import (
    CONTIGUOUS,
    DEVICE,
    Layout,
    counted,
    poisoned,
    prove,
    prove_refusal,
    same_bits,
    time_per_call,
)

KERNEL = module._decompress_weights_triton
DENSE = (CONTIGUOUS, Layout("viewed", before=64))
GENERATOR = torch.Generator().manual_seed(0)


def bits(*shape: int) -> torch.Tensor:
    return torch.randint(-0x8000, 0x8000, shape, generator=GENERATOR).short()


def weights_of(kind: str, num_tiles: int = 3) -> torch.Tensor:
    """Weights (num_tiles * TILE,) bf16 that shrink, so that they are not kept raw."""
    values = (torch.randn(num_tiles, TILE, generator=GENERATOR) * 0.02).bfloat16().view(torch.int16)
    if kind == "patched":  # from no patch in a tile to more than a program writes at once
        values[1, ::3] = bits(len(values[1, ::3]))
        values[2, 5] = 0x7FC1
    elif kind == "no escapes":
        values = bits(num_tiles, TILE) & ~0x7F80 | 0x3F80
    elif kind == "escapes only":  # for some lanes, before and after lanes without any
        exponents = torch.arange(TILE) // 8 % 11
        values = (bits(num_tiles, TILE) & ~0x7F80 | (100 + exponents).short() << 7).short()
        values[:, 600:1500] = values[:, 600:1500] & ~0x7F80 | 105 << 7
    elif kind == "ends":  # both ends of the exponents, by turns
        values = bits(num_tiles, TILE) & ~0x7F80 | torch.tensor([0, 250, 3]).short()[:, None] << 7
        values[:, ::5] += 4 << 7
    return values.view(torch.bfloat16).flatten().to(DEVICE)


@pytest.mark.parametrize("kind", ["gaussian", "patched", "no escapes", "escapes only", "ends"])
def test_decompressors_give_the_bits_that_were_compressed(kind):
    weights = weights_of(kind)
    layout, blob = compress(weights)
    assert not layout.raw and (layout.num_escapes == 0) == (kind == "no escapes")
    for run, name in ((KERNEL, "triton"), (decompress_weights_reference, "reference")):
        out = torch.empty_like(weights)
        with counted(module.calls, **{name: 1}):
            run(layout.planes(blob), out)
        assert same_bits(out, weights)


def tensors_of(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    layout, blob = compress(weights)
    return {**layout.planes(blob)._asdict(), "out": poisoned(tuple(weights.shape), torch.bfloat16)}


def by_name(run):
    return lambda out, **planes: run(Planes(**planes), out)


def test_in_every_layout_that_is_allowed():
    """Tries planes and results without gaps that start at 16-byte boundaries; nothing around the result is written."""

    def agree(actual, expected):
        assert same_bits(actual, expected)

    tensors = tensors_of(weights_of("patched"))
    assert all(tensor.numel() for tensor in tensors.values())
    prove(by_name(KERNEL), by_name(decompress_weights_reference), tensors, ("out",), agree, DENSE, tensors)


def test_strides_with_gaps_are_refused():
    tensors = tensors_of(weights_of("patched"))
    prove_refusal(by_name(KERNEL), tensors, *tensors)


def test_planes_that_lie_in_the_middle_of_memory():
    """Decompresses planes that lie as in a group's blob."""
    weights = weights_of("gaussian")
    layout, blob = compress(weights)
    memory = torch.full((len(blob) + 4096,), 0xFF, dtype=torch.uint8, device=DEVICE)
    memory[2048 : 2048 + len(blob)] = blob
    out = torch.empty_like(weights)
    KERNEL(layout.planes(memory[2048 : 2048 + len(blob)]), out)
    assert same_bits(out, weights)


def test_no_tiles():
    layout, blob = compress(weights_of("gaussian"))
    planes = layout.planes(blob)
    none = {name: getattr(planes, name)[:0] for name in ("mantissas", "indices", "windows")}
    none |= {name: getattr(planes, name)[:1] for name in ("escape_starts", "patch_starts")}
    with counted(module.calls):
        decompress_weights(planes._replace(**none), torch.empty(0).bfloat16())


def test_stored_order_is_a_permutation_and_its_inverse_undoes_it():
    tiles = torch.arange(2 * TILE).view(2, TILE)
    low, high = (stored_order((tiles >> shift).byte()).long() for shift in (0, 8))
    stored = high << 8 | low
    assert torch.equal(stored[0].flatten().sort().values, tiles[0])
    assert torch.equal(natural_order(stored), tiles)
    assert stored[0, 1, :4].tolist() == [8, 10, 9, 11] and stored[0, 1, 8] == TILE // 2 + 8


@pytest.mark.gpu
def test_takes_at_most_as_long_as_two_and_a_half_copies():
    """Times against copies of the decompressed weights on the device; on an H200 the bound is 0.8 TB/s of bf16
    written."""
    weights = weights_of("gaussian", 65536)
    layout, blob = compress(weights)
    planes, out = layout.planes(blob), torch.empty_like(weights)
    ours, copy = time_per_call(lambda: KERNEL(planes, out)), time_per_call(lambda: out.copy_(weights))
    print(f"{weights.nbytes / ours * 1e-9:.0f} GB/s of bf16, a copy {weights.nbytes / copy * 1e-9:.0f}")
    assert ours < 2.5 * copy
