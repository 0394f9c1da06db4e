"""Writes random weights as a real checkpoint: sharded safetensors files, their index and a config.json.

The values are those of load_format="dummy" (engine/weights/dummy.py), so loading either gives the same model.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from penstock.engine.model.families import config_file, read_config, read_spec, tensor_names
from penstock.engine.model.layout import expected_tensors
from penstock.engine.model.shard import Piece
from penstock.engine.planning.find_model import find_model
from penstock.engine.weights.dummy import DummyWeights
from penstock.engine.weights.headers import INDEX
from penstock.scheduler.units import GB
from safetensors.torch import save_file
from torch import Tensor

FILE_BYTES = 5 * GB


def write_checkpoint(model: str, seed: int, directory: Path, file_bytes: int = FILE_BYTES) -> int:
    """Writes the model that `model` (a directory or config.json) describes into `directory`, in the config's dtype and
    files of at most `file_bytes` (but at least a tensor). Returns the bytes of the tensors. Raises ValueError as
    read_config and read_spec do, OSError if the files cannot be written."""
    path = find_model(model)
    config = read_config(path)
    spec = read_spec(config, str(config_file(path)))
    shapes = expected_tensors(spec, tensor_names(spec))
    source, dtype = DummyWeights(shapes, seed), getattr(torch, spec.dtype)
    weight_map, total = {}, 0
    for number, names in enumerate(cut_files(shapes, dtype.itemsize, file_bytes)):
        file = f"model-{number:05}.safetensors"
        total += write_file(source, names, dtype, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    return total


def cut_files(shapes: Mapping[str, tuple[int, ...]], itemsize: int, file_bytes: int) -> Iterator[list[str]]:
    """Yields for each file the names of its tensors, in their order."""
    names, held = [], 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * itemsize
        if names and held + nbytes > file_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += nbytes
    yield names


def write_file(source: DummyWeights, names: list[str], dtype: torch.dtype, file: Path) -> int:
    """Writes one file, whose tensors are in memory only meanwhile; returns their bytes."""
    tensors = {name: fill(source, name, dtype) for name in names}
    save_file(tensors, file)
    return sum(tensor.nbytes for tensor in tensors.values())


def fill(source: DummyWeights, name: str, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(source.shapes[name], dtype=dtype)
    rows = tensor.view(len(tensor), -1)
    source.read_piece(Piece(name, row=0, num_rows=rows.shape[0], col=0, num_cols=rows.shape[1], to_row=0), rows)
    return tensor
