"""Runs scripts in this process, by their arguments."""

import json
import sys

from scripts.bench.entry import run_script


def run(monkeypatch, capsys, script, *arguments: str) -> dict:
    """Runs the script and returns its record, the last line that it prints."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
    script.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(monkeypatch, capsys, script, *arguments: str) -> str:
    """Runs the script, which refuses, and returns its message of one line."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
    assert run_script(script.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
