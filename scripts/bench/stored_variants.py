"""Times the linear of some tokens over stored weights (engine/kernels/stored_matmul.py) in shapes of its programs,
beside floats first and cuBLAS over bf16, and checks its weights bit for bit.

    python -m scripts.bench.stored_variants --kinds Q4_0 Q8_0 --tokens 8 32

Times are microseconds of each linear of an 8B's layer, in CUDA graphs over more memory than the L2 cache holds. The
last line is one JSON object.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.kernels import stored_matmul
from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.kernels.linear import linear
from penstock.engine.kernels.stored_matmul import Config
from penstock.engine.model.weight_formats import QUANTISED
from penstock.parallel.launch import run_rank
from penstock.parallel.topology import resolve_topology
from torch import Tensor

from scripts.bench.entry import run_script
from scripts.bench.record import add_output_argument, keep, machine
from scripts.bench.stored_kernels import SHAPES, compile_ahead, copies, graph_seconds, launch_once, random_stored

VARIANTS = (
    (64, 16, 4, 3, 528), (64, 16, 4, 3, 264), (64, 16, 4, 3, 1056), (64, 16, 4, 2, 528), (64, 16, 4, 1, 528),
    (64, 16, 4, 4, 528), (64, 32, 4, 3, 528), (128, 16, 8, 3, 264), (128, 16, 8, 3, 528), (128, 16, 4, 3, 264),
    (32, 16, 2, 3, 1056),
)  # fmt: skip
CHECKED = (208, 4096)  # rows and width of the weight that is checked
Run = Callable[[int], None]


def wrong_weights(kind: str, device: torch.device) -> int:
    """Weights that are not the dequantiser's: rows of x that have a single 1 give columns of them."""
    num_rows, width = CHECKED
    data = random_stored(kind, num_rows * width, device).view(num_rows, -1)
    floats, wrong = torch.empty(CHECKED, dtype=torch.bfloat16, device=device), 0
    dequantise(kind, data, floats)
    for first in range(0, width, stored_matmul.MOST_TOKENS):
        x = torch.eye(width, dtype=torch.bfloat16, device=device)[first : first + stored_matmul.MOST_TOKENS]
        out = torch.empty(len(x), num_rows, dtype=torch.bfloat16, device=device)
        stored_matmul._stored_matmul_triton(x, kind, data, None, out)
        wrong += int((out.t() != floats[:, first : first + len(x)]).sum())
    return wrong


def error(kind: str, num_tokens: int, device: torch.device) -> list[float]:
    """The largest errors of it and of cuBLAS over the same floats, in shares of the sum of absolute products."""
    num_rows, width = CHECKED
    data = random_stored(kind, num_rows * width, device).view(num_rows, -1)
    floats = torch.empty(CHECKED, dtype=torch.bfloat16, device=device)
    dequantise(kind, data, floats)
    x = torch.randn(num_tokens, width, device=device).to(torch.bfloat16)
    exact, sizes = x.double() @ floats.double().t(), x.double().abs() @ floats.double().abs().t()
    found = []
    for run in (
        lambda out: stored_matmul._stored_matmul_triton(x, kind, data, None, out),
        lambda out: linear(x, floats, None, out),
    ):
        out = torch.empty(num_tokens, num_rows, dtype=torch.bfloat16, device=device)
        run(out)
        found.append(float(((out.double() - exact).abs() / sizes).max()))
    return found


def times(
    kind: str, shape: tuple[int, int], num_tokens: int, device: torch.device, own: list[Tensor], time: Callable
) -> dict[str, float]:
    x = torch.randn(num_tokens, shape[1], device=device).to(torch.bfloat16)
    out = torch.empty(num_tokens, shape[0], dtype=torch.bfloat16, device=device)

    def variant(config: Config) -> Run:
        return lambda i: stored_matmul._stored_matmul_triton(x, kind, own[i % len(own)], None, out, config)

    runs = {str(each): variant(Config(*each)) for each in VARIANTS}
    return {name: round(1e6 * time(run, device), 2) for name, run in runs.items()}


