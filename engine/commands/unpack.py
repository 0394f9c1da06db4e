"""`penstock unpack`: the checkpoint that `penstock pack` was given, byte for byte, all its files."""

import argparse
from pathlib import Path

from penstock.engine.commands.pack import bar
from penstock.engine.config import EngineConfig
from penstock.engine.planning.engine_plan import find_model
from penstock.engine.weights.new_directory import copy_files, new_directory, other_files
from penstock.engine.weights.packed_format import find_packed
from penstock.engine.weights.packed_metadata import read_packing
from penstock.engine.weights.unpacking import unpack_file
from penstock.parallel.topology import resolve_topology
from penstock.scheduler.units import show_bytes

CONFIG_FIELDS = ("model", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `unpack` beside the engine's own."""
    parser.add_argument("--out", metavar="DIR", required=True, help="write the original there, into an empty place")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """Raises ValueError for what is not packed or cannot be written, and naming file and tensor of what is corrupt."""
    model, out = find_model(config.model), Path(args.out)
    device = resolve_topology(0, 1, 0, config.device).device
    tensors = find_packed(model)
    if tensors is None:
        raise ValueError(f"--model {model}: is not packed")
    files = sorted({tensor.stored.file for tensor in tensors.values()})
    others = other_files(model, set(files))
    tensors_bytes = sum(tensor.original.nbytes for tensor in tensors.values())
    num_bytes = tensors_bytes + sum(8 + len(read_packing(file).text) for file in files)
    with new_directory(out, model, num_bytes + sum((model / name).stat().st_size for name in others)) as partial:
        with bar("unpacking", tensors_bytes) as shown:
            for file in files:
                unpack_file(file, partial / file.name, device, shown.update)
        copy_files(others, model, partial)
    print(f"{out}: {show_bytes(num_bytes)} of safetensors files, with their checksums")
    return 0
