"""GGUF models on a GPU: streamed, resident, eager and in graphs they give the same bits, and the floats' logits."""

import pytest
import torch
from penstock.engine.llm import LLM
from penstock.scheduler.batching.request import SamplingParams

from tests.support.gguf_models import FLOATS_BESIDE, load_reference, write_model
from tests.support.streaming_runs import fill_alike
from tests.support.watches import EndPass

pytestmark = pytest.mark.gpu
PROMPTS = [[5, 17, 3, 99, 42], [8, 1], [3, 4, 5, 6, 7, 8, 9, 10]]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
WAYS = {
    "resident": {"resident": "all"},
    "streamed": {"resident": "none"},
    "mixed": {"resident": 0.5},
    "eager": {"resident": "none", "enforce_eager": True},
}


def run(file, dtype, num_prompts, **options):
    """Tokens, and the logits of each pass."""
    logits = []
    options |= {"dtype": dtype, "max_num_seqs": num_prompts, "gpu_memory": "4GiB", "debug": {"poison": True}}
    with LLM(str(file), **options) as llm:
        fill_alike(llm)
        note = EndPass(lambda batch, gathered: logits.append(gathered[:, :130].cpu()) if len(gathered) else None)
        with llm.engine.watched_by(note):
            outputs = llm.generate(PROMPTS[:num_prompts], PARAMS)
    return [output.outputs[0].token_ids for output in outputs], logits


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_where_weights_lie(tmp_path, arch, dtype):
    """In passes of one and of three rows, which read stored bits."""
    write_model(tmp_path / "m.gguf", arch)
    for num_prompts in (1, 3):
        found = {name: run(tmp_path / "m.gguf", dtype, num_prompts, **options) for name, options in WAYS.items()}
        tokens, logits = found["resident"]
        for name, (other, others) in found.items():
            assert other == tokens and len(others) == len(logits), name
            assert all(torch.equal(a, b) for a, b in zip(others, logits)), name


def test_floats_beside_are_compressed_to_the_same_bits(tmp_path):
    write_model(tmp_path / "m.gguf", "llama", sizes=FLOATS_BESIDE)
    for num_prompts in (1, 3):
        tokens, logits = run(tmp_path / "m.gguf", "bfloat16", num_prompts, **WAYS["resident"])
        for name in ("streamed", "eager"):
            options = WAYS[name] | {"weights_compression": "lossless"}
            other, others = run(tmp_path / "m.gguf", "bfloat16", num_prompts, **options)
            assert other == tokens and len(others) == len(logits), name
            assert all(torch.equal(a, b) for a, b in zip(others, logits)), name


def test_tokens_are_transformers(tmp_path):
    write_model(tmp_path / "m.gguf", "llama")
    model = load_reference(tmp_path / "m.gguf", "llama").to("cuda")
    tokens, _ = run(tmp_path / "m.gguf", "float32", 3, resident="none")
    for prompt, generated in zip(PROMPTS, tokens):
        ids = torch.tensor([[*prompt, *generated[:-1]]], device="cuda")
        with torch.no_grad():
            best = model(ids).logits[0, len(prompt) - 1 :].argmax(-1).tolist()
        assert generated == best
