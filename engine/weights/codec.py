"""A lossless code for bf16 weights: 10.9 bits a weight where they are Gaussian, made to be decoded on a GPU.

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

import concurrent.futures
import dataclasses
import functools
import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.code_tile import ESCAPE_ROW, LANE_WEIGHTS, LANES, TILE, num_escape_rows
from engine.kernels.decode_weights import (
    BLOCK_TILES,
    COMMON,
    ESCAPED,
    PATCH_PLACE,
    WINDOW,
    Planes,
    decode_weights,
    stored_order,
)
from engine.model.coded_size import ESCAPE_BITS, PART_BYTES, part_bytes
from parallel.shard import pad_to

PATCH_BITS = 16
CPU_BLOCK_TILES = 128  # that a thread codes at a time: those that a cache holds
LATE_PLACE, PATCHED = 2, 32  # where a marked exponent has its 3-bit code, and the bit that says that it is patched


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
        parts, offset = {}, 0
        for name, size in part_bytes(self.numel, self.num_escapes, self.num_patches).items():
            parts[name] = (offset, size)
            offset = pad_to(offset + size, PART_BYTES)
        return parts

    @property
    def nbytes(self) -> int:
        """Of the blob, everything counted."""
        return pad_to(sum(self.parts["rest"]), PART_BYTES)

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


def encode(weights: Tensor, out: Tensor | None = None, num_threads: int = 1) -> tuple[CodeLayout, Tensor]:
    """A contiguous tensor of any shape and dtype as a blob on its device, and its layout.

    The blob is the start of `out`, uint8 on that device, from a 16-byte boundary, as long as the weights padded to
    PART_BYTES (or longer), which is allocated if it is not given: keep a copy to keep no more. Temporaries are those
    of a block of tiles, on a CPU for each of `num_threads`, and a byte an escape.
    """
    flat = weights.reshape(-1)
    raw = CodeLayout(tuple(weights.shape), weights.dtype, raw=True)
    out = torch.empty(raw.nbytes, dtype=torch.uint8, device=weights.device) if out is None else out
    if weights.dtype != torch.bfloat16 or not raw.num_tiles:
        return raw, _filled(raw, {"rest": flat}, out)
    tiles = flat[: raw.num_tiles * TILE].view(torch.int16).view(-1, TILE)
    parts = _encode_blocks(tiles, out, num_threads)
    counts = {"num_escapes": len(parts["escapes"]), "num_patches": len(parts["patches"])}
    layout = dataclasses.replace(raw, raw=False, **counts)
    if layout.nbytes >= raw.nbytes:
        return raw, _filled(raw, {"rest": flat}, out)
    parts["escapes"] = _pack_escapes(parts["escapes"])
    for name in ("escape_starts", "patch_starts"):
        parts[name] = F.pad(parts[name].cumsum(0), (1, 0)).int()
    return layout, _filled(layout, parts | {"rest": flat[tiles.numel() :]}, out)


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


def _encode_blocks(tiles: Tensor, out: Tensor, num_threads: int) -> dict[str, Tensor]:
    """(N, TILE) int16: mantissas and codes to the start of `out`, where they always lie; returns the other parts, the
    escapes not packed yet, and numbers a tile in place of starts."""
    num_bytes = TILE * len(tiles)
    mantissas = out[:num_bytes].view(-1, LANES, LANE_WEIGHTS)
    codes = out[num_bytes : num_bytes + num_bytes // 4].view(-1, LANES, 4)
    on_cpu = out.device.type == "cpu"
    step = CPU_BLOCK_TILES if on_cpu else BLOCK_TILES
    blocks = [part.split(step) for part in (tiles, mantissas, codes)]
    if on_cpu and num_threads > 1:
        with concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="encode") as threads:
            encoded = list(threads.map(_encode_tiles, *blocks))
    else:
        encoded = list(map(_encode_tiles, *blocks))
    return {name: torch.cat([block[name] for block in encoded]) for name in encoded[0]}


def _encode_tiles(tiles: Tensor, mantissas: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Of N tiles: mantissas (N, LANES, LANE_WEIGHTS) and codes (N, LANES, 4) into place."""
    exponents = tiles >> 7 & 0xFF
    bins = exponents.int().add_(_first_bins(tiles))
    counts = torch.bincount(bins.view(-1), minlength=256 * len(tiles)).view(-1, 256).int()
    first, below = choose_windows(counts)
    marks, times = _code_exponents(first, below)
    mantissas.copy_(stored_order((tiles >> 8 & 0x80 | tiles & 0x7F).byte()))
    marked = marks.view(-1).index_select(0, bins.view(-1)).view(-1, TILE)
    patched = (marked >= PATCHED).nonzero().unbind(1)
    stored = stored_order(marked).view(-1)
    codes_of = stored & COMMON
    groups = codes_of.view(torch.int32).view(-1, LANES, 4).unbind(2)  # (N, LANES) words of four codes
    codes.view(torch.int32)[:, :, 0] = groups[0] | groups[1] << 2 | groups[2] << 4 | groups[3] << 6
    times_at = times[patched[0], exponents[patched].long()]
    return {
        "escapes": stored[codes_of == COMMON] >> LATE_PLACE & 7,
        "patches": (patched[1] << PATCH_PLACE | times_at).short(),
        "escape_starts": (counts * (marks & COMMON == COMMON)).sum(1),
        "patch_starts": (counts * (times > 0)).sum(1),
        "windows": torch.stack([first, below], 1).byte().view(-1),
    }


