"""Checkpoints of several files, with the index that says which tensor is in which."""

import json

from safetensors.torch import save_file


def write_indexed(directory, shards):
    """`shards`: file name -> tensors; the index says what it should."""
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map
