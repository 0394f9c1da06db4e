"""Times all-reduces by size: NCCL and the engine's own way, eagerly and in a CUDA graph, each alone and beside copies
from host memory on all ranks, as while weights stream.

Run it by torchrun over two ranks or more. A time is that of one call among many in a row: the best of three runs, on
the slowest rank. Bus GB/s are what each rank sends at least, by the best way alone. On a CPU gloo is timed, eagerly, at
fewer sizes. The last line is one JSON object.

    torchrun --nproc-per-node 2 -m scripts.bench.collectives
"""

import argparse
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.measure.probe_report import WAYS, reduce_lines
from penstock.engine.measure.rates import link_buffers
from penstock.engine.measure.reduce_times import default_sizes, reduce_table
from penstock.parallel.collectives import Collectives
from penstock.parallel.group import run_in_group
from penstock.parallel.launch import resolve_launch, run_rank
from penstock.parallel.topology import Topology
from penstock.scheduler.units import KIB, MIB, gb_s

from scripts.bench.copies import copy_pieces, cut
from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine

GPU_PIECE_BYTES, CPU_PIECE_BYTES = 64 * MIB, MIB
NUM_PIECES, IN_FLIGHT = 4, 2
BESIDE = {f"{key}_beside_copies": f"{title}, copies" for key, title in WAYS.items()}


def main() -> int:
    args = parse_args()
    launch = resolve_launch()
    if launch.tp_size == 1:
        print(
            "needs ranks: torchrun --nproc-per-node N -m scripts.bench.collectives",
            file=sys.stderr,
        )
        return 2
    record = run_in_group(launch, args.device, lambda topology, collectives: measure(topology, collectives, args))
    if launch.rank == 0:
        print(reduce_lines(record["rows"], WAYS | BESIDE))
        print(f"bus GB/s: {', '.join(format(row['bus_gb_s'], '.4g') for row in record['rows'])}")
        print(f"copies beside them: {record['copies_gb_s']:.2f} GB/s on rank 0")
        keep(record, args.output_json)
    return 0


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--size-kib", type=int, nargs="+", default=None, help="default: 4 to 65536 (on a CPU 1024)")
    add_output_argument(parser)
    return parser.parse_args()


def measure(topology: Topology, collectives: Collectives, args: argparse.Namespace) -> dict:
    """The record, on every rank."""
    device, dtype = topology.device, getattr(torch, args.dtype)
    sizes = default_sizes(device) if args.size_kib is None else tuple(size * KIB for size in args.size_kib)
    rows = reduce_table(collectives, device, sizes, dtype)
    beside, copies_gb_s = beside_copies(collectives, device, sizes, dtype)
    for row, loaded in zip(rows, beside):
        fastest_s = min(seconds for key, seconds in row.items() if key != "bytes")
        row["bus_gb_s"] = bus_gb_s(row["bytes"], fastest_s, collectives.size)
        row |= {f"{key}_beside_copies": seconds for key, seconds in loaded.items() if key != "bytes"}
    about = {"benchmark": "collectives", **machine(device, collectives.size), "tp_size": collectives.size}
    way = {"dtype": args.dtype, "collectives": type(collectives).__name__, "copies_gb_s": copies_gb_s}
    return about | way | {"rows": rows}


def beside_copies(
    collectives: Collectives, device: torch.device, sizes: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[dict[str, float]], float]:
    """The table of `reduce_table` while every rank copies without a pause; and the GB/s of this rank's copies."""
    piece_bytes = GPU_PIECE_BYTES if device.type == "cuda" else CPU_PIECE_BYTES
    stop = threading.Event()
    with link_buffers(NUM_PIECES * piece_bytes, device) as pair, ThreadPoolExecutor(1) as pool:
        pieces = cut(*pair, piece_bytes, piece_bytes)
        copying = pool.submit(copy_pieces, itertools.cycle(pieces), device, IN_FLIGHT, stop)
        try:
            rows = reduce_table(collectives, device, sizes, dtype)
        finally:
            stop.set()
        nbytes, seconds = copying.result()
    return rows, gb_s(nbytes, seconds)


def bus_gb_s(nbytes: int, reduce_s: float, num_ranks: int) -> float:
    """1e9 bytes/s that each rank sends at least, as NCCL's tests count: 2 (n - 1) / n of the tensor."""
    return gb_s(2 * (num_ranks - 1) / num_ranks * nbytes, reduce_s)


if __name__ == "__main__":
    sys.exit(run_rank(lambda: run_script(main)))
