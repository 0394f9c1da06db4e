"""Measures the kernels of quantised weights (engine/kernels): each dequantiser bit for bit against the reference in
plain torch, its rate, and the linears that read what is stored, beside floats first and cuBLAS over bf16.

    python -m scripts.bench.stored_kernels
    python -m scripts.bench.stored_kernels --tokens                        # the dequantisers alone
    python -m scripts.bench.stored_kernels --variants --kinds Q4_0 Q8_0    # shapes of the linears' programs

Shapes are those of an 8B model, timed in CUDA graphs over more memory than the L2 cache holds. Rates are 1e9 bytes/s:
`written` counts floats, `moved` what is read and written, `stored` what a linear reads. Beside them stand the rates
of a copy (read and written) and of a sum, which only reads. Variants are in microseconds, of each linear of a layer and
of all together. On a CPU small shapes are checked and nothing is said of speed. The last line is one JSON object.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.kernels.block_parts import split_parts
from penstock.engine.kernels.block_values import write_values
from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.engine.kernels.linear import linear
from penstock.engine.kernels.matmul_tiles import Shape
from penstock.engine.kernels.stored_linear import Config, StoredRun, _stored_linear_triton, stored_linear
from penstock.engine.kernels.stored_matmul import MOST_TOKENS, _stored_matmul_triton, stored_matmul
from penstock.engine.measure.rates import capture, memory_gb_s, seconds
from penstock.engine.model.weight_formats import AS_STORED, MOST_FEW, QUANTISED, format_in
from penstock.parallel.launch import run_rank
from penstock.parallel.topology import resolve_topology
from penstock.parallel.triton_door import compiled_ahead
from penstock.scheduler.units import gb_s
from torch import Tensor

from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine

SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))
ENDS = (SHAPES[0], SHAPES[-1])  # without and with a split of D
TOKENS = (1, 2, 4, 8, 32, 64)
LINEAR_VARIANTS = (
    *((4, warps, 1) for warps in (1, 2, 4, 8)), (4, 2, 2), (4, 4, 2), *((2, warps, 1) for warps in (2, 4, 8)),
    (2, 4, 2), (1, 4, 1), (1, 8, 1), (8, 2, 1),
)  # fmt: skip
MATMUL_VARIANTS = (
    *((64, 16, 4, stages, 528) for stages in (1, 2, 3, 4)), *((64, 16, 4, 3, programs) for programs in (264, 1056)),
    (64, 32, 4, 3, 528), (128, 16, 8, 3, 264), (128, 16, 8, 3, 528), (128, 16, 4, 3, 264), (32, 16, 2, 3, 1056),
)  # fmt: skip
CHECKED_WEIGHTS = 1 << 20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LARGE_BYTES = 1 << 28  # more than the L2 cache holds
BEHIND = 12  # calls in a graph
MOST_SUMS = 16  # of a thread of stored_linear: rows times tokens
Run = Callable[[int], None]  # gets the number of the call


def random_stored(kind: str, num_weights: int, device: torch.device, most: int = 0x23) -> Tensor:
    """Blocks in parts, of random bytes up to `most`; up to 0x23 any two are a small fp16."""
    layout = BY_NAME[kind]
    generator = torch.Generator(device).manual_seed(0)
    size = (num_weights // layout.block, layout.nbytes)
    return torch.randint(0, most + 1, size, generator=generator, device=device, dtype=torch.uint8)


def differing_bits(kind: str, device: torch.device) -> int:
    """Weights whose bits are not the reference's, of blocks of any bits, in both dtypes; two NaNs are the same."""
    data, wrong = random_stored(kind, CHECKED_WEIGHTS, device, most=255), 0
    for dtype in DTYPES.values():
        ours, theirs = (torch.empty(CHECKED_WEIGHTS, dtype=dtype) for _ in range(2))
        on_device = ours.to(device)
        dequantise(kind, data, on_device)
        write_values(kind, split_parts(kind, data.cpu()), theirs)
        ours, bits = on_device.cpu(), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        wrong += int(((ours.view(bits) != theirs.view(bits)) & ~(ours.isnan() & theirs.isnan())).sum())
    return wrong


def graph_seconds(run: Run, device: torch.device) -> float:
    """Seconds of one call among BEHIND in a graph."""

    def runs() -> None:
        for index in range(BEHIND):
            run(index)

    graph = capture(runs, device)
    run_s = seconds(graph.replay, device) / BEHIND
    graph.reset()
    return run_s


