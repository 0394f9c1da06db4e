"""Measures the kernels of quantised weights (engine/kernels): each dequantiser bit for bit against the reference in
plain torch, its rate, and the rate at which the linear of few tokens reads what is stored.

    python -m scripts.bench.stored_kernels
    python -m scripts.bench.stored_kernels --variants --kinds Q4_0 Q8_0    # shapes of the linear's programs

Shapes are those of an 8B model, timed in CUDA graphs over more memory than the L2 cache holds. Rates are 1e9 bytes/s:
`written` counts floats, `moved` what is read and written, `stored` what the linear reads. Beside them stand the rates
of a copy (read and written) and of a sum, which only reads. On a CPU small shapes are checked and nothing is said of
speed. The last line is one JSON object.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.kernels.block_parts import split_parts
from penstock.engine.kernels.block_values import write_values
from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.engine.kernels.linear import linear
from penstock.engine.kernels.stored_linear import (
    Config,
    StoredRun,
    _stored_linear_triton,
    stored_linear,
    stored_linear_reference,
)
from penstock.engine.measure.rates import capture, memory_gb_s, seconds
from penstock.engine.model.weight_formats import QUANTISED
from penstock.parallel.launch import run_rank
from penstock.parallel.topology import resolve_topology
from penstock.parallel.triton_door import compiled_ahead
from penstock.scheduler.units import gb_s
from torch import Tensor

from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine

SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))
TOKENS = (1, 2, 4)
VARIANTS = ((4, 1, 1), (4, 1, 2), (4, 1, 4), (2, 1, 2), (2, 1, 4), (8, 1, 1), (4, 2, 2), (4, 4, 1))  # of stored_linear
CHECKED_WEIGHTS = 1 << 20
DTYPES = (torch.bfloat16, torch.float32)
LARGE_BYTES = 1 << 28  # more than the L2 cache holds
BEHIND = 12  # calls in a graph
MOST_SUMS = 16  # of a thread of the linear: rows times tokens


def random_stored(kind: str, num_weights: int, device: torch.device, most: int = 0x23) -> Tensor:
    """Blocks in parts, of random bytes up to `most`; up to 0x23 any two are a small fp16."""
    layout = BY_NAME[kind]
    generator = torch.Generator(device).manual_seed(0)
    size = (num_weights // layout.block, layout.nbytes)
    return torch.randint(0, most + 1, size, generator=generator, device=device, dtype=torch.uint8)


def differing_bits(kind: str, device: torch.device) -> int:
    """Weights whose bits are not the reference's, of blocks of any bits, in both dtypes; two NaNs are the same."""
    data, wrong = random_stored(kind, CHECKED_WEIGHTS, device, most=255), 0
    for dtype in DTYPES:
        ours, theirs = (torch.empty(CHECKED_WEIGHTS, dtype=dtype) for _ in range(2))
        on_device = ours.to(device)
        dequantise(kind, data, on_device)
        write_values(kind, split_parts(kind, data.cpu()), theirs)
        ours, bits = on_device.cpu(), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        wrong += int(((ours.view(bits) != theirs.view(bits)) & ~(ours.isnan() & theirs.isnan())).sum())
    return wrong


def graph_seconds(run: Callable[[int], None], device: torch.device) -> float:
    """Seconds of one call among BEHIND in a graph; `run` gets the number of the call."""

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


def time_linear(kind: str, shape: tuple[int, int], num_tokens: int, device: torch.device) -> dict[str, float]:
    """The linear over stored bits, and beside it dequantising with the linear of floats."""
    data = random_stored(kind, shape[0] * shape[1], device).view(shape[0], -1)
    own = [data.clone() for _ in range(copies(data.nbytes))]
    floats = torch.empty(shape, dtype=torch.bfloat16, device=device)
    x = torch.randn(num_tokens, shape[1], device=device).to(torch.bfloat16)
    out = torch.empty(num_tokens, shape[0], dtype=torch.bfloat16, device=device)

    def by_floats(index: int) -> None:
        dequantise(kind, own[index % len(own)], floats)
        linear(x, floats, None, out)

    run_s = graph_seconds(lambda i: stored_linear(x, [StoredRun(kind, 0, own[i % len(own)])], None, out), device)
    return {
        "stored": gb_s(data.nbytes, run_s),
        "us": run_s * 1e6,
        "us_by_floats": graph_seconds(by_floats, device) * 1e6,
    }


