"""Measures the sustained rate of the link between registered host memory and the device, by piece size: each rank alone
and all at once; beside reads of device memory or an all-reduce every millisecond, as in a decode pass; and paced, with
a limit of pieces in flight. So it also shows whether pacing copies, or cutting them into pieces, helps collectives.

Run it plainly, or by torchrun over several ranks. A rate is the better of two runs, each behind a barrier; the fraction
is of the best rate of a rank with the same direction and ranks. The last line is one JSON object.

    python -m scripts.bench.link
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.measure.rates import CPU_BYTES, GPU_BYTES, all_ranks, link_buffers
from penstock.parallel.collectives import Collectives
from penstock.parallel.group import run_in_group
from penstock.parallel.launch import resolve_launch, run_rank
from penstock.parallel.topology import Topology
from penstock.scheduler.units import KIB, MIB, gb_s, show_size
from torch import Tensor

from scripts.bench.copies import copy_pieces, cut
from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine

PERIOD_S = 1e-3  # from one all-reduce to the next
MARGIN = 1.25  # the time of the reduces over that of the copies without load
REDUCE_BYTES = (16 * KIB, 256 * KIB)
NUM_READS = 4  # enqueued at a time
ALONE, TOGETHER = "alone", "together"


@dataclass(frozen=True)
class Case:
    """One case to measure. If `piece_bytes` is None, the whole buffer is one copy; if `in_flight` is None, all pieces
    are enqueued at once; `load` is none, reads, or the bytes of an all-reduce."""

    direction: str = "h2d"
    ranks: str = TOGETHER
    piece_bytes: int | None = None
    in_flight: int | None = None
    load: str | int = "none"


class Benchmark:
    def __init__(self, collectives: Collectives, pair: tuple[Tensor, Tensor], total_bytes: int, repeats: int):
        self.collectives, self.total_bytes, self.repeats = collectives, total_bytes, repeats
        self.host, self.target = pair
        self.device = self.target.device
        self.data = torch.ones((GPU_BYTES if self.device.type == "cuda" else CPU_BYTES) // 4, device=self.device)
        self.sums = {size: torch.zeros(size // 2, dtype=torch.bfloat16, device=self.device) for size in REDUCE_BYTES}
        self.pool = ThreadPoolExecutor(1)
        self.nominal_s = 0.0  # seconds of all copies without load, which warm_up measures
        for tensor in self.sums.values():
            collectives.all_reduce(tensor)

    def warm_up(self) -> None:
        for _ in range(self.repeats + 1):
            seconds = self._once(Case(), True)
        self.nominal_s = max(rank_s for (rank_s,) in all_ranks([seconds], self.collectives, self.device))

    def rates(self, case: Case) -> list[float]:
        """The link rate of each rank, in 1e9 bytes/s."""
        actives = [range(self.collectives.size)]
        if case.ranks == ALONE:
            actives = [range(rank, rank + 1) for rank in range(self.collectives.size)]
        own = 0.0
        for active in actives:
            for _ in range(self.repeats):
                seconds = self._once(case, self.collectives.rank in active)
                own = max(own, gb_s(self._copied_bytes(), seconds))
        return [rate for (rate,) in all_ranks([own], self.collectives, self.device)]

    def _copied_bytes(self) -> int:
        return -(-self.total_bytes // self.host.nbytes) * self.host.nbytes

    def _once(self, case: Case, is_active: bool) -> float:
        """Seconds of this rank's copies; infinite where it does not copy."""
        source, target = (self.host, self.target) if case.direction == "h2d" else (self.target, self.host)
        pieces = cut(source, target, case.piece_bytes or self.host.nbytes, self.total_bytes)
        self.collectives.barrier()
        if not is_active:
            return math.inf
        copying = self.pool.submit(copy_pieces, pieces, self.device, case.in_flight)
        if case.load == "reads":
            self._read_beside(copying)
        elif case.load != "none":
            self._reduce_beside(self.sums[case.load])
        return copying.result()[1]

    def _read_beside(self, copying: Future) -> None:
        while not copying.done():
            for _ in range(NUM_READS):
                self.data.sum()
            self._wait()

    def _reduce_beside(self, tensor: Tensor) -> None:
        """Runs as many all-reduces on every rank, whenever its own copies end."""
        start = time.perf_counter()
        for number in range(math.ceil(MARGIN * self.nominal_s / PERIOD_S)):
            time.sleep(max(0.0, start + number * PERIOD_S - time.perf_counter()))
            self.collectives.all_reduce(tensor)
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def cases(piece_sizes: list[int], in_flight: list[int], num_ranks: int) -> list[Case]:
    loads = ["none", "reads", *(REDUCE_BYTES if num_ranks > 1 else ())]
    sizes = [*piece_sizes, None]
    made = [Case(direction, TOGETHER, size) for direction in ("h2d", "d2h") for size in sizes]
    if num_ranks > 1:
        made += [Case(direction, ALONE, size) for direction in ("h2d", "d2h") for size in sizes]
    made += [Case(piece_bytes=size, load=load) for load in loads[1:] for size in sizes]
    return made + [Case("h2d", TOGETHER, size, n, load) for load in loads for n in in_flight for size in piece_sizes]


