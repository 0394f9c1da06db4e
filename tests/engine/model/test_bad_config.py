"""A config that cannot be run is refused, and the message names the file and the value."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from penstock.engine.commands.cli import main
from penstock.engine.model.config_fields import QUANTISED, REFUSED
from penstock.engine.model.families import read_config, read_eos_token_ids, read_spec
from penstock.engine.model.spec import ModelSpec
from penstock.engine.planning.find_model import find_model
from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.weights.headers import find_entries
from penstock.engine.weights.read_model import read_model
from safetensors.torch import save_file

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}


def small(model_type: str, **own) -> dict:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 3}
    kv_heads = {} if model_type == "gpt_neox" else {"num_key_value_heads": 2}
    return {"model_type": model_type, **sizes, **kv_heads, **own}


def llama(**own) -> dict:
    return small("llama", **own)


OFF = QUANTISED | REFUSED  # the values of a key that mean off
BAD = [
    ({}, "architectures and model_type are missing; supported: LlamaForCausalLM (llama), MistralForCausalLM (mistral)"),
    ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
    (
        {"model_type": "gpt2", "architectures": ["LlamaForCausalLM"]},
        "model_type 'gpt2' of a LlamaForCausalLM is not supported; supported: LlamaForCausalLM (llama), ",
    ),
    ({"model_type": "mamba", "architectures": ["LlamaForCausalLM"]}, "is not supported; supported: Llama"),
    ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported"),
    (llama(architectures=["LlamaForSequenceClassification"]), "architecture 'LlamaForSequenceClassification'"),
    (llama(architectures="LlamaForCausalLM"), "architectures must be a list"),
    # sizes
    (llama(num_hidden_layers=0), "num_hidden_layers must be an integer of at least 1, not 0"),
    (llama(num_hidden_layers=513), "num_hidden_layers = 513 is not supported: it can be 512 at most"),
    (llama(num_hidden_layers=10**9), "num_hidden_layers = 1000000000 is not supported: it can be 512 at most"),
    (llama(hidden_size=-64), "hidden_size must be"),
    (llama(vocab_size="101"), "vocab_size must be an integer of at least 1, not '101'"),
    (llama(intermediate_size=96.0), "intermediate_size must be"),
    (llama(num_attention_heads=True), "num_attention_heads must be"),
    (llama(max_position_embeddings=None), "max_position_embeddings must be"),
    (llama(num_key_value_heads=3), "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
    (llama(hidden_size=66), "hidden_size = 66 is not a multiple of num_attention_heads = 4"),
    (llama(head_dim=15), "rotary dims must be even and at most head_dim = 15, not 15"),
    (llama(head_dim=0), "head_dim must be"),
    (small("gpt_neox", rotary_pct=0.2), "not 3"),
    (small("gpt_neox", rotary_pct=1.5), "at most head_dim = 16, not 24"),
    (small("gpt_neox", num_key_value_heads=2), "num_key_value_heads = 2 is not supported"),
    (small("gpt_neox", head_dim=32), "head_dim = 32 is not supported"),
    ({"model_type": "qwen2", "num_attention_heads": 8}, "num_attention_heads = 8 is not a multiple"),
    # values
    (llama(rms_norm_eps=None), "rms_norm_eps must be a positive number, not None"),
    (llama(tie_word_embeddings=1), "tie_word_embeddings must be true or false, not 1"),
    (llama(attention_bias=None), "attention_bias must be true or false"),
    (llama(hidden_act="quick_gelu"), "hidden_act 'quick_gelu' is not supported; supported: silu, swish, gelu"),
    (llama(hidden_act=["silu"]), "hidden_act ['silu'] is not supported"),
    (llama(torch_dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn' is not supported; supported: float32, bfloat16"),
    (llama(dtype="int8", torch_dtype="float32"), "dtype 'int8' is not supported"),
    (llama(eos_token_id="</s>"), "eos_token_id must be an integer, a list of integers or null, not '</s>'"),
    (llama(eos_token_id=[1, None]), "eos_token_id must be"),
    (llama(bos_token_id="<s>"), "bos_token_id must be an integer or null, not '<s>'"),
    (llama(vocab_size=2**31), "vocab_size = 2147483648 is not supported: it can be 2147483647 at most"),
    (llama(rms_norm_eps=10**400), "rms_norm_eps = 1000"),
    (llama(rms_norm_eps=1e31), "rms_norm_eps = 1e+31 is not supported: it can be 1e+30 at most"),
    (llama(hidden_act="x" * 10**6), f"hidden_act '{'x' * 199}... is not supported; supported: silu"),
    # rotary embedding
    (llama(rope_scaling={"type": "linear", "factor": 1e29}), "factor = 1e+29 makes 2048 tokens more than 2147483647"),
    (llama(rope_scaling={"type": "longrope"}), "rope_type 'longrope' is not supported; supported: default, linear"),
    (llama(rope_parameters={"rope_type": None}), "rope_type None is not supported"),
    (llama(rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}), "mrope_section = [2, 3, 3] is not supported"),
    (llama(rope_scaling="yarn"), "rope_parameters must be an object, not 'yarn'"),
    (llama(rope_scaling={"type": "linear"}), "rope_parameters: factor must be a positive number, not None"),
    (llama(rope_scaling={"type": "yarn"}), "rope_parameters: factor must be"),
    (llama(rope_scaling={"type": "linear", "factor": -1}), "factor must be a positive number, not -1"),
    (llama(rope_scaling=LLAMA3), "low_freq_factor must be"),
    (llama(rope_scaling=LLAMA3 | {"low_freq_factor": 4}), "high_freq_factor = 4 must be more than low_freq_factor = 4"),
    (llama(rope_theta=None), "rope_theta must be"),
    (llama(rope_theta=float("inf")), "rope_theta must be"),
    (llama(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
    (small("qwen3", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (
        small("qwen2", rope_parameters={"full_attention": {"rope_theta": 1.0}, "sliding_attention": {}}),
        "rope_parameters that differ by layer type are not supported",
    ),
    # windows
    (llama(sliding_window=8), "sliding_window = 8 is not supported"),
    (small("gpt_neox", sliding_window=8), "sliding_window = 8 is not supported"),
    (small("mistral", sliding_window=0), "sliding_window must be an integer of at least 1"),
    (small("mistral", layer_types=["full_attention"] * 3), "layer_types do not agree with sliding_window = 4096"),
    (small("qwen2", layer_types=["sliding_attention"] * 3), "layer_types do not agree with sliding_window = None"),
    (small("qwen2", layer_types=["full_attention"]), "layer_types must be a list of num_hidden_layers = 3 names"),
    (small("qwen3", layer_types=["linear_attention"] * 3), "layer_types 'linear_attention' is not supported"),
    (small("qwen3", max_window_layers=-1), "max_window_layers must be an integer of at least 0"),
    *((llama(**{key: "on"}), f"{key} = 'on' is not supported") for key in OFF),
    (
        llama(quantization_config={"quant_method": "gptq"}),
        "{'quant_method': 'gptq'} is not supported: quantised weights are",
    ),
]


@pytest.mark.parametrize("config, message", BAD, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_bad_config_is_refused(config, message):
    with pytest.raises(ValueError) as error:
        read_spec(config, "/models/x/config.json")
    assert str(error.value).startswith("/models/x/config.json: ")
    assert message in str(error.value)


@pytest.mark.parametrize("key", OFF)
def test_the_same_key_switched_off_is_accepted(key):
    for off in OFF[key]:
        assert isinstance(read_spec(llama(**{key: off}), ""), ModelSpec)


def test_dropout_is_accepted():
    dropout = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    assert read_spec(small("gpt_neox", **dropout), "") == read_spec(small("gpt_neox"), "")


@pytest.mark.parametrize("read", [read_config, lambda path: read_model(path, dummy=True)], ids=["config", "model"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b'{"a": ' + b"[" * 100_000, "is nested deeper than 64"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_unreadable_config_names_the_file(tmp_path, read, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    for path in (tmp_path, file, str(file)):
        with pytest.raises(ValueError, match=f"^{file}: {message}"):
            read(path)


def test_what_is_no_config_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'}: No such file"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="nowhere: No such file"):
        read_config(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json: is a pipe, and a file is expected"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="^/dev/zero: is a device, and a file is expected"):
        read_config("/dev/zero")


def test_a_generation_config_is_read_like_any_other(tmp_path):
    spec, file = read_spec(llama(), ""), tmp_path / "generation_config.json"
    for content, message in ((b"{", "is not JSON"), (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs"),
                             (b'{"eos_token_id": 1' + b"0" * 400 + b"}", "eos_token_id is 10")):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{file}: {message}"):
            read_eos_token_ids(tmp_path, spec)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=f"^{file}: is a pipe"):
        read_eos_token_ids(tmp_path, spec)


HUGE = 1000000000000000019884624838656  # 1e30 as Python writes an integer


@pytest.mark.parametrize(
    "unread",
    [
        {"model_max_length": HUGE},
        {"max_length": -HUGE, "task_specific_params": {"summarization": {"max_length": HUGE}}},
        {"text_config": {"model_max_length": HUGE, "vocab_size": HUGE}},
        {"rope_parameters": {"rope_type": "default", "long_mscale": HUGE}},
    ],
    ids=lambda unread: next(iter(unread)),
)
def test_a_number_in_a_field_that_is_not_read_refuses_no_model(tmp_path, unread):
    for name, content in (("config.json", llama(**unread)), ("generation_config.json", {"eos_token_id": 7, **unread}),
                          ("hf_quant_config.json", {"quantization": {"quant_algo": None}, **unread}),
                          ("tokenizer_config.json", unread), ("preprocessor_config.json", unread)):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
    shutil.copy(find_model("demo") / "tokenizer.json", tmp_path)
    model = read_model(tmp_path, dummy=True)
    assert model.spec == read_spec(llama(), "")
    assert read_eos_token_ids(tmp_path, model.spec) == (2, 7)
    assert Tokenizer.load(tmp_path).encode("Return the")


def test_an_index_may_state_any_size(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "1.safetensors")
    index = {"metadata": {"total_size": HUGE}, "weight_map": {"a": "1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_entries(tmp_path).keys() == {"a"}


@pytest.mark.parametrize(
    "field",
    ["vocab_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "eos_token_id", "bos_token_id",
     "tie_word_embeddings", "hidden_act", "dtype", "sliding_window", "num_experts", "max_position_embeddings"],
)  # fmt: skip
@pytest.mark.parametrize("text", [str(HUGE), "-1e400", "1" + "0" * 5000])
def test_a_number_that_is_too_large_is_refused_where_it_is_read(tmp_path, field, text):
    refuse_number(tmp_path, llama(**{field: "?"}), text, field)


@pytest.mark.parametrize("field", ["factor", "original_max_position_embeddings", "rope_theta", "beta_fast"])
def test_one_of_the_rotation_is_refused_too(tmp_path, field):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, field: "?"}
    refuse_number(tmp_path, llama(rope_scaling=scaling), "1" + "0" * 400, f"rope_parameters: {field}")


def refuse_number(directory: Path, config: dict, text: str, field: str) -> None:
    """Writes a config with `text` in the stead of "?", and expects that its `field` is refused."""
    file = directory / "config.json"
    file.write_text(json.dumps(config).replace('"?"', text))
    with pytest.raises(ValueError, match=rf"^{file}: {field} is {text[:9]}.*, a number that is too large$") as refused:
        read_model(directory, dummy=True)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "command", [["plan"], ["generate", "--prompt", "x", "--tokenizer", "demo"]], ids=lambda c: c[0]
)
def test_commands_name_the_config_s_file_and_field(tmp_path, capsys, command):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": -1}')
    assert main([*command, "--model", str(tmp_path)]) == 2
    message = f"error: {tmp_path / 'config.json'}: hidden_size must be an integer of at least 1, not -1"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "generate"])
def test_a_cache_s_root_gets_a_hint(tmp_path, capsys, command):
    more = {"plan": [], "generate": ["--prompt", "x"]}[command]
    root = tmp_path / "models--org--name"
    for part in ("blobs", "refs", "snapshots/0123abc"):
        (root / part).mkdir(parents=True)
    assert main([command, "--model", str(root), *more]) == 2
    hint = f"{root}: is a model's root in a Hugging Face cache: give {root}/snapshots/HASH (there: 0123abc)"
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("model", ["~no-such-user/model", "a" * 5000, "a\0b"])
def test_a_path_that_cannot_be_is_refused(model):
    with pytest.raises(ValueError, match="no such file or directory|File name too long"):
        find_model(model)
