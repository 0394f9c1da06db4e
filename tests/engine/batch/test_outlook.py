"""The end of a job as it is predicted on its way, against when it comes, by a clock that only passes move."""

import pytest
from penstock.engine.batch import meter
from penstock.scheduler.batching.scheduler import Scheduler

from tests.support.batch_jobs import STOP, StubLLM, line, run_here, write_lines

ROWS = 500
AFTER = {0.05: 0, 0.2: 1}  # shares of the rows, by the place of what was predicted then


@pytest.mark.parametrize(
    "name, seats, lengths, stop_share, after, within",
    [
        ("lengths fixed", 32, lambda number: 40, 0.0, 0.05, 0.05),
        ("uneven and fixed", 32, lambda number: 1 + 37 * number % 60, 0.0, 0.05, 0.05),
        ("lengths unknown", 32, lambda number: 80, 0.05, 0.2, 0.15),
        ("some unknown", 32, lambda number: 10 + 37 * number % 90, 0.02, 0.2, 0.15),
        ("unknown, and a ninth of the rows at once", 56, lambda number: 200, 0.01, 0.2, 0.15),
    ],
)
def test_the_end_is_foreseen(tmp_path, said, monkeypatch, name, seats, lengths, stop_share, after, within):
    llm = StubLLM(seats, stop_share)
    monkeypatch.setattr(meter, "time", llm.clock)
    prompt = [5] * 20
    texts = [
        line(str(number), prompt=prompt, max_tokens=lengths(number), stop_token_ids=[STOP]) for number in range(ROWS)
    ]
    assert run_here(llm, write_lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl") == 0
    summary = said()[0]
    predicted = summary["predicted"][AFTER[after]]
    assert after <= predicted["share"] <= after + 0.05
    assert abs(predicted["seconds"] / summary["seconds"] - 1) <= within


def test_the_end_is_foreseen_where_rows_grow_together(tmp_path, said, monkeypatch):
    """Rows of 100 and 100 tokens: the cache holds 20 of them, and 38 that have just begun. Passes are so long
    that a few of them say nothing of the others."""
    llm = StubLLM(scheduler=Scheduler(64, 4096, 256, page_size=4, num_pages=1001))
    monkeypatch.setattr(llm.clock, "LINK_S", 2.0)
    monkeypatch.setattr(meter, "time", llm.clock)
    row = {"prompt": [5] * 100, "max_tokens": 100, "ignore_eos": True}
    texts = [line(str(number), **row) for number in range(200)]
    assert run_here(llm, write_lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl") == 0
    summary = said()[0]
    assert summary["preemptions"] > 0 and len(summary["predicted"]) == 2
    assert all(abs(one["seconds"] / summary["seconds"] - 1) <= 0.05 for one in summary["predicted"])
