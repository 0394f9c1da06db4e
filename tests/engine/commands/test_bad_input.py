"""Mistakes of users, each class once, through the whole engine: refused by a message that names the file, tensor, flag
or field, before a worker is built or a rank launched; on the command line as one line and exit code 2.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from penstock.engine.commands.cli import main
from penstock.engine.planning.find_model import find_model
from penstock.engine.runtime import start_engine
from penstock.parallel.launch import Launch
from safetensors.torch import load_file, save_file

from penstock import LLM

DEMO = find_model("demo")
SHAPE = Path(__file__).resolve().parents[3] / "benchmarks/shapes/Llama-3.2-1B.json"
Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def demo_with(directory: Path, change: Callable[[Path], Any] | None = None) -> Path:
    """A copy of the demo model in `directory`, changed."""
    shutil.copytree(DEMO, directory, dirs_exist_ok=True)
    if change is not None:
        change(directory)
    return directory


def config(**own: Any) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **own}))

    return change


def text(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes(content)


def without(name: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).unlink()


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def rewrite(directory: Path) -> None:
        file = directory / "model.safetensors"
        weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(weights)
        save_file(weights, file)

    return rewrite


def weight(name: str, tensor: torch.Tensor) -> Callable[[Path], Any]:
    return tensors(lambda weights: weights.update({name: tensor}))


def truncate(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 1_000_000)


def lengthen_header(directory: Path) -> None:
    with open(directory / "model.safetensors", "r+b") as file:
        file.write(struct.pack("<Q", 1 << 33))


def corrupt_header(directory: Path) -> None:
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(20)
        file.write(b"\xff\x00")


def lose_a_shard(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: "two.safetensors" if name == NORM else "one.safetensors" for name in weights}
    save_file({name: tensor for name, tensor in weights.items() if name != NORM}, directory / "one.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


class Bad(NamedTuple):
    """`change` spoils a copy of the demo model (None: it stays as it is); `options` are the engine's."""

    name: str
    message: str  # a regular expression
    change: Callable[[Path], Any] | None = None
    options: dict[str, Any] = {}


CHECKPOINTS = [
    Bad("truncated file", r"model\.safetensors: truncated: model\.\S+ ends at byte \d+, but the file has 1000000",
        truncate),
    Bad("missing shard", r"two\.safetensors: missing shard file, named in model\.safetensors\.index\.json",
        lose_a_shard),
    Bad("no weights", r"no safetensors file \(there: .*tokenizer\.json", without("model.safetensors")),
    Bad("missing tensor", rf"1 tensor\(s\) missing from the checkpoint: {Q_PROJ}", tensors(lambda w: w.pop(Q_PROJ))),
    Bad("wrong shape", rf"{NORM} has shape \(255,\), the config asks for \(256,\)", weight(NORM, torch.ones(255))),
    Bad("wrong dtype", rf"dtype other than F32, BF16, F16 .*: {NORM} is F64", weight(NORM, torch.ones(256).double())),
    Bad("integer weights", rf"read from GGUF files alone\): {NORM} is I8",
        weight(NORM, torch.ones(256).char())),
    Bad("unexpected tensor", r"1 tensor\(s\) that this model does not have: .*: lora\.a",
        weight("lora.a", torch.ones(1))),
    Bad("corrupt header", r"model\.safetensors: corrupt header: ", corrupt_header),
    Bad("header longer than the file", r"model\.safetensors: the header is said to have 8589934592 b", lengthen_header),
    Bad("corrupt tokenizer", r"tokenizer\.json: not a tokenizer\.json: ", text("tokenizer.json", b'{"model": ')),
    Bad("no config", r"is no checkpoint: config\.json is missing, and there is no GGUF file", without("config.json")),
    Bad("corrupt config", r"config\.json: is not JSON: ", text("config.json", b'{"model_type": ')),
    Bad("architecture", r"architecture 'MambaForCausalLM' is not supported; supported: LlamaForCausalLM \(llama\), ",
        config(model_type="mamba", architectures=["MambaForCausalLM"])),
    Bad("rope type", r"rope_type 'longrope' is not supported; supported: default, linear, llama3, yarn, dynamic",
        config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4})),
    Bad("quantised", r"quantization_config = \{'quant_method': 'awq'\} is not supported",
        config(quantization_config={"quant_method": "awq"})),
    Bad("another size than the weights", r"has shape \(\d+, 256\), the config asks for \(1024, 256\)",
        config(intermediate_size=1024)),
    Bad("a config alone", r"config\.json' is a file: give the checkpoint's directory .*load_format='dummy'",
        options={"model": str(DEMO / "config.json")}),
    Bad("a shape alone", r"Llama-3\.2-1B\.json' is a file: give the checkpoint's directory",
        options={"model": str(SHAPE)}),
    Bad("no such model", r"model='nowhere': no such file or directory \(nothing is downloaded",
        options={"model": "nowhere"}),
    Bad("nothing there for a tokenizer", r"tokenizer='nowhere': no such file or directory \(nothing is downloaded",
        options={"tokenizer": "nowhere"}),
    Bad("no such tokenizer", r"tokenizer='\S+': no tokenizer there", options={"tokenizer": str(SHAPE.parent)}),
]  # fmt: skip

