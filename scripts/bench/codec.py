"""Measures the lossless compression of weights (engine/weights/codec.py): bits a weight with everything counted, beside
the entropy floor; rates of compression and decompression in 1e9 bytes of bf16 a second; and the rate at which a link
brings plain weights when it carries compressed ones.

It compresses random weights of several distributions and shapes, then whole checkpoints, read as bf16; of a GGUF file
what is not quantised. The floor is 8
bits of sign and mantissa plus the entropy of a row's exponents (Miller and Madow's estimate). Every tensor is compared
bit for bit with what its compressed form decompresses to. On a GPU, decompression is timed in a CUDA graph, over more
memory than the L2 cache holds, and the link is measured. On a CPU the reference decompressor is timed, which says
nothing about the kernel. The last line is one JSON object.

    python -m scripts.bench.codec --model demo
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.measure.rates import GPU_BYTES, decompress_seconds, link_buffers, link_gb_s, seconds
from penstock.engine.model.shard import Piece
from penstock.engine.model.weight_formats import QUANTISED
from penstock.engine.planning.find_model import find_model
from penstock.engine.weights.checkpoint import FILE_DTYPES, Checkpoint
from penstock.engine.weights.codec import CompressedLayout, compress
from penstock.engine.weights.gguf_checkpoint import GGUFCheckpoint
from penstock.engine.weights.gguf_file import is_gguf
from penstock.engine.weights.read_model import read_model
from penstock.parallel.collectives import Solo
from penstock.parallel.launch import run_rank
from penstock.parallel.topology import resolve_topology
from penstock.scheduler.units import MIB
from torch import Tensor

from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine

SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (4096, 3584))  # the last is the third, split over four ranks
CPU_ROWS = 256  # of each shape; the bits of a weight do not depend on their number
FLOOR_WEIGHTS = 2**24  # counted at a time


def gaussian(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device) * 0.02


def laplace(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.empty(shape, device=device).exponential_() * torch.randn(shape, device=device).sign() * 0.02


def student_t4(shape: tuple[int, int], device: torch.device) -> Tensor:
    chi_squared = sum(torch.randn(shape, device=device).square_() for _ in range(4))
    return gaussian(shape, device) * (4 / chi_squared).sqrt_()


def scaled_rows(shape: tuple[int, int], device: torch.device) -> Tensor:
    return gaussian(shape, device) * torch.randn(shape[0], 1, device=device).exp_()


def random_bits(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.randint(-(2**15), 2**15, shape, device=device, dtype=torch.int16).view(torch.bfloat16)


SOURCES: tuple[Callable[[tuple[int, int], torch.device], Tensor], ...] = (
    *(gaussian, laplace, student_t4, scaled_rows, random_bits),
)


def checkpoint_tensors(model: str, device: torch.device) -> Iterator[Tensor]:
    """Yields every tensor as bf16 (rows, columns) on the device; of a GGUF file those that are not quantised. Raises
    ValueError naming another one that is quantised, and for a GGUF file without a matrix of floats."""
    with open_checkpoint(find_model(model)) as checkpoint:
        for name, entry in checkpoint.entries.items():
            if entry.dtype in QUANTISED:
                continue
            if entry.dtype not in FILE_DTYPES:
                raise ValueError(f"--model {model}: {name} is {entry.dtype}, not one of {', '.join(FILE_DTYPES)}")
            out = torch.empty((entry.shape or (1,))[0], entry.num_cols, dtype=torch.bfloat16)
            checkpoint.read_piece(Piece(name, 0, out.shape[0], 0, out.shape[1], 0), out)
            yield out.to(device)


def open_checkpoint(path: Path) -> Checkpoint:
    if not is_gguf(path):
        return Checkpoint.open(path)
    checkpoint = GGUFCheckpoint.open_model(path, read_model(path).spec)
    if not any(len(entry.shape) == 2 and entry.dtype in FILE_DTYPES for entry in checkpoint.entries.values()):
        raise ValueError(f"--model {path}: all matrices are quantised, and only floats are compressed")
    return checkpoint


def floor_bits(weights: Tensor) -> float:
    """The floor of the whole tensor, in bits: 8 for each weight, and the entropy of the exponents of each row."""
    total = 8.0 * weights.numel()
    for rows in weights.split(max(1, FLOOR_WEIGHTS // weights.shape[1])):
        exponents = rows.contiguous().view(torch.int16).long() >> 7 & 0xFF
        bins = exponents + 256 * torch.arange(len(rows), device=rows.device)[:, None]
        counts = torch.bincount(bins.view(-1), minlength=256 * len(rows)).view(-1, 256).double()
        shares = counts / rows.shape[1]
        total -= float((counts * shares.clamp(min=1e-30).log2()).sum())
        total += float(((counts > 0).sum(1) - 1).sum()) / (2 * math.log(2))
    return min(total, 16.0 * weights.numel())


def proved_decompress_s(layout: CompressedLayout, blob: Tensor, weights: Tensor) -> float:
    """Seconds to decompress the blob once; the result is compared bit for bit. Raises RuntimeError if it differs."""
    device = weights.device
    num_copies = max(1, GPU_BYTES // max(weights.nbytes, MIB)) if device.type == "cuda" else 1
    pairs = [(blob.clone(), torch.empty_like(weights)) for _ in range(num_copies)]

    elapsed = decompress_seconds(layout, pairs, device)
    if not all(torch.equal(out.view(torch.int16), weights.view(torch.int16)) for _, out in pairs):
        raise RuntimeError(f"{layout} does not decompress to the weights that were compressed")
    return elapsed / num_copies


def measure(source: str, shape: str, tensors: Iterator[Tensor], link: float | None) -> dict:
    """A row of the record: the sums over these tensors, each of them decompressed and compared."""
    bits = floor = compress_s = decompress_s = 0.0
    num_weights = num_raw = 0
    for weights in tensors:
        layout, blob = compress(weights)
        compress_s += seconds(lambda weights=weights: compress(weights), weights.device, repeats=2, warm_ups=0)
        decompress_s += proved_decompress_s(layout, blob, weights)
        bits, floor = bits + 8 * layout.nbytes, floor + floor_bits(weights)
        num_weights, num_raw = num_weights + weights.numel(), num_raw + layout.raw * weights.numel()
    row = {"source": source, "shape": shape, "bits": round(bits / num_weights, 3)}
    row |= {"floor_bits": round(floor / num_weights, 3), "raw_share": round(num_raw / num_weights, 4)}
    row |= {"compress_gb_s": float(f"{2e-9 * num_weights / compress_s:.4g}")}
    row |= {"decompress_gb_s": float(f"{2e-9 * num_weights / decompress_s:.4g}")}
    row |= {"effective_link_gb_s": None if link is None else round(link * 16 * num_weights / bits, 1)}
    cells = (*list(row.values())[:7], row["effective_link_gb_s"] or "")
    print("{:14}{:>14}{:9.3f}{:9.3f}{:8.2%}{:10.2f}{:10.2f}{:>10}".format(*cells), flush=True)
    return row


def measured_link(device: torch.device) -> float:
    """The rate of the link from registered host memory, in 1e9 bytes/s."""
    with link_buffers(GPU_BYTES, device) as pair:
        return link_gb_s([pair] * 4, Solo())


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument(
        "--model", nargs="*", default=["demo"], help="directories of safetensors checkpoints, or GGUF files"
    )
    parser.add_argument("--rows", type=int, default=None, help=f"of each shape (default: all, on a CPU {CPU_ROWS})")
    parser.add_argument("--link-gb-s", type=float, default=None, help="default: measured, on a GPU")
    add_output_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = resolve_topology(0, 1, 0, args.device).device
    link, max_rows = args.link_gb_s, args.rows
    if device.type == "cuda":
        link = link or measured_link(device)
    max_rows = max_rows or (CPU_ROWS if device.type == "cpu" else max(rows for rows, _ in SHAPES))
    torch.manual_seed(0)
    decompressor = "kernel, in a graph" if device.type == "cuda" else "reference on a CPU"
    print(f"link {link or 'unknown'} GB/s; decompressor: {decompressor}; GB/s are of bf16")
    print(f"{'source':14}{'shape':>14}{'bits':>9}{'floor':>9}{'raw':>8}{'compress':>10}{'decompress':>10}{'link':>10}")
    rows = [
        measure(source.__name__, f"{num_rows} x {width}", iter([source((num_rows, width), device).bfloat16()]), link)
        for source in SOURCES
        for num_rows, width in dict.fromkeys((min(num_rows, max_rows), width) for num_rows, width in SHAPES)
    ]
    rows += [measure(model, "checkpoint", checkpoint_tensors(model, device), link) for model in args.model]
    record = {
        "benchmark": "codec",
        **machine(device),
        "decompressor": decompressor,
        "link_gb_s": link and round(link, 2),
    }
    keep(record | {"rows": rows}, args.output_json)


if __name__ == "__main__":
    sys.exit(run_rank(lambda: run_script(main)))
