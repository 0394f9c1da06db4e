"""The gather of embedding rows: Triton kernel (interpreted where there is no GPU) against the reference."""

import pytest
import torch

from engine.kernels import embedding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gather(function, table, tokens, first):
    out = torch.full((len(tokens), table.shape[1]), float("nan"), dtype=table.dtype, device=DEVICE)
    function(table.to(DEVICE), torch.tensor(tokens, device=DEVICE), first, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 96, 1024, 1500])
def test_kernel_is_the_reference_bitwise(dtype, width):
    """Rows of other ranks, before and behind this one's, come out as zeros; every element is written."""
    table = torch.randn(50, width).to(dtype)
    tokens = [0, 7, 8, 30, 57, 58, 99, 30]
    kernel = gather(embedding._embed_rows_triton, table, tokens, 8)
    assert torch.equal(kernel, gather(embedding.embed_rows_reference, table, tokens, 8))
    assert torch.equal(kernel[3].cpu(), table[22])
    assert not kernel[[0, 1, 5, 6]].any()


def test_ranks_complete_each_other():
    table, tokens = torch.randn(64, 8), [0, 31, 32, 63]
    parts = [gather(embedding._embed_rows_triton, table[start : start + 32], tokens, start) for start in (0, 32)]
    assert torch.equal(sum(parts).cpu(), table[tokens])


def test_calls_are_counted_by_kind():
    before = dict(embedding.calls)
    gather(embedding._embed_rows_triton, torch.randn(4, 4), [1], 0)
    gather(embedding.embed_rows, torch.randn(4, 4), [1], 0)
    assert embedding.calls == {"triton": before["triton"] + 1, "reference": before["reference"] + 1}
