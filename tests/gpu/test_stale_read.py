"""System B's experiment: PyTorch does not order streams by data. A tensor written on one stream and read on another
without an event between is stale; with the event it never is. Every crossing of lanes in a plan is therefore an event.
"""

import pytest
import torch

pytestmark = pytest.mark.gpu
NUM_TRIALS = 20


def read_across_streams(with_event: bool) -> int:
    """Counts how many of NUM_TRIALS reads on a second stream saw the old value."""
    writer, reader = torch.cuda.Stream(), torch.cuda.Stream()
    busy = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(busy)
    stale = 0
    for _ in range(NUM_TRIALS):
        value = torch.zeros(1024, device="cuda")
        seen = torch.zeros(1024, device="cuda")
        torch.cuda.synchronize()
        written = torch.cuda.Event()
        with torch.cuda.stream(writer):
            for _ in range(4):  # several milliseconds of work before the write
                torch.mm(busy, busy, out=out)
            value.fill_(1.0)
            written.record(writer)
        if with_event:
            reader.wait_event(written)
        with torch.cuda.stream(reader):
            seen.copy_(value)
        torch.cuda.synchronize()
        stale += int(seen.sum().item() != 1024)
    return stale


def test_a_read_without_an_event_is_stale():
    assert read_across_streams(with_event=False) == NUM_TRIALS


def test_a_read_after_the_event_is_not():
    assert read_across_streams(with_event=True) == 0
