"""The layouts of all ranks against real checkpoints: names, shapes, coverage, and the math that they must keep.

Shapes: T tokens, D hidden, H/K local query/KV heads, E head dim, I local FFN width, V local vocab.
"""

import math
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from penstock.engine.model.families import FAMILIES, read_spec, tensor_names
from penstock.engine.model.group_layout import ALIGN, GroupLayout, Weight
from penstock.engine.model.layout import ModelLayout, expected_tensors, model_layout
from penstock.engine.model.shard import ShardKind, tp_sizes
from penstock.engine.model.spec import ModelSpec
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.rounding import assert_apart, model_apart

SIZES = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 37}
VARIANTS = {
    "gqa": ("llama", {"num_key_value_heads": 4, "vocab_size": 101}),
    "undivided_kv": ("llama", {"num_key_value_heads": 3, "vocab_size": 102, "attention_bias": True, "mlp_bias": True}),
    "mqa": ("llama", {"num_key_value_heads": 1, "head_dim": 6, "vocab_size": 5, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "vocab_size": 64}),
    "qwen2": ("qwen2", {"num_key_value_heads": 6, "vocab_size": 67, "intermediate_size": 5}),
    "qwen3": ("qwen3", {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 99, "attention_bias": True}),
    "qwen3_tied": ("qwen3", {"num_key_value_heads": 12, "head_dim": 8, "vocab_size": 99, "tie_word_embeddings": True}),
    "neox": ("gpt_neox", {"vocab_size": 77, "rotary_pct": 0.5}),
    "neox_plain": ("gpt_neox", {"vocab_size": 77, "rotary_pct": 0.5, "attention_bias": False}),
    "neox_tied": ("gpt_neox", {"vocab_size": 77, "rotary_pct": 0.5, "tie_word_embeddings": True}),
}
CASES = [(variant, tp_size) for variant in VARIANTS for tp_size in tp_sizes(SIZES["num_attention_heads"])]


def config_of(variant: str) -> dict:
    model_type, own = VARIANTS[variant]
    return {"model_type": model_type, **SIZES, "max_position_embeddings": 64, "bos_token_id": None, **own}


@cache
def spec_of(variant: str) -> ModelSpec:
    return read_spec(config_of(variant), "config.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tensors of a variant's checkpoint, as transformers saves it, with every value random."""

    @cache
    def load(variant: str) -> dict[str, np.ndarray]:
        folder, config = tmp_path_factory.mktemp(variant), config_of(variant)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | {"pad_token_id": None}))
        torch.manual_seed(0)
        for weight in model.parameters():
            torch.nn.init.normal_(weight)
        model.save_pretrained(folder)
        return load_file(folder / "model.safetensors")

    return load


def layouts(variant: str, tp_size: int) -> list[ModelLayout]:
    spec = spec_of(variant)
    return [model_layout(spec, tensor_names(spec), "float32", tp_size, rank) for rank in range(tp_size)]


def groups(layout: ModelLayout) -> tuple[GroupLayout, ...]:
    return (*layout.groups, layout.embed)


def assemble(weight: Weight, tensors: dict[str, np.ndarray]) -> np.ndarray:
    local = np.zeros((weight.shape[0], math.prod(weight.shape[1:])))
    for piece in weight.pieces:
        source = tensors[piece.tensor]
        source = source.reshape(len(source), -1)[piece.row : piece.row + piece.num_rows]
        source = source[:, piece.col : piece.col + piece.num_cols]
        assert source.shape == (piece.num_rows, piece.num_cols), f"{piece} reaches beyond its tensor"
        local[piece.to_row :, piece.to_col :][: piece.num_rows, : piece.num_cols] = source
    return local.reshape(weight.shape)