def measure(
    topology: Topology, collectives: Collectives, args: argparse.Namespace, say: Callable[[dict], None]
) -> dict:
    """The record, on every rank; `say` gets each row as it comes."""
    on_gpu = topology.device.type == "cuda"
    buffer_bytes = (args.buffer_mib or (2048 if on_gpu else 16)) * MIB
    total_bytes = (args.total_mib or (8192 if on_gpu else 64)) * MIB
    sizes = [size * MIB for size in args.piece_mib if size * MIB < buffer_bytes]
    rows = []
    with link_buffers(buffer_bytes, topology.device) as pair:
        benchmark = Benchmark(collectives, pair, total_bytes, args.repeats)
        with benchmark.pool:
            benchmark.warm_up()
            for case in cases(sizes, args.in_flight, collectives.size):
                rates = benchmark.rates(case)
                rows.append(asdict(case) | {"rates_gb_s": rates, "gb_s": min(rates), "sum_gb_s": sum(rates)})
                say(rows[-1])
    for row in rows:
        alike = [other["gb_s"] for other in rows if all(other[key] == row[key] for key in ("direction", "ranks"))]
        row["fraction_of_best"] = row["gb_s"] / max(alike)
    about = {"benchmark": "link", **machine(topology.device, collectives.size), "tp_size": collectives.size}
    return about | {"buffer_bytes": buffer_bytes, "total_bytes": total_bytes, "repeats": args.repeats, "rows": rows}


def print_row(row: dict) -> None:
    piece = "whole" if row["piece_bytes"] is None else show_size(row["piece_bytes"])
    paced = "all" if row["in_flight"] is None else row["in_flight"]
    load = row["load"] if isinstance(row["load"], str) else f"reduces of {show_size(row['load'])}"
    rates = "".join(f"{rate:8.2f}" for rate in row["rates_gb_s"])
    print(f"{row['direction']:4} {row['ranks']:9} {piece:>8} {paced:>10}  {load:20}{rates}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--piece-mib", type=int, nargs="*", default=[1, 4, 16, 64, 256], help="beside the whole buffer")
    parser.add_argument("--in-flight", type=int, nargs="*", default=[1, 2, 4], help="limits of pieces to try")
    parser.add_argument("--buffer-mib", type=int, default=None, help="host memory a rank (default: 2048, on a CPU 16)")
    parser.add_argument("--total-mib", type=int, default=None, help="copied in a run (default: 8192, on a CPU 64)")
    parser.add_argument("--repeats", type=int, default=2)
    add_output_argument(parser)
    return parser.parse_args()


def main() -> None:
    args, launch = parse_args(), resolve_launch()
    say = print_row if launch.rank == 0 else lambda row: None
    head = f"{'':4} {'ranks':9} {'piece':>8} {'in flight':>10}  {'beside':20}  GB/s by rank"
    if launch.rank == 0:
        print(head)
    record = run_in_group(launch, args.device, lambda *group: measure(*group, args, say))
    if launch.rank == 0:
        for ranks in (TOGETHER, ALONE):
            rows = [row for row in record["rows"] if row["ranks"] == ranks and row["direction"] == "h2d"]
            if rows:
                print(f"best, {ranks}:")
                print_row(max(rows, key=lambda row: row["gb_s"]))
        keep(record, args.output_json)


if __name__ == "__main__":
    sys.exit(run_rank(lambda: run_script(main)))
