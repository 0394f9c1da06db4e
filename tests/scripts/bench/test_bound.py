"""Bytes, FLOPs and bounds of passes, by hand and by counting."""

import dataclasses

import pytest
from penstock.engine.runtime.pass_times import Timed
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.cost.pass_work import PassShape, PassWork, StepWork
from penstock.scheduler.cost.time_model import Rates

from scripts.bench.bound import KINDS, against_bound, bound_of, by_kind, host_fields, kind_of

# 1 GB/s, 10 GB/s, 1 TFLOP/s
RATES = Rates(link_gb_s=1.0, memory_gb_s=10.0, gemm_tflops=1.0, reduce_latency_s=0.0, reduce_gb_s=1.0, source="x")
STEPS = (
    (StepWork("linears", token_flops=5 * 10**8), 2),
    (StepWork("attention", attention_flops=250, kv_token_bytes=2500), 4),
    (StepWork("head", row_flops=10**8), 1),
)
RESIDENT = PassWork(0, 2 * 10**9, STEPS)
STREAMED = PassWork(10**9, 10**9, STEPS)


def batch(*rows: tuple[int, int]) -> Batch:
    """Makes the shape of a pass over rows, of (tokens, start) each."""
    numbered = enumerate(rows)
    return Batch.of([BatchRow(index, (0,) * length, start, (), True, None) for index, (length, start) in numbered])


def pairs(*rows: tuple[int, int]) -> int:
    """Counts context token by token: a token attends to all before it and to itself."""
    return sum(1 for length, start in rows for token in range(start, start + length) for _ in range(token + 1))


@pytest.mark.parametrize("rows", [[(5, 0)], [(1, 7)], [(1, 40), (1, 3)], [(6, 2), (1, 30), (4, 0)]])
def test_pairs_of_a_batch_are_counted_row_by_row(rows):
    shape = batch(*rows).shape
    assert shape.attended_pairs == pairs(*rows)
    flops = sum(length for length, _ in rows) * 10**9 + len(rows) * 10**8 + 1000 * pairs(*rows)
    assert RESIDENT.flops(shape) == flops


def test_rows_read_and_copy_by_their_kind():
    mixed, decodes = batch((1024, 0), (1, 300), (1, 0), (1024, 8), (8, 0)).shape, batch((1, 300), (1, 20)).shape
    assert (mixed.read_tokens, mixed.copied_tokens) == (301 + 1, 1032)
    assert (decodes.read_tokens, decodes.copied_tokens) == (301 + 21, 0)


@pytest.mark.parametrize("length, start, num_rows", [(5, 0, 1), (1, 9, 4), (3, 2, 2)])
def test_rows_that_are_alike_need_no_count(length, start, num_rows):
    rows = [(length, start)] * num_rows
    assert PassShape(length * num_rows, num_rows, start * num_rows).attended_pairs == pairs(*rows)


def test_a_pass_is_bound_by_what_takes_longest():
    few, many = PassShape(1, 1, 100, 101), PassShape(1000, 1, 0, 500500)
    link, memory, compute = (
        bound_of(*one, RATES) for one in ((STREAMED, [few]), (RESIDENT, [few]), (RESIDENT, [many]))
    )
    assert (link.term, link.bound_s) == ("link", 1.0)
    assert (memory.term, memory.bound_s) == ("memory", pytest.approx((2e9 + 101 * 1e4) / 1e10))
    assert (compute.term, compute.bound_s) == ("compute", pytest.approx((1e12 + 1e8 + 1000 * 500500) / 1e12))


def test_what_rows_share_must_be_read_once():
    shape = PassShape(4, 4, 4000, num_shared=2700)
    assert RESIDENT.read_bytes(shape) == 2 * 10**9 + (1300 + 4) * 10**4
    one_of_several = dataclasses.replace(batch((1, 40), (8, 0)), num_shared=64).shape  # the others are not in this pass
    assert RESIDENT.read_bytes(one_of_several) == 2 * 10**9 + 9 * 10**4


def test_passes_in_a_row_add_up_each_by_its_own_bound():
    few, many = PassShape(1, 1, 100, 101), PassShape(1000, 1, 0, 500500)
    both = bound_of(RESIDENT, [few, many, few], RATES)
    each = [bound_of(RESIDENT, [shape], RATES) for shape in (few, many)]
    assert both.term == "compute" and both.bound_s == pytest.approx(2 * each[0].bound_s + each[1].bound_s)
    assert both.read_bytes == 2 * each[0].read_bytes + each[1].read_bytes


def test_a_record_s_fields():
    planned = Rates(**{**RATES.__dict__, "link_gb_s": 0.8})
    fields = against_bound(STREAMED, [PassShape(1, 1, 0, 1)] * 2, 2.5, RATES, planned)
    assert fields["bound"] == "link" and fields["bound_s"] == 2.0 and fields["fraction_of_bound"] == 0.8
    assert fields["predicted_s"] == 2.5 and fields["predicted_over_measured"] == 1.0
    assert fields["achieved_link_gb_s"] == 0.8
    assert fields["achieved_tflops"] == pytest.approx(2 * (1e9 + 1e8 + 1000) / 2.5 / 1e12)


def test_kinds_of_passes():
    rows = {"decode": [(1, 7), (1, 0)], "mixed": [(1, 7), (40, 0)], "prefill": [(5, 0), (1, 0)]}
    assert {kind: kind_of(batch(*one).shape) for kind, one in rows.items()} == {kind: kind for kind in rows}
    assert kind_of(batch((5, 8)).shape) == "mixed"


def test_kinds_add_up_to_the_whole():
    shapes = [batch(*rows).shape for rows in ([(1, 7)], [(1, 9), (1000, 0)], [(1, 3)], [(600, 0)])]
    passes = [Timed(shape, 1.0 + index, None, 0.0) for index, shape in enumerate(shapes)]
    planned = dataclasses.replace(RATES, memory_gb_s=5.0)
    rows = by_kind(STREAMED, passes, RATES, planned)
    whole = against_bound(STREAMED, shapes, 10.0, RATES, planned)
    assert [(row["kind"], row["num_passes"], row["num_tokens"], row["measured_s"]) for row in rows] == [
        ("decode", 2, 2, 4.0),
        ("mixed", 1, 1001, 2.0),
        ("prefill", 1, 600, 4.0),
    ]
    assert tuple(row["kind"] for row in rows) == KINDS
    for name in ("bound_s", "predicted_s"):
        assert sum(row[name] for row in rows) == pytest.approx(whole[name])


def test_the_host_has_a_share_of_the_median_pass():
    passes = [Timed(None, 4.0, None, host_s) for host_s in (*[0.5] * 50, *[1.0] * 48, 3.0, 3.0)]
    fields = host_fields(passes)
    assert fields == pytest.approx({"host_s": 0.75, "host_p99_s": 3.0, "host_share": 0.1875, "host_p99_share": 0.75})
