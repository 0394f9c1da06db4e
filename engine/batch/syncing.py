"""Brings what a job has written to disk, in a thread of its own: a disk may take long, and passes do not wait."""

import os
import threading

MOST_ROWS = 256  # that are not on disk yet
MOST_S = 0.5  # that a row is not: with the sync itself it is there within a second


class Syncing:
    """Syncs a file once MOST_ROWS rows or MOST_S seconds have come together. `error` is the OSError of a sync that
    failed: what was written before it may be lost, and nothing is synced after it."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.error: OSError | None = None
        self._num_rows, self._ends = 0, False
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None  # made with the first row

    def note(self, num_rows: int) -> None:
        """Says that so many rows were written."""
        with self._news:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
                self._thread.start()
            self._num_rows += num_rows
            if self._num_rows >= MOST_ROWS or self._num_rows == num_rows:
                self._news.notify_all()

    def flush(self) -> None:
        """Waits until all that was written is on disk, or cannot be brought there."""
        with self._news:
            self._num_rows = 0
        self._sync()

    def stop(self) -> None:
        """Syncs the rest, and ends the thread."""
        with self._news:
            self._ends = True
            self._news.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._num_rows or self._ends)
                self._news.wait_for(lambda: self._num_rows >= MOST_ROWS or self._ends, timeout=MOST_S)
                if self._ends:
                    return
                self._num_rows = 0
            self._sync()

    def _sync(self) -> None:
        if self.error is None:
            try:
                os.fsync(self.descriptor)
            except OSError as error:
                self.error = error