OPTIONS = [
    Bad("tp_size", r"tensor_parallel_size=3 does not divide the 8 query heads; possible: 1, 2, 4, 8",
        options={"tensor_parallel_size": 3}),
    Bad("tp_size of none", r"tensor_parallel_size=0: expected a positive integer", options={"tensor_parallel_size": 0}),
    Bad("too little memory", r"needs .* of memory a rank \(.*activations.*\), and there are 12\.00 MiB\. "
        r"What would fit: gpu_memory of at least .*; .*more ranks", options={"gpu_memory": "12MiB"}),
    Bad("too little for all", r"resident=all needs .* What would fit: gpu_memory of at least .*resident=auto",
        options={"gpu_memory": "3500KiB", "resident": "all", "max_num_seqs": 4, "max_num_batched_tokens": 64}),
    Bad("memory in words", r"gpu_memory: 'lots' is not a number of bytes \(examples: .*24GiB",
        options={"gpu_memory": "lots"}),
    Bad("no memory", r"gpu_memory: '?0'?: a number of bytes must be positive", options={"gpu_memory": 0}),
    Bad("endless memory", r"gpu_memory: '9+GiB' is not a number of bytes", options={"gpu_memory": "9" * 99 + "GiB"}),
    Bad("utilization", r"gpu_memory_utilization=1\.5: expected a fraction above 0, at most 1",
        options={"gpu_memory_utilization": 1.5}),
    Bad("resident in words", r"resident='most': expected auto, all, none or a fraction", options={"resident": "most"}),
    Bad("resident above 1", r"resident='?1\.5'?: expected auto, all, none or a fraction", options={"resident": 1.5}),
    Bad("resident nan", r"resident='?nan'?: expected auto, all, none or a fraction",
        options={"resident": float("nan")}),
    Bad("small ring", r"ring=4096 bytes \(4096 bytes\): the largest streamed group has .*MiB",
        options={"ring": 4096, "resident": "none"}),
    Bad("ring in words", r"ring: 'round' is not a number of bytes", options={"ring": "round"}),
    Bad("dtype", r"dtype='int8': expected one of auto, float32, bfloat16, float16|--dtype: invalid choice: 'int8'",
        options={"dtype": "int8"}),
    Bad("lanes", r"lanes='never': expected one of earliest, latest, random|--lanes: invalid choice",
        options={"debug": {"lanes": "never"}}),
    Bad("load_format", r"load_format='pt': expected one of auto, safetensors, dummy|--load-format: invalid choice",
        options={"load_format": "pt"}),
    Bad("longer than trained", r"max_model_len=513: the model was trained for 512 tokens",
        options={"max_model_len": 513}),
    Bad("no length", r"max_model_len=-1: expected a positive integer", options={"max_model_len": -1}),
    Bad("no page in host memory", r"kv_host_memory=9: expected room for a KV page at least, which has \d+ bytes",
        options={"kv_host_memory": 9}),
    Bad("a window in host memory", r"kv_host_memory=1048576 with an attention_window: pages there",
        options={"kv_host_memory": "1MiB", "attention_window": 40}),
    Bad("sinks alone", r"attention_sinks=4: there are none without an attention_window",
        options={"attention_sinks": 4}),
    Bad("sinks below zero", r"attention_sinks=-1: expected a number of tokens, or 0",
        options={"attention_sinks": -1, "attention_window": 40}),
    Bad("no window", r"attention_window=0: expected a positive integer", options={"attention_window": 0}),
    Bad("a window of a page", r"attention_window=15: expected at least page_size=16 tokens",
        options={"attention_window": 15}),
    Bad("more than trained", r"attention_sinks=4 and attention_window=509 are 513 tokens, and .* trained for 512",
        options={"attention_sinks": 4, "attention_window": 509}),
    Bad("more than a layer sees", r"attention_window=100 are 100 tokens, and the model has layers that see 64",
        config(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64),
        {"attention_window": 100}),
    Bad("pages of a window", r"num_pages=3: 32 tokens fit, and attention_sinks\+attention_window=100 is asked",
        options={"num_pages": 3, "attention_window": 100}),
    Bad("pages", r"num_pages=1: expected at least 2 \(page 0 is reserved", options={"num_pages": 1}),
    Bad("too few pages", r"num_pages=3: 32 tokens fit, and max_model_len=100 is asked",
        options={"num_pages": 3, "max_model_len": 100}),
    Bad("too many ranks", r"tensor_parallel_size=257: expected a positive integer, at most 256",
        options={"tensor_parallel_size": 257}),
    Bad("too many rows", r"max_num_seqs=65537: expected a positive integer, at most 65536",
        options={"max_num_seqs": 65537}),
    Bad("too many tokens", r"max_num_batched_tokens=1048577: expected a positive integer, at most 1048576",
        options={"max_num_batched_tokens": 2**20 + 1}),
    Bad("a huge page", r"page_size=65537: expected a positive integer, at most 65536", options={"page_size": 65537}),
    Bad("huge pages", r"num_pages=2147483648: expected a positive integer, at most", options={"num_pages": 2**31}),
    Bad("a huge seed", r"^(?:penstock: error: )?seed=18446744073709551616: expected an integer of 64 bits",
        options={"seed": 2**64}),
    Bad("a huge order", r"page_order_seed=-9223372036854775809: expected an integer of 64 bits",
        options={"debug": {"page_order_seed": -(2**63) - 1}}),
    Bad("too much memory", r"gpu_memory: '?1152921504606846977'?: .* at most 1152921504606846976 \(1 EiB\)",
        options={"gpu_memory": 2**60 + 1}),
    Bad("a link beyond all", r"link_gb_s=10000000\.0: expected a positive rate, from 0\.001 to 1e\+06",
        options={"link_gb_s": 1e7}),
    Bad("rows", r"max_num_seqs=0: expected a positive integer", options={"max_num_seqs": 0}),
    Bad("tokens", r"max_num_batched_tokens=0: expected a positive integer", options={"max_num_batched_tokens": 0}),
    Bad("fewer tokens than rows", r"max_num_batched_tokens=7 is less than max_num_seqs=8: .*; raise the one or lower",
        options={"max_num_batched_tokens": 7, "max_num_seqs": 8}),
    Bad("page_size", r"page_size=0: expected a positive integer", options={"page_size": 0}),
    Bad("link", r"link_gb_s=-1\.0: expected a positive rate", options={"link_gb_s": -1.0}),
    Bad("profile", r"(?i)device_profile|no such|profile", options={"device_profile": "h9000"}),
    Bad("trace", r"--trace /nowhere/trace\.json: no such directory", options={"trace": "/nowhere/trace.json"}),
    pytest.param(
        Bad("no cuda", r"device=cuda: no CUDA device is visible to torch", options={"device": "cuda"}),
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", ["max_num_seqs", "seed", "gpu_memory", "ring", "resident", "link_gb_s", "trace"])
def test_a_number_that_python_does_not_write_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name}(=|: )\(a number of over 4300 digits\): "):
        LLM(**{name: 10**5000})


def test_nor_one_of_the_debug_options():
    with pytest.raises(ValueError, match=r"^page_order_seed=\(a number of over 4300 digits\): "):
        LLM(debug={"page_order_seed": 10**5000})


def test_memory_that_the_system_refuses_is_one_line_that_says_what_it_is_for(capfd):
    """More than there are addresses: no machine has them."""
    arguments = ["generate", "--prompt", "a", "--num-pages", str(2**31 - 1), "--page-size", "65536"]
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(r"^penstock: error: the system refuses so much host memory \(.*KV cache \d.*num_pages", line)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_a_trace_goes_to_a_file(tmp_path, kind, nothing_begins):
    path = {"pipe": tmp_path / "pipe", "device": Path("/dev/zero"), "directory": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=f"^--trace {path}: is a {kind}, and a file is expected$"):
        LLM(trace=path)


@pytest.fixture
def nothing_begins(monkeypatch):
    """A worker that is built, or a rank that is launched, fails the test."""

    def begin(*_: Any, **__: Any) -> None:
        pytest.fail("something was allocated or launched before the mistake was found")

    monkeypatch.setattr(start_engine, "connect", begin)
    monkeypatch.setattr(Launch, "start", begin)


def options_of(bad: Bad, directory: Path) -> dict[str, Any]:
    model = "demo" if bad.change is None else str(demo_with(directory / "model", bad.change))
    return {"model": model, **bad.options}


@pytest.mark.parametrize("bad", [*CHECKPOINTS, *OPTIONS], ids=lambda bad: bad.name)
def test_is_refused(bad, tmp_path, monkeypatch, capfd, nothing_begins):
    """Python and the command line refuse it, on one rank and on two."""
    options = options_of(bad, tmp_path)
    with pytest.raises(ValueError, match=bad.message) as refused:
        LLM(**options)
    assert "\n" not in str(refused.value)
    values = {**options, **options.get("debug", {})}
    values.pop("debug", None)
    flags = [part for name, value in values.items() for part in ("--" + name.replace("_", "-"), str(value))]
    for more in ([], ["-tp", "2"]) if "tensor_parallel_size" not in options else ([],):
        capfd.readouterr()
        assert main(["generate", *flags, *more, "--prompt", "a"]) == 2
        assert_one_line(capfd.readouterr(), bad.message)


def assert_one_line(captured: Any, message: str) -> None:
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("penstock: error: ") and re.search(message, line), line


def test_a_file_out_of_reach_is_one_line(monkeypatch, capsys):
    """root may read everything, so what the system would say is said here."""

    def refuse(*args):
        raise PermissionError(13, "Permission denied", "/secret/model")

    monkeypatch.setattr("penstock.engine.commands.plan.find_model", refuse)
    assert main(["plan", "--model", "/secret/model"]) == 2
    assert capsys.readouterr().err == "penstock: error: /secret/model: Permission denied\n"
