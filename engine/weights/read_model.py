"""A model as all its files say it: config.json, the checkpoint's headers, and what states that weights are quantised.

Torch-free, so that `penstock plan` knows what the engine will. The headers decide what config.json leaves open or gets
wrong: the dtype where it names none, whether a tied model has a head of its own all the same (transformers reads it
then, if it differs from the embedding), and under which of a family's names the tensors are.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.engine.model.config_fields import FROM_GGUF_ALONE, states_dtype
from penstock.engine.model.families import FAMILIES, config_file, read_config, read_spec, tensor_names, without_prefix
from penstock.engine.model.layout import expected_tensors
from penstock.engine.model.spec import ModelSpec, TensorNames
from penstock.engine.user_files import open_file, read_json
from penstock.engine.weights.gguf_file import MAGIC, is_gguf, read_gguf
from penstock.engine.weights.gguf_model import read_gguf_spec
from penstock.engine.weights.headers import (
    DTYPES,
    MAX_NAMED,
    TensorEntry,
    check_entries,
    find_entries,
    gguf_names,
    has_weights,
    listed,
)
from penstock.scheduler.units import MIB, show_value

COMPARED_BYTES = 8 * MIB  # compared at a time
# Beside config.json: files that state a quantisation, and their fields that name it where they are not null.
QUANTISED = {
    "hf_quant_config.json": ("quant_algo", "kv_cache_quant_algo"),
    "quantize_config.json": ("bits",),
    "quant_config.json": ("bits", "w_bit"),
}
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Files of a directory without config.json, and what it is by them.
_FOREIGN = {
    "model_index.json": "is a pipeline of diffusers, and no language model",
    "params.json": "has a model in its maker's own format: give the directory in that of transformers",
}


@dataclass(frozen=True)
class Model:
    """A model's spec. `notes` say, each on a line, what config.json leaves open or states otherwise, and what was taken
    for it."""

    spec: ModelSpec
    notes: tuple[str, ...] = ()


def read_model(path: str | Path, dummy: bool = False) -> Model:
    """The model of a checkpoint's directory or of a GGUF file; with `dummy` that of a config.json, or of the one in a
    directory, whatever lies beside it. Raises ValueError as read_spec, find_entries and read_gguf_spec do, and, naming
    the file, for weights of a directory that are quantised or lack their head."""
    path = Path(path)
    if is_gguf(path):
        return Model(read_gguf_spec(path))
    told = _read_config(path)
    return _as_configured(path, *told) if dummy else _as_stored(path, find_entries(path), *told)


def read_model_to_plan(path: str | Path, dummy: bool = False) -> Model:
    """The model as read_model gives it, or, where there are no weights or they cannot be loaded, that of config.json
    alone (of a GGUF file, that of its metadata and types) with a note. Raises ValueError as read_model does for that
    alone."""
    path = Path(path)
    if is_gguf(path):
        model, has_tensors = Model(read_gguf_spec(path)), True
    else:
        told = _read_config(path)
        model, has_tensors = _as_configured(path, *told), path.is_dir() and has_weights(path)
    if dummy or not has_tensors:
        return model
    try:
        if is_gguf(path):
            entries, stored = read_gguf(path).tensors, model
        else:
            entries = find_entries(path)
            stored = _as_stored(path, entries, *told)
        names, dtypes = tensor_names(stored.spec), {*DTYPES, *(kind for _, kind in stored.spec.formats)}
        check_entries(path, entries, expected_tensors(stored.spec, names), names.ignorable, dtypes)
        return stored
    except ValueError as error:
        return replace(model, notes=(*model.notes, f"planned without the weights, which cannot be loaded: {error}"))


def check_files(path: Path, dummy: bool = False) -> None:
    """Raises ValueError for a model that no engine could start with, as read_model does. A config.json alone is left to
    the engine, which says how it may be given."""
    if path.is_dir() or is_gguf(path) or dummy:
        read_model(path, dummy)
    else:
        read_model_to_plan(path)


def check_there(path: Path) -> None:
    """Raises ValueError, with what to give instead, for a file of weights, for the directory of an adapter, and for a
    directory without a config.json."""
    if not path.is_dir():
        if not is_gguf(path):
            _refuse_weights(path)
        return
    if (path / "adapter_config.json").exists():
        told = "an adapter is not read: merge it into its model and give that one (if that is done, remove this file)"
        raise ValueError(f"{path / 'adapter_config.json'}: {told}")
    if os.path.lexists(config_file(path)):
        return
    if found := gguf_names(path):
        raise ValueError(f"{path}: has no config.json, but {listed(found, MAX_NAMED)}: give the GGUF file itself")
    for name, told in _FOREIGN.items():
        if (path / name).exists():
            raise ValueError(f"{path}: is no checkpoint: config.json is missing; by its {name} it {told}")
    raise ValueError(f"{path}: is no checkpoint: config.json is missing, and there is no GGUF file")


def _refuse_weights(file: Path) -> None:
    """Raises ValueError for a file that has weights, and so is no config.json."""
    if file.suffix in _WEIGHT_FILES:
        raise ValueError(f"{file}: is a file of weights: give the directory that has it and its config.json")
    with open_file(file) as stream:
        if stream.read(len(MAGIC)) == MAGIC:
            raise ValueError(f"{file}: is a GGUF file: give it by a name that ends in .gguf, as that of a link to it")


def _read_config(path: Path) -> tuple[Model, bool]:
    """The model as config.json says it, and whether that names a dtype. Raises ValueError as check_there does."""
    check_there(path)
    file = config_file(path)
    config = read_config(path)
    spec = read_spec(config, str(file))
    for name, fields in QUANTISED.items():
        if (file.parent / name).exists():
            _refuse_quantised(file.parent / name, fields)
    return Model(spec, _length_notes(file, config, spec)), states_dtype(config)


def _length_notes(file: Path, config: Mapping[str, Any], spec: ModelSpec) -> tuple[str, ...]:
    """A note if a scaled rotary embedding makes the longest sequence another one than max_position_embeddings."""
    stated = config.get("max_position_embeddings", FAMILIES[spec.family].defaults["max_position_embeddings"])
    if spec.max_position == stated:
        return ()
    scaling = f"{spec.rope.kind} rope_scaling of factor {spec.rope.factor:g}"
    note = f"sequences of up to {spec.max_position} tokens by {scaling}, though max_position_embeddings is {stated}"
    return (f"{file}: {note}",)


def _refuse_quantised(file: Path, fields: tuple[str, ...]) -> None:
    stated: dict[str, Any] = read_json(file, keep_too_large=True)
    inner = stated.get("quantization")
    for field in fields:
        value = inner.get(field) if isinstance(inner, dict) else stated.get(field)
        if value is not None:
            raise ValueError(f"{file}: {field} = {show_value(value)} is not supported: {FROM_GGUF_ALONE}")


def _as_configured(path: Path, model: Model, has_dtype: bool) -> Model:
    if has_dtype:
        return model
    note = f"{config_file(path)} names no dtype: {model.spec.dtype} is assumed"
    return replace(model, notes=(*model.notes, note))


def _as_stored(directory: Path, entries: Mapping[str, TensorEntry], model: Model, has_dtype: bool) -> Model:
    spec, notes = model.spec, list(model.notes)
    names = _names(directory, spec, entries)
    tied = spec.tied
    if tied and names.head in entries and names.embed not in entries:
        names = replace(names, embed=names.head)  # the same matrix, saved once
    elif tied and names.head in entries and not _are_equal(entries[names.head], entries[names.embed]):
        tied = False
        notes.append(f"{names.head} is not the embedding, though tie_word_embeddings is true: it is a head of its own")
    dtype = spec.dtype if has_dtype else _first_dtype(entries)
    if not has_dtype:
        notes.append(f"{config_file(directory)} names no dtype: {dtype}, as the weights are")
    return Model(replace(spec, names=names, tied=tied, dtype=dtype), tuple(notes))


def _names(directory: Path, spec: ModelSpec, entries: Mapping[str, TensorEntry]) -> TensorNames:
    """The family's names, or those without its prefix if no tensor has it."""
    names, bare = spec.names, without_prefix(spec.names)
    if bare.embed not in entries or any(name.startswith(names.prefix) for name in entries):
        return names
    if not spec.tied and names.head not in entries:
        raise ValueError(
            f"{directory}: {names.head} is missing: the tensors are named without {names.prefix!r}, as a model is saved"
            " without its head, and tie_word_embeddings is false"
        )
    return bare


def _first_dtype(entries: Mapping[str, TensorEntry]) -> str:
    """The dtype of the first tensor of floats, by file and name, as transformers chooses it; float32 if there is
    none."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].file, item[0]))
    return next((DTYPES[entry.dtype] for _, entry in ordered if entry.dtype in DTYPES), "float32")


def _are_equal(first: TensorEntry, second: TensorEntry) -> bool:
    """Tells whether two tensors have the same dtype, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with open_file(first.file) as left, open_file(second.file) as right:
        left.seek(first.offset)
        right.seek(second.offset)
        for start in range(0, first.nbytes, COMPARED_BYTES):
            num_bytes = min(COMPARED_BYTES, first.nbytes - start)
            if left.read(num_bytes) != right.read(num_bytes):
                return False
    return True
