"""Runs the rows of a job through the engine's loop: enough are in flight to fill passes, and each is written as soon as
it has ended."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.engine.batch.done_rows import DoneRows
from penstock.engine.batch.job_files import JobFiles
from penstock.engine.batch.meter import Meter
from penstock.engine.batch.outlook import Outlook
from penstock.engine.batch.play import Passes
from penstock.engine.batch.results import error_line, line_of
from penstock.engine.batch.row_form import has_failed
from penstock.engine.batch.rows import Row, RowReader
from penstock.engine.batch.stopping import Stopping
from penstock.engine.batch.windows import WINDOW, in_windows
from penstock.engine.output import Sequence
from penstock.engine.server.answers import Echo
from penstock.engine.server.encoding import echoes_of, sequences_of
from penstock.engine.server.errors import ApiError, failed
from penstock.engine.server.requests import Completion
from penstock.engine.user_files import open_file
from penstock.scheduler.batching.request import FinishReason

if TYPE_CHECKING:
    from penstock.engine.llm import LLM

_MASK = 2**64 - 1
QUEUED = 2  # sequences in flight for each seat: those that wait follow at once, and are what a pass is filled with
# Sequences whose prompts are encoded between two passes, each in about a millisecond: at least, and at most.
LEAST_BEGUN, MOST_BEGUN = 32, 256
MOST_WAITING = 256  # rows that have ended, where many fail one after another


@dataclass
class InFlight:
    """A row whose sequences run or wait."""

    index: int
    row: Row
    sequences: list[Sequence]
    echoes: list[Echo] | None
    num_left: int


class BatchRun:
    """One run of a job: of those of its rows that have not run. It ends early once `stopping` is asked for that. `tell`
    is called after each pass, with this run and whether it is time to show it, as it is each second."""

    def __init__(
        self,
        llm: "LLM",
        reader: RowReader,
        done: DoneRows,
        files: JobFiles,
        stopping: Stopping,
        tell: Callable[["BatchRun", bool], None] = lambda run, is_due: None,
    ):
        self.llm, self.reader, self.done, self.files = llm, reader, done, files
        self._stopping, self._tell = stopping, tell
        self.lines, self.job = done.lines, done.job
        self.in_flight: dict[int, InFlight] = {}  # by request id
        self.meter = Meter(llm.engine.times)
        scheduler, engine = llm.loop.scheduler, llm.engine
        sizes = (scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.limits)
        self.outlook = Outlook(Passes(engine.work, engine.rates, *sizes))
        self.num_prompt_tokens = 0
        self._num_waiting = 0  # sequences in flight without a seat, when rows were last put into the loop
        self._lines: list[bytes] = []  # of rows that have ended, not written yet

    def run(self) -> bool:
        """Runs until all rows have run, or until the pass in which this was to stop has ended. Tells whether all have.
        Raises ValueError if the output takes no more or the input has changed; what was written is kept."""
        for index in self.done.pending():
            self.outlook.add_row(self.lines, index)
        try:
            with self._stopping.awaited(), open_file(self.lines.path) as self._stream:
                self._run(self._in_order())
            self.files.sync()
        finally:
            self.meter.end()
            self.llm.loop.clear()
        return self.done.num_done == self.done.num_rows

    def _run(self, order: Iterator[int]) -> None:
        loop = self.llm.loop
        self._fill(order)
        while loop.has_unfinished and not self._stopping.is_asked:
            events = loop.advance()
            for event in events:
                if event.is_last:
                    self._end(event.sequence)
            self._write()
            self._measure(len(events))
            self._fill(order)

    def _in_order(self) -> Iterator[int]:
        seats = self.llm.loop.scheduler.max_num_seqs
        longest = self.llm.loop.scheduler.max_model_len
        return in_windows(
            self.done.pending(),
            max(WINDOW, QUEUED * seats),
            lambda index: self._read(index).prefix,
            lambda index: self.lines.most_tokens[index] or longest,
            seats,
        )

    def _read(self, index: int) -> Row:
        return self.reader.read(self.lines.read(self._stream, index), self.lines.numbers[index])

    def _fill(self, order: Iterator[int]) -> None:
        """Puts rows into the loop until enough are in flight, or as many have come as the next pass may take: with all
        the tokens that it may have, and, since these may be cached, twice as many sequences as the last one let in."""
        scheduler, num_before = self.llm.loop.scheduler, len(self.in_flight)
        most = min(QUEUED * scheduler.max_num_seqs, num_before + MOST_BEGUN)
        least = num_before + max(2 * (self._num_waiting - self._count_waiting()), LEAST_BEGUN)
        whole_pass = self.outlook.num_prompt_tokens + scheduler.max_num_batched_tokens
        while len(self.in_flight) < most and not self._stopping.is_asked:
            if len(self.in_flight) >= least and self.outlook.num_prompt_tokens >= whole_pass:
                break
            index = next(order, None)
            if index is None:
                break
            self.outlook.take_row(self.lines, index)
            self._begin(index, self._read(index))
        self._num_waiting = self._count_waiting()
        self._write()

    def _count_waiting(self) -> int:
        return len(self.in_flight) - self.llm.loop.scheduler.num_running

    def _begin(self, index: int, row: Row) -> None:
        try:
            sequences = sequences_of(self.llm.prompts, row.asked)
            gives_back = isinstance(row.asked, Completion) and row.asked.echo
            echoes = echoes_of(self.llm.prompts, row.asked, sequences) if gives_back else None
        except ApiError as error:
            return self._note(index, error_line(self.job, row, error))
        except Exception as error:  # of a tokenizer or a template: this row fails, and no other
            return self._note(index, error_line(self.job, row, failed(f"it cannot be encoded: {error!r}")))
        if row.asked.params.seed is None:
            for number, sequence in enumerate(sequences):
                sequence.request.seed = (self.job.seed(row.number) + number) & _MASK
        one = InFlight(index, row, sequences, echoes, len(sequences))
        for sequence in sequences:
            self.outlook.note_prompt(len(sequence.request.prompt_token_ids))
            self.in_flight[sequence.request.id] = one
            self.llm.loop.add(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Takes in a sequence that has ended, and its row if it was the last of it."""
        request = sequence.request
        one = self.in_flight.pop(request.id)
        self.outlook.lengths.ended(len(request.output_token_ids), request.finish_reason is FinishReason.STOP)
        one.num_left -= 1
        if one.num_left == 0:
            self.num_prompt_tokens += sum(
                len(each.request.prompt_token_ids) for each in one.sequences[:: one.row.asked.params.n]
            )
            self._note(one.index, line_of(self.job, one.row, one.sequences, one.echoes, self.reader.names[0]))

    def _note(self, index: int, line: bytes) -> None:
        self.done.note(index, has_failed(line))
        self._lines.append(line)
        if len(self._lines) >= MOST_WAITING:
            self._write()

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self.files.write(lines)

    def _measure(self, num_tokens: int) -> None:
        if not self.llm.loop.scheduler.num_waiting and not self.outlook.num_waiting:
            self.meter.drain()
        self._tell(self, self.meter.note_pass(num_tokens))

    def seconds_left(self) -> float | None:
        """The seconds until all rows have run, as it looks now; None before anything is known."""
        if (pace := self.meter.pace) is None:
            return None
        counts = self.llm.loop.scheduler.counts
        requests = [one.request for row in self._rows() for one in row.sequences if one.request.finish_reason is None]
        return self.outlook.play(requests, counts.num_hit_tokens / max(counts.num_asked_tokens, 1)).seconds * pace

    def _rows(self) -> list[InFlight]:
        return list({one.index: one for one in self.in_flight.values()}.values())
