"""Shows on standard error how far a job is: a bar in a terminal, elsewhere a line now and then."""

import os
import sys
import time
from typing import Any

from penstock.engine.batch.run import BatchRun
from tqdm import tqdm

LINE_S = 60.0  # between two lines where there is no terminal
FIRST_S = 10.0  # to the first line, if a row has ended by then: before, a prediction is worth little
PREDICT_S = 10.0  # between two predictions for the bar: each takes the host up to a tenth of a second
DAY_S = 24 * 3600.0
MARKS = (0.05, 0.2)  # shares of the rows of a run at which its prediction is kept


class Progress:
    """The view of one run, of `num_rows` of which `num_done` were done before. A context manager, while rows run."""

    def __init__(self, num_rows: int, num_done: int):
        self.num_rows, self.num_before = num_rows, num_done
        self.predicted: list[dict[str, float]] = []  # the whole run's seconds, as they looked at MARKS
        self._seconds: float | None = None  # of the whole run, as they looked last
        self._next_s = 0.0
        self._line_s: float | None = None  # of the run, when the last line came
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        if _has_room():
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}"
            self._bar = tqdm(total=self.num_rows, initial=self.num_before, bar_format=layout, dynamic_ncols=True)
        return self

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, run: BatchRun, is_due: bool) -> None:
        """Shows the state of the run if that `is_due`, and keeps its prediction at MARKS. The run calls this after each
        pass, so that a prediction is of the pass that reached its mark."""
        is_shown = is_due and (self._bar is not None or self._is_line_due(run))
        left_s = self._seconds_left(run, is_shown)
        if not is_shown:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(describe(run, left_s), refresh=False)
            self._bar.update(run.done.num_done - self._bar.n)
            self._bar.refresh()
        else:
            self._line_s = run.meter.elapsed_s
            line = f"{run.done.num_done}/{self.num_rows} rows, {describe(run, left_s)}"
            print(f"penstock batch: {line}", file=sys.stderr, flush=True)

    def _is_line_due(self, run: BatchRun) -> bool:
        """Tells whether a line is due. The first waits for a row that has ended: without one it says little."""
        if self._line_s is not None:
            return run.meter.elapsed_s >= self._line_s + LINE_S
        return run.meter.elapsed_s >= (FIRST_S if run.done.num_done > self.num_before else LINE_S)

    def _seconds_left(self, run: BatchRun, is_shown: bool) -> float | None:
        """The seconds of the run that are left, predicted anew for each line, for the bar now and then, and at MARKS:
        what the first passes told is soon wrong."""
        share = (run.done.num_done - self.num_before) / max(self.num_rows - self.num_before, 1)
        is_mark = len(self.predicted) < len(MARKS) and share >= MARKS[len(self.predicted)]
        elapsed_s = run.meter.elapsed_s
        is_old = self._bar is None or elapsed_s >= self._next_s
        if (is_mark or (is_shown and is_old)) and (left_s := run.seconds_left()) is not None:
            self._seconds, self._next_s = elapsed_s + left_s, elapsed_s + PREDICT_S
        if is_mark and self._seconds is not None:
            self.predicted.append({"share": round(share, 4), "seconds": self._seconds})
        return None if self._seconds is None else max(self._seconds - elapsed_s, 0.0)


def _has_room() -> bool:
    """Tells whether standard error is a terminal that shows a bar: tqdm shows none in 0 columns or 0 rows, which a
    terminal has that no program has sized."""
    return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0


def duration(seconds: float) -> str:
    """A time that may be hours: minutes and seconds, with hours before them."""
    return tqdm.format_interval(seconds)


def describe(run: BatchRun, left_s: float | None) -> str:
    """The number of rows that failed, when the job ends, the speed of late and its share of the bound: in 80 columns a
    bar shows the first of these."""
    parts = [f"{run.done.num_failed} failed"] if run.done.num_failed else []
    if left_s is not None:
        day = "%a " if left_s >= DAY_S else ""
        at = time.strftime(f"{day}%H:%M", time.localtime(time.time() + left_s))
        parts.append(f"ends in {duration(left_s)} ({at})")
    tokens_s = run.meter.tokens_s
    parts.append(f"{tokens_s:.{0 if tokens_s >= 100 else 1}f} tokens/s")
    if run.meter.bound is not None:
        parts.append(f"{run.meter.share_of_bound:.2f} of the {run.meter.bound} bound")
    return ", ".join(parts)


def summary(run: BatchRun | None, progress: Progress, done: Any, is_whole: bool) -> dict[str, Any]:
    """The job and what this run did of it, as JSON; `run` is None if there was nothing left to do."""
    content = {
        "status": "done" if is_whole else "stopped",
        "rows": done.num_rows,
        "done": done.num_done,
        "failed": done.num_failed,
        "done_before": progress.num_before,
    }
    if run is None:
        return content
    meter, counts = run.meter, run.llm.loop.scheduler.counts
    return content | {
        "seconds": meter.elapsed_s,
        "prompt_tokens": run.num_prompt_tokens,
        "output_tokens": meter.num_tokens,
        "output_tokens_s": meter.num_tokens / meter.elapsed_s if meter.elapsed_s else 0.0,
        "steady_output_tokens_s": meter.steady_tokens_s(),
        "passes": meter.num_passes,
        "passes_s": meter.passes_s,
        "bound": meter.bound,
        "share_of_bound": meter.share_of_bound,
        "preemptions": counts.num_preemptions,
        "recomputed_tokens": counts.num_recomputed_tokens,
        "predicted": progress.predicted,
    }