def copy_gb_s(device: torch.device) -> float:
    source = torch.ones(LARGE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return gb_s(2 * source.nbytes, graph_seconds(lambda index: target.copy_(source), device))


def linear_error(kind: str, num_tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest difference between the linear and its reference in fp32, in shares of the sum of absolute products;
    the results of bf16 are rounded."""
    shape = (1008, 4096)
    data = random_stored(kind, shape[0] * shape[1], device).view(shape[0], -1)
    x = torch.randn(num_tokens, shape[1], device=device).to(dtype)
    floats = torch.empty(shape, device=device)
    dequantise(kind, data, floats)
    sizes = x.float().abs() @ floats.abs().t()
    out, expected = torch.empty(num_tokens, shape[0], dtype=dtype, device=device), torch.empty_like(sizes)
    stored_linear(x, [StoredRun(kind, 0, data)], None, out)
    stored_linear_reference(x.float(), kind, data, None, expected)
    return float(((out.float() - expected).abs() / sizes).max())


def run_variant(kind: str, variant: Config, x: Tensor, own: list[Tensor], out: Tensor) -> Callable[[int], None]:
    return lambda index: _stored_linear_triton(x, kind, own[index % len(own)], None, out, variant)


def time_variants(
    kind: str, shape: tuple[int, int], num_tokens: int, device: torch.device, time: Callable = graph_seconds
) -> dict[str, float]:
    """The rate of the linear by the shape of its programs."""
    data = random_stored(kind, shape[0] * shape[1], device).view(shape[0], -1)
    own = [data.clone() for _ in range(copies(data.nbytes))]
    x = torch.randn(num_tokens, shape[1], device=device).to(torch.bfloat16)
    out = torch.empty(num_tokens, shape[0], dtype=torch.bfloat16, device=device)
    variants = [Config(*each) for each in VARIANTS if each[0] * num_tokens <= MOST_SUMS]
    runs = {str(tuple(each)): run_variant(kind, each, x, own, out) for each in variants}
    return {name: round(gb_s(data.nbytes, time(run, device))) for name, run in runs.items()}


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
    compile_ahead(lambda: [time_variants(kind, SHAPES[0], n, device, launch_once) for kind in kinds for n in tokens])
    for num_tokens in tokens:
        for kind in kinds:
            found = {str(shape): time_variants(kind, shape, num_tokens, device) for shape in SHAPES}
            record["variants"][f"{kind} x {num_tokens}"] = found
            print(kind, num_tokens, found, file=sys.stderr, flush=True)
    return record


def measure(kinds: list[str], tokens: list[int], device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        compile_ahead(lambda: check(kinds, tokens, device))
    record = check(kinds, tokens, device)
    print(record, file=sys.stderr, flush=True)
    if device.type == "cpu":
        return record
    record |= {"copy_gb_s": copy_gb_s(device), "read_gb_s": memory_gb_s(device), "dequantise": {}, "linear": {}}
    for kind in kinds:
        record["dequantise"][kind] = {str(shape): time_dequantise(kind, shape, device) for shape in SHAPES[:2]}
        print(kind, record["dequantise"][kind], file=sys.stderr, flush=True)
    for kind in kinds:
        record["linear"][kind] = {
            f"{shape} x {n}": time_linear(kind, shape, n, device) for shape in SHAPES for n in tokens
        }
        print(kind, record["linear"][kind], file=sys.stderr, flush=True)
    return record


def check(kinds: list[str], tokens: list[int], device: torch.device) -> dict[str, Any]:
    """Weights whose bits are wrong, and on a GPU the errors of the linear."""
    record: dict[str, Any] = {"differing": {kind: differing_bits(kind, device) for kind in kinds}}
    if device.type == "cuda":
        cases = [(kind, n, dtype) for kind in kinds for n in tokens for dtype in DTYPES]
        record["linear_error"] = {
            f"{kind} x {n}, {dtype}": linear_error(kind, n, dtype, device) for kind, n, dtype in cases
        }
    return record


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--kinds", nargs="+", default=list(QUANTISED), choices=QUANTISED, help="of blocks")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N", help="of the linear")
    parser.add_argument("--variants", action="store_true", help="time shapes of the linear's programs instead")
    add_output_argument(parser)
    args = parser.parse_args()
    device = resolve_topology(0, 1, 0, args.device).device
    measured = (
        measure_variants(args.kinds, args.tokens, device) if args.variants else measure(args.kinds, args.tokens, device)
    )
    keep({"benchmark": "stored_kernels", **machine(device), **measured}, args.output_json)


if __name__ == "__main__":
    sys.exit(run_rank(lambda: run_script(main)))
