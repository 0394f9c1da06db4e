"""Every way in which a checkpoint's files can be bad: each is refused before any weight is read, by a message that
names the file or the tensor."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from engine.weights.checkpoint import Checkpoint

SHAPES = {"a.weight": (6, 8), "b.weight": (4, 8), "norm.weight": (8,)}
IGNORABLE = (r".*\.inv_freq", r"head\.weight")


def make_tensors():
    return {name: torch.ones(shape) for name, shape in SHAPES.items()}


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
        Checkpoint.open(tmp_path).check(SHAPES, IGNORABLE)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
