"""The model families, as data: config.json -> ModelSpec, and the names of the checkpoint's tensors.

Torch-free, and free of transformers, so that `penstock plan` starts at once. A family is one entry of FAMILIES: its
tensor names, transformers' defaults for keys that its config leaves out, and a small function for what sets it
apart. What would change the math and is not implemented is refused by name; nothing is guessed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.engine.model.config_fields import (
    ACTIVATIONS,
    FROM_GGUF_ALONE,
    MAX_LAYERS,
    QUANTISED,
    REFUSED,
    Fields,
    choice,
    no_windows,
    optional_windows,
    read_dtype,
    read_rope,
    read_token_ids,
    read_windows,
    scaled_length,
)
from penstock.engine.model.spec import ModelSpec, TensorNames
from penstock.engine.user_files import read_json
from penstock.scheduler.units import show_value


@dataclass(frozen=True)
class Family:
    """A model family; `defaults` are those of transformers' config class, and `read` gives the ModelSpec fields that
    are not common to all families."""

    name: str  # model_type in config.json
    architectures: tuple[str, ...]  # with a head, and without one as AutoModel saves it
    names: TensorNames
    defaults: Mapping[str, Any]
    read: Callable[[Fields], dict[str, Any]]
    rope_keys: tuple[str, ...] = ("rope_theta",)  # where theta, and the part of a head that rotates, may also stand


def config_file(path: str | Path) -> Path:
    """The config.json that `path` is, or that directory `path` should have."""
    path = Path(path)
    return path / "config.json" if path.is_dir() else path


def read_config(path: str | Path) -> dict[str, Any]:
    """The content of a config.json, or of the one in directory `path`. Raises ValueError as read_json does."""
    return read_json(config_file(path), keep_too_large=True)


def read_eos_token_ids(path: str | Path, spec: ModelSpec) -> tuple[int, ...]:
    """The ids that end a sequence: the config's, and those of a generation_config.json in directory `path`.

    Raises ValueError as read_json does, and if they are no ids.
    """
    file = Path(path) / "generation_config.json"
    if not file.exists():
        return spec.eos_token_ids
    _, eos = read_token_ids(Fields(read_json(file, keep_too_large=True), str(file)))
    return tuple(sorted({*spec.eos_token_ids, *eos}))


def read_spec(config: Mapping[str, Any], source: str) -> ModelSpec:
    """The ModelSpec of a config.json's content; `source` names the file in errors. A missing dtype is float32.

    Raises ValueError for an unknown architecture, a value that is not supported, or sizes that do not fit together.
    """
    family = _find_family(config, source)
    fields = Fields({**family.defaults, **config}, source)
    fields.refuse(QUANTISED, FROM_GGUF_ALONE)
    fields.refuse(REFUSED)
    spec = ModelSpec(**{**_common(fields, family), **family.read(fields)})
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    if heads % kv_heads:
        raise fields.error(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    return spec


def tensor_names(spec: ModelSpec) -> TensorNames:
    """The checkpoint's names for `spec`; a tied model's head may be left over."""
    tied = (re.escape(FAMILIES[spec.family].names.head), r"lm_head\.weight") if spec.tied else ()
    return replace(spec.names, ignorable=spec.names.ignorable + tied)


def without_prefix(names: TensorNames) -> TensorNames:
    """The names in a checkpoint that was saved from the body of a model, without its head."""
    return replace(
        names,
        prefix="",
        embed=names.embed.removeprefix(names.prefix),
        final_norm=names.final_norm.removeprefix(names.prefix),
        layer_prefix=names.layer_prefix.removeprefix(names.prefix),
        ignorable=tuple(pattern.removeprefix(re.escape(names.prefix)) for pattern in names.ignorable),
    )


def _find_family(config: Mapping[str, Any], source: str) -> Family:
    """The family that model_type names, or else the architecture. Raises ValueError for an unknown one, and for another
    head on a known body."""
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"{source}: architectures must be a list, not {show_value(architectures)}")
    for family in FAMILIES.values():
        known = any(name in family.architectures for name in architectures)
        if known if model_type is None else model_type == family.name and (known or not architectures):
            return family
    name = architectures[0] if architectures else model_type
    known = any(name in family.architectures for family in FAMILIES.values())
    named = f"model_type {show_value(model_type)} of a {name}" if known else f"architecture {show_value(name)}"
    wrong = "architectures and model_type are missing" if name is None else f"{named} is not supported"
    supported = ", ".join(f"{f.architectures[0]} ({f.name})" for f in FAMILIES.values())
    raise ValueError(f"{source}: {wrong}; supported: {supported}")


def _common(fields: Fields, family: Family) -> dict[str, Any]:
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.error(f"hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
    head_dim = fields.size_or("head_dim", hidden // heads)
    bos, eos = read_token_ids(fields)
    rope = read_rope(fields, head_dim, *family.rope_keys)
    activation = choice(fields, "hidden_act", fields.get("hidden_act"), ACTIVATIONS)
    return {
        "family": family.name,
        "num_layers": fields.size("num_hidden_layers", at_most=MAX_LAYERS),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": fields.size_or("num_key_value_heads", heads),
        "head_dim": head_dim,
        "ffn_size": fields.size("intermediate_size"),
        "vocab_size": fields.size("vocab_size"),
        "max_position": scaled_length(fields, rope),
        "activation": "silu" if activation == "swish" else activation,
        "tied": fields.flag("tie_word_embeddings"),
        "rope": rope,
        "dtype": read_dtype(fields),
        "names": family.names,
        "bos_token_id": bos,
        "eos_token_ids": eos,
    }


def _gated(fields: Fields, windows: tuple[int | None, ...], **own: bool) -> dict[str, Any]:
    """Says what all families but GPT-NeoX share: RMSNorm, a gated FFN, serial residuals; biases where `own` says so."""
    flags = dict.fromkeys(("qkv_bias", "o_bias", "ffn_up_bias", "ffn_down_bias", "qk_norm", "parallel_residual"), False)
    norm = {"norm": "rms", "norm_eps": fields.number("rms_norm_eps"), "gated": True}
    return {**flags, **norm, "windows": windows, **own}


def _llama(fields: Fields) -> dict[str, Any]:
    attn, mlp = fields.flag("attention_bias"), fields.flag("mlp_bias")
    biases = {"qkv_bias": attn, "o_bias": attn, "ffn_up_bias": mlp, "ffn_down_bias": mlp}
    return _gated(fields, no_windows(fields), **biases)


def _mistral(fields: Fields) -> dict[str, Any]:
    return _gated(fields, read_windows(fields, fields.size_or("sliding_window", None)))


def _qwen2(fields: Fields) -> dict[str, Any]:
    return _gated(fields, optional_windows(fields), qkv_bias=True)


def _qwen3(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias")
    return _gated(fields, optional_windows(fields), qk_norm=True, qkv_bias=bias, o_bias=bias)


def _gpt_neox(fields: Fields) -> dict[str, Any]:
    heads, hidden, bias = fields.size("num_attention_heads"), fields.size("hidden_size"), fields.flag("attention_bias")
    fields.refuse({"num_key_value_heads": (None, heads), "head_dim": (None, hidden / heads)})
    return {
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_eps"),
        "gated": False,
        "qkv_bias": bias,
        "o_bias": bias,
        "ffn_up_bias": True,
        "ffn_down_bias": True,
        "qk_norm": False,
        "parallel_residual": fields.flag("use_parallel_residual"),
        "windows": no_windows(fields),
    }


_LLAMA_NAMES = TensorNames(
    prefix="model.",
    embed="model.embed_tokens.weight",
    head="lm_head.weight",
    final_norm="model.norm",
    layer_prefix="model.layers.{}.",
    in_layer=(
        ("attn_norm", "input_layernorm"),
        *((name, f"self_attn.{name}_proj") for name in ("q", "k", "v", "o")),
        *((name, f"self_attn.{name}") for name in ("q_norm", "k_norm")),
        ("ffn_norm", "post_attention_layernorm"),
        *((name, f"mlp.{name}_proj") for name in ("gate", "up", "down")),
    ),
    ignorable=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
_NEOX_NAMES = TensorNames(
    prefix="gpt_neox.",
    embed="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    final_norm="gpt_neox.final_layer_norm",
    layer_prefix="gpt_neox.layers.{}.",
    in_layer=(
        ("attn_norm", "input_layernorm"),
        ("qkv", "attention.query_key_value"),
        ("o", "attention.dense"),
        ("ffn_norm", "post_attention_layernorm"),
        ("up", "mlp.dense_h_to_4h"),
        ("down", "mlp.dense_4h_to_h"),
    ),
    ignorable=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)


def _defaults(sizes: str, **own: Any) -> dict[str, Any]:
    """Defaults of a family; `sizes` are vocabulary, hidden, FFN, layers, heads and max position, as transformers'
    config class has them."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = dict(zip((*keys, "max_position_embeddings"), map(int, sizes.split())))
    return {**values, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **own}


