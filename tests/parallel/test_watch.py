"""Ranks that are stopped before any hears another: found by who knows their processes, with time made short."""

import signal
import time

import pytest
import torch.distributed as dist
from penstock.parallel import processes, rendezvous, watch
from penstock.parallel.failure import RankFailed
from penstock.parallel.launch import Launch
from penstock.parallel.processes import Process, Watched, host_id, this_process
from penstock.parallel.pulse import STOPPED_S
from penstock.parallel.rendezvous import Meeting, meet

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(watch, "STOPPED_S", 0.4)
    monkeypatch.setattr(watch, "BEAT_S", 0.1)


class Clock:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def test_it_counts_how_long_a_process_is_stopped(monkeypatch):
    clock, states = Clock(), iter(["alive", "stopped", "stopped", "alive", "stopped", "stopped"])
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(Process, "state", lambda _: next(states))
    watched, found = Watched(this_process()), []
    for elapsed_s in (0.5, 0.5, 0.5, 0.5, 0.5, 100.0):  # at last who looks was stopped as well
        clock.now_s += elapsed_s
        found.append(watched.stopped_s())
    assert found == [0.0, 0.5, 1.0, 0.0, 0.5, 1.5] and found[-1] < STOPPED_S


def test_a_rank_that_works_is_no_failure(soon, sleeper):
    with watch.watch(pytest.fail) as know:
        know(1, Process(host_id(), sleeper.pid))
        know(2, Process("elsewhere", sleeper.pid))
        time.sleep(1.0)


def test_a_rank_that_is_stopped_before_others_have_come(soon, sleeper, monkeypatch):
    """Rank 2 of three has not come; rank 1 has said who it is, and is stopped."""
    store = dist.HashStore()
    monkeypatch.setattr(rendezvous, "_open_store", lambda *_: store)
    other = Meeting(store, 1, 3, 0.0, lambda: None)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 2\] did not connect"):
        other.tell("process", Process(host_id(), sleeper.pid).to_dict())
    sleeper.send_signal(signal.SIGSTOP)
    launch = Launch("torchrun", rank=0, tp_size=3)
    with pytest.raises(RankFailed, match=r"^rank 1 was stopped \(SIGSTOP\)"), launch.guard():
        meet(launch)
    launch.close()


def test_a_child_knows_rank_0_before_it_hears_of_it(soon, sleeper, monkeypatch):
    monkeypatch.setattr("os.getppid", lambda: sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    launch = Launch("child", rank=1, tp_size=2)
    with pytest.raises(RankFailed, match=r"^rank 0 was stopped \(SIGSTOP\)"), launch.guard(), launch.watching():
        while True:
            launch.check()
            time.sleep(0.02)
    launch.close()
