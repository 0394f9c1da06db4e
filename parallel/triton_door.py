"""The import of Triton, `triton`, `tl` and `TensorDescriptor`, for every kernel file: the one beside it and the
engine's.

A CPU install has no Triton. There stand-ins replace both, so that the files can be imported and their references run,
and whatever would launch a kernel is refused. `triton` is what kernel files use of the module, with a `jit` whose
kernels can be compiled before they run.

A kernel resolves names among the globals of its own module, so each file imports both by these very names.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

try:
    import triton as _triton
    import triton.language as tl
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

_AHEAD: ContextVar[list | None] = ContextVar("kernels that are compiled ahead", default=None)


class _Absent:
    """The stand-in for the modules, their decorators and types, and the decorated kernels. It has no items, so
    kernel[grid], a launch, fails."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **named: Any) -> "_Absent":
        return self


if HAS_TRITON:

    class _Kernel(JITFunction):
        """A kernel, or a function that kernels call."""

        def run(self, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
            noted = _AHEAD.get()
            if noted is None:
                return super().run(*args, grid=grid, warmup=warmup, **named)
            noted.append(super().run(*args, grid=grid, warmup=True, **named))
            return noted[-1]

        def _do_compile(self, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
            """Compiles a variant, of which the next launch that is not run finds what stands for it: Triton 3.6 would
            look for it by its whole source each time."""
            kernel = super()._do_compile(key, signature, device, *rest)
            if _AHEAD.get() is not None:
                self.device_caches[device][0].setdefault(key, kernel)
            return kernel

    def _jit(function: Any = None, **options: Any) -> Any:
        """Decorates a kernel, with options or without; in the interpreter as Triton does."""
        if _triton.knobs.runtime.interpret:
            return _triton.jit(function, **options)
        return _Kernel(function, **options) if function else lambda later: _Kernel(later, **options)

    def _cdiv(number: int, divisor: int) -> int:
        return -(-number // divisor)

    def _next_power_of_2(number: int) -> int:
        return 1 << (number - 1).bit_length() if number else 0

    # Triton's own two are made for kernels too, and take microseconds, at each of a pass's hundreds of launches
    triton = SimpleNamespace(jit=_jit, cdiv=_cdiv, next_power_of_2=_next_power_of_2)
else:
    triton = tl = TensorDescriptor = _Absent()


@contextlib.contextmanager
def compiled_ahead(num_threads: int, bind: Callable[[], None] | None = None) -> Iterator[None]:
    """A context in which kernels that this thread launches do not run: they are compiled at its end, as many at a time
    as there are threads. Not before: this thread would wait for the interpreter's lock at each of its operations. Where
    `bind` is given, which makes a device a thread's current one, they are loaded to it too."""
    begin, noted = threading.Event(), []
    with ThreadPoolExecutor(num_threads, initializer=bind) as pool:
        with _triton.AsyncCompileMode(pool):
            for _ in range(num_threads):
                pool.submit(begin.wait)
            token = _AHEAD.set(noted)
            try:
                yield
            finally:
                _AHEAD.reset(token)
                begin.set()
        if bind is not None:
            compiled = {id(kernel): kernel for kernel in map(_finished, noted)}
            list(pool.map(_load, compiled.values()))


def _finished(kernel: Any) -> Any:
    """The kernel that is compiled, of what stands for it until it is."""
    return kernel.result() if isinstance(kernel, _triton.FutureKernel) else kernel


def _load(kernel: Any) -> Any:
    """Builds what launches a kernel, which may call a compiler, and loads both."""
    return kernel.run


def require_triton(purpose: str, instead: str = "") -> None:
    """Raises ValueError if Triton is missing. `purpose` is what needs it; `instead` is what works without it."""
    if not HAS_TRITON:
        raise ValueError(f"{purpose} needs triton; install it" + (f" or use {instead}" if instead else ""))
