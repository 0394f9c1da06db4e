"""Packed checkpoints: the original comes back byte for byte, and what is read from one is what the original has."""

import filecmp
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.engine.commands.cli import main
from penstock.engine.commands.pack import pack
from penstock.engine.kernels import decompress_weights
from penstock.engine.model.families import read_config, read_spec, tensor_names
from penstock.engine.model.layout import expected_tensors, model_layout
from penstock.engine.model.shard import Piece
from penstock.engine.planning.engine_plan import find_model
from penstock.engine.weights import packing
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.host_store import load_weights
from penstock.engine.weights.packed_checkpoint import PackedCheckpoint, open_checkpoint
from penstock.engine.weights.packed_format import find_packed
from safetensors import safe_open

from penstock import LLM, SamplingParams
from tests.support.kernel_proof import DEVICE, same_bits
from tests.support.odd_checkpoints import CODED, ODD, Raw, bf16, random_bytes, write_file, write_odd
from tests.support.oracle.checkpoints import write_checkpoint

CPU, HERE = torch.device("cpu"), torch.device(DEVICE)
BLOCK_BYTES = 10_000  # 52 rows of 96


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_BYTES", BLOCK_BYTES)


@pytest.fixture
def odd(tmp_path):
    """An odd checkpoint, packed: (original, packed)."""
    write_odd(tmp_path / "odd")
    pack(tmp_path / "odd", tmp_path / "packed", HERE, verified=True)
    return tmp_path / "odd", tmp_path / "packed"


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def assert_unpacks(packed: Path, original: Path) -> None:
    out = packed.with_name("unpacked")
    assert main(["unpack", "--model", str(packed), "--out", str(out)]) == 0
    assert files_of(out) == files_of(original)
    assert filecmp.cmpfiles(original, out, files_of(original), shallow=False)[1:] == ([], [])


def test_the_original_comes_back(odd):
    original, packed = odd
    assert files_of(packed) == files_of(original)
    assert_unpacks(packed, original)
    tensors = find_packed(packed)
    assert {name for name, tensor in tensors.items() if tensor.compressed} == CODED
    assert [block.layout.shape for block in tensors["wide"].blocks] == [(52, 96)] * 3 + [(44, 96)]
    assert [block.layout.shape for block in tensors["cube"].blocks] == [(2, 2000), (2, 2000), (1, 2000)]
    assert [block.layout.raw for block in tensors["flat"].blocks] == [False, True]  # the last is less than a tile


def test_the_library_opens_packed_files(odd):
    """And finds tensors where the index says, the raw ones as they were."""
    original, packed = odd
    (packed / "a.safetensors").rename(packed / "a.packed")  # with a dtype that the library does not know
    with safe_open(packed / "b.safetensors", "pt") as found, safe_open(original / "b.safetensors", "pt") as expected:
        assert set(found.keys()) == set(ODD["b.safetensors"])
        for name in ODD["b.safetensors"]:
            assert name in CODED or same_bits(found.get_tensor(name), expected.get_tensor(name)), name
        wide = found.get_tensor("wide")
        assert (
            wide.dtype == torch.uint8 and wide.ndim == 1 and len(wide) < 0.75 * len(ODD["b.safetensors"]["wide"].data)
        )


DTYPES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I64": 8}


@settings(max_examples=25)
@given(st.data())
def test_any_file_comes_back(tmp_path_factory, data):
    tensors = {}
    for name in data.draw(st.lists(st.text(max_size=5), max_size=5, unique=True)):
        shape = tuple(data.draw(st.lists(st.integers(0, 90), max_size=3)))
        dtype = data.draw(st.sampled_from(["shrinks", *DTYPES]))
        itemsize = DTYPES.get(dtype, 2)
        shape = shape if math.prod(shape) < 40_000 else shape[:2]
        raw = bf16(*shape) if dtype == "shrinks" else random_bytes(dtype, shape, itemsize * math.prod(shape))
        tensors[name] = raw
    tensors = {name.replace("__metadata__", "") or "x": raw for name, raw in tensors.items()} or {"x": bf16(3)}
    directory = tmp_path_factory.mktemp("any")
    (directory / "plain").mkdir()
    metadata = data.draw(st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2))
    dump = {"indent": data.draw(st.sampled_from([None, 1])), "ensure_ascii": data.draw(st.booleans())}
    write_file(directory / "plain/model.safetensors", tensors, metadata, data.draw(st.integers(0, 20)), **dump)
    pack(directory / "plain", directory / "packed", CPU, verified=True)
    assert_unpacks(directory / "packed", directory / "plain")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["wide", "noise", "half", "flat"])