def copies(nbytes: int) -> int:
    """The number of tensors of so many bytes to take turns."""
    return min(BEHIND, -(-LARGE_BYTES // nbytes))


def time_dequantise(kind: str, shape: tuple[int, int], device: torch.device) -> dict[str, float]:
    data = random_stored(kind, shape[0] * shape[1], device)
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    own = [(data.clone(), torch.empty_like(out)) for _ in range(copies(out.nbytes))]
    run_s = graph_seconds(lambda index: dequantise(kind, *own[index % len(own)]), device)
    return {"written": gb_s(out.nbytes, run_s), "moved": gb_s(data.nbytes + out.nbytes, run_s), "us": run_s * 1e6}


def stored_copies(kind: str, shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    data = random_stored(kind, shape[0] * shape[1], device).view(shape[0], -1)
    return [data, *(data.clone() for _ in range(copies(data.nbytes) - 1))]


def run_stored(x: Tensor, kind: str, data: Tensor, out: Tensor) -> None:
    """The linear over stored bits, as the engine chooses it."""
    multiply = stored_linear if len(x) <= few_tokens(kind, x.dtype) else stored_matmul
    multiply(x, StoredRun(kind, 0, data), None, out)


def few_tokens(kind: str, dtype: torch.dtype) -> int:
    """Tokens of the largest pass that multiplies in registers."""
    return format_in(kind, str(dtype).removeprefix("torch.")).few_tokens


def runs_beside(kind: str, own: list[Tensor], x: Tensor, out: Tensor) -> dict[str, Run]:
    """The runs beside which the linear over stored bits stands: floats first, and as if the weight were bf16; of few
    tokens also in registers and through tensor cores."""
    shape = (out.shape[1], x.shape[1])
    floats = [torch.zeros(shape, dtype=x.dtype, device=x.device) for _ in range(copies(2 * shape[0] * shape[1]))]

    def by_floats(index: int) -> None:
        dequantise(kind, own[index % len(own)], floats[0])
        linear(x, floats[0], None, out)

    def stored_by(multiply: Callable[..., None]) -> Run:
        return lambda index: multiply(x, StoredRun(kind, 0, own[index % len(own)]), None, out)

    runs = {"floats first": by_floats, "bf16": lambda index: linear(x, floats[index % len(floats)], None, out)}
    if len(x) <= MOST_FEW:
        runs |= {"registers": stored_by(stored_linear), "tensor cores": stored_by(stored_matmul)}
    return runs


def operands(shape: tuple[int, int], num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and out, bf16."""
    x = torch.randn(num_tokens, shape[1], device=device).to(torch.bfloat16)
    return x, torch.empty(num_tokens, shape[0], dtype=torch.bfloat16, device=device)


def time_linear(
    kind: str, shape: tuple[int, int], num_tokens: int, device: torch.device, time: Callable = graph_seconds
) -> dict[str, float]:
    own, (x, out) = stored_copies(kind, shape, device), operands(shape, num_tokens, device)
    run_s = time(lambda index: run_stored(x, kind, own[index % len(own)], out), device)
    others = {f"us, {name}": time(run, device) * 1e6 for name, run in runs_beside(kind, own, x, out).items()}
    return {"stored": gb_s(own[0].nbytes, run_s), "us": run_s * 1e6, **others}


def copy_gb_s(device: torch.device) -> float:
    source = torch.ones(LARGE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return gb_s(2 * source.nbytes, graph_seconds(lambda index: target.copy_(source), device))


def linear_error(kind: str, num_tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of the linear over stored bits, in shares of the sum of absolute products; the results of bf16
    are rounded, and for more than few tokens its weights."""
    shape = (1008, 4096)
    data = random_stored(kind, shape[0] * shape[1], device).view(shape[0], -1)
    x = torch.randn(num_tokens, shape[1], device=device).to(dtype)
    floats = torch.empty(shape, dtype=torch.float32 if num_tokens <= few_tokens(kind, dtype) else dtype, device=device)
    dequantise(kind, data, floats)
    exact, sizes = x.double() @ floats.double().t(), x.double().abs() @ floats.double().abs().t()
    out = torch.empty(num_tokens, shape[0], dtype=dtype, device=device)
    run_stored(x, kind, data, out)
    return float(((out.double() - exact).abs() / sizes).max())


def wrong_weights(kind: str, device: torch.device) -> int:
    """Weights of stored_matmul that are not the dequantiser's: rows of x that have a single 1 give columns of them."""
    shape = (208, 4096)
    data, wrong = random_stored(kind, shape[0] * shape[1], device).view(shape[0], -1), 0
    floats = torch.empty(shape, dtype=torch.bfloat16, device=device)
    dequantise(kind, data, floats)
    for x in torch.eye(shape[1], dtype=torch.bfloat16, device=device).split(MOST_TOKENS):
        out = torch.empty(len(x), shape[0], dtype=torch.bfloat16, device=device)
        run_stored(x, kind, data, out)
        wrong += int((out != x @ floats.t()).sum())
    return wrong


def variants_of(num_tokens: int) -> dict[str, Callable[..., None]]:
    """The linear over stored bits of so many tokens, by the shape of its programs."""
    if num_tokens > MOST_FEW:
        return {str(each): partial(_stored_matmul_triton, shape=Shape(*each)) for each in MATMUL_VARIANTS}
    shapes = [each for each in LINEAR_VARIANTS if each[0] * num_tokens <= MOST_SUMS]
    return {str(each): partial(_stored_linear_triton, shape=Config(*each)) for each in shapes}


def time_variants(
    kind: str, shape: tuple[int, int], num_tokens: int, device: torch.device, time: Callable = graph_seconds
) -> dict[str, float]:
    """Microseconds by the shape of programs, and of what else there is."""
    own, (x, out) = stored_copies(kind, shape, device), operands(shape, num_tokens, device)

    def run_of(variant: Callable[..., None]) -> Run:
        return lambda index: variant(x, kind, own[index % len(own)], None, out)

    runs = {name: run_of(variant) for name, variant in variants_of(num_tokens).items()}
    runs |= runs_beside(kind, own, x, out)
    return {name: round(1e6 * time(run, device), 2) for name, run in runs.items()}


def launch_once(run: Callable[[int], None], device: torch.device) -> float:
    run(0)
    return 1.0


def compile_ahead(launch: Callable[[], Any]) -> None:
    """Compiles the kernels that it launches, several at a time."""
    with compiled_ahead(len(os.sched_getaffinity(0)), lambda: torch.cuda.set_device(0)):
        launch()


def measure_variants(kinds: list[str], tokens: list[int], device: torch.device) -> dict[str, Any]:
    record: dict[str, Any] = {"read_gb_s": memory_gb_s(device), "variants": {}}
    print(record, file=sys.stderr, flush=True)
    cases = [(kind, n) for n in tokens for kind in kinds]
    compile_ahead(lambda: [time_variants(kind, shape, n, device, launch_once) for kind, n in cases for shape in ENDS])
    for kind, num_tokens in cases:
        found = {str(shape): time_variants(kind, shape, num_tokens, device) for shape in SHAPES}
        names = found[str(SHAPES[0])]
        found["a layer"] = {name: round(sum(times[name] for times in found.values()), 1) for name in names}
        record["variants"][f"{kind} x {num_tokens}"] = found
        print(kind, num_tokens, found["a layer"], file=sys.stderr, flush=True)
    return record


def measure(kinds: list[str], tokens: list[int], device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        cases = [(kind, shape, n) for kind in kinds for shape in ENDS for n in tokens]
        compile_ahead(
            lambda: [check(kinds, tokens, device), *(time_linear(*one, device, launch_once) for one in cases)]
        )
    record = check(kinds, tokens, device)
    print(record, file=sys.stderr, flush=True)
    if device.type == "cpu":
        return record
    record |= {"copy_gb_s": copy_gb_s(device), "read_gb_s": memory_gb_s(device), "dequantise": {}, "linear": {}}
    for kind in kinds:
        record["dequantise"][kind] = {str(shape): time_dequantise(kind, shape, device) for shape in SHAPES[:2]}
        print(kind, record["dequantise"][kind], file=sys.stderr, flush=True)
    for kind in kinds if tokens else ():
        record["linear"][kind] = {
            f"{shape} x {n}": time_linear(kind, shape, n, device) for shape in SHAPES for n in tokens
        }
        print(kind, record["linear"][kind], file=sys.stderr, flush=True)
    return record


def check(kinds: list[str], tokens: list[int], device: torch.device) -> dict[str, Any]:
    """Weights whose bits are wrong, and on a GPU also those of a linear, and its errors."""
    record: dict[str, Any] = {"differing": {kind: differing_bits(kind, device) for kind in kinds}}
    if device.type == "cuda" and tokens:
        record["differing_in_linear"] = {kind: wrong_weights(kind, device) for kind in kinds}
        cases = [(kind, n, name) for kind in kinds for n in tokens for name in DTYPES if n <= AS_STORED[name]]
        record["linear_error"] = {
            f"{kind} x {n}, {name}": linear_error(kind, n, DTYPES[name], device) for kind, n, name in cases
        }
    return record


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--kinds", nargs="+", default=list(QUANTISED), choices=QUANTISED, help="of blocks")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS, metavar="N", help="of a linear, or of none")
    parser.add_argument("--variants", action="store_true", help="time shapes of the linears' programs instead")
    add_output_argument(parser)
    args = parser.parse_args()
    device = resolve_topology(0, 1, 0, args.device).device
    measured = (
        measure_variants(args.kinds, args.tokens, device) if args.variants else measure(args.kinds, args.tokens, device)
    )
    keep({"benchmark": "stored_kernels", **machine(device), **measured}, args.output_json)


if __name__ == "__main__":
    sys.exit(run_rank(lambda: run_script(main)))
