"""The order in which rows run, how long that takes, and when a job is said to end."""

import random

import numpy as np
import pytest
from penstock.engine.batch import run
from penstock.engine.batch.lengths import Lengths
from penstock.engine.batch.run import BatchRun
from penstock.engine.batch.windows import in_windows, longest_first, num_passes
from penstock.engine.loop import Loop
from penstock.scheduler.batching.scheduler import Scheduler

from tests.support.batch_jobs import StubLLM, line, run_here, write_lines, write_many


def order(prefixes, lengths, size, seats):
    rows = in_windows(iter(range(len(prefixes))), size, prefixes.__getitem__, lengths.__getitem__, seats)
    return list(rows)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 5, 8, 9, 23])
def test_each_row_comes_once_and_window_by_window(num_rows):
    chosen = random.Random(num_rows)
    prefixes = [chosen.choice("abc") for _ in range(num_rows)]
    rows = order(prefixes, [1] * num_rows, size=4, seats=2)
    assert sorted(rows) == list(range(num_rows))
    windows = max(num_rows // 4, 1)
    for window in range(windows):
        first, end = 4 * window, num_rows if window == windows - 1 else 4 * window + 4
        assert sorted(rows[first:end]) == list(range(first, end))
        assert [prefixes[row] for row in rows[first:end]] == sorted(prefixes[first:end])


def test_the_next_window_is_not_looked_into_before_its_turn():
    looked = []
    rows = in_windows(iter(range(100)), 10, lambda row: looked.append(row) or "", lambda row: 1, 4)
    next(rows)
    assert looked == list(range(10))


def test_a_job_reads_its_file_window_by_window(tmp_path, monkeypatch):
    looked, last_of_pass, read, advance = [], [], BatchRun._read, Loop.advance
    monkeypatch.setattr(run, "WINDOW", 8)
    monkeypatch.setattr(BatchRun, "_read", lambda job, index: looked.append(index) or read(job, index))
    monkeypatch.setattr(Loop, "advance", lambda loop: last_of_pass.append(max(looked)) or advance(loop))
    given = write_many(tmp_path / "in.jsonl", 100)
    assert run_here(StubLLM(max_num_seqs=2), given, tmp_path / "out.jsonl") == 0
    assert (last_of_pass[0], last_of_pass[-1]) == (7, 99)
    assert {(index + 1) % 8 for index in last_of_pass if index < 99} == {0}


def test_only_in_the_last_window_the_longest_come_first():
    lengths = [1, 1, 1, 9] * 3
    assert order([""] * 12, lengths, size=4, seats=2) == [*range(8), 11, 8, 9, 10]


def test_rows_that_begin_alike_compute_their_beginning_once(tmp_path):
    """Rows of one length, of which all seats begin one in the same pass."""
    num_kinds, num_alike, num_shared, seats = 12, 8, 64, 16
    llm, computed = StubLLM(seats), []
    scheduler = Scheduler(seats, 2048, 256, page_size=16, num_pages=12 * seats + 1, prefix_caching=True)
    llm.loop, submit = Loop(scheduler, llm.engine), llm.engine.submit
    llm.engine.submit = lambda batch: (computed.append(sum(len(row.tokens) for row in batch.rows)), submit(batch))
    rows = [(kind, number) for number in range(num_alike) for kind in range(num_kinds)]
    texts = [
        line(f"{kind} {number}", prompt=[*range(100 + kind, 100 + kind + num_shared), number], max_tokens=4)
        for kind, number in rows
    ]
    assert run_here(llm, write_lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl") == 0
    at_least = num_kinds * num_shared + len(rows) * 4  # of each row the last of its prompt, and 3 outputs
    assert sum(computed) == at_least


@pytest.mark.parametrize(
    ("num_rows", "num_prompt", "caches", "expected"),
    [
        (600, 2, False, [256, 256, 88]),  # short ones, as many as ever
        (180, 60, False, [35, 70, 66, 9]),  # 2048 tokens, then twice as many as have entered
        (100, 200, False, [32, 32, 32, 4]),  # at least so many
        (500, 100, True, [32, 64, 128, 256, 20]),  # all the same, so that each pass takes all that wait
    ],
)
def test_few_prompts_are_encoded_while_a_pass_runs_and_as_many_as_it_takes(
    tmp_path, monkeypatch, num_rows, num_prompt, caches, expected
):
    counts, begin, advance = [0], BatchRun._begin, Loop.advance

    def count(job, index, row):
        counts[-1] += 1
        begin(job, index, row)

    monkeypatch.setattr(BatchRun, "_begin", count)
    monkeypatch.setattr(Loop, "advance", lambda loop: counts.append(0) or advance(loop))
    llm = StubLLM()
    scheduler = Scheduler(512, 2048, 256, page_size=16, num_pages=16 * 512, prefix_caching=caches)
    llm.loop = Loop(scheduler, llm.engine)
    texts = [line(str(number), prompt=[5] * num_prompt, max_tokens=30) for number in range(num_rows)]
    assert run_here(llm, write_lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl") == 0
    assert counts[: len(expected)] == expected and sum(counts) == num_rows


def test_longest_first_only_where_that_ends_sooner():
    lengths = [1, 1, 1, 9]
    assert longest_first([0, 1, 2, 3], lengths.__getitem__, seats=2) == [3, 0, 1, 2]
    assert num_passes([1, 1, 1, 9], 2) == 10 and num_passes([9, 1, 1, 1], 2) == 9
    assert longest_first([1, 0, 2], [4, 4, 4].__getitem__, seats=2) == [1, 0, 2]
    assert longest_first([2, 1, 0], [9, 2, 1].__getitem__, seats=3) == [2, 1, 0], "all have seats at once"


def test_rows_of_one_length_keep_their_order_where_the_longest_come_first():
    lengths = [3, 1, 3, 1, 3, 8]
    rows = longest_first(range(6), lengths.__getitem__, seats=2)
    assert rows == [5, 0, 2, 4, 1, 3]


def test_passes_are_those_of_a_loop_that_is_played():
    chosen = random.Random(1)
    for _ in range(50):
        seats, waiting = chosen.randint(1, 5), [chosen.randint(1, 9) for _ in range(chosen.randint(0, 20))]
        running = [chosen.randint(1, 9) for _ in range(chosen.randint(0, seats))]
        left, queue, passes = list(running), list(waiting), 0
        while left or queue:
            while queue and len(left) < seats:
                left.append(queue.pop(0))
            left = [one - 1 for one in left if one > 1]
            passes += 1
        assert num_passes(waiting, seats, running) == passes


def test_sequences_that_nothing_stopped_are_as_long_as_they_may_be():
    lengths = Lengths()
    lengths.ended(40, stopped=False)
    left = lengths.draw(np.array([0.0, 10.0, 40.0]), np.array([40.0, 40.0, 40.0]), np.array([10.0]))
    assert left.tolist() == [40.0, 30.0, 0.0]


@pytest.mark.parametrize("kind", ["uniform", "geometric", "two kinds"])
def test_lengths_are_learnt_from_those_that_ended_without_being_misled_by_the_short_ones(kind):
    """Of sequences that run at once, the short ones end first: their own mean would be far too short."""
    chosen = np.random.default_rng(0)
    drawn = {
        "uniform": chosen.uniform(1, 400, 4000),
        "geometric": chosen.exponential(150, 4000) + 1,
        "two kinds": np.where(chosen.random(4000) < 0.5, 20.0, 300.0),
    }[kind].round()
    at, lengths = 250, Lengths()
    for length in drawn[:2000]:
        if length <= at:
            lengths.ended(int(length), stopped=True)
    running = np.full(int((drawn[:2000] > at).sum()), float(at))
    later = lengths.draw(np.zeros(2000), np.full(2000, 1000.0), running)
    short_mean, mean = drawn[:2000][drawn[:2000] <= at].mean(), np.minimum(drawn[2000:], at).mean()
    assert abs(np.minimum(later, at).mean() - mean) < 0.06 * mean
    assert short_mean < 0.8 * mean or kind == "geometric"
