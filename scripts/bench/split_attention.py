"""Times decode attention over rows of even and uneven lengths, by the length of a segment, the room for items and the
shape of a program, as graphs of the 32 layers of Llama-3-8B in bf16, each with a cache of its own.

Each way is first held to the reference, and a row alone to the same row among others, bit for bit. The share is of the
read rate measured in the same run, the sum of 1 GiB. After 80 s what is left is skipped and counted. The last line is
one JSON object.

    python -m scripts.bench.split_attention
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.kernels import decode_attention as kernels
from penstock.engine.kernels import decode_work, segments
from penstock.engine.kernels.decode_work import DecodeWork
from penstock.scheduler.units import GB, gb_s, us
from torch import Tensor

from scripts.bench.entry import run_script
from scripts.bench.kernels import measure
from scripts.bench.record import add_output_argument, keep, machine

DEVICE, DTYPE = "cuda", torch.bfloat16
LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, DEADLINE = 32, 32, 8, 128, 16, 80.0
SHAPES = {
    **{f"1 x {context}": [context] for context in (32, 2000, 8000)},
    **{f"{rows} x {context}": [context] * rows for rows, context in ((8, 100), (64, 100), (64, 2100))},
    **{f"256 x {context}": [context] * 256 for context in (100, 600)},
    "1 x 65536 + 63 x 512": [512] * 20 + [65536] + [512] * 43,
    "64 x 1528": [1528] * 64,  # as many tokens
}
SEGMENTS = (128, 256, 512, 1024, 2048)
TUNED = ("1 x 2000", "64 x 100", "64 x 2100", "256 x 600", "1 x 65536 + 63 x 512", "64 x 1528")
TUNINGS = (  # tokens of a turn, warps and stages, beside what the kernel chooses
    *((64, 4, 3), (64, 4, 4), (64, 2, 2), (64, 8, 2)),
    *((128, 4, 2), (128, 8, 2), (32, 4, 3), (32, 4, 4), (32, 2, 3)),
)


@dataclass
class Rows:
    """Rows of one token over pages in random order, and what they attend to in each layer."""

    lengths: list[int]
    cache: Tensor  # (layers, 2, P * S, K, E)

    def __post_init__(self) -> None:
        counts = [-(-length // PAGE_SIZE) for length in self.lengths]
        order = torch.randperm(self.cache.shape[2] // PAGE_SIZE, device=DEVICE).int()
        self.pages = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=DEVICE)
        for row, own in enumerate(order[: sum(counts)].split(counts)):
            self.pages[row, : len(own)] = own
        self.context_lens = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        self.q = torch.randn(len(counts), 1, HEADS, HEAD_DIM, dtype=DTYPE, device=DEVICE)
        self.out = torch.empty_like(self.q)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of a layer."""
        return 2 * sum(self.lengths) * self.cache[0, 0, 0].nbytes

    def arguments(self, layer: int) -> tuple:
        tables = (*self.cache[layer], self.pages, self.context_lens)
        return (self.q, *tables, self.out, HEAD_DIM**-0.5, None, PAGE_SIZE)

    def work(self, segment: int, step: int | None) -> DecodeWork:
        """The listed work, with room for the next power of `step` times the rows, or for no more than there is."""
        num_items = capacity = segments.count_items(self.lengths, segment)
        if step is not None:
            capacity = len(self.lengths)
            while capacity < num_items:
                capacity *= step
        partials = torch.full((segments.partials_size(capacity, HEADS, HEAD_DIM),), torch.nan, device=DEVICE)
        reaches = decode_work.reaches_of((None,), partials.device)
        work = decode_work.make_work(len(self.lengths), segment, capacity, (None,), reaches, partials)
        decode_work.list_work(self.context_lens, work)
        return work

    def alone(self, row: int) -> "Rows":
        """The same row in a batch of its own."""
        rows = Rows([self.lengths[row]], self.cache)
        rows.pages, rows.q = self.pages[row : row + 1], self.q[row : row + 1].clone()
        return rows


