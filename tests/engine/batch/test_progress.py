"""The view of a run: a bar in a terminal, a line now and then elsewhere."""

import contextlib
import fcntl
import io
import os
import re
import struct
import sys
import termios
from types import SimpleNamespace

import pytest
from penstock.engine.batch import progress
from penstock.engine.batch.progress import Progress

RUN = SimpleNamespace(
    done=SimpleNamespace(num_done=25, num_failed=2),
    meter=SimpleNamespace(tokens_s=7012.3, share_of_bound=0.953, bound="link", elapsed_s=10.0),
    seconds_left=lambda: 90.0,
)


class Terminal(io.StringIO):
    """Keeps what is written, and has a terminal's size."""

    def __init__(self, rows: int = 24, columns: int = 160):
        super().__init__()
        self.controller, self.descriptor = os.openpty()
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def close(self) -> None:
        super().close()
        os.close(self.controller)
        os.close(self.descriptor)


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_rows_speed_share_of_the_bound_and_end_are_shown(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    with Progress(100, num_done=5) as view:
        view.show(RUN, is_due=True)
    shown = stream.getvalue()
    said = r"25/100 rows, 2 failed, ends in 01:30 \(\d\d:\d\d\), 7012 tokens/s, 0.95 of the link bound"
    assert re.search(said, shown)
    assert (" 25%|" in shown) == stream.isatty()
    assert view.predicted == [{"share": 0.2105, "seconds": 100.0}]


def test_in_80_columns_the_end_and_what_failed_are_seen(monkeypatch):
    narrow = Terminal(columns=80)
    monkeypatch.setattr(sys, "stderr", narrow)
    with Progress(1_000_000, num_done=5) as view:
        view.show(SimpleNamespace(done=RUN.done, meter=RUN.meter, seconds_left=lambda: 90_000.0), is_due=True)
    shown = narrow.getvalue()
    assert re.search(r"2 failed, ends in 25:00:00 \([A-Z]\w\w \d\d:\d\d\)", shown) and " bound" not in shown


def seconds_with_a_line(monkeypatch, ends_s: float, most_s: int) -> list[int]:
    """The seconds of a run in which there is a line, where none of its rows ends before `ends_s`."""
    told = []
    with Progress(100, num_done=5) as view:
        for second in range(1, most_s + 1):
            monkeypatch.setattr(sys, "stderr", io.StringIO())
            meter = SimpleNamespace(**vars(RUN.meter) | {"elapsed_s": float(second)})
            done = SimpleNamespace(num_done=25 if second >= ends_s else 5, num_failed=0)
            view.show(SimpleNamespace(done=done, meter=meter, seconds_left=lambda: 90.0), is_due=True)
            told += [second] * sys.stderr.getvalue().count("\n")
    return told


@pytest.mark.parametrize("ends_s, first_s", [(2, 10), (17, 17), (90, 60)])
def test_elsewhere_a_line_comes_once_a_row_has_ended_and_then_once_a_minute(monkeypatch, ends_s, first_s):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert seconds_with_a_line(monkeypatch, ends_s, 200) == [*range(first_s, 201, 60)]


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_a_prediction_is_kept_in_the_pass_that_reaches_its_mark(monkeypatch, stream):
    """Between two seconds, in which nothing is shown."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    with Progress(100, num_done=0) as view:
        before = stream.getvalue()
        for num_done, left_s in ((0, None), (4, 8.0), (5, 7.0), (6, 6.0), (19, None), (20, 3.0), (21, 2.0)):
            run = SimpleNamespace(done=SimpleNamespace(num_done=num_done), meter=SimpleNamespace(elapsed_s=1.0))
            run.seconds_left = lambda left_s=left_s: left_s
            view.show(run, is_due=False)
        assert stream.getvalue() == before
    assert view.predicted == [{"share": 0.05, "seconds": 8.0}, {"share": 0.2, "seconds": 4.0}]


def test_each_line_predicts_anew(monkeypatch):
    """Within PREDICT_S: what the first pass told is no longer true when the line after it comes."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LINE_S", 1.0)
    with Progress(1000, num_done=0) as view:
        for elapsed_s, left_s in ((11.0, 20.0), (12.0, 60.0)):
            measured = SimpleNamespace(**vars(RUN.meter) | {"elapsed_s": elapsed_s})
            view.show(SimpleNamespace(done=RUN.done, meter=measured, seconds_left=lambda s=left_s: s), is_due=True)
    first, second = sys.stderr.getvalue().splitlines()
    assert "ends in 00:20 (" in first and "ends in 01:00 (" in second


def test_between_two_lines_nothing_is_predicted(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    asked = []
    run = SimpleNamespace(done=RUN.done, meter=RUN.meter, seconds_left=lambda: asked.append(1) or 90.0)
    with Progress(1000, num_done=0) as view:
        view.show(run, is_due=True)
        assert sys.stderr.getvalue().count("\n") == len(asked) == 1
        view.show(run, is_due=True)
    assert sys.stderr.getvalue().count("\n") == len(asked) == 1


@pytest.mark.parametrize("size", [(0, 0), (24, 0), (0, 80)])
def test_a_terminal_without_room_for_a_bar_gets_lines(monkeypatch, size):
    with contextlib.closing(Terminal(*size)) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(progress, "LINE_S", 0.0)
        with Progress(100, num_done=5) as view:
            view.show(RUN, is_due=True)
        assert terminal.getvalue().startswith("penstock batch: 25/100 rows, 2 failed, ends in 01:30 (")
        assert terminal.getvalue().count("\n") == 1
