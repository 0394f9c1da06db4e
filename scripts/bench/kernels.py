"""Times each kernel alone, in a CUDA graph: cuBLAS and the GEMV's block shapes, attention, argmax and draw over
segments, filters, norm, activation, rope; shapes of Llama-3-8B in bf16.

Weights and KV pages are rotated through more memory than the L2 cache holds; the median of several replays counts. The
share is of the read rate measured in the same run, the sum of 1 GiB; what few rows read stays in the L2 cache, so their
share means little. After 40 s what is left is skipped and counted. The last line is one JSON object.

    python -m scripts.bench.kernels
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.kernels import argmax, decode_attention, decode_work, draw, linear, segments
from penstock.engine.kernels import filter as filters
from penstock.engine.kernels.gated_activation import gated_activation
from penstock.engine.kernels.residual_norm import residual_norm
from penstock.engine.kernels.rope_append import rope_append
from penstock.scheduler.units import GB, gb_s, us
from torch import Tensor

from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine

DEVICE, DTYPE = "cuda", torch.bfloat16
LAYER, HEAD = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], (128256, 4096)
SHAPES = [*LAYER, HEAD, (3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168)]
HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 4096, 14336, 128256, 32, 8, 128, 16
ROWS, CONTEXTS, SEGMENTS, CACHE_TOKENS = (1, 64, 256), (64, 2048), (64, 128, 256, 512, 1024, 2048), 256 * 2048
BLOCKS = [  # of the GEMV, beside what it chooses
    *((2, 1024, 4, 1), (4, 1024, 4, 1), (8, 1024, 4, 1), (2, 2048, 8, 1), (4, 2048, 8, 1), (8, 2048, 8, 1)),
    *((4, 512, 2, 1), (1, 2048, 4, 1), (4, 1024, 4, 3), (8, 1024, 4, 4)),
]
TRAFFIC, DEADLINE = 2 << 30, 40.0  # bytes read by a graph, about; seconds


class Benchmark:
    def __init__(self, quick: bool):
        self.quick, self.start, self.rows, self.skipped = quick, time.monotonic(), [], 0
        memory = torch.ones(1 << 28, device=DEVICE)
        self.read_rate = memory.nbytes / measure([partial(torch.sum, memory)], 4)
        print(f"{'kernel':18}{'shape':20}{'variant':34}{'us':>9}{'GB/s':>8}  share of {self.read_rate / GB:.0f} GB/s")

    def add(self, kernel: str, shape: str, variant: str, nbytes: int, calls: Sequence[Callable]) -> None:
        """`calls` do the same in different parts of the memory; one touches `nbytes`."""
        if time.monotonic() - self.start > DEADLINE:
            self.skipped += 1
            return
        seconds = measure(calls, max(2, min(TRAFFIC // nbytes, 128)), 3 if self.quick else 7)
        time_us, rate, share = us(seconds), gb_s(nbytes, seconds), nbytes / seconds / self.read_rate
        keys = ("kernel", "shape", "variant", "us", "gb_s", "share")
        self.rows.append(dict(zip(keys, (kernel, shape, variant, round(time_us, 2), round(rate, 1), round(share, 3)))))
        print(f"{kernel:18}{shape:20}{variant:34}{time_us:9.2f}{rate:8.0f}{share:7.1%}", flush=True)

    def linears(self, num_columns: int, width: int, memory: Tensor) -> None:
        """Times linears of one token."""
        weights = memory[: len(memory) // (num_columns * width) * num_columns * width].view(-1, num_columns, width)
        x, out = (torch.randn(1, n, dtype=DTYPE, device=DEVICE) for n in (width, num_columns))
        runs = {"cuBLAS": (linear.linear_reference,), "config()": (linear._linear_triton,)}
        runs |= {str(c): (linear._linear_triton, c) for c in (BLOCKS[1::4] if self.quick else BLOCKS)}
        for name, (run, *rest) in runs.items():
            calls = [partial(run, x, weight, None, out, *rest) for weight in weights]
            self.add("linear", f"1: {num_columns} x {width}", name, weights[0].nbytes, calls)

    def attention(self, num_rows: int, context: int, keys: Tensor, values: Tensor) -> None:
        q = torch.randn(num_rows, 1, HEADS, HEAD_DIM, dtype=DTYPE, device=DEVICE)
        lens = torch.full((num_rows,), context, dtype=torch.int32, device=DEVICE)
        pages = torch.randperm(len(keys) // PAGE_SIZE, device=DEVICE).int().view(-1, context // PAGE_SIZE)
        chosen, windows = segments.Segments(KV_HEADS, context, num_rows * context).tokens(num_rows), (None,)
        nbytes = 2 * num_rows * context * keys[0].nbytes
        reaches = decode_work.reaches_of(windows, lens.device)
        for segment in sorted({chosen, *(SEGMENTS[::3] if self.quick else SEGMENTS)}):
            capacity = num_rows * segments.count_segments(context, segment)
            partials = torch.empty(segments.partials_size(capacity, HEADS, HEAD_DIM), device=DEVICE)
            work = decode_work.make_work(num_rows, segment, capacity, windows, reaches, partials)
            decode_work.list_work(lens, work)
            rest = (lens, q, HEAD_DIM**-0.5, None, PAGE_SIZE, work)
            tables = pages.split(num_rows)[: len(pages) // num_rows][:128]
            rope = torch.rand(2, context, HEAD_DIM // 2, dtype=DTYPE, device=DEVICE)
            for how, key_rope in {"": None, **({" rotating": rope} if segment == chosen else {})}.items():
                run = partial(decode_attention.decode_attention, key_rope=key_rope)
                name = f"{segment} a segment" + " chosen" * (segment == chosen) + how
                calls = [partial(run, q, keys, values, table, *rest) for table in tables]
                self.add("decode_attention", f"{num_rows} x {context}", name, nbytes, calls)

    def others(self, num_rows: int) -> None:
        x, delta, out = torch.zeros(3, num_rows, HIDDEN, dtype=DTYPE, device=DEVICE)
        norm = (x, delta, x.new_ones(HIDDEN), None, 1e-5, out, "rms")
        self.add("residual_norm", str(num_rows), "rms", 4 * x.nbytes, [partial(residual_norm, *norm)])
        ffn, attn = (x.new_zeros(num_rows, width) for width in (2 * FFN, (HEADS + 2 * KV_HEADS) * HEAD_DIM))
        nbytes, index = ffn.nbytes * 3 // 2, torch.arange(num_rows, device=DEVICE)
        self.add("gated_activation", str(num_rows), "silu", nbytes, [partial(gated_activation, ffn, "silu", True)])
        table, cache = x.new_ones(2, num_rows, HEAD_DIM // 2), x.new_zeros(2, num_rows, KV_HEADS, HEAD_DIM)
        rope = (attn, table, index, index, *cache, HEADS, KV_HEADS, None, None, 1e-5)
        self.add("rope_append", str(num_rows), "", 2 * attn.nbytes, [partial(rope_append, *rope)])

    def sampling(self, num_rows: int) -> None:
        logits = torch.randn(min(1024 // num_rows + 1, 128), num_rows, VOCAB, device=DEVICE, dtype=DTYPE)
        chosen = argmax.choose_segments(num_rows, VOCAB, argmax.CUT)
        for count in (None, *sorted({1, 2, 8, 32, 126, chosen})):
            run, rest = (argmax._argmax_rows_triton, (None, count)) if count else (argmax.argmax_rows_reference, ())
            name = f"N={count}" + " chosen" * (count == chosen) if count else "torch"
            calls = [partial(run, part, VOCAB, *rest) for part in logits]
            self.add("argmax", str(num_rows), name, logits[0].nbytes, calls)
        index = torch.arange(num_rows, device=DEVICE)
        noise = draw.Noise(torch.full((num_rows,), 0.8, device=DEVICE), index, index)
        chosen = argmax.choose_segments(num_rows, VOCAB, draw.CUT)
        for count in sorted({1, 2, 4, 8, 32, 126, chosen}):
            name = f"N={count}" + " chosen" * (count == chosen)
            calls = [partial(draw._draw_rows_triton, part, VOCAB, noise, num_segments=count) for part in logits]
            self.add("draw", str(num_rows), name, logits[0].nbytes, calls)
        for name, top_k, top_p in (("top_p=0.9", VOCAB, 0.9), ("top_k=50", 50, 1.0), ("both", 50, 0.9)):
            drop_mass = 1.0 - top_p if top_p < 1.0 else filters.KEEP_ALL
            columns = (noise.temperatures.new_full((num_rows,), value) for value in (drop_mass, -torch.inf))
            asked = filters.Filters(torch.full_like(index, top_k), *columns)
            calls = [partial(filters.find_limits, part, VOCAB, noise.temperatures, asked) for part in logits]
            self.add("filter", str(num_rows), name, logits[0].nbytes, calls)

    def pass_ms(self, variant: str | None) -> float:
        """Milliseconds of all linears of a pass at batch 1, with one variant or the best of each shape."""
        rows = [r for r in self.rows if r["kernel"] == "linear" and variant in (None, r["variant"])]
        best = {shape: min(r["us"] for r in rows if r["shape"] == shape) for shape in {r["shape"] for r in rows}}
        return round(sum(best.get(f"1: {n} x {d}", 0.0) for n, d in [*LAYER * 32, HEAD]) * 1e-3, 3)


def measure(calls: Sequence[Callable[[], object]], num_calls: int, replays: int = 7) -> float:
    """Seconds of one of `num_calls` in a graph, `calls` in turn; torch.cuda.graph would collect garbage before each."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph.capture_begin()
        for call in itertools.islice(itertools.cycle(calls), num_calls):
            call()
        graph.capture_end()
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        stream.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) * 1e-3 / num_calls


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer variants and replays")
    add_output_argument(parser)
    args = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("kernels.py needs a CUDA GPU", file=sys.stderr)
        return 2
    benchmark = Benchmark(args.quick)
    memory = torch.randn(HEAD[0] * HEAD[1], dtype=DTYPE, device=DEVICE)
    cache = torch.randn(2, CACHE_TOKENS, KV_HEADS, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    for shape in SHAPES:
        benchmark.linears(*shape, memory)
    for num_rows, context in itertools.product(ROWS, CONTEXTS):
        benchmark.attention(num_rows, context, *cache)
    for num_rows in ROWS:
        benchmark.others(num_rows)
        benchmark.sampling(num_rows)
    passes = {str(variant or "best"): benchmark.pass_ms(variant) for variant in ("cuBLAS", "config()", None)}
    print(f"all linears of a pass at batch 1, ms: {passes}; {benchmark.skipped} skipped")
    record = {"benchmark": "kernels", **machine(torch.device(DEVICE))}
    record |= {"read_gb_s": round(benchmark.read_rate / GB, 1), "pass_ms": passes, "skipped": benchmark.skipped}
    keep(record | {"rows": benchmark.rows}, args.output_json)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
