"""The end of a rank when it, or another rank, fails. This file imports neither torch nor anything of ours, so that a
child rank can watch its parent before its slow imports begin.

A rank ends in one of three ways. The rank that failed must be the first to speak:

    it failed itself          traceback to stderr, exit 1 (or a signal, and no word)
    a peer failed             RankFailed, which names that rank and the cause, and carries its traceback; a child of
                              rank 0 exits with PEER_LOST_EXIT
    a peer is gone, somehow   PeerLost, which only says that a connection is gone

This file does not know which processes there are (launch.py), nor what a collective is (collectives.py).
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

SELF_LAUNCHED = "PENSTOCK_SELF_LAUNCHED"  # environment variable, set where a process is a child of rank 0
PEER_LOST_EXIT = 75
FAILURE_MARK = "\x1epenstock: failure"  # what follows on a child's stderr is its failure, which rank 0 shows once
LAUNCHER_WAIT_S = 5.0
_PARENT_POLL_S = 1.0


class PeerLost(RuntimeError):
    """An error that says that another rank is gone or silent: a consequence of a failure, never its cause."""


class RankFailed(RuntimeError):
    """An error that says that `rank` ended the run. `cause` completes "rank N ..."; `traceback_text` is that rank's
    own, or empty. `stopped` is true if its process is still there but does nothing: then no launcher will report it."""

    def __init__(self, rank: int, cause: str, traceback_text: str = "", stopped: bool = False):
        self.rank, self.cause, self.traceback_text, self.stopped = rank, cause, traceback_text.strip(), stopped
        super().__init__(f"rank {rank} {cause}" + (f":\n{self.traceback_text}" if self.traceback_text else ""))


def describe_exit(code: int) -> str:
    """Completes the sentence "rank N ..." for an exit status of `subprocess` (negative: a signal)."""
    if code >= 0:
        lost = " (it lost the connection to another rank)" if code == PEER_LOST_EXIT else ""
        return (
            f"ended early with exit code {code}{lost}"
            if code in (0, PEER_LOST_EXIT)
            else f"failed with exit code {code}"
        )
    name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else f"signal {-code}"
    return f"was killed by {name}"


def wait_for_launcher() -> None:
    """Gives torchrun LAUNCHER_WAIT_S to report the first failure and to end this process."""
    time.sleep(LAUNCHER_WAIT_S)


def run_rank(main: Callable[[], int | None]) -> int:
    """Runs `main` as this process' whole work and returns its exit code (0 if `main` returns None).

    An exception is shown once and ends the process by `os._exit`, so that no destructor (a process group, a CUDA
    context) can block the exit. PeerLost is shown as one line; RankFailed as its message, unless rank 0 shows it
    itself; any other with its traceback, and status 1, or its `exit_status` if it has one. SystemExit passes.
    """
    try:
        return main() or 0
    except PeerLost as error:
        _leave(
            f"penstock: rank {os.environ.get('RANK', '0')} stops, another rank is gone: {error}",
            PEER_LOST_EXIT,
        )
    except RankFailed as error:
        _leave("" if is_shown_by_parent(error) else f"penstock: {error}", exit_after(error))
    except KeyboardInterrupt:
        _leave("penstock: interrupted", 130)
    except Exception as error:
        _leave(traceback.format_exc(), _status_of(error))
    raise AssertionError("unreachable")


def exit_after(failure: RankFailed) -> int:
    """The exit code of this rank when another one has failed. A child of rank 0 exits with PEER_LOST_EXIT, so that rank
    0 does not take it for the rank that failed first."""
    return PEER_LOST_EXIT if SELF_LAUNCHED in os.environ else _status_of(failure)


def _status_of(error: Exception) -> int:
    return getattr(error, "exit_status", 1)


def is_shown_by_parent(failure: RankFailed) -> bool:
    """Tells whether this process is a child of the rank that failed, and that rank will show its failure itself."""
    return SELF_LAUNCHED in os.environ and failure.rank == 0 and not failure.stopped


def _leave(text: str, code: int) -> None:
    """Shows `text`, if there is any, on stderr (marked for rank 0 if that launched us) and ends the process."""
    mark = FAILURE_MARK + "\n" if SELF_LAUNCHED in os.environ else ""
    with contextlib.suppress(OSError, ValueError, SystemExit):  # a closed pipe must not keep us alive
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(mark + text.rstrip() + "\n" if text else "")
        sys.stderr.flush()
    os._exit(code)


def exit_with_parent() -> str:
    """Returns the launcher's one-line message, and from then on ends this process as soon as its parent closes stdin,
    on purpose or by its own end. A self-launched child calls this first of all."""
    stdin = sys.stdin.fileno()
    parent = os.getppid()
    message = bytearray()
    while not message.endswith(b"\n"):
        byte = os.read(stdin, 1)
        if not byte:
            os._exit(PEER_LOST_EXIT)
        message += byte
    threading.Thread(target=_watch_parent, args=(stdin, parent), name="exit-with-parent", daemon=True).start()
    return message.decode().rstrip("\n")


def _watch_parent(stdin: int, parent: int) -> None:
    # A fork of the parent may hold the other end of the pipe open, so we watch the parent's id as well.
    while os.getppid() == parent:
        readable, _, _ = select.select([stdin], [], [], _PARENT_POLL_S)
        if readable and not os.read(stdin, 4096):
            break
    os._exit(PEER_LOST_EXIT)
