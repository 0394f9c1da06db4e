"""Byte ranges by first fit: what is never in use together may share bytes."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from penstock.scheduler.passes.pass_plan import Slot

Key = TypeVar("Key")


def first_fit(sizes: Mapping[Key, int], clash: Callable[[Key, Key], bool]) -> dict[Key, Slot]:
    """Gives each key of `sizes` (in bytes), in their order, the lowest range that overlaps no range of an earlier key
    with which it clashes."""
    slots: dict[Key, Slot] = {}
    for key, nbytes in sizes.items():
        offset = 0
        for taken in sorted(slot for other, slot in slots.items() if clash(key, other)):
            if offset + nbytes <= taken.offset:
                break
            offset = max(offset, taken.end)
        slots[key] = Slot(offset, nbytes)
    return slots
