"""The child ranks of a self-launch, as rank 0 sees them: this file starts, reads, watches and ends them.

    a reader thread a child   passes the child's output on as `[rank 1] ...`, and keeps what follows FAILURE_MARK
    one watchdog thread       polls exit codes, and whether a child is stopped. The first child that failed is the
                              failure. A child that only lost its peers (PEER_LOST_EXIT), or that says it has failed
                              and does not end, counts only if no other one fails within LOST_GRACE_S

This file does not know sockets, the environment or the order of the ranks' work (launch.py), nor what becomes of rank 0
(guard.py).
"""

import contextlib
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from penstock.parallel.failure import FAILURE_MARK, PEER_LOST_EXIT, RankFailed, describe_exit
from penstock.parallel.processes import Process, Watched, host_id
from penstock.parallel.pulse import STOPPED_S, stopped_for

POLL_S = 0.05
STATE_POLL_S = 0.5
EXIT_STATUS_S = 3.0  # at most, from a broken connection to the exit status of the child that broke it
LOST_GRACE_S = 1.5  # a child that lost its peers may end so much earlier than the child that caused it
CLOSE_S = 5.0
_TAIL_LINES = 200


class Child:
    """One child rank: its process and its output."""

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
        self._watched = Watched(Process(host_id(), self.process.pid))
        self._reader = threading.Thread(target=self._read, name=f"rank-{rank}-output", daemon=True)
        self._reader.start()
        with contextlib.suppress(BrokenPipeError):  # the child died at once: the watchdog will say so
            self.process.stdin.write(message + "\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                if line.rstrip("\n") == FAILURE_MARK:
                    self._failure = []
                elif self._failure is not None:
                    self._failure.append(line)
                else:
                    self._tail.append(line)
                    print(f"[rank {self.rank}] {line}", end="", file=sys.stderr, flush=True)

    def failure(self) -> RankFailed:
        """The reason why the child ended. Call it only after it has."""
        self._reader.join(EXIT_STATUS_S)
        text = "".join(self._tail if self._failure is None else self._failure)
        if self._failure is None:  # the child died before run_rank could report its failure
            _, found, rest = text.rpartition("Traceback (most recent call last):")
            text = found + rest if found else ""
        return RankFailed(self.rank, describe_exit(self.process.returncode), text)

    def is_stopped(self) -> bool:
        """Tells whether the child has been stopped for STOPPED_S, as far as it was looked at."""
        return self._watched.stopped_s() > STOPPED_S

    def wait(self, deadline: float) -> bool:
        """Waits until `deadline` (time.monotonic seconds) at most; tells whether the child has ended."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def ask_to_end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()


class Children:
    """The children of one launch; only a parent has any. The watchdog calls `on_failure` once."""

    def __init__(self, on_failure: Callable[[RankFailed], None]):
        self._on_failure = on_failure
        self._children: list[Child] = []
        self._ending = threading.Event()
        self._suspected: RankFailed | None = None
        self._suspected_at: float | None = None

    def start(self, rank: int, command: list[str], env: dict[str, str], message: str) -> None:
        self._children.append(Child(rank, command, env, message))

    def watch(self) -> None:
        """Starts the watchdog, which notices children that die or stop, until close() or abort()."""
        threading.Thread(target=self._watch, name="rank-watchdog", daemon=True).start()

    def suspect(self, failure: RankFailed) -> None:
        """Notes a failure, which counts unless an exit status says more within LOST_GRACE_S."""
        if self._suspected is None:
            self._suspected_at = time.monotonic()
            self._suspected = failure

    def early(self) -> RankFailed | None:
        """The failure of a child that has ended too early, even with exit code 0: rank 0 still needed it."""
        early = [] if self._ending.is_set() else [child for child in self._children if child.process.poll() is not None]
        return early[0].failure() if early else None

    def close(self) -> RankFailed | None:
        """Waits CLOSE_S for all to end, then ends them; returns a failure that came to light meanwhile."""
        if self._ending.is_set():
            return None
        self._ending.set()
        deadline, failed = time.monotonic() + CLOSE_S, None
        for child in self._children:
            if child.wait(deadline) and child.process.returncode != 0:
                failed = failed or child.failure()
        self._end()
        return failed

    def abort(self) -> None:
        """Ends all children now."""
        if self._children and not self._ending.is_set():
            self._ending.set()
            self._end()

    def kill(self) -> None:
        """Kills all children, after a failure: a stopped process reacts to nothing else."""
        for child in self._children:
            child.process.kill()

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
        looked_at = time.monotonic()
        while not self._ending.wait(POLL_S):
            failure = self._find_ended()
            if failure is None and time.monotonic() - looked_at > STATE_POLL_S:
                looked_at = time.monotonic()
                failure = self._find_stopped()
            if failure is not None:
                self._on_failure(failure)
                return

    def _find_ended(self) -> RankFailed | None:
        ended = [child for child in self._children if child.process.poll()]  # neither None (it runs) nor 0 is a failure
        for child in ended:
            if child.process.returncode != PEER_LOST_EXIT:
                return child.failure()
        if ended and self._suspected_at is None:
            self._suspected_at = time.monotonic()
        if self._suspected_at is None or time.monotonic() - self._suspected_at < LOST_GRACE_S:
            return None
        return self._suspected or ended[0].failure()

    def _find_stopped(self) -> RankFailed | None:
        stopped = [child for child in self._children if child.is_stopped()]
        return RankFailed(stopped[0].rank, stopped_for(STOPPED_S), stopped=True) if stopped else None
