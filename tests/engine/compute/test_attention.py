"""Rows that attend to their own keys, beside rows that attend to gathered ones, give what they give gathered."""

import random
from dataclasses import dataclass

import pytest
import torch
from penstock.engine.compute import attention
from penstock.engine.compute.inputs import CachedLayer, bind
from penstock.scheduler.batching.batch import Batch, BatchRow
from torch.nn.attention import SDPBackend

from tests.support.rounding import assert_apart, attention_apart

PAGE_SIZE, NUM_PAGES, H, K = 4, 2000, 4, 2
LARGEST = 5.0  # of the normal numbers that are drawn here


def batch_of(rows: list[tuple[int, int]], seed: int) -> Batch:
    """A batch of rows (start, tokens), whose pages are in any order."""
    pages = list(range(1, NUM_PAGES))
    random.Random(seed).shuffle(pages)
    made = []
    for index, (start, num_tokens) in enumerate(rows):
        own = tuple(pages.pop() for _ in range(-(-(start + num_tokens) // PAGE_SIZE)))
        made.append(BatchRow(index, tuple(range(num_tokens)), start, own, True, None))
    return Batch(tuple(made))


def attended(
    batch: Batch, whole: range, window: int | None, dtype=torch.float32, device="cpu", head_dim: int = 8
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    cache = random(NUM_PAGES * PAGE_SIZE, K, head_dim), random(NUM_PAGES * PAGE_SIZE, K, head_dim)
    heads = random(batch.num_tokens, H + 2 * K, head_dim)
    inputs = bind(batch, PAGE_SIZE, torch.zeros(8, dtype=torch.int64, device=device), whole)
    cache[0][inputs.addresses], cache[1][inputs.addresses] = heads[:, H : H + K], heads[:, H + K :]
    assert len(inputs.context.whole) == sum(row.start == 0 and len(row.tokens) in whole for row in batch.rows)
    attention.attend_(heads, CachedLayer(*cache, PAGE_SIZE), inputs.context, window)
    return heads[:, :H]


@pytest.mark.tolerance
@pytest.mark.parametrize(
    "rows",
    [
        [(0, 9)],
        [(0, 16), (0, 9), (0, 30)],
        [(5, 1), (0, 9), (7, 6), (0, 3), (0, 12), (11, 1)],
        [(0, 3), (4, 1)],
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 30])
def test_whole_rows_are_the_gathered_ones(rows, window, monkeypatch):
    monkeypatch.setattr(attention, "WHOLE_BACKEND", SDPBackend.MATH)
    monkeypatch.setattr(attention, "WHOLE_STEP_TOKENS", 8)
    batch = batch_of(rows, seed=3)
    whole, gathered = attended(batch, range(8, 31), window), attended(batch, range(0), window)
    most = max(start + num_tokens for start, num_tokens in rows)
    queries, keys = (torch.full((length, 8), LARGEST) for length in (1, most))
    assert_apart((whole - gathered).abs(), attention_apart(queries, keys, LARGEST, 8**-0.5))


@dataclass
class Spec:
    windows: tuple[int | None, ...] = (None,)
    head_dim: int = 128


@pytest.mark.parametrize(
    "spec, capability, longest",
    [
        (Spec((None, None)), (9, 0), 2**31),
        (Spec((None, 4096)), (9, 0), 4096),
        (Spec((512,)), (9, 0), 0),
        (Spec(head_dim=256), (9, 0), 0),
        (Spec(head_dim=20), (9, 0), 0),
        (Spec(), (8, 0), 0),
    ],
)
def test_which_rows_are_whole(spec, capability, longest, monkeypatch):
    """Rows are whole up to the narrowest window, and only where cuDNN takes them: nothing falls back unseen."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    cuda = torch.device("cuda")
    lengths = attention.whole_tokens(spec, torch.bfloat16, cuda)
    assert (lengths[-1] if lengths else 0) == longest
    assert not attention.whole_tokens(spec, torch.float32, cuda)
    assert not attention.whole_tokens(spec, torch.bfloat16, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [[(0, 1024)], [(9, 1), (0, 1500), (700, 6), (0, 30), (0, 2048), (0, 1)]], ids=str)
def test_whole_rows_on_a_gpu(rows, dtype):
    """Compares the kernels that a GPU takes; both ways round to the dtype once."""
    before = attention.calls["whole"]
    batch, settings = batch_of(rows, seed=3), {"window": None, "dtype": dtype, "device": "cuda", "head_dim": 128}
    whole = attended(batch, range(attention.LEAST_WHOLE_TOKENS, 2**31), **settings)
    assert attention.calls["whole"] - before == sum(start == 0 and length >= 1024 for start, length in rows)
    torch.testing.assert_close(whole, attended(batch, range(0), **settings), rtol=2e-2, atol=1e-2)
