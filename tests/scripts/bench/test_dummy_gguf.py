"""Dummy GGUF files are models of the shape and the types that were asked for."""

import json

import pytest
from penstock.engine.llm import LLM
from penstock.engine.weights.gguf_model import read_gguf_spec
from penstock.scheduler.batching.request import SamplingParams

from scripts.bench import dummy_gguf
from tests.support.scripts import run

SHAPE = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 70}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("every, quantised", [((), {"blk.0", "blk.1", "blk.2"}), (("--bf16-every", "2"), {"blk.1"})])
@pytest.mark.parametrize("sparse", [(), ("--sparse",)])
def test_a_file_has_the_types_and_runs(monkeypatch, capsys, tmp_path, every, quantised, sparse):
    config, file = tmp_path / "shape.json", tmp_path / "m.gguf"
    config.write_text(json.dumps(SHAPE))
    types = ("--type", "Q4_0", "--head-type", "Q8_0")
    said = run(monkeypatch, capsys, dummy_gguf, str(config), str(file), *types, *every, *sparse)
    assert said["bytes"] == file.stat().st_size
    formats = dict(read_gguf_spec(file).formats)
    assert {name.rpartition(".ffn_up")[0] for name in formats if "ffn_up" in name} == quantised
    assert set(formats.values()) == {"Q4_0", "Q8_0"} and formats["output.weight"] == "Q8_0"
    load_format = "dummy" if sparse else "auto"
    with LLM(str(file), device="cpu", resident="none", load_format=load_format) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 2
