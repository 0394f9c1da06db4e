"""Triton's interpreter, made faster: what it does again and again with the same result is done once, or not at all. It
relies on triton/runtime/interpreter.py as it is in the version that constraints.txt names.

- For every launch, and for every function that a kernel calls, it lists all members of Triton's modules to find its
  builtins, which takes longer than most kernels. They are the same each time.
- For every function that a kernel calls it replaces again what it has replaced for the kernel.
- For every operation it makes a table of dtypes.
- Of every sum and product of integers it finds out whether it overflows, and drops what it found out: only kernels that
  are debugged are told.
"""

import dataclasses
import inspect
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import triton.language as tl
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


@cache
def _languages(function: FunctionType) -> list[ModuleType]:
    """The modules of Triton's language that a function sees."""
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _patch_lang(function: FunctionType) -> Any:
    """Replaces what the function sees of the language, unless that has happened: its print is Python's then."""
    if all(language.static_print is print for language in _languages(function)):
        return interpreter._LangPatchScope()
    return _interpreters_patch(function)


def _get_np_dtype(kind: tl.dtype) -> np.dtype:
    """The dtype of numpy for a scalar, a block or a pointer."""
    scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _np_dtype_of(scalar)


_interpreters_patch, _np_dtype_of = interpreter._patch_lang, cache(interpreter._get_np_dtype)


def make_faster() -> None:
    assert inspect.isfunction(interpreter._patch_builtin) and not interpreter.interpreter_builder.options.debug
    interpreter._patch_builtin, interpreter._patch_lang = _patch_builtin, _patch_lang
    interpreter._get_np_dtype = _get_np_dtype
    unchecked = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = unchecked
