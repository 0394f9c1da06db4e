"""Times of passes: by the clock, and on the host's CPU, where waiting does not count."""

import time

from penstock.engine.runtime.pass_times import PassTimes
from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import Rates

NOTHING, RATES = PassWork(0, 0, ()), Rates(1.0, 1.0, 1.0, 0.0, 1.0, "assumed")
SHAPE, SOME_S = PassShape(1, 1, 0), 0.03


def compute() -> None:
    """Takes SOME_S of CPU."""
    end_s = time.thread_time() + SOME_S
    while time.thread_time() < end_s:
        pass


def submit(times: PassTimes) -> None:
    times.submitted()
    times.foresee(SHAPE, NOTHING, RATES)


def test_the_host_counts_what_it_computes_and_not_what_it_waits():
    times = PassTimes()
    passes, began_s = times.keep(), time.process_time()
    compute()  # before any pass
    submit(times)
    submit(times)
    with times.waiting():
        compute()
    times.ended()
    compute()
    with times.waiting():
        compute()
    times.ended()
    spent_s = time.process_time() - began_s
    idle, busy = (one.host_s for one in passes)
    assert busy >= SOME_S and idle + busy <= spent_s - 3 * SOME_S
    assert min(one.measured_s for one in passes) >= SOME_S and times.num_passes == 2


def test_a_pass_that_was_given_up_leaves_nothing_to_the_next():
    times = PassTimes()
    submit(times)
    with times.waiting():
        compute()
    times.forget()
    submit(times)
    passes = times.keep()
    compute()
    times.ended()
    assert passes[0].host_s >= SOME_S
