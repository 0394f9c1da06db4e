"""The choice of a kernel that multiplies a quantised weight: by dtype, format and the tokens of the pass."""

import json
from pathlib import Path

import pytest
import torch
from penstock.engine.compute.ops import project
from penstock.engine.kernels import linear, stored_linear, stored_matmul
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.engine.kernels.matmul_tiles import SHAPES
from penstock.engine.kernels.stored_linear import StoredMatrix, StoredRun
from penstock.engine.model.weight_formats import AS_STORED, FEW_TOKENS, MOST_FEW, format_in

from tests.support.ggml_blocks import oracle, random_blocks, stored
from tests.support.kernel_proof import counted, poisoned, within

BENCHMARKS, RECORDS = Path(__file__).parents[3] / "benchmarks", ("stored_kernels", "stored_matmul")
KINDS, NUM_ROWS, WIDTH = ("Q4_0", "Q6_K", "Q8_0"), (6, 3, 5), 512


def matrix_of(dtype: torch.dtype) -> StoredMatrix:
    """Rows of other formats, as q, k and v have them."""
    name, runs, floats, first = str(dtype).removeprefix("torch."), [], [], 0
    for kind, num_rows in zip(KINDS, NUM_ROWS):
        blocks = random_blocks(kind, num_rows * WIDTH // BY_NAME[kind].block, scale=0.1)
        data = stored(kind, blocks).view(num_rows, -1)
        runs.append(StoredRun(kind, first, data, format_in(kind, name).few_tokens))
        floats.append(oracle(kind, blocks).view(num_rows, WIDTH))
        first += num_rows
    return StoredMatrix(torch.cat(floats).to(dtype), tuple(runs), AS_STORED[name])


@pytest.mark.parametrize(
    "dtype, num_tokens, in_registers, in_tensor_cores",
    [
        *((torch.bfloat16, n, 3, 0) for n in (1, 3)),
        (torch.bfloat16, 4, 1, 2),  # Q6_K, and the others
        *((torch.bfloat16, n, 0, 3) for n in (5, 64)),
        (torch.bfloat16, 65, 0, 0),
        *((torch.float32, n, 3, 0) for n in (1, 4)),
        (torch.float32, 5, 0, 0),
        (torch.float16, 4, 3, 0),
    ],
    ids=str,
)
def test_the_tokens_of_a_pass_choose_by_format(dtype, num_tokens, in_registers, in_tensor_cores):
    """Even where the linear has fewer rows, as the head has."""
    weight, bias = matrix_of(dtype), torch.randn(sum(NUM_ROWS)).to(dtype)
    x, out = torch.randn(min(num_tokens, 2), WIDTH).to(dtype), poisoned((min(num_tokens, 2), sum(NUM_ROWS)), dtype)
    weights = {"qkv": weight, "qkv_bias": bias}
    with (
        counted(stored_linear.calls, reference=in_registers),
        counted(stored_matmul.calls, reference=in_tensor_cores),
        counted(linear.calls, reference=int(in_registers + in_tensor_cores == 0)),
    ):
        project(weights, "qkv", x, out, num_tokens)
    exact = x.double() @ weight.floats.double().t() + bias.double()
    within(1.0, scale=x.double().abs() @ weight.floats.double().abs().t())(out, exact)


@pytest.mark.parametrize("kind", SHAPES)
def test_formats_leave_registers_early_where_tensor_cores_took_less(kind):
    """In every matrix of an 8B, by the records: a tile of 8 tokens beside four in registers."""
    linears, variants = (json.loads((BENCHMARKS / f"{name}.json").read_text()) for name in RECORDS)
    few, tile = linears["linear"][kind], variants["variants"][f"{kind} x 8"]
    shape = str(tuple(SHAPES[kind][0]))
    rows = {name: few[f"{name} x {MOST_FEW}"] for name in tile if name != "a layer"}
    faster = [tile[name][shape] < row.get("us, registers", row["us"]) for name, row in rows.items()]
    assert len(faster) == 4 and all(faster) == (FEW_TOKENS.get(kind, MOST_FEW) < MOST_FEW)
