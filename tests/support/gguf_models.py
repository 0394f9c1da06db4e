"""Tiny GGUF models of random blocks, written by the gguf package, and the transformers model of each.

`write_model(file, "qwen3")` writes one. Every type that is read is in each of them; the FFN is no
multiple of what four ranks need, nor is the vocabulary. SMALL is for kernels that take seconds in the interpreter,
K_QUANTS for compiling the others. FLOATS_BESIDE has matrices of floats beside quantised ones in some of its groups, and
others that are all one or the other.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from penstock.engine.kernels.ggml_types import BY_NAME
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.ggml_blocks import QUANTISED, oracle, random_blocks

EMBEDS = {"llama": ("Q6_K", "Q4_K"), "qwen2": ("Q8_0", None), "qwen3": ("Q3_K", None)}  # None: tied
LOW, HIGH, FACTOR, TRAINED = 1.0, 4.0, 8.0, 64  # of Llama 3.1's rope, as its converter takes them


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; its matrices have these kinds in turn, embedding and head those of `embeds` (None: tied)."""

    head_dim: int = 128
    num_heads: int = 8
    num_kv_heads: int = 2
    hidden: int = 256
    ffn: int = 768
    num_layers: int = 3
    vocab: int = 130
    kinds: tuple[str, ...] = (*QUANTISED, "F32", "F16", "BF16")
    embeds: tuple[str, str | None] | None = None  # those of EMBEDS


SIZES = Sizes()
SMALL = Sizes(16, 2, 1, 32, 64, 1, 128, ("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q4_0", "Q8_0", "Q5_1"), ("Q8_0", "Q4_0"))
K_QUANTS = Sizes(
    16, 16, 1, 256, 256, 1, 128, ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_K", "Q3_K", "Q2_K"), ("Q5_K", "Q6_K")
)
FLOATS_BESIDE = Sizes(
    kinds=(
        *("Q8_0", "Q8_0"),  # in place of the embedding and the head, which have kinds of their own
        *("Q8_0", "Q8_0", "Q8_0", "Q8_0", "BF16", "Q4_K", "F16"),  # q, k, v, o, gate, up, down
        *("BF16", "BF16", "BF16", "BF16", "Q6_K", "Q4_K", "Q8_0"),
        *("Q5_0", "BF16", "F32", "Q6_K", "Q8_0", "BF16", "Q4_1"),
    ),
    embeds=("Q8_0", "BF16"),
)


