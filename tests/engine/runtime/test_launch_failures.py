"""A rank that fails while the engine generates: whoever launched it, all ranks are gone within 10 s, the exit code is
not zero, and the first failure is shown, with no peer's complaint before it."""

import signal
import socket
import time

import pytest
from penstock.engine.commands.cli import main
from penstock.parallel.children import Children

from tests.support.commands import GONE_S, SLOW, TORCHRUN, Command, fault_in_a_pass

pytestmark = pytest.mark.timeout(120)
alone = pytest.mark.alone
soak = pytest.mark.soak  # what test_launch.py tries too, without an engine
RAISE = "raise KeyError('the shard is bent')"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
OPTIONS = ("generate", "--prompt", "Return the", "--ignore-eos", "--max-tokens", "200", "--resident", "none")
LOAD_FAILS = """
if rank == 1:
    import penstock.engine.weights.host_store as host_store
    def load_nothing(*_):
        failing()
        raise OSError("the disk is gone")
    host_store._Reader.begin = load_nothing
"""


@pytest.fixture
def command(tmp_path):
    running = []

    def start(*arguments: str, **settings) -> Command:
        running.append(Command(tmp_path, *OPTIONS, *arguments, **settings))
        return running[-1]

    yield start
    for one in running:
        one.kill()


def assert_failed(done: Command, first: str, exit_code: int = 1) -> None:
    """`finish` has seen that all ranks were gone in time."""
    assert (done.folder / "failed_at").exists() and time.time() - done.failed_at() < GONE_S
    assert done.exit_code == exit_code and len(done.pids()) == 2
    assert first in done.stderr, done.stderr
    for complaint in ("PeerLost", "Connection", "another rank is gone", "RankFailed"):
        assert complaint not in done.stderr[: done.stderr.index(first)], done.stderr


@alone
def test_a_child_that_raises(command):
    """A ValueError in the middle of a run is no user's mistake: it keeps its traceback, as any other error does."""
    done = command("-tp", "2", in_passes=fault_in_a_pass(1, "raise ValueError('a bent shape')")).finish()
    assert_failed(done, "penstock: rank 1 failed with exit code 1:\nTraceback (most recent call last):")
    assert done.stderr.count("ValueError: a bent shape") == done.stderr.count("Traceback") == 1


@soak
def test_a_child_that_is_killed(command):
    done = command("-tp", "2", in_passes=fault_in_a_pass(1, KILL)).finish()
    assert_failed(done, "penstock: rank 1 was killed by SIGKILL")
    assert "Traceback" not in done.stderr


@alone
def test_a_child_that_cannot_load(command):
    done = command("-tp", "2", fault=LOAD_FAILS).finish()
    assert_failed(done, "penstock: rank 1 failed with exit code 1:\nTraceback (most recent call last):")
    assert done.stderr.count("OSError: the disk is gone") == 1


@soak
def test_rank_0_that_raises(command):
    done = command("-tp", "2", in_passes=fault_in_a_pass(0, RAISE)).finish()
    assert_failed(done, "KeyError: 'the shard is bent'")
    assert done.stderr.count("Traceback") == 1 and "rank 1" not in done.stderr


def start_and_wait_for_text(command) -> Command:
    started = command("-tp", "2", in_passes=SLOW)
    assert started.process.stdout.read(8)  # it generates
    assert len(started.pids()) == 2
    return started


@alone
def test_children_end_with_a_killed_parent(command):
    started = start_and_wait_for_text(command)
    started.process.send_signal(signal.SIGKILL)
    killed_at = time.time()
    started.finish()
    started.wait_until_gone(killed_at)
    assert started.exit_code == -signal.SIGKILL and time.time() - killed_at < GONE_S


@alone
def test_an_interrupted_run_ends_at_once(command):
    started = start_and_wait_for_text(command)
    started.process.send_signal(signal.SIGINT)
    asked_at = time.time()
    started.finish()
    assert started.exit_code == 130 and time.time() - asked_at < GONE_S
    assert started.stderr.endswith("penstock: interrupted\n") and "Traceback" not in started.stderr


def test_a_port_in_use(monkeypatch, capfd):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Children, "start", lambda *_: pytest.fail("a rank was started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert main([*OPTIONS, "-tp", "2"]) == 2
    assert capfd.readouterr().err.startswith(
        f"penstock: error: MASTER_PORT={port} cannot be used on this host (in use?)"
    )


@alone
def test_torchrun_shows_the_rank_that_raised(command):
    done = command("--trace", "trace.json", launcher=TORCHRUN, in_passes=fault_in_a_pass(1, RAISE)).finish()
    assert_failed(done, "KeyError: 'the shard is bent'")
    assert done.stderr.count("KeyError: 'the shard is bent'") == 1
