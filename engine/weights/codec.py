"""A lossless code for bf16 weights: 10.9 bits a weight where they are Gaussian, made to be decoded on a GPU. The engine
does not use it yet.

Signs and mantissas carry no pattern; exponents do, about 2.6 bits of it. A tile of TILE weights has its own window of
eleven consecutive exponents, the cheapest one: three of them cost 2 bits, eight 2 + 3. A weight outside is coded as the
exponent that is whole windows away, and a patch of 16 bits says which weight and how many windows. So every 16-bit
pattern survives, and a tile is decoded alone. The last weights, too few for a tile, are kept as they are, and so is a
whole tensor that would not shrink or is not bf16 (of fp16, 11 bits are sign and mantissa: it would stay above 13.5).

A coded tensor is one uint8 blob; a `CodeLayout` says what lies where in it. Every part starts at PART_BYTES.
Shapes: `kernels/decode_weights.py`, which decodes.
Tried: one level of 3 bits for a window of eight exponents, with the same patches: 11.27 bits at most where this has
10.92 (Gaussian, over all scales), 11.41 where this has 11.08 (Student-t(4)), 11.23 where this has 10.85 (rows scaled
log-normally). It decodes in half the instructions, without a prefix sum. Patches with all bits of a weight: 0.01 to
0.09 bits more.
"""

import dataclasses
import functools
import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.decode_weights import (
    BLOCK_TILES,
    COMMON,
    ESCAPED,
    LANE_WEIGHTS,
    LANES,
    PATCH_PLACE,
    TILE,
    WINDOW,
    Planes,
    decode_weights,
    natural_order,
    num_escape_rows,
    stored_order,
)

PART_BYTES = 16
ESCAPE_BITS, PATCH_BITS = 3, 16
PARTS = (*Planes._fields, "rest")  # in a blob's order


