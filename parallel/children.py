"""The child ranks of a self-launch, as rank 0 sees them: started, listened to, watched, ended.

    reader thread a child   passes its output on as `[rank 1] ...`; after FAILURE_MARK it is kept
    one watchdog thread     polls exit codes. The first child that failed is the failure; one that only lost
                            its peers (PEER_LOST_EXIT) is so if nothing else turns up. Then

        0 s     the other children are ended (those in a NCCL call would wait for ever)
        0..5 s  rank 0 in guard(): it gets PeerLost from gloo, asks here, raises RankFailed
        5 s     still in guard(), so in NCCL or in a long computation: message, os._exit(1)
                (not in guard(): message at once; its next guard() raises)

What it does not know: sockets, environment, the order of ranks' work (launch.py).
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

from parallel.failure import FAILURE_MARK, PEER_LOST_EXIT, RankFailed, describe_exit

POLL_S = 0.05
EXIT_STATUS_S = 3.0  # from a broken connection to the exit status of the child that broke it
LOST_GRACE_S = 1.5  # a child that lost its peers ended before the one that caused it: this long at most
GUARD_GRACE_S = 5.0
CLOSE_S = 5.0
_TAIL_LINES = 200


class Child:
    """One child rank: its process and what it said."""

    def __init__(self, rank: int, command: list[str], env: dict[str, str], message: str):
        self.rank = rank
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._failure: list[str] | None = None
        # A session of its own: Ctrl-C is rank 0's to handle, the children end when rank 0 does.
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"rank-{rank}-output", daemon=True)
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):  # it died at once: the watchdog says so
            self.process.stdin.write(message + "\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.rstrip("\n") == FAILURE_MARK:
                self._failure = []
            elif self._failure is not None:
                self._failure.append(line)
            else:
                self._tail.append(line)
                print(f"[rank {self.rank}] {line}", end="", file=sys.stderr, flush=True)

    def failure(self) -> RankFailed:
        """Why it ended; only after it has."""
        self._reader.join(EXIT_STATUS_S)
        text = "".join(self._tail if self._failure is None else self._failure)
        if self._failure is None:  # it died before run_rank could speak for it
            _, found, rest = text.rpartition("Traceback (most recent call last):")
            text = found + rest if found else ""
        return RankFailed(self.rank, describe_exit(self.process.returncode), text)

    def wait(self, deadline: float) -> bool:
        """Has it ended by `deadline` (time.monotonic seconds)?"""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask_to_end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()


class Children:
    """The children of one launch (none for the other kinds). `failure` is set once, by the watchdog."""

    def __init__(self):
        self.failure: RankFailed | None = None
        self._children: list[Child] = []
        self._known = threading.Event()
        self.aborted = False
        self._ending = threading.Event()
        self._guards = 0
        self._shown = False
        self._lost_since: float | None = None

    def start(self, rank: int, command: list[str], env: dict[str, str], message: str) -> None:
        self._children.append(Child(rank, command, env, message))

    def watch(self) -> None:
        """Begin to notice children that die, until close() or abort()."""
        threading.Thread(target=self._watch, name="rank-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Rank 0 is busy with the others: if it does not come out after a failure, the process is ended."""
        self._guards += 1
        try:
            yield
        finally:
            self._guards -= 1

    def wait_for_failure(self) -> RankFailed | None:
        """The failure, as soon as an exit status shows it (3 s at most); None without children."""
        if self._children and not self._ending.is_set():
            self._known.wait(EXIT_STATUS_S)
        if self.failure is None and not self._ending.is_set():
            # Ended, and yet with exit code 0: no failure in itself, but rank 0 still needed it.
            early = [child for child in self._children if child.process.poll() is not None]
            self.failure = early[0].failure() if early else None
        return self.failure

    def close(self) -> None:
        """Wait 5 s for all to end by themselves, then end them. What failed meanwhile is shown on stderr."""
        if self._ending.is_set():
            return
        self._ending.set()
        deadline = time.monotonic() + CLOSE_S
        for child in self._children:
            if child.wait(deadline) and child.process.returncode != 0:
                self._show(self.failure or child.failure())
        self._end()

    def abort(self) -> None:
        """End all now."""
        if self._children and not self._ending.is_set():
            self.aborted = True
            self._ending.set()
            self._end()

    def _end(self) -> None:
        for ask in ("ask_to_end", "terminate", "kill"):
            alive = [child for child in self._children if child.process.poll() is None]
            for child in alive:
                child.ask_to_end() if ask == "ask_to_end" else getattr(child.process, ask)()
            deadline = time.monotonic() + 1.0
            for child in alive:
                child.wait(deadline)
        for child in self._children:
            child.ask_to_end()

    def _watch(self) -> None:
        while not self._ending.wait(POLL_S):
            if culprit := self._find_culprit():
                self.failure = culprit.failure()
                self._known.set()
                self._after_failure()
                return

    def _find_culprit(self) -> Child | None:
        ended = [child for child in self._children if child.process.poll()]  # None and 0 are no failure
        for child in ended:
            if child.process.returncode != PEER_LOST_EXIT:
                return child
        if ended and self._lost_since is None:
            self._lost_since = time.monotonic()
        return ended[0] if ended and time.monotonic() - self._lost_since > LOST_GRACE_S else None

    def _after_failure(self) -> None:
        for child in self._children:
            child.process.terminate()
        deadline = time.monotonic() + GUARD_GRACE_S
        was_guarded = self._guards > 0
        while self._guards and time.monotonic() < deadline:
            if self._ending.wait(POLL_S):
                return
        if self._guards or not was_guarded:
            self._show(self.failure)
        if self._guards:
            os._exit(1)

    def _show(self, failure: RankFailed) -> None:
        if not self._shown:
            self._shown = True
            print(f"penstock: {failure}", file=sys.stderr, flush=True)
