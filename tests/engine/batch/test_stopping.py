"""Ends of a job from outside: signals while it loads, computes or sorts, and the failure of an engine. Each
has its own exit status, and the same command goes on."""

import os
import signal

import pytest
from penstock.engine.batch.job_files import JobFiles
from penstock.engine.loop import Loop
from penstock.parallel.failure import RankFailed, run_rank

from penstock import LLM
from tests.support.batch_jobs import StubLLM, begin_in_fork, rows_of, run_here, status_of, write_many

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


class LoadingLLM(StubLLM):
    """An engine during whose start something happens."""

    def __init__(self, happens):
        super().__init__()
        self.lead = happens


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_engine_loads_ends_the_job_at_once(tmp_path, said, number):
    given, before = write_many(tmp_path / "in.jsonl", 9), signal.getsignal(number)
    assert run_here(LoadingLLM(lambda: send(number)), given, tmp_path / "out.jsonl") == 143
    assert said()[1][-1] == "penstock batch: stopped: the same command goes on"
    assert signal.getsignal(number) is before
    assert run_here(StubLLM(), given, tmp_path / "out.jsonl") == 0
    assert len(rows_of(tmp_path / "out.jsonl")) == 9


def test_a_signal_while_rows_are_sorted_leaves_the_output_as_it_was(tmp_path, said, monkeypatch):
    given, output, sort = write_many(tmp_path / "in.jsonl", 9), tmp_path / "out.jsonl", JobFiles.sort
    monkeypatch.setattr(JobFiles, "sort", lambda files, say: (send(signal.SIGTERM), sort(files, say)))
    assert run_here(StubLLM(), given, output, "--order", "input") == 143
    kept = output.read_bytes()
    monkeypatch.setattr(JobFiles, "sort", sort)
    assert run_here(StubLLM(), given, output, "--order", "input") == 0
    assert sorted(output.read_bytes().splitlines()) == sorted(kept.splitlines())


def test_a_signal_while_the_last_rows_run_leaves_the_sorting_to_the_next_start(tmp_path, said, monkeypatch):
    given, output, advance = write_many(tmp_path / "in.jsonl", 9), tmp_path / "out.jsonl", Loop.advance

    def advancing(loop):
        events = advance(loop)
        if not loop.has_unfinished:
            send(signal.SIGTERM)
        return events

    monkeypatch.setattr(Loop, "advance", advancing)
    assert run_here(StubLLM(), given, output, "--order", "input") == 143
    assert said()[0]["done"] == len(rows_of(output)) == 9
    kept = output.read_bytes()
    monkeypatch.setattr(Loop, "advance", advance)
    assert run_here(StubLLM(), given, output, "--order", "input") == 0
    assert output.read_bytes() != kept and sorted(output.read_bytes().splitlines()) == sorted(kept.splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_so(tmp_path, number):
    """As SIGINT in the background of a script, and SIGHUP by nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        llm = LoadingLLM(lambda: send(number))
        assert run_here(llm, write_many(tmp_path / "in.jsonl", 9), tmp_path / "out.jsonl") == 0
    finally:
        signal.signal(number, before)


def test_a_streamed_job_ends_within_two_passes_and_a_second_signal_changes_nothing(tmp_path, said, monkeypatch):
    given, output, advance = write_many(tmp_path / "in.jsonl", 40), tmp_path / "out.jsonl", Loop.advance
    passes: list[int] = []  # that had begun at each turn of the loop

    def advancing(loop):
        passes.append(loop.engine.worker.executor.counters.num_passes)
        for _ in range(2 if len(passes) == 6 else 0):
            send(signal.SIGTERM)
        return advance(loop)

    monkeypatch.setattr(Loop, "advance", advancing)
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 4, "resident": "none"}
    with LLM("demo", **options) as llm:
        assert llm.engine.work.streamed_bytes
        assert run_here(llm, given, output) == 143
        assert llm.engine.worker.executor.counters.num_passes <= passes[5] + 2
    assert len(passes) == 6
    assert said()[0]["done"] == len(rows_of(output)) > 0


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), RankFailed(1, "was killed by SIGKILL")])
def test_an_engine_that_fails_is_told_from_rows_that_do(tmp_path, error):
    """By the exit status: a scheduler is to repeat the one, and not the other."""

    def fail():
        raise error

    given = write_many(tmp_path / "in.jsonl", 9)
    pid = begin_in_fork(lambda: run_rank(lambda: run_here(LoadingLLM(fail), given, tmp_path / "out.jsonl")))
    assert status_of(pid) == 70
