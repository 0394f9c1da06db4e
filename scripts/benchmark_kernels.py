"""Time of each kernel alone, in a CUDA graph: cuBLAS and the GEMV's block shapes, attention and argmax over segments,
norm, activation, rope; shapes of Llama-3-8B in bf16.

Weights and KV pages are rotated through more memory than the L2 cache holds; the median of several replays counts. The
share is of the read rate measured in the same run, the sum of 1 GiB; what few rows read stays in the L2 cache, so their
share means little. After 45 s what is left is skipped and counted. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import triton

from engine.kernels import argmax, decode_attention, linear
from engine.kernels.gated_activation import gated_activation
from engine.kernels.residual_norm import residual_norm
from engine.kernels.rope_append import rope_append

DEVICE, DTYPE = "cuda", torch.bfloat16
LAYER, HEAD = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], (128256, 4096)
SHAPES = [*LAYER, HEAD, (3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168)]
HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, MAX_CONTEXT = 4096, 14336, 128256, 32, 8, 128, 16, 8192
ROWS, CONTEXTS, SEGMENTS, CACHE_TOKENS = (1, 64, 256), (64, 2048), (1, 2, 4, 8, 16, 32, 64), 256 * 2048
TRAFFIC, DEADLINE = 2 << 30, 45.0  # bytes read by a graph, about; seconds


class Benchmark:
    def __init__(self, quick: bool):
        self.quick, self.start, self.rows, self.skipped = quick, time.monotonic(), [], 0
        memory = torch.ones(1 << 28, device=DEVICE)
        self.read_rate = memory.nbytes / measure(lambda _: torch.sum(memory), 4)
        print(f"read rate {self.read_rate * 1e-9:.0f} GB/s")
        print(f"{'kernel':18}{'shape':20}{'variant':20}{'us':>9}{'GB/s':>8}  share")

    def add(self, kernel: str, shape: str, variant: str, nbytes: int, call: Callable[[int], object]) -> None:
        """`call` gets its index, by which it takes another part of the memory."""
        if time.monotonic() - self.start > DEADLINE:
            self.skipped += 1
            return
        seconds = measure(call, max(2, min(TRAFFIC // nbytes, 128)), 3 if self.quick else 7)
        us, rate, share = seconds * 1e6, nbytes / seconds * 1e-9, nbytes / seconds / self.read_rate
        row = {"kernel": kernel, "shape": shape, "variant": variant, "us": round(us, 2)}
        self.rows.append(row | {"gb_s": round(rate, 1), "share": round(share, 3)})
        print(f"{kernel:18}{shape:20}{variant:20}{us:9.2f}{rate:8.0f}{share:7.1%}", flush=True)

    def linears(self, num_tokens: int, num_columns: int, width: int, memory: torch.Tensor) -> None:
        weights = memory[: len(memory) // (num_columns * width) * num_columns * width].view(-1, num_columns, width)
        x, out = (torch.randn(num_tokens, n, dtype=DTYPE, device=DEVICE) for n in (width, num_columns))
        blocks = [c for c in linear.candidates() if c[0] * num_tokens <= 16]  # more would spill
        runs = {"cuBLAS": (linear.linear_reference,), "config()": (linear._linear_triton,)}
        runs |= {str(c): (linear._linear_triton, c) for c in (blocks[1:3] if self.quick else blocks)}

        def call(i: int, run: Callable, *rest) -> None:
            run(x, weights[i % len(weights)], None, out, *rest)

        for name, run in runs.items():
            shape = f"{num_tokens}: {num_columns} x {width}"
            self.add("linear", shape, name, weights[0].nbytes, lambda i, run=run: call(i, *run))

    def attention(self, num_rows: int, context: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        q = torch.randn(num_rows, 1, HEADS, HEAD_DIM, dtype=DTYPE, device=DEVICE)
        lens = torch.full((num_rows,), context, dtype=torch.int32, device=DEVICE)
        count = num_rows * -(-context // PAGE_SIZE)
        pages = torch.randperm(len(keys) // PAGE_SIZE, device=DEVICE).int()
        tables = pages[: len(pages) // count * count].view(-1, num_rows, count // num_rows)
        chosen = decode_attention.choose_segments(num_rows, KV_HEADS, MAX_CONTEXT)

        def call(i: int, *rest) -> None:
            cache = (keys, values, tables[i % len(tables)], lens)
            decode_attention.decode_attention(q, *cache, q, HEAD_DIM**-0.5, None, PAGE_SIZE, *rest)

        for segments in sorted({chosen, *(SEGMENTS[::3] if self.quick else SEGMENTS)}):
            size = decode_attention.partials_size(num_rows, HEADS, HEAD_DIM, segments)
            rest, label = (torch.empty(size, device=DEVICE), segments), mark(segments, chosen)
            nbytes = 2 * lens.numel() * context * KV_HEADS * HEAD_DIM * keys.element_size()
            shape = f"{num_rows} x {context}"
            self.add("decode_attention", shape, label, nbytes, lambda i, rest=rest: call(i, *rest))

    def small(self, num_rows: int) -> None:
        x, delta, out = torch.zeros(3, num_rows, HIDDEN, dtype=DTYPE, device=DEVICE)
        norm = (x, delta, x.new_ones(HIDDEN), None, 1e-5, out, "rms")
        self.add("residual_norm", str(num_rows), "rms", 4 * x.nbytes, lambda i: residual_norm(*norm))
        ffn = x.new_zeros(num_rows, 2 * FFN)
        self.add(
            "gated_activation",
            str(num_rows),
            "silu",
            ffn.nbytes * 3 // 2,
            lambda i: gated_activation(ffn, "silu", True),
        )
        attn, index = x.new_zeros(num_rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM), torch.arange(num_rows, device=DEVICE)
        cache = x.new_zeros(2, num_rows, KV_HEADS, HEAD_DIM)
        rope = (attn, x.new_ones(2, num_rows, HEAD_DIM // 2), index, index, *cache, HEADS, KV_HEADS, None, None, 1e-5)
        self.add("rope_append", str(num_rows), "", 2 * attn.nbytes, lambda i: rope_append(*rope))

    def argmax(self, num_rows: int) -> None:
        copies = torch.randn(max((128 << 20) // (num_rows * VOCAB), 2), num_rows, VOCAB, device=DEVICE, dtype=DTYPE)
        nan_rows, chosen = torch.zeros((), dtype=torch.int64, device=DEVICE), argmax.choose_segments(num_rows, VOCAB)
        runs = {"torch": (argmax.argmax_rows_reference,)}
        runs |= {mark(n, chosen): (argmax._argmax_rows_triton, n) for n in sorted({1, 2, 8, 32, 126, chosen})}

        def call(i: int, run: Callable, *rest) -> None:
            run(copies[i % len(copies)], VOCAB, nan_rows, *rest)

        for name, run in runs.items():
            self.add("argmax", str(num_rows), name, copies[0].nbytes, lambda i, run=run: call(i, *run))

    def pass_ms(self, variant: str | None) -> float:
        """All linears of a pass at batch 1, with one variant or the best of each shape."""
        times = {}
        for row in self.rows:
            if row["kernel"] == "linear" and variant in (None, row["variant"]):
                times[row["shape"]] = min(row["us"], times.get(row["shape"], float("inf")))
        return round(sum(times.get(f"1: {n} x {d}", 0.0) for n, d in [*LAYER * 32, HEAD]) * 1e-3, 3)


def mark(segments: int, chosen: int) -> str:
    return f"N={segments}" + " chosen" * (segments == chosen)


def measure(call: Callable[[int], object], num_calls: int, replays: int = 7) -> float:
    """Seconds of one of `num_calls` in a graph. torch.cuda.graph would collect garbage before each."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(0)
        stream.synchronize()
        graph.capture_begin()
        for i in range(num_calls):
            call(i)
        graph.capture_end()
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        stream.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:])) * 1e-3 / num_calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one token, fewer variants and replays")
    args = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("benchmark_kernels.py needs a CUDA GPU", file=sys.stderr)
        return 2
    benchmark = Benchmark(args.quick)
    memory = torch.randn(HEAD[0] * HEAD[1], dtype=DTYPE, device=DEVICE)
    cache = torch.randn(2, CACHE_TOKENS, KV_HEADS, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    for shape in SHAPES:
        benchmark.linears(1, *shape, memory)
    for num_rows in ROWS:
        for context in CONTEXTS:
            benchmark.attention(num_rows, context, *cache)
        benchmark.small(num_rows)
        benchmark.argmax(num_rows)
    for num_tokens in () if args.quick else (2, 4):
        for shape in SHAPES:
            benchmark.linears(num_tokens, *shape, memory)
    report = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "read_gb_s": round(benchmark.read_rate * 1e-9, 1),
    }
    report |= {"pass_ms": {str(v or "best"): benchmark.pass_ms(v) for v in ("cuBLAS", "config()", None)}}
    report |= {"skipped": benchmark.skipped, "seconds": round(time.monotonic() - benchmark.start, 1)}
    print(f"linears of a pass at batch 1, ms: {report['pass_ms']}; {report['skipped']} skipped; {report['seconds']} s")
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(json.dumps({"device": name, **report, "rows": benchmark.rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
