"""A directory that is there whole or not at all."""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from penstock.scheduler.units import show_bytes

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def new_directory(out: Path, source: Path, needed_bytes: int) -> Iterator[Path]:
    """A directory beside `out` to write in. It takes that name when the block ends and all is on the disk; after an
    error, or a signal that asks the process to end, it is gone.

    Raises ValueError naming --out if that is a file, a mount point, a directory with something in it, or inside
    `source`, if there are not `needed_bytes` free, or if another run writes there; and for an OSError in the block.
    """
    out = out.resolve()  # it is renamed to at the end: that must not meet a link
    partial = out.with_name(out.name + ".partial")
    _check(out, partial, source, needed_bytes)
    try:
        with _exit_on_signals():
            partial.mkdir()
            try:
                yield partial
                for path in (*partial.rglob("*"), partial):
                    _sync(path)
                partial.rename(out)
                _sync(out.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise ValueError(f"--out {out}: {error}") from error


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, with the status that a shell shows for them, instead of ending the process
    on the spot. One that is ignored (nohup) or handled already stays so, as do both outside the main thread."""
    caught = [number for number in ENDING_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        caught = []

    def leave(number: int, _) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)  # another one must not interrupt the clean-up
        raise SystemExit(128 + number)

    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _check(out: Path, partial: Path, source: Path, needed_bytes: int) -> None:
    if out.is_relative_to(source.resolve()):
        raise ValueError(f"--out {out}: lies in {source}, which is read")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out}: is not empty")
    if os.path.ismount(out):
        raise ValueError(f"--out {out}: is a mount point: name a directory in it")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {out.parent}")
    if partial.exists():
        raise ValueError(f"--out {out}: another run writes {partial}, or was broken off: remove it then")
    free_bytes = shutil.disk_usage(out.parent).free
    if free_bytes < needed_bytes:
        raise ValueError(
            f"--out {out}: needs {show_bytes(needed_bytes)} of disk space, there are {show_bytes(free_bytes)}"
        )


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def other_files(directory: Path, files: set[Path]) -> list[Path]:
    """All files in a directory but `files`, relative to it. Raises ValueError naming what is no file."""
    others = []
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            others += [path.relative_to(directory)] * (path not in files)
        elif not path.is_dir() or path.is_symlink():
            raise ValueError(f"{path}: neither a file nor a directory: it cannot be copied")
    return others


def copy_files(names: list[Path], source: Path, target: Path) -> None:
    """Copies files into a new directory; links become what they point to."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
