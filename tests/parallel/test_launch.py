"""Launches as a user sees them. Every failure ends alike: within 10 s all processes are gone, and the first failure is
shown, with no peer's error before it.

The worker script below serves rank 0 and children. Cases that need no collective never import torch, so they start
quickly.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import is_alive

pytestmark = [pytest.mark.alone, pytest.mark.timeout(60)]
ROOT = Path(__file__).resolve().parents[2]
GONE_S = 10.0
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
TORCHRUN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

WORKER = """
import json, os, signal, sys, time
from penstock.parallel.failure import SELF_LAUNCHED
from penstock.parallel.launch import exit_with_parent, resolve_launch, run_rank

def main():
    child = SELF_LAUNCHED in os.environ
    message = exit_with_parent() if child else sys.argv[1]
    case, folder, tp_size = json.loads(message)
    launch = resolve_launch(None if child else tp_size)
    open(f"{folder}/pid{os.getpid()}", "w").close()
    with launch.guard():
        launch.start(message, [sys.executable, __file__])
        globals()[case](launch, lambda: failing(folder))
    launch.close()

def failing(folder):
    with open(f"{folder}/failed_at", "w") as file:
        file.write(str(time.time()))

def group_of(launch):
    from penstock.parallel.rendezvous import connect
    from penstock.parallel.topology import resolve_topology
    topology = resolve_topology(launch.rank, launch.tp_size, launch.local_rank, "cpu")
    print(topology.describe(), file=sys.stderr)
    return connect(topology, launch, timeout_s=50)

def reduce_once(group):
    import torch
    ones = torch.ones(3)
    group.all_reduce(ones)
    return ones.tolist()

def talk(launch, failing):
    group = group_of(launch)
    ints = group.broadcast_ints([len(sys.argv), 5] if launch.rank == 0 else None)
    if launch.rank == 0:
        print("heard", reduce_once(group))
    else:
        print(f"child {launch.rank} heard {ints} {reduce_once(group)}")
    group.close()

def bend(launch, failing):
    group = group_of(launch)
    reduce_once(group)
    if launch.rank == 1:
        failing()
        raise KeyError("the shard is bent")
    reduce_once(group)

def die(launch, failing):
    group = group_of(launch)
    reduce_once(group)
    if launch.rank == 1:
        time.sleep(0.3)
        failing()
        os.kill(os.getpid(), signal.SIGKILL)
    reduce_once(group)

def bend_before_meeting(launch, failing):
    if launch.rank == 1:
        time.sleep(0.5)
        failing()
        raise KeyError("no such file")
    group_of(launch)

def die_unheard(launch, failing):
    if launch.rank == 1:
        failing()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

def bend_rank_0(launch, failing):
    time.sleep(0.5)
    failing()
    if launch.rank == 0:
        raise KeyError("rank 0 is bent")
    time.sleep(60)

def stay(launch, failing):
    time.sleep(60)

if __name__ == "__main__":
    sys.exit(main() if sys.argv[2:] == ["bare"] else run_rank(main))
"""


class Run:
    """A run of the worker script: its output, its exit code, and the time from the failure until all were gone."""

    def __init__(self, folder: Path, case: str, tp_size: int, launcher: tuple[str, ...], more: tuple[str, ...]):
        self.folder = folder
        (folder / "worker.py").write_text(WORKER)
        env = {name: value for name, value in os.environ.items() if name not in TORCHRUN_NAMES}
        self.process = subprocess.Popen(
            [
                sys.executable,
                *launcher,
                folder / "worker.py",
                json.dumps([case, str(folder), tp_size]),
                *more,
            ],
            env=env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> "Run":
        self.stdout, self.stderr = self.process.communicate(timeout=50)
        self.exit_code = self.process.returncode
        while alive := [pid for pid in self.pids() if is_alive(pid)]:
            assert time.time() - self.failed_at() < GONE_S, f"still there: {alive}"
            time.sleep(0.02)
        return self

    def pids(self) -> list[int]:
        return [int(path.name[3:]) for path in self.folder.glob("pid*")]

    def failed_at(self) -> float:
        file = self.folder / "failed_at"
        return float(file.read_text()) if file.exists() else time.time()

    def assert_failed(self, num_ranks: int, first: str) -> None:
        """Asserts that all ranks began and are gone in time, and that `first` is shown once, with no complaint before
        it."""
        assert self.exit_code not in (0, None)
        assert time.time() - self.failed_at() < GONE_S
        assert len(self.pids()) == num_ranks
        assert first in self.stderr, self.stderr
        for complaint in ("PeerLost", "Connection closed", "Connection reset", "another rank is gone"):
            assert complaint not in self.stderr[: self.stderr.index(first)], self.stderr


@pytest.fixture
def run(tmp_path):
    runs = []

    def start(case: str, tp_size: int, launcher: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> Run:
        runs.append(Run(tmp_path, case, tp_size, launcher, more))
        return runs[-1]

    yield start
    for one in runs:
        one.process.kill()
        one.process.wait()


def test_three_ranks_hear_the_message(run):
    done = run("talk", 3).finish()
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "heard [3.0, 3.0, 3.0]\n"  # without the children's output
    assert "rank 0 of 3: cpu" in done.stderr
    for rank in (1, 2):
        assert f"[rank {rank}] child {rank} heard [2, 5] [3.0, 3.0, 3.0]\n" in done.stderr
    assert len(done.pids()) == 3


def test_a_child_that_raises(run):
    done = run("bend", 3).finish()
    done.assert_failed(3, "penstock: rank 1 failed with exit code 1:\nTraceback (most recent call last):")
    assert done.stderr.count("KeyError: 'the shard is bent'") == 1
    assert done.stderr.count("Traceback") == 1


def test_a_child_that_is_killed(run):
    done = run("die", 3).finish()
    done.assert_failed(3, "penstock: rank 1 was killed by SIGKILL")
    assert "Traceback" not in done.stderr


def test_a_child_that_raises_before_ranks_meet(run):
    done = run("bend_before_meeting", 3).finish()
    done.assert_failed(3, "KeyError: 'no such file'")
    assert done.stderr.count("Traceback") == 1


def test_a_killed_child_ends_rank_0_that_hears_nothing(run):
    run("die_unheard", 2).finish().assert_failed(2, "penstock: rank 1 was killed by SIGKILL")


def test_rank_0_that_raises_ends_its_children(run):
    done = run("bend_rank_0", 3).finish()
    done.assert_failed(3, "KeyError: 'rank 0 is bent'")
    assert done.stderr.count("Traceback") == 1


def test_children_end_with_a_killed_parent(run):
    started = run("stay", 3)
    while len(started.pids()) < 3:
        time.sleep(0.02)
    started.process.send_signal(signal.SIGKILL)
    killed_at = time.time()
    started.finish()
    assert started.exit_code == -signal.SIGKILL
    assert time.time() - killed_at < 3.0


def test_torchrun_shows_the_rank_that_raised(run):
    done = run("bend", 2, TORCHRUN).finish()
    done.assert_failed(2, "KeyError: 'the shard is bent'")
    assert done.stderr.count("KeyError: ") == 1


def test_torchrun_names_the_rank_that_was_killed(run):
    done = run("die", 2, TORCHRUN, ("bare",)).finish()  # bare: as a user's own script, without run_rank
    done.assert_failed(2, "(local_rank: 1)")
    assert "Signal 9 (SIGKILL)" in done.stderr