def local_weights(layout: ModelLayout, index: int, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {weight.name: assemble(weight, tensors) for weight in groups(layout)[index].weights}


@pytest.mark.parametrize("variant", VARIANTS)
def test_expected_tensors_are_the_checkpoints(variant, checkpoint):
    spec, tensors = spec_of(variant), checkpoint(variant)
    expected = expected_tensors(spec, tensor_names(spec))
    assert expected == {name: tensor.shape for name, tensor in tensors.items()}
    ignorable = re.compile("|".join(tensor_names(spec).ignorable))
    assert not any(ignorable.fullmatch(name) for name in expected)


@pytest.mark.parametrize("variant, tp_size", CASES)
def test_every_element_is_read_by_the_ranks_that_need_it(variant, tp_size, checkpoint):
    spec = spec_of(variant)
    for name, tensor in checkpoint(variant).items():
        count = np.zeros((len(tensor), tensor.size // len(tensor)), int)
        weights = [
            (weight, piece)
            for layout in layouts(variant, tp_size)
            for group in groups(layout)
            for weight in group.weights
            for piece in weight.pieces
            if piece.tensor == name
        ]
        for _, piece in weights:
            count[piece.row : piece.row + piece.num_rows, piece.col : piece.col + piece.num_cols] += 1
        kind = weights[0][0].kind
        if re.search(r"[kv]_proj", name) and spec.num_kv_heads % tp_size:
            assert count.min() >= 1 and count.sum() > count.size
        else:
            assert np.all(count == (tp_size if kind is ShardKind.REPLICATED else 1)), name


@pytest.mark.parametrize("variant, tp_size", CASES)
def test_spans_are_aligned_disjoint_and_alike_on_all_ranks(variant, tp_size):
    ranks = [
        [(group, w.name, w.kind, w.parts) for group in groups(a) for w in group.weights]
        for a in layouts(variant, tp_size)
    ]
    shapes = [[(name, kind, parts) for _, name, kind, parts in rank] for rank in ranks]
    assert all(rank == shapes[0] for rank in shapes)
    for group in groups(layouts(variant, tp_size)[0]):
        end = 0
        for weight in group.weights:
            (part,) = weight.parts
            assert part.offset % ALIGN == 0 and part.offset - end in range(ALIGN)
            assert part.nbytes == 4 * math.prod(part.shape) and part.shape == weight.shape
            end = part.offset + part.nbytes
        assert group.nbytes - end in range(ALIGN) and group.nbytes % ALIGN == 0


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Stands for attention: mixes each query head with its KV head and no other: (T, H, E), (T, K, E) -> (T, H, E)."""
    repeat = q.shape[1] // k.shape[1]
    return np.tanh(q) * k.repeat(repeat, 1) + v.repeat(repeat, 1)[..., ::-1]


def whole_attention(x: np.ndarray, spec: ModelSpec, tensors: dict, names: dict[str, str]) -> np.ndarray:
    def linear(which: str, x: np.ndarray) -> np.ndarray:
        y = x @ tensors[names[which] + ".weight"].astype(float).T
        return y + tensors.get(names[which] + ".bias", 0)

    if "qkv" in names:
        q, k, v = np.moveaxis(linear("qkv", x).reshape(len(x), spec.num_heads, 3, spec.head_dim), 2, 0)
    else:
        q, k, v = (linear(which, x).reshape(len(x), -1, spec.head_dim) for which in "qkv")
    return linear("o", attend(q, k, v).reshape(len(x), -1))


def local_attention(x: np.ndarray, spec: ModelSpec, tp_size: int, weights: dict[str, np.ndarray]) -> np.ndarray:
    qkv = (x @ weights["qkv"].T + weights.get("qkv_bias", 0)).reshape(len(x), -1, spec.head_dim)  # (T, H+2K, E)
    num_heads = spec.num_heads // tp_size
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = np.split(qkv, [num_heads, num_heads + num_kv_heads], axis=1)
    return attend(q, k, v).reshape(len(x), -1) @ weights["o"].T + weights.get("o_bias", 0)


def whole_ffn(x: np.ndarray, spec: ModelSpec, tensors: dict, names: dict[str, str]) -> np.ndarray:
    def linear(which: str, x: np.ndarray) -> np.ndarray:
        return x @ tensors[names[which] + ".weight"].astype(float).T + tensors.get(names[which] + ".bias", 0)

    return linear("down", np.tanh(linear("gate", x)) * linear("up", x) if spec.gated else np.tanh(linear("up", x)))


def local_ffn(x: np.ndarray, spec: ModelSpec, weights: dict[str, np.ndarray]) -> np.ndarray:
    name = "gate_up" if spec.gated else "up"
    y = x @ weights[name].T + weights.get(name + "_bias", 0)
    gate, up = np.split(y, 2, axis=1) if spec.gated else (y, 1)
    return (np.tanh(gate) * up) @ weights["down"].T + weights.get("down_bias", 0)


def assert_sum_is(whole: np.ndarray, spec: ModelSpec, parts: list[np.ndarray]) -> None:
    one_layer = replace(spec, num_layers=1, windows=spec.windows[:1])
    bound = model_apart(one_layer, len(whole), torch.float64) * np.abs(whole).max()
    assert_apart(torch.from_numpy(np.abs(sum(parts) - whole)), bound)


@pytest.mark.tolerance
@pytest.mark.parametrize("variant, tp_size", CASES)
def test_sharded_math_equals_the_whole(variant, tp_size, checkpoint):
    spec, tensors = spec_of(variant), checkpoint(variant)
    names, ranks = tensor_names(spec), layouts(variant, tp_size)
    x = np.random.default_rng(0).normal(size=(3, spec.hidden_size))
    for layer_idx in range(spec.num_layers):
        attn, ffn = ([local_weights(rank, 2 * layer_idx + k, tensors) for rank in ranks] for k in range(2))
        whole = whole_attention(x, spec, tensors, names.layer(layer_idx))
        assert_sum_is(whole, spec, [local_attention(x, spec, tp_size, w) for w in attn])
        whole = whole_ffn(x, spec, tensors, names.layer(layer_idx))
        assert_sum_is(whole, spec, [local_ffn(x, spec, w) for w in ffn])
    heads = np.concatenate([local_weights(rank, 2 * spec.num_layers, tensors)["head"] for rank in ranks])
    assert np.array_equal(heads[: spec.vocab_size], tensors[names.embed if spec.tied else names.head])
    assert not heads[spec.vocab_size :].any()
    if not spec.tied:
        embed = np.concatenate([local_weights(rank, -1, tensors)["embed"] for rank in ranks])
        assert np.array_equal(embed[: spec.vocab_size], tensors[names.embed])


@pytest.mark.parametrize("variant", VARIANTS)
def test_norms_and_biases_are_read_whole(variant, checkpoint):
    spec, tensors, layout = spec_of(variant), checkpoint(variant), layouts(variant, 1)[0]
    one_dim = [w for group in groups(layout) for w in group.weights if len(w.shape) == 1]
    whole = [w for w in one_dim if w.kind is not ShardKind.COLUMN]
    assert all(np.array_equal(assemble(w, tensors), tensors[w.pieces[0].tensor]) for w in whole)
    assert ("q_norm" in {w.name for w in whole}) == spec.qk_norm


@pytest.mark.parametrize("variant", ["gqa", "mistral", "qwen2", "qwen3", "neox"])
def test_kinds_agree_with_transformers_tp_plan(variant):
    spec = spec_of(variant)
    kinds = {
        "colwise": ShardKind.COLUMN,
        "rowwise": ShardKind.ROW,
        "replicated_with_grad_allreduce": ShardKind.REPLICATED,
    }
    plan = AutoConfig.for_model(**config_of(variant)).base_model_tp_plan
    body = tensor_names(spec).embed.split(".")[0]
    ours = {p.tensor: w.kind for g in layouts(variant, 2)[0].groups for w in g.weights for p in w.pieces}
    for pattern, kind in plan.items():
        assert ours[f"{body}.{pattern.replace('*', '0')}.weight"] is kinds[kind], pattern
    assert len(plan) >= 4


def test_tp_size_that_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match="tensor_parallel_size=5 does not divide the 12 query heads; possible: 1, 2, 3"
    ):
        layouts("gqa", 5)


def test_every_family_has_a_variant():
    assert {model_type for model_type, _ in VARIANTS.values()} == set(FAMILIES)
