"""The guard brings a thread out when another rank has failed: by an exception, or by the end of its process."""

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from penstock.parallel import guard as module
from penstock.parallel.failure import PeerLost, RankFailed
from penstock.parallel.guard import Guard

pytestmark = pytest.mark.timeout(60)
FAILURE = RankFailed(1, "was killed by SIGKILL")
STUCK = """
import time
from penstock.parallel.failure import RankFailed
from penstock.parallel.guard import Guard
guard = Guard()
with guard.inside():
    guard.fail(RankFailed(1, "was killed by SIGKILL"))
    time.sleep(60)  # runs no Python
"""
PROFILED = """
import sys, threading, time
from penstock.parallel.failure import PeerLost
from penstock.parallel.guard import Guard, _drop_interrupt

def is_profiled():
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    (lambda: None)()
    sys.setprofile(None)
    return "call" in calls

guard = Guard()
with guard.inside():
    pass
assert is_profiled()
try:
    with guard.inside():
        threading.Thread(target=guard._interrupt).start()
        while True:
            time.sleep(0.01)
except PeerLost:
    assert is_profiled() and not guard.busy
_drop_interrupt(threading.get_ident())
assert is_profiled()
print("profiled")
"""


def fail_soon(guard: Guard) -> None:
    """From inside the guard: a failure that comes before anybody is inside is another case."""
    threading.Timer(0.2, guard.fail, [FAILURE]).start()


def test_a_long_computation_in_python_gets_an_exception(monkeypatch):
    monkeypatch.setattr(module, "INTERRUPT_S", 0.1)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the process would have ended"))
    guard = Guard()
    with pytest.raises(PeerLost), guard.inside():
        fail_soon(guard)
        while True:
            time.sleep(0.01)
    assert guard.wait(0) is FAILURE and not guard.busy
    time.sleep(0.3)  # no interrupt comes afterwards


def test_who_leaves_with_the_failure_may_wait_for_the_launcher(monkeypatch):
    """In a sleep that runs no Python, inside of an outer context, it is neither interrupted nor ended."""
    monkeypatch.setattr(module, "INTERRUPT_S", 0.1)
    monkeypatch.setattr(module, "EXIT_S", 0.1)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the process would have ended"))
    guard = Guard()
    with pytest.raises(ZeroDivisionError), guard.inside(), guard.inside():
        guard.come_out()
        guard.fail(FAILURE)
        time.sleep(1.0)
        raise ZeroDivisionError
    assert guard.wait(0) is FAILURE and not guard.busy


@pytest.mark.parametrize("knows", [False, True], ids=["before", "behind the failure"])
def test_who_leaves_the_group_is_not_interrupted(monkeypatch, knows):
    """Torch would not make a group anew that is half left. An exception that is on its way is dropped."""
    monkeypatch.setattr(module, "INTERRUPT_S", 0.1)
    monkeypatch.setattr(module, "EXIT_S", 0.1)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the process would have ended"))
    guard, turns = Guard(), 0
    with guard.inside():
        fail_soon(guard)
        with contextlib.suppress(PeerLost):
            while knows:
                time.sleep(0.01)
        with guard.leaving():
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                turns += 1
    assert turns > 10 and guard.wait(0) is FAILURE and not guard.busy


@pytest.mark.parametrize("knows", [False, True], ids=["before", "behind the failure"])
def test_who_never_ends_leaving_ends_with_the_process(monkeypatch, knows):
    monkeypatch.setattr(module, "LEAVE_S", 0.1)
    guard, codes, ended = Guard(), [], threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    if knows:
        guard.fail(FAILURE)
    with guard.leaving():
        if not knows:
            guard.fail(FAILURE)
        assert ended.wait(10) and codes == [1]


def test_actions_are_done_before_anybody_is_interrupted():
    guard, done = Guard(), threading.Event()
    guard.on_failure(lambda: 1 / 0)
    guard.on_failure(done.set)
    with guard.inside():
        fail_soon(guard)
        assert done.wait(10)
    assert guard.wait(10) is FAILURE


def test_only_the_first_failure_counts_and_none_after_the_end(capsys):
    guard = Guard()
    guard.fail(FAILURE)
    guard.fail(RankFailed(2, "ended early with exit code 75"))
    assert guard.wait(0) is FAILURE
    with pytest.raises(RankFailed, match="rank 1 was killed"):
        guard.check()
    closed = Guard()
    closed.close()
    closed.fail(FAILURE)
    closed.check()


def test_a_failure_while_nobody_is_inside_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # another thread writes to it
    guard = Guard()
    guard.fail(FAILURE)
    deadline = time.monotonic() + 10
    while not sys.stderr.getvalue().endswith("\n") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sys.stderr.getvalue() == "penstock: rank 1 was killed by SIGKILL\n"


def test_what_runs_no_python_ends_with_the_process():
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", STUCK], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and done.stderr == "penstock: rank 1 was killed by SIGKILL\n"


def test_who_has_been_inside_can_be_traced_and_profiled():
    """Debuggers, coverage and cProfile; a thread that was interrupted too."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", PROFILED], env=env, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("profiled\n", "")
