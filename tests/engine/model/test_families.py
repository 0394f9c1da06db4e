"""A config.json is read as transformers reads it, or refused by name."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from penstock.engine.compute.rope import inverse_frequencies
from penstock.engine.model.families import FAMILIES, read_config, read_eos_token_ids, read_spec, tensor_names
from penstock.engine.model.spec import ModelSpec
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROOT = Path(__file__).parents[3]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def small(model_type: str, **own) -> dict:
    sizes = {"num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 101, **SMALL}
    if model_type == "gpt_neox":
        del sizes["num_key_value_heads"]
    return {"model_type": model_type, **sizes, **own}


def rope_styles(model_type: str, **rope) -> list[dict]:
    """The same rope parameters in a new config, in an old one, and in the oldest, whose kind is called "type"."""
    kind = rope.pop("rope_type")
    base, outside = 5000.0, "rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"
    return [
        small(model_type, rope_parameters={"rope_type": kind, "rope_theta": base, **rope}),
        small(model_type, rope_scaling={"rope_type": kind, **rope}, **{outside: base}),
        small(model_type, rope_scaling={"type": kind, **rope}, **{outside: base}),
    ]


ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", **YARN, "attention_factor": 0.9},
    {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", **YARN, "factor": None, "beta_fast": None},
]
WINDOWS = [
    small("mistral", sliding_window=None),
    small("mistral", sliding_window=7),
    *(
        small(qwen, **own)
        for qwen in ("qwen2", "qwen3")
        for own in (
            {"sliding_window": 9, "max_window_layers": 1},
            {"sliding_window": 9, "max_window_layers": 1, "use_sliding_window": True},
            {"sliding_window": 9, "use_sliding_window": True},
            {"sliding_window": None, "max_window_layers": 0, "use_sliding_window": True},
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        )
    ),
]
OTHERS = [
    small("llama", attention_bias=True, mlp_bias=False, tie_word_embeddings=True, torch_dtype="bfloat16"),
    small("llama", mlp_bias=True, head_dim=24, hidden_act="swish", dtype="float16", eos_token_id=[3, 4]),
    small("llama", num_key_value_heads=None, head_dim=None, eos_token_id=None, bos_token_id=None, rms_norm_eps=1e-5),
    small("llama", rope_scaling=None, rope_theta=777, dtype="float32", torch_dtype="float16", pretraining_tp=2),
    small("llama", rope_scaling={"rope_type": "llama3", **LLAMA3}, original_max_position_embeddings=32),
    small("llama", rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_theta": 3.0}),
    small("mistral", head_dim=32, num_key_value_heads=1),
    small("qwen2", head_dim=32),
    small("qwen2", architectures=["Qwen2ForCausalLM"]),
    small("qwen3", attention_bias=True),
    small("gpt_neox", rotary_pct=0.5, rotary_emb_base=999, use_parallel_residual=False, hidden_act="gelu_new"),
    small("gpt_neox", rope_parameters={"rope_theta": 7.0, "partial_rotary_factor": 1.0, "rope_type": "default"}),
    small("gpt_neox", attention_bias=False, tie_word_embeddings=True, layer_norm_eps=1e-3, rope_theta=5.0),
]
EMPTY = [{"model_type": name} for name in FAMILIES]
SHAPES = [read_config(path) for path in sorted((ROOT / "benchmarks/shapes").glob("*.json"))]
CONFIGS = EMPTY + WINDOWS + OTHERS + SHAPES
CONFIGS += [config for name in ("llama", "qwen3", "gpt_neox") for rope in ROPES for config in rope_styles(name, **rope)]


def spec_of(auto) -> dict:
    """The ModelSpec fields that transformers' config object means, as its modeling code uses them."""
    name, auto_rope = auto.model_type, _rope_of(auto)
    neox, bias = name == "gpt_neox", getattr(auto, "attention_bias", False)
    eos = auto.eos_token_id
    return {
        "family": name,
        "num_layers": auto.num_hidden_layers,
        "hidden_size": auto.hidden_size,
        "num_heads": auto.num_attention_heads,
        "num_kv_heads": getattr(auto, "num_key_value_heads", auto.num_attention_heads),
        "head_dim": _head_dim(auto),
        "ffn_size": auto.intermediate_size,
        "vocab_size": auto.vocab_size,
        "max_position": _max_position_of(auto, auto_rope),
        "norm": "layer" if neox else "rms",
        "norm_eps": auto.layer_norm_eps if neox else auto.rms_norm_eps,
        "activation": auto.hidden_act.replace("swish", "silu"),
        "gated": not neox,
        "qkv_bias": bias or name == "qwen2",
        "o_bias": bias,
        "ffn_up_bias": neox or getattr(auto, "mlp_bias", False),
        "ffn_down_bias": neox or getattr(auto, "mlp_bias", False),
        "qk_norm": name == "qwen3",
        "parallel_residual": neox and auto.use_parallel_residual,
        "tied": auto.tie_word_embeddings,
        "windows": _windows_of(auto),
        "rope": auto_rope,
        "dtype": str(auto.dtype or torch.float32).removeprefix("torch."),
        "bos_token_id": auto.bos_token_id,
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    }


def _max_position_of(auto, rope: dict) -> int:
    """The longest sequence. transformers sets no bound; the length that linear and yarn scale to counts, if it is more
    than the config has."""
    base = {"linear": auto.max_position_embeddings, "yarn": rope["original_max_position"]}.get(rope["kind"])
    return (
        auto.max_position_embeddings if base is None else max(auto.max_position_embeddings, int(base * rope["factor"]))
    )


