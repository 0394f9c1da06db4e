"""Rank 0's side of a self-launch, in this process: its launch, its port, and the children that it starts and ends."""

import os
import socket
import sys
import time

import pytest
from penstock.parallel import children, interfaces
from penstock.parallel.launch import Launch, PeerLost, RankFailed, resolve_launch

pytestmark = pytest.mark.timeout(60)
TORCHRUN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in TORCHRUN_NAMES:
        monkeypatch.delenv(name, raising=False)


def test_kinds_of_launch(no_torchrun, monkeypatch):
    assert resolve_launch() == resolve_launch(1) == Launch("solo")
    assert resolve_launch(4).kind == "parent"
    for name, value in zip(TORCHRUN_NAMES, ("5", "1", "8", "node0", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    found = resolve_launch(8)
    assert found == resolve_launch() and found.kind == "torchrun"
    assert (found.rank, found.local_rank, found.tp_size) == (5, 1, 8)
    assert (found.master_addr, found.master_port) == ("node0", 29500)
    with pytest.raises(ValueError, match="tensor_parallel_size=2, but .* WORLD_SIZE=8"):
        resolve_launch(2)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="but not LOCAL_RANK"):
        resolve_launch()


def test_ranks_that_share_a_host():
    """Those that are there count, whichever group of torchrun they belong to."""
    alone = Launch("parent", tp_size=4)
    assert alone.ranks_on_host == alone.most_ranks_on_a_host == 4
    hosts = ("a", "b", "a", "a")
    for rank, expected in enumerate((3, 1, 3, 3)):
        launch = Launch("torchrun", rank, tp_size=4, num_local_ranks=2, hosts=hosts)
        assert (launch.ranks_on_host, launch.most_ranks_on_a_host) == (expected, 3)


def test_a_solo_launch_starts_and_guards_nothing(no_torchrun):
    launch = resolve_launch()
    launch.start("{}")
    with pytest.raises(PeerLost), launch.guard():
        raise PeerLost("nobody")
    launch.close()


def test_a_port_in_use_is_refused_before_any_child_runs(no_torchrun, monkeypatch, tmp_path):
    launch = resolve_launch(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ValueError, match=f"MASTER_PORT={port} .*in use"):
            launch.start("{}", [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"])
    time.sleep(0.2)
    assert not (tmp_path / "ran").exists()


def test_close_ends_children_that_do_not_listen(no_torchrun, monkeypatch, tmp_path):
    deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN)\n"
    deaf += f"open({str(tmp_path)!r} + f'/pid{{os.getpid()}}', 'w').close(); time.sleep(60)"
    monkeypatch.setattr(children, "CLOSE_S", 0.1)
    launch = resolve_launch(2)
    launch.start("{}", [sys.executable, "-c", deaf])
    while not list(tmp_path.glob("pid*")):
        time.sleep(0.02)
    launch.close()
    for path in tmp_path.glob("pid*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name[3:]), 0)


def test_a_child_that_fails_at_the_end_is_shown_once(no_torchrun, capsys):
    launch = resolve_launch(2)
    launch.start("{}", [sys.executable, "-c", "import sys; sys.exit(3)"])
    launch.close()
    launch.close()
    assert capsys.readouterr().err == "penstock: rank 1 failed with exit code 3\n"


def test_what_is_raised_after_a_failure_is_the_failure(no_torchrun):
    """The error may be an interrupt that became another exception, or come from the NaNs of a sum that was given up."""
    launch = resolve_launch(2)
    with pytest.raises(RankFailed, match="rank 1 failed with exit code 3"), launch.guard():
        launch.start("{}", [sys.executable, "-c", "import sys; sys.exit(3)"])
        assert launch._guard.wait(30)
        raise ZeroDivisionError


def test_a_guard_after_a_failure_raises_it(no_torchrun, capsys):
    launch = resolve_launch(2)
    with pytest.raises(ZeroDivisionError), launch.guard():
        launch.start("{}", [sys.executable, "-c", "import time; time.sleep(60)"])
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="ended after an earlier error"), launch.guard():
        pass
    launch = resolve_launch(2)
    launch.start("{}", [sys.executable, "-c", "1 / 0"])
    while "rank 1 failed" not in capsys.readouterr().err:  # no thread is in guard(), so it is shown at once
        time.sleep(0.02)
    with (
        pytest.raises(RankFailed, match="(?s)rank 1 failed with exit code 1:.*ZeroDivisionError"),
        launch.guard(),
    ):
        pass


def test_a_network_interface_that_is_not_there_is_refused_before_any_child_runs(no_torchrun, monkeypatch):
    monkeypatch.setattr(children.Children, "start", lambda *_: pytest.fail("a rank was started"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nope0")
    with pytest.raises(
        ValueError, match=r"GLOO_SOCKET_IFNAME=lo,nope0: this host has no network interface 'nope0', but"
    ):
        resolve_launch(2).start("{}")
    resolve_launch(1).start("{}")
    monkeypatch.setattr(interfaces, "has_address", lambda name: False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME=lo: the network interface 'lo' has no address"):
        resolve_launch(2).start("{}")
    monkeypatch.undo()
    assert interfaces.has_address("lo")


@pytest.mark.parametrize("port", ["many", "70000", "-1"])
def test_a_port_that_is_none(no_torchrun, monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ValueError, match=f"MASTER_PORT='?{port}"):
        resolve_launch(2).start("{}", ["false"])
