"""The measurement of rates: warm-ups, the ranks that copy, and their bytes."""

import itertools

import pytest
import torch
from penstock.engine.measure import rates as measure
from penstock.engine.measure.rates import link_buffers, link_gb_s, seconds
from penstock.engine.runtime import probe
from penstock.engine.runtime.trace import label
from penstock.parallel.collectives import Solo
from penstock.parallel.ledger import TransferLedger
from penstock.scheduler.passes.pass_plan import Prefetch

from penstock import LLM
from tests.support.llm_runs import OPTIONS

CPU = torch.device("cpu")


def test_the_best_of_several_behind_a_warm_up(monkeypatch):
    ticks = itertools.accumulate([0, 5, 1, 2, 1, 9])  # runs of 5, 2 and 9 seconds
    monkeypatch.setattr(measure, "perf_counter", lambda: next(ticks))
    calls = []
    assert seconds(lambda: calls.append(1), CPU, repeats=3, warm_ups=2) == 2
    assert len(calls) == 5


def test_the_link_is_bytes_over_time_and_nothing_where_others_copy():
    with link_buffers(2**20, CPU) as (source, target):
        target.zero_()
        assert link_gb_s([(source, target)], Solo(), range(1, 2)) == 0 and not target.any()
        assert link_gb_s([(source, target)], Solo()) > 0.01 and target.eq(source).all() and source.all()


def test_warm_ups_do_not_count(monkeypatch):
    runs_s = iter([0.001, 4.0, 2.0, 3.0])
    monkeypatch.setattr(measure, "seconds", lambda run, device, repeats, warm_ups: next(runs_s))
    pair = torch.zeros(10**6, dtype=torch.uint8), torch.zeros(10**6, dtype=torch.uint8)
    assert link_gb_s([pair, pair], Solo()) == pytest.approx(2e6 / 2.0 / 1e9)


def test_a_whole_pass_can_be_asked_for(monkeypatch):
    with LLM("demo", **OPTIONS) as llm:
        executor, seen = llm.engine.worker.executor, []
        stretch = executor.stretch
        monkeypatch.setattr(executor, "stretch", lambda nbytes: seen.append(stretch(nbytes)) or seen[-1])
        for nbytes in (1, llm.engine.work.streamed_bytes, 2**40):
            llm.measure(nbytes)
        sizes = [sum(source.nbytes for source, _ in copies) for copies in seen]
        assert sizes[1:] == [llm.engine.work.streamed_bytes] * 2 and 0 < sizes[0] < sizes[1]


@pytest.mark.parametrize("given", [None, "cpu"])
def test_rates_are_measured_where_nothing_streams_unless_a_profile_was_given(given):
    with LLM("demo", **OPTIONS | {"resident": "all", "device_profile": given}) as llm:
        assert llm.engine.work.streamed_bytes == 0
        llm.measure(llm.engine.work.streamed_bytes)
        assert llm.engine.rates.source == ("measured" if given is None else "assumed: cpu")
        assert llm.engine.plan.rates == llm.engine.rates


def test_the_ring_is_filled_again(tmp_path, monkeypatch):
    """The copies of the ring are in the trace, but belong to no pass."""
    monkeypatch.setattr(probe, "_step_latency_s", lambda *_: 0.0)  # it runs passes, which would fill the ring too
    with LLM("demo", **OPTIONS, trace=str(tmp_path / "trace.json")) as llm:
        executor, plan = llm.engine.worker.executor, llm.engine.plan.pass_plan
        executor.ring.zero_()
        llm.measure()
        assert executor.ring_is_filled and executor.ledger == TransferLedger()
        first = [group for group, _ in plan.ring.slots[: plan.ring.num_wrapped]]
        for instruction in plan.prologue:
            if isinstance(instruction, Prefetch):
                assert executor.slot(instruction).equal(executor.host_spans[instruction.group])
                first.remove(instruction.group)
        assert not first
        filling = [one.name for one in llm.engine.trace.intervals() if one.pass_index < 0]
        assert filling == [label(instruction) for instruction in plan.prologue]