def others(
    kind: str, shape: tuple[int, int], num_tokens: int, device: torch.device, own: list[Tensor]
) -> dict[str, float]:
    """Floats first."""
    x = torch.randn(num_tokens, shape[1], device=device).to(torch.bfloat16)
    out = torch.empty(num_tokens, shape[0], dtype=torch.bfloat16, device=device)
    floats = torch.empty(shape, dtype=torch.bfloat16, device=device)

    def by_floats(index: int) -> None:
        dequantise(kind, own[index % len(own)], floats)
        linear(x, floats, None, out)

    return {"floats first": round(1e6 * graph_seconds(by_floats, device), 2)}


def plain(shape: tuple[int, int], num_tokens: int, device: torch.device) -> float:
    """cuBLAS over bf16."""
    weights = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(copies(2 * shape[0] * shape[1]))]
    x = torch.randn(num_tokens, shape[1], device=device).to(torch.bfloat16)
    out = torch.empty(num_tokens, shape[0], dtype=torch.bfloat16, device=device)
    return round(1e6 * graph_seconds(lambda i: linear(x, weights[i % len(weights)], None, out), device), 2)


def stored_copies(kind: str, shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    data = random_stored(kind, shape[0] * shape[1], device).view(shape[0], -1)
    return [data] + [data.clone() for _ in range(copies(data.nbytes) - 1)]


def launch_all(kinds: list[str], tokens: list[int], device: torch.device) -> None:
    """Launches each kernel that is timed or checked."""
    for kind in kinds:
        for shape in SHAPES[0], SHAPES[3]:  # without and with a split
            own = [random_stored(kind, shape[0] * shape[1], device).view(shape[0], -1)]
            for n in tokens:
                times(kind, shape, n, device, own, launch_once)
        wrong_weights(kind, device)
        error(kind, 17, device)


def measure(kinds: list[str], tokens: list[int], device: torch.device) -> dict[str, Any]:
    record: dict[str, Any] = {"wrong": {}, "error": {}, "bf16": {}, "times": {}}
    print("compiled", file=sys.stderr, flush=True)
    for kind in kinds:
        record["wrong"][kind] = wrong_weights(kind, device)
        record["error"][kind] = error(kind, 17, device)
    print(record, file=sys.stderr, flush=True)
    record["bf16"] = {str(n): {str(shape): plain(shape, n, device) for shape in SHAPES} for n in tokens}
    print(record["bf16"], file=sys.stderr, flush=True)
    for kind in kinds:
        for shape in SHAPES:
            own = stored_copies(kind, shape, device)
            for n in tokens:
                found = times(kind, shape, n, device, own, graph_seconds) | others(kind, shape, n, device, own)
                record["times"].setdefault(f"{kind} x {n}", {})[str(shape)] = found
        for n in tokens:
            by_shape = record["times"][f"{kind} x {n}"]
            sums = {
                name: round(sum(found[name] for found in by_shape.values()), 1) for name in by_shape[str(SHAPES[0])]
            }
            sums["bf16"] = round(sum(record["bf16"][str(n)].values()), 1)
            by_shape["a layer"] = sums
            print(kind, n, sums, file=sys.stderr, flush=True)
    return record


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--kinds", nargs="+", default=["Q4_0", "Q8_0"], choices=QUANTISED, help="of blocks")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 32], metavar="N")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache")
    add_output_argument(parser)
    args = parser.parse_args()
    device = resolve_topology(0, 1, 0, args.device).device
    compile_ahead(lambda: launch_all(args.kinds, args.tokens, device))
    if args.compile_only:
        return
    keep(
        {"benchmark": "stored_variants", **machine(device), **measure(args.kinds, args.tokens, device)},
        args.output_json,
    )


if __name__ == "__main__":
    sys.exit(run_rank(lambda: run_script(main)))
