"""The ten seconds from a rank's death to the end of the others: each part may take as long as its own limit, on a clock
that runs in waits alone, so that a busy machine changes nothing."""

import os
import threading
import time

import pytest
from penstock.parallel import guard as guard_module
from penstock.parallel.children import EXIT_STATUS_S, LOST_GRACE_S
from penstock.parallel.failure import LAUNCHER_WAIT_S, PeerLost, RankFailed
from penstock.parallel.guard import Guard
from penstock.parallel.processes import GONE, STOPPED, Process
from penstock.parallel.pulse import BEAT_S, Pulse

pytestmark = pytest.mark.timeout(60)
GONE_S = 10.0


class Clock:
    """A clock that runs in sleeps alone."""

    def __init__(self):
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        time.sleep(0)


def heard_after_s(monkeypatch, rank: int, state: str) -> float:
    """The silence after which the pulse of `rank` says that a rank in this state has failed."""
    heard = []
    monkeypatch.setattr(Process, "state", lambda _: state)
    pulse = Pulse(rank, [Process("here", 1), Process("here", 2)], heard.append)
    silent_s = 0.0
    while not heard and silent_s < GONE_S:
        silent_s += 2 * BEAT_S  # one turn counts at most this, even if its thread slept longer
        pulse._judge(2 * BEAT_S)
    assert heard[0].rank == 1 - rank and heard[0].stopped == (state == STOPPED)
    return silent_s


def out_after_s(monkeypatch, leaves: bool) -> float:
    """The seconds from the failure to the end of a process whose thread is inside. It ends by the interrupt or, if the
    thread runs no Python that could be interrupted, by os._exit."""
    clock, guard, out = Clock(), Guard(), threading.Event()
    found, run_no_more = [], threading.Event()

    def raise_in(thread: int, error: type[BaseException]) -> None:
        if error is PeerLost and leaves:
            found.append(clock.now_s)
            guard._inside.clear()
            out.set()

    def exit_process(code: int) -> None:
        found.append(clock.now_s)
        out.set()
        run_no_more.wait(10)

    monkeypatch.setattr(guard_module, "time", clock)
    monkeypatch.setattr(guard_module, "_raise_in", raise_in)
    monkeypatch.setattr(os, "_exit", exit_process)
    guard._inside.add(-1)
    guard.fail(RankFailed(1, "was killed by SIGKILL"))
    assert out.wait(30)
    run_no_more.set()
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank(monkeypatch, rank):
    """Rank 0 hears of it, or it is rank 0; no launcher reports it."""
    heard_s = heard_after_s(monkeypatch, rank, STOPPED)
    assert heard_s + guard_module.INTERRUPT_S + out_after_s(monkeypatch, leaves=False) < GONE_S


def test_a_rank_that_is_gone_without_the_end_of_its_connection(monkeypatch):
    assert heard_after_s(monkeypatch, 0, GONE) + guard_module.INTERRUPT_S + out_after_s(monkeypatch, False) < GONE_S


def test_a_rank_that_raises_or_is_killed(monkeypatch):
    """The failure is known at once. The actions take INTERRUPT_S at most. A thread that computes is then brought out,
    and waits for a launcher or for a child's exit status; one that waits for a peer comes out with the actions, and may
    first wait for the cause."""
    interrupted_s, ended_s = (out_after_s(monkeypatch, leaves) for leaves in (True, False))
    assert interrupted_s < ended_s
    speaks_s = max(LAUNCHER_WAIT_S, LOST_GRACE_S)
    assert guard_module.INTERRUPT_S + max(interrupted_s, EXIT_STATUS_S) + speaks_s < GONE_S
    assert guard_module.INTERRUPT_S + ended_s < GONE_S
