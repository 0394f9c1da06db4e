"""Numbers and lines that tell how requests came, waited and gave way."""

import json
import logging
from types import SimpleNamespace

from penstock.scheduler.batching import counts
from penstock.scheduler.batching.counts import Counts, MoveCounts, Wait


def test_lines_tell_what_happened_and_nothing_else():
    told = Counts()
    told.note_pass(0, Wait.ROWS)
    assert told.describe() == []
    told.num_asked_tokens, told.num_hit_tokens, told.num_recomputed_tokens = 200, 50, 30
    told.note_preemption()
    for num_waiting, why in ((3, Wait.PAGES), (2, Wait.PAGES), (1, Wait.TOKENS)):
        told.note_pass(num_waiting, why)
    assert told.describe() == [
        "50 tokens of prompts were cached, 25.0% of all",
        "rows gave way 1 times: 30 tokens once more",
        "requests waited in 3 of 4 passes, for: pages 2, tokens 1",
    ]
    numbers = json.loads(json.dumps(told.to_dict()))
    assert numbers["waits"] == {"rows": 0, "pages": 2, "tokens": 1}
    assert (numbers["num_passes"], numbers["num_preemptions"], numbers["num_waiting"]) == (4, 1, 1)


def test_what_moved_is_told_where_host_memory_was_asked_for():
    moves = MoveCounts(num_not_moved=7)
    assert moves.describe() == []
    moves = MoveCounts(page_size=16, page_bytes=2**20, num_not_moved=7)
    assert moves.describe() == ["7 KV pages were forgotten: to move them to host memory would not pay"]
    moves = MoveCounts(page_size=16, page_bytes=2**20)
    for is_out in (True, True, True, False):
        moves.note(is_out)
    assert moves.describe() == [
        "KV pages moved to host memory: 3 (3.00 MiB a rank); back: 1 (1.00 MiB a rank), 16 tokens"
    ]
    numbers = Counts(moves=moves).to_dict()["moves"]
    assert numbers == json.loads(json.dumps(numbers))
    assert (numbers["out_bytes"], numbers["in_bytes"], numbers["num_saved_tokens"]) == (3 * 2**20, 2**20, 16)


def test_one_line_a_second_is_logged(caplog, monkeypatch):
    times = iter([10.0, 10.5, 10.9, 11.0, 11.5])
    monkeypatch.setattr(counts, "time", SimpleNamespace(monotonic=lambda: next(times)))
    told = Counts()
    with caplog.at_level(logging.INFO, "penstock.scheduler"):
        for _ in range(5):
            told.note_preemption()
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [
        " 1 rows have given way so far",
        " 4 rows have given way so far",
    ]
