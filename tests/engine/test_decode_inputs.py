"""What a decode pass derives from its table: the kernel is the reference, word for word."""

import pytest
import torch
from kernel_proof import DEVICE, counted

from engine.kernels import decode_inputs as module
from engine.kernels.decode_inputs import PAGES, DecodeInputs, derive_inputs_reference

ON_DEVICE, NUM_PAGES = -1, 9


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


def derive(run, table: torch.Tensor, page_size: int) -> DecodeInputs:
    last_tokens = torch.arange(len(table), device=DEVICE) + 1000
    columns = (torch.full((len(table),), -7, dtype=torch.int64, device=DEVICE) for _ in range(5))
    out = DecodeInputs(*columns, lengths=torch.full((len(table),), -7, dtype=torch.int32, device=DEVICE))
    run(table, last_tokens, ON_DEVICE, page_size, out)
    return out


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_kernel_is_the_reference(num_rows, page_size, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    table = table_of(num_rows, page_size)
    with counted(module.calls, triton=1, reference=1):
        ours, expected = (
            derive(run, table, page_size) for run in (module._derive_inputs_triton, derive_inputs_reference)
        )
    for name in DecodeInputs._fields:
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


def test_by_hand():
    table = torch.tensor([[5, 6, 1, 7, 30, 40, 0], [ON_DEVICE, 3, 0, 4, 20, 0, 0]], dtype=torch.int32, device=DEVICE)
    out = derive(derive_inputs_reference, table, page_size=4)
    assert [column.tolist() for column in out] == [[5, 1000], [6, 3], [40 * 4 + 2, 20 * 4 + 3], [1, 0], [7, 4], [7, 4]]
