"""Triton's interpreter, made faster. For every launch, and for every function that a kernel calls, it lists all members
of Triton's modules to find its builtins, which takes longer than most kernels. They are the same each time.

It relies on triton/runtime/interpreter.py as it is in the version that constraints.txt names.
"""

import inspect
from functools import cache
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter


@cache
def _builtins(module: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(module) if is_builtin(member)]


def _patch_builtin(module: Any, builder: Any, scope: Any) -> None:
    """Replaces the builtins of a module, or type, that are not replaced yet."""
    for name, member in _builtins(module):
        if getattr(module, name) is member:
            interpreter._patch_attr(module, name, member, builder, scope)


def find_builtins_once() -> None:
    """Makes the interpreter look for the builtins of each module once."""
    assert inspect.isfunction(interpreter._patch_builtin)
    interpreter._patch_builtin = _patch_builtin
