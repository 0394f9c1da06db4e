"""A piece of work over a group, without an engine: how a rank leaves the group."""

import threading
import time

import pytest
from penstock.parallel import guard
from penstock.parallel.collectives import Collectives
from penstock.parallel.failure import RankFailed
from penstock.parallel.group import run_in_group
from penstock.parallel.launch import Launch
from penstock.parallel.topology import Topology


@pytest.mark.parametrize("fails", [False, True], ids=["with the others", "without them"])
def test_who_leaves_is_not_interrupted_whether_the_work_was_done_or_not(monkeypatch, fails):
    """Another rank is lost meanwhile. Half of what leaves a group would stay."""
    monkeypatch.setattr(guard, "INTERRUPT_S", 0.1)
    launch, ended = Launch("solo"), []
    lost = threading.Thread(target=launch._guard.fail, args=[RankFailed(1, "was killed by SIGKILL")])

    def leave() -> None:
        lost.start()
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pass
        ended.append(True)

    def work(topology: Topology, collectives: Collectives) -> str:
        monkeypatch.setattr(collectives, "abandon" if fails else "close", leave)
        if fails:
            raise ZeroDivisionError
        return "done"

    if fails:
        with pytest.raises(RankFailed):
            run_in_group(launch, "cpu", work)
    else:
        assert run_in_group(launch, "cpu", work) == "done"
    assert ended and launch._guard.failure is not None