_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _defaults("32000 4096 11008 32 32 2048", attention_bias=False, mlp_bias=False, **_TOKENS)
_MISTRAL = _defaults("32000 4096 14336 32 32 131072", num_key_value_heads=8, sliding_window=4096, **_TOKENS)
_QWEN2 = _defaults("151936 4096 22016 32 32 32768", num_key_value_heads=32, **_WINDOW)
_QWEN3 = {**_QWEN2, "head_dim": 128, "attention_bias": False}
_NEOX = {
    **_defaults("50432 6144 24576 44 64 2048", bos_token_id=0, eos_token_id=2, rotary_pct=0.25),
    **{"hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True, "use_parallel_residual": True},
}
_NEOX_ROPE = ("rotary_emb_base", "rotary_pct")
_FAMILIES = (
    Family("llama", ("LlamaForCausalLM", "LlamaModel"), _LLAMA_NAMES, _LLAMA, _llama),
    Family("mistral", ("MistralForCausalLM", "MistralModel"), _LLAMA_NAMES, _MISTRAL, _mistral),
    Family("qwen2", ("Qwen2ForCausalLM", "Qwen2Model"), _LLAMA_NAMES, _QWEN2, _qwen2),
    Family("qwen3", ("Qwen3ForCausalLM", "Qwen3Model"), _LLAMA_NAMES, _QWEN3, _qwen3),
    Family("gpt_neox", ("GPTNeoXForCausalLM", "GPTNeoXModel"), _NEOX_NAMES, _NEOX, _gpt_neox, _NEOX_ROPE),
)
FAMILIES = {family.name: family for family in _FAMILIES}
HEADS = frozenset(family.names.head for family in _FAMILIES)
