"""The processes that render chat templates (template_process.py), as their parent sees them: started when they are
needed, kept for the next request, ended with whoever owns them.
"""

import contextlib
import subprocess
import sys
import weakref
from collections import deque
from pathlib import Path
from typing import NamedTuple

_PROCESS = Path(__file__).with_name("template_process.py")
MOST_IDLE = 4


class Told(NamedTuple):
    """The end of a request: the answer, or none with the exit status and standard error of a process that ended."""

    answer: str
    exit_code: int = 0
    stderr: str = ""


class TemplateProcesses:
    """Asks processes, one for each request that is under way; for any thread."""

    def __init__(self):
        self._idle: deque[subprocess.Popen] = deque()
        weakref.finalize(self, _end_all, self._idle)

    def ask(self, request: str) -> Told:
        """Sends one line, and returns the line that comes back. A process that was kept and has ended well meanwhile
        has not read it: then another one is asked."""
        while (process := self._take()) is not None:
            told = self._ask(process, request)
            if told.answer or told.exit_code:
                return told
        return self._ask(_start(), request)

    def _take(self) -> subprocess.Popen | None:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return None

    def _ask(self, process: subprocess.Popen, request: str) -> Told:
        try:
            with contextlib.suppress(BrokenPipeError):  # what it left on standard error says why
                process.stdin.write(request + "\n")
                process.stdin.flush()
            answer = process.stdout.readline()
        except BaseException:
            process.kill()
            _end(process)
            raise
        if not answer.endswith("\n"):
            stderr = process.stderr.read()
            return Told("", _end(process), stderr)
        if len(self._idle) < MOST_IDLE:
            self._idle.append(process)
        else:
            _end(process)
        return Told(answer)


def _start() -> subprocess.Popen:
    """A process. -P: nothing of the current folder is imported there."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-P", str(_PROCESS)], **pipes, text=True, encoding="utf-8")


def _end(process: subprocess.Popen) -> int:
    """Lets a process end, by the end of its input. Returns its exit status."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    process.stderr.close()
    return process.wait()


def _end_all(processes: deque[subprocess.Popen]) -> None:
    while processes:
        _end(processes.pop())
