"""The output file of a job, which is its log: locked, and written in whole lines.

The lines of a pass are one write. They are on disk within a second of it: a thread syncs what was written (syncing.py).
Whatever ended a job, its output holds rows, then perhaps a part of one, which is cut off when the job goes on.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from penstock.engine.batch.row_form import RowForm
from penstock.engine.batch.syncing import Syncing
from penstock.engine.user_files import check_output
from penstock.scheduler.units import MIB

NEW = ".job.rows"  # follows the name of an output that is written anew
_COPY_BYTES = MIB


class OutputLog:
    """An output file, held by this process alone; `flag` names it in messages. One that was not there is made; if it is
    empty when it is closed it is gone again, unless it `stays`. Raises ValueError, naming the file, if it cannot be
    written or another process writes it."""

    def __init__(self, flag: str, path: str | Path):
        self.path = Path(path)
        check_output(flag, self.path)
        self.stays = self.path.exists()
        self.descriptor = _open_locked(self.path)
        self._syncing = Syncing(self.descriptor)

    @property
    def nbytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def rows(self, form: RowForm | None = None) -> Iterator[tuple[int, bytes]]:
        """The rows, with the bytes before them. What is torn at the end is cut off. Raises ValueError for anything else
        that is not of the `form`; without one all lines were seen to be rows before."""
        end = torn = 0
        with open(os.dup(self.descriptor), "rb") as stream:
            stream.seek(0)
            for number, line in enumerate(stream, 1):
                is_row = form is None or form.is_row(line)
                if is_row and not torn:
                    yield end, line
                    end += len(line)
                elif is_row or not (torn or form.is_torn(line)):
                    raise ValueError(f"{self.path}, line {torn or number}: is no row of this job")
                else:
                    torn = torn or number
        if self.nbytes > end:
            os.ftruncate(self.descriptor, end)
            os.fsync(self.descriptor)

    def append(self, lines: list[bytes]) -> None:
        """Writes lines at the end, all of them or none. Raises ValueError if they cannot be written, if what was
        written before cannot be synced, or if the file is no longer there."""
        if not lines:
            return
        self._check()
        before = self.nbytes
        try:
            _write(self.descriptor, b"".join(lines))
        except OSError as error:
            os.ftruncate(self.descriptor, before)  # what of these lines was written
            raise self._cannot(error) from None
        self._syncing.note(len(lines))

    def rewrite(self, lines: Iterable[bytes]) -> None:
        """Replaces the file, to which links may lead, by one that holds these lines: a new one, renamed, so that one of
        the two is there at any moment. `lines` may read the old file."""
        self._check()
        file = self.path.resolve()
        new = file.with_name(file.name + NEW)
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        descriptor = _open_locked(new)
        try:
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(self.descriptor).st_mode))
            _write_all(descriptor, lines)
            os.fsync(descriptor)
            os.rename(new, file)
            sync_folder(file)
        except BaseException as error:
            os.close(descriptor)
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            if isinstance(error, OSError):
                raise self._cannot(error) from None
            raise
        self._syncing.stop()
        os.close(self.descriptor)
        self.descriptor, self._syncing = descriptor, Syncing(descriptor)

    def clear(self) -> None:
        """Forgets all lines."""
        os.ftruncate(self.descriptor, 0)
        os.fsync(self.descriptor)

    def sync(self) -> None:
        """Waits until all is on disk. Raises ValueError as `append` does."""
        self._syncing.flush()
        self._check()

    def close(self) -> None:
        """Syncs and lets go of the file. Idempotent."""
        if self.descriptor < 0:
            return
        self._syncing.stop()
        if not self.stays and self._is_there() and self.nbytes == 0:
            self.path.unlink()
        os.close(self.descriptor)
        self.descriptor = -1

    def _is_there(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        return False

    def _check(self) -> None:
        if self._syncing.error is not None:
            raise self._cannot(self._syncing.error)
        if not self._is_there():
            raise ValueError(f"{self.path}: was removed or replaced while the job ran; its rows have to run again")

    def _cannot(self, error: OSError) -> ValueError:
        again = "the rows before it are kept: make room, and run the same command again"
        return ValueError(f"{self.path}: {error.strerror or error} ({again})")


def _open_locked(path: Path) -> int:
    """Opens a file for appending, and locks it. Raises ValueError if another process holds it, or if nothing can be
    locked there."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"{path}: another job writes it now") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            raise ValueError(f"{path}: cannot be locked there: {error.strerror} (flock has to work)") from None
        os.close(descriptor)  # another process has replaced it in between


def _write(descriptor: int, data: bytes) -> None:
    """One write; what a full disk or a signal left out of it is tried again, which says why it cannot be."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _write_all(descriptor: int, lines: Iterable[bytes]) -> None:
    waiting, nbytes = [], 0
    for line in lines:
        waiting.append(line)
        nbytes += len(line)
        if nbytes >= _COPY_BYTES:
            _write(descriptor, b"".join(waiting))
            waiting, nbytes = [], 0
    _write(descriptor, b"".join(waiting))


def sync_folder(path: Path) -> None:
    """Makes the names in the folder of a file last."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
