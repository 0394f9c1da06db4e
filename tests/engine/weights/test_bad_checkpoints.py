"""Bad checkpoints, in every way that their files can be bad: each is refused before any weight is read, by a message
that names the file or the tensor."""

import json
import os
import struct

import pytest
import torch
from penstock.engine.weights.checkpoint import Checkpoint
from safetensors.torch import save_file

from tests.support.indexed_checkpoint import write_indexed

SHAPES = {"a.weight": (6, 8), "b.weight": (4, 8), "norm.weight": (8,)}
IGNORABLE = (r".*\.inv_freq", r"head\.weight")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 4976698592\n"


def make_tensors():
    return {name: torch.ones(shape) for name, shape in SHAPES.items()}


def write_raw(file, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def truncated_file(directory):
    save_file(make_tensors(), directory / "model.safetensors")
    os.truncate(directory / "model.safetensors", (directory / "model.safetensors").stat().st_size - 1)


def truncated_prefix(directory):
    (directory / "model.safetensors").write_bytes(b"\x01\x02")


def long_header(directory):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def header_beyond_the_format(directory):
    """Writes a sparse file, which has as many bytes as its header says."""
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 30 * 2**30) + b"{}")
    os.truncate(directory / "model.safetensors", 31 * 2**30)


def header_just_beyond_the_format(directory):
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    os.truncate(directory / "model.safetensors", 200_000_000)


def pointer(directory):
    (directory / "model.safetensors").write_text(POINTER)


def pointer_for_a_shard(directory):
    write_indexed(directory, {"1.safetensors": make_tensors()})
    (directory / "1.safetensors").write_text(POINTER)


def pointer_for_the_index(directory):
    (directory / "model.safetensors.index.json").write_text(POINTER)


def pipe(directory):
    os.mkfifo(directory / "model.safetensors")


def pipe_for_a_shard(directory):
    write_indexed(directory, {"1.safetensors": make_tensors()})
    (directory / "1.safetensors").unlink()
    os.mkfifo(directory / "1.safetensors")


def pipe_for_the_index(directory):
    os.mkfifo(directory / "model.safetensors.index.json")


def device(directory):
    (directory / "model.safetensors").symlink_to("/dev/zero")


def device_for_the_index(directory):
    (directory / "model.safetensors.index.json").symlink_to("/dev/zero")


def dangling_link(directory):
    (directory / "model.safetensors").symlink_to("../../blobs/0123")


def directory_for_a_shard(directory):
    write_indexed(directory, {"1.safetensors": make_tensors()})
    (directory / "1.safetensors").unlink()
    (directory / "1.safetensors").mkdir()


