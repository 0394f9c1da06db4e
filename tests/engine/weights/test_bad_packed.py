"""Broken packed checkpoints: whatever reads them refuses them by file and tensor, and leaves nothing behind."""

import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from penstock.engine.commands.cli import main
from penstock.engine.commands.pack import pack
from penstock.engine.model.shard import Piece
from penstock.engine.planning.engine_plan import find_model
from penstock.engine.weights import packing
from penstock.engine.weights.headers import read_header_text
from penstock.engine.weights.packed_checkpoint import open_checkpoint
from penstock.engine.weights.packed_format import find_packed
from penstock.engine.weights.packed_metadata import BLOCKS, CHECKSUM, HEADER, PACKED, checksum
from penstock.engine.weights.unpacking import verify_file

from tests.support.kernel_proof import DEVICE
from tests.support.odd_checkpoints import bf16, random_bytes, write_file

HERE = torch.device(DEVICE)
SHAPE = (100, 96)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A packed checkpoint of two files, in blocks of 52 rows."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "plain").mkdir()
    files = {"1.safetensors": {"compressed": bf16(*SHAPE)}, "2.safetensors": {"raw": random_bytes("F32", (50,), 200)}}
    for file, tensors in files.items():
        write_file(directory / "plain" / file, tensors)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (directory / "plain/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_BYTES", 10_000)
        pack(directory / "plain", directory / "packed", HERE, verified=False)
    return directory


@pytest.fixture
def packed(whole, tmp_path):
    shutil.copytree(whole / "packed", tmp_path / "packed")
    return tmp_path / "packed"


def refused(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def flip(directory: Path, tensor: str, block: int, byte: int) -> None:
    found = find_packed(directory)[tensor]
    with open(found.stored.file, "r+b") as file:
        file.seek(found.blocks[block].offset + byte)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 4]))


def change_metadata(file: Path, change: Callable[[dict], None], sign: bool = True) -> None:
    """Writes the header anew, as long as it was; with the checksum that it should have then, or with the old one."""
    text = read_header_text(file)
    header = json.loads(text)
    metadata = header["__metadata__"]
    change(metadata)
    if sign:
        metadata[CHECKSUM] = checksum(metadata[HEADER], metadata[BLOCKS])
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(len(text))
    with open(file, "r+b") as stream:
        stream.write(struct.pack("<Q", len(changed)) + changed)


@pytest.mark.parametrize("byte", [0, 777, 5000])
def test_a_flipped_bit_of_a_compressed_block_is_found_by_all(packed, tmp_path, capsys, byte):
    flip(packed, "compressed", 1, byte)
    where = r"1\.safetensors: compressed, bytes 9984 to 19200: corrupt: the checksum is [0-9a-f]{8}, not "
    out = torch.empty(SHAPE, dtype=torch.bfloat16)
    with open_checkpoint(packed, HERE) as source:
        source.read_piece(Piece("compressed", 0, 52, 0, 96, 0), out[:52])  # the block before it is whole
        for row in (99, 0):
            with pytest.raises(ValueError, match=where):
                source.read_piece(Piece("compressed", row, 100 - row, 3, 1, 0), out[row:, :1])
    assert re.search(where, refused(capsys, "pack", "--model", packed, "--verify"))
    assert re.search(where, refused(capsys, "unpack", "--model", packed, "--out", tmp_path / "out"))
    assert os.listdir(tmp_path) == ["packed"]


