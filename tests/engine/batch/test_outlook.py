"""The predicted end of a job, in passes, against those that it took; without a model, so that its lengths are known."""

import pytest
from penstock.engine.batch import meter
from penstock.engine.batch.progress import Progress

from tests.support.batch_jobs import STOP, StubLLM, line, run_here, write_lines

ROWS, SEATS = 700, 32


@pytest.mark.parametrize(
    "name, lengths, stop_share, share_done, within",
    [
        ("lengths fixed", lambda number: 40, 0.0, 0.05, 0.05),
        ("uneven and fixed", lambda number: 1 + 37 * number % 60, 0.0, 0.05, 0.05),
        ("lengths unknown", lambda number: 80, 0.05, 0.2, 0.15),
        ("some unknown", lambda number: 10 + 37 * number % 90, 0.02, 0.2, 0.15),
    ],
)
def test_the_end_is_foreseen(tmp_path, monkeypatch, name, lengths, stop_share, share_done, within):
    told = {}

    def show(progress, run):
        told["passes"] = run.meter.num_passes
        if "predicted" not in told and run.done.num_done >= share_done * ROWS:
            told["predicted"] = run.meter.num_passes + run.seconds_left() / run.meter.recent()[2]

    monkeypatch.setattr(Progress, "show", show)
    monkeypatch.setattr(meter, "SAMPLE_S", 0.0)  # each pass is told of
    texts = [
        line(str(number), prompt=[5, 6], max_tokens=lengths(number), stop_token_ids=[STOP], seed=number)
        for number in range(ROWS)
    ]
    given = write_lines(tmp_path / "in.jsonl", texts)
    assert run_here(StubLLM(SEATS, stop_share), given, tmp_path / "out.jsonl") == 0
    assert abs(told["predicted"] / told["passes"] - 1) <= within
