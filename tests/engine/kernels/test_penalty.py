"""The penalties' kernel has the reference's bits, and writes rows that ask for penalties alone.

tests/engine/compute/test_sampler.py holds the reference to transformers.
"""

import pytest
import torch
from penstock.engine.kernels import penalty as module
from penstock.engine.kernels.penalty import IN_PROMPT, Penalties, penalise_rows, penalise_rows_reference

from tests.support.kernel_proof import DEVICE, DTYPES, adversarial, counted, equal, prove, prove_faster, prove_refusal

V, NUM_ROWS, STATE_ROWS = 150, 8, 11
ROWS = [10, 0, 3, 7, 5, 1, 2, 9]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)


def penalties_of(num_rows: int = NUM_ROWS, asks: float = 0.7) -> Penalties:
    generator = torch.Generator().manual_seed(2)
    repetition, presence, frequency = torch.randn(3, num_rows, generator=generator)
    some = (torch.rand(num_rows, generator=generator) < asks).long()
    return Penalties(*(column.to(DEVICE) for column in (some, 1 + repetition.abs() / 2, presence, frequency)))


def state_of(vocab_size: int = V, num_rows: int = STATE_ROWS) -> torch.Tensor:
    """Tokens of which most never occurred, others in the prompt, in the output, or in both."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(-4, 3, (num_rows, vocab_size), generator=generator).clamp_(min=0)
    in_prompt = torch.rand(num_rows, vocab_size, generator=generator) < 0.2
    return (counts + in_prompt * IN_PROMPT).int().to(DEVICE)


def rows_on_device() -> torch.Tensor:
    return torch.tensor(ROWS, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_the_reference(dtype):
    penalties = penalties_of()
    asks = penalties.asks_penalty[:, None] > 0
    assert asks.any() and not asks.all()

    def writing(run):
        def write(logits, repetition, presence, frequency, occurrences, scores):
            own = Penalties(penalties.asks_penalty, repetition, presence, frequency)
            found = run(logits, V - 3, occurrences, rows_on_device(), own)
            scores.copy_(torch.where(asks, found.scores, 0.0))

        return write

    inputs = {"logits": adversarial(NUM_ROWS, V, dtype), **penalties._asdict(), "occurrences": state_of(V - 3)}
    inputs = {name.removesuffix("_penalty"): tensor for name, tensor in inputs.items() if name != "asks_penalty"}
    inputs["scores"] = torch.zeros(NUM_ROWS, V - 3, device=DEVICE)
    kernel, reference = writing(module._penalise_rows_triton), writing(penalise_rows_reference)
    prove(kernel, reference, inputs, ("scores",), equal, names=["logits"])


def test_rows_that_ask_for_nothing_are_not_written(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, 7.0, **options))
    penalties = penalties_of(asks=0.5)
    logits = torch.randn(NUM_ROWS, V, device=DEVICE).bfloat16()
    found = module._penalise_rows_triton(logits, V, state_of(), rows_on_device(), penalties)
    for index, asks in enumerate(penalties.asks_penalty.tolist()):
        assert bool((found.scores[index] == 7.0).all()) == (not asks)
        assert torch.equal(found.over(logits)[index], found.scores[index] if asks else logits[index].float())


def test_what_the_kernel_cannot_take_is_refused():
    rest = (V, state_of(), rows_on_device(), penalties_of())
    logits = torch.randn(NUM_ROWS, V, device=DEVICE)
    prove_refusal(lambda logits: module._penalise_rows_triton(logits, *rest), {"logits": logits})


def test_calls_are_counted_by_kind():
    logits = torch.randn(NUM_ROWS, V, device=DEVICE)
    rest = (V, state_of(), rows_on_device(), penalties_of())
    with counted(module.calls, triton=1):
        module._penalise_rows_triton(logits, *rest)
    with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        penalise_rows(logits, *rest)
    with counted(module.calls, reference=1):
        penalise_rows(logits.double(), *rest)


@pytest.mark.gpu
def test_kernel_is_faster(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4096)
    logits = torch.randn(32, 128256, dtype=torch.bfloat16, device="cuda")
    rest = (128256, state_of(128256, 32), torch.arange(32, device="cuda"), penalties_of(32, asks=1.0))
    runs = [lambda run=run: run(logits, *rest) for run in (penalise_rows, penalise_rows_reference)]
    prove_faster(*runs, logits.nbytes, "penalty 32")
