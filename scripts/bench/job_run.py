"""Runs of many requests on the engine: the warm-up before them, and the requests all at once or as they arrive."""

import dataclasses
import time
from collections.abc import Sequence

from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.engine.runtime.bucket_sizes import bucket_sizes
from penstock.engine.runtime.pass_times import Timed
from penstock.scheduler.batching.request import Request, SamplingParams

from scripts.bench.arrivals import serve
from scripts.bench.workload import Job, greedy


def shrinking(jobs: list[Job], most: int) -> list[Job]:
    """Jobs, as many as run at once, that end one after another so that each size of a decode pass comes up."""
    sizes = bucket_sizes(min(len(jobs), most))
    return [
        dataclasses.replace(job, output_len=1 + sum(size > index for size in sizes))
        for index, job in enumerate(jobs[: sizes[-1]])
    ]


def warm_up(llm: LLM, jobs: list[Job]) -> None:
    """Runs a batch that shrinks from the largest to a single row."""
    fewer = shrinking(jobs, llm.engine.plan.max_num_seqs)
    run(llm, fewer, [greedy(job) for job in fewer])


def run(llm: LLM, jobs: Sequence[Job], params: Sequence[SamplingParams]) -> tuple[float, list]:
    """All requests at once: seconds, and outputs. The engine's times have the passes. What runs before it has cached
    does not count."""
    llm.reset_prefix_cache()
    llm.engine.times.keep()
    start = time.perf_counter()
    outputs = without_errors(llm.generate([job.prompt for job in jobs], list(params)))
    return time.perf_counter() - start, outputs


def run_arriving(llm: LLM, jobs: Sequence[Job], arrivals: Sequence[float]) -> list[list[float]] | None:
    """Requests, generated greedily, that arrive at their times, and are checked and made then: the seconds from the
    start at which the tokens of each came. Under torchrun all ranks call it; None on those other than 0. Raises
    ValueError if a request failed."""
    engine, loop = llm.engine, llm.loop
    llm.reset_prefix_cache()
    engine.times.keep()
    alive: dict[int, Request] = {}

    def add(index: int) -> None:
        (sequence,) = llm.sequences(jobs[index].prompt, greedy(jobs[index]))
        loop.add(sequence)
        alive[index] = sequence.request

    def step() -> list[tuple[int, int]]:
        for event in loop.advance():
            if event.sequence.error is not None:
                raise ValueError(f"request {event.sequence.request.id}: {event.sequence.error}")
        news = [(index, len(request.output_token_ids)) for index, request in alive.items()]
        for index in [index for index, request in alive.items() if request.finish_reason is not None]:
            del alive[index]
        return news

    with engine.together():
        if engine.topology.rank > 0:
            engine.follow()
            return None
        try:
            times = serve(arrivals, add, lambda: loop.has_unfinished, step, loop.hear)
        except BaseException:
            loop.clear()
            raise
        finally:
            loop.hear(None)
        engine.finish([])
    return times


def timed_passes(llm: LLM) -> list[Timed]:
    """The passes of the last run, as they were timed."""
    return list(llm.engine.times.passes)
