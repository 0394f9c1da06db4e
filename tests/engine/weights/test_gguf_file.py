"""Headers of GGUF files: what the gguf package reads of them, and damaged ones, each refused in one line."""

import os
import struct
import sys
import tracemalloc

import gguf
import numpy
import pytest
from penstock.engine.kernels.ggml_types import GGML_TYPES
from penstock.engine.weights.gguf_file import is_gguf, read_gguf
from penstock.engine.weights.gguf_values import MAX_DEPTH
from penstock.scheduler.units import MIB

from tests.support.raw_gguf import ARRAY, BOOL, F32, STRING, U8, U32, U64, key, tensor, text, typed, whole

ARCH = key("general.architecture", STRING, "llama")
DATA = bytes(range(64)) * 2


def test_the_types_are_those_of_the_gguf_package():
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {number: tuple(kind) for number, kind in GGML_TYPES.items()} == theirs


def write(file, values, shards=0):
    writer = gguf.GGUFWriter(file, "llama", split_max_tensors=shards)
    for name, add, value in values:
        getattr(writer, f"add_{add}")(name, value)
    writer.add_tensor("a", numpy.arange(64, dtype=numpy.float32).reshape(2, 32))
    writer.add_tensor("b", numpy.arange(68, dtype=numpy.uint8).reshape(2, 34), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", numpy.arange(7, dtype=numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


VALUES = (
    ("x.uint8", "uint8", 7),
    ("x.int32", "int32", -7),
    ("x.float32", "float32", 0.5),
    ("x.float64", "float64", 0.1),
    ("x.uint64", "uint64", 2**63),
    ("x.bool", "bool", True),
    ("x.string", "string", "Übung 🙂"),
    ("x.strings", "array", ["", "a", "Ġ🙂"]),
    ("x.ints", "array", [1, -2, 3]),
    ("x.floats", "array", [0.5, -1.5]),
    ("x.lists", "array", [[1, 2], [3]]),
)


def test_a_header_is_as_the_gguf_package_writes_it(tmp_path):
    file = tmp_path / "m.gguf"
    write(file, VALUES)
    header = read_gguf(file)
    assert header.metadata == {"general.architecture": "llama", **{name: value for name, _, value in VALUES}}
    theirs = {each.name: each for each in gguf.GGUFReader(file).tensors}
    assert header.tensors.keys() == theirs.keys()
    for name, entry in header.tensors.items():
        assert (entry.dtype, entry.offset, entry.nbytes) == (
            theirs[name].tensor_type.name, int(theirs[name].data_offset), int(theirs[name].n_bytes)
        )  # fmt: skip
        assert entry.shape == tuple(map(int, theirs[name].shape[::-1]))


def test_shards_are_one_model_by_any_of_them(tmp_path):
    write(tmp_path / "m.gguf", VALUES, shards=2)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    headers = [read_gguf(file) for file in files]
    assert headers[0] == headers[1]
    assert [(name, entry.file) for name, entry in headers[0].tensors.items()] == list(
        zip("abc", [*files[:1] * 2, files[1]])
    )
    assert headers[0].metadata["x.string"] == "Übung 🙂"


def test_a_header_is_read_again_once_a_file_of_it_is_another_one(tmp_path):
    write(tmp_path / "m.gguf", VALUES, shards=2)
    file, second = sorted(tmp_path.iterdir())
    header = read_gguf(file)
    assert read_gguf(file) is header
    os.utime(second, ns=(0, 0))
    assert (again := read_gguf(file)) is not header and again == header
    with open(second, "ab") as stream:
        stream.write(b"more")
    assert read_gguf(file) is not again
    second.unlink()
    with pytest.raises(ValueError, match="00002-of-00002.gguf: missing"):
        read_gguf(file)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_data_begins_at_the_alignment_of_the_file(tmp_path, alignment):
    file = tmp_path / "m.gguf"
    content = whole([ARCH, key("general.alignment", U32, alignment)], [ONE], DATA, alignment=alignment)
    file.write_bytes(content)
    assert read_gguf(file).tensors["a"].offset == len(content) - len(DATA)


def test_a_header_is_read_without_torch(tmp_path):
    file = tmp_path / "m.gguf"
    write(file, VALUES)
    code = "import sys; from penstock.engine.weights.gguf_file import read_gguf; read_gguf(sys.argv[1]);"
    command = f"{sys.executable} -c \"{code} assert not {{'torch', 'numpy'}} & sys.modules.keys()\" {file}"
    assert os.system(command) == 0


def test_a_file_is_gguf_by_its_ending():
    assert is_gguf("a/m.gguf") and is_gguf("M.GGUF") and not is_gguf("gguf") and not is_gguf("m.gguf.json")


def nested(depth):
    value = (U8, [])
    for _ in range(depth - 1):
        value = (ARRAY, [value])
    return key("x", ARRAY, value)


ONE = tensor("a", (2, 32), 8, 0)  # Q8_0: 68 bytes
BAD = {
    "nothing": (b"", "is no GGUF file"),
    "two bytes": (b"GG", "is no GGUF file"),
    "another magic": (whole([], [], magic=b"GGML"), "is no GGUF file"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "is no GGUF file"),
    "only the magic": (b"GGUF", "truncated"),
    "version 1": (whole([], [], version=1), "version: 1 is not read"),
    "version 4": (whole([], [], version=4), "version: 4 is not read"),
    "big-endian": (whole([], [], version=3 << 24), "big-endian"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "truncated"),
    "tensors without end": (whole([ARCH], [], num_tensors=2**63), "number of tensors: 9223372036854775808"),
    "more tensors than bytes": (whole([ARCH], [], num_tensors=1000), "number of tensors: 1000"),
    "keys without end": (whole([ARCH], [], num_keys=2**64 - 1), "number of keys"),
    "more keys than bytes": (whole([ARCH], [], num_keys=1000), "number of keys: 1000"),
    "a key missing": (whole([ARCH], [], num_keys=2), "key 1"),
    "a tensor missing": (whole([ARCH], [ONE], DATA, num_tensors=2), "tensor 1"),
    "a key without a name": (whole([text("") + typed(U8, 1)], []), "key 0: its name is said to have 0 bytes"),
    "a key's name without end": (whole([struct.pack("<Q", 2**62), ARCH], [], num_keys=1), "key 0: its name"),
    "a key's name that is no text": (
        whole([text(b"\xff\xfe") + typed(U8, 1)], [], bytes(64)), "key 0: a string is not UTF-8"
    ),
    "a key's name of two lines": (whole([key("a\nb", U8, 1)], [], bytes(64)), r"key 0: its name is 'a\nb'"),
    "a name that clears the screen": (whole([ARCH], [tensor("\x1b[2J", (32,), 0, 0)], DATA), "tensor 0: its name"),
    "a key twice": (whole([ARCH, ARCH], []), "general.architecture: is there twice"),
    "an unknown type of value": (whole([text("x") + struct.pack("<IQ", 13, 0)], []), "x: there is no type of value 13"),
    "a string without end": (whole([text("x") + struct.pack("<IQ", STRING, 2**62)], []), "x: truncated"),
    "a string one byte too long": (whole([text("x") + struct.pack("<IQ", STRING, 100) + b"abc"], []), "x: truncated"),
    "a string that is no text": (whole([text("x") + typed(STRING, b"\xc3\x28")], []), "x: a string is not UTF-8"),
    "a truncated number": (whole([text("x") + struct.pack("<I", U64) + b"1"], [])[:40], "x: truncated"),
    "an array without end": (
        whole([text("x") + struct.pack("<IIQ", ARRAY, U32, 2**62)], []), "x: 4611686018427387904 values"
    ),
    "strings without end": (
        whole([text("x") + struct.pack("<IIQ", ARRAY, STRING, 2**61)], []), "x: 2305843009213693952 values"
    ),
    "an array longer than the file": (whole([text("x") + struct.pack("<IIQ", ARRAY, F32, 99)], []), "x: 99 values"),
    "an array of an unknown type": (
        whole([text("x") + struct.pack("<IIQ", ARRAY, 14, 0)], []), "x: there is no type of value 14"
    ),
    "a string in an array without end": (
        whole([text("x") + struct.pack("<IIQQQ", ARRAY, STRING, 2, 2**40, 0)], []), "x: truncated"
    ),
    "a string in an array that is no text": (
        whole([key("x", ARRAY, (STRING, [b"\x80"]))], []), "x: a string is not UTF-8"
    ),
    "arrays too deep": (whole([nested(MAX_DEPTH + 1)], []), "x: arrays are nested deeper"),
    "arrays deeper than Python": (
        whole([text("x") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000], []), "x: arrays are nested"
    ),
    "arrays of arrays without end": (
        whole([text("x") + struct.pack("<IIQ", ARRAY, ARRAY, 2**60)], []), "x: 1152921504606846976 values"
    ),
    "too many values": (whole([key("x", ARRAY, (U8, bytes(4_000_001)))], []), "x: 4000001 values, and 4000000"),
    "too many values in two arrays": (
        whole([key(name, ARRAY, (U8, bytes(2_000_001))) for name in "xy"], []), "y: 4000002 values"
    ),
    "an alignment of 0": (whole([key("general.alignment", U32, 0)], []), "general.alignment must be a power of two"),
    "an alignment of 48": (whole([key("general.alignment", U32, 48)], []), "general.alignment must be"),
    "an alignment without end": (whole([key("general.alignment", U32, 2**31)], []), "general.alignment must be"),
    "an alignment in words": (whole([key("general.alignment", STRING, "32")], []), "general.alignment must be"),
    "an alignment that is true": (whole([key("general.alignment", BOOL, True)], []), "general.alignment must be"),
    "a tensor without a name": (whole([ARCH], [tensor("", (32,), 0, 0)], DATA), "tensor 0: its name"),
    "a tensor's name without end": (whole([ARCH], [struct.pack("<Q", 2**60) + ONE], DATA), "tensor 0: its name"),
    "a tensor twice": (whole([ARCH], [ONE, ONE], DATA), "a: is there twice"),
    "no dimension": (whole([ARCH], [tensor("a", (), 0, 0)], DATA), "a: 0 dimensions"),
    "five dimensions": (whole([ARCH], [tensor("a", (1, 1, 1, 1, 32), 0, 0)], DATA), "a: 5 dimensions"),
    "dimensions without end": (whole([ARCH], [text("a") + struct.pack("<I", 2**31)], DATA), "a: 2147483648 dimensions"),
    "a dimension of 0": (whole([ARCH], [tensor("a", (0, 32), 8, 0)], DATA), "a: its shape (0, 32) cannot be"),
    "a product beyond 64 bits": (whole([ARCH], [tensor("a", (2**40, 2**40), 0, 0)], DATA), "a: its shape"),
    "half a block": (
        whole([ARCH], [tensor("a", (2, 48), 8, 0)], DATA), "a: its shape (2, 48) cannot be: a row of Q8_0"
    ),
    "a type that is none": (whole([ARCH], [tensor("a", (2, 32), 5, 0)], DATA), "a: there is no type 5"),
    "a type without end": (whole([ARCH], [tensor("a", (2, 32), 2**32 - 1, 0)], DATA), "a: there is no type 4294967295"),
    "an offset beside the alignment": (
        whole([ARCH], [tensor("a", (2, 32), 8, 8)], DATA), "a: its offset 8 is no multiple"
    ),
    "an offset behind the end": (whole([ARCH], [tensor("a", (2, 32), 8, 2**20)], DATA), "a: truncated"),
    "an offset beyond 64 bits": (whole([ARCH], [tensor("a", (2, 32), 8, 2**64 - 32)], DATA), "a: truncated"),
    "a truncated block": (whole([ARCH], [ONE], DATA[:67]), "a: truncated: it ends at byte"),
    "no data": (whole([ARCH], [ONE]), "a: truncated"),
    "tensors that overlap": (
        whole([ARCH], [tensor("a", (2, 32), 8, 0), tensor("b", (8,), 0, 64)], DATA), "b overlaps the bytes of a"
    ),
    "a shard by its key, not its name": (whole([key("split.count", U32, 2)], []), "split.count is 2"),
}  # fmt: skip


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_a_damaged_header_is_refused_in_one_line(tmp_path, content, message):
    """Takes no memory for what the header says, but a buffer and the values so far."""
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError) as raised:
        read_gguf(file)
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most_bytes < 2 * MIB + 10 * len(content)
    told = str(raised.value)
    assert told.startswith(str(file)) and message in told and "\n" not in told and len(told) < len(str(file)) + 300


