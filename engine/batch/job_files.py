"""The files of a job: its output, that of failed rows if there is one, and the job's own beside the output.

Both are locked before anything is read, so that no two processes write one job.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from penstock.engine.batch.done_rows import DoneRows
from penstock.engine.batch.in_order import in_order
from penstock.engine.batch.input_lines import InputLines
from penstock.engine.batch.job import ANEW, Job, job_file
from penstock.engine.batch.output_log import OutputLog
from penstock.engine.batch.row_form import has_failed


class JobFiles:
    """The files of one job, held by this process alone. A context manager. Raises ValueError as OutputLog does, and for
    a file that is the input or another one of the job's: nothing is written there."""

    def __init__(self, given: str, output: str, errors: str | None):
        _check_apart(
            {"--input-file": Path(given), "--output-file": Path(output), "OUTPUT.job": job_file(Path(output))}
            | ({} if errors is None else {"--errors": Path(errors)})
        )
        with contextlib.ExitStack() as undo:
            self.output = OutputLog("--output-file", output)
            undo.callback(self.output.close)
            self.errors = self.output if errors is None else OutputLog("--errors", errors)
            undo.callback(self.errors.close)
            self._undo = undo.pop_all()

    def __enter__(self) -> "JobFiles":
        return self

    def __exit__(self, *exc) -> None:
        self._undo.close()

    @property
    def _logs(self) -> list[OutputLog]:
        return [self.output] if self.errors is self.output else [self.output, self.errors]

    def begin(self, job: Job, force_new: bool = False) -> Job:
        """The job as it was begun, or this one if it begins now; with `force_new` whatever was there is forgotten.
        Raises ValueError if what is there is something else."""
        path = self.output.path
        for log in self._logs if force_new else ():
            log.clear()
        is_begun, used = job_file(path).exists(), [log for log in self._logs if log.nbytes]
        if used and not is_begun:
            raise ValueError(
                f"{used[0].path}: is there already, and is no output of a batch job: {job_file(path)} is missing"
                " (give another -o, or --force-new to write over it)"
            )
        begun = None
        if is_begun and not force_new:
            with contextlib.nullcontext() if used else contextlib.suppress(ValueError):  # nothing is lost without rows
                begun = job.continued(path)
        if begun is None:
            job.keep(path)
        for log in self._logs:
            log.stays = True
        return begun or job

    def read(self, lines: InputLines, job: Job, retry_errors: bool = False) -> DoneRows:
        """The state of all rows; with `retry_errors` those that failed are taken out, to run again."""
        done = self._read(lines, job)
        if not retry_errors or not done.num_failed:
            return done
        for log in self._logs:
            log.rewrite(line for _, line in log.rows() if not has_failed(line))
        return self._read(lines, job)

    def _read(self, lines: InputLines, job: Job) -> DoneRows:
        done = DoneRows(lines, job)
        try:
            for log in self._logs:
                done.read(log)
        except ValueError as error:
            raise ValueError(f"{error} (remove that line, {ANEW})") from None
        return done

    def write(self, lines: Iterable[bytes]) -> None:
        """Writes rows, each where it belongs."""
        lines = list(lines)
        for log in self._logs:
            log.append([line for line in lines if self._log_of(line) is log])

    def _log_of(self, line: bytes) -> OutputLog:
        return self.errors if has_failed(line) else self.output

    def sync(self) -> None:
        """Waits until all is on disk."""
        for log in self._logs:
            log.sync()

    def sort(self, say: Callable[[str], None]) -> None:
        """Puts the rows into the order of the input, where they are in another one."""
        for log in self._logs:
            in_order(log, say)


def _check_apart(files: dict[str, Path]) -> None:
    """Refuses two names of one file; `files` are by what names them."""
    for (name, file), (other_name, other) in itertools.combinations(files.items(), 2):
        if file.absolute() == other.absolute() or (file.exists() and other.exists() and os.path.samefile(file, other)):
            raise ValueError(f"{other_name} {other}: is the file of {name} too")
