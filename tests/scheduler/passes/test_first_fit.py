"""First fit against a search of every byte: what clashes never overlaps, and what does not clash may."""

from hypothesis import given
from hypothesis import strategies as st
from penstock.scheduler.passes.first_fit import first_fit
from penstock.scheduler.passes.pass_plan import Slot


def lowest(nbytes: int, taken: list[Slot]) -> int:
    """The lowest offset at which none of these bytes is taken, byte by byte."""
    held = {byte for slot in taken for byte in range(slot.offset, slot.end)}
    return next(o for o in range(1000) if held.isdisjoint(range(o, o + nbytes)))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 9)), max_size=9))
def test_each_lies_at_the_lowest_byte_that_is_free_for_it(lives):
    def clash(one: int, other: int) -> bool:
        (a, b, _), (c, d, _) = lives[one], lives[other]
        return max(min(a, b), min(c, d)) <= min(max(a, b), max(c, d))

    slots = first_fit({key: nbytes for key, (_, _, nbytes) in enumerate(lives)}, clash)
    assert list(slots) == list(range(len(lives)))
    for key, slot in slots.items():
        assert slot == (
            lowest(lives[key][2], [slots[other] for other in range(key) if clash(key, other)]),
            lives[key][2],
        )


def test_a_gap_is_filled_and_what_is_apart_in_time_lies_over_each_other():
    sizes = {"a": 4, "b": 2, "c": 4, "d": 2, "e": 3}
    apart = {("d", "b"), ("e", "b"), ("e", "a")}
    slots = first_fit(sizes, lambda key, earlier: (key, earlier) not in apart)
    assert slots == {"a": (0, 4), "b": (4, 2), "c": (6, 4), "d": (4, 2), "e": (0, 3)}
