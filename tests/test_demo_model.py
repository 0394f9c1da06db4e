"""The demo model in the package: small, can be cut over 4 ranks, and trained: as reported, and as measured here."""

import ast
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from penstock.engine.planning.find_model import find_model
from penstock.engine.text.tokenizer import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scripts.train_demo_model import MAX_FOLDER_BYTES, clean, folder_bytes, is_held_out

FOLDER = find_model("demo")
REPORT = json.loads((Path(__file__).parents[1] / "benchmarks" / "demo_model.json").read_text())
HELD_OUT = ("queue", "xmlrpc.server")  # modules whose docstrings it was not trained on
WINDOW = 256  # tokens


def docstrings(module: str) -> str:
    """The docstrings of a module of the standard library, read from its source, as the training text is made."""
    tree = ast.parse(Path(find_spec(module).origin).read_bytes())
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = [clean(ast.get_docstring(node) or "") for node in nodes]
    return "\n\n".join(text for text in texts if len(text) >= 20)


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, text: str) -> float:
    """Over windows of tokens that each begin with BOS, from the logits, in fp32."""
    bos, *ids = Tokenizer.load(FOLDER).encode(text)
    nats = 0.0
    for start in range(0, len(ids), WINDOW):
        window = torch.tensor([bos, *ids[start : start + WINDOW]])
        logprobs = model(window[None, :-1]).logits[0].float().log_softmax(-1)
        nats -= logprobs.gather(1, window[1:, None]).sum().item()
    return nats / math.log(2) / len(text.encode())


@pytest.fixture(scope="module")
def trained() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def untrained() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER), dtype=torch.float32).eval()


def test_the_report_says_trained():
    assert REPORT["bits_per_byte_trained"] <= 0.5 * REPORT["bits_per_byte_untrained"]


def test_the_report_is_of_this_folder():
    config = json.loads((FOLDER / "config.json").read_text())
    assert folder_bytes(FOLDER) == REPORT["folder_bytes"] <= MAX_FOLDER_BYTES == 8_000_000
    assert config["num_attention_heads"] % 4 == config["num_key_value_heads"] % 4 == 0


def test_parameters_are_as_reported(trained):
    assert trained.num_parameters() == REPORT["parameters"]


@pytest.mark.parametrize("module", HELD_OUT)
def test_it_is_trained(module, trained, untrained):
    """On text that it has not seen. About as good as the report says, too: one module is not the average of many."""
    assert is_held_out(module, percent=5)
    text = docstrings(module)
    assert len(text) > 2000
    measured, at_start = bits_per_byte(trained, text), bits_per_byte(untrained, text)
    assert measured < 0.6 * at_start
    assert measured < 1.5 * REPORT["bits_per_byte_trained"]
    assert at_start == pytest.approx(REPORT["bits_per_byte_untrained"], rel=0.15)
