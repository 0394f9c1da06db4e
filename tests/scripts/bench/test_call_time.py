"""Calls, and the first pass of one, take more than passes that follow each other; by how much is measured."""

from types import SimpleNamespace

import pytest

from scripts.bench import call_time


@pytest.mark.parametrize("first_s, more_s, call_s", [(0.5, 1.3, 0.4), (0.5, 4.5, 0.0), (0.5, 5.0, 0.0)])
def test_a_call_takes_what_its_token_does_not(monkeypatch, first_s, more_s, call_s):
    """Of the shortest of some runs; where a token takes longer than the whole call did, nothing is left."""
    times = {1: [9.0] * 4 + [first_s], 9: [more_s] + [9.0] * 4}
    monkeypatch.setattr(call_time, "run", lambda _, jobs, params: (times[jobs[0].output_len].pop(), []))
    assert call_time.call_s(None) == pytest.approx(call_s)


@pytest.mark.parametrize("passes, streamed_bytes, start_s", [
    ([0.5, 0.2, 0.3], 0, 0.3),
    ([0.1, 0.2, 0.3], 0, 0.0),
    ([], 0, 0.0),  # on other ranks than 0
    ([0.5, 0.2, 0.3], 1, 0.0),
])  # fmt: skip
def test_the_first_pass_of_a_call_takes_more_than_those_that_follow(monkeypatch, passes, streamed_bytes, start_s):
    monkeypatch.setattr(call_time, "run", lambda *_: (1.0, []))
    monkeypatch.setattr(call_time, "timed_passes", lambda _: [SimpleNamespace(measured_s=one) for one in passes])
    llm = SimpleNamespace(engine=SimpleNamespace(work=SimpleNamespace(streamed_bytes=streamed_bytes)))
    assert call_time.start_s(llm) == pytest.approx(start_s)
