"""A lossless codec for bf16 weights: 10.9 bits a weight where they are Gaussian, made to be decompressed on a GPU.

Signs and mantissas carry no pattern; exponents do: they hold about 2.6 bits each. A tile of TILE weights has its own
window of eleven consecutive exponents, the cheapest one: three of them cost 2 bits, the other eight 2 + 3. A weight
outside is compressed as the exponent that is whole windows away, and a patch of 16 bits says which weight and how many
windows. So every 16-bit pattern survives, and a tile is decompressed alone. The last weights, too few for a tile, are
kept as they are, and so is a whole tensor that would not shrink or is not bf16 (of fp16, 11 bits are sign and mantissa:
it would stay above 13.5).

A compressed tensor is one uint8 blob; a `CompressedLayout` says what lies where in it. Every part starts at PART_BYTES.
`kernels/decompress_weights.py`, which decompresses, gives their shapes.
One level of 3 bits for a window of eight exponents, with the same patches, was tried: it takes 11.27 bits at most where
this takes 10.92 (Gaussian, over all scales), 11.41 where this takes 11.08 (Student-t(4)), 11.23 where this takes 10.85
(rows scaled log-normally). It decompresses in half the instructions, without a prefix sum. Patches with all bits of a
weight take 0.01 to 0.09 bits more.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from penstock.engine.kernels.codec_tile import LANE_WEIGHTS, LANES, TILE
from penstock.engine.kernels.decompress_weights import Planes, decompress_weights
from penstock.engine.model.compressed_size import PART_BYTES, part_bytes
from penstock.engine.model.shard import pad_to
from penstock.engine.weights.compress_tiles import compress_blocks, pack_escapes
from penstock.engine.weights.views import byte_range
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class CompressedLayout:
    """Holds where a compressed tensor's parts lie in its blob. A raw tensor is kept as its own bytes, without
    escapes or patches."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    raw: bool
    num_escapes: int = 0
    num_patches: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_tiles(self) -> int:
        return self.numel // TILE

    @functools.cached_property
    def parts(self) -> dict[str, tuple[int, int]]:
        """First byte and number of bytes of each part, by name."""
        if self.raw:
            return {"rest": (0, self.numel * self.dtype.itemsize)}
        parts, offset = {}, 0
        for name, size in part_bytes(self.numel, self.num_escapes, self.num_patches).items():
            parts[name] = (offset, size)
            offset = pad_to(offset + size, PART_BYTES)
        return parts

    @property
    def nbytes(self) -> int:
        """Bytes of the whole blob."""
        return pad_to(sum(self.parts["rest"]), PART_BYTES)

    def part(self, blob: Tensor, name: str) -> Tensor:
        """The bytes of a part, a view."""
        return byte_range(blob, *self.parts[name])

    def planes(self, blob: Tensor) -> Planes:
        """The parts that the decompressor takes, as views of a blob that starts at a 16-byte boundary."""
        parts = Planes(*(self.part(blob, name) for name in Planes._fields))
        return Planes(
            parts.mantissas.view(-1, LANES, LANE_WEIGHTS),
            parts.indices.view(-1, LANES, 4),
            parts.escapes.view(-1, 12),
            parts.patches.view(torch.int16),
            parts.escape_starts.view(torch.int32),
            parts.patch_starts.view(torch.int32),
            parts.windows.view(-1, 2),
        )


def compress(weights: Tensor, out: Tensor | None = None, num_threads: int = 1) -> tuple[CompressedLayout, Tensor]:
    """Compresses a contiguous tensor of any shape and dtype; returns the layout of its blob, and the blob on its
    device.

    The blob is the start of `out`: uint8 on that device, from a 16-byte boundary, at least as long as the weights
    padded to PART_BYTES. `out` is allocated if it is not given; a caller that wants to keep no more than the blob
    copies it. Temporaries are those of a block of tiles (on a CPU, of one for each of `num_threads`) and a byte an
    escape.
    """
    flat = weights.reshape(-1)
    raw = CompressedLayout(tuple(weights.shape), weights.dtype, raw=True)
    out = torch.empty(raw.nbytes, dtype=torch.uint8, device=weights.device) if out is None else out
    if weights.dtype != torch.bfloat16 or not raw.num_tiles:
        return raw, _filled(raw, {"rest": flat}, out)
    tiles = flat[: raw.num_tiles * TILE].view(torch.int16).view(-1, TILE)
    parts = compress_blocks(tiles, out, num_threads)
    counts = {"num_escapes": len(parts["escapes"]), "num_patches": len(parts["patches"])}
    layout = dataclasses.replace(raw, raw=False, **counts)
    if layout.nbytes >= raw.nbytes:
        return raw, _filled(raw, {"rest": flat}, out)
    parts["escapes"] = pack_escapes(parts["escapes"])
    for name in ("escape_starts", "patch_starts"):
        parts[name] = F.pad(parts[name].cumsum(0), (1, 0)).int()
    return layout, _filled(layout, parts | {"rest": flat[tiles.numel() :]}, out)


def decompress(layout: CompressedLayout, blob: Tensor, out: Tensor) -> None:
    """Writes the tensor that was compressed, bit for bit, to `out`: contiguous, of its shape and dtype, on the blob's
    device. The blob is trusted to be what `compress` made."""
    decompressor(layout, blob, out)()


def decompressor(layout: CompressedLayout, blob: Tensor, out: Tensor) -> Callable[[], None]:
    """A function that does so each time, with whatever lies in the blob's memory then: the views are made once."""
    assert tuple(out.shape) == layout.shape and out.dtype == layout.dtype and out.is_contiguous()
    covered = 0 if layout.raw else layout.num_tiles * TILE
    tiles, others = out.view(-1)[:covered], out.view(-1)[covered:]
    planes = layout.planes(blob) if covered else None
    rest = layout.part(blob, "rest").view(layout.dtype) if len(others) else None

    def run() -> None:
        if planes is not None:
            decompress_weights(planes, tiles)
        if rest is not None:
            others.copy_(rest)

    return run


def warm_up(device: torch.device) -> None:
    """Compiles the decompressor's kernel, which capture forbids."""
    layout, blob = compress(torch.ones(TILE, dtype=torch.bfloat16, device=device))
    decompress(layout, blob, torch.empty(layout.shape, dtype=layout.dtype, device=device))


def _filled(layout: CompressedLayout, parts: dict[str, Tensor], out: Tensor) -> Tensor:
    """The blob at the start of `out`, of these parts and what is there already; padding is zero."""
    blob = out[: layout.nbytes]
    for name, values in parts.items():
        offset, nbytes = layout.parts[name]
        blob[offset + nbytes : pad_to(offset + nbytes, PART_BYTES)].zero_()
        layout.part(blob, name).copy_(values.view(torch.uint8))
    return blob
