"""Describes what a model is, as data. Torch-free; this file reads no files: `families.py` fills a ModelSpec in from a
config.json.

A `ModelSpec` says everything that changes the math or the bytes of a pass, and names the checkpoint's tensors. Every
later component (layout, plan, planner, kernels) reads it and never the config again.
"""

from dataclasses import dataclass, replace

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class TensorNames:
    """The names of a checkpoint's tensors. `embed` and `head` are whole names; the others lack .weight or .bias."""

    prefix: str  # of all names but the head's; a model that was saved without its head has none
    embed: str
    head: str
    final_norm: str
    layer_prefix: str  # with {} for the layer's index
    in_layer: tuple[tuple[str, str], ...]  # our name -> the checkpoint's, inside a layer
    ignorable: tuple[str, ...]  # regexes, to match whole names: tensors that may be left over

    def layer(self, layer_idx: int) -> dict[str, str]:
        """Our names -> the checkpoint's whole names, without suffix, in one layer."""
        prefix = self.layer_prefix.format(layer_idx)
        return {ours: prefix + theirs for ours, theirs in self.in_layer}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding.

    `kind` is one of default, linear, llama3, yarn, dynamic; the fields that a kind does not use are None.
    `rotary_dim` is the number of leading dims of a head that rotate (even, at most head_dim).
    """

    kind: str
    theta: float
    rotary_dim: int
    factor: float | None = None
    original_max_position: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    attention_factor: float | None = None  # yarn: None = derived from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    divisors: tuple[float, ...] | None = None  # default: of each frequency, rotary_dim / 2 of them


@dataclass(frozen=True)
class ModelSpec:
    """Shape and math of a model. Sizes are global (before sharding) and in elements."""

    family: str  # a key of families.FAMILIES
    num_layers: int
    hidden_size: int  # D
    num_heads: int
    num_kv_heads: int
    head_dim: int  # E
    ffn_size: int
    vocab_size: int
    max_position: int  # longest sequence in tokens: the trained length, as scaled by `rope`
    norm: str  # "rms" or "layer" (LayerNorm with bias)
    norm_eps: float
    activation: str  # transformers' names: silu, gelu, gelu_new, gelu_pytorch_tanh, relu, ...
    gated: bool  # ffn = down(act(gate) * up), else down(act(up))
    qkv_bias: bool
    o_bias: bool
    ffn_up_bias: bool
    ffn_down_bias: bool
    qk_norm: bool  # RMSNorm over head_dim of q and k, before RoPE
    parallel_residual: bool  # GPT-NeoX: attention and FFN read the same x
    tied: bool  # head shares the embedding's bytes
    windows: tuple[int | None, ...]  # per layer: sliding window in tokens (own token included), or None
    rope: RopeSpec
    dtype: str  # of the checkpoint: float32, bfloat16, float16
    names: TensorNames
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    formats: tuple[tuple[str, str], ...] = ()  # (tensor, its key in weight_formats.FORMATS) of those that are quantised
    ffn_multiple: int = 16  # a rank's FFN width is padded with zeros to a multiple of this: whole blocks of `down`

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, norms and biases left out."""
        attn = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        ffn = self.hidden_size * self.ffn_size * (3 if self.gated else 2)
        vocab = self.hidden_size * self.vocab_size * (1 if self.tied else 2)
        return self.num_layers * (attn + ffn) + vocab

    def within(self, num_tokens: int) -> "ModelSpec":
        """The spec for sequences of up to so many tokens: of a window that always sees all of them attention need not
        know, and takes less time without one."""
        windows = (None if window is None or window >= num_tokens else window for window in self.windows)
        return replace(self, windows=tuple(windows))
