"""Measures how much of Python another thread gets beside passes of an engine in its process, and what that costs the
passes: the thread does nothing but count.

The engine gives Python's lock away while it waits for a pass. When it wants it back, a thread that computes keeps it
for up to `sys.getswitchinterval()`. So a high count may have cost passes their time, and both are measured.
"""

import contextlib
import dataclasses
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from penstock.engine.llm import LLM

from scripts.bench.job_run import run, timed_passes
from scripts.bench.workload import Job, greedy

ROWS, PROMPT_LEN, OUTPUT_LEN = 64, 32, 40  # at most: passes that mostly decode, for a second or two
IDLE_S = 0.5


class CountingThread(threading.Thread):
    """A thread that counts until it is stopped. `rate` is its counts a second, then."""

    def __init__(self):
        super().__init__(name="counting", daemon=True)
        self.is_stopped, self.rate = False, 0.0

    def run(self) -> None:
        count, began_s = 0, time.perf_counter()
        while not self.is_stopped:
            count += 1
        self.rate = count / (time.perf_counter() - began_s)


def count_beside(llm: LLM, jobs: Sequence[Job]) -> dict[str, Any]:
    """Runs the beginnings of some jobs alone, and again beside a thread that counts: `share` is its counts a second
    over those while the engine is idle, `busy_share` the share of the time alone in which the engine's thread computes,
    and so has the lock."""
    fewer = [
        dataclasses.replace(job, prompt=job.prompt[:PROMPT_LEN], output_len=min(job.output_len, OUTPUT_LEN))
        for job in jobs[: min(ROWS, llm.engine.plan.max_num_seqs)]
    ]
    params, busy_s = [greedy(job) for job in fewer], time.thread_time()
    alone_s, _ = run(llm, fewer, params)
    busy_s = time.thread_time() - busy_s
    alone_pass_s = _median_pass_s(llm)
    with _counting() as idle:
        time.sleep(IDLE_S)
    with _counting() as beside:
        run(llm, fewer, params)
    return {
        "num_rows": len(fewer),
        "share": beside.rate / idle.rate,
        "busy_share": busy_s / alone_s,
        "median_pass_ms": {"alone": 1e3 * alone_pass_s, "beside": 1e3 * _median_pass_s(llm)},
    }


@contextlib.contextmanager
def _counting() -> Iterator[CountingThread]:
    thread = CountingThread()
    thread.start()
    try:
        yield thread
    finally:
        thread.is_stopped = True
        thread.join()


def _median_pass_s(llm: LLM) -> float:
    return statistics.median(measured_s for _, measured_s, _, _ in timed_passes(llm))
