"""A group as one blob: every family's and rank's spans come back bit for bit, in no more bytes than planned."""

import math
import zlib

import pytest
import torch
from penstock.engine.kernels import decompress_weights
from penstock.engine.kernels.codec_tile import TILE
from penstock.engine.model.compressed_size import PLANNED_BITS, planned_bytes
from penstock.engine.model.families import read_spec, tensor_names
from penstock.engine.model.group_layout import GroupLayout, Part, Rows, Weight
from penstock.engine.model.layout import expected_tensors, model_layout
from penstock.engine.model.shard import ShardKind
from penstock.engine.model.weight_formats import FORMATS
from penstock.engine.weights.codec import CompressedLayout
from penstock.engine.weights.compressed_group import compress_group
from penstock.engine.weights.dummy import DummyWeights
from penstock.engine.weights.host_store import load_weights
from penstock.engine.weights.kept_group import KeptGroup
from penstock.engine.weights.views import views
from penstock.scheduler.passes.pass_plan import GroupId

from tests.support.kernel_proof import DEVICE
from tests.support.layouts import by_group

GENERATOR = torch.Generator().manual_seed(0)
SIZES = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 1, "num_attention_heads": 4}
FAMILIES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True},
    "qwen2-tied": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 32},
    "gpt-neox": {"model_type": "gpt_neox"},
}


class Normal(DummyWeights):
    """Weights whose biases and norms are random too, since otherwise a lost one would not show."""

    def read_piece(self, piece, out):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{piece}".encode()))
        out.copy_(torch.randn(out.shape, generator=generator))
        return 0


def spans_of(family: str, dtype: str, tp_size: int, rank: int) -> list[tuple[GroupLayout, torch.Tensor]]:
    spec = read_spec({**SIZES, **FAMILIES[family], "vocab_size": 259, "dtype": dtype}, family)
    names = tensor_names(spec)
    layout = model_layout(spec, names, dtype, tp_size, rank)
    source = Normal(expected_tensors(spec, names))
    loaded = load_weights(source, layout, set(by_group(layout)), True, torch.device("cpu"), 1)
    return [(group, loaded.host_spans[group.id].to(DEVICE)) for group in (*layout.groups, layout.embed)]


def plain_rows(weight: Weight) -> Rows:
    part = weight.parts[0]
    return Rows(weight.name, FORMATS[part.dtype], 0, weight.num_rows, weight.num_cols, part.offset, ())


def group_of(*tensors: torch.Tensor) -> tuple[GroupLayout, torch.Tensor]:
    """A group of weights with these values, each from a multiple of 256 bytes, and its span; the gaps are poisoned."""
    weights, rows, offset = [], [], 0
    for index, tensor in enumerate(tensors):
        part = Part("data", str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset, tensor.nbytes)
        weights.append(Weight(f"w{index}", ShardKind.COLUMN, part.shape, (), parts=(part,)))
        rows.append(plain_rows(weights[-1]))
        offset = math.ceil((offset + tensor.nbytes) / 256) * 256
    layout = GroupLayout(GroupId(0, "attn"), tuple(weights), offset, tuple(rows), offset)
    span = torch.full((offset,), 0xA5, dtype=torch.uint8, device=DEVICE)
    for found, tensor in zip(views(layout, span).values(), tensors):
        found.copy_(tensor)
    return layout, span


def codes(group: KeptGroup) -> list[CompressedLayout]:
    """The code of each weight."""
    return [rows.format.layout for each in group.weights for rows in each.rows]


def round_trip(layout: GroupLayout, span: torch.Tensor) -> KeptGroup:
    """Decompresses into poisoned memory: weights are as they were, and nothing else is touched."""
    compressed, blob = compress_group(layout, span)
    assert blob.dtype == torch.uint8 and blob.device == span.device and len(blob) == compressed.nbytes
    assert compressed.nbytes % 256 == 0 and compressed.nbytes <= layout.nbytes
    assert [each.weight for each in compressed.weights] == list(layout.weights)
    out = torch.full_like(span, 0x5A)
    assert compressed.restore(blob.clone(), out, num_tokens=1) == layout.nbytes
    for weight in layout.weights:
        part = slice(weight.parts[0].offset, weight.parts[0].offset + weight.parts[0].nbytes)
        assert torch.equal(out[part], span[part]), weight.name
        out[part] = 0x5A
    assert (out == 0x5A).all()
    return compressed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_group_of_every_rank(family, tp_size):
    num_compressed = num_raw = 0
    for rank in range(tp_size):
        for layout, span in spans_of(family, "bfloat16", tp_size, rank):
            compressed = round_trip(layout, span)
            num_raw += sum(code.raw for code in codes(compressed))
            num_compressed += sum(not code.raw for code in codes(compressed))
            assert compressed.nbytes < layout.nbytes or all(code.raw for code in codes(compressed))
    assert num_compressed >= 3 * tp_size and num_raw >= 2 * tp_size


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_are_kept_as_they_are(dtype):
    for layout, span in spans_of("llama", dtype, 1, 0):
        compressed = round_trip(layout, span)
        assert all(code.raw for code in codes(compressed))
        assert compressed.nbytes <= planned_bytes(layout) <= layout.nbytes


