"""The argmax of greedy sampling finds the lowest id of ties, and NaN wherever it lies, with any number of segments."""

import pytest
import torch
from penstock.engine.kernels import argmax as module
from penstock.engine.kernels.argmax import CUT, Owners, argmax_rows, argmax_rows_reference, choose_segments

from tests.support.kernel_proof import DEVICE, DTYPES, adversarial, counted, equal, prove, prove_faster, prove_refusal

SPLITS = (1, 2, 5)  # one launch; two launches; some segments are empty


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "CUT", CUT._replace(block=16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_segments", SPLITS)
def test_kernel_is_the_reference(dtype, num_segments):
    """Rows are of every kind: constants tie everywhere, zeros of both signs too, and one row has a NaN at its end."""
    logits = adversarial(9, 50, dtype)

    def writing(run, *rest):
        return lambda logits, tokens: tokens.copy_(run(logits, 47, *rest))

    inputs = {"logits": logits, "tokens": logits.new_zeros(9, dtype=torch.int64)}
    kernel = writing(module._argmax_rows_triton, None, num_segments)
    prove(kernel, writing(argmax_rows_reference), inputs, ("tokens",), equal)


@pytest.mark.parametrize("num_segments", SPLITS)
@pytest.mark.parametrize("vocab_size", [1, 16, 33, 50])
def test_tokens_are_the_samplers(vocab_size, num_segments):
    """Logits have few different values, so that most rows tie, some across segments. Columns behind the vocabulary are
    huge."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randint(-2, 2, (12, 64), generator=generator).to(dtype=torch.bfloat16, device=DEVICE)
    logits[1] = -torch.inf
    logits[2, vocab_size // 2] = torch.inf
    logits[3, vocab_size - 1] = torch.nan
    logits[4, 0] = torch.nan
    logits[:, vocab_size:] = 1e9
    logits[5, vocab_size:] = torch.nan
    scores = logits[:, :vocab_size].float()
    expected = (scores == scores.amax(-1, keepdim=True)).int().argmax(-1)  # the first 1 of a CPU tensor
    tokens = module._argmax_rows_triton(logits, vocab_size, None, num_segments)
    assert tokens.tolist() == expected.masked_fill(scores.isnan().any(-1), -1).tolist()
    assert (tokens == -1).nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("num_segments", SPLITS)
def test_padded_rows_are_not_read(num_segments):
    """They hold NaN, which would give -1."""
    rows = torch.tensor([3, 7, 0, 7], device=DEVICE)
    logits = torch.randn(4, 50, device=DEVICE).masked_fill(rows[:, None] == 7, torch.nan)
    owners = Owners(rows, 7)
    tokens = module._argmax_rows_triton(logits, 50, owners, num_segments)
    assert torch.equal(tokens, argmax_rows_reference(logits, 50, owners))
    assert tokens[[1, 3]].tolist() == [0, 0] and tokens[0] == logits[0].argmax()


def test_no_rows_give_no_tokens():
    tokens = module._argmax_rows_triton(torch.empty(0, 40, device=DEVICE), 40)
    assert tokens.shape == (0,) and tokens.dtype == torch.int64


@pytest.mark.parametrize("num_rows", [1, 4, 64, 256, 1024])
def test_segments_fill_the_gpu_and_are_not_empty_blocks(num_rows):
    segments = choose_segments(num_rows, 128256, CUT)
    assert 1 <= segments <= 126 and segments * num_rows <= max(4 * 132, num_rows)
    assert choose_segments(num_rows, 512, CUT) == 1


def test_what_the_kernel_cannot_take_is_refused():
    logits = torch.randn(3, 40, device=DEVICE)
    prove_refusal(lambda logits: module._argmax_rows_triton(logits, 40, None, 2), {"logits": logits})
    with pytest.raises(AssertionError):
        module._argmax_rows_triton(logits, 41, None, 2)


def test_calls_are_counted_by_kind():
    logits = torch.randn(2, 40, device=DEVICE)
    with counted(module.calls, triton=1):
        module._argmax_rows_triton(logits, 40, None, 2)
    with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        assert argmax_rows(logits, 40).tolist() == logits.argmax(-1).tolist()
    with counted(module.calls, reference=1):
        argmax_rows(logits.double(), 40)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 64, 256])
def test_kernel_is_faster(monkeypatch, num_rows):
    monkeypatch.setattr(module, "CUT", CUT)
    logits = torch.randn(num_rows, 128256, dtype=torch.bfloat16, device="cuda")
    runs = [lambda run=run: run(logits, 128256) for run in (argmax_rows, argmax_rows_reference)]
    prove_faster(*runs, logits.nbytes, f"argmax {num_rows}")
