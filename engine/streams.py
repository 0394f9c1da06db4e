"""Standard output and standard error of our processes, and how a user's mistake is shown there.

A character that the output's encoding does not have is replaced. Control characters in names of files, tensors and
flags are shown on standard error as escapes, and a warning of ours as one line. If standard output can take no more
(closed, full, its reader gone) the run ends with one line and status 1; without standard error it goes on. Generated
text goes to standard output as it is. Torch-free.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from penstock.parallel.failure import SELF_LAUNCHED, wait_for_launcher

PARTS = tuple(Path(__file__).parents[1] / name for name in ("engine", "parallel", "scheduler"))  # of the package
MOST_CHARACTERS = 2000  # of a message: a value of a megabyte says no more than its two ends


@contextlib.contextmanager
def guarded_streams(program: str = "penstock") -> Iterator[None]:
    """Sends all that a process prints through the streams that this module describes. Raises SystemExit, whose message
    begins with `program`, as soon as standard output takes no more."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(_own_warnings())
        if SELF_LAUNCHED in os.environ:  # its parent shows what it prints
            yield
            return
        _hold_descriptors()
        stdout, stderr = sys.stdout, sys.stderr
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


@contextlib.contextmanager
def _own_warnings() -> Iterator[None]:
    """A context that shows warnings of ours in one line, without the place in our code; others as Python does."""
    show = warnings.showwarning

    def show_one(message: Warning | str, category: type[Warning], filename: str, *more: Any) -> None:
        if any(Path(filename).is_relative_to(part) for part in PARTS):
            print(f"penstock: warning: {one_line(str(message))}", file=sys.stderr)
        else:
            show(message, category, filename, *more)

    warnings.showwarning = show_one
    try:
        yield
    finally:
        warnings.showwarning = show


def say_mistake(error: Exception, program: str = "penstock") -> bool:
    """Shows a user's mistake on standard error: in one line, and in one for each note that it has. False if it is none:
    then it needs its traceback.

    Ranks of torchrun that all have the same mistake show it once: if rank 0 has it too, the launcher ends the others
    while they wait. A child of rank 0 shows nothing: rank 0 found the user's mistakes before it launched it.
    """
    text = mistake(error)
    if text is None or SELF_LAUNCHED in os.environ:
        return False
    if "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0":
        wait_for_launcher()
    for line in (text, *map(one_line, getattr(error, "__notes__", ()))):
        print(f"{program}: error: {line}", file=sys.stderr)
    return True


def mistake(error: Exception) -> str | None:
    """The one line for a user who can mend what was raised; None if it is our own bug, which needs its traceback."""
    if isinstance(error, OSError):
        return one_line(f"{error.filename}: {error.strerror}") if error.filename is not None else None
    if isinstance(error, MemoryError):
        return one_line(str(error) or "there is not enough host memory")
    return one_line(str(error)) if isinstance(error, ValueError) else None


def one_line(text: str) -> str:
    """The text with unprintable characters as Python escapes them (`\\n`, `\\x1b`, `\\u202e`), cut in its middle."""
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return visible(text)


def visible(text: str, keep: str = "") -> str:
    """The text with characters that are neither printable nor in `keep` as Python escapes them."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _hold_descriptors() -> None:
    """Opens descriptors 0, 1 and 2 if they are closed: else the next file or socket would get one of these numbers, and
    what others print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _end(program: str, why: str | None) -> NoReturn:
    raise SystemExit(f"{program}: error: standard output: {why}")


class _Stream:
    """A text stream; subclasses change what they define."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _discard(self) -> None:
        """Discards what is still in the buffer, so that the flush at exit does not fail too, and what is written from
        now on."""
        with contextlib.suppress(OSError):  # a stream without a descriptor
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, self._stream.fileno())
            os.close(descriptor)


class _Messages(_Stream):
    """Standard error: it passes newlines, tabs and a progress bar's carriage return, and escapes other controls. Where
    it takes no more it is discarded: work of hours does not end with the terminal that watches it."""

    def write(self, text: str) -> int:
        begin = "\r" if text.startswith("\r") else ""
        try:
            self._stream.write(begin + visible(text.removeprefix(begin), keep="\n\t"))
        except OSError:
            self._discard()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()


class _Output(_Stream):
    """Standard output. It fails with SystemExit: many libraries ignore an OSError."""

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