class Benchmark:
    def __init__(self):
        self.start, self.rows, self.skipped, self.failed = time.monotonic(), [], 0, []
        memory = torch.ones(1 << 28, device=DEVICE)
        self.read_rate = memory.nbytes / measure([partial(torch.sum, memory)], 4)
        most = max(sum(-(-length // PAGE_SIZE) for length in lengths) for lengths in SHAPES.values())
        shape = (LAYERS, 2, most * PAGE_SIZE, KV_HEADS, HEAD_DIM)
        cache = torch.empty(shape, dtype=DTYPE, device=DEVICE)
        for layer in cache:
            layer.normal_()
        self.shapes = {name: Rows(lengths, cache) for name, lengths in SHAPES.items()}
        self.expected: dict[str, Tensor] = {}
        print(f"{'shape':22}{'variant':44}{'us a layer':>11}{'GB/s':>8}  share of {self.read_rate / GB:.0f} GB/s")

    def add(self, name: str, variant: str, run: Callable[..., object], **facts) -> None:
        """Times `run`, which takes the arguments of a layer, and holds its result to the reference."""
        if time.monotonic() - self.start > DEADLINE:
            self.skipped += 1
            return
        rows = self.shapes[name]
        try:
            seconds = measure([partial(run, *rows.arguments(layer)) for layer in range(LAYERS)], LAYERS, 5)
        except Exception as error:  # a program that does not fit: the next variant may
            self.failed.append(f"{name}, {variant}: {error!r:.200}")
            print(f"{name:22}{variant:44} failed: {error!r:.200}", flush=True)
            return
        apart = self.apart(name, run)
        share = rows.nbytes / seconds / self.read_rate
        self.rows.append(
            {"shape": name, "variant": variant, **facts, "us": round(us(seconds), 2)}
            | {"gb_s": round(gb_s(rows.nbytes, seconds), 1), "share": round(share, 3), "apart": apart}
        )
        print(f"{name:22}{variant:44}{us(seconds):11.2f}{gb_s(rows.nbytes, seconds):8.0f}{share:7.1%}", flush=True)

    def apart(self, name: str, run: Callable[..., object]) -> float:
        """The largest difference from the reference in float32, which must be a few roundings of bf16."""
        rows = self.shapes[name]
        if name not in self.expected:
            out = rows.q.float()
            q, *rest = rows.arguments(0)
            kernels.decode_attention_reference(q, *rest[:4], out, *rest[5:])
            self.expected[name] = out
        rows.out.fill_(torch.nan)
        run(*rows.arguments(0))
        expected = self.expected[name]
        apart = (rows.out.float() - expected).abs()
        if not bool((apart <= 2**-7 * expected.abs() + 2**-8).all()):
            self.failed.append(f"{name}: {float(apart.max())} from the reference")
        return float(apart.max())

    def split(self, name: str, segment: int, step: int | None, tuning: tuple[int, int, int] | None = None) -> None:
        rows = self.shapes[name]
        work, keys = rows.work(segment, step), ("BLOCK", "num_warps", "num_stages")
        shaped = None if tuning is None else dict(zip(keys, tuning))
        how = "chosen" if tuning is None else f"turns of {tuning[0]}, {tuning[1]} warps, {tuning[2]} stages"
        room = "exact" if step is None else f"x{step}"
        run = partial(self.run, work, shaped)
        facts = {"segment": segment, "room": room, "items": work.capacity, "program": how}
        self.add(name, f"{segment}, {room}, {how}", run, **facts)

    @staticmethod
    def run(work: DecodeWork, tuning: dict | None, *arguments) -> None:
        kernels._decode_attention_triton(*arguments, work, tuning=tuning)

    def company(self, name: str, segment: int) -> None:
        """Holds rows alone to the same rows among others, bit for bit, with much room and little."""
        rows = self.shapes[name]
        self.run(rows.work(segment, 2), None, *rows.arguments(0))
        for row in {0, rows.lengths.index(max(rows.lengths)), len(rows.lengths) - 1}:
            for step in (None, 2, 16):
                alone = rows.alone(row)
                self.run(alone.work(segment, step), None, *alone.arguments(0))
                if not torch.equal(alone.out[0], rows.out[row]):
                    self.failed.append(f"{name}, {segment}: row {row} depends on its company")

    def lists(self, name: str) -> None:
        """Times the making of the list, which a pass does once."""
        rows = self.shapes[name]
        work = rows.work(256, 2)
        seconds = measure([partial(decode_work.list_work, rows.context_lens, work)], LAYERS, 5)
        self.rows.append({"shape": name, "variant": "list of the work", "us": round(us(seconds), 2)})
        print(f"{name:22}{'list of the work':44}{us(seconds):11.2f}", flush=True)

    def everything(self) -> None:
        for name, rows in self.shapes.items():
            self.lists(name)
            for segment in SEGMENTS:
                self.company(name, segment)
                self.split(name, segment, 2)
                exact, wide = (rows.work(segment, step).capacity for step in (None, 4))
                if exact > len(rows.lengths):
                    self.split(name, segment, None)
                if wide != rows.work(segment, 2).capacity:
                    self.split(name, segment, 4)
        for tuning in TUNINGS:
            for name in TUNED:
                for segment in (256, 1024):
                    self.split(name, segment, 2, tuning)


def report(benchmark: Benchmark, output_json: str | None) -> int:
    """Writes the record; 1 if a result was wrong or a variant failed."""
    record = {"benchmark": "split_attention", **machine(torch.device(DEVICE))}
    record |= {"read_gb_s": round(benchmark.read_rate / GB, 1), "skipped": benchmark.skipped}
    keep(record | {"failed": benchmark.failed, "rows": benchmark.rows}, output_json)
    return int(bool(benchmark.failed))


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_argument(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("split_attention.py needs a CUDA GPU", file=sys.stderr)
        return 2
    benchmark = Benchmark()
    benchmark.everything()
    return report(benchmark, args.output_json)


if __name__ == "__main__":
    sys.exit(run_script(main))
