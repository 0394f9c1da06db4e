"""The model in a GGUF file: its metadata as the config.json that transformers would have, and its tensors' formats.

Torch-free; of the data only rope_freqs is read. Architectures llama (Mistral's models too), qwen2 and qwen3. Keys of
the architecture that are not listed here are refused: they may change the math.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.engine.model.config_fields import MAX_LAYERS, MAX_SIZE, Fields
from penstock.engine.model.families import read_spec
from penstock.engine.model.spec import ModelSpec, TensorNames
from penstock.engine.model.weight_formats import FORMATS, QUANTISED
from penstock.engine.user_files import open_file
from penstock.engine.weights.gguf_file import GGUFHeader, read_gguf
from penstock.engine.weights.headers import DTYPES
from penstock.scheduler.units import show_value

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_EMBED, _ROPE_FREQS = "token_embd.weight", "rope_freqs.weight"
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NAMES = TensorNames(
    prefix="",
    embed=_EMBED,
    head="output.weight",
    final_norm="output_norm",
    layer_prefix="blk.{}.",
    in_layer=(
        *((name, name) for name in ("attn_norm", "ffn_norm")),
        *((name, f"attn_{name}") for name in ("q", "k", "v", "q_norm", "k_norm")),
        ("o", "attn_output"),
        *((name, f"ffn_{name}") for name in ("gate", "up", "down")),
    ),
    ignorable=(re.escape(_ROPE_FREQS),),
)
_BOS = "tokenizer.ggml.bos_token_id"
_END_TOKENS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
# Keys of an architecture, behind its name, and of transformers' config.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_MORE_SIZES = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}  # not in all files
_EPSILON, _THETA = "attention.layer_norm_rms_epsilon", "rope.freq_base"
_ALIKE = ("attention.value_length", "rope.dimension_count")  # of heads, as long as their keys
_SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scale_linear")
_NO_MATH = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_KNOWN = {*_SIZES, *_MORE_SIZES, _EPSILON, _THETA, *_ALIKE, *_SCALING, *_NO_MATH}
_OFF = {"expert_count": 0, "expert_used_count": 0, "use_parallel_residual": False, "attention.causal": True}


def read_gguf_spec(path: str | Path) -> ModelSpec:
    """The spec of a GGUF model. Raises ValueError as read_gguf does, and naming the key or tensor for what is not
    supported: another architecture, key or type."""
    header = read_gguf(path)
    fields = Fields(header.metadata, str(header.file))
    kind, arch = fields.get("general.type", "model"), fields.get("general.architecture")
    if kind != "model":
        raise fields.error(f"general.type {show_value(kind)} is not supported: give the file of the model itself")
    if arch not in ARCHITECTURES:
        wrong = "is missing" if arch is None else f"{show_value(arch)} is not supported"
        raise fields.error(f"general.architecture {wrong}; supported: {', '.join(ARCHITECTURES)}")
    formats = _formats(header)
    spec = read_spec(_config(fields, header, arch), str(header.file))
    blocks = {FORMATS[kind].block for name, kind in formats if name.endswith("ffn_down.weight")}
    return replace(
        spec,
        names=NAMES,
        formats=formats,
        ffn_multiple=max(spec.ffn_multiple, *blocks, 1),
        rope=replace(spec.rope, divisors=_divisors(header, spec)),
    )


def _config(fields: Fields, header: GGUFHeader, arch: str) -> dict[str, Any]:
    """The config.json that the model would have in transformers."""
    values, prefix = _of_architecture(fields, arch), f"{arch}."
    most = {"block_count": MAX_LAYERS}
    sizes = _SIZES | {key: theirs for key, theirs in _MORE_SIZES.items() if key in values}
    config = {theirs: fields.size(prefix + key, at_most=most.get(key, MAX_SIZE)) for key, theirs in sizes.items()}
    config |= {"model_type": arch, "hidden_act": "silu"}
    config["rms_norm_eps"] = fields.number(prefix + _EPSILON)
    if _THETA in values:
        config["rope_theta"] = fields.number(prefix + _THETA)
    config["rope_scaling"] = _rope_scaling(fields, prefix)
    config["vocab_size"] = _vocab_size(fields, header)
    config["dtype"] = _dtype(header)
    config["tie_word_embeddings"] = NAMES.head not in header.tensors
    if arch != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if arch == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    ends = [fields.size(key, at_least=0) for key in _END_TOKENS if fields.get(key) is not None]
    begins = None if fields.get(_BOS) is None else fields.size(_BOS, at_least=0)
    return config | {"bos_token_id": begins, "eos_token_id": list(dict.fromkeys(ends))}


def _of_architecture(fields: Fields, arch: str) -> Mapping[str, Any]:
    """The architecture's own values by key. Raises ValueError for one that is not known, and for a head that is not
    alike in all its parts, of which our families have none."""
    prefix = f"{arch}."
    values = {key.removeprefix(prefix): value for key, value in fields.values.items() if key.startswith(prefix)}
    for key, value in values.items():
        if key not in _KNOWN and (key not in _OFF or value != _OFF[key]):
            raise fields.error(f"{prefix}{key} = {show_value(value)} is not supported")
    heads, hidden = fields.size(f"{prefix}attention.head_count"), fields.size(f"{prefix}embedding_length")
    head_dim = values.get("attention.key_length", hidden // heads)
    for key in _ALIKE:
        if values.get(key, head_dim) != head_dim:
            found = show_value(values[key])
            raise fields.error(f"{prefix}{key} = {found} is not supported: heads have {show_value(head_dim)} dims")
    return values


def _vocab_size(fields: Fields, header: GGUFHeader) -> int:
    """The rows of the embedding."""
    embed = header.tensors.get(_EMBED)
    if embed is None or len(embed.shape) != 2:
        shape = "is missing" if embed is None else f"has shape {embed.shape}"
        raise fields.error(f"{_EMBED} {shape}")
    return embed.shape[0]


def _rope_scaling(fields: Fields, prefix: str) -> dict[str, Any] | None:
    """The scaling of positions as rope_scaling states it; the older rope.scale_linear is a factor too."""
    named, factor, original, old = (prefix + key for key in _SCALING)
    kind = fields.get(named, "none")
    if kind == "none":
        is_old = fields.get(old) is not None
        return {"rope_type": "linear", "factor": fields.number(old)} if is_old else None
    if kind not in ("linear", "yarn"):
        raise fields.error(f"{named} {show_value(kind)} is not supported; supported: none, linear, yarn")
    scaling = {"rope_type": kind, "factor": fields.number(factor)}
    return scaling | ({"original_max_position_embeddings": fields.size(original)} if kind == "yarn" else {})


def _formats(header: GGUFHeader) -> tuple[tuple[str, str], ...]:
    """The quantised tensors with their formats. Raises ValueError for a type that is not read, and for a quantised
    tensor that is no matrix of a model."""
    matrices = "|".join(dict(NAMES.in_layer)[name] for name in _MATRICES)
    matrix = re.compile(rf"token_embd\.weight|output\.weight|blk\.\d+\.({matrices})\.weight")
    formats = []
    for name, entry in header.tensors.items():
        if entry.dtype in DTYPES:
            continue
        if entry.dtype not in QUANTISED:
            read = ", ".join((*DTYPES, *QUANTISED))
            raise ValueError(f"{entry.file}: {name}: type {entry.dtype} is not supported; supported: {read}")
        if len(entry.shape) != 2 or not matrix.fullmatch(name):
            raise ValueError(f"{entry.file}: {name}: is {entry.dtype}, and only matrices of linears are read quantised")
        formats.append((name, entry.dtype))
    return tuple(formats)


def _dtype(header: GGUFHeader) -> str:
    """The dtype to compute in: that of the embedding where all tensors are floats, else bfloat16."""
    kinds = {entry.dtype for entry in header.tensors.values()}
    return DTYPES[header.tensors[_EMBED].dtype] if kinds <= DTYPES.keys() else "bfloat16"


def _divisors(header: GGUFHeader, spec: ModelSpec) -> tuple[float, ...] | None:
    """The divisors of the rotary embedding's frequencies, where the file has them: Llama 3.1's scaling."""
    entry = header.tensors.get(_ROPE_FREQS)
    if entry is None:
        return None
    where, count = f"{entry.file}: {_ROPE_FREQS}", spec.rope.rotary_dim // 2
    if entry.dtype != "F32" or entry.shape != (count,):
        raise ValueError(f"{where}: is {entry.dtype} of shape {entry.shape}, and {count} F32 are expected")
    if spec.rope.kind != "default":
        raise ValueError(f"{where}: is there beside a rope.scaling.type, and both together are not supported")
    with open_file(entry.file) as stream:
        stream.seek(entry.offset)
        divisors = struct.unpack(f"<{count}f", stream.read(entry.nbytes))
    if not all(0 < divisor < 1e30 for divisor in divisors):
        raise ValueError(f"{where}: has values that are not positive numbers")
    return divisors
