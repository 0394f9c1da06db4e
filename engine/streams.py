"""Standard output and standard error of a process of ours, and how a user's mistake is said there.

A character that the output's encoding does not have is replaced. Control characters in names of files, tensors and
flags are seen on standard error, not obeyed. A standard output that takes no more (closed, full, a reader that left)
ends the run with one line and status 1. What is generated goes to standard output as it is. Torch-free.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from penstock.parallel.failure import SELF_LAUNCHED, wait_for_launcher

MOST_CHARACTERS = 2000  # of a message: a value of a megabyte says no more than its two ends


@contextlib.contextmanager
def guarded_streams(program: str = "penstock") -> Iterator[None]:
    """For the whole work of a process: what it prints goes through the streams that this module describes. Raises
    SystemExit, whose message begins with `program`, as soon as standard output takes no more."""
    if SELF_LAUNCHED in os.environ:  # its parent shows what it says
        yield
        return
    _hold_descriptors()
    stdout, stderr = sys.stdout, sys.stderr
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, sys, "stdout", stdout)
        undo.callback(setattr, sys, "stderr", stderr)
        sys.stderr = _Messages(stderr or undo.enter_context(open(os.devnull, "w")))
        if stdout is None and os.environ.get("RANK", "0") == "0":
            _end(program, "is closed")
        sys.stdout = _Output(stdout or undo.enter_context(open(os.devnull, "w")), program)
        try:
            yield
        finally:
            sys.stdout.flush()  # at exit, Python would answer with a traceback


def say_mistake(error: Exception, program: str = "penstock") -> bool:
    """Says on standard error, in one line, what a user can mend. False: the exception needs its traceback.

    Ranks of torchrun that all have the same mistake say it once: where rank 0 has it too, the launcher ends the others
    while they wait. What a child of rank 0 has found rank 0 shows: the user's own mistakes it found before it launched.
    """
    text = mistake(error)
    if text is None or SELF_LAUNCHED in os.environ:
        return False
    if "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0":
        wait_for_launcher()
    print(f"{program}: error: {text}", file=sys.stderr)
    return True


def mistake(error: Exception) -> str | None:
    """What an exception tells a user who can mend it, in one line; None: it is a bug of ours, and needs its
    traceback."""
    if isinstance(error, OSError):
        return one_line(f"{error.filename}: {error.strerror}") if error.filename is not None else None
    if isinstance(error, MemoryError):
        return one_line(str(error) or "there is not enough host memory")
    return one_line(str(error)) if isinstance(error, ValueError) else None


def one_line(text: str) -> str:
    """The text with all that is not printable as Python writes it (`\\n`, `\\x1b`, `\\u202e`), cut in its middle."""
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return visible(text)


def visible(text: str, keep: str = "") -> str:
    """The text with what is neither printable nor in `keep` as Python writes it."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _hold_descriptors() -> None:
    """If 0, 1 or 2 is closed, the next file or socket would get its number, and what others print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _end(program: str, why: str | None) -> NoReturn:
    raise SystemExit(f"{program}: error: standard output: {why}")


class _Stream:
    """A text stream in all that is not said otherwise."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Messages(_Stream):
    """Standard error: lines, tabs and a progress bar's return to the beginning of its line, but no other control."""

    def write(self, text: str) -> int:
        begin = "\r" if text.startswith("\r") else ""
        self._stream.write(begin + visible(text.removeprefix(begin), keep="\n\t"))
        return len(text)


class _Output(_Stream):
    """Standard output. Its failure is no OSError, which many a library passes over."""

    def __init__(self, stream: Any, program: str):
        super().__init__(stream)
        self._program = program
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        with self._ending():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._ending():
            self._stream.flush()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._discard()
            _end(self._program, error.strerror)

    def _discard(self) -> None:
        """What is still in the buffer goes nowhere: nor may the flush at exit complain."""
        with contextlib.suppress(OSError):  # a stream without a descriptor
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, self._stream.fileno())
            os.close(descriptor)
