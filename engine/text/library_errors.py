"""Makes one line that names a file of what the libraries of tokenizers raise."""

import contextlib
from collections.abc import Iterator
from typing import NoReturn

_MOST_ERROR = 300  # characters of what the library says


@contextlib.contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Makes a ValueError of one line, beginning with `where`, of any error of the library: plain Exceptions, and
    PanicExceptions of its own failed assertions, which are no Exceptions."""
    try:
        yield
    except BaseException as error:
        raise_library_error(where, error)


def raise_library_error(where: str, error: BaseException) -> NoReturn:
    """Raises the ValueError that `library_errors` makes of `error`, or `error` itself where it is not the library's."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error
    text = " ".join(str(error).split())
    raise ValueError(f"{where}: {text[:_MOST_ERROR]}") from error
