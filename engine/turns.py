"""Runs calls of several threads on one object one after another."""

import functools
import threading
from collections.abc import Callable
from typing import Any


class Turns:
    """The order of calls of one object. Both locks are held by `with` alone, so an interrupt at any moment frees
    them."""

    def __init__(self):
        self._line = threading.Lock()  # held by the thread that has waited longest
        self._turn = threading.RLock()

    def take(self, name: str, call: Callable[[], Any]) -> Any:
        """Runs `call` once no other one runs. Raises RuntimeError, at once, inside another call of the same thread,
        which would wait for itself."""
        if self._turn._is_owned():  # as threading.Condition asks its lock
            raise RuntimeError(
                f"{name}() was called inside another call of the same object, such as in its on_text; "
                "call it when that one has returned"
            )
        with self._line, self._turn:
            pass  # else a thread that calls in a loop would take every turn
        with self._turn:
            return call()


def in_turn(method: Callable) -> Callable:
    """A method that takes a turn of its object's `turns`."""

    @functools.wraps(method)
    def taking_a_turn(self, *args, **options):
        return self.turns.take(method.__name__, lambda: method(self, *args, **options))

    return taking_a_turn
