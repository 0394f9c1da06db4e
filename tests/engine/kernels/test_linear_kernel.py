"""The linears of one row and of a few, against the roundings of cuBLAS and against float64."""

import pytest
import torch
from penstock.engine.kernels import linear as module
from penstock.engine.kernels.linear import MOST_ROWS, TILES, config, linear, linear_reference

from tests.support.kernel_proof import (
    DEVICE,
    DTYPES,
    STEPPED,
    adversarial,
    counted,
    poisoned,
    prove,
    prove_faster,
    prove_refusal,
    same_bits,
    within,
)
from tests.support.rounding import sums_apart

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
SHAPES += [(3072, 4096), (4096, 2048), (14336, 4096), (4096, 7168)]
SMALL = (4, 16, 4, 1)  # of one row: several turns, of which some are unrolled and one is masked
SMALL_TILE = (16, 32, 1, 3)
COUNTS = (1, 2, 8, 9, MOST_ROWS)  # rows


def kernel(x, weight, out, bias=None, blocks=None):
    module._linear_triton(x, weight, bias, out, blocks or (SMALL if len(x) == 1 else SMALL_TILE))


def reference(x, weight, out, bias=None):
    linear_reference(x, weight, bias, out)


def inputs_of(dtype, num_tokens=1, num_columns=9, width=88, bias=False):
    tensors = {
        "x": adversarial(num_tokens, width, dtype),
        "weight": adversarial(num_columns, width, dtype, seed=1),
        "bias": torch.randn(num_columns, generator=torch.Generator().manual_seed(2)).to(dtype=dtype, device=DEVICE),
        "out": poisoned((num_tokens, num_columns), dtype),
    }
    return tensors if bias else {name: t for name, t in tensors.items() if name != "bias"}


def rounded_once(tensors):
    """Asserts agreement to half an ulp of the result, and to the difference that two orders of an fp32 sum may make."""
    sizes = tensors["x"].double().nan_to_num().abs() @ tensors["weight"].double().nan_to_num().abs().t()
    if "bias" in tensors:
        sizes += tensors["bias"].double().abs()
    dtype = tensors["out"].dtype
    return within(1.01, scale=sums_apart(tensors["x"].shape[1] + 1, sizes) / torch.finfo(dtype).eps)


def counts_of(dtype):
    return COUNTS if dtype.itemsize == 2 else COUNTS[:1]


CASES = [pytest.param(dtype, count, id=f"{dtype}-{count}") for dtype in DTYPES for count in counts_of(dtype)]