def test_what_does_not_shrink_is_raw_beside_what_does(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, 0xA5))
    noise = torch.randint(-0x8000, 0x8000, (3, TILE), generator=GENERATOR).short().view(torch.bfloat16)
    normal = (torch.randn(5, TILE, generator=GENERATOR) * 0.02).bfloat16()
    layout, span = group_of(torch.ones(100).bfloat16(), noise, normal, torch.randn(64, 31, generator=GENERATOR))
    compressed = round_trip(layout, span)
    assert [code.raw for code in codes(compressed)] == [True, True, False, True]
    assert codes(compressed)[1].nbytes == noise.nbytes
    last = compressed.weights[3].rows[0]
    end = last.offset + last.nbytes
    assert end < compressed.nbytes and not compress_group(layout, span)[1][end:].any()


def test_a_group_without_weights_is_empty():
    assert round_trip(*group_of()) == KeptGroup((), 0)


def test_a_kernel_a_weight():
    """Counts kernels and copies: a raw weight takes a copy."""
    noise = torch.randint(-0x8000, 0x8000, (3, TILE), generator=GENERATOR).short().view(torch.bfloat16)
    layout, span = group_of(noise, *((torch.randn(2, TILE, generator=GENERATOR)).bfloat16() for _ in range(2)))
    compressed, blob = compress_group(layout, span)
    name = "triton" if DEVICE == "cuda" else "reference"
    before = decompress_weights.calls[name]
    compressed.restore(blob, span, num_tokens=1)
    assert decompress_weights.calls[name] == before + 2


def gaussian(*shape):
    return torch.randn(shape, generator=GENERATOR)


def laplace(*shape):
    return gaussian(*shape).sign() * -torch.rand(shape, generator=GENERATOR).log()


def student(*shape):
    return gaussian(*shape) * (4 / gaussian(4, *shape).square().sum(0)).sqrt()


@pytest.mark.parametrize("values", [gaussian, laplace, student], ids=lambda values: values.__name__)
@pytest.mark.parametrize("scale", [0.02, 0.013, 1.0, 3.5e-4])
def test_no_group_takes_more_than_planned(values, scale):
    """Tries weights of one tile and of a few, and with a norm, a bias and a tail; the margin grows with the tiles."""
    for num_tiles in (1, 1, 1, 1, 2, 3, 10, 40):
        matrix = values(num_tiles * 2, TILE // 2) * scale
        tensors = (matrix, matrix.flatten()[:1000], torch.ones(TILE), values(TILE + 77) * scale, torch.zeros(100))
        layout, span = group_of(*(tensor.bfloat16() for tensor in tensors))
        compressed, planned = round_trip(layout, span), planned_bytes(layout)
        assert compressed.nbytes + 0.04 / 8 * matrix.numel() <= planned <= layout.nbytes


def test_planned_bytes_of_a_large_matrix():
    part = Part("data", "bfloat16", (14336, 4096), 0, 2 * 14336 * 4096)
    weight = Weight("up", ShardKind.COLUMN, part.shape, (), parts=(part,))
    layout = GroupLayout(GroupId(0, "ffn"), (weight,), part.nbytes, (plain_rows(weight),), part.nbytes)
    tiles = 14336 * 4096 // TILE
    exactly = (PLANNED_BITS * TILE / 8 + 10) * tiles
    assert exactly <= planned_bytes(layout) <= exactly + 512  # nothing but rounding beside bits, starts and window


@pytest.mark.gpu
def test_decompression_is_captured():
    """Replays a graph into poisoned memory, and for another blob at the same address."""
    for layout, span in spans_of("llama", "bfloat16", 1, 0):
        compressed, blob = compress_group(layout, span)
        blob, out = blob.clone(), torch.full_like(span, 0x5A)
        compressed.restore(blob, out, num_tokens=1)
        graph, expected = torch.cuda.CUDAGraph(), out.clone()
        with torch.cuda.graph(graph):
            compressed.restore(blob, out, num_tokens=1)
        out.fill_(0x5A)
        graph.replay()
        assert torch.equal(out, expected) and not (out == 0x5A).all()
        blob[:1] ^= 1  # a raw weight's, or a mantissa
        graph.replay()
        assert not torch.equal(out, expected)
