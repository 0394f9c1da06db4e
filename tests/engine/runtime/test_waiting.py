"""The wait for a pass's letter: asleep, so that other threads have Python's lock, and no longer than needed."""

import time
from types import SimpleNamespace

import pytest
import torch
from penstock.engine.compute.sampler import PendingSample, SampleOutput
from penstock.engine.runtime import engine, graph, pass_runner, pass_times
from penstock.engine.runtime.graph import LONG_SLEEP_S, SHORT_SLEEP_S, SHORTLY_S, Mailbox, PendingLetter
from penstock.engine.runtime.pass_runner import PassRunner
from penstock.engine.runtime.pass_times import NUM_LATE, PassTimes
from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import Rates

from penstock import LLM, SamplingParams

TOKENS = SampleOutput(torch.tensor([7, 3]), None)


class Clock:
    """A clock that only sleeping moves; the letter arrives at `arrives_s`."""

    def __init__(self, mailbox: Mailbox, arrives_s: float):
        self.mailbox, self.arrives_s, self.now_s, self.sleeps = mailbox, arrives_s, 0.0, []

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds
        if self.now_s >= self.arrives_s and self.mailbox.num_sent > self.mailbox.number:
            self.mailbox.send(TOKENS)


def waited(monkeypatch, expected_s: float, arrives_s: float) -> Clock:
    """The clock after waiting for a letter that was expected at one time, and arrived at another."""
    mailbox = Mailbox(2, 2, torch.device("cpu"))
    pending, clock = mailbox.expect(2, scored=False), Clock(mailbox, arrives_s)
    monkeypatch.setattr(graph, "time", clock)
    assert pending.wait(expected_s).tokens.tolist() == [7, 3]
    return clock


def test_it_sleeps_long_until_shortly_before_the_letter_is_expected(monkeypatch):
    clock = waited(monkeypatch, expected_s=0.1, arrives_s=0.101)
    num_long = clock.sleeps.count(LONG_SLEEP_S)
    assert clock.sleeps[num_long:] == [SHORT_SLEEP_S] * (len(clock.sleeps) - num_long)
    assert abs(num_long * LONG_SLEEP_S - (0.1 - SHORTLY_S)) <= LONG_SLEEP_S
    assert clock.now_s <= 0.101 + SHORT_SLEEP_S


def test_a_letter_that_comes_early_is_seen_soon(monkeypatch):
    clock = waited(monkeypatch, expected_s=10.0, arrives_s=0.0123)
    assert clock.now_s <= 0.0123 + LONG_SLEEP_S


def test_the_thread_that_waits_sleeps_between_two_looks(monkeypatch):
    """So it takes neither a core nor Python's lock; a poll without sleep would take both."""
    mailbox, looks, sleeps = Mailbox(2, 2, torch.device("cpu")), [], []
    pending = mailbox.expect(2, scored=False)

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        time.sleep(seconds)
        if len(sleeps) == 20:
            mailbox.send(TOKENS)

    def look() -> float:
        looks.append(time.perf_counter())
        return looks[-1]

    monkeypatch.setattr(graph, "time", SimpleNamespace(sleep=sleep, perf_counter=look))
    assert pending.wait(time.perf_counter() + 1000.0).tokens.tolist() == [7, 3]
    assert len(looks) == len(sleeps) == 20
    assert all(later - look >= seconds > 0 for look, later, seconds in zip(looks, looks[1:], sleeps))


def test_a_letter_that_is_there_is_not_waited_for(monkeypatch):
    mailbox = Mailbox(2, 2, torch.device("cpu"))
    mailbox.send(TOKENS)
    monkeypatch.setattr(graph, "time", None)
    assert mailbox.expect(2, scored=False).wait(1e9).tokens.tolist() == [7, 3]


def test_a_pass_is_expected_by_its_prediction_from_when_the_one_before_it_ended():
    times, rates = PassTimes(), Rates(1.0, 1.0, 1.0, 0.0, 1.0, "assumed", pass_latency_s=0.25)
    began_s = time.perf_counter()
    for _ in range(2):
        times.submitted()
        times.foresee(PassShape(1, 1, 0), PassWork(0, 0, ()), rates)
    before_s = time.perf_counter()
    assert began_s + 0.25 <= times.expected_s <= before_s + 0.25
    times.ended()
    assert times.last.predicted.total_s == 0.25 and times.expected_s >= before_s + 0.25


