"""Tiny random checkpoints of every family and variant, written by transformers; and each variant switched off.

`model = write_checkpoint(directory, "llama_yarn")` writes one; VARIANTS has the names.
"""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.oracle.variants import VARIANTS

_BASE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
}


def write_checkpoint(
    directory: str | Path, variant_name: str, dtype: str = "float32", **config_overrides: Any
) -> PreTrainedModel:
    """Writes the variant's checkpoint, every second one in several files, and returns its transformers model.

    The weights depend on the variant's name and on nothing else.
    """
    variant = VARIANTS[variant_name]
    values = {**_BASE, **variant.config, **config_overrides}
    torch.manual_seed(zlib.crc32(variant_name.encode()))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(variant.model_type, **values)).float()
    _randomise(model)
    model = model.to(getattr(torch, dtype)).eval()
    sharded = list(VARIANTS).index(variant_name) % 2
    model.save_pretrained(directory, max_shard_size="500KB" if sharded else "5GB")
    return model


def write_checkpoints(folder: Path, variants: Iterable[str], **config_overrides: Any) -> Path:
    """Writes a checkpoint for each variant, in a directory of its name; returns the folder."""
    for variant in variants:
        write_checkpoint(folder / variant, variant, **config_overrides)
    return folder


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Makes every weight count: as initialised, logits are nearly flat, norms are all one and biases all zero, and
    faults would hide."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(4)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def write_off(source: str | Path, directory: str | Path, variant_name: str) -> None:
    """Writes the checkpoint in `source` with the variant switched off and everything else kept."""
    variant, source, directory = VARIANTS[variant_name], Path(source), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t for file in sorted(source.glob("*.safetensors")) for name, t in load_file(file).items()}
    if variant.off_tensors is not None:
        tensors = variant.off_tensors(tensors)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **(variant.off_config or {})}))
