"""Compresses tiles of bf16 weights into the parts of a blob (codec.py), in plain torch: the same bytes on every device.

What is done for each weight costs most, so it is little: a histogram of each tile's exponents decides its window, and a
table of 256 says what each exponent becomes; all else is done on bytes.
"""

import concurrent.futures

import torch
import torch.nn.functional as F
from penstock.engine.kernels.codec_tile import ESCAPE_ROW, LANE_WEIGHTS, LANES, TILE, num_escape_rows
from penstock.engine.kernels.decompress_weights import COMMON, ESCAPED, PATCH_SHIFT, WINDOW, stored_order
from penstock.engine.model.compressed_size import ESCAPE_BITS
from torch import Tensor

PATCH_BITS = 16
# Tiles that are compressed at a time: by a thread of a CPU those that a cache holds; by a GPU many, since the host's
# launches bind: an H200 compressed 2.1 GB/s with 1024, and 12.6 with 8192, which take twice the memory of 4096.
CPU_BLOCK_TILES, GPU_BLOCK_TILES = 128, 4096
LATE_SHIFT, PATCHED = 2, 32  # where a mark has the 3 bits of an escape, and the bit that says that it is patched


def compress_blocks(tiles: Tensor, out: Tensor, num_threads: int) -> dict[str, Tensor]:
    """Compresses tiles (N, TILE) int16: writes mantissas and indices to the start of `out`, where they always lie, and
    returns the other parts. Escapes are not packed yet, and the parts of starts hold the number in each tile."""
    num_bytes = TILE * len(tiles)
    mantissas = out[:num_bytes].view(-1, LANES, LANE_WEIGHTS)
    indices = out[num_bytes : num_bytes + num_bytes // 4].view(-1, LANES, 4)
    on_cpu = out.device.type == "cpu"
    num_tiles = CPU_BLOCK_TILES if on_cpu else GPU_BLOCK_TILES
    blocks = [part.split(num_tiles) for part in (tiles, mantissas, indices)]
    if on_cpu and num_threads > 1:
        with concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="compress") as threads:
            compressed = list(threads.map(_compress_tiles, *blocks))
    else:
        compressed = list(map(_compress_tiles, *blocks))
    return {name: torch.cat([block[name] for block in compressed]) for name in compressed[0]}


def _compress_tiles(tiles: Tensor, mantissas: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """Fills mantissas (N, LANES, LANE_WEIGHTS) and indices (N, LANES, 4) of N tiles; returns the other parts."""
    exponents = tiles >> 7 & 0xFF
    bins = exponents.int().add_(_first_bins(tiles))
    counts = torch.bincount(bins.view(-1), minlength=256 * len(tiles)).view(-1, 256).int()
    first, below = choose_windows(counts)
    marks, times = _mark_exponents(first, below)
    mantissas.copy_(stored_order((tiles >> 8 & 0x80 | tiles & 0x7F).byte()))
    marked = marks.view(-1).index_select(0, bins.view(-1)).view(-1, TILE)
    patched = (marked >= PATCHED).nonzero().unbind(1)
    stored = stored_order(marked).view(-1)
    index_of = stored & COMMON
    fours = index_of.view(torch.int32).view(-1, LANES, 4).unbind(2)  # (N, LANES) words of four indices
    indices.view(torch.int32)[:, :, 0] = fours[0] | fours[1] << 2 | fours[2] << 4 | fours[3] << 6
    times_at = times[patched[0], exponents[patched].long()]
    return {
        "escapes": stored[index_of == COMMON] >> LATE_SHIFT & 7,
        "patches": (patched[1] << PATCH_SHIFT | times_at).short(),
        "escape_starts": (counts * (marks & COMMON == COMMON)).sum(1),
        "patch_starts": (counts * (times > 0)).sum(1),
        "windows": torch.stack([first, below], 1).byte().view(-1),
    }


def _first_bins(tiles: Tensor) -> Tensor:
    """The first bin (N, 1) int32 of each of N tiles, which have 256 bins each, one an exponent."""
    return torch.arange(0, 256 * len(tiles), 256, device=tiles.device, dtype=torch.int32)[:, None]


def _mark_exponents(first: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Says what each exponent becomes in tiles of these windows: marks (N, 256) uint8 with its index, the 3 bits of an
    escape at LATE_SHIFT, and PATCHED where it lies outside; and (N, 256) int32, how many windows away it lies."""
    away = torch.arange(256, device=first.device, dtype=torch.int32) - first[:, None] & 0xFF
    nearest, times = away % WINDOW, away // WINDOW
    common = nearest - below[:, None]
    late = torch.where(common < 0, nearest, nearest - COMMON) << LATE_SHIFT | COMMON
    marks = torch.where((common < 0) | (common >= COMMON), late, common)
    return (marks | (times > 0) * PATCHED).byte(), times


def choose_windows(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest windows of tiles that have each exponent so often as `counts` (N, 256) int32 says: (N,) int32 each,
    their first exponent, and how many of the eight lie below the common ones. Of equally cheap windows the lowest is
    chosen, so that every device chooses the same."""
    sums = F.pad(counts.cumsum(1, dtype=torch.int32), (1, 0))  # (N, 257)
    in_window, common = (sums[:, width:] - sums[:, :-width] for width in (WINDOW, COMMON))
    common = F.max_pool1d(_lowest_first(common).float(), ESCAPED + 1, stride=1).int()  # (N, 246): best in each window
    saved = PATCH_BITS * in_window + ESCAPE_BITS * (common >> 8)  # patched weights count as escapes
    first = 255 - (_lowest_first(saved).amax(1, keepdim=True) & 255)
    below = 255 - (common.gather(1, first.long()) & 255) - first
    return first[:, 0], below[:, 0]


def _lowest_first(values: Tensor) -> Tensor:
    """Numbers (N, up to 256) in the order of the values, but of equal values the first is the largest: 255 less its
    index is in the low 8 bits. They are exact in float32 for values under 2**16."""
    return values << 8 | torch.arange(255, 255 - values.shape[1], -1, device=values.device, dtype=torch.int32)


def pack_escapes(late: Tensor) -> Tensor:
    """Packs escapes, 3 bits each (uint8), into bytes, and pads them: eight are three bytes."""
    whole, num_padded = len(late) // 8 * 8, ESCAPE_ROW * num_escape_rows(len(late))
    last = F.pad(late[whole:], (0, num_padded - len(late)))  # only these are copied, not to hold all of them twice
    return torch.cat([_pack_eights(part.view(-1, 8)) for part in (late[:whole], last)])


def _pack_eights(eights: Tensor) -> Tensor:
    low = eights[:, 0] | eights[:, 1] << 3 | eights[:, 2] << 6
    middle = eights[:, 2] >> 2 | eights[:, 3] << 1 | eights[:, 4] << 4 | eights[:, 5] << 7
    high = eights[:, 5] >> 1 | eights[:, 6] << 2 | eights[:, 7] << 5
    return torch.stack([low, middle, high], 1).view(-1)
