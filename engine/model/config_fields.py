"""Checked reads of a config.json: typed values, activation, dtype, token ids, rotary embedding, sliding windows.

Torch-free. Families share these reads; what sets a family apart is in families.py. Defaults and precedence of old and
new keys are transformers' own.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from penstock.engine.model.spec import DTYPE_BYTES, RopeSpec
from penstock.engine.user_files import TooLarge
from penstock.scheduler.units import show_value

MAX_LAYERS = 512  # planning takes time for each; the deepest published models have under 200
MAX_SIZE = 2**31 - 1  # of anything else that is counted
MAX_NUMBER = 1e30
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
# The parameters that a kind needs; yarn's have defaults. Dynamic equals default up to the trained length.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "dynamic": ("factor",),
}
FULL, SLIDING = "full_attention", "sliding_attention"

# Keys that change the math or the tensors where they are on, and the values that mean off. Dropout does neither.
REFUSED: dict[str, tuple[Any, ...]] = {
    "per_layer_config": (None, {}),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "cross_attention_layers"), (None, False, [])),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), (None, 0)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "clip_qkv"), (None,)),
    **dict.fromkeys(("attention_sinks", "use_attention_sinks", "attention_sink", "num_sink_tokens"), (None, False)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (None, 1)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "attention_chunk_size"), (None,)),
    **dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base", "kv_lora_rank", "q_lora_rank"), (None,)),
    **dict.fromkeys(("rope_interleaved", "rope_interleave", "rotary_interleaved", "alibi"), (None, False)),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "attn_temperature_tuning"), (None, False)),
    **dict.fromkeys(("no_rope_layers", "mrope_section", "llama_4_scaling_beta"), (None, [], 0)),
}

QUANTISED = dict.fromkeys(("quantization_config", "compression_config"), (None, {}))
FROM_GGUF_ALONE = "quantised weights are read from GGUF files alone"


class Fields:
    """A config with its family's defaults beneath it. Reads are checked; errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values, self.source = values, source

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.source}: {message}")

    def get(self, key: str, other: Any = None) -> Any:
        """The value, whatever it is. Raises ValueError for a number that is too large for a field that is read."""
        value = self.values.get(key, other)
        if isinstance(value, TooLarge):
            raise self.error(f"{key} is {value!r}")
        return value

    def size(self, key: str, at_least: int = 1, at_most: int = MAX_SIZE) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise self.error(f"{key} must be an integer of at least {at_least}, not {show_value(value)}")
        if value > at_most:
            raise self.error(f"{key} = {show_value(value)} is not supported: it can be {at_most} at most")
        return value

    def size_or(self, key: str, other: int | None) -> int | None:
        return other if self.get(key) is None else self.size(key)

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(f"{key} must be a positive number, not {show_value(value)}")
        if value > MAX_NUMBER:
            raise self.error(f"{key} = {show_value(value)} is not supported: it can be {MAX_NUMBER:g} at most")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {show_value(value)}")
        return value

    def refuse(self, refused: Mapping[str, tuple[Any, ...]], why: str = "") -> None:
        for key, off in refused.items():
            if self.get(key) not in off:
                raise self.error(f"{key} = {show_value(self.values[key])} is not supported{why and f': {why}'}")


def choice(fields: Fields, key: str, value: Any, choices: Collection[str]) -> str:
    """Returns `value` if it is one of `choices`. Raises ValueError, with the choices, if not."""
    if not isinstance(value, str) or value not in choices:
        raise fields.error(f"{key} {show_value(value)} is not supported; supported: {', '.join(choices)}")
    return value


def states_dtype(config: Mapping[str, Any]) -> bool:
    """Tells whether a config says in which dtype its checkpoint is; null says nothing."""
    return bool(config.get("dtype") or config.get("torch_dtype"))


def read_dtype(fields: Fields) -> str:
    """The dtype of a config; a missing one is float32. Raises ValueError for a dtype that is not supported."""
    value = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    return choice(fields, "dtype", str(value).removeprefix("torch."), DTYPE_BYTES)


def read_token_ids(fields: Fields) -> tuple[int | None, tuple[int, ...]]:
    """Token ids: bos_token_id, and eos_token_id as a tuple. Raises ValueError if they are neither integers nor null."""
    bos, eos = fields.get("bos_token_id"), fields.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if type(bos) not in (int, type(None)):
        raise fields.error(f"bos_token_id must be an integer or null, not {show_value(bos)}")
    if any(type(i) is not int for i in ids):
        raise fields.error(f"eos_token_id must be an integer, a list of integers or null, not {show_value(eos)}")
    return bos, tuple(ids)


