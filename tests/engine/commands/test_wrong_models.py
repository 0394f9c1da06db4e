"""Things that a user may take for a model: each command says in one line what is wrong with it, and what to give.

None of these has a tokenizer that can be read, which must not be what the user hears of first.
"""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from penstock.engine.commands.cli import main
from penstock.engine.planning.find_model import find_model
from safetensors.torch import load_file, save_file

from penstock import LLM
from tests.support.gguf_models import SMALL, write_model
from tests.support.raw_gguf import STRING, key, whole

DEMO = find_model("demo")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
SHARD = "model-00001-of-00002.safetensors"
COMMANDS = {
    "plan": ("plan",),
    "generate": ("generate", "--prompt", "a"),
    "answer": ("generate", "--chat", "a"),
    "chat": ("chat",),
    "batch": ("batch", "-i", "{}/in.jsonl", "-o", "{}/out.jsonl"),
    "serve": ("serve", "--port", "0"),
}


def config(**own: Any) -> Callable[[Path], Path]:
    """A copy of the demo model with another config, where None takes a key away."""

    def make(folder: Path) -> Path:
        changed = json.loads((DEMO / "config.json").read_text()) | own
        (folder / "config.json").write_text(json.dumps({key: value for key, value in changed.items() if value}))
        return folder

    return make


def architecture(name: str, model_type: str) -> Callable[[Path], Path]:
    return config(architectures=[name], model_type=model_type)


def without_config(**files: bytes) -> Callable[[Path], Path]:
    """A folder with these files, a double underscore for each dot, and without config.json."""

    def make(folder: Path) -> Path:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return folder

    return make


def weights(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    """A copy of the demo model whose file of weights is changed."""

    def make(folder: Path) -> Path:
        change(folder / "model.safetensors")
        return folder

    return make


def adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


def file_of_weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def gguf_beside_config(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    write_model(folder / "m-Q8_0.gguf", "llama", sizes=SMALL)
    return folder


def gguf_by_another_name(folder: Path) -> Path:
    write_model(folder / "m.gguf", "llama", sizes=SMALL)
    return (folder / "m.gguf").rename(folder / "sha256-00")


def gguf_of(**keys: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pairs = [key(f"general.{name}", STRING, value) for name, value in keys.items()]
        (folder / "m.gguf").write_bytes(whole(pairs, [], bytes(64)))
        return folder / "m.gguf"

    return make


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100_000])


def remove_index(file: Path) -> None:
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[:2]), file.with_name(SHARD))
    file.unlink()


def to_pickle(file: Path) -> None:
    file.rename(file.with_name("pytorch_model.bin"))


FOREIGN = {
    "a mixture of experts": (architecture("MixtralForCausalLM", "mixtral"), "architecture 'MixtralForCausalLM' is not"),
    "a vision model": (architecture("LlavaForConditionalGeneration", "llava"), "supported: LlamaForCausalLM (llama), "),
    "an encoder": (architecture("BertModel", "bert"), "architecture 'BertModel' is not supported; supported: Llama"),
    "another head": (architecture("LlamaForSequenceClassification", "llama"), "'LlamaForSequenceClassification' is"),
    "a part of a pipeline": (config(architectures=None, model_type=None), "architectures and model_type are missing"),
    "another scaling": (config(rope_parameters={"rope_type": "longrope"}), "rope_type 'longrope' is not supported"),
    "another activation": (config(hidden_act="xielu"), "hidden_act 'xielu' is not supported; supported: silu, "),
    "four bits": (config(quantization_config={"quant_method": "awq"}), "weights are read from GGUF files alone"),
    "eight bits": (config(dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn' is not supported; supported: float32"),
    "an adapter": (adapter, "adapter_config.json: an adapter is not read: merge it into its model and give that"),
    "a pipeline": (without_config(model_index__json=b"{}"), "a pipeline of diffusers, and no language model"),
    "the maker's format": (without_config(params__json=b"{}"), "give the directory in that of transformers"),
    "an empty folder": (without_config(), "is no checkpoint: config.json is missing, and there is no GGUF file"),
    "files of GGUF": (without_config(a__gguf=b"", b__gguf=b""), "but a.gguf, b.gguf: give the GGUF file itself"),
    "a file of weights": (file_of_weights, "give the "),
    "GGUF by another name": (gguf_by_another_name, "give "),
    "an architecture of GGUF": (gguf_of(architecture="gemma3"), "'gemma3' is not supported; supported: llama, qwen2, "),
    "a part of GGUF": (gguf_of(type="mmproj", architecture="clip"), "general.type 'mmproj' is not supported: give the"),
    "a pointer for GGUF": (lambda folder: pointer(folder / "m.gguf"), "m.gguf: is a git-lfs pointer"),
    "a name of the Hub": (lambda folder: "meta-llama/Llama-3-8B", "nothing is downloaded, `hf download` does that"),
}
WEIGHTS = {  # `plan` does without them
    "half a file": (weights(cut), "model.safetensors: truncated: model."),
    "a pointer": (weights(lambda file: file.write_bytes(POINTER)), "is a git-lfs pointer"),
    "one shard": (weights(remove_index), f"{SHARD} is one shard of several, but no model.safetensors.index.json"),
    "pickles": (weights(to_pickle), "pytorch_model.bin, are not read: save_pretrained of transformers writes safe"),
    "GGUF beside a config": (gguf_beside_config, "no safetensors file, but m-Q8_0.gguf: give the GGUF file itself"),
}


def can_plan(name: str, command: str) -> bool:
    return name in WEIGHTS and command == "plan"


def pointer(file: Path) -> Path:
    file.write_bytes(POINTER)
    return file


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the demo model without its tokenizer."""
    (tmp_path / "in.jsonl").write_text("{}\n")
    left_out = shutil.ignore_patterns("tokenizer*", "chat_template.jinja")
    return Path(shutil.copytree(DEMO, tmp_path / "model", ignore=left_out))


@pytest.fixture
def nothing_starts(monkeypatch):
    def start(*_: Any, **__: Any) -> None:
        pytest.fail("an engine was started for it")

    monkeypatch.setattr("penstock.engine.commands.serve.EngineProcess", start)
    monkeypatch.setattr("penstock.engine.runtime.start_engine.load", start)


@pytest.mark.parametrize(
    "name, command", [each for each in itertools.product(FOREIGN | WEIGHTS, COMMANDS) if not can_plan(*each)]
)
def test_what_is_no_model_is_said_before_all_else(folder, capsys, nothing_starts, name, command):
    make, message = (FOREIGN | WEIGHTS)[name]
    words = [word.format(folder.parent) for word in COMMANDS[command]]
    assert main([*words, "--model", str(make(folder))]) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if not line.startswith("penstock serve: listening")]
    assert shown.out == "" and line.startswith("penstock: error: ") and message in line


def test_a_tokenizer_that_is_broken_too_comes_second(folder):
    architecture("Phi3ForCausalLM", "phi3")(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"architecture 'Phi3ForCausalLM' is not supported; supported: LlamaForCausal"):
        LLM(str(folder))
    config()(folder)
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        LLM(str(folder))


def test_a_dry_run_needs_no_weights(folder, capsys):
    weights(to_pickle)(folder)
    given = folder.parent / "in.jsonl"
    body = {"model": "m", "prompt": [1, 2], "max_tokens": 2}
    given.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    words = ["batch", "--model", str(folder), "--served-model-name", "m", "-i", str(given), "--dry-run"]
    assert main(words) == 0 and json.loads(capsys.readouterr().out)["rows"] == 1