def _first_bins(tiles: Tensor) -> Tensor:
    """Each of N tiles has 256 bins, one an exponent: (N, 1) int32."""
    return torch.arange(0, 256 * len(tiles), 256, device=tiles.device, dtype=torch.int32)[:, None]


def _code_exponents(first: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """What each exponent becomes in tiles of these windows: (N, 256) uint8 of its code, the 3-bit code of an escape at
    LATE_PLACE, and PATCHED where it lies outside; and (N, 256) int32: how many windows away."""
    away = torch.arange(256, device=first.device, dtype=torch.int32) - first[:, None] & 0xFF
    place, times = away % WINDOW, away // WINDOW
    common = place - below[:, None]
    late = torch.where(common < 0, place, place - COMMON) << LATE_PLACE | COMMON
    marks = torch.where((common < 0) | (common >= COMMON), late, common)
    return (marks | (times > 0) * PATCHED).byte(), times


def choose_windows(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For tiles that have each exponent so often, (N, 256) int32, the cheapest windows: the first exponent, and how
    many of the escapes' lie below the common ones, (N,) int32 each. Of equals the lowest, so that every device chooses
    the same."""
    sums = F.pad(counts.cumsum(1, dtype=torch.int32), (1, 0))  # (N, 257)
    in_window, common = (sums[:, width:] - sums[:, :-width] for width in (WINDOW, COMMON))
    common = F.max_pool1d(_lowest_first(common).float(), ESCAPED + 1, stride=1).int()  # (N, 246): best in each window
    saved = PATCH_BITS * in_window + ESCAPE_BITS * (common >> 8)  # patched weights taken for escapes
    first = 255 - (_lowest_first(saved).amax(1, keepdim=True) & 255)
    below = 255 - (common.gather(1, first.long()) & 255) - first
    return first[:, 0], below[:, 0]


def _lowest_first(values: Tensor) -> Tensor:
    """(N, up to 256) as numbers in the order of the values, of equals the first largest: 255 less its place is in the
    low 8 bits. Exact in float32, for values under 2**16."""
    return values << 8 | torch.arange(255, 255 - values.shape[1], -1, device=values.device, dtype=torch.int32)


def _pack_escapes(late: Tensor) -> Tensor:
    """3-bit codes (uint8 each) as bytes, padded: eight are three bytes."""
    whole, num_padded = len(late) // 8 * 8, ESCAPE_ROW * num_escape_rows(len(late))
    last = F.pad(late[whole:], (0, num_padded - len(late)))  # only these, not to hold them all twice
    return torch.cat([_pack_eights(part.view(-1, 8)) for part in (late[:whole], last)])


def _pack_eights(eights: Tensor) -> Tensor:
    low = eights[:, 0] | eights[:, 1] << 3 | eights[:, 2] << 6
    middle = eights[:, 2] >> 2 | eights[:, 3] << 1 | eights[:, 4] << 4 | eights[:, 5] << 7
    high = eights[:, 5] >> 1 | eights[:, 6] << 2 | eights[:, 7] << 5
    return torch.stack([low, middle, high], 1).view(-1)


def _filled(layout: CodeLayout, parts: dict[str, Tensor], out: Tensor) -> Tensor:
    """The blob at the start of `out`, of these parts and what is there already; padding is zero."""
    blob = out[: layout.nbytes]
    for name, values in parts.items():
        offset, nbytes = layout.parts[name]
        blob[offset + nbytes : pad_to(offset + nbytes, PART_BYTES)].zero_()
        layout.part(blob, name).copy_(values.view(torch.uint8))
    return blob
