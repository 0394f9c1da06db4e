"""What a decode pass derives from its table: the kernel is the reference, word for word."""

import pytest
import torch
from kernel_proof import CONTIGUOUS, DEVICE, Layout, counted, equal, prove, prove_faster, prove_refusal

from engine.kernels import decode_inputs as module
from engine.kernels.decode_inputs import PAGES, DecodeInputs, derive_inputs, derive_inputs_reference

KERNEL = module._derive_inputs_triton
ON_DEVICE, NUM_PAGES = -1, 9
TABLES = (CONTIGUOUS, Layout("misaligned", before=1), Layout("sliced", before=3, between=5))


def table_of(num_rows: int, page_size: int) -> torch.Tensor:
    """Rows of all lengths; every third waits for its token; the last is padding. Numbers behind a row's pages are
    huge, and so would be what is read of them."""
    generator = torch.Generator().manual_seed(num_rows)
    table = torch.full((num_rows, PAGES + NUM_PAGES), 2**30, dtype=torch.int32)
    starts = torch.randint(0, NUM_PAGES * page_size, (num_rows,), generator=generator)
    table[:, 0] = torch.where(torch.arange(num_rows) % 3 == 0, ON_DEVICE, torch.arange(num_rows) + 7)
    table[:, 1], table[:, 2], table[:, 3] = starts, torch.randperm(num_rows, generator=generator), starts + 1
    for row, start in enumerate(starts.tolist()):
        held = start // page_size + 1
        table[row, PAGES : PAGES + held] = torch.randint(1, 10**6, (held,), generator=generator)
    table[-1] = 0
    return table.to(DEVICE)


def tensors_of(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """The table and the columns that it fills, by name."""
    columns = {name: torch.full((len(table),), -7, dtype=torch.int64, device=DEVICE) for name in DecodeInputs._fields}
    last_tokens = torch.arange(len(table), device=DEVICE) + 1000
    return {"table": table, "last_tokens": last_tokens, **columns, "lengths": columns["lengths"].int()}


def writing(run, page_size: int):
    return lambda table, last_tokens, **out: run(table, last_tokens, ON_DEVICE, page_size, DecodeInputs(**out))


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_kernel_is_the_reference(num_rows, page_size, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    kernel, reference = (writing(run, page_size) for run in (KERNEL, derive_inputs_reference))
    prove(kernel, reference, tensors_of(table_of(num_rows, page_size)), DecodeInputs._fields, equal, TABLES, ["table"])


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


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 256])
def test_kernel_is_faster(num_rows):
    tensors = tensors_of(table_of(num_rows, 16))
    nbytes = sum(tensors[name].nbytes for name in DecodeInputs._fields)
    runs = [lambda run=run: writing(run, 16)(**tensors) for run in (KERNEL, derive_inputs_reference)]
    prove_faster(*runs, nbytes, f"decode_inputs {num_rows}")
