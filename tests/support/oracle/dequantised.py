"""transformers' Llama in fp32 with the weights of a GGUF file, as the gguf package dequantises them."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def dequantised_weights(file: Path) -> dict[str, torch.Tensor]:
    """Each tensor of the file in fp32, the rows of q and k in transformers' order."""
    reader = gguf.GGUFReader(str(file))
    config, weights = read_config(reader), {}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        weight = weight.reshape([int(size) for size in reversed(tensor.shape)])
        *_, name, _ = tensor.name.split(".")
        if name in heads:  # the converter puts the two halves of a head's rows in turn
            weight = weight.unflatten(0, (heads[name], -1, 2)).transpose(1, 2).flatten(0, 2)
        weights[tensor.name] = weight.float()
    return weights


def dequantised_llama(file: Path) -> LlamaForCausalLM:
    """The model, whose head is its embedding."""
    config, state = read_config(gguf.GGUFReader(str(file))), {}
    for tensor, weight in dequantised_weights(file).items():
        *layer, name, _ = tensor.split(".")
        inner = f"model.layers.{layer[1]}.{IN_LAYER[name]}" if layer else NAMES[name]
        state[f"{inner}.weight"] = weight
    model = LlamaForCausalLM(config)
    lost = model.load_state_dict(state, strict=False)
    assert lost.missing_keys == ["lm_head.weight"] and not lost.unexpected_keys
    model.tie_weights()
    return model.eval()


def read_config(reader: gguf.GGUFReader) -> LlamaConfig:
    fields = {name.removeprefix("llama."): field for name, field in reader.fields.items()}
    return LlamaConfig(
        vocab_size=fields["vocab_size"].contents(),
        hidden_size=fields["embedding_length"].contents(),
        intermediate_size=fields["feed_forward_length"].contents(),
        num_hidden_layers=fields["block_count"].contents(),
        num_attention_heads=fields["attention.head_count"].contents(),
        num_key_value_heads=fields["attention.head_count_kv"].contents(),
        rms_norm_eps=fields["attention.layer_norm_rms_epsilon"].contents(),
        rope_parameters={"rope_type": "default", "rope_theta": fields["rope.freq_base"].contents()},
        max_position_embeddings=fields["context_length"].contents(),
        tie_word_embeddings=True,
    )
