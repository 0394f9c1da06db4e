"""Writes a GGUF file of the shape that a config.json says: quantised as asked, of random blocks or of zeros that take
no space on the disk.

    python -m scripts.bench.dummy_gguf benchmarks/shapes/Llama-3-8B.json /tmp/8b.gguf --type Q4_K --head-type Q6_K

It holds what `--model FILE.gguf` needs, but no tokenizer. With --sparse it is for `--load-format dummy`, which has
random blocks of its own. The last line is one JSON object.
"""

import argparse
import json
import math
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from penstock.engine.commands.flags import Parser
from penstock.engine.kernels.ggml_types import GGML_TYPES, GGMLType
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.model.layout import expected_tensors
from penstock.engine.model.spec import ModelSpec
from penstock.engine.model.weight_formats import QUANTISED
from penstock.engine.weights.dummy import small_bytes
from penstock.engine.weights.gguf_file import ALIGNMENT, MAGIC
from penstock.engine.weights.gguf_model import ARCHITECTURES, NAMES

from scripts.bench.entry import run_script
from scripts.bench.workload import positive

TYPE_IDS = {kind.name: number for number, kind in GGML_TYPES.items()}
PATTERN_BYTES = 1 << 24


def metadata(spec: ModelSpec) -> dict[str, Any]:
    arch = f"{spec.family}."
    return {
        "general.architecture": spec.family,
        arch + "block_count": spec.num_layers,
        arch + "context_length": spec.max_position,
        arch + "embedding_length": spec.hidden_size,
        arch + "feed_forward_length": spec.ffn_size,
        arch + "attention.head_count": spec.num_heads,
        arch + "attention.head_count_kv": spec.num_kv_heads,
        arch + "attention.key_length": spec.head_dim,
        arch + "attention.value_length": spec.head_dim,
        arch + "attention.layer_norm_rms_epsilon": spec.norm_eps,
        arch + "rope.freq_base": spec.rope.theta,
    }


def tensors(
    spec: ModelSpec, kind: str, head_kind: str, bf16_every: int | None
) -> Iterator[tuple[str, tuple[int, ...], GGMLType]]:
    """Every tensor: vectors are F32, embedding and head of `head_kind`, all other matrices of `kind`, or BF16 in every
    so many layers."""
    layers = range(0, spec.num_layers, bf16_every) if bf16_every else ()
    of_bf16 = tuple(NAMES.layer_prefix.format(layer_idx) for layer_idx in layers)
    for name, shape in expected_tensors(spec, NAMES).items():
        in_layer = "BF16" if name.startswith(of_bf16) else kind
        chosen = "F32" if len(shape) == 1 else head_kind if name in (NAMES.embed, NAMES.head) else in_layer
        yield name, shape, GGML_TYPES[TYPE_IDS[chosen]]


def write_gguf(
    spec: ModelSpec, file: Path, kind: str, head_kind: str, sparse: bool, bf16_every: int | None = None
) -> int:
    """Writes the file; returns its bytes. Raises OSError if it cannot be written."""
    described, offset = [], 0
    for name, shape, each in tensors(spec, kind, head_kind, bf16_every):
        described.append((name, shape, each, offset))
        offset = _aligned(offset + each.row_bytes(math.prod(shape)))
    keys = metadata(spec)
    with open(file, "wb") as stream:
        stream.write(MAGIC + struct.pack("<IQQ", 3, len(described), len(keys)))
        for name, value in keys.items():
            stream.write(_text(name) + _value(value))
        for name, shape, each, at in described:
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
            stream.write(_text(name) + dims + struct.pack("<IQ", TYPE_IDS[each.name], at))
        start = _aligned(stream.tell())
        stream.truncate(start + offset)
        if not sparse:
            _write_data(stream, start, described)
    return start + offset


def _write_data(stream: BinaryIO, start: int, described: list[tuple]) -> None:
    """Writes ones to the vectors, and one random pattern again and again to the matrices."""
    pattern = small_bytes(PATTERN_BYTES, torch.Generator().manual_seed(0)).numpy().tobytes()
    for _, shape, each, offset in described:
        stream.seek(start + offset)
        left = each.row_bytes(math.prod(shape))
        if each.name == "F32":
            stream.write(struct.pack("<f", 1.0) * (left // 4))
            continue
        while left:
            left -= stream.write(pattern[:left])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config.json")
    parser.add_argument("file", type=Path, help="the file to write")
    parser.add_argument("--type", choices=QUANTISED, default="Q4_K", help="of the matrices in the layers")
    parser.add_argument("--head-type", choices=QUANTISED, default="Q6_K", help="of embedding and head")
    text = "matrices of every N-th layer, from the first on, are BF16 instead"
    parser.add_argument("--bf16-every", type=positive, default=None, metavar="N", help=text)
    parser.add_argument("--sparse", action="store_true", help="leave the data out: zeros, without space on the disk")
    args = parser.parse_args()
    spec = read_spec(read_config(args.config), args.config)
    if spec.family not in ARCHITECTURES:
        raise ValueError(f"{args.config}: {spec.family} is no architecture of a GGUF file that is read")
    began_at_s = time.perf_counter()
    nbytes = write_gguf(spec, args.file, args.type, args.head_type, args.sparse, args.bf16_every)
    print(json.dumps({"file": str(args.file), "bytes": nbytes, "seconds": time.perf_counter() - began_at_s}))


if __name__ == "__main__":
    sys.exit(run_script(main))