KINDS = {  # every way in which a tensor can be kept
    "compressed": bf16(110, 96),  # its last block, of less than a tile, is raw in its blob
    "flat": bf16(7001, seed=1),
    "grows": random_bytes("BF16", (90, 100), 18_000),
    "small": bf16(20, 50, seed=3),
    "half": random_bytes("F16", (60, 150), 18_000),
    "float": random_bytes("F32", (40, 300), 48_000),
    "norm": bf16(96, seed=4),
    "bias": random_bytes("F32", (50,), 200),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kinds")
    (directory / "plain").mkdir()
    write_file(directory / "plain/model.safetensors", KINDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_BYTES", 10_000)
        pack(directory / "plain", directory / "packed", HERE, verified=False)
    return directory / "packed"


def load(directory: Path, name: str, dtype: torch.dtype, num_parts: int = 1) -> None:
    """The whole tensor, as so many ranges of columns."""
    with open_checkpoint(directory, HERE) as source:
        entry = source.entries[name]
        width = entry.num_cols // num_parts
        for part in range(num_parts):
            out = torch.empty(entry.shape[0], width, dtype=dtype)
            source.read_piece(Piece(name, 0, entry.shape[0], part * width, width, 0), out)


@pytest.mark.parametrize("name", KINDS)
def test_one_flipped_byte_of_any_tensor_is_refused_on_load_and_by_verify(kinds, tmp_path, name):
    """Whether it is converted or not, and in whichever pieces it is read; at both ends of the tensor and between."""
    shutil.copytree(kinds, tmp_path / "packed")
    stored = find_packed(kinds)[name].stored
    file, generator = tmp_path / "packed/model.safetensors", random.Random(name)
    whole = file.read_bytes()
    for place in (0, stored.nbytes - 1, *(generator.randrange(stored.nbytes) for _ in range(6))):
        flipped = bytearray(whole)
        flipped[stored.offset + place] ^= 1 << generator.randrange(8)
        file.write_bytes(flipped)
        where = (
            rf"model\.safetensors: {name}, bytes \d+ to \d+: corrupt: the checksum is [0-9a-f]{{8}}, not [0-9a-f]{{8}}"
        )
        for dtype in (torch.bfloat16, torch.float32):
            for num_parts in (1, 2) if len(KINDS[name].shape) > 1 else (1,):
                with pytest.raises(ValueError, match=where):
                    load(tmp_path / "packed", name, dtype, num_parts)
        with pytest.raises(ValueError, match=where):
            verify_file(file, None, HERE, lambda nbytes: None)
    file.write_bytes(whole)
    load(tmp_path / "packed", name, torch.float32)


def test_a_flipped_byte_of_a_packed_model_ends_the_command(tmp_path, capsys):
    """Its norms and, where there are any, its biases and tensors of fp32 are not compressed."""
    pack(find_model("demo"), tmp_path / "demo", HERE, verified=False)
    stored = find_packed(tmp_path / "demo")["model.layers.1.input_layernorm.weight"].stored
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset + 11)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1]))
    error = refused(capsys, "generate", "--model", tmp_path / "demo", "--prompt", "Return", "--device", DEVICE)
    assert "model.safetensors: model.layers.1.input_layernorm.weight, bytes 0 to" in error and "corrupt" in error


def test_a_coder_that_errs_is_found(whole, tmp_path, monkeypatch, capsys):
    """What it wrote has its checksum, and is not what was there."""
    whole_compress = packing.encode
    monkeypatch.setattr(packing, "compress", lambda weights: whole_compress(-weights))
    arguments = ("pack", "--model", whole / "plain", "--out", tmp_path / "out")
    assert "compressed, bytes 0 to 19200: corrupt: not what was packed" in refused(capsys, *arguments, "--verify")
    assert os.listdir(tmp_path) == []
    assert main([str(argument) for argument in arguments]) == 0
    error = refused(capsys, "unpack", "--model", tmp_path / "out", "--out", tmp_path / "original")
    assert "1.safetensors: compressed, bytes 0 to 19200: corrupt: not what was packed" in error


def test_another_original_is_found(whole, packed, monkeypatch):
    """The comparison with the model itself, where all checksums are right."""
    source = whole / "plain/1.safetensors"
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    (packed / "original").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"1\.safetensors: compressed does not decompress to what it is in .*/original"
    ):
        packing_verify(packed, packed / "original")
    (packed / "original").write_bytes(source.read_bytes().replace(b"compressed", b"c0ded"))
    with pytest.raises(ValueError, match=r"1\.safetensors: its header is not that of .*/original"):
        packing_verify(packed, packed / "original")


def packing_verify(packed: Path, original: Path) -> None:
    verify_file(packed / "1.safetensors", original, HERE, lambda nbytes: None)


def set_value(key: str, value: object) -> Callable[[dict], None]:
    return lambda metadata: metadata.update({key: value})


def edit_blocks(change: Callable[[dict], object]) -> Callable[[dict], None]:
    def edit(metadata: dict) -> None:
        table = json.loads(metadata[BLOCKS])
        change(table)
        metadata[BLOCKS] = json.dumps(table)

    return edit