def test_rectangles_are_the_original_s(odd, name, dtype):
    original, packed = odd
    with Checkpoint.open(original) as plain, open_checkpoint(packed, HERE) as source:
        entry = plain.entries[name]
        assert isinstance(source, PackedCheckpoint)
        assert (source.entries[name].dtype, source.entries[name].shape) == (entry.dtype, entry.shape)
        rows, cols = entry.shape[0], entry.num_cols
        corners = [(0, rows, 0, cols), (51, 2, 0, cols), (rows - 1, 1, cols - 1, 1), (40, 12, cols // 2, 1)]
        for row, num_rows, col, num_cols in corners:
            piece = Piece(name, row, num_rows, col, num_cols, 0)
            found, expected = (torch.full((num_rows, num_cols + 3), 7, dtype=dtype) for _ in range(2))
            plain.read_piece(piece, expected[:, 1 : 1 + num_cols])
            source.read_piece(piece, found[:, 1 : 1 + num_cols])
            assert same_bits(found, expected)


def test_only_the_blocks_are_read_that_a_piece_touches(odd):
    _, packed = odd
    sizes = [block.stored_bytes for block in find_packed(packed)["wide"].blocks]
    out = torch.empty(200, 96, dtype=torch.bfloat16)
    with open_checkpoint(packed, HERE) as source:
        read = [source.read_piece(Piece("wide", row, n, 8, 16, 0), out[:n, :16]) for row, n in
                [(0, 52), (20, 3), (51, 2), (60, 1), (156, 44), (199, 1), (0, 200)]]  # fmt: skip
    assert read == [sizes[0], 0, sizes[1], 0, sizes[3], 0, sum(sizes)]


@pytest.mark.parametrize("variant", ["llama_gqa", "qwen3", "neox_parallel"])
def test_every_rank_loads_the_same(tmp_path, variant):
    write_checkpoint(tmp_path / "plain", variant, "bfloat16")
    packed = pack(tmp_path / "plain", tmp_path / "packed", HERE, verified=False)
    assert packed.num_raw < packed.num_tensors and packed.weights_bytes < 1.6 * packed.num_weights
    spec = read_spec(read_config(tmp_path / "plain"), variant)
    names = tensor_names(spec)
    for tp_size, dtype in ((1, "bfloat16"), (1, "float32"), (2, "bfloat16"), (4, "bfloat16")):
        for rank in range(tp_size):
            layout = model_layout(spec, names, dtype, tp_size, rank)
            spans = []
            for directory in (tmp_path / "plain", tmp_path / "packed"):
                with open_checkpoint(directory, HERE) as source:
                    source.check(expected_tensors(spec, names), names.ignorable)
                    loaded = load_weights(source, layout, {layout.groups[0].id}, True, HERE, 2)
                groups = {**loaded.host_spans, **loaded.resident}
                spans.append({group: span.cpu().clone() for group, span in groups.items()})
                loaded.close()
            assert spans[0].keys() == spans[1].keys()
            for group, span in spans[0].items():
                assert torch.equal(span, spans[1][group]), (tp_size, rank, group)


def test_values_that_are_not_finite_are_found_in_compressed_blocks(tmp_path):
    (tmp_path / "plain").mkdir()
    raw = bf16(100, 96)
    data = bytearray(raw.data)
    data[2 * 96 * 77 : 2 * 96 * 77 + 2] = b"\x81\x7f"  # a NaN with a payload
    write_file(tmp_path / "plain/model.safetensors", {"w": Raw(raw.dtype, raw.shape, bytes(data))})
    pack(tmp_path / "plain", tmp_path / "packed", HERE, verified=True)
    out = torch.empty(100, 96, dtype=torch.bfloat16)
    with open_checkpoint(tmp_path / "packed", HERE) as source:
        source.read_piece(Piece("w", 0, 100, 0, 96, 0), out)
        assert out.view(torch.int16)[77, 0] == 0x7F81
        with pytest.warns(UserWarning, match="w has NaN"):
            source.finish()


@pytest.mark.parametrize("resident", ["all", "none"])
def test_a_packed_model_generates_the_same(tmp_path, resident):
    pack(find_model("demo"), tmp_path / "demo", HERE, verified=False)
    options = {"resident": resident, "max_model_len": 64, "device": DEVICE}
    decompressed, outputs = sum(decompress_weights.calls.values()), []
    for model in ("demo", str(tmp_path / "demo")):
        with LLM(model, **options) as llm:
            params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
            (output,) = llm.generate("Return the", params)
            outputs.append(json.dumps(output.to_dict()["outputs"]))
    assert outputs[0] == outputs[1]
    assert sum(decompress_weights.calls.values()) - decompressed >= 29  # blocks, of as many compressed tensors
