"""Noting tokens: the kernel has the reference's counts and bits, whatever comes twice, in rows that ask alone."""

import pytest
import torch
from penstock.engine.kernels import occurrences as module
from penstock.engine.kernels.occurrences import note_tokens, note_tokens_reference
from penstock.engine.kernels.penalty import IN_PROMPT

from tests.support.kernel_proof import DEVICE, counted, equal, prove, prove_faster, prove_refusal

V, NUM_ROWS, NUM_TOKENS = 40, 5, 90


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)


def inputs_of(vocab_size: int = V, num_tokens: int = NUM_TOKENS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(NUM_ROWS, (num_tokens,), generator=generator)
    tokens = torch.randint(-1, vocab_size, (num_tokens,), generator=generator)
    state = torch.randint(3, (NUM_ROWS, vocab_size), generator=generator, dtype=torch.int32)
    state[2, 7] |= IN_PROMPT
    made = {"occurrences": state, "asks": torch.tensor([1, 0, 1, 1, 0]), "rows": rows, "tokens": tokens}
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "computed"])
def test_kernel_is_the_reference(sampled):
    runs = [
        lambda run=run, **inputs: run(**inputs, sampled=sampled)
        for run in (module._note_tokens_triton, note_tokens_reference)
    ]
    prove(*runs, inputs_of(), ("occurrences",), equal)


def test_tokens_by_hand():
    state = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    asks, rows, tokens = (torch.tensor(values, device=DEVICE) for values in ([1, 0], [0, 1, 0, 0], [3, 3, 3, -1]))
    for run in (module._note_tokens_triton, note_tokens):
        state.zero_()
        for _ in range(2):
            run(state, asks, rows, tokens, sampled=True)
        assert state.tolist() == [[2, 0, 0, 4], [0, 0, 0, 0]]
        run(state, asks, rows[:3], tokens[:3], sampled=False)
        run(state, asks, rows[:1], tokens[:1], sampled=False)
        assert state.tolist() == [[2, 0, 0, 4 + IN_PROMPT], [0, 0, 0, 0]]
        run(state, asks, rows[:0], tokens[:0], sampled=False)


def test_what_the_kernel_cannot_take_is_refused():
    names = ("rows", "tokens", "asks", "occurrences")
    prove_refusal(lambda **inputs: module._note_tokens_triton(**inputs, sampled=True), inputs_of(), *names)


def test_calls_are_counted_by_kind():
    with counted(module.calls, triton=1):
        module._note_tokens_triton(**inputs_of(), sampled=True)
    with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        note_tokens(**inputs_of(), sampled=True)


@pytest.mark.gpu
def test_kernel_is_faster(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 256)
    inputs = inputs_of(128256, 256)
    runs = [lambda run=run: run(**inputs, sampled=False) for run in (note_tokens, note_tokens_reference)]
    prove_faster(*runs, inputs["rows"].nbytes, "occurrences 256")