NOT_WHOLE = r"1\.safetensors: corrupt header: what it says of the packing is not whole"
NO_SUCH_BLOCKS = r"1\.safetensors: corrupt header: compressed does not have the blocks"
OTHER_TENSORS = r"1\.safetensors: corrupt header: its tensors are not those of the original"
CHANGES = {
    "version": (set_value(PACKED, "2"), r"1\.safetensors: packed in version '2' of the format; 1 is read here"),
    "no header": (set_value(HEADER, ""), r"1\.safetensors: corrupt header: "),
    "no table": (set_value(BLOCKS, "[]"), NOT_WHOLE),
    "no JSON": (set_value(BLOCKS, "{"), NOT_WHOLE),
    "no block_bytes": (edit_blocks(lambda table: table.pop("block_bytes")), NOT_WHOLE),
    "block_bytes of 0": (edit_blocks(lambda table: table.update(block_bytes=0)), NOT_WHOLE),
    "huge blocks": (edit_blocks(lambda table: table.update(block_bytes=2**31)), NOT_WHOLE),
    "deep JSON": (set_value(BLOCKS, "[" * 1000), NOT_WHOLE),
    "huge number": (edit_blocks(lambda table: table["tensors"]["compressed"][0].__setitem__(2, 10**400)), NOT_WHOLE),
    "empty row": (edit_blocks(lambda table: table["tensors"]["compressed"][0].clear()), NOT_WHOLE),
    "negative": (edit_blocks(lambda table: table["tensors"]["compressed"][0].__setitem__(2, -1)), NOT_WHOLE),
    "no number": (edit_blocks(lambda table: table["tensors"]["compressed"][0].__setitem__(0, "1")), NOT_WHOLE),
    "a block less": (edit_blocks(lambda table: table["tensors"]["compressed"].pop()), NO_SUCH_BLOCKS),
    "other blocks": (edit_blocks(lambda table: table.update(block_bytes=192)), NO_SUCH_BLOCKS),
    "more patches": (
        edit_blocks(lambda table: table["tensors"]["compressed"][1].__setitem__(3, 10**6)),
        NO_SUCH_BLOCKS,
    ),
    "long row": (edit_blocks(lambda table: table["tensors"]["compressed"][1].append(1)), NOT_WHOLE),
    "short row": (edit_blocks(lambda table: table["tensors"]["compressed"].__setitem__(0, [7])), NO_SUCH_BLOCKS),
    "other name": (
        edit_blocks(lambda table: table.update(tensors={"c": table["tensors"]["compressed"]})),
        OTHER_TENSORS,
    ),
    "other dtype": (lambda m: m.update({HEADER: m[HEADER].replace("BF16", "F16")}), NO_SUCH_BLOCKS),
    "other original": (lambda m: m.update({HEADER: m[HEADER].replace("compressed", "c0ded")}), OTHER_TENSORS),
    "gap": (lambda m: m.update({HEADER: m[HEADER].replace("[0, 19200]", "[2, 19202]")}), OTHER_TENSORS),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_metadata_are_refused(packed, capsys, name):
    change, message = CHANGES[name]
    change_metadata(packed / "1.safetensors", change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(packed, HERE)
    assert re.search(message, refused(capsys, "pack", "--model", packed, "--verify"))


@pytest.mark.timeout(20)
def test_a_tensor_that_is_said_to_be_huge_is_refused_at_once(packed):
    """2^48 blocks of one byte, of a dtype whose size is not known; and blocks that grow as long as a sparse file."""
    file = packed / "2.safetensors"
    text = '{"raw":{"dtype":"F7","shape":[50],"data_offsets":[0,281474976710656]}}'
    change_metadata(file, lambda m: m.update({HEADER: text, BLOCKS: '{"block_bytes":1,"tensors":{"raw":[[1]]}}'}))
    with pytest.raises(ValueError, match=r"2\.safetensors: corrupt header: raw does not have the blocks"):
        open_checkpoint(packed, HERE)


@pytest.mark.parametrize("name", ["a block less", "other original", "no header"])
def test_metadata_have_a_checksum(packed, name):
    change_metadata(packed / "1.safetensors", CHANGES[name][0], sign=False)
    with pytest.raises(ValueError, match=NOT_WHOLE):
        open_checkpoint(packed, HERE)


def test_right_checksums_of_wrong_codes_are_refused(packed):
    """The decompressor would follow them out of bounds."""
    block = find_packed(packed)["compressed"].blocks[0]
    with open(packed / "1.safetensors", "r+b") as file:
        file.seek(block.offset)
        blob = torch.frombuffer(bytearray(file.read(block.stored_bytes)), dtype=torch.uint8)
        block.layout.part(blob, "codes").fill_(255)
        file.seek(block.offset)
        file.write(blob.numpy())
    right = packing.checksum(blob)
    change_metadata(
        packed / "1.safetensors", edit_blocks(lambda t: t["tensors"]["compressed"][0].__setitem__(0, right))
    )
    out = torch.empty(1, 96, dtype=torch.bfloat16)
    with (
        open_checkpoint(packed, HERE) as source,
        pytest.raises(ValueError, match="compressed, .*: corrupt: its tiles do not"),
    ):
        source.read_piece(Piece("compressed", 0, 1, 0, 96, 0), out)


def test_truncated_files_are_refused(packed, tmp_path):
    file = packed / "1.safetensors"
    with open_checkpoint(packed, HERE) as source:
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(ValueError, match=r"1\.safetensors: the file ends inside compressed: truncated"):
            source.read_piece(Piece("compressed", 99, 1, 0, 96, 0), torch.empty(1, 96, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"1\.safetensors: truncated: compressed ends at byte"):
        open_checkpoint(packed, HERE)


def test_packed_and_plain_files_do_not_mix(whole, packed, capsys):
    shutil.copyfile(whole / "plain/2.safetensors", packed / "2.safetensors")
    message = r"2\.safetensors: not packed, but 1\.safetensors beside it is"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(packed, HERE)
    assert re.search(message, refused(capsys, "pack", "--model", packed, "--out", packed.with_name("out")))
