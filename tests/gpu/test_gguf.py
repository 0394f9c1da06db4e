"""GGUF models on a GPU: streamed, resident, eager and in graphs they give the same bits, and the floats' logits."""

import pytest
import torch
from penstock.engine.kernels import stored_matmul
from penstock.engine.llm import LLM
from penstock.scheduler.batching.request import SamplingParams

from tests.support.gguf_models import FLOATS_BESIDE, load_reference, write_model
from tests.support.gpu.enough import needs_ranks
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


def run(file, dtype, max_num_seqs, **options):
    """Tokens, and the logits of each pass. Decode passes are padded to `max_num_seqs`."""
    logits = []
    options |= {"dtype": dtype, "max_num_seqs": max_num_seqs, "gpu_memory": "4GiB", "debug": {"poison": True}}
    with LLM(str(file), **options) as llm:
        fill_alike(llm)
        note = EndPass(lambda batch, gathered: logits.append(gathered[:, :130].cpu()) if len(gathered) else None)
        with llm.engine.watched_by(note):
            outputs = llm.generate(PROMPTS[:max_num_seqs], PARAMS)
    return [output.outputs[0].token_ids for output in outputs], logits


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype, most", [("float32", 3), ("bfloat16", 8)])
def test_bits_do_not_depend_on_where_weights_lie(tmp_path, arch, dtype, most):
    """In passes that read stored bits: of one row, of more, and of prompts in bf16."""
    write_model(tmp_path / "m.gguf", arch)
    for max_num_seqs in (1, most):
        before = stored_matmul.calls["triton"]
        found = {name: run(tmp_path / "m.gguf", dtype, max_num_seqs, **options) for name, options in WAYS.items()}
        assert (stored_matmul.calls["triton"] > before) == (dtype == "bfloat16")
        tokens, logits = found["resident"]
        for name, (other, others) in found.items():
            assert other == tokens and len(others) == len(logits), name
            assert all(torch.equal(a, b) for a, b in zip(others, logits)), name


@needs_ranks(2)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype, most", [("float32", 3), ("bfloat16", 8)])
def test_two_ranks_agree_wherever_weights_lie(tmp_path, dtype, most):
    """Each with its cut of the stored rows; in fp32 with one rank too."""
    write_model(tmp_path / "m.gguf", "llama")
    alone, _ = run(tmp_path / "m.gguf", dtype, most, **WAYS["resident"])
    found = {
        name: run(tmp_path / "m.gguf", dtype, most, tensor_parallel_size=2, **options) for name, options in WAYS.items()
    }
    tokens, logits = found["resident"]
    assert dtype == "bfloat16" or tokens == alone
    for name, (other, others) in found.items():
        assert other == tokens and len(others) == len(logits) > 0, name
        assert all(torch.equal(a, b) for a, b in zip(others, logits)), name


def test_floats_beside_are_compressed_to_the_same_bits(tmp_path):
    write_model(tmp_path / "m.gguf", "llama", sizes=FLOATS_BESIDE)
    for max_num_seqs in (1, 3):
        tokens, logits = run(tmp_path / "m.gguf", "bfloat16", max_num_seqs, **WAYS["resident"])
        for name in ("streamed", "eager"):
            options = WAYS[name] | {"weights_compression": "lossless"}
            other, others = run(tmp_path / "m.gguf", "bfloat16", max_num_seqs, **options)
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