def read_rope(fields: Fields, head_dim: int, theta_key: str = "rope_theta", part_key: str = "") -> RopeSpec:
    """Rotary embedding from rope_parameters or the older rope_scaling. Theta and the part of a head that rotates may
    also stand outside of these, as `theta_key` and `part_key`; without a `part_key` the family rotates whole heads.

    Raises ValueError for an unknown kind, a missing or bad parameter, or a rotary part that is odd or too large.
    """
    rope = _rope_values(fields, theta_key, part_key or "partial_rotary_factor")
    kind = rope.get("rope_type", rope.get("type", "default"))
    choice(fields, "rope_type", kind, ROPE_KINDS)
    part = rope.number("partial_rotary_factor")
    if part != 1 and not part_key:
        raise fields.error(f"partial_rotary_factor = {part:g} is not supported: this family rotates whole heads")
    rotary_dim = int(head_dim * part)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise fields.error(f"rotary dims must be even and at most head_dim = {head_dim}, not {rotary_dim}")
    own: dict[str, Any] = {key: rope.number(key) for key in ROPE_KINDS[kind]}
    if kind in ("llama3", "yarn"):
        own["original_max_position"] = rope.size("original_max_position_embeddings")
    if kind == "llama3" and own["low_freq_factor"] >= own["high_freq_factor"]:
        low, high = own["low_freq_factor"], own["high_freq_factor"]
        raise rope.error(f"high_freq_factor = {high:g} must be more than low_freq_factor = {low:g}")
    if kind == "yarn":
        own |= _yarn_values(rope, fields.size("max_position_embeddings") / own["original_max_position"])
    return RopeSpec(kind, rope.number("rope_theta"), rotary_dim, **own)


def scaled_length(fields: Fields, rope: RopeSpec) -> int:
    """The longest sequence in tokens: max_position_embeddings, or the length that linear and yarn scale to if it is
    more, `factor` times max_position_embeddings or times yarn's original length. For llama3 the config states the
    scaled length; dynamic keeps the trained one."""
    trained = fields.size("max_position_embeddings")
    base = {"linear": trained, "yarn": rope.original_max_position}.get(rope.kind)
    if base is None:
        return trained
    length = int(base * rope.factor)
    if length > MAX_SIZE:
        raise fields.error(f"rope_parameters: factor = {rope.factor:g} makes {base} tokens more than {MAX_SIZE}")
    return max(trained, length)


def _rope_values(fields: Fields, theta_key: str, part_key: str) -> Fields:
    """The parameters of a rotary embedding: defaults, over these the keys outside of the config's dict, over these
    those in it."""
    values = fields.values
    inner = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(inner, Mapping):
        raise fields.error(f"rope_parameters must be an object, not {show_value(inner)}")
    nested = [value for value in inner.values() if isinstance(value, Mapping)]
    if nested:
        if any(value != nested[0] for value in nested):
            raise fields.error("rope_parameters that differ by layer type are not supported")
        inner = {key: value for key, value in inner.items() if not isinstance(value, Mapping)} | nested[0]
    outside = {
        "rope_theta": values.get(theta_key, 10000.0),
        "partial_rotary_factor": 1.0 if values.get(part_key) is None else values[part_key],
        "original_max_position_embeddings": values.get("max_position_embeddings"),
    }
    merged = outside | dict(inner)
    if values.get("original_max_position_embeddings") is not None:
        merged["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    rope = Fields(merged, f"{fields.source}: rope_parameters")
    rope.refuse(REFUSED)
    return rope


def _yarn_values(rope: Fields, implied_factor: float) -> dict[str, Any]:
    """Yarn's parameters. A null factor is the ratio of the lengths; a zero beta or mscale counts as left out, as in
    transformers."""

    def get(key: str, default: float | None = None) -> float | None:
        return rope.number(key) if rope.get(key) else default

    return {
        "factor": implied_factor if rope.get("factor", 0) is None else rope.number("factor"),
        "beta_fast": get("beta_fast", 32.0),
        "beta_slow": get("beta_slow", 1.0),
        "mscale": get("mscale"),
        "mscale_all_dim": get("mscale_all_dim"),
        "attention_factor": rope.number("attention_factor") if rope.get("attention_factor") is not None else None,
        "truncate": bool(rope.get("truncate", True)),
    }


def read_windows(fields: Fields, window: int | None, first: int = 0, mixed: bool = False) -> tuple[int | None, ...]:
    """Sliding window of each layer: those from `first` on have one, unless layer_types says otherwise, which only
    families with `mixed` layers obey.

    Raises ValueError for layer types that are unknown, too few, or contradict the window.
    """
    num_layers = fields.size("num_hidden_layers", at_most=MAX_LAYERS)
    default = [SLIDING if window and layer >= first else FULL for layer in range(num_layers)]
    types = fields.get("layer_types") or default
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.error(f"layer_types must be a list of num_hidden_layers = {num_layers} names")
    for name in types:
        choice(fields, "layer_types", name, (FULL, SLIDING))
    if types != default and (not mixed or (SLIDING in types and window is None)):
        raise fields.error(f"layer_types do not agree with sliding_window = {window}")
    return tuple(window if name == SLIDING else None for name in types)


def no_windows(fields: Fields) -> tuple[None, ...]:
    """Windows of a family whose layers have no window: None for each. Raises ValueError for a config that sets one:
    transformers ignores it, others do not."""
    if fields.get("use_sliding_window") is not False:
        fields.refuse({"sliding_window": (None,)})
    return read_windows(fields, None)


def optional_windows(fields: Fields) -> tuple[int | None, ...]:
    """Windows as Qwen's configs state them: use_sliding_window switches them on, for layers from max_window_layers on
    or where layer_types says so.

    Raises ValueError for bad values, and for layer types that contradict them.
    """
    window = fields.size_or("sliding_window", None) if fields.flag("use_sliding_window") else None
    return read_windows(fields, window, fields.size("max_window_layers", at_least=0), mixed=True)
