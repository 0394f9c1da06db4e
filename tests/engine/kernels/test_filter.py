"""The filter's kernel against the reference, which sorts: both keep the same tokens, for any segments and dtype.

tests/engine/test_sampler.py holds the reference to transformers.
"""

import pytest
import torch
from penstock.engine.kernels import filter as module
from penstock.engine.kernels.filter import KEEP_ALL, Filters, find_limits, find_limits_reference
from penstock.engine.kernels.penalty import Penalised

from tests.support.kernel_proof import DEVICE, counted, equal, prove, prove_faster, prove_refusal

V = 150
ALL = (V, 1.0, 0.0)
ASKED = [
    *((1, 1.0, 0.0), (40, 1.0, 0.0)),
    *((V, 1e-9, 0.0), (V, 0.5, 0.0), (V, 0.999999, 0.0)),
    *((V, 1.0, 0.05), (V, 0.6, 0.4)),
    *((20, 0.8, 0.1), (100, 0.3, 0.0)),
    ALL,
]
KINDS = [
    *((torch.bfloat16, kind) for kind in ("random", "tied", "equal", "masked", "tiny")),
    *((torch.float16, "tied"), (torch.float32, "tied")),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name, value in {"BLOCK": 32, "SEGMENTS": 4, "TILES": 4}.items():
        monkeypatch.setattr(module, name, value)


def filters_of(asked: list[tuple[int, float, float]]) -> Filters:
    top_k, top_p, min_p = (torch.tensor(column, device=DEVICE) for column in zip(*asked, strict=True))
    return Filters(top_k, torch.where(top_p < 1.0, 1.0 - top_p, KEEP_ALL), min_p.log())


def temperatures_of(asked: list, value: float = 0.8) -> torch.Tensor:
    return torch.full((len(asked),), value, device=DEVICE)


def logits_of(kind: str, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    normal = 3 * torch.randn(num_rows, V, generator=torch.Generator().manual_seed(len(kind)))
    made = {
        "random": normal,
        "tied": (normal / 2).round() * 2,
        "equal": normal * 0.0,  # zeros of both signs
        "masked": normal.masked_fill(torch.arange(V) % 3 > 0, -torch.inf),
        "tiny": normal * 1e-30,
    }[kind]
    return made.to(dtype=dtype, device=DEVICE)


def kept_by(run, logits, temperatures, filters, *rest):
    return run(logits, logits.shape[1], temperatures, filters, *rest).keep(logits)


@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=str)
def test_kernel_keeps_what_the_reference_keeps(dtype, kind):
    logits, filters = logits_of(kind, len(ASKED), dtype), filters_of(ASKED)
    temperatures = temperatures_of(ASKED)
    expected = kept_by(find_limits_reference, logits, temperatures, filters)
    found = kept_by(module._find_limits_triton, logits, temperatures, filters)
    assert torch.equal(found, expected)
    assert expected.any(-1).all() and expected[-1].all()


@pytest.mark.parametrize("temperature", [1e-5, 1e4])
def test_extreme_temperatures(temperature):
    asked = [(V, 0.9, 0.0), (40, 0.5, 0.01)]
    logits, filters, temperatures = logits_of("random", 2, torch.bfloat16), filters_of(asked), temperatures_of(asked)
    temperatures.fill_(temperature)
    expected = kept_by(find_limits_reference, logits, temperatures, filters)
    assert torch.equal(kept_by(module._find_limits_triton, logits, temperatures, filters), expected)


def test_of_ties_at_the_border_the_lower_ids_are_kept():
    """All logits are equal: top_p keeps as many of the first ids as make up its share, in several blocks of the
    scan."""
    asked = [(V, p, 0.0) for p in (0.001, 0.31, 0.99)]
    kept = kept_by(
        module._find_limits_triton, logits_of("equal", 3, torch.bfloat16), temperatures_of(asked), filters_of(asked)
    )
    assert kept.sum(-1).tolist() == [1, 47, 149]
    assert torch.equal(kept, kept.sort(-1, descending=True).values)


def test_rows_that_do_not_draw_keep_all():
    asked = [(5, 0.5, 0.1)] * 3
    temperatures = torch.tensor([0.0, 1.0, 0.0], device=DEVICE)
    for run in (find_limits_reference, module._find_limits_triton):
        kept = kept_by(run, logits_of("random", 3, torch.bfloat16), temperatures, filters_of(asked))
        assert kept.all(-1).tolist() == [True, False, True]


def test_the_batch_changes_no_limit():
    """A row of bfloat16 has the same limits in float32 too: another row's penalties change nothing."""
    asked = [(V, 0.9, 0.0), (50, 0.7, 0.05)]
    logits, filters, temperatures = logits_of("random", 2, torch.bfloat16), filters_of(asked), temperatures_of(asked)
    first = module._find_limits_triton(logits, V, temperatures, filters)
    alone = Filters(*(column[1:] for column in filters))
    again = module._find_limits_triton(logits, V, temperatures, filters)
    last = module._find_limits_triton(logits[1:], V, temperatures[1:], alone)
    wide = module._find_limits_triton(logits.float(), V, temperatures, filters)
    for field in (0, 1):
        assert torch.equal(again[field], first[field])
        assert torch.equal(last[field], first[field][1:])
        assert torch.equal(wide[field], first[field])


@pytest.mark.parametrize("column", [5, 6])
def test_what_no_guess_sees_is_found(column):
    """Most of the mass lies in one lane, of which a guess sees one token; so the border is where it does not look. The
    lane is that of a sampled token in one case, and of none in the other."""
    logits = logits_of("random", len(ASKED), torch.float32) / 30
    logits[:, column::32] = 5.0 + torch.arange(5, device=DEVICE) / 8
    logits[::2, column] = 9.0
    filters, temperatures = filters_of(ASKED), temperatures_of(ASKED)
    expected = kept_by(find_limits_reference, logits, temperatures, filters)
    assert torch.equal(kept_by(module._find_limits_triton, logits, temperatures, filters), expected)


def test_penalised_rows_are_read_beside_the_others():
    """Each row is read from one place; the other holds NaN. Penalised rows are float32, of which all bits count."""
    logits, filters = logits_of("random", len(ASKED), torch.bfloat16), filters_of(ASKED)
    temperatures = temperatures_of(ASKED)
    asks = torch.arange(len(ASKED), device=DEVICE) % 3 % 2
    scores = logits_of("random", len(ASKED), torch.float32) / 3
    scores[asks == 0], logits[asks == 1] = torch.nan, torch.nan
    beside = Penalised(asks, scores)
    found, expected = (
        run(logits, V, temperatures, filters, beside).keep(beside.over(logits))
        for run in (module._find_limits_triton, find_limits_reference)
    )
    assert torch.equal(found, expected)


def test_infinities_and_nan():
    """A NaN is kept, so that the draw finds it; the other limits of its row mean nothing."""
    asked = [(5, 0.5, 0.1)] * 4
    logits = logits_of("random", 4, torch.bfloat16)
    logits[0] = -torch.inf
    logits[1, [7, 90]] = torch.inf
    logits[2, 60] = torch.nan
    kept = kept_by(module._find_limits_triton, logits, temperatures_of(asked), filters_of(asked))
    assert kept[1].nonzero()[:, 0].tolist() == [7]  # two ties have half of the mass each, and top_p = 0.5 takes one
    assert kept[0].any() and kept[2, 60]
    expected = kept_by(find_limits_reference, logits, temperatures_of(asked), filters_of(asked))
    assert torch.equal(kept[[0, 1, 3]], expected[[0, 1, 3]])


def test_columns_behind_the_vocabulary_and_around_are_not_read():
    asked = [(9, 0.9, 0.01), (131, 0.7, 0.0)]
    logits, filters, temperatures = logits_of("tied", 2, torch.bfloat16), filters_of(asked), temperatures_of(asked)
    logits[:, 131:] = 1e9
    first = find_limits_reference(logits, 131, temperatures, filters)

    def kernel(logits, kept):
        kept.copy_(module._find_limits_triton(logits, 131, temperatures, filters).keep(logits[:, :131]))

    def reference(logits, kept):
        kept.copy_(first.keep(logits[:, :131]))

    inputs = {"logits": logits, "kept": torch.zeros(2, 131, dtype=torch.int32, device=DEVICE)}
    prove(kernel, reference, inputs, ("kept",), equal)
    prove_refusal(lambda logits: module._find_limits_triton(logits, 131, temperatures, filters), {"logits": logits})


def test_no_rows():
    none = torch.empty(0, device=DEVICE)
    limits = module._find_limits_triton(torch.empty(0, V, device=DEVICE), V, none, Filters(none.long(), none, none))
    assert limits.least.shape == limits.last.shape == (0,)


def test_calls_are_counted_by_kind():
    asked = [(5, 1.0, 0.0)]
    rest = (temperatures_of(asked), filters_of(asked))
    logits = logits_of("random", 1, torch.bfloat16)
    with counted(module.calls, triton=1):
        module._find_limits_triton(logits, V, *rest)
    with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        find_limits(logits, V, *rest)
    with counted(module.calls, reference=1):
        find_limits(logits.double(), V, *rest)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 32])
def test_kernel_is_faster(monkeypatch, num_rows):
    monkeypatch.setattr(module, "BLOCK", 8192)
    logits = torch.randn(num_rows, 128256, dtype=torch.bfloat16, device="cuda")
    rest = (128256, torch.full((num_rows,), 0.8, device="cuda"), filters_of([(128256, 0.9, 0.0)] * num_rows))
    runs = [lambda run=run: run(logits, *rest) for run in (find_limits, find_limits_reference)]
    prove_faster(*runs, logits.nbytes, f"filter {num_rows}")
