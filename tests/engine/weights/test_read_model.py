"""The files beside config.json decide: dtype, a head of its own, the tensors' names, and that weights are
quantised. The engine reads each as transformers does."""

import json
from pathlib import Path

import pytest
import torch
from penstock.engine.commands import cli
from penstock.engine.planning.find_model import find_model
from penstock.engine.weights import read_model as read_model_module
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.headers import INDEX, SINGLE
from penstock.engine.weights.read_model import read_model, read_model_to_plan
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModel, AutoModelForCausalLM

from penstock import LLM, SamplingParams
from tests.support.oracle.checkpoints import write_checkpoint

PROMPT = [1, 5, 9, 33, 7]
TIED = {"tie_word_embeddings": True}
FAMILIES = {  # variant -> head, embedding
    "llama_gqa": ("lm_head.weight", "model.embed_tokens.weight"),
    "mistral_window": ("lm_head.weight", "model.embed_tokens.weight"),
    "qwen2": ("lm_head.weight", "model.embed_tokens.weight"),
    "qwen3": ("lm_head.weight", "model.embed_tokens.weight"),
    "neox_parallel": ("embed_out.weight", "gpt_neox.embed_in.weight"),
}


@pytest.fixture(autouse=True)
def small_comparisons(monkeypatch):
    monkeypatch.setattr(read_model_module, "COMPARED_BYTES", 10_000)


def write(directory: Path, variant: str, dtype: str = "float32", **config) -> dict[str, torch.Tensor]:
    """The variant's checkpoint in one file; returns its tensors."""
    write_checkpoint(directory, variant, dtype, **config)
    tensors = {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}
    rewrite(directory, tensors)
    return tensors


def rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    for file in (*directory.glob("*.safetensors"), *directory.glob(INDEX)):
        file.unlink()
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def change_config(directory: Path, **changes) -> None:
    """Changes config.json; a value of ... takes the key away."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def generate(directory: Path, **options) -> list[int]:
    with LLM(str(directory), device="cpu", max_num_seqs=2, max_model_len=64, **options) as llm:
        return list(
            llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0].outputs[0].token_ids
        )


@torch.no_grad()
def generate_by_transformers(directory: Path) -> list[int]:
    model, tokens = AutoModelForCausalLM.from_pretrained(directory).eval(), list(PROMPT)
    for _ in range(6):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


# --- a head of its own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_tied_model_s_own_head_is_read_where_it_differs(tmp_path, variant):
    head, embed = FAMILIES[variant]
    tensors = write(tmp_path, variant, **TIED)
    as_embedding = generate(tmp_path)
    tensors[head] = tensors[embed].clone()
    tensors[head][-1, -1] += 1  # the very last bytes
    rewrite(tmp_path, tensors)
    model = read_model(tmp_path)
    assert not model.spec.tied and f"{head} is not the embedding" in model.notes[0]
    tensors[head] = tensors[embed].roll(1, 1).contiguous()
    rewrite(tmp_path, tensors)
    expected = generate_by_transformers(tmp_path)
    assert expected != as_embedding
    assert generate(tmp_path) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_with_the_embedding_s_bytes_stays_tied(tmp_path, dtype):
    head, embed = FAMILIES["llama_gqa"]
    tensors = write(tmp_path, "llama_gqa", dtype, **TIED)
    rewrite(tmp_path, {**tensors, head: tensors[embed].clone()})
    model = read_model(tmp_path)
    assert model.spec.tied and model.notes == ()


def test_ranks_agree_on_a_head_of_its_own(tmp_path):
    head, embed = FAMILIES["llama_gqa"]
    tensors = write(tmp_path, "llama_gqa", **TIED)
    rewrite(tmp_path, {**tensors, head: tensors[embed].roll(1, 1).contiguous()})
    assert generate(tmp_path, tensor_parallel_size=2) == generate(tmp_path)


def test_a_head_that_fits_no_vocabulary_is_refused_by_name(tmp_path):
    tensors = write(tmp_path, "llama_gqa", **TIED)
    rewrite(tmp_path, {**tensors, "lm_head.weight": torch.ones(7, 128)})
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(7, 128\), the config asks for \(128, 128\)"):
        generate(tmp_path)


# --- one name for the matrix of both ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_tied_model_may_keep_its_matrix_as_the_head(tmp_path, variant):
    head, embed = FAMILIES[variant]
    tensors = write(tmp_path, variant, **TIED)
    expected = generate(tmp_path)
    tensors[head] = tensors.pop(embed)
    rewrite(tmp_path, tensors)
    assert generate_by_transformers(tmp_path) == expected
    assert generate(tmp_path) == expected


def test_what_save_model_writes_of_a_tied_model_loads(tmp_path):
    """Saves by the safetensors library, which writes one name for each matrix."""
    model = write_checkpoint(tmp_path, "llama_gqa", **TIED)
    expected = generate(tmp_path)
    save_model(model, str(tmp_path / SINGLE), metadata={"format": "pt"})
    assert set(FAMILIES["llama_gqa"]) & load_file(tmp_path / SINGLE).keys() == {"lm_head.weight"}
    assert generate(tmp_path) == expected


def write_index(directory: Path, names) -> None:
    weight_map = dict.fromkeys(names, "1.safetensors")
    (directory / SINGLE).rename(directory / "1.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_may_name_a_tied_head_that_no_shard_has(tmp_path):
    tensors = write(tmp_path, "qwen2", **TIED)
    expected = generate(tmp_path)
    write_index(tmp_path, [*tensors, "lm_head.weight"])
    assert generate(tmp_path) == expected


def test_an_untied_head_that_no_shard_has_is_missing(tmp_path):
    tensors = write(tmp_path, "qwen2")
    rewrite(tmp_path, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    write_index(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"1 tensor\(s\) missing from the checkpoint: lm_head\.weight"):
        generate(tmp_path)


# --- names without the family's prefix --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama_gqa", "qwen3", "neox_serial"])
def test_a_tied_model_that_was_saved_without_its_head_loads(tmp_path, variant):
    write_checkpoint(tmp_path / "whole", variant, **TIED)
    expected = generate(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "body")
    names = read_model(tmp_path / "body").spec.names
    assert names.prefix == "" and not names.embed.startswith(("model.", "gpt_neox."))
    assert generate(tmp_path / "body") == expected


def test_an_untied_model_without_its_head_is_refused_by_the_prefix(tmp_path):
    tensors = write(tmp_path, "qwen3")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    rewrite(tmp_path, bare)
    expected = generate(tmp_path)  # the head is there
    rewrite(tmp_path, tensors)
    assert generate(tmp_path) == expected
    del bare["lm_head.weight"]
    rewrite(tmp_path, bare)
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing: the tensors are named without 'model\.'"):
        generate(tmp_path)


def test_a_tensor_that_is_missing_is_named_as_the_file_would(tmp_path):
    tensors = write(tmp_path, "qwen3", **TIED)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    rewrite(tmp_path, {name: tensor for name, tensor in bare.items() if name != "layers.1.mlp.up_proj.weight"})
    with pytest.raises(ValueError, match=r"1 tensor\(s\) missing from the checkpoint: layers\.1\.mlp\.up_proj\.weight"):
        generate(tmp_path)


# --- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [..., None], ids=["missing", "null"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_the_config_lacks_is_the_files(tmp_path, dtype, absent):
    write(tmp_path, "llama_gqa", dtype)
    change_config(tmp_path, dtype=absent, torch_dtype=absent)
    assert str(AutoModelForCausalLM.from_pretrained(tmp_path).dtype) == f"torch.{dtype}"
    model = read_model(tmp_path)
    assert model.spec.dtype == dtype
    assert model.notes == (f"{tmp_path / 'config.json'} names no dtype: {dtype}, as the weights are",)


def test_of_several_dtypes_the_first_counts_as_in_transformers(tmp_path):
    tensors = write(tmp_path, "llama_gqa")
    change_config(tmp_path, dtype=...)
    for chosen in ("lm_head.weight", "model.embed_tokens.weight"):
        mixed = {name: t.bfloat16() if name == chosen else t for name, t in tensors.items()}
        rewrite(tmp_path, {**mixed, "a.rotary_emb.inv_freq": torch.ones(3, dtype=torch.int64)})
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).dtype
        assert f"torch.{read_model(tmp_path).spec.dtype}" == str(expected)


def test_a_dtype_that_the_config_names_stands(tmp_path):
    write(tmp_path, "llama_gqa", "bfloat16")
    change_config(tmp_path, dtype="float32")
    assert read_model(tmp_path).spec.dtype == "float32" and read_model(tmp_path).notes == ()


# --- what `plan` knows ------------------------------------------------------------------------------------------------


def plan(capsys, *arguments) -> dict:
    assert cli.main(["plan", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_reads_the_headers_beside_the_config(tmp_path, capsys):
    head, embed = FAMILIES["llama_gqa"]
    tensors = write(tmp_path, "llama_gqa", "bfloat16", **TIED)
    change_config(tmp_path, dtype=...)
    tied = plan(capsys, "--model", tmp_path)
    assert tied["dtype"] == "bfloat16" and any("bfloat16, as the weights are" in note for note in tied["notes"])
    rewrite(tmp_path, {**tensors, head: -tensors[embed]})
    own = plan(capsys, "--model", tmp_path)
    assert own["num_parameters"] - tied["num_parameters"] == 128 * 128
    assert any("is a head of its own" in note for note in own["notes"])


def test_plan_says_what_it_assumes_of_a_config_alone(tmp_path, capsys):
    write(tmp_path, "llama_gqa", "bfloat16")
    change_config(tmp_path, dtype=...)
    for model, more in ((tmp_path / "config.json", ()), (tmp_path, ("--load-format", "dummy"))):
        shown = plan(capsys, "--model", model, *more)
        assert shown["dtype"] == "float32"
        assert any("names no dtype: float32 is assumed" in note for note in shown["notes"])


def test_plan_goes_on_without_weights_that_cannot_be_read(tmp_path, capsys):
    write(tmp_path, "llama_gqa", "bfloat16")
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert read_model_to_plan(tmp_path).spec.dtype == "bfloat16"
    (note,) = [note for note in plan(capsys, "--model", tmp_path)["notes"] if "planned without" in note]
    assert "model.safetensors: is a git-lfs pointer" in note
    with pytest.raises(ValueError, match=r"model\.safetensors: is a git-lfs pointer"):
        read_model(tmp_path)


def test_plan_says_that_the_weights_are_not_the_config_s(tmp_path, capsys):
    tensors = write(tmp_path, "llama_gqa", "bfloat16")
    rewrite(tmp_path, tensors | {"lm_head.weight": torch.ones(7, 128)})
    (note,) = [note for note in plan(capsys, "--model", tmp_path)["notes"] if "planned without" in note]
    assert "1 tensor(s) with a wrong shape: lm_head.weight has shape (7, 128), the config asks for (128, 128)" in note


# --- what is said of it -----------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "scaling, stated, length",
    [
        (YARN, 128, 512),
        ({"rope_type": "linear", "factor": 2.0}, 128, 256),
        (YARN, 512, None),
        (YARN, 1024, None),  # transformers and vLLM take what is more
        ({"rope_type": "dynamic", "factor": 4.0}, 128, None),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 128, None),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_a_length_that_is_not_the_stated_one_is_said(tmp_path, scaling, stated, length):
    config = json.loads((find_model("demo") / "config.json").read_text())
    config |= {"rope_scaling": scaling, "max_position_embeddings": stated}
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_model(tmp_path, dummy=True)
    assert model.spec.max_position == (length or stated)
    by = f"by {scaling['rope_type']} rope_scaling of factor {scaling['factor']:g}"
    note = f"sequences of up to {length} tokens {by}, though max_position_embeddings is {stated}"
    assert model.notes == ((f"{tmp_path / 'config.json'}: {note}",) if length else ())


def test_a_length_of_a_config_that_states_none_is_beside_the_family_s(tmp_path):
    config = {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (note, _) = read_model(tmp_path, dummy=True).notes
    assert "up to 4096 tokens" in note and note.endswith("max_position_embeddings is 2048")


@pytest.mark.parametrize("tp_size", [1, 2])
def test_generate_says_each_note_once(tmp_path, capsys, tp_size):
    head, embed = FAMILIES["qwen2"]
    tensors = write(tmp_path, "qwen2", "bfloat16", **TIED)
    change_config(tmp_path, dtype=..., rope_parameters=..., rope_scaling=YARN, max_position_embeddings=128)
    rewrite(tmp_path, {**tensors, head: -tensors[embed]})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt_token_ids": PROMPT}))
    arguments = ["--model", str(tmp_path), "--device", "cpu", "-tp", str(tp_size)]
    expected = read_model(tmp_path).notes
    for note, part in zip(expected, ("up to 512 tokens", "a head of its own", "names no dtype"), strict=True):
        assert part in note
    assert cli.main(["generate", *arguments, "--prompts-file", str(prompts), "--max-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert cli.main(["plan", *arguments]) == 0
    shown = capsys.readouterr().out
    for note in expected:
        assert note not in out
        for text in (err, shown):
            assert text.count(note) == 1 and f"\nnote: {note}\n" in f"{text}\n"
    if tp_size == 1:
        with LLM(str(tmp_path), device="cpu", max_num_seqs=2) as llm:
            assert llm.engine.plan.notes == expected


# --- quantisation -----------------------------------------------------------------------------------------------------

QUANTISED = {
    "hf_quant_config.json": (
        {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}},
        "quant_algo = 'FP8'",
    ),
    "hf_quant_config.json ": ({"quantization": {"kv_cache_quant_algo": "FP8"}}, "kv_cache_quant_algo = 'FP8'"),
    "hf_quant_config.json  ": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo = 'NVFP4'"),
    "quantize_config.json": ({"bits": 4, "group_size": 128}, "bits = 4"),
    "quant_config.json": ({"zero_point": True, "w_bit": 4}, "w_bit = 4"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantisation_stated_beside_the_config_is_refused(tmp_path, capsys, name):
    content, message = QUANTISED[name]
    write(tmp_path, "llama_gqa", "bfloat16")
    file = tmp_path / name.strip()
    file.write_text(json.dumps(content))
    for command in (["plan", "--model", tmp_path], ["plan", "--model", tmp_path / "config.json"],
                    ["generate", "--model", tmp_path, "--prompt", "x", "--tokenizer", "demo"]):  # fmt: skip
        assert cli.main(list(map(str, command))) == 2
        assert (
            f"{file}: {message} is not supported: quantised weights are read from GGUF files alone"
            in capsys.readouterr().err
        )


def test_a_file_that_states_no_quantisation_is_no_hindrance(tmp_path):
    write(tmp_path, "llama_gqa")
    (tmp_path / "hf_quant_config.json").write_text('{"producer": {}, "quantization": {"quant_algo": null}}')
    Checkpoint.open(tmp_path).close()
    assert read_model(tmp_path).spec.dtype == "float32"
    (tmp_path / "hf_quant_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"hf_quant_config\.json: is not JSON"):
        read_model(tmp_path)
