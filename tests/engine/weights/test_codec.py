"""The lossless codec: every bit pattern survives, sizes are what was promised, and parts agree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.engine.kernels import decompress_weights
from penstock.engine.kernels.codec_tile import num_escape_rows
from penstock.engine.kernels.decompress_weights import COMMON, ESCAPED, TILE, WINDOW
from penstock.engine.weights import compress_tiles
from penstock.engine.weights.codec import CompressedLayout, compress, decompress
from penstock.engine.weights.compress_tiles import choose_windows

from tests.support.kernel_proof import DEVICE, same_bits

GENERATOR = torch.Generator().manual_seed(0)
NAN_PAYLOADS = [0x7F81, 0x7FC0, 0x7FFF, -0x7F, -1, -0x40]
SPECIAL = [0, -0x8000, 1, 0x7F, -0x7FFF, 0x80, 0x7F80, -0x80, *NAN_PAYLOADS]  # zeros, subnormals, infinities, NaNs


def bits_per_weight(layout: CompressedLayout) -> float:
    return 8 * layout.nbytes / layout.numel


def from_bits(bits) -> torch.Tensor:
    return torch.as_tensor(bits, device=DEVICE).to(torch.int16).view(torch.bfloat16)


def every_pattern() -> torch.Tensor:
    return from_bits(torch.arange(-0x8000, 0x8000))


def gaussian(*shape: int, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape, generator=GENERATOR) * scale).bfloat16().to(DEVICE)


def student(*shape: int) -> torch.Tensor:
    chi_squared = torch.randn((4, *shape), generator=GENERATOR).square().sum(0)
    return (torch.randn(shape, generator=GENERATOR) * (4 / chi_squared).sqrt() * 0.02).bfloat16().to(DEVICE)


def scaled_rows(*shape: int) -> torch.Tensor:
    return gaussian(*shape) * torch.randn(shape[0], 1, generator=GENERATOR).exp().bfloat16().to(DEVICE)


def assert_parts_agree(layout: CompressedLayout, blob: torch.Tensor) -> None:
    """Asserts that each tile has as many escapes as its indices say, and that the starts stay within the escapes and
    patches."""
    planes = layout.planes(blob)
    indices = planes.indices.view(layout.num_tiles, -1)
    escapes = sum((indices >> shift & 3 == COMMON).sum(1) for shift in (0, 2, 4, 6))
    assert planes.escape_starts[0] == 0 and torch.equal(planes.escape_starts.diff(), escapes.int())
    assert planes.escape_starts[-1] == layout.num_escapes
    assert len(planes.escapes) == num_escape_rows(layout.num_escapes)
    assert planes.patch_starts[0] == 0 and planes.patch_starts[-1] == layout.num_patches == len(planes.patches)
    assert (planes.patch_starts.diff() >= 0).all()


def round_trip(weights: torch.Tensor) -> CompressedLayout:
    layout, blob = compress(weights)
    assert blob.dtype == torch.uint8 and blob.device == weights.device and len(blob) == layout.nbytes
    out = torch.full_like(weights, 7.0)
    decompress(layout, blob, out)
    assert same_bits(out, weights)
    if not layout.raw:
        assert_parts_agree(layout, blob)
    return layout


def sown(weights: torch.Tensor, values: list[int], share: float) -> torch.Tensor:
    """The weights with some of these bits at random indices."""
    bits = weights.view(torch.int16).flatten()
    where = torch.rand(bits.shape, generator=GENERATOR).to(DEVICE) < share
    chosen = torch.randint(len(values), bits.shape, generator=GENERATOR).to(DEVICE)
    return torch.where(where, from_bits(values).view(torch.int16)[chosen], bits).view(torch.bfloat16)


def test_every_pattern_survives_compressed():
    """Puts the patterns among weights that shrink, so that they are compressed and not kept raw."""
    weights = torch.cat([every_pattern(), gaussian(12 * 65536)])
    weights = weights[torch.randperm(len(weights), generator=GENERATOR).to(DEVICE)]
    assert not round_trip(weights).raw


@pytest.mark.parametrize("value", [*SPECIAL, 0x3F80], ids=lambda value: f"{value & 0xFFFF:04x}")
def test_constants(value):
    assert bits_per_weight(round_trip(from_bits([value] * 3 * TILE))) < 10.2


@pytest.mark.parametrize("pair", [(0x0001, 0x7F7F), (-0x8000, 0x7FFF), (0, -1), (0x0080, 0x3F80)], ids=str)
@pytest.mark.parametrize("runs", [1, 3, 16, 1024, TILE])
def test_alternating_extremes(pair, runs):
    round_trip(from_bits([value for value in pair for _ in range(runs)]).repeat(-(-4 * TILE // runs))[: 4 * TILE + 5])


@pytest.mark.parametrize("share", [0.001, 0.05, 0.15])
def test_special_values_among_weights(share):
    assert not round_trip(sown(gaussian(5 * TILE), SPECIAL, share)).raw


def count(exponents: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.bincount(tile, minlength=256) for tile in exponents]).int()


def test_every_window():
    """Tries windows at both ends of the exponents and between, with every position of the common exponents in them."""
    first, below = (grid.flatten() for grid in torch.meshgrid(torch.arange(0, 246, 7), torch.arange(9), indexing="ij"))
    exponents = torch.arange(WINDOW).repeat(TILE)[:TILE].expand(len(first), -1)
    exponents = torch.where(torch.arange(TILE) < TILE // 2, below[:, None] + torch.arange(TILE) % 3, exponents)
    tiles = from_bits(((first[:, None] + exponents) << 7 | 5).short())
    found = choose_windows(count(tiles.view(torch.int16) >> 7 & 0xFF))
    assert torch.equal(found[0].cpu().long(), first) and torch.equal(found[1].cpu().long(), below)
    layout = round_trip(tiles)
    assert layout.num_patches == 0 and layout.num_escapes > 0


def test_the_window_is_the_cheapest():
    """Compares with a search through all windows, on tiles with several hills of exponents."""
    hills = torch.randint(0, 246, (6, 3, 1), generator=GENERATOR)
    values = hills + (torch.randn(6, 3, TILE, generator=GENERATOR) * 4).long().abs()
    exponents = values.gather(1, torch.randint(3, (6, 1, TILE), generator=GENERATOR))[:, 0].clamp(0, 255)
    for tile, first, below in zip(exponents, *choose_windows(count(exponents))):
        counts = torch.bincount(tile, minlength=256)

        def cost(first: int, below: int, counts: torch.Tensor = counts) -> int:
            inside = int(counts[first : first + WINDOW].sum())
            common = int(counts[first + below : first + below + COMMON].sum())
            return 3 * (inside - common) + 24 * (TILE - inside)

        best = min(cost(f, b) for f in range(256 - WINDOW + 1) for b in range(ESCAPED + 1))
        assert cost(int(first), int(below)) == best


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (2047,), (7, 11)], ids=str)
def test_empty_and_tiny_tensors_are_kept(shape):
    layout = round_trip(gaussian(*shape))
    assert layout.raw and layout.nbytes <= 2 * layout.numel + 15


@pytest.mark.parametrize("shape", [(2048,), (2049,), (3, 4096), (5, 3001), (2, 3, 1999), (1, 14336)], ids=str)
def test_sizes_that_divide_nothing(shape):
    assert not round_trip(gaussian(*shape)).raw


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_are_kept(dtype):
    layout = round_trip(torch.randn(3, 2048, generator=GENERATOR).to(DEVICE, dtype))
    assert layout.raw and bits_per_weight(layout) == 8 * dtype.itemsize


def test_what_does_not_shrink_is_kept():
    layout = round_trip(from_bits(torch.randint(-0x8000, 0x8000, (16 * TILE,), generator=GENERATOR)))
    assert layout.raw and bits_per_weight(layout) == 16


def test_more_tiles_than_are_handled_at_once(monkeypatch):
    weights = sown(scaled_rows(9, TILE), SPECIAL, 0.02)
    _, whole = compress(weights)
    assert decompress_weights.BLOCK_TILES > 9 and compress_tiles.CPU_BLOCK_TILES > 9
    monkeypatch.setattr(decompress_weights, "BLOCK_TILES", 2)
    for name in ("CPU_BLOCK_TILES", "GPU_BLOCK_TILES"):
        monkeypatch.setattr(compress_tiles, name, 2)
    round_trip(weights)
    assert torch.equal(compress(weights)[1], whole)
    assert torch.equal(compress(weights, num_threads=3)[1], whole)


def test_a_blob_into_given_memory():
    """Compresses into memory that holds anything: padding is zero, and nothing behind the blob is written."""
    for weights in (sown(gaussian(5, 3001), SPECIAL, 0.01), gaussian(7, 11), from_bits(torch.randint(-9, 9, (4097,)))):
        _, fresh = compress(weights, torch.zeros(2 * weights.numel() + 15, dtype=torch.uint8, device=DEVICE))
        poisoned = torch.full((2 * weights.numel() + 15,), 0xA5, dtype=torch.uint8, device=DEVICE)
        _, blob = compress(weights, poisoned)
        assert blob.data_ptr() == poisoned.data_ptr() and torch.equal(blob, fresh)
        assert (poisoned[-(-2 * weights.numel() // 16) * 16 :] == 0xA5).all()


@settings(max_examples=25)
@given(
    numel=st.integers(0, 3 * TILE + 40),
    scale=st.integers(-120, 110),
    spread=st.floats(0, 30),
    share=st.sampled_from([0.0, 0.0005, 0.02, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_anything_survives(numel, scale, spread, share, seed):
    generator = torch.Generator().manual_seed(seed)
    exponents = (scale + spread * torch.randn(numel, generator=generator)).clamp(-140, 127)
    bits = torch.exp2(exponents).bfloat16().view(torch.int16)
    noise = torch.randint(-0x8000, 0x8000, (numel,), generator=generator).short()
    bits = torch.where(torch.rand(numel, generator=generator) < share, noise, bits ^ (noise & -0x7F81))
    round_trip(from_bits(bits))


@pytest.mark.parametrize(
    ("weights", "target"), [(gaussian, 10.95), (student, 11.10), (scaled_rows, 11.00)], ids=lambda x: str(x)[:20]
)
@pytest.mark.parametrize("shape", [(64, 4096), (20, 14336)], ids=str)
def test_bits_a_weight(weights, target, shape):
    assert 10.5 < bits_per_weight(round_trip(weights(*shape))) <= target


def test_parts_lie_apart_and_aligned():
    layout, blob = compress(sown(gaussian(5, 3001), SPECIAL, 0.01))
    end = 0
    for offset, nbytes in layout.parts.values():
        assert offset % 16 == 0 and end <= offset < end + 16
        end = offset + nbytes
    assert layout.num_patches and layout.num_escapes and end <= layout.nbytes == len(blob) < end + 16


def test_a_blob_or_result_that_is_too_short_is_never_read():
    """Passes memory that is too short: a slice would be shorter without a word, and the kernel would read on behind
    it."""
    layout, blob = compress(sown(gaussian(3, 2048), SPECIAL, 0.01))
    out = torch.empty(layout.shape, dtype=layout.dtype, device=DEVICE)
    for nbytes in (0, layout.parts["windows"][0] + 2, layout.nbytes // 2):
        with pytest.raises(AssertionError):
            decompress(layout, blob[:nbytes], out)
    planes = layout.planes(blob)
    for name in ("indices", "windows", "escape_starts", "patch_starts"):
        short = planes._replace(**{name: getattr(planes, name)[:-1]})
        with pytest.raises(AssertionError, match="a plane is too short for its tiles"):
            decompress_weights.decompress_weights(short, out.view(-1))
