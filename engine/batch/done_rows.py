"""The state of a job's rows as its output has them: which ran, and which failed. A byte a row."""

from bisect import bisect_left
from collections.abc import Iterator

from penstock.engine.batch.input_lines import InputLines
from penstock.engine.batch.job import Job
from penstock.engine.batch.output_log import OutputLog
from penstock.engine.batch.row_form import RowForm, has_failed, number_of

PENDING, DONE, FAILED = range(3)


class DoneRows:
    """The state of each row of the input, by index; those of other shards count as pending for ever."""

    def __init__(self, lines: InputLines, job: Job):
        self.lines, self.job = lines, job
        self._states = bytearray(len(lines))
        self.num_rows = len(range(job.shard, len(lines), job.num_shards))
        self.num_done = self.num_failed = 0  # failed ones are done

    def read(self, log: OutputLog) -> None:
        """Takes in the rows of a file, from which a torn tail is cut. Raises ValueError for a row that is not this
        job's, or is there twice."""
        for _, line in log.rows(RowForm(self.job.name)):
            number = number_of(line)
            index = bisect_left(self.lines.numbers, number)
            if index == len(self.lines) or self.lines.numbers[index] != number or not self.job.has(index):
                raise ValueError(f"{log.path}: has a row of line {number}, which is no line of this job")
            if self._states[index] != PENDING:
                raise ValueError(f"{log.path}: the row of line {number} is there twice")
            self.note(index, has_failed(line))

    def note(self, index: int, failed: bool) -> None:
        """Says that a row has run."""
        assert self._states[index] == PENDING, f"row {index} has run twice"
        self._states[index] = FAILED if failed else DONE
        self.num_done += 1
        self.num_failed += failed

    def pending(self) -> Iterator[int]:
        """The rows that have not run, in the order of the input; a row counts as it does when it is reached."""
        shard = range(self.job.shard, len(self.lines), self.job.num_shards)
        return (index for index in shard if self._states[index] == PENDING)