def write_model(
    file: Path, arch: str, rope_freqs: bool = False, shards: int = 0, sizes: Sizes = SIZES, **metadata: Any
) -> None:
    """Writes a model; `metadata` are values of its own keys by their names behind the architecture's, dots as __."""
    writer = gguf.GGUFWriter(file, arch, split_max_tensors=shards)
    _write_metadata(writer, sizes)
    for name, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{arch}.{name.replace('__', '.')}", value)
    for index, (name, shape) in enumerate(_matrices(arch, sizes).items()):
        _write_matrix(writer, name, shape, _kind(arch, name, index, sizes), index)
    for index, (name, size) in enumerate(_vectors(arch, sizes).items()):
        writer.add_tensor(name, _vector(name, size, index))
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", _rope_factors(sizes))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def load_reference(file: Path, arch: str, rope_freqs: bool = False, sizes: Sizes = SIZES) -> PreTrainedModel:
    """The model in fp32, of the gguf package's floats. Its config is told what rope_freqs were made from."""
    scaling = {"rope_type": "llama3", "factor": FACTOR, "low_freq_factor": LOW, "high_freq_factor": HIGH}
    scaling["original_max_position_embeddings"] = TRAINED
    config = AutoConfig.for_model(
        arch,
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=256,
        rms_norm_eps=float(np.float32(1e-5)),
        rope_parameters={"rope_theta": 10000.0, **(scaling if rope_freqs else {"rope_type": "default"})},
        tie_word_embeddings=_embeds(arch, sizes)[1] is None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    left = dict(model.named_parameters())
    for name, values in _floats(file).items():
        if name != "rope_freqs.weight":
            is_permuted = arch == "llama" and ("attn_q" in name or "attn_k" in name)
            left.pop(_their_name(name)).copy_(_unpermuted(values, sizes.head_dim) if is_permuted else values)
    assert not left
    return model


def _floats(file: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).view(
            *tensor.shape.tolist()[::-1]
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


def _unpermuted(values: Tensor, head_dim: int) -> Tensor:
    """Rows as transformers has them: first halves of a head's pairs, then second halves."""
    return values.view(-1, head_dim // 2, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)


def _their_name(name: str) -> str:
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return name


_NAMES = (
    ("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("attn_output", "self_attn.o_proj"),
    ("output", "lm_head"), ("blk.", "model.layers."), ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"), *((f"attn_{x}_norm", f"self_attn.{x}_norm") for x in "qk"),
    *((f"attn_{x}.", f"self_attn.{x}_proj.") for x in "qkv"),
    *((f"ffn_{x}", f"mlp.{x}_proj") for x in ("gate", "up", "down")),
)  # fmt: skip


def _write_metadata(writer: gguf.GGUFWriter, sizes: Sizes) -> None:
    writer.add_block_count(sizes.num_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.ffn)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(sizes.vocab)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _matrices(arch: str, sizes: Sizes) -> dict[str, tuple[int, int]]:
    wide, narrow = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    shapes = {"token_embd.weight": (sizes.vocab, sizes.hidden)}
    if _embeds(arch, sizes)[1] is not None:
        shapes["output.weight"] = (sizes.vocab, sizes.hidden)
    in_layer = {"attn_q": (wide, sizes.hidden), "attn_k": (narrow, sizes.hidden), "attn_v": (narrow, sizes.hidden)}
    in_layer |= {
        "attn_output": (sizes.hidden, wide),
        "ffn_gate": (sizes.ffn, sizes.hidden),
        "ffn_up": (sizes.ffn, sizes.hidden),
    }
    in_layer["ffn_down"] = (sizes.hidden, sizes.ffn)
    for layer, (name, shape) in itertools.product(range(sizes.num_layers), in_layer.items()):
        shapes[f"blk.{layer}.{name}.weight"] = shape
    return shapes


def _embeds(arch: str, sizes: Sizes) -> tuple[str, str | None]:
    return sizes.embeds or EMBEDS[arch]


def _kind(arch: str, name: str, index: int, sizes: Sizes) -> str:
    kinds = dict(zip(("token_embd.weight", "output.weight"), _embeds(arch, sizes)))
    return kinds.get(name) or sizes.kinds[index % len(sizes.kinds)]


def _write_matrix(writer: gguf.GGUFWriter, name: str, shape: tuple[int, int], kind: str, seed: int) -> None:
    """Writes weights of a deviation with which a linear keeps sizes."""
    deviation = shape[1] ** -0.5
    if kind in ("F32", "F16"):
        values = np.random.default_rng(seed).standard_normal(shape) * deviation
        writer.add_tensor(name, values.astype({"F32": np.float32, "F16": np.float16}[kind]))
        return
    if kind == "BF16":
        values = np.random.default_rng(seed).standard_normal(shape) * deviation
        stored = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        writer.add_tensor(name, stored.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        return
    num_blocks = shape[0] * shape[1] // BY_NAME[kind].block
    scale = deviation / float(oracle(kind, random_blocks(kind, num_blocks, seed, scale=1.0)).std())
    blocks = random_blocks(kind, num_blocks, seed, scale=scale)
    writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=gguf.GGMLQuantizationType[kind])


def _vectors(arch: str, sizes: Sizes) -> dict[str, int]:
    shapes = {"output_norm.weight": sizes.hidden}
    for layer in range(sizes.num_layers):
        shapes |= {f"blk.{layer}.{name}.weight": sizes.hidden for name in ("attn_norm", "ffn_norm")}
        if arch == "qwen3":
            shapes |= {f"blk.{layer}.{name}.weight": sizes.head_dim for name in ("attn_q_norm", "attn_k_norm")}
        if arch == "qwen2":
            shapes[f"blk.{layer}.attn_q.bias"] = sizes.num_heads * sizes.head_dim
            shapes |= {f"blk.{layer}.{name}.bias": sizes.num_kv_heads * sizes.head_dim for name in ("attn_k", "attn_v")}
    return shapes


def _vector(name: str, size: int, seed: int) -> np.ndarray:
    values = 0.2 * np.random.default_rng(1000 + seed).standard_normal(size)
    return (values + ("norm" in name)).astype(np.float32)


def _rope_factors(sizes: Sizes) -> np.ndarray:
    """As llama.cpp's converter writes them."""
    factors = []
    for index in range(0, sizes.head_dim, 2):
        wavelength = 2 * np.pi * 10000.0 ** (index / sizes.head_dim)
        smooth = (TRAINED / wavelength - LOW) / (HIGH - LOW)
        blended = 1 / ((1 - smooth) / FACTOR + smooth)
        between = TRAINED / HIGH <= wavelength <= TRAINED / LOW
        factors.append(blended if between else FACTOR if wavelength > TRAINED / LOW else 1.0)
    return np.array(factors, dtype=np.float32)
