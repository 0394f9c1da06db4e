"""Waiting requests are served in the policy's order; a policy is one entry of a table."""

import pytest

from scheduler import policy
from scheduler.batching import Scheduler
from scheduler.request import Request, SamplingParams


def served(policy_name, requests):
    """Ids in order of their first pass, one row at a time."""
    scheduler = Scheduler(1, 16, 32, 4, 17, policy=policy_name)
    for request in requests:
        scheduler.add(request)
    order = []
    while (batch := scheduler.schedule()) is not None:
        order += [request.id for request in scheduler.update(batch, [7] * batch.num_sampled)]
    return order


def request(id, arrival, num_prompt=3):
    return Request(id, [1] * num_prompt, SamplingParams(max_tokens=1), arrival=arrival)


def test_first_come_first_served():
    requests = [request(0, 2.0), request(1, 1.0), request(3, 1.5), request(2, 1.5)]
    assert served("fcfs", requests) == [1, 2, 3, 0]


def test_a_policy_is_one_function_and_one_entry(monkeypatch):
    monkeypatch.setitem(policy.POLICIES, "shortest", lambda r: (len(r.prompt_token_ids), r.id))
    assert served("shortest", [request(0, 0, 9), request(1, 1, 2), request(2, 2, 5)]) == [1, 2, 0]


def test_unknown_policy_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="policy='lifo': expected one of fcfs"):
        Scheduler(1, 16, 32, 4, 17, policy="lifo")