def _head_dim(auto) -> int:
    return getattr(auto, "head_dim", None) or auto.hidden_size // auto.num_attention_heads


def _windows_of(auto) -> tuple:
    if auto.model_type == "mistral":
        return (auto.sliding_window,) * auto.num_hidden_layers
    types = getattr(auto, "layer_types", ["full_attention"] * auto.num_hidden_layers)
    return tuple(auto.sliding_window if name == "sliding_attention" else None for name in types)


def _rope_of(auto) -> dict:
    auto.standardize_rope_params()  # its rope functions do that before they read
    rope = auto.rope_parameters
    kind, yarn = rope["rope_type"], rope["rope_type"] == "yarn"
    original = rope.get("original_max_position_embeddings") if kind in ("llama3", "yarn") else None
    factor = auto.max_position_embeddings / original if yarn and rope["factor"] is None else rope.get("factor")
    return {
        "kind": kind,
        "theta": rope["rope_theta"],
        "rotary_dim": int(_head_dim(auto) * rope.get("partial_rotary_factor", 1.0)),
        "factor": factor,
        "original_max_position": original,
        "low_freq_factor": rope.get("low_freq_factor"),
        "high_freq_factor": rope.get("high_freq_factor"),
        "beta_fast": (rope.get("beta_fast") or 32) if yarn else None,
        "beta_slow": (rope.get("beta_slow") or 1) if yarn else None,
        "attention_factor": rope.get("attention_factor"),
        "mscale": rope.get("mscale"),
        "mscale_all_dim": rope.get("mscale_all_dim"),
        "truncate": rope.get("truncate", True),
        "divisors": None,
    }


def _load(config: dict, folder: Path) -> tuple[ModelSpec, object]:
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(read_config(folder), str(folder / "config.json")), AutoConfig.from_pretrained(folder)


OF_GGUF_ALONE = {"formats": (), "ffn_multiple": 16}  # what no config.json says


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_spec_equals_what_transformers_reads(config, tmp_path):
    spec, auto = _load(config, tmp_path)
    names = {"names": asdict(FAMILIES[auto.model_type].names)}
    assert asdict(spec) == spec_of(auto) | names | OF_GGUF_ALONE
    if (kind := spec.rope.kind) != "default":
        theirs, factor = ROPE_INIT_FUNCTIONS[kind](auto)
        ours, our_factor = inverse_frequencies(spec.rope)
        assert torch.equal(ours, theirs) and our_factor == factor


RECIPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LENGTHS = [  # max_position_embeddings, rope, longest sequence
    (64, RECIPE, 256),  # as model cards say: the length is left alone
    (256, RECIPE, 256),  # as configs that are published with it say
    (80, RECIPE, 256),
    (512, RECIPE, 512),  # never less than the config has
    (256, {**RECIPE, "factor": None}, 256),
    (64, {"rope_type": "linear", "factor": 2.5}, 160),
    (64, {"rope_type": "dynamic", "factor": 4.0}, 64),
    (64, {"rope_type": "llama3", **LLAMA3}, 64),
    (64, {"rope_type": "default"}, 64),
]


@pytest.mark.parametrize("length, rope, longest", LENGTHS)
def test_the_longest_sequence_is_the_scaled_length(length, rope, longest):
    for key in ("rope_scaling", "rope_parameters"):
        assert read_spec(small("qwen2", max_position_embeddings=length, **{key: rope}), "").max_position == longest


def test_cases_cover_every_family_kind_and_switch():
    specs = [read_spec(config, "config.json") for config in CONFIGS]
    for field in ModelSpec.__dataclass_fields__.keys() - OF_GGUF_ALONE:
        assert len({getattr(spec, field) for spec in specs}) > 1, f"{field} is the same in all cases"
    assert {spec.rope.kind for spec in specs} == {"default", "linear", "llama3", "yarn", "dynamic"}


def test_architecture_chooses_where_model_type_is_missing():
    for name, family in FAMILIES.items():
        assert read_spec({"architectures": list(family.architectures)}, "config.json").family == name


def test_dtype_may_carry_its_module():
    assert read_spec(small("llama", torch_dtype="torch.bfloat16"), "").dtype == "bfloat16"


def test_equal_rope_parameters_of_all_layer_types_are_one():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}
    nested = small("qwen2", rope_parameters={"full_attention": rope, "sliding_attention": rope})
    assert read_spec(nested, "") == read_spec(small("qwen2", rope_parameters=rope), "")


def test_tied_head_is_ignorable_only_where_tied():
    tied = read_spec(small("gpt_neox", tie_word_embeddings=True), "")
    assert tensor_names(tied).ignorable[-2:] == (r"embed_out\.weight", r"lm_head\.weight")
    assert tensor_names(read_spec(small("llama"), "")) == FAMILIES["llama"].names


def test_reading_a_config_imports_neither_torch_nor_transformers():
    code = "import sys, penstock.engine.model.layout; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_eos_ids_of_generation_config_count_too(tmp_path):
    spec = read_spec({"model_type": "llama", "eos_token_id": 2}, "config.json")
    assert read_eos_token_ids(tmp_path, spec) == (2,)
    file = tmp_path / "generation_config.json"
    for content, expected in (
        ("{}", (2,)),
        ('{"eos_token_id": 7}', (2, 7)),
        ('{"eos_token_id": [2, 9, 5]}', (2, 5, 9)),
    ):
        file.write_text(content)
        assert read_eos_token_ids(tmp_path, spec) == expected
    file.write_text('{"eos_token_id": "x"}')
    with pytest.raises(ValueError, match=r"generation_config\.json.*eos_token_id must be"):
        read_eos_token_ids(tmp_path, spec)
