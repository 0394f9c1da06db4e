"""The inputs of a decode pass, derived from its table: the kernel gives the words of the reference."""

import pytest
import torch
from penstock.engine.kernels import decode_inputs as module
from penstock.engine.kernels.decode_inputs import PAGES, DecodeInputs, Reading, derive_inputs, derive_inputs_reference

from tests.support.kernel_proof import CONTIGUOUS, DEVICE, Layout, counted, equal, prove, prove_faster, prove_refusal

KERNEL = module._derive_inputs_triton
ON_DEVICE, NUM_PAGES = -1, 9
TABLES = (CONTIGUOUS, Layout("misaligned", before=1), Layout("sliced", before=3, between=5))


def table_of(num_rows: int, page_size: int, margin: int = 0) -> torch.Tensor:
    """A table of rows of all lengths. Every fourth row's sequence has its first tokens no longer cached; every third
    row waits for its token; the last row is padding. Numbers behind a row's pages are huge, so that reading them
    shows."""
    generator = torch.Generator().manual_seed(num_rows)
    table = torch.full((num_rows, PAGES + NUM_PAGES), 2**30, dtype=torch.int32)
    lengths = torch.randint(0, NUM_PAGES * page_size - margin, (num_rows,), generator=generator) + 1
    table[:, 0] = torch.where(torch.arange(num_rows) % 3 == 0, ON_DEVICE, torch.arange(num_rows) + 7)
    starts = lengths - 1 + torch.where(torch.arange(num_rows) % 4 == 1, 10**6, 0)
    table[:, 1], table[:, 2], table[:, 3] = starts, torch.randperm(num_rows, generator=generator), lengths
    for row, length in enumerate(lengths.tolist()):
        held = (length - 1 + margin) // page_size + 1
        table[row, PAGES : PAGES + held] = torch.randint(1, 10**6, (held,), generator=generator)
    table[-1] = 0
    return table.to(DEVICE)


def tensors_of(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """The table and the columns that it fills, by name."""
    columns = {name: torch.full((len(table),), -7, dtype=torch.int64, device=DEVICE) for name in DecodeInputs._fields}
    last_tokens = torch.arange(len(table), device=DEVICE) + 1000
    return {"table": table, "last_tokens": last_tokens, **columns, "lengths": columns["lengths"].int()}


def writing(run, page_size: int, margin: int = 0):
    reading = Reading(ON_DEVICE, page_size, margin)
    return lambda table, last_tokens, **out: run(table, last_tokens, reading, DecodeInputs(**out))


@pytest.mark.parametrize("page_size, margin", [(1, 0), (3, 0), (16, 0), (3, 2), (16, 12)])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_kernel_is_the_reference(num_rows, page_size, margin, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    kernel, reference = (writing(run, page_size, margin) for run in (KERNEL, derive_inputs_reference))
    tensors = tensors_of(table_of(num_rows, page_size, margin))
    prove(kernel, reference, tensors, DecodeInputs._fields, equal, TABLES, ["table"])


@pytest.mark.parametrize("run", [KERNEL, derive_inputs_reference])
def test_padding_may_keep_what_it_had(run):
    """But for its length; and what nobody reads is not written."""
    tensors = tensors_of(table_of(5, 3))
    table, last_tokens, columns = tensors.pop("table"), tensors.pop("last_tokens"), DecodeInputs(**tensors)
    run(table, last_tokens, Reading(ON_DEVICE, 3, keeps_padding=True), columns._replace(sampled_positions=None))
    whole = DecodeInputs(**{name: column.clone() for name, column in tensors.items()})
    run(table, last_tokens, Reading(ON_DEVICE, 3), whole)
    for name, kept, full in zip(DecodeInputs._fields, columns, whole):
        if name == "sampled_positions":
            assert kept.eq(-7).all()
        else:
            assert torch.equal(kept[:-1], full[:-1]) and kept[-1] == (0 if name == "lengths" else -7)


def test_strides_that_are_not_rows_are_refused():
    prove_refusal(writing(KERNEL, 3), tensors_of(table_of(5, 3)), "table")


def test_calls_are_counted_by_kind():
    tensors = tensors_of(table_of(2, 3))
    with counted(module.calls, triton=1):
        writing(KERNEL, 3)(**tensors)
    with counted(module.calls, **{"triton" if DEVICE == "cuda" else "reference": 1}):
        writing(derive_inputs, 3)(**tensors)


def test_by_hand():
    table = torch.tensor([[5, 6, 1, 7, 30, 40, 0], [ON_DEVICE, 3, 0, 4, 20, 0, 0]], dtype=torch.int32, device=DEVICE)
    tensors = tensors_of(table)
    writing(derive_inputs_reference, 4)(**tensors)
    assert [tensors[name].tolist() for name in DecodeInputs._fields] == [
        [5, 1000],
        [6, 3],
        [40 * 4 + 2, 20 * 4 + 3],
        [1, 0],
        [7, 4],
        [7, 4],
    ]


def test_by_hand_behind_a_margin_and_evicted_tokens():
    """The row has the tenth token of a sequence, with which five are cached; three entries of its first page are
    empty."""
    table = torch.tensor([[5, 9, 0, 5, 30, 40]], dtype=torch.int32, device=DEVICE)
    tensors = tensors_of(table)
    writing(derive_inputs_reference, 4, margin=3)(**tensors)
    assert [tensors[name].tolist() for name in DecodeInputs._fields] == [[5], [4], [40 * 4 + 3], [0], [10], [5]]


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 256])
def test_kernel_is_faster(num_rows):
    tensors = tensors_of(table_of(num_rows, 16))
    nbytes = sum(tensors[name].nbytes for name in DecodeInputs._fields)
    runs = [lambda run=run: writing(run, 16)(**tensors) for run in (KERNEL, derive_inputs_reference)]
    prove_faster(*runs, nbytes, f"decode_inputs {num_rows}")
