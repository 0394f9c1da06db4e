"""The linear of some tokens over a weight as it is stored: kernel and reference against float64 on the gguf package's
floats as bf16."""

import functools

import pytest
import torch
from penstock.engine.kernels import stored_matmul as module
from penstock.engine.kernels.block_words import WORDS
from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.engine.kernels.linear import linear
from penstock.engine.kernels.matmul_tiles import (
    NEAREST,
    SHAPES,
    TOKENS,
    Shape,
    partial_bytes,
    row_pairs,
    tiles_of,
)
from penstock.engine.kernels.stored_linear import StoredRun
from penstock.engine.kernels.stored_matmul import stored_matmul
from penstock.engine.model.weight_formats import AS_STORED, MOST_FEW, QUANTISED, format_in

from tests.support.ggml_blocks import oracle, random_blocks, stored
from tests.support.kernel_proof import (
    DEVICE,
    adversarial,
    counted,
    poisoned,
    prove,
    prove_faster,
    prove_refusal,
    same_bits,
    within,
)

KERNEL, REFERENCE = module._stored_matmul_triton, module.stored_matmul_reference
BF16 = torch.bfloat16


def weight_of(kind, num_rows=72, width=1280):
    """Stored rows: no multiple of a program's; the sums of a row are split over several."""
    blocks = random_blocks(kind, num_rows * width // BY_NAME[kind].block, scale=0.1)
    floats = oracle(kind, blocks).view(num_rows, width)
    return stored(kind, blocks).view(num_rows, -1).to(DEVICE), floats.to(DEVICE, BF16)


def inputs_of(num_tokens, width=1280, num_rows=72):
    x, bias = adversarial(num_tokens, width, BF16), torch.randn(num_rows).to(DEVICE, BF16)
    return {"x": x, "bias": bias, "out": poisoned((num_tokens, num_rows), BF16)}


def agree(x, floats):
    """Allows the rounding of the result, and sums in fp32."""
    sizes = x.double().abs() @ floats.double().abs().t()
    return within(1.0, scale=sizes.nan_to_num() * 2.0**-12)


def exact(x, floats, bias):
    return x.double() @ floats.double().t() + (0.0 if bias is None else bias.double())


def test_what_the_table_says_is_what_the_kernel_has():
    assert NEAREST.keys() == set(QUANTISED) and set(NEAREST.values()) == SHAPES.keys()
    assert all(len(shapes) == len(TOKENS) for shapes in SHAPES.values())
    assert AS_STORED["bfloat16"] == module.MOST_TOKENS > MOST_FEW
    without = [format_in(kind, dtype) for kind in QUANTISED for dtype in ("float16", "float32")]
    assert all(each.few_tokens == each.as_stored for each in without)  # the kernel has bf16 alone


@pytest.mark.parametrize("kind", QUANTISED)
def test_programs_cover_a_row_and_their_sums_are_planned(kind):
    for num_rows, width in ((28672, 4096), (4096, 14336), (72, 1280), (130, 256), (1, 256)):
        words = WORDS[kind]
        pairs = width // BY_NAME[kind].block * words.units * words.lanes // 2
        assert row_pairs(kind, width) == pairs
        for num_tokens in (5, 8, 9, 32, 33, 48, 64):
            tiles = tiles_of(kind, num_rows, width, num_tokens)
            assert (tiles.splits - 1) * tiles.pairs < pairs <= tiles.splits * tiles.pairs
            assert tiles.num_tiles * tiles.shape.rows >= num_rows and tiles.tokens >= num_tokens
            sums = 4 * tiles.splits * num_tokens * num_rows if tiles.splits > 1 else 0
            assert sums <= partial_bytes(kind, num_rows, width, num_tokens) <= partial_bytes(kind, num_rows, width, 64)


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("num_tokens", [8, 33])
def test_the_sums_are_those_of_the_packages_floats(kind, num_tokens):
    data, floats = weight_of(kind)
    for run, name in ((KERNEL, "triton"), (REFERENCE, "reference")):
        inputs = inputs_of(num_tokens)
        with counted(module.calls, **{name: 1}):
            run(inputs["x"], kind, data, inputs["bias"], inputs["out"])
        agree(inputs["x"], floats)(inputs["out"], exact(inputs["x"], floats, inputs["bias"]))


@pytest.mark.parametrize("kind", QUANTISED)
def test_its_weights_are_the_dequantisers(kind):
    """Bit for bit: rows of x that have a single 1 give columns of the weight."""
    data, _ = weight_of(kind, 66, 256)
    floats = torch.empty(66, 256, dtype=BF16, device=DEVICE)
    dequantise(kind, data, floats)
    for x in torch.eye(256, dtype=BF16, device=DEVICE).split(module.MOST_TOKENS):
        out = poisoned((len(x), 66), BF16)
        KERNEL(x, kind, data, None, out)
        assert same_bits(out + 0.0, x.matmul(floats.t()) + 0.0)  # zeros of one sign


def test_in_every_layout():
    data, floats = weight_of("Q4_0")
    kernel, reference = (lambda x, bias, out, run=run: run(x, "Q4_0", data, bias, out) for run in (KERNEL, REFERENCE))
    inputs = inputs_of(5)
    prove(kernel, reference, inputs, ("out",), agree(inputs["x"], floats), names=("x", "out"))
    prove_refusal(kernel, inputs, "x", "out")


@pytest.mark.parametrize("shape", sorted({shape for shapes in SHAPES.values() for shape in shapes}), ids=str)
@pytest.mark.parametrize("programs", [1, 9], ids=["whole", "split"])
def test_in_every_shape_of_programs(shape, programs):
    """Rows are walked by one program, or by several whose sums are added; without a bias too."""
    data, floats = weight_of("Q4_K")
    shape = shape._replace(programs=programs)
    assert (tiles_of("Q4_K", 72, 1280, 20, shape).splits > 1) == (programs > 1)
    for has_bias in (True, False):
        inputs = inputs_of(20)
        bias = inputs["bias"] if has_bias else None
        KERNEL(inputs["x"], "Q4_K", data, bias, inputs["out"], Shape(*shape))
        agree(inputs["x"], floats)(inputs["out"], exact(inputs["x"], floats, bias))


def test_a_token_does_not_depend_on_others_of_its_tile():
    data, _ = weight_of("Q8_0")
    inputs = inputs_of(32)
    KERNEL(inputs["x"], "Q8_0", data, inputs["bias"], inputs["out"])
    for num_tokens in (9, 17):
        out = poisoned((num_tokens, 72), BF16)
        KERNEL(inputs["x"][:num_tokens], "Q8_0", data, inputs["bias"], out)
        assert same_bits(out, inputs["out"][:num_tokens])


def test_runs_of_other_formats_make_one_weight():
    """As q, k and v have them."""
    kinds, counts = ("Q4_0", "Q8_0", "Q4_1"), (6, 3, 5)
    parts = [weight_of(kind, num_rows=n) for kind, n in zip(kinds, counts)]
    runs = [StoredRun(kind, first, data) for kind, first, (data, _) in zip(kinds, (0, 6, 9), parts)]
    inputs, floats = inputs_of(6, num_rows=14), torch.cat([floats for _, floats in parts])
    for run in runs:
        stored_matmul(inputs["x"], run, inputs["bias"], inputs["out"])
    agree(inputs["x"], floats)(inputs["out"], exact(inputs["x"], floats, inputs["bias"]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, num_tokens", [(kind, n) for kind in QUANTISED for n in TOKENS[: None if kind in SHAPES else 2]]
)
def test_the_kernel_is_faster_than_floats_first(kind, num_tokens):
    """Times weights of which neither form fits into the L2 cache; for most tokens in formats that were measured so."""
    num_rows, width = 28672, 4096
    size = (num_rows, BY_NAME[kind].row_bytes(width))
    data = torch.randint(0, 0x24, size, dtype=torch.uint8, device=DEVICE)
    floats = torch.empty(num_rows, width, dtype=BF16, device=DEVICE)
    x, out = torch.randn(num_tokens, width, device=DEVICE).to(BF16), poisoned((num_tokens, num_rows), BF16)

    def by_floats():
        dequantise(kind, data, floats)
        linear(x, floats, None, out)

    ours = functools.partial(KERNEL, x, kind, data, None, out)
    prove_faster(ours, by_floats, data.nbytes, f"stored matmul, {kind} x {num_tokens}")