def shard(number, count=2, total=2, name=None, arch="llama"):
    keys = [key("general.architecture", STRING, arch)]
    keys += [key("split.no", U32, number), key("split.count", U32, count), key("split.tensors.count", U32, total)]
    return whole(keys, [tensor(name or "ab"[number], (2, 32), 8, 0)], DATA)


BAD_SHARDS = {
    "one is missing": ([shard(0)], "00002-of-00002.gguf: missing"),
    "in another order": ([shard(1), shard(0)], "00001-of-00002.gguf: split.no is 1, and by its name it is 0"),
    "of another count": ([shard(0, 3), shard(1, 3)], "split.count is 3, and by its name it is 2"),
    "of another model by its tensors": ([shard(0), shard(1, total=3)], "split.tensors.count is another one"),
    "of another model by its architecture": ([shard(0), shard(1, arch="qwen2")], "general.architecture is another one"),
    "the same tensors": ([shard(0), shard(1, name="a")], "a is in m-00001-of-00002.gguf too"),
    "a tensor is missing": ([shard(0, total=3), shard(1, total=3)], "split.tensors.count is 3, and the shards have 2"),
}


@pytest.mark.parametrize("contents, message", BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_shards_that_are_not_one_model_are_refused(tmp_path, contents, message):
    for index, content in enumerate(contents):
        (tmp_path / f"m-{index + 1:05}-of-00002.gguf").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_directory_or_a_missing_file_is_refused(tmp_path):
    (tmp_path / "d.gguf").mkdir()
    for name, message in (("d.gguf", "is a directory"), ("m.gguf", "No such file")):
        with pytest.raises(ValueError, match=message):
            read_gguf(tmp_path / name)