@pytest.mark.tolerance
@pytest.mark.parametrize("dtype,num_tokens", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_kernel_is_the_reference(dtype, num_tokens, bias):
    tensors = inputs_of(dtype, num_tokens, num_columns=19, bias=bias)
    prove(kernel, reference, tensors, ("out",), rounded_once(tensors))


@pytest.mark.tolerance
@pytest.mark.parametrize("dtype,num_tokens", CASES)
@pytest.mark.parametrize("num_columns,width", [(1, 1), (8, 64), (17, 50)])
def test_kernel_is_near_float64(dtype, num_tokens, num_columns, width):
    tensors = inputs_of(dtype, num_tokens, num_columns, width, bias=True)
    kernel(**tensors)
    exact = tensors["x"].double() @ tensors["weight"].double().t() + tensors["bias"].double()
    rounded_once(tensors)(tensors["out"], exact)


def test_the_bias_is_added_before_the_rounding():
    """256.5 + 0.75 is 258 in bf16; 256.5 alone would be 256, and 256.75 that again."""
    x, weight = torch.ones(1, 2, device=DEVICE).bfloat16(), torch.tensor([[256.0, 0.5]], device=DEVICE).bfloat16()
    out = poisoned((1, 1), torch.bfloat16)
    kernel(x, weight, out, weight.new_full((1,), 0.75))
    assert out.item() == 258.0


@pytest.mark.tolerance
@pytest.mark.parametrize(
    "num_tokens,blocks", [(1, config(19, 600)), (1, (2, 256, 1, 3)), *TILES.items()], ids=lambda value: str(value)
)
def test_block_shapes_are_near_float64(num_tokens, blocks):
    tensors = inputs_of(torch.float16, num_tokens, width=600)
    kernel(**tensors, blocks=blocks)
    rounded_once(tensors)(tensors["out"], tensors["x"].double() @ tensors["weight"].double().t())


def test_block_shapes_fit_the_kernel():
    for num_columns, width in SHAPES:
        block_n, block_d, num_warps, num_stages = config(num_columns, width)
        assert num_columns // block_n >= 2 * 132 and num_stages >= 1
        assert block_d >= 256 * num_warps, "the warps would not all lie along D"
        assert block_n & (block_n - 1) == block_d & (block_d - 1) == 0


def test_what_the_kernel_cannot_take_is_refused():
    tensors = inputs_of(torch.float32, bias=True)
    prove_refusal(kernel, tensors, "weight", "bias")
    for name in ("x", "out"):  # of a single row, which is contiguous unless its elements lie apart
        with pytest.raises(AssertionError, match="stride"):
            kernel(**{**tensors, name: STEPPED.lay_out(tensors[name])[0]})
    prove_refusal(kernel, inputs_of(torch.bfloat16, 3), "x", "weight", "out")
    for dtype, num_tokens in ((torch.float32, 2), (torch.bfloat16, MOST_ROWS + 1)):
        with pytest.raises(AssertionError, match=f"no kernel for {num_tokens} rows"):
            kernel(**inputs_of(dtype, num_tokens))


@pytest.mark.parametrize("num_tokens", TILES)
def test_rows_do_not_depend_on_those_beside_them(num_tokens):
    """Passes that are padded within a tile have the same bits."""
    tensors = inputs_of(torch.bfloat16, num_tokens)
    kernel(**tensors)
    fewer = max((most for most in TILES if most < num_tokens), default=1) + 1
    alone = {"x": tensors["x"][:fewer], "weight": tensors["weight"], "out": poisoned((fewer, 9), torch.bfloat16)}
    kernel(**alone)
    assert same_bits(alone["out"], tensors["out"][:fewer])


def test_calls_are_counted_by_kind():
    for few in (inputs_of(torch.float32), inputs_of(torch.bfloat16, MOST_ROWS)):
        with counted(module.calls, triton=1):
            kernel(**few)
        with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
            linear(few["x"], few["weight"], None, few["out"])
    for many in (inputs_of(torch.float32, 2), inputs_of(torch.bfloat16, MOST_ROWS + 1)):
        with counted(module.calls, reference=1):
            linear(many["x"], many["weight"], None, many["out"])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, *TILES])
@pytest.mark.parametrize("num_columns,width", SHAPES)
def test_real_shapes_are_near_float64(num_columns, width, num_tokens):
    generator = torch.Generator("cuda").manual_seed(0)
    rows = {"x": num_tokens, "weight": num_columns}
    tensors = {n: torch.randn(r, width, generator=generator, device="cuda").bfloat16() for n, r in rows.items()}
    tensors["out"] = poisoned((num_tokens, num_columns), torch.bfloat16)
    linear(tensors["x"], tensors["weight"], None, tensors["out"])
    kept = torch.randint(num_columns, (4096,), generator=generator, device="cuda")  # float64 of a head is 4 GiB
    tensors |= {"weight": tensors["weight"][kept], "out": tensors["out"][:, kept]}
    rounded_once(tensors)(tensors["out"], tensors["x"].double() @ tensors["weight"].double().t())


@pytest.mark.gpu
@pytest.mark.parametrize("num_columns,width", [shape for shape in SHAPES if shape[0] * shape[1] > 50 << 20])
def test_kernel_is_faster(num_columns, width):
    """The L2 cache cannot hold these weights; scripts/bench/kernels.py rotates smaller ones."""
    weight = torch.randn(num_columns, width, dtype=torch.bfloat16, device="cuda")
    x, out = weight.new_ones(1, width), weight.new_empty(1, num_columns)
    label = f"linear {num_columns} x {width}"
    run, replaced = (lambda: linear(x, weight, None, out)), (lambda: linear_reference(x, weight, None, out))
    prove_faster(run, replaced, weight.nbytes, label)