def test_the_engine_says_when_it_expects_a_letter(monkeypatch):
    """By predictions, which are milliseconds for this model."""
    told, wait = [], PendingLetter.wait

    def noted(letter: PendingLetter, expected_s: float) -> SampleOutput:
        told.append((expected_s, time.perf_counter()))
        return wait(letter, expected_s)

    monkeypatch.setattr(PendingLetter, "wait", noted)
    with LLM("demo", device="cpu", max_num_seqs=1, max_model_len=32, debug={"as_on_gpu": True}) as llm:
        began_s = time.perf_counter()
        llm.generate("def", SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(told) == 4 and all(began_s < expected_s < now_s + 1.0 for expected_s, now_s in told)


def test_the_host_has_leisure_until_a_pass_may_end_and_the_next_one_takes_it_so_long(monkeypatch):
    """Of late one ended at 0.8 of its prediction, and one took the host 0.05 s."""
    clock, times = SimpleNamespace(now=(0.0, 0.0)), PassTimes()
    monkeypatch.setattr(pass_times, "_now_s", lambda: clock.now)
    rates = Rates(1.0, 1.0, 1.0, 0.0, 1.0, "assumed", pass_latency_s=1.0)

    def submit() -> None:
        times.submitted()
        times.foresee(PassShape(1, 1, 0), PassWork(0, 0, ()), rates)

    submit()
    for number in range(NUM_LATE):
        assert times.leisure_s == 0.0
        submit()
        now_s, cpu_s = clock.now
        clock.now = now_s + (0.8 if number == 3 else 1.1), cpu_s + (0.05 if number == 5 else 0.02)
        times.ended()
    assert times.leisure_s == pytest.approx(clock.now[0] + 0.8 - 0.05)


@pytest.mark.parametrize(("ends_s", "rests_s"), [(1.0, 0.1), (0.05, 0.05), (0.0, 0.0), (None, 0.0)])
def test_the_host_rests_no_longer_than_a_pass_runs(ends_s, rests_s, monkeypatch):
    """It ends later, earlier, has ended, or gives no tokens."""
    now, sleeps = SimpleNamespace(s=0.0), []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        now.s += seconds

    class Pending:
        has_come = property(lambda self: now.s >= ends_s)

    monkeypatch.setattr(pass_runner, "time", SimpleNamespace(sleep=sleep, perf_counter=lambda: now.s))
    PassRunner.rest(SimpleNamespace(under_way=[None if ends_s is None else Pending()]), 0.1)
    assert rests_s <= now.s <= rests_s + LONG_SLEEP_S and set(sleeps) <= {LONG_SLEEP_S}


def test_a_letter_and_an_output_tell_whether_they_have_come():
    mailbox = Mailbox(2, 2, torch.device("cpu"))
    letter = mailbox.expect(2, scored=False)
    assert not letter.has_come
    mailbox.send(TOKENS)
    assert letter.has_come and PendingSample(TOKENS).has_come


@pytest.mark.parametrize(("options", "rests"), [({}, True), ({"resident": "none"}, False)])
def test_an_engine_rests_while_a_pass_is_under_way_but_not_where_weights_stream(options, rests, monkeypatch):
    options = options | {"device": "cpu", "max_num_seqs": 1, "max_model_len": 32, "debug": {"lookahead": 1}}
    with LLM("demo", **options) as llm:
        told, loop = [], llm.loop
        monkeypatch.setattr(llm.engine.worker.runner, "rest", told.append)
        loop.hear(lambda: None)
        loop.add(llm.sequences("def", SamplingParams(max_tokens=4, ignore_eos=True))[0])
        loop.advance()
        assert not told and llm.engine.num_under_way == 1
        loop.advance()
        assert told == ([-engine.SPARE_S] if rests else [])
        loop.clear()
