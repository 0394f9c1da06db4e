"""The page pool against a model of it: the set of pages in use."""

import random

import pytest
from penstock.scheduler.batching.pages import RESERVED_PAGE, PagePool, pages_for


def test_pages_for():
    assert [pages_for(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_every_page_but_the_reserved_one_is_handed_out_once():
    pool = PagePool(8)
    assert pool.num_free == pool.num_usable == 7
    assert sorted(pool.allocate(7)) == [1, 2, 3, 4, 5, 6, 7]
    assert pool.num_free == 0
    with pytest.raises(AssertionError, match="1 pages asked, 0 free"):
        pool.allocate(1)


@pytest.mark.parametrize("num_pages", [-1, 0, 1])
def test_a_pool_without_usable_pages_is_refused(num_pages):
    with pytest.raises(ValueError, match=f"num_pages={num_pages}: expected at least 2"):
        PagePool(num_pages)


def test_order_seed_shuffles_reproducibly():
    orders = [PagePool(100, order_seed=seed).allocate(99) for seed in (None, 1, 1, 2)]
    assert orders[0] == list(range(1, 100))
    assert orders[1] == orders[2] != orders[3]
    assert all(sorted(order) == orders[0] for order in orders)


def test_misuse_is_loud():
    pool = PagePool(4)
    (page,) = pool.allocate(1)
    pool.release([page])
    with pytest.raises(AssertionError, match=f"page {page} is released twice"):
        pool.release([page])
    with pytest.raises(AssertionError, match="page 0 is released twice"):
        pool.release([RESERVED_PAGE])


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda pool: pool._free.append(pool._free[0]), "2 times free"),
        (lambda pool: pool._free.pop(), "0 times free"),
        (lambda pool: pool._free.append(RESERVED_PAGE), "the reserved page got out"),
        (lambda pool: pool._free.append(1), "1 times free"),
    ],
)
def test_check_integrity_detects(harm, message):
    pool = PagePool(6)
    held = pool.allocate(2)
    pool.check_integrity(held)
    harm(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(held)


@pytest.mark.parametrize("held", [[], [1], [1, 1, 2], [1, 2, 3]])
def test_check_integrity_detects_holders_that_do_not_add_up(held):
    pool = PagePool(6)
    assert sorted(pool.allocate(2)) == [1, 2]
    with pytest.raises(AssertionError, match="holders"):
        pool.check_integrity(held)


@pytest.mark.parametrize("seed", range(20))
def test_random_use_against_a_set(seed):
    rng = random.Random(seed)
    pool = PagePool(rng.randint(2, 30), order_seed=rng.choice([None, seed]))
    held: set[int] = set()
    for _ in range(300):
        if rng.random() < 0.5:
            pages = pool.allocate(rng.randint(0, pool.num_free))
            assert held.isdisjoint(pages) and RESERVED_PAGE not in pages
            held.update(pages)
        else:
            pages = rng.sample(sorted(held), rng.randint(0, len(held)))
            pool.release(pages)
            held.difference_update(pages)
        pool.check_integrity(held)
        assert pool.num_free == pool.num_usable - len(held)
