"""Pages between device and host memory, in every order of the lanes: as if they moved one after another."""

import random

import pytest
import torch
from penstock.engine.compute.kv_cache import KVCache
from penstock.engine.runtime.lanes import InterleavedLanes
from penstock.engine.runtime.page_moves import IN, OUT, PageMover
from penstock.parallel.ledger import Transfer
from penstock.scheduler.batching.host_pages import Move

NUM_PAGES, NUM_HOST_PAGES, PAGE_SIZE = 7, 9, 4
CPU = torch.device("cpu")


def make(order: str, num_staged: int, dtype=torch.bfloat16) -> tuple[KVCache, PageMover]:
    cache = KVCache(3, NUM_PAGES, PAGE_SIZE, 2, 5, dtype, CPU)
    return cache, PageMover(cache.pages, NUM_HOST_PAGES, num_staged, InterleavedLanes(order, seed=0), poison=True)


def bits(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.uint8)


def page_of(cache: KVCache, page: int) -> torch.Tensor:
    """The page as attention addresses it: (layers, 2, S, K, E)."""
    return cache.data[:, :, page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


@pytest.mark.parametrize("order", ["earliest", "latest", "random"])
@pytest.mark.parametrize("num_staged", [1, 2, 5])
def test_moves_are_as_if_one_after_another(order, num_staged):
    """Whatever passes write between them, NaN too."""
    rng, generator = random.Random(num_staged), torch.Generator().manual_seed(0)
    cache, mover = make(order, num_staged)
    held: dict[int, torch.Tensor] = {}
    for _ in range(30):
        cache.data.copy_(
            torch.randint(-(2**15), 2**15, cache.data.shape, generator=generator).short().view(cache.data.dtype)
        )
        expected, moves = cache.data.clone(), []
        for _ in range(rng.randrange(12)):
            page, host_page = rng.randrange(1, NUM_PAGES), rng.randrange(NUM_HOST_PAGES)
            move = Move(page, host_page, is_out=host_page not in held or rng.random() < 0.5)
            here = expected[:, :, page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            if move.is_out:
                held[host_page] = here.clone()
            else:
                here.copy_(held[host_page])
            moves.append(move)
        mover.run(moves)
        assert torch.equal(bits(cache.data), bits(expected))
    mover.close()


def test_pages_that_move_at_once_are_different_ones():
    """A GPU writes them in any order."""
    rng, (_, mover) = random.Random(0), make("earliest", 3)
    moves = [Move(rng.randrange(1, 4), rng.randrange(9), is_out=rng.random() < 0.3) for _ in range(200)]
    chunks = list(mover._chunks(moves))
    assert sum(chunks, []) == moves and max(map(len, chunks)) == 3
    for chunk in chunks:
        assert len({move.page for move in chunk}) == len(chunk) and len({move.is_out for move in chunk}) == 1


def test_a_page_that_comes_back_has_the_bits_that_went_out():
    cache, mover = make("random", 2)
    cache.data.copy_(torch.randn(cache.data.shape))
    page_of(cache, 3)[0, 0, 0] = torch.nan
    before = page_of(cache, 3).clone()
    mover.run([Move(3, 8, is_out=True)])
    page_of(cache, 3).zero_()
    mover.run([Move(5, 8, is_out=False)])
    assert torch.equal(bits(page_of(cache, 5)), bits(before)) and not page_of(cache, 3).any()
    nbytes = before.numel() * before.element_size()
    assert mover.moved.sites == {OUT: Transfer(1, 0, nbytes), IN: Transfer(1, nbytes, 0)}


def test_a_copy_that_does_not_wait_is_seen(monkeypatch):
    """The orders of the lanes and the poison find it."""
    for taken_from in ("staged", "free"):
        found = 0
        for order in ("earliest", "latest"):
            cache, mover = make(order, 1)
            chunk = mover._chunk
            monkeypatch.setattr(
                mover, "_chunk", lambda *args, chunk=chunk, kind=taken_from: without(chunk(*args), kind)
            )
            cache.data.copy_(torch.randn(cache.data.shape))
            before = [page_of(cache, page).clone() for page in range(1, 6)]
            moves = [Move(page, page, is_out=True) for page in range(1, 6)]
            mover.run(moves)
            cache.data.zero_()
            mover.run([move._replace(is_out=False) for move in moves])
            found += any(
                not torch.equal(page_of(cache, page), was) for page, was in zip(range(1, 6), before, strict=True)
            )
        assert found, taken_from


def without(works, kind: str):
    """The works, waiting for no event of this kind."""
    return [
        type(work)(work.run, work.lane, tuple(e for e in work.waits if not e.kind.startswith(kind)), work.records)
        for work in works
    ]
