"""The import of Triton, `triton` and `tl`, for every kernel file: the one beside it and the engine's.

A CPU install has no Triton. There stand-ins replace both, so that the files can be imported and their references run,
and whatever would launch a kernel is refused.

A kernel resolves names among the globals of its own module, so each file imports both by these very names.
"""

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False


class _Absent:
    """The stand-in for the modules, their decorators and types, and the decorated kernels. It has no items, so
    kernel[grid], a launch, fails."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **named: Any) -> "_Absent":
        return self


if not HAS_TRITON:
    triton = tl = _Absent()


def require_triton(purpose: str, instead: str = "") -> None:
    """Raises ValueError if Triton is missing. `purpose` is what needs it; `instead` is what works without it."""
    if not HAS_TRITON:
        raise ValueError(f"{purpose} needs triton; install it" + (f" or use {instead}" if instead else ""))