@dataclasses.dataclass(frozen=True)
class CodeLayout:
    """Where a coded tensor's parts lie in its blob. A raw one is its own bytes, and has no escapes or patches."""

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
        tiles, patches = self.num_tiles, self.num_patches
        escapes_bytes, starts_bytes = 12 * num_escape_rows(self.num_escapes), 4 * (tiles + 1)
        sizes = (TILE * tiles, TILE // 4 * tiles, escapes_bytes, 2 * patches)
        sizes += (starts_bytes, starts_bytes, 2 * tiles, 2 * (self.numel - TILE * tiles))
        offsets = [0]
        for size in sizes:
            offsets.append(_round_up(offsets[-1] + size))
        return dict(zip(PARTS, zip(offsets, sizes)))

    @property
    def nbytes(self) -> int:
        """Of the blob, everything counted."""
        return _round_up(sum(list(self.parts.values())[-1]))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.numel

    def part(self, blob: Tensor, name: str) -> Tensor:
        """The bytes of a part, a view."""
        offset, nbytes = self.parts[name]
        return blob[offset : offset + nbytes]

    def planes(self, blob: Tensor) -> Planes:
        """What the decoder takes, views of a blob from a 16-byte boundary."""
        parts = Planes(*(self.part(blob, name) for name in Planes._fields))
        return Planes(
            parts.mantissas.view(-1, LANES, LANE_WEIGHTS),
            parts.codes.view(-1, LANES, 4),
            parts.escapes.view(-1, 12),
            parts.patches.view(torch.int16),
            parts.escape_starts.view(torch.int32),
            parts.patch_starts.view(torch.int32),
            parts.windows.view(-1, 2),
        )


def encode(weights: Tensor) -> tuple[CodeLayout, Tensor]:
    """A contiguous tensor of any shape and dtype as a blob on its device, and its layout.

    Temporaries are those of BLOCK_TILES tiles, and the parts once more.
    """
    flat = weights.reshape(-1)
    raw = CodeLayout(tuple(weights.shape), weights.dtype, raw=True)
    if weights.dtype != torch.bfloat16 or not raw.num_tiles:
        return _filled(raw, {"rest": flat})
    tiles = flat[: raw.num_tiles * TILE].view(torch.int16).view(-1, TILE)
    blocks = [_encode_tiles(block) for block in tiles.split(BLOCK_TILES)]
    parts = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    counts = {"num_escapes": len(parts["escapes"]), "num_patches": len(parts["patches"])}
    parts["escapes"] = _pack_escapes(parts["escapes"])
    for name in ("escape_starts", "patch_starts"):
        parts[name] = F.pad(parts[name].cumsum(0), (1, 0)).int()
    layout = dataclasses.replace(raw, raw=False, **counts)
    if layout.nbytes >= raw.nbytes:
        return _filled(raw, {"rest": flat})
    return _filled(layout, parts | {"rest": flat[tiles.numel() :]})


def decode(layout: CodeLayout, blob: Tensor, out: Tensor) -> None:
    """The tensor that was encoded, bit for bit, into `out`, contiguous, of its shape and dtype, on the blob's device.

    The blob is trusted: `check` refuses one that is not what it should be.
    """
    assert tuple(out.shape) == layout.shape and out.dtype == layout.dtype and out.is_contiguous()
    flat = out.view(-1)
    covered = 0 if layout.raw else layout.num_tiles * TILE
    if covered:
        decode_weights(layout.planes(blob), flat[:covered])
    if covered < layout.numel:
        flat[covered:].copy_(layout.part(blob, "rest").view(layout.dtype))


def checksum(blob: Tensor) -> int:
    """CRC-32 of the bytes."""
    return zlib.crc32(blob.cpu().numpy())


def check(name: str, layout: CodeLayout, blob: Tensor, expected: int) -> None:
    """Raises ValueError naming the tensor unless the blob has this layout and checksum."""
    if blob.dtype != torch.uint8 or blob.ndim != 1 or not blob.is_contiguous():
        raise ValueError(f"{name}: coded weights are bytes in a row, not {blob.dtype} of shape {tuple(blob.shape)}")
    if not layout.raw and layout.dtype != torch.bfloat16:
        raise ValueError(f"{name}: {layout.dtype} is kept raw, only torch.bfloat16 is coded")
    if len(blob) < layout.nbytes:
        raise ValueError(f"{name}: truncated: {len(blob)} of {layout.nbytes} bytes of coded weights")
    if len(blob) > layout.nbytes:
        raise ValueError(
            f"{name}: corrupt: {len(blob)} bytes, but {layout.nbytes} for {layout.dtype} of shape {layout.shape}"
        )
    found = checksum(blob)
    if found != expected:
        raise ValueError(f"{name}: corrupt: the checksum is {found:08x}, not {expected:08x}")
    if not layout.raw:
        _check_planes(name, layout.planes(blob))


def _check_planes(name: str, planes: Planes) -> None:
    """What the decoder would follow out of bounds; a right checksum of wrong bytes is for those who write them."""
    escapes = (planes.codes & planes.codes >> 1 & 0x55).view(-1, LANES * 4)
    escapes = sum((escapes >> shift & 1).sum(1) for shift in (0, 2, 4, 6))
    if not torch.equal(planes.escape_starts, F.pad(escapes.cumsum(0), (1, 0)).int()):
        raise ValueError(f"{name}: corrupt: its tiles do not have the escapes that their codes ask for")
    starts = planes.patch_starts
    if starts[0] != 0 or starts[-1] != len(planes.patches) or bool((starts.diff() < 0).any()):
        raise ValueError(f"{name}: corrupt: the patches of its tiles do not follow each other")


def _encode_tiles(tiles: Tensor) -> dict[str, Tensor]:
    """(N, TILE) int16 as parts; the escapes not packed yet, and numbers a tile in place of starts."""
    stored = stored_order(tiles).view(-1, TILE)
    exponents = stored >> 7 & 0xFF
    first, below = choose_windows(exponents)
    away = exponents - first[:, None] & 0xFF
    place, times = away % WINDOW, natural_order(away // WINDOW)
    common = place - below[:, None]
    escaped = (common < 0) | (common >= COMMON)
    codes = torch.where(escaped, COMMON, common).byte().view(-1, LANES, 4, 4).unbind(2)  # (N, LANES, 4) of each group
    late = torch.where(common < 0, place, place - COMMON)
    patched = times > 0
    return {
        "mantissas": (stored >> 8 & 0x80 | stored & 0x7F).byte().view(-1),
        "codes": (codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6).view(-1),
        "escapes": late[escaped].byte(),
        "patches": (patched.nonzero()[:, 1] << PATCH_PLACE | times[patched]).short(),
        "escape_starts": escaped.sum(1),
        "patch_starts": patched.sum(1),
        "windows": torch.stack([first, below], 1).byte().view(-1),
    }


def choose_windows(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """For each tile of exponents (N, TILE) the cheapest window: its first exponent, and how many of its escapes' lie
    below the common ones, (N,) int16 each. Of equals the lowest, so that every device chooses the same."""
    num_tiles = len(exponents)
    tile = torch.arange(num_tiles, device=exponents.device)[:, None] * 256
    counts = torch.bincount(exponents.long().add_(tile).view(-1), minlength=num_tiles * 256).view(num_tiles, 256)
    sums = F.pad(counts.cumsum(1), (1, 0))  # (N, 257)
    in_window, common = (sums[:, width:] - sums[:, :-width] for width in (WINDOW, COMMON))
    common, below = _first_largest(common.unfold(1, ESCAPED + 1, 1))  # (N, 246): the best place in each window
    saved = PATCH_BITS * in_window + ESCAPE_BITS * common  # patched weights taken for escapes
    first = _first_largest(saved)[1]
    return first.short(), below.gather(1, first[:, None])[:, 0].short()


def _first_largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Value and index of the largest in the last dim, of equals the first; up to 256 of them."""
    best = (values * 256 + torch.arange(255, 255 - values.shape[-1], -1, device=values.device)).amax(-1)
    return best >> 8, 255 - (best & 255)


def _pack_escapes(late: Tensor) -> Tensor:
    """3-bit codes (uint8 each) as bytes, padded: eight are three bytes."""
    eights = F.pad(late, (0, 32 * num_escape_rows(len(late)) - len(late))).view(-1, 8)
    low = eights[:, 0] | eights[:, 1] << 3 | eights[:, 2] << 6
    middle = eights[:, 2] >> 2 | eights[:, 3] << 1 | eights[:, 4] << 4 | eights[:, 5] << 7
    high = eights[:, 5] >> 1 | eights[:, 6] << 2 | eights[:, 7] << 5
    return torch.stack([low, middle, high], 1).view(-1)


def _filled(layout: CodeLayout, parts: dict[str, Tensor]) -> tuple[CodeLayout, Tensor]:
    """The layout, and a blob of these parts; padding is zero."""
    blob = torch.zeros(layout.nbytes, dtype=torch.uint8, device=parts["rest"].device)
    for name, values in parts.items():
        layout.part(blob, name).copy_(values.view(torch.uint8))
    return layout, blob


def _round_up(nbytes: int) -> int:
    return -(-nbytes // PART_BYTES) * PART_BYTES
