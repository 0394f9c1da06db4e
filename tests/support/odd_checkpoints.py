"""Safetensors files as no library writes them: any dtype, order, padding and metadata.

`write_odd(directory)` makes a checkpoint of two such files, an index, and other files around it.
"""

import json
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file


class Raw(NamedTuple):
    """A tensor as a file has it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def bf16(*shape: int, seed: int = 0) -> Raw:
    """Gaussian weights, which shrink."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    return Raw("BF16", shape, values.bfloat16().view(-1).view(torch.uint8).numpy().tobytes())


def random_bytes(dtype: str, shape: tuple[int, ...], nbytes: int, seed: int = 0) -> Raw:
    generator = torch.Generator().manual_seed(seed)
    return Raw(dtype, shape, torch.randint(256, (nbytes,), generator=generator, dtype=torch.uint8).numpy().tobytes())


def write_file(file: Path, tensors: dict[str, Raw], metadata: dict | None = None, padding: int = 0, **dump) -> None:
    """The tensors in this order; `dump` goes to json.dumps, and as many spaces follow as `padding` says."""
    header, offset = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, **dump).encode() + b" " * padding
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(raw.data for raw in tensors.values()))


ODD = {
    "b.safetensors": {
        "bytes": random_bytes("U8", (3,), 3),  # what follows is not aligned
        "wide": bf16(200, 96),
        "scalar": random_bytes("F32", (), 4),
        "empty": Raw("BF16", (0, 96), b""),
        "noise": random_bytes("BF16", (90, 100), 18_000),  # grows when it is compressed
        "flat": bf16(7001, seed=1),
        "eight": random_bytes("F8_E4M3", (5, 5), 25),
    },
    "a.safetensors": {
        "unknown": random_bytes("F4_OF_TOMORROW", (9,), 5),
        "half": random_bytes("F16", (60, 150), 18_000),
        "cube": bf16(5, 40, 50, seed=2),
        "small": bf16(20, 50, seed=3),  # less than a tile
        "none": Raw("I64", (0,), b""),
        'a "näme" \\ 名': bf16(100, 50, seed=4),
        "float": random_bytes("F32", (40, 50), 8_000),
    },
}
CODED = {"wide", "flat", "cube", 'a "näme" \\ 名'}


def write_odd(directory: Path) -> dict[str, Raw]:
    """The checkpoint, with files beside it and below it; returns its tensors."""
    (directory / "below/empty").mkdir(parents=True)
    write_file(
        directory / "b.safetensors", ODD["b.safetensors"], {"format": "pt", "ü": "\\\n "}, padding=1001, indent=2
    )
    write_file(directory / "a.safetensors", ODD["a.safetensors"], ensure_ascii=False)
    weight_map = {name: file for file, tensors in ODD.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    (directory / "below/other.safetensors").write_bytes(b"not one")
    (directory / "below/linked").symlink_to("../config.json")
    return {name: raw for tensors in ODD.values() for name, raw in tensors.items()}


def write_indexed(directory, shards):
    """`shards`: file name -> tensors; the index says what it should."""
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map
