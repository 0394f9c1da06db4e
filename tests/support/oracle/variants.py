"""The variants of every family that are put to the oracle, as data: configs, and how each is switched off.

Ranks read this too, so it imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]

_THETA = {"rope_theta": 10000.0}
_NO_ROPE = {"rope_parameters": {"rope_type": "default", **_THETA}}
_AS_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_PLAIN_LLAMA = {**_AS_LLAMA, "attention_bias": False}
_KV_WEIGHTS = ("k_proj.weight", "v_proj.weight")
_WINDOW_FROM_LAYER_1 = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, **_THETA, **values}}


def _drop(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def _roll_kv_heads(head_dim: int) -> Callable[[Tensors], Tensors]:
    """Lets each group of query heads read the keys of its neighbour."""
    rolled = "k_proj.weight"
    return lambda tensors: {n: t.roll(head_dim, dims=0) if n.endswith(rolled) else t for n, t in tensors.items()}


def _one_kv_head_to_8(tensors: Tensors) -> Tensors:
    """Gives every query head a KV head of its own; the first is the one that all shared."""
    for name, t in tensors.items():
        if name.endswith(_KV_WEIGHTS):
            expanded = t.repeat(8, 1)
            for head in range(8):
                expanded[head * len(t) : (head + 1) * len(t)] = t.roll(head, dims=1)
            tensors[name] = expanded
    return tensors


def _first_half_of_kv_heads(tensors: Tensors) -> Tensors:
    return {name: t[: len(t) // 2].clone() if name.endswith(_KV_WEIGHTS) else t for name, t in tensors.items()}


def _zero_last_ffn_column(tensors: Tensors) -> Tensors:
    for name in tensors:
        if name.endswith("down_proj.weight"):
            tensors[name][:, -1] = 0
    return tensors


def _add_own_head(name: str, embed: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensors[embed].roll(1, dims=1).contiguous()}


_QUARTER_ROTARY = _rope("default", partial_rotary_factor=0.25)
_HALF_ROTARY = _rope("default", partial_rotary_factor=0.5)
_WHOLE_ROTARY = _rope("default", partial_rotary_factor=1.0)


@dataclass(frozen=True)
class Variant:
    """A variant of a family: `config` is laid over the family's base. `off_config` and `off_tensors` switch the variant
    off in the written checkpoint, which must change the logits; where there is nothing to switch, `no_switch` says
    why."""

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    off_config: Mapping[str, Any] | None = None
    off_tensors: Callable[[Tensors], Tensors] | None = None
    no_switch: str | None = None

    @property
    def can_be_off(self) -> bool:
        return self.off_config is not None or self.off_tensors is not None


def _llama(off: Mapping | None = None, off_tensors: Callable | None = None, **config: Any) -> Variant:
    return Variant("llama", {"num_key_value_heads": 4, **config}, off, off_tensors)


def _mistral(off: Mapping | None = None, **config: Any) -> Variant:
    return Variant("mistral", {"num_key_value_heads": 4, "sliding_window": 16, **config}, off)


def _qwen2(off: Mapping | None = None, off_tensors: Callable | None = None, **config: Any) -> Variant:
    return Variant("qwen2", {"num_key_value_heads": 4, **config}, off, off_tensors)


def _qwen3(off: Mapping | None = None, off_tensors: Callable | None = None, **config: Any) -> Variant:
    return Variant("qwen3", {"num_key_value_heads": 4, "head_dim": 32, **config}, off, off_tensors)


def _neox(off: Mapping | None = None, off_tensors: Callable | None = None, **config: Any) -> Variant:
    return Variant("gpt_neox", config, off, off_tensors)


_LLAMA_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
VARIANTS: dict[str, Variant] = {
    "llama_gqa": _llama(None, _roll_kv_heads(16)),
    "llama_head_dim": _llama({"head_dim": 16, "num_attention_heads": 12, "num_key_value_heads": 6}, head_dim=24),
    "llama_biases": _llama(_LLAMA_NO_BIAS, _drop(".bias"), attention_bias=True, mlp_bias=True),
    "llama_tied": _llama(
        {"tie_word_embeddings": False},
        _add_own_head("lm_head.weight", "model.embed_tokens.weight"),
        tie_word_embeddings=True,
    ),
    "llama_mha": _llama({"num_key_value_heads": 4}, _first_half_of_kv_heads, num_key_value_heads=8, hidden_act="relu"),
    "llama_mqa": _llama({"num_key_value_heads": 8}, _one_kv_head_to_8, num_key_value_heads=1),
    "llama_few_kv_heads": _llama(None, _roll_kv_heads(16), num_key_value_heads=2),
    "llama_uneven_kv_heads": _llama(
        None, _roll_kv_heads(8), hidden_size=96, num_attention_heads=12, num_key_value_heads=3
    ),
    # At 4 ranks the FFN is padded from 37 to 64: the third rank has 5 columns and the last none.
    "llama_odd_sizes": _llama(None, _zero_last_ffn_column, vocab_size=131, intermediate_size=37),
    "llama_theta": _llama(_NO_ROPE, **_rope("default", rope_theta=500.0)),
    "llama_linear": _llama(_NO_ROPE, **_rope("linear", factor=4.0)),
    "llama_llama3": _llama(
        _NO_ROPE,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama_yarn": _llama(_NO_ROPE, **_rope("yarn", factor=8.0, original_max_position_embeddings=32)),
    "llama_yarn_mscale": _llama(
        _rope("yarn", factor=8.0, original_max_position_embeddings=32),
        **_rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=32,
            beta_fast=4.0,
            beta_slow=0.5,
            mscale=1.0,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    ),
    "llama_dynamic": Variant(
        "llama",
        {"num_key_value_heads": 4, "max_position_embeddings": 154, **_rope("dynamic", factor=4.0)},
        no_switch="dynamic is the default up to the trained length, which the longest sequence here just reaches",
    ),
    "mistral_window": _mistral({"sliding_window": None}),
    "mistral_window_head_dim": _mistral({"sliding_window": None}, head_dim=24, num_key_value_heads=2),
    "mistral_no_window": _mistral({"sliding_window": 16}, sliding_window=None),
    "qwen2": _qwen2(_PLAIN_LLAMA, _drop(".bias")),
    "qwen2_tied": _qwen2(
        {"tie_word_embeddings": False},
        _add_own_head("lm_head.weight", "model.embed_tokens.weight"),
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2_windows": _qwen2(_NO_WINDOW, **_WINDOW_FROM_LAYER_1),
    "qwen2_yarn": _qwen2(_NO_ROPE, **_rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen3": _qwen3(_AS_LLAMA, _drop("q_norm", "k_norm")),
    "qwen3_biases_tied": _qwen3(
        {"attention_bias": False}, _drop(".bias"), attention_bias=True, tie_word_embeddings=True
    ),
    "qwen3_windows": _qwen3(_NO_WINDOW, num_key_value_heads=2, **_WINDOW_FROM_LAYER_1),
    "neox_parallel": _neox({"use_parallel_residual": False}),
    "neox_serial": _neox({"use_parallel_residual": True}, use_parallel_residual=False, hidden_act="gelu_new"),
    "neox_partial_rotary": _neox(_QUARTER_ROTARY, **_HALF_ROTARY),
    "neox_whole_rotary_no_bias": _neox(_QUARTER_ROTARY, attention_bias=False, hidden_act="gelu_fast", **_WHOLE_ROTARY),
    "neox_tied_odd": _neox(
        {"tie_word_embeddings": False},
        _add_own_head("embed_out.weight", "gpt_neox.embed_in.weight"),
        vocab_size=131,
        intermediate_size=101,
        tie_word_embeddings=True,
    ),
    "neox_linear": _neox(
        _HALF_ROTARY, hidden_act="gelu_pytorch_tanh", **_rope("linear", factor=4.0, partial_rotary_factor=0.5)
    ),
}
