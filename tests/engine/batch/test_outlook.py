"""The end of a job as it is predicted before it begins and on its way, against when it comes, by a clock that only
passes move."""

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from penstock.engine.batch import meter
from penstock.engine.batch.done_rows import DoneRows
from penstock.engine.batch.estimate import estimate
from penstock.engine.batch.input_lines import check_lines
from penstock.engine.batch.job import Job
from penstock.engine.batch.lengths import Lengths
from penstock.engine.batch.meter import Meter
from penstock.engine.batch.rows import RowReader
from penstock.engine.commands.plan import plan_of
from penstock.engine.config import EngineConfig
from penstock.engine.planning.predictions import pass_work
from penstock.engine.runtime.pass_times import PassTimes, Timed
from penstock.scheduler.batching.counts import Wait
from penstock.scheduler.batching.request import Request
from penstock.scheduler.batching.scheduler import Scheduler
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.time_model import PassTime

from tests.support.batch_jobs import STOP, Clock, StubLLM, line, run_here, write_lines

SHAPES = Path(__file__).parents[3] / "benchmarks/shapes"
MARKS = (0.05, 0.2)  # shares of the rows, at which the end is predicted


@pytest.fixture
def errors_of(tmp_path, said, monkeypatch):
    """Runs a job of such rows on an engine without a model, and gives the errors of what was predicted at MARKS."""

    def run(llm: StubLLM, rows: list[dict]) -> tuple[float, ...]:
        monkeypatch.setattr(meter, "time", llm.clock)
        texts = [line(str(number), **row) for number, row in enumerate(rows)]
        assert run_here(llm, write_lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl") == 0
        summary = said()[0]
        predicted = summary["predicted"]
        assert all(mark <= one["share"] for mark, one in zip(MARKS, predicted, strict=True))
        assert summary["seconds"] == pytest.approx(llm.clock.now_s)
        return tuple(one["seconds"] / summary["seconds"] - 1 for one in predicted)

    return run


def rows_of(num_rows: int, num_tokens: int, most: Callable[[int], int]) -> list[dict]:
    """Rows with prompts that begin with their own number."""
    return [
        {"prompt": [number] + [5] * (num_tokens - 1), "max_tokens": most(number), "stop_token_ids": [STOP]}
        for number in range(num_rows)
    ]


def stopped_at(length: Callable[[random.Random], float]) -> Callable[[Request], bool]:
    """Stops that end each row at a length drawn for it."""

    def stops(request: Request) -> bool:
        return len(request.output_token_ids) + 1 >= length(random.Random(request.prompt_token_ids[0]))

    return stops


def stopped_by_chance(share: float) -> Callable[[Request], bool]:
    chosen = random.Random(0)
    return lambda request: chosen.random() < share


@pytest.mark.parametrize(
    "name, seats, most, stop_share, mark, within",
    [
        ("lengths fixed", 32, lambda number: 40, 0.0, 0.05, 0.05),
        ("uneven and fixed", 32, lambda number: 1 + 37 * number % 60, 0.0, 0.05, 0.05),
        ("lengths unknown", 32, lambda number: 80, 0.05, 0.2, 0.15),
        ("some unknown", 32, lambda number: 10 + 37 * number % 90, 0.02, 0.2, 0.15),
        ("unknown, and a ninth of the rows at once", 56, lambda number: 200, 0.01, 0.2, 0.15),
    ],
)
def test_the_end_is_foreseen(errors_of, name, seats, most, stop_share, mark, within):
    """Of 1,500 rows, a fifth: the mean of 300 lengths that vary as much as they are long is 6 % off by chance."""
    errors = errors_of(StubLLM(seats, stopped_by_chance(stop_share)), rows_of(1500, 20, most))
    assert abs(errors[MARKS.index(mark)]) <= within


@pytest.mark.parametrize(
    "name, length, within",
    [
        ("fixed", lambda drawn: 200, (0.05, 0.05)),
        ("each as likely", lambda drawn: drawn.randint(1, 200), (0.3, 0.15)),
        ("a stop at any time", lambda drawn: drawn.expovariate(1 / 100), (0.3, 0.15)),
        ("short or long", lambda drawn: drawn.choice([drawn.randint(1, 25), 200]), (0.3, 0.15)),
    ],
)
def test_the_end_is_foreseen_while_rows_still_come_in(errors_of, name, length, within):
    """A pass takes the prompts of ten rows at most, and there is room for all: the job is ramp and drain."""
    scheduler = Scheduler(600, 8192, 1024, page_size=16, num_pages=600 * 64)
    llm = StubLLM(stops=stopped_at(length), scheduler=scheduler, hidden_tokens=4000)
    errors = errors_of(llm, rows_of(600, 400, lambda number: 200))
    counts = llm.loop.scheduler.counts
    assert counts.waits[Wait.TOKENS] == counts.waits.total() > llm.engine.times.num_passes / 10
    assert all(abs(error) <= most for error, most in zip(errors, within))


def test_the_end_is_foreseen_where_rows_grow_together(errors_of):
    """Rows of 100 and 100 tokens: the cache holds 20 of them, and 38 that have just begun. Passes are so long
    that a few of them say nothing of the others."""
    llm = StubLLM(scheduler=Scheduler(64, 4096, 256, page_size=4, num_pages=1001), link_s=2.0)
    errors = errors_of(llm, rows_of(200, 100, lambda number: 100))
    assert llm.loop.scheduler.counts.num_preemptions > 0
    assert all(abs(error) <= 0.05 for error in errors)


def test_the_end_is_foreseen_where_rows_begin_alike(errors_of):
    """Tokens that are cached are not computed, and take no pages of a row's own."""
    llm = StubLLM(scheduler=Scheduler(64, 4096, 256, page_size=4, num_pages=1001, prefix_caching=True))
    rows = [{"prompt": [5] * 100 + [number] * 20, "max_tokens": 60, "ignore_eos": True} for number in range(500)]
    errors = errors_of(llm, rows)
    assert llm.loop.scheduler.counts.num_hit_tokens > 0.5 * 500 * 120
    assert all(abs(error) <= 0.05 for error in errors)


@pytest.mark.parametrize("resident, stop_share", [("none", 0.0), ("all", 0.0), ("all", 0.01)])
def test_a_job_of_a_planned_engine_is_foreseen_before_it_begins_and_on_its_way(
    errors_of, tmp_path, resident, stop_share
):
    """Jobs where all weights stream, of which most is ramp, and where none do: there passes with prompts are many times
    as long."""
    model = str(SHAPES / "Llama-3-8B.json")
    config = EngineConfig(model=model, device_profile="h200", resident=resident, load_format="dummy", max_num_seqs=128)
    plan = plan_of(config)
    sizes = (plan.max_num_seqs, plan.max_num_batched_tokens, plan.residency.max_model_len, config.page_size)
    llm = StubLLM(
        stops=stopped_by_chance(stop_share),
        scheduler=Scheduler(*sizes, plan.residency.num_pages),
        work=pass_work(plan),
        rates=plan.rates,
    )
    errors = errors_of(llm, rows_of(400, 512, lambda number: 100))
    assert all(abs(error) <= most for error, most in zip(errors, (0.15, 0.15) if stop_share else (0.03, 0.03)))
    given = tmp_path / "in.jsonl"
    reader = RowReader(str(given), {}, (model,))
    predicted = estimate(config, plan, reader, DoneRows(check_lines(str(given), reader.read), Job({}, 0)))
    assert predicted.num_at_once == 128 and predicted.output_tokens == 400 * 100
    assert stop_share or predicted.seconds == pytest.approx(llm.clock.now_s, rel=0.03)


def test_a_prompt_is_counted_and_computed_once_for_all_of_its_sequences(tmp_path, said, monkeypatch):
    """By the dry run as by the job: where nothing streams, prompts are most of its work."""
    model = str(SHAPES / "Llama-3-8B.json")
    config = EngineConfig(model=model, device_profile="h200", resident="all", load_format="dummy", max_num_seqs=128)
    plan = plan_of(config)
    sizes = (plan.max_num_seqs, plan.max_num_batched_tokens, plan.residency.max_model_len, config.page_size)
    scheduler = Scheduler(*sizes, plan.residency.num_pages, prefix_caching=True)
    llm = StubLLM(scheduler=scheduler, work=pass_work(plan), rates=plan.rates)
    monkeypatch.setattr(meter, "time", llm.clock)
    rows = [{"prompt": [number] + [5] * 2047, "n": 8, "max_tokens": 20, "ignore_eos": True} for number in range(64)]
    given = write_lines(tmp_path / "in.jsonl", [line(str(number), **row) for number, row in enumerate(rows)])
    assert run_here(llm, given, tmp_path / "out.jsonl") == 0
    done, reader = said()[0], RowReader(str(given), {}, (model,))
    left = DoneRows(check_lines(str(given), reader.read), Job({}, 0))
    predicted, alone = (
        estimate(dataclasses.replace(config, enable_prefix_caching=is_on), plan, reader, left)
        for is_on in (True, False)
    )
    assert predicted.prompt_tokens == alone.prompt_tokens == done["prompt_tokens"] == 64 * 2048
    assert predicted.seconds == pytest.approx(done["seconds"], rel=0.15)  # what attention reads of others is left out
    assert alone.seconds > 3 * predicted.seconds


def meter_of(monkeypatch, seconds: list[float]) -> Meter:
    """A meter that has seen passes after so many seconds each, for all of which 2 were predicted."""
    clock, times = Clock(), PassTimes()
    monkeypatch.setattr(meter, "time", clock)
    measured = Meter(times)
    assert measured.pace is None
    for each in seconds:
        times.note(Timed(PassShape(1, 1, 0), each, PassTime(2.0, 0, 0, 0, 0, 0, 2.0, "link"), 0.0), 1, clock.now_s)
        clock.now_s += each
        measured.note_pass(1)
    return measured


@pytest.mark.parametrize("num_slow", [0, 1, 5, 10, 15])
def test_slow_passes_at_first_do_not_last(monkeypatch, num_slow):
    """Rows are encoded between passes, and prompts fill them; then passes take a tenth longer than predicted."""
    measured = meter_of(monkeypatch, [3.0] * num_slow + [2.2] * (20 - num_slow))
    assert measured.pace == pytest.approx(1.1)


def test_a_pass_that_waited_for_other_work_says_nothing_of_the_others(monkeypatch):
    assert meter_of(monkeypatch, [2.2, 2.2, 12.0, 2.2, 2.2, 12.0, 2.2]).pace == pytest.approx(1.1)


def test_the_pace_of_late_is_that_of_the_last_minute_of_a_long_job(monkeypatch):
    measured = meter_of(monkeypatch, [2.2] * 400 + [3.0] * 40)
    assert measured.pace == pytest.approx(1.5) and measured.tokens_s == pytest.approx(1 / 3)
    assert meter_of(monkeypatch, [2.0]).pace == pytest.approx(1.0)


@pytest.mark.parametrize(
    "name, length, mean",
    [
        ("a stop at any time", lambda drawn: drawn.expovariate(1 / 100), 100),
        ("short or long", lambda drawn: drawn.choice([drawn.randint(1, 15), 512]), 452),
    ],
)
def test_lengths_that_no_row_has_reached_are_foreseen_by_those_before(name, length, mean):
    """Of one that has 60 tokens, the tokens that it still gets."""
    lengths, running = after_60_passes(random.Random(0), length)
    assert 0.2 < len(running) / 1200 < 0.8
    left = lengths.draw(np.full(4000, 60.0), np.full(4000, 512.0), running)
    assert left.mean() == pytest.approx(mean, rel=0.15)


def test_chance_moves_little_of_what_is_foreseen():
    """In 20 such jobs: the last lengths that were reached end few rows, and with one of these more or less the rest
    looked to be half or twice as long."""
    lefts = []
    for seed in range(20):
        lengths, running = after_60_passes(random.Random(seed), lambda drawn: drawn.expovariate(1 / 100))
        lefts.append(lengths.draw(np.full(4000, 60.0), np.full(4000, 512.0), running).mean())
    assert np.std(lefts) <= 0.2 * 100 and np.mean(lefts) == pytest.approx(100, rel=0.1)


def test_what_is_foreseen_does_not_jump_where_nothing_has_happened():
    lengths, running = after_60_passes(random.Random(0), lambda drawn: drawn.expovariate(1 / 100))
    lefts = [lengths.draw(np.zeros(400), np.full(400, 512.0), running) for _ in range(10)]
    means = [left.mean() for left in lefts]
    assert np.std(means) <= 0.01 * np.mean(means)  # 0.05 if each were drawn by itself
    assert not np.array_equal(*lefts[:2])  # in each another one is long


def after_60_passes(drawn: random.Random, length: Callable[[random.Random], float]) -> tuple[Lengths, np.ndarray]:
    """Lengths learnt from rows of which 20 began in each of the last 60 passes, and the tokens of those that run."""
    lengths, running = Lengths(), []
    for age in range(60):
        for _ in range(20):
            if (ends := math.ceil(length(drawn))) <= age:
                lengths.ended(ends, stopped=True)
            else:
                running.append(float(age))
    return lengths, np.array(running)
