"""Pulses of three ranks in one process: failures reach all, the first one counts, and leaving is no failure. Then
processes are stopped, gone, or on another host, with shorter limits."""

import json
import os
import signal
import socket
import time

import pytest
from penstock.parallel import pulse as module
from penstock.parallel.failure import RankFailed
from penstock.parallel.processes import ALIVE, GONE, STOPPED, UNKNOWN, Process, process_state, this_process
from penstock.parallel.pulse import ENDED, Pulse

pytestmark = pytest.mark.timeout(60)


class Ranks:
    """The pulses of ranks that hear each other, and the failures that each has heard."""

    def __init__(self, processes: list[Process]):
        self.heard = [[] for _ in processes]
        self.pulses = [Pulse(rank, processes, self.heard[rank].append) for rank in range(len(processes))]
        where = self.pulses[0].host([])
        for pulse in self.pulses[1:]:
            pulse.join(where)
        until(lambda: len(self.pulses[0]._sockets) == len(processes) - 1)

    def causes(self) -> list[list[tuple[int, str]]]:
        return [[(failure.rank, failure.cause) for failure in heard] for heard in self.heard]


@pytest.fixture
def ranks():
    made = []

    def make(*processes: Process) -> Ranks:
        made.append(Ranks(list(processes or [this_process()] * 3)))
        return made[-1]

    yield make
    for one in made:
        for pulse in one.pulses:
            pulse.leave()


def until(is_so) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_failure_reaches_all(ranks, victim):
    three = ranks()
    text = "Traceback:\n" + "x" * 50_000 + "\nKeyError: 'é'"
    three.pulses[victim].say_failed(RankFailed(victim, "failed", text))
    others = [rank for rank in range(3) if rank != victim]
    until(lambda: all(three.heard[rank] for rank in others))
    for rank in others:
        (failure,) = three.heard[rank]
        assert failure.rank == victim and failure.traceback_text.endswith("\nKeyError: 'é'")
    assert three.heard[victim] == []


def test_the_first_failure_is_the_one(ranks):
    three = ranks()
    three.pulses[2].say_failed(RankFailed(2, "failed"))
    three.pulses[1].say_failed(RankFailed(1, "lost the connection to another rank"))
    until(lambda: three.heard[0] and three.heard[1] + [three.pulses[1].failure])
    time.sleep(3 * module.BEAT_S)
    assert three.causes()[0] == [(2, "failed")]


def test_leaving_is_no_failure(ranks):
    three = ranks()
    three.pulses[1].leave()
    until(lambda: three.pulses[0].left == {1})
    three.pulses[0].leave()
    until(lambda: three.pulses[2].left == {0})
    three.pulses[2].leave()
    assert three.causes() == [[], [], []]
    assert not any(pulse._thread.is_alive() for pulse in three.pulses)


def test_leaving_waits_for_no_rank_that_has_failed(ranks, monkeypatch):
    three = ranks()
    three.pulses[0]._hear(RankFailed(2, "was stopped", stopped=True))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_LEAVE_S", 30.0)
        patch.setattr(three.pulses[2], "_drop", lambda peer: None)  # nobody leaves there
        three.pulses[1].leave()
        three.pulses[0].leave()
    assert not three.pulses[0]._thread.is_alive()


@pytest.mark.parametrize("victim", [1, 2])
def test_a_connection_that_ends_without_a_word(ranks, victim):
    three = ranks()
    (connection,) = three.pulses[victim]._sockets.values()
    connection.shutdown(socket.SHUT_RDWR)
    others = [rank for rank in range(3) if rank != victim]
    until(lambda: all(three.heard[rank] for rank in others))
    assert all(three.causes()[rank] == [(victim, ENDED)] for rank in others)


def test_a_stopped_process_is_told_from_one_that_works(ranks, sleeper, monkeypatch):
    monkeypatch.setattr(module, "STOPPED_S", 0.5)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    two = ranks(this_process(), Process(this_process().host, sleeper.pid))
    monkeypatch.setattr(two.pulses[1], "_send_all", lambda line: None)  # sends no beats, as if it loaded or compiled
    time.sleep(2.0)
    assert two.causes() == [[], []]
    sleeper.send_signal(signal.SIGSTOP)
    until(lambda: two.heard[0])
    (failure,) = two.heard[0]
    assert failure.rank == 1 and failure.stopped and failure.cause.startswith("was stopped (SIGSTOP)")


def test_silence_of_another_host(ranks, monkeypatch):
    monkeypatch.setattr(module, "STOPPED_S", 0.2)
    monkeypatch.setattr(module, "SILENT_S", 1.0)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    two = ranks(this_process(), Process("elsewhere", 1))
    time.sleep(2.0)
    assert two.causes() == [[], []]
    monkeypatch.setattr(two.pulses[1], "_send_all", lambda line: None)
    until(lambda: two.heard[0])
    assert two.causes()[0] == [(1, "gave no sign of life for 1 s")]


def test_a_rank_sees_for_rank_0_who_is_stopped_on_its_host(ranks, sleeper, monkeypatch):
    monkeypatch.setattr(module, "STOPPED_S", 0.5)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    here = this_process()
    three = ranks(Process("elsewhere", 1), here, Process(here.host, sleeper.pid))
    assert [set(pulse._neighbours) for pulse in three.pulses] == [set(), {2}, {1}]
    assert not Ranks([here] * 2).pulses[1]._neighbours  # rank 0 asks Linux itself
    sleeper.send_signal(signal.SIGSTOP)
    until(lambda: three.heard[0] and three.heard[1])
    for rank in (0, 1):
        (failure,) = three.heard[rank]
        assert failure.rank == 2 and failure.stopped and failure.cause.startswith("was stopped (SIGSTOP)")


def test_strangers_are_turned_away(ranks):
    pulse = Pulse(0, [this_process()] * 2, pytest.fail)
    told = json.loads(pulse.host([]))
    for hello in (b"{}\n", b"[1]\n", b"x\n", json.dumps({"token": "no", "rank": 1}).encode() + b"\n"):
        with socket.create_connection(("127.0.0.1", told["port"])) as stranger:
            stranger.sendall(hello)
            assert stranger.recv(1) == b""
    assert not pulse._sockets
    pulse.leave()


def test_states_of_processes(sleeper):
    assert process_state(os.getpid()) == ALIVE and Process("elsewhere", 1).state() == UNKNOWN
    sleeper.send_signal(signal.SIGSTOP)
    until(lambda: process_state(sleeper.pid) == STOPPED)
    sleeper.kill()
    until(lambda: process_state(sleeper.pid) == GONE)
    sleeper.wait()
    assert process_state(sleeper.pid) == GONE
