"""Reading of safetensors: rectangles against the safetensors library, and every way in which a checkpoint is bad."""

import json
import os
import struct
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.weights import checkpoint as checkpoint_module
from engine.weights.checkpoint import Checkpoint
from parallel.shard import Piece

SHAPES = {"a.weight": (6, 8), "b.weight": (4, 8), "norm.weight": (8,)}
IGNORABLE = (r".*\.inv_freq", r"head\.weight")


def make_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write_raw(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_indexed(directory, shards):
    """`shards`: file name -> tensors; the index says what it should."""
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


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
    places = {"z.safetensors": "norm.weight", "b.safetensors": "a.weight", "m.safetensors": "b.weight"}
    shards = {file: {name: tensors[name]} for file, name in places.items()}
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


# --- bad checkpoints: each function breaks a good one, the message names what is wrong -----------------------------


def truncated_file(directory):
    save_file(make_tensors(), directory / "model.safetensors")
    os.truncate(directory / "model.safetensors", (directory / "model.safetensors").stat().st_size - 1)


def truncated_prefix(directory):
    (directory / "model.safetensors").write_bytes(b"\x01\x02")


def long_header(directory):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def corrupt_header(directory):
    write_raw(directory / "model.safetensors", b'{"a.weight": {"dtype"')


def binary_header(directory):
    write_raw(directory / "model.safetensors", b"\xff\xfe\x00")


def no_object_header(directory):
    write_raw(directory / "model.safetensors", [1, 2])


def bad_description(directory):
    write_raw(directory / "model.safetensors", {"a.weight": {"dtype": "F32", "shape": [1, -1], "data_offsets": [0, 4]}})


def mismatched_bytes(directory):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}
    write_raw(directory / "model.safetensors", {"a.weight": entry}, bytes(8))


def overlapping(directory):
    header = {
        "a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b.weight": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    write_raw(directory / "model.safetensors", header, bytes(12))


def twice_in_a_header(directory):
    entry = b'"a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    write_raw(directory / "model.safetensors", b"{" + entry + b", " + entry + b"}", bytes(8))


def twice_in_files(directory):
    tensors = make_tensors()
    write_indexed(directory, {"1.safetensors": tensors, "2.safetensors": {"a.weight": tensors["a.weight"]}})


def missing_shard(directory):
    write_indexed(directory, {"1.safetensors": make_tensors(), "2.safetensors": {"c.weight": torch.ones(1)}})
    (directory / "2.safetensors").unlink()


def index_lies(directory):
    weight_map = write_indexed(directory, {"1.safetensors": make_tensors()}) | {"c.weight": "1.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def index_leaves_the_directory(directory):
    index = {"weight_map": {"a.weight": "../secret.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_without_map(directory):
    (directory / "model.safetensors.index.json").write_text('{"metadata": {}}')


def corrupt_index(directory):
    (directory / "model.safetensors.index.json").write_text('{"weight_map": ')


def no_safetensors(directory):
    (directory / "pytorch_model.bin").write_bytes(b"x")


def several_without_index(directory):
    save_file(make_tensors(), directory / "1.safetensors")
    save_file(make_tensors(), directory / "2.safetensors")


def missing_tensor(directory):
    save_file({"a.weight": make_tensors()["a.weight"]}, directory / "model.safetensors")


def wrong_shape(directory):
    save_file(make_tensors() | {"b.weight": torch.ones(8, 4)}, directory / "model.safetensors")


def integer_weights(directory):
    save_file(make_tensors() | {"b.weight": torch.ones(4, 8, dtype=torch.int8)}, directory / "model.safetensors")


def wrong_dtype(directory):
    save_file(make_tensors() | {"a.weight": torch.ones(6, 8, dtype=torch.float64)}, directory / "model.safetensors")


def eight_bit_floats(directory):
    weight = torch.ones(6, 8).to(torch.float8_e4m3fn)
    save_file(make_tensors() | {"a.weight": weight}, directory / "model.safetensors")


def unexpected_tensor(directory):
    save_file(make_tensors() | {"lora.weight": torch.ones(1)}, directory / "model.safetensors")


def unexpected_tensors(directory):
    save_file(make_tensors() | {f"x{i}": torch.ones(1) for i in range(8)}, directory / "model.safetensors")


def almost_ignorable(directory):
    save_file(make_tensors() | {"my.head.weight": torch.ones(1)}, directory / "model.safetensors")


BAD = [
    (truncated_file, r"model\.safetensors: truncated: (b|norm)\.weight ends at byte \d+, but the file has \d+ bytes"),
    (truncated_prefix, r"model\.safetensors: truncated: 2 bytes"),
    (long_header, r"model\.safetensors: the header is said to have 1099511627776 bytes, more than the file \(10\)"),
    (corrupt_header, r"model\.safetensors: corrupt header: "),
    (binary_header, r"model\.safetensors: corrupt header: .*utf-8"),
    (no_object_header, r"model\.safetensors: corrupt header: not a JSON object"),
    (bad_description, r"model\.safetensors: corrupt header: a\.weight is described as"),
    (mismatched_bytes, r"a\.weight of shape \(2, 2\) and dtype F32 cannot have 8 bytes"),
    (overlapping, r"corrupt header: b\.weight overlaps the bytes of a\.weight"),
    (twice_in_a_header, r"model\.safetensors: corrupt header: a\.weight is there twice"),
    (twice_in_files, r"a\.weight is there twice: in .*1\.safetensors and in .*2\.safetensors"),
    (missing_shard, r"2\.safetensors: missing shard file, named in model\.safetensors\.index\.json"),
    (index_lies, r"1\.safetensors: has no tensor c\.weight, though model\.safetensors\.index\.json says so"),
    (index_leaves_the_directory, r"'\.\./secret\.safetensors' is not in the checkpoint's directory"),
    (index_without_map, r"index\.json: corrupt: no weight_map"),
    (corrupt_index, r"index\.json: corrupt header: "),
    (no_safetensors, r"no safetensors file \(there: pytorch_model\.bin\); other formats, .*are not read"),
    (several_without_index, r"several safetensors files but no model\.safetensors\.index\.json"),
    (missing_tensor, r"2 tensor\(s\) missing from the checkpoint: b\.weight, norm\.weight"),
    (wrong_shape, r"b\.weight has shape \(8, 4\), the config asks for \(4, 8\)"),
    (integer_weights, r"dtype other than F32, BF16, F16 .*: b\.weight is I8"),
    (wrong_dtype, r"dtype other than F32, BF16, F16 .*: a\.weight is F64"),
    (eight_bit_floats, r"dtype other than F32, BF16, F16 .*: a\.weight is F8_E4M3"),
    (unexpected_tensor, r"1 tensor\(s\) that this model does not have: .*: lora\.weight$"),
    (unexpected_tensors, r"8 tensor\(s\) that this model does not have: .*: x0, x1, x2, x3, x4 and 3 more$"),
    (almost_ignorable, r"1 tensor\(s\) that this model does not have: .*: my\.head\.weight"),
]


@pytest.mark.parametrize("spoil, message", BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_bad_checkpoint_is_refused(tmp_path, spoil, message):
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_checked(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        Checkpoint.open(tmp_path / "nowhere")


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
