"""How scripts end: as the command line does."""

import re
import sys
from pathlib import Path

import pytest

from scripts.entry import run_script

SCRIPTS = {
    path.name: path.read_text()
    for path in (Path(__file__).resolve().parents[2] / "scripts").glob("*.py")
    if "__main__" in path.read_text()
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_a_mistake_in_one_line(name):
    """No page of usage before it, and no traceback."""
    assert re.search(r"sys\.exit\((run_rank\(lambda: )?run_script\(main\)", SCRIPTS[name])
    assert "ArgumentParser(" not in SCRIPTS[name]


@pytest.mark.parametrize(
    "error, text",
    [
        (ValueError("--n 0: expected\nmore"), r"--n 0: expected\nmore"),
        (FileNotFoundError(2, "No such file or directory", "a\x1b[2J"), r"a\x1b[2J: No such file or directory"),
        (MemoryError("the system refuses 3 TiB"), "the system refuses 3 TiB"),
    ],
)
def test_a_mistake_is_said_by_rank_0(monkeypatch, capsys, error, text):
    def fail() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["/some/where/script.py"])
    assert run_script(fail) == 2
    assert capsys.readouterr().err == f"script.py: error: {text}\n"
    monkeypatch.setenv("RANK", "1")
    assert run_script(fail) == 2
    assert capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback_and_a_status_passes():
    with pytest.raises(KeyError):
        run_script(lambda: {}["x"])
    with pytest.raises(OSError, match="Bad file descriptor"):
        run_script(lambda: (_ for _ in ()).throw(OSError(9, "Bad file descriptor")))
    assert run_script(lambda: None) == 0 and run_script(lambda: 3) == 3
