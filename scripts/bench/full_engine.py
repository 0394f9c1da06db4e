"""Measures rows of traffic that take an engine to its limits: as many rows as the KV cache holds, an urgent request
when all are taken, and requests whose ends nobody knows."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from penstock.engine.llm import LLM
from penstock.engine.output import Sequence
from penstock.engine.runtime.pass_times import Timed
from penstock.scheduler.batching.request import Request
from penstock.scheduler.cost.time_model import Rates, free_tokens, predict_pass

from scripts.bench.bound import against_bound, by_kind
from scripts.bench.job_run import run, timed_passes
from scripts.bench.traffic_rows import ENDING, FULL, URGENT, Row
from scripts.bench.workload import Job, greedy

FILLED = 0.98  # of the KV cache's tokens, since requests come a pass earlier or later than is reckoned
FIRST_FULL = 2  # passes over all rows that do not count: their graph is captured in front of them
WARM_UP, WARM_UP_LEN = 16, 3  # requests that run first, and their outputs
COUNTED = ("num_preemptions", "num_recomputed_tokens", "num_hit_tokens", "num_free_tokens", "num_free_tokens_used")


class Ending(Sequence):
    """A sequence that ends after `num_outputs` tokens, as a stop string would end it: the scheduler does not know."""

    def __init__(self, request: Request, num_outputs: int):
        super().__init__(request, 0, None, {})
        self.num_outputs = num_outputs

    def push(self, token: int) -> str | None:
        return "end" if len(self.request.output_token_ids) >= self.num_outputs else None


def warm_up_row(llm: LLM, row: Row) -> None:
    """Runs a few requests like those of the row."""
    rng, ids = random.Random(llm.config.seed), range(llm.engine.plan.spec.vocab_size)
    jobs = [
        Job(rng.choices(ids, k=row.input_len), WARM_UP_LEN) for _ in range(min(WARM_UP, llm.engine.plan.max_num_seqs))
    ]
    run(llm, jobs, [greedy(job) for job in jobs])


def measure_limit(llm: LLM, row: Row, planned: Rates) -> dict[str, Any]:
    """The row of the record; it means nothing on ranks other than 0. Raises ValueError where the engine cannot be
    brought there."""
    measure = {FULL: _measure_full, URGENT: _measure_urgent, ENDING: _measure_ending}[row.measures]
    before = llm.loop.scheduler.counts.to_dict()
    fields = measure(llm, row, planned)
    after = llm.loop.scheduler.counts.to_dict()
    counted = {name: after[name] - before[name] for name in COUNTED}
    return {"row": row.name, "measures": row.measures} | fields | counted


def full_jobs(llm: LLM, num_tokens: int, num_passes: int) -> list[Job]:
    """As many requests as the KV cache holds with `num_tokens` each, in the mean of `num_passes` passes over all of
    them. Those that come first, and grow while the others come, are shorter."""
    plan, page_size = llm.engine.plan, llm.config.page_size
    grown, held = num_tokens + num_passes // 2 + page_size // 2, (plan.residency.num_pages - 1) * page_size
    num_rows = min(int(FILLED * held / grown), plan.max_num_seqs)
    free = free_tokens(llm.engine.work, llm.engine.rates) or plan.max_num_batched_tokens
    num_filling = num_rows * num_tokens / max(min(free, plan.max_num_batched_tokens) - num_rows / 2, 1)  # passes
    num_filling = min(num_filling, num_tokens / 2)  # where hardly a token is free, a pass takes more all the same
    rng, ids = random.Random(llm.config.seed), range(plan.spec.vocab_size)
    jobs = []
    for index in range(num_rows):
        length = num_tokens - num_passes // 2 - round(num_filling * (1 - index / num_rows))
        prompt = rng.choices(ids, k=max(length, 1))
        jobs.append(Job(prompt, llm.loop.scheduler.max_model_len - len(prompt)))
    return jobs


def drive(llm: LLM, sequences: list[Sequence], goes_on: Callable[[], bool] = lambda: True) -> float | None:
    """Seconds in which the engine runs these sequences until all have ended, or until `goes_on` says after a pass that
    they need not, and those that are left are given up. None on ranks other than 0, which follow."""
    engine, loop = llm.engine, llm.loop
    llm.reset_prefix_cache()
    engine.times.keep()
    with engine.together():
        if engine.topology.rank > 0:
            engine.follow()
            return None
        start = time.perf_counter()
        for sequence in sequences:
            loop.add(sequence)
        while loop.has_unfinished:
            for event in loop.advance():
                if event.sequence.error is not None:
                    raise ValueError(f"request {event.sequence.request.id}: {event.sequence.error}")
            if not goes_on():
                break
        elapsed_s = time.perf_counter() - start
        for sequence in sequences:
            loop.abort(sequence.request.id, "it has been measured")
        while loop.has_unfinished:
            loop.advance()
        engine.finish([])
    return elapsed_s


def _sequences(llm: LLM, jobs: list[Job], **changes: Any) -> list[Sequence]:
    return [llm.sequences(job.prompt, greedy(job, **changes))[0] for job in jobs]


def _measure_full(llm: LLM, row: Row, planned: Rates) -> dict[str, Any]:
    jobs, wanted = full_jobs(llm, row.input_len, row.output_len), FIRST_FULL + row.output_len

    def is_full(one: Timed) -> bool:
        return one.shape.is_decode and one.shape.num_rows == len(jobs)

    drive(llm, _sequences(llm, jobs), lambda: sum(map(is_full, timed_passes(llm)[-wanted:])) < wanted)
    passes = timed_passes(llm)
    full = [one for one in passes if is_full(one)][FIRST_FULL:wanted]  # not what was under way at the end
    if not full:
        return {"error": f"its {len(jobs)} sequences never decoded together"}
    pass_s = statistics.median(one.measured_s for one in full)
    bound = _bound(llm, full, pass_s * len(full), planned)
    return {
        "num_requests": len(jobs),
        "live_tokens": statistics.mean(1 + one.shape.context_tokens / len(jobs) for one in full),
        "measured_s": pass_s,
        "tokens_per_second": len(jobs) / pass_s,
        **bound,
        **{name: bound[name] / len(full) for name in ("bound_s", "predicted_s")},
        "num_passes": len(full),
        "filling": filling_fields(llm, passes, planned),
    }


def filling_fields(llm: LLM, passes: list[Timed], planned: Rates) -> dict[str, float]:
    """Medians of the passes with prompts in them, which the first ones, that wait for kernels, hardly change."""
    work, filling = llm.engine.work, [one for one in passes if not one.shape.is_decode]
    predicted = [predict_pass(work, one.shape, planned).total_s for one in filling]
    return {
        "num_passes": len(filling),
        "num_tokens": statistics.median(one.shape.num_tokens for one in filling),
        "measured_s": statistics.median(one.measured_s for one in filling),
        "predicted_s": statistics.median(predicted),
    }


def _measure_urgent(llm: LLM, row: Row, planned: Rates) -> dict[str, Any]:
    if llm.config.scheduling_policy != "priority":
        raise ValueError(f"--rows {row.name}: nobody is urgent without --scheduling-policy priority")
    jobs = full_jobs(llm, row.input_len, row.output_len)
    jobs += jobs[: 1 + len(jobs) // 8]  # there is no room for these
    (urgent,) = _sequences(llm, [dataclasses.replace(jobs[0], output_len=1)], priority=-1)
    marks: list[tuple[float, int]] = []  # when it came, and when its token did: by the clock, and in passes

    def goes_on() -> bool:
        passes, is_there = timed_passes(llm), bool(urgent.request.output_token_ids)
        are_taken = llm.loop.scheduler.num_waiting > 0 and bool(passes) and passes[-1].shape.is_decode
        if is_there or (are_taken and not marks):
            marks.append((time.perf_counter(), len(passes)))
            if not is_there:
                llm.loop.add(urgent)
        return not is_there

    drive(llm, _sequences(llm, jobs), goes_on)
    if len(marks) < 2:
        return {"error": "rows and pages were never all taken"}
    (came_s, first), (ended_s, end) = marks
    return {
        "num_requests": len(jobs) + 1,
        "measured_s": ended_s - came_s,
        "tokens_per_second": 1 / (ended_s - came_s),
        **_bound(llm, timed_passes(llm)[first:end], ended_s - came_s, planned),
        "num_passes": end - first,
    }


def _measure_ending(llm: LLM, row: Row, planned: Rates) -> dict[str, Any]:
    plan = llm.engine.plan
    jobs = row.jobs(row.output_len, plan.spec.vocab_size, llm.config.seed, plan.residency.max_model_len)
    longest = [dataclasses.replace(job, output_len=row.most_len) for job in jobs]
    sequences = [Ending(one.request, job.output_len) for one, job in zip(_sequences(llm, longest), jobs)]
    elapsed_s, passes = drive(llm, sequences), timed_passes(llm)
    if elapsed_s is None:
        return {}
    num_tokens = sum(len(job.prompt) + job.output_len for job in jobs)
    return {
        "num_requests": len(jobs),
        "measured_s": elapsed_s,
        "tokens_per_second": num_tokens / elapsed_s,
        **_bound(llm, passes, elapsed_s, planned),
        "num_passes": len(passes),
        "mean_rows": sum(one.shape.num_rows for one in passes) / len(passes),
        "by_kind": by_kind(llm.engine.work, passes, llm.engine.rates, planned),
    }


def _bound(llm: LLM, passes: list[Timed], measured_s: float, planned: Rates) -> dict[str, Any]:
    return against_bound(llm.engine.work, [one.shape for one in passes], measured_s, llm.engine.rates, planned)
