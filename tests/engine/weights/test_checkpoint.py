"""Reading of safetensors: rectangles against the safetensors library, and values that are not finite."""

import json
import os
import struct
import warnings

import pytest
import torch
from penstock.engine.model.shard import Piece
from penstock.engine.weights import checkpoint as checkpoint_module
from penstock.engine.weights.checkpoint import Checkpoint
from safetensors.torch import load_file, save_file

from tests.support.indexed_checkpoint import write_indexed

SHAPES = {"a.weight": (6, 8), "b.weight": (4, 8), "norm.weight": (8,)}
IGNORABLE = (r".*\.inv_freq", r"head\.weight")


def make_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def open_checked(directory):
    found = Checkpoint.open(directory)
    found.check(SHAPES, IGNORABLE)
    return found


def read(found, piece, dtype):
    out = torch.full((piece.num_rows, piece.num_cols), 7, dtype=dtype)
    num_read = found.read_piece(piece, out)
    return out, num_read


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("convert_bytes", [1, 64, 2**20])
def test_rectangles_equal_the_library(tmp_path, monkeypatch, file_dtype, dtype, convert_bytes):
    monkeypatch.setattr(checkpoint_module, "CONVERT_BYTES", convert_bytes)
    save_file(make_tensors(file_dtype), tmp_path / "model.safetensors")
    oracle = load_file(tmp_path / "model.safetensors")
    with open_checked(tmp_path) as found:
        for row, num_rows, col, num_cols in [(0, 6, 0, 8), (2, 3, 0, 8), (0, 6, 3, 2), (5, 1, 7, 1), (1, 4, 1, 6)]:
            piece = Piece("a.weight", row, num_rows, col, num_cols, 0)
            out, num_read = read(found, piece, dtype)
            assert torch.equal(out, oracle["a.weight"][row : row + num_rows, col : col + num_cols].to(dtype))
            assert num_read == num_rows * num_cols * file_dtype.itemsize
        out, num_read = read(found, Piece("norm.weight", 2, 5, 0, 1, 0), dtype)
        assert torch.equal(out[:, 0], oracle["norm.weight"][2:7].to(dtype))
        assert num_read == 5 * file_dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strided_destination_keeps_its_surroundings(tmp_path, dtype):
    save_file(make_tensors(), tmp_path / "model.safetensors")
    whole = torch.full((10, 11), 7, dtype=dtype)
    with open_checked(tmp_path) as found:
        found.read_piece(Piece("a.weight", 0, 6, 0, 8, 0), whole[2:8, 1:9])
    expected = torch.full((10, 11), 7, dtype=dtype)
    expected[2:8, 1:9] = make_tensors()["a.weight"].to(dtype)
    assert torch.equal(whole, expected)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    save_file(make_tensors(), tmp_path / "model.safetensors")
    whole_preadv = os.preadv
    sizes = []

    def one_third(fd, buffers, offset):
        part = buffers[0][: max(1, len(buffers[0]) // 3)]
        sizes.append(len(part))
        return whole_preadv(fd, [part], offset)

    monkeypatch.setattr(os, "preadv", one_third)
    with open_checked(tmp_path) as found:
        out, num_read = read(found, Piece("a.weight", 0, 6, 0, 8, 0), torch.float32)
    assert torch.equal(out, make_tensors()["a.weight"])
    assert sum(sizes) == num_read and len(sizes) > 3


def test_a_file_that_shrinks_or_fails_is_named(tmp_path, monkeypatch):
    save_file(make_tensors(), tmp_path / "model.safetensors")
    piece = Piece("a.weight", 0, 6, 0, 8, 0)
    with open_checked(tmp_path) as found:
        os.truncate(tmp_path / "model.safetensors", found.entries["a.weight"].offset + 10)
        with pytest.raises(ValueError, match=r"model\.safetensors: the file ends inside a\.weight"):
            read(found, piece, torch.float32)

        def broken(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(OSError, match=r"model\.safetensors: cannot read a\.weight: .*Input/output"):
            read(found, piece, torch.float32)


def test_index_and_an_other_name_are_found(tmp_path):
    tensors = make_tensors()
    (tmp_path / "indexed").mkdir()
    tensor_in = {"z.safetensors": "norm.weight", "b.safetensors": "a.weight", "m.safetensors": "b.weight"}
    shards = {file: {name: tensors[name]} for file, name in tensor_in.items()}
    write_indexed(tmp_path / "indexed", shards)
    save_file(tensors, tmp_path / "other.safetensors")
    for directory in (tmp_path / "indexed", tmp_path):
        with open_checked(directory) as found:
            for name in ("a.weight", "b.weight"):
                out, _ = read(found, Piece(name, 0, SHAPES[name][0], 0, 8, 0), torch.float32)
                assert torch.equal(out, tensors[name])


def test_ignorable_tensors_are_skipped_whatever_their_dtype(tmp_path):
    extra = {"rotary.inv_freq": torch.ones(3, dtype=torch.float64), "head.weight": torch.ones(2, 2, dtype=torch.int8)}
    save_file(make_tensors() | extra, tmp_path / "model.safetensors")
    open_checked(tmp_path).close()


def test_a_header_as_no_library_writes_it_is_read(tmp_path):
    """Reads a header that is indented and padded, with metadata, an unknown dtype, data that is not aligned, and
    tensors of no bytes."""
    tensors = {"x.inv_freq": ("F4_OF_TOMORROW", (9,), b"12345"), 'a "näme"': ("I64", (0,), b"")}
    tensors |= {"scalar": ("F32", (), b"1234"), "empty": ("BF16", (0, 96), b"")}
    tensors |= {name: ("F32", t.shape, t.numpy().tobytes()) for name, t in make_tensors().items()}
    header, data = {"__metadata__": {"ü": "\\\n "}}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header, indent=2, ensure_ascii=False).encode() + b" " * 1001
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    with Checkpoint.open(tmp_path) as found:
        assert {n: (e.dtype, e.shape, e.nbytes) for n, e in found.entries.items()} == {
            name: (dtype, tuple(shape), len(content)) for name, (dtype, shape, content) in tensors.items()
        }
        for name in ("a.weight", "b.weight"):
            out, _ = read(found, Piece(name, 0, SHAPES[name][0], 0, 8, 0), torch.float32)
            assert torch.equal(out, make_tensors()[name])


# --- values that are not finite --------------------------------------------------------------------------------------


def read_all(directory, dtype):
    with open_checked(directory) as found:
        for name in ("a.weight", "b.weight"):
            read(found, Piece(name, 0, SHAPES[name][0], 0, 8, 0), dtype)
        found.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_warned_of_once_by_name(tmp_path, dtype):
    tensors = make_tensors(dtype)
    tensors["b.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"b\.weight has NaN; the output will be wrong") as caught:
        read_all(tmp_path, dtype)
    assert len(caught) == 1 and "a.weight" not in str(caught[0].message)


def test_overflow_in_conversion_is_warned_of(tmp_path):
    tensors = make_tensors()
    tensors["a.weight"][0, 0] = 1e6
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"a\.weight has inf \(after conversion from F32 to float16\)"):
        read_all(tmp_path, torch.float16)


def test_a_sum_that_overflows_is_no_warning(tmp_path):
    tensors = make_tensors(torch.float16)
    tensors["a.weight"].fill_(6e4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert tensors["a.weight"].sum().isinf()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_all(tmp_path, torch.float16)