def shard_with_a_name_that_cannot_be(directory):
    index = {"weight_map": {"a.weight": "a\0b.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def deep_header(directory):
    write_raw(directory / "model.safetensors", b'{"a":' * 100_000)


def deep_index(directory):
    (directory / "model.safetensors.index.json").write_text("[" * 100_000)


def huge_number(directory):
    write_raw(directory / "model.safetensors", b'{"a.weight": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b"]}}")


def infinite_number(directory):
    write_raw(directory / "model.safetensors", b'{"a.weight": {"dtype": "F32", "shape": [1e999]}}')


def many_dims(directory):
    entry = {"dtype": "F32", "shape": [2**63] * 100_000, "data_offsets": [0, 4]}
    write_raw(directory / "model.safetensors", {"a.weight": entry}, bytes(4))


def long_name(directory):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_raw(directory / "model.safetensors", {"a" * 10**6: entry}, bytes(4))


def index_of_a_long_name(directory):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a" * 10**6: "1.safetensors"}}))


def many_files(directory):
    for index in range(50):
        (directory / f"{index:02}.bin").touch()


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


def one_shard_without_index(directory):
    save_file(make_tensors(), directory / "model-00001-of-00002.safetensors")


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


def packed(directory):
    """Writes a checkpoint as earlier versions packed it, where a compressed tensor is 1-D bytes."""
    tensors = make_tensors() | {"a.weight": torch.ones(70, dtype=torch.uint8)}
    save_file(tensors, directory / "other.safetensors", metadata={"penstock_packed": "1"})


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
    (header_beyond_the_format, r"is said to have 32212254720 bytes, more than is read of a header \(67108864\)"),
    (header_just_beyond_the_format, r"is said to have 100000001 bytes, more than is read of a header \(67108864\)"),
    (pointer, r"model\.safetensors: is a git-lfs pointer.* `git lfs pull`"),
    (pointer_for_a_shard, r"1\.safetensors: is a git-lfs pointer"),
    (pointer_for_the_index, r"index\.json: is a git-lfs pointer"),
    (pipe, r"model\.safetensors: is a pipe, and a file is expected"),
    (pipe_for_a_shard, r"1\.safetensors: is a pipe, and a file is expected"),
    (pipe_for_the_index, r"index\.json: is a pipe, and a file is expected"),
    (device, r"model\.safetensors: is a device, and a file is expected"),
    (device_for_the_index, r"index\.json: is a device, and a file is expected"),
    (dangling_link, r"model\.safetensors: No such file or directory"),
    (directory_for_a_shard, r"1\.safetensors: is a directory, and a file is expected"),
    (shard_with_a_name_that_cannot_be, r"missing shard file, named in model\.safetensors\.index\.json"),
    (deep_header, r"model\.safetensors: corrupt header: is nested deeper than 64"),
    (deep_index, r"index\.json: is nested deeper than 64"),
    (huge_number, r"corrupt header: a\.weight\.shape\.0 is 10+\.\.\. \(5001 characters\), a number that is too large"),
    (infinite_number, r"corrupt header: a\.weight\.shape\.0 is 1e999, a number that is too large"),
    (many_dims, r"corrupt header: a\.weight is described as .{,200}$"),
    (long_name, r"corrupt header: a tensor's name has 1000000 characters, more than 1000$"),
    (index_of_a_long_name, r"index\.json: corrupt: a tensor's name has 1000000 characters, more than 1000$"),
    (many_files, r"no safetensors file \(there: 00\.bin, .*, 19\.bin and \d+ more\)"),
    (corrupt_header, r"model\.safetensors: corrupt header: "),
    (binary_header, r"model\.safetensors: corrupt header: .*utf-8"),
    (no_object_header, r"model\.safetensors: corrupt header: not a JSON object"),
    (bad_description, r"model\.safetensors: corrupt header: a\.weight is described as"),
    (mismatched_bytes, r"a\.weight of shape \(2, 2\) and dtype F32 cannot have 8 bytes"),
    (overlapping, r"corrupt header: b\.weight overlaps the bytes of a\.weight"),
    (twice_in_a_header, r"model\.safetensors: corrupt header: 'a\.weight' is there twice"),
    (twice_in_files, r"a\.weight is there twice: in .*1\.safetensors and in .*2\.safetensors"),
    (missing_shard, r"2\.safetensors: missing shard file, named in model\.safetensors\.index\.json"),
    (index_lies, r"1\.safetensors: has no tensor c\.weight, though model\.safetensors\.index\.json says so"),
    (index_leaves_the_directory, r"'\.\./secret\.safetensors' is not in the checkpoint's directory"),
    (index_without_map, r"index\.json: corrupt: no weight_map"),
    (corrupt_index, r"index\.json: is not JSON: "),
    (no_safetensors, r"no safetensors file \(there: pytorch_model\.bin\); other formats, .*are not read"),
    (several_without_index, r"several safetensors files but no model\.safetensors\.index\.json"),
    (one_shard_without_index, r"model-00001-of-00002\.safetensors is one shard of several, but no model\.safetens"),
    (missing_tensor, r"2 tensor\(s\) missing from the checkpoint: b\.weight, norm\.weight"),
    (wrong_shape, r"b\.weight has shape \(8, 4\), the config asks for \(4, 8\) \(model\.safetensors\)$"),
    (packed, r"a\.weight has shape \(70,\), the config asks for \(6, 8\) \(other\.safetensors\)$"),
    (integer_weights, r"dtype other than F32, BF16, F16 .*: b\.weight is I8 \(model\.safetensors\)$"),
    (wrong_dtype, r"dtype other than F32, BF16, F16 .*: a\.weight is F64"),
    (eight_bit_floats, r"dtype other than F32, BF16, F16 .*: a\.weight is F8_E4M3"),
    (unexpected_tensor, r"1 tensor\(s\) that this model does not have: .*: lora\.weight$"),
    (unexpected_tensors, r"8 tensor\(s\) that this model does not have: .*: x0, x1, x2, x3, x4 and 3 more$"),
    (almost_ignorable, r"1 tensor\(s\) that this model does not have: .*: my\.head\.weight"),
]


@pytest.mark.parametrize("spoil, message", BAD, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.timeout(20)
def test_bad_checkpoint_is_refused(tmp_path, spoil, message):
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        Checkpoint.open(tmp_path).check(SHAPES, IGNORABLE)


def test_no_directory(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
