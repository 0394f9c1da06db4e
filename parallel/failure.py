"""How a rank ends when it, or another rank, fails. Neither torch nor anything of ours is imported, so that a
child rank can watch its parent before its slow imports begin.

A rank dies in one of three ways, and its peers must not talk before it does:

    the rank that failed   traceback to stderr, exit 1 (or a signal, and nothing at all)
    its peers              RankFailed, which names the rank, the cause and carries that rank's traceback; a child
                           of rank 0 exits PEER_LOST_EXIT with it
    nobody knows who       PeerLost, which only says that a connection is gone

What it does not know: which processes there are (launch.py), nor what a collective is (collectives.py).
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

SELF_LAUNCHED = "PENSTOCK_SELF_LAUNCHED"  # environment variable: this process is a child of rank 0
PEER_LOST_EXIT = 75
FAILURE_MARK = "\x1epenstock: failure"  # a child's stderr after this line is its failure, shown once by rank 0
LAUNCHER_WAIT_S = 5.0
_PARENT_POLL_S = 1.0


class PeerLost(RuntimeError):
    """Another rank is gone, or did not answer in time: a consequence, never the cause of a failure."""


class RankFailed(RuntimeError):
    """`rank` ended the run. `cause` completes "rank N ..."; `traceback_text` is that rank's own, or empty. `stopped`:
    its process is there and does nothing, so that no launcher will speak of it."""

    def __init__(self, rank: int, cause: str, traceback_text: str = "", stopped: bool = False):
        self.rank, self.cause, self.traceback_text, self.stopped = rank, cause, traceback_text.strip(), stopped
        super().__init__(f"rank {rank} {cause}" + (f":\n{self.traceback_text}" if self.traceback_text else ""))


def describe_exit(code: int) -> str:
    """An exit status as `subprocess` gives it (negative: a signal), completing the sentence "rank N ..."."""
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
    """Give torchrun 5 s to report the first failure and to end this process."""
    time.sleep(LAUNCHER_WAIT_S)


def run_rank(main: Callable[[], int | None]) -> int:
    """Run `main` as this process' whole work and return its exit code (None is 0).

    An exception is shown once and ends the process by `os._exit`, so that no destructor (a process group, a
    CUDA context) can block the exit: PeerLost with one line; RankFailed with its message alone, but by a child of rank
    0 not what rank 0 shows itself; any other with its traceback. SystemExit passes.
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
    except Exception:
        _leave(traceback.format_exc(), 1)
    raise AssertionError("unreachable")


def exit_after(_: RankFailed) -> int:
    """The exit code of this rank when another one has failed: rank 0 must not take a child of its own for the first."""
    return PEER_LOST_EXIT if SELF_LAUNCHED in os.environ else 1


def is_shown_by_parent(failure: RankFailed) -> bool:
    """Whether this process is a child of the rank that failed, which lives to show its failure itself."""
    return SELF_LAUNCHED in os.environ and failure.rank == 0 and not failure.stopped


def _leave(text: str, code: int) -> None:
    """Show `text`, if there is any, on stderr (marked for rank 0 if it launched us) and end at once."""
    mark = FAILURE_MARK + "\n" if SELF_LAUNCHED in os.environ else ""
    with contextlib.suppress(OSError, ValueError, SystemExit):  # a closed pipe must not keep us alive
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(mark + text.rstrip() + "\n" if text else "")
        sys.stderr.flush()
    os._exit(code)


def exit_with_parent() -> str:
    """In a self-launched child, first of all: return the launcher's one-line message, and from now on end
    this process at once when the parent is gone (stdin closes) or asks for it in the same way."""
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
    # A fork of the parent may hold the other end of the pipe open: so the parent's id is watched as well.
    while os.getppid() == parent:
        readable, _, _ = select.select([stdin], [], [], _PARENT_POLL_S)
        if readable and not os.read(stdin, 4096):
            break
    os._exit(PEER_LOST_EXIT)
