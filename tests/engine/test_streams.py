"""Standard output and error of the command line: what cannot be shown is replaced or seen, and an output that takes no
more ends the run with one line and status 1, whenever that comes to light."""

import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from penstock.engine.commands import cli
from penstock.engine.commands.generate import TextPrinter
from penstock.engine.streams import MOST_CHARACTERS, guarded_streams, mistake, one_line, say_mistake, visible
from penstock.engine.text import prompts

from tests.support.commands import ROOT, Command

HOSTILE = "a\x1b[31m\x9b2J\r\n\u202e\u2028\x00z"
SEEN = r"a\x1b[31m\x9b2J\r\n\u202e\u2028\x00z"


def test_controls_are_seen_as_python_writes_them():
    assert visible(HOSTILE) == one_line(HOSTILE) == SEEN
    assert visible("naïve ✓ 東京") == "naïve ✓ 東京"
    assert visible("a\n\tb\x07", keep="\n\t") == "a\n\tb\\x07"
    assert visible("\udcff") == r"\udcff"


def test_a_long_message_keeps_both_ends():
    cut = one_line("begin" + "x" * 10**6 + "end")
    assert cut.startswith("beginx") and cut.endswith("xend") and len(cut) < MOST_CHARACTERS + 10


def test_what_a_user_can_mend_is_a_line_and_our_bugs_are_not():
    assert mistake(FileNotFoundError(2, "No such file or directory", "x\n")) == r"x\n: No such file or directory"
    assert mistake(IsADirectoryError(21, "Is a directory", "/etc")) == "/etc: Is a directory"
    assert mistake(ValueError("model: bad")) == "model: bad"
    assert mistake(MemoryError()) == "there is not enough host memory"
    for bug in (OSError(9, "Bad file descriptor"), KeyError("x"), RuntimeError("x"), AssertionError(), OverflowError()):
        assert mistake(bug) is None


def test_notes_of_a_mistake_are_lines_of_their_own(capsys):
    error = ValueError("file, line 2: bad\x1b")
    error.add_note("file, line 5: worse\n")
    assert say_mistake(error, "program")
    assert capsys.readouterr().err.splitlines() == [
        r"program: error: file, line 2: bad\x1b",
        r"program: error: file, line 5: worse\n",
    ]


def test_a_warning_of_ours_is_one_line_and_another_as_python_has_it(capsys, monkeypatch):
    others: list[tuple] = []
    monkeypatch.setattr(warnings, "showwarning", lambda *given: others.append(given))
    with warnings.catch_warnings(), guarded_streams():
        warnings.simplefilter("always")
        for file in (prompts.__file__, "/elsewhere/library.py"):
            warnings.warn_explicit(f"a\x1b of {Path(file).name}", UserWarning, file, 7)
    assert capsys.readouterr().err == "penstock: warning: a\\x1b of prompts.py\n"
    ((_, _, *place, _, _),) = others
    assert place == ["/elsewhere/library.py", 7]


@pytest.mark.parametrize("name", [HOSTILE, "no\x1b]0;title\x07such"])
def test_names_on_the_command_line_do_not_reach_the_terminal(capsys, name):
    for arguments in (["plan", name.replace("\x00", "")], ["plan", "--device-profile", name.replace("\x00", "")]):
        assert cli.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.isprintable() and r"\x1b" in line


def process(*arguments: str, stdout, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "penstock", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE)


def full():
    return open("/dev/full", "wb")


def left():
    """The end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "wb")


GENERATE = ("generate", "--prompt", "Return the", "--max-tokens", "2", "--device", "cpu")
PROBE = ("probe", "--device", "cpu", "--json")
FEW = [("--version",), ("plan", "--help"), ("plan",), GENERATE]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "arguments, stdout, why, environment",
    [
        *((arguments, full, "No space left on device", {}) for arguments in [*FEW, (*GENERATE, "-tp", "2"), PROBE]),
        *((arguments, left, "Broken pipe", {}) for arguments in FEW[:3]),
        pytest.param(GENERATE, left, "Broken pipe", {}, marks=pytest.mark.soak),
        *((arguments, full, "No space left on device", {"PYTHONUNBUFFERED": "1"}) for arguments in FEW[:3]),
    ],
)
def test_an_output_that_takes_no_more_is_one_line_and_status_one(tmp_path, arguments, stdout, why, environment):
    with stdout() as stream:
        started = process(*arguments, stdout=stream, XDG_CACHE_HOME=str(tmp_path), **environment)
    _, said = started.communicate(timeout=100)
    assert started.returncode == 1
    assert said.decode().count("error") == 1 and said.decode().endswith(f"penstock: error: standard output: {why}\n")
    assert b"Traceback" not in said and b"Exception" not in said


def test_a_closed_output_is_refused_before_anything_is_done():
    """Its number would be the next file's."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m penstock generate --model nowhere >&-', sys.executable],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "penstock: error: standard output: is closed\n")


def test_without_standard_error_nothing_else_is_on_standard_output():
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m penstock plan --model nowhere 2>&- <&-', sys.executable],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("stderr", [full, left])
def test_work_goes_on_when_standard_error_takes_no_more(stderr):
    code = """
import sys
from penstock.engine.streams import guarded_streams
with guarded_streams():
    for _ in range(2):
        print("5 of 9 rows", file=sys.stderr, flush=True)
    print("done")
"""
    with stderr() as stream:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=stream, timeout=100)
    assert (done.returncode, done.stdout) == (0, b"done\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_character_that_the_output_does_not_have_is_replaced(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with guarded_streams():
        printer = TextPrinter(num_prompts=1, n=1)
        printer(0, 0, "a ✓ \udcff")
        printer(0, 0, None)
    assert written.getvalue().decode(encoding) == ("a ✓ ?\n" if encoding == "utf-8" else "a ? ?\n")


def test_an_answer_that_the_user_chose_stays(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors="xmlcharrefreplace"))
    with guarded_streams():
        print("✓")
    assert written.getvalue() == b"&#10003;\n"


def test_notes_and_warnings_are_seen_too_and_the_streams_come_back(monkeypatch):
    said, before = io.StringIO(), sys.stdout
    monkeypatch.setattr(sys, "stderr", said)
    with guarded_streams():
        print(f"tensor {HOSTILE}", file=sys.stderr)
        sys.stderr.write("\rloading: 10%")
    lines = said.getvalue().split("\n")
    assert lines == [r"tensor a\x1b[31m\x9b2J\r", r"\u202e\u2028\x00z", "\rloading: 10%"]
    assert sys.stderr is said and sys.stdout is before


@pytest.mark.timeout(120)
def test_a_bug_of_ours_still_gives_its_traceback_in_full(tmp_path):
    fault = 'def begin_pass(batch): raise OSError(9, "Bad \x1b[31m file")'
    done = Command(tmp_path, *GENERATE, in_passes=fault).finish()
    assert done.exit_code == 1 and "Traceback" in done.stderr
    assert re.search(r"OSError: \[Errno 9\] Bad \\x1b\[31m file$", done.stderr.strip()), done.stderr
