"""The kernel of log probabilities: ids and ranks are the reference's, values but for the device's exponential.

tests/engine/compute/test_sampler.py holds the reference to float64.
"""

import pytest
import torch
from penstock.engine.kernels import logprobs as module
from penstock.engine.kernels.logprobs import Logprobs, packed_width, score_rows, score_rows_reference
from penstock.engine.kernels.packed_scores import unpack

from tests.support.kernel_proof import DEVICE, DTYPES, counted, equal, prove, prove_faster, prove_refusal
from tests.support.rounding import assert_apart, logprobs_apart

V, MOST, POISON = 150, 20, -77
WANTED = [20, -1, 5, 0, 1, 20, -1, 7]
KINDS = ("random", "tied", "equal", "masked", "huge")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)


def logits_of(kind: str, dtype: torch.dtype) -> torch.Tensor:
    normal = 3 * torch.randn(len(WANTED), V, generator=torch.Generator().manual_seed(len(kind)))
    made = {
        "random": normal,
        "tied": (normal / 2).round() * 2,
        "equal": normal * 0.0,  # zeros of both signs
        "masked": normal.masked_fill(torch.arange(V) % 40 > 0, -torch.inf),  # fewer than are wanted
        "huge": normal * 1000,
    }[kind]
    return made.to(dtype=dtype, device=DEVICE)


def run_with(run, logits: torch.Tensor, tokens: torch.Tensor, vocab_size: int = V, wanted: list = WANTED):
    packed = torch.full((len(logits), packed_width(MOST)), POISON, dtype=torch.int32, device=DEVICE)
    run(logits, vocab_size, tokens, torch.tensor(wanted, device=DEVICE), packed)
    return packed


def tokens_on_device() -> torch.Tensor:
    return torch.tensor([7, 0, 149, 3, -1, 120, 5, 80], device=DEVICE)


@pytest.mark.tolerance
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_the_reference(kind, dtype):
    logits, tokens = logits_of(kind, dtype), tokens_on_device()
    packed = run_with(module._score_rows_triton, logits, tokens)
    found, expected = Logprobs.of(packed.cpu()), Logprobs.of(run_with(score_rows_reference, logits, tokens).cpu())
    finite = logits.float().masked_fill(logits.isinf(), 0.0)
    bound = logprobs_apart(float(finite.abs().max()), V)
    for index, num_top in enumerate(WANTED):
        if num_top < 0:
            assert (packed[index] == POISON).all()
            continue
        ours, theirs = found.at(index, num_top), expected.at(index, num_top)
        assert (ours[1], [token for token, _ in ours[2]]) == (theirs[1], [token for token, _ in theirs[2]])
        values, others = (torch.tensor([one[0], *(value for _, value in one[2])]) for one in (ours, theirs))
        assert torch.equal(values.isinf(), others.isinf())
        assert_apart((values - others)[values.isfinite()].abs(), bound)
        assert (packed[index, 2 + num_top : 2 + MOST] == POISON).all()


def test_nan_and_infinities_end_and_stay_in_their_rows():
    logits, tokens = logits_of("random", torch.float32), tokens_on_device()
    expected = run_with(module._score_rows_triton, logits, tokens)
    logits[0] = torch.nan
    logits[2, ::2] = torch.nan
    logits[3] = -torch.inf
    logits[5, [3, 60]] = torch.inf
    found = run_with(module._score_rows_triton, logits, tokens)
    assert torch.equal(found[[1, 4, 6, 7]], expected[[1, 4, 6, 7]])
    assert Logprobs.of(found).top_ids[5, :2].tolist() == [3, 60]


def test_a_row_does_not_see_its_batch():
    logits, tokens = logits_of("random", torch.bfloat16), tokens_on_device()
    together = run_with(module._score_rows_triton, logits, tokens)
    for index, wanted in enumerate(WANTED):
        alone = run_with(module._score_rows_triton, logits[index:][:1], tokens[index:][:1], wanted=[wanted])
        assert torch.equal(alone[0], together[index])
    wide = run_with(module._score_rows_triton, logits.float(), tokens)
    assert torch.equal(wide, together)


def test_memory_around_is_neither_read_nor_written():
    """Logits and what is packed lie in memory in every way; columns behind the vocabulary are huge."""
    logits = logits_of("tied", torch.bfloat16)
    logits[:, 131:] = 1e9
    wanted, tokens = torch.tensor(WANTED, device=DEVICE), tokens_on_device().clamp(max=130)

    def writing(run):
        def write(logits, ids):
            ids.copy_(Logprobs.of(run_with(run, logits, tokens, 131)).top_ids[:, :5] * (wanted >= 5)[:, None])

        return write

    inputs = {"logits": logits, "ids": torch.zeros(len(WANTED), 5, dtype=torch.int32, device=DEVICE)}
    prove(writing(module._score_rows_triton), writing(score_rows_reference), inputs, ("ids",), equal)
    prove_refusal(lambda logits: run_with(module._score_rows_triton, logits, tokens, 131), {"logits": logits})


def test_no_rows():
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert run_with(module._score_rows_triton, torch.empty(0, V, device=DEVICE), none, wanted=[]).shape[0] == 0


def test_calls_are_counted_by_kind():
    logits, tokens = logits_of("random", torch.float32), tokens_on_device()
    with counted(module.calls, triton=1):
        run_with(module._score_rows_triton, logits, tokens)
    with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        run_with(score_rows, logits, tokens)
    with counted(module.calls, reference=1):
        run_with(score_rows, logits.double(), tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 32])
def test_kernel_is_faster(monkeypatch, num_rows):
    monkeypatch.setattr(module, "BLOCK", 4096)
    logits = torch.randn(num_rows, 128256, dtype=torch.bfloat16, device="cuda")
    rest = (torch.zeros(num_rows, dtype=torch.int64, device="cuda"), torch.full((num_rows,), 5, device="cuda"))
    packed = torch.zeros(num_rows, packed_width(MOST), dtype=torch.int32, device="cuda")
    runs = [lambda run=run: run(logits, 128256, *rest, packed) for run in (score_rows, score_rows_reference)]
    prove_faster(*runs, logits.nbytes, f"logprobs {num_rows}")


@pytest.mark.parametrize("num_top", [0, 3, MOST, MOST + 2])
def test_rows_are_packed_as_they_are(num_top):
    """With fewer of the most likely ones than asked for, where a vocabulary has no more."""
    scores = Logprobs.of(run_with(score_rows_reference, logits_of("random", torch.float32), tokens_on_device()).cpu())
    packed = scores.packed(slice(1, 6), num_top)
    assert len(packed) == 4 * 5 * packed_width(num_top)
    assert list(unpack(packed, num_top)) == [scores.at(index, num_top) for index in range(1, 6)]
