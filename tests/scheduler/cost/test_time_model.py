"""Time model: profiles, steps and passes by hand."""

import dataclasses
import math

import pytest
from penstock.engine.planning.device_profile import load_profile
from penstock.scheduler.cost.pass_work import (
    ATTENTION_SHARE,
    GATHER_SHARE,
    KV_SHARE,
    SHARED_KV_SHARE,
    TOKEN_PAIRS,
    PassShape,
    PassWork,
    StepWork,
)
from penstock.scheduler.cost.time_model import Rates, decompress_s, free_tokens, predict_pass, step_s, steps_s

RATES = Rates(link_gb_s=50.0, memory_gb_s=4000.0, gemm_tflops=800.0, reduce_latency_s=0.0, reduce_gb_s=1.0, source="x")
READ = StepWork("read", weight_bytes=10**9, token_flops=10**9, kv_token_bytes=10**5)
REDUCE = StepWork("allreduce", reduce_token_bytes=1000)
WORK = PassWork(streamed_bytes=10 * 10**9, resident_bytes=6 * 10**9, steps=((READ, 16),))
RESIDENT = dataclasses.replace(WORK, streamed_bytes=0)
DECODE = PassShape(1, 1, 1000)


def rates(**changes) -> Rates:
    return dataclasses.replace(RATES, **changes)


def test_h200_link_is_shared_by_the_ranks():
    assert [load_profile("h200", n).link_gb_s for n in (1, 2, 3, 4)] == [55.1, 53.1, 48.1, 40.4]
    assert load_profile("h200", 8).link_gb_s == pytest.approx(40.4 / 2)
    assert load_profile("h200").source == "assumed: h200"
    assert load_profile("cpu").memory_bytes is None


def test_a_given_link_wins_and_is_said():
    given = load_profile("h200", 4, link_gb_s=25.0)
    assert given.link_gb_s == 25.0 and "as given" in given.source


def test_a_step_takes_its_latency_and_what_it_moves_and_computes():
    """Figures by hand: 4e9 bytes at 4 TB/s take 1 ms, 800e9 FLOPs at 800 TFLOP/s another; together they take 1.414
    ms."""
    read = StepWork("read", weight_bytes=4 * 10**9)
    both = dataclasses.replace(read, token_flops=800 * 10**9)
    assert step_s(read, DECODE, RATES) == pytest.approx(1e-3)
    assert step_s(both, DECODE, RATES) == pytest.approx(math.sqrt(2) * 1e-3)
    assert step_s(both, DECODE, rates(node_latency_s=3e-6)) == pytest.approx(math.sqrt(2) * 1e-3 + 3e-6)


def test_bytes_and_flops_follow_the_shape():
    step = StepWork("all", 1, token_bytes=10, row_bytes=100, kv_token_bytes=1000, token_flops=1, row_flops=10)
    step = dataclasses.replace(step, attention_flops=100)
    shape = PassShape(num_tokens=6, num_rows=2, context_tokens=50)
    assert step.nbytes(shape) == 1 + 6 * 10 + 2 * 100 + (50 + 6) * 1000
    pairs = 50 * 3 + 2 * (1 + 2 + 3)  # three queries a row, each attends to what is there, itself and those before
    assert step.flops(shape) == 6 + 2 * 10 + pairs * 100
    pairs += (6 - 2) * TOKEN_PAIRS
    assert step.gemm_flops(shape) == pytest.approx(64 + 2 * 10 + pairs * 100 / ATTENTION_SHARE)  # padded


@pytest.mark.parametrize(
    "shape, run",
    [
        (PassShape(6, 2, 0), 64),
        (PassShape(300, 2, 0), 320),
        (PassShape(300, 101, 9000, num_behind=0, num_chunks=1), 320),
        (PassShape(300, 33, 0), 300),  # more prompts than are padded
        (PassShape(300, 300, 9000), 300),  # a decode pass
        (PassShape(300, 2, 50), 320),  # a chunk that continues
        (PassShape(600, 2, 0), 640),
        (PassShape(2049, 2, 0), 2049),
    ],
)
def test_linears_of_short_passes_with_prompts_compute_padding_too(shape, run):
    step = StepWork("linears", token_flops=7)
    assert shape.run_tokens == run and step.gemm_flops(shape) == 7 * run and step.flops(shape) == 7 * shape.num_tokens


def test_what_the_host_launches_is_no_shorter_than_its_launches():
    """Decode passes are graphs, where there are graphs."""
    tiny = StepWork("norm", token_bytes=1)
    prefill = PassShape(3000, 1, 0)
    gpu, cpu = rates(step_latency_s=8e-6, node_latency_s=2e-6), rates(step_latency_s=8e-6)
    assert (step_s(tiny, DECODE, gpu), step_s(tiny, prefill, gpu)) == pytest.approx((2e-6, 2e-6), rel=1e-3)
    assert step_s(tiny, prefill, cpu) == step_s(tiny, DECODE, cpu) == 8e-6
    launches = PassWork(0, 0, ((tiny, 100),))
    graph, eager = (predict_pass(launches, shape, gpu) for shape in (DECODE, prefill))
    assert graph.bound == eager.bound == "launch"
    assert (graph.launch_s, eager.launch_s) == pytest.approx((2e-4, 8e-4))
    assert (graph.total_s, eager.total_s) == pytest.approx((2e-4, 8e-4 + 2e-6), rel=1e-3)  # with what a row costs
    assert steps_s(((READ, 1), (tiny, 5)), prefill, gpu) > 2e-4  # what computes longer hides launches


def test_the_host_runs_ahead_of_a_gpu_and_not_of_a_cpu():
    """Figures by hand: a step of 1 ms and ten of nothing, each of which takes 50 us to launch."""
    steps = ((StepWork("read", weight_bytes=4 * 10**9), 1), (StepWork("norm", token_bytes=1), 10))
    prefill = PassShape(3000, 1, 0)
    gpu, cpu = rates(step_latency_s=5e-5, node_latency_s=0.0), rates(step_latency_s=5e-5)
    assert steps_s(steps, prefill, gpu) == pytest.approx(1e-3, rel=1e-3)
    assert steps_s(steps, prefill, replace_latency(gpu, 2e-4)) == pytest.approx(11 * 2e-4)
    assert steps_s(steps, prefill, cpu) == pytest.approx(1e-3 + 10 * 5e-5)


def replace_latency(given: Rates, step_latency_s: float) -> Rates:
    return dataclasses.replace(given, step_latency_s=step_latency_s)


@pytest.mark.parametrize(
    "shape, single, read, copied",
    [
        (PassShape(4, 4, 400), 404, 404, 0),  # decode passes read pages where they lie
        (PassShape(1024, 1, 0), 0, 0, 0),  # prompts that start here attend to their own keys
        (PassShape(2046, 2, 0), 0, 0, 0),
        (PassShape(1024, 1, 512), 0, 1536, 0),  # in padded passes chunks that continue read pages too
        (PassShape(3024, 1, 512), 0, 0, 3536),
        (PassShape(1030, 7, 600, num_read=400, num_behind=206), 400, 606, 0),
        (PassShape(3030, 7, 600, num_read=400, num_behind=206), 400, 400, 206),
    ],
)
def test_what_attention_reads_and_copies(shape, single, read, copied):
    step = StepWork("attention", kv_token_bytes=1000)
    assert (shape.read_tokens, shape.cached_tokens, shape.copied_tokens) == (single, read, copied)
    expected = 1000 * (read / KV_SHARE + 2 * copied / GATHER_SHARE + copied)
    assert step.memory_bytes(shape) == pytest.approx(expected)
    assert step.nbytes(shape) == 1000 * (read + 3 * copied)


@pytest.mark.parametrize(
    "shape, first, again, copied",
    [
        (PassShape(4, 4, 400, num_shared=240), 164, 240, 0),
        (PassShape(1024, 1, 512, num_shared=500), 1036, 500, 0),
        (PassShape(3030, 7, 600, num_read=400, num_behind=200, num_shared=300), 200, 200, 200),  # two thirds are read
        (PassShape(1024, 1, 0, num_shared=500), 0, 0, 0),  # nothing is read
    ],
)
def test_what_rows_share_is_read_again_at_a_rate_of_its_own(shape, first, again, copied):
    step = StepWork("attention", kv_token_bytes=1000)
    assert (shape.cached_tokens, shape.reread_tokens) == (first + again, again)
    expected = first / KV_SHARE + again / SHARED_KV_SHARE + 2 * copied / GATHER_SHARE + copied
    assert step.memory_bytes(shape) == pytest.approx(1000 * expected)
    assert step.nbytes(shape) == 1000 * (first + 3 * copied)


def test_rows_that_decode_beside_a_prompt_take_as_long_as_by_themselves():
    """Figures by hand: kernels of their own read 1000 tokens, beside a prompt of 4 tokens with 10 pairs."""
    attention = StepWork("attention", kv_token_bytes=10**6, attention_flops=6 * 10**10)
    decodes, prompt, both = PassShape(1, 1, 999), PassShape(4, 1, 0), PassShape(5, 2, 999, 1010, 1000, 0)
    assert step_s(attention, decodes, RATES) == pytest.approx(1e9 / KV_SHARE / 4e12)
    assert step_s(attention, prompt, RATES) == pytest.approx((10 + 3 * TOKEN_PAIRS) * 6e10 / ATTENTION_SHARE / 8e14)
    parts = [step_s(attention, shape, RATES) for shape in (decodes, prompt)]
    assert step_s(attention, both, RATES) == pytest.approx(sum(parts))


def test_a_decompressed_group_has_three_kernels():
    """Kernels of a norm and two matrices; without graphs the group takes as long as a step takes the host."""
    graphs, eager = (
        rates(decompress_gb_s=1000.0, node_latency_s=2e-6),
        rates(decompress_gb_s=1000.0, step_latency_s=5e-5),
    )
    assert decompress_s(10**9, 10, graphs) == pytest.approx(1e-3 + 10 * 3 * 2e-6)
    assert decompress_s(10**9, 10, eager) == pytest.approx(1e-3 + 10 * 5e-5)


def test_a_step_of_nothing_costs_nothing():
    idle = StepWork("attn_allreduce")
    assert idle.is_idle and not REDUCE.is_idle
    assert step_s(idle, DECODE, rates(step_latency_s=1.0, node_latency_s=1.0)) == 0


def test_a_streamed_pass_is_as_long_as_its_copies():
    time = predict_pass(WORK, DECODE, RATES)
    assert time.bound == "link"
    assert time.total_s == time.link_s == pytest.approx(10 / 50)
    assert time.memory_s == pytest.approx(16 * (1e9 + 1001 * 1e5 / KV_SHARE) / 4e12)
    assert time.compute_s == pytest.approx(16e9 / 8e14)


def test_a_resident_pass_is_bound_by_memory_then_by_compute():
    few, many = (predict_pass(RESIDENT, PassShape(n, 1, 0), RATES) for n in (1, 4000))
    assert (few.bound, many.bound) == ("memory", "compute")
    assert few.total_s == pytest.approx(few.memory_s, rel=0.01)
    assert many.total_s == pytest.approx(math.hypot(many.memory_s, many.compute_s))


def test_a_pass_is_the_sum_of_its_steps():
    """Compares with the timeline, which replays the steps one by one and has the same cost."""
    shape = PassShape(300, 4, 5000)
    mixed = PassWork(0, 0, ((READ, 3), (REDUCE, 2), (StepWork("norm", token_bytes=10**6), 5)))
    slow = rates(reduce_latency_s=1e-4, node_latency_s=1e-5, step_latency_s=2e-5)
    expected = sum(count * step_s(step, shape, slow) for step, count in mixed.steps)
    assert predict_pass(mixed, shape, slow).total_s == pytest.approx(expected)
    assert (mixed.num_steps(shape), mixed.num_reduces, mixed.kv_token_bytes) == (10, 2, 3 * 10**5)


def test_a_pass_that_is_launched_step_by_step_takes_no_less_than_the_host():
    """By hand: 16 steps, 4 groups that are decompressed and 400 rows, of which four cost as much as a step."""
    work = dataclasses.replace(WORK, num_decompressed=4)
    eager = rates(node_latency_s=1e-6, step_latency_s=3e-3)
    mixed, decode = PassShape(5000, 400, 0), PassShape(400, 400, 0)
    assert predict_pass(work, mixed, eager).total_s == pytest.approx((16 + 4 + 100) * 3e-3)
    assert predict_pass(work, decode, eager).total_s == pytest.approx(10 / 50)  # a graph, which copies bind
    assert predict_pass(work, mixed, rates(node_latency_s=1e-6, step_latency_s=1e-5)).bound == "link"


def test_sums_over_ranks_are_launched_too():
    """By hand: six steps of a prompt that computes next to nothing, four of which have a sum that counts as half a step
    more; in a graph nothing is launched."""
    steps = ((StepWork("norm", token_bytes=1), 2), (StepWork("allreduce", reduce_token_bytes=1), 4))
    work, eager = PassWork(0, 0, steps), rates(node_latency_s=1e-6, step_latency_s=1e-3)
    assert steps_s(steps, PassShape(3000, 1, 0), eager) == pytest.approx((6 + 4 / 2) * 1e-3)
    assert predict_pass(work, PassShape(3000, 4, 0), eager).total_s == pytest.approx((6 + 4 / 2 + 4 / 4) * 1e-3)
    assert predict_pass(work, PassShape(2000, 4, 0), eager).total_s < 1e-4


def test_a_short_pass_with_prompts_is_a_graph_where_nothing_streams():
    """So little may stream that such a pass takes longer to launch than to copy."""
    short, eager = PassShape(300, 4, 0), rates(node_latency_s=1e-6, step_latency_s=3e-3)
    little = dataclasses.replace(WORK, streamed_bytes=10**6)
    assert short.is_padded and predict_pass(little, short, eager).total_s == pytest.approx((16 + 1) * 3e-3)
    assert predict_pass(RESIDENT, short, eager).total_s < 0.5 * (16 + 1) * 3e-3


def test_tokens_of_prompts_that_are_scored_cost_time_where_there_are_any():
    """By hand: 4e6 bytes and 800e6 FLOPs of each of 1000 scored tokens take 1 ms apiece at 4 TB/s and 800 TFLOP/s."""
    score = StepWork("score_prompts", scored_bytes=4 * 10**6, scored_flops=800 * 10**6)
    work, eager = PassWork(0, 0, ((READ, 1), (score, 1))), rates(node_latency_s=1e-6, step_latency_s=1e-3)
    none, some = PassShape(2000, 1, 0), PassShape(2000, 1, 0, num_scored=1000)
    assert none.is_padded and not some.is_padded and not PassShape(1, 1, 0, num_scored=1).is_decode
    assert step_s(score, some, RATES) == pytest.approx(math.sqrt(2) * 1e-3) and step_s(score, none, RATES) == 0
    assert (work.num_steps(none), work.num_steps(some)) == (1, 2)
    assert work.flops(some) - work.flops(none) == 1000 * 800 * 10**6
    plain_s = predict_pass(PassWork(0, 0, ((READ, 1),)), some, eager).total_s
    assert predict_pass(work, some, eager).total_s == pytest.approx(plain_s + math.sqrt(2) * 1e-3 + 1e-6)


def test_reduces_add_to_the_compute_lane_only():
    slow = rates(reduce_latency_s=1e-3)
    steps = (*WORK.steps, (REDUCE, 10))
    streamed, resident = (predict_pass(dataclasses.replace(w, steps=steps), DECODE, slow) for w in (WORK, RESIDENT))
    assert streamed.total_s == streamed.link_s
    assert resident.reduce_s == pytest.approx(10 * (1e-3 + 1e-6))
    assert resident.total_s == pytest.approx(predict_pass(RESIDENT, DECODE, slow).total_s + resident.reduce_s)


def test_a_reduce_s_latency_replaces_a_node_s():
    """A fused step reduces and does the rest on the way."""
    fused = StepWork("allreduce+residual", token_bytes=4000, reduce_token_bytes=1000)
    slow = rates(reduce_latency_s=1e-5, node_latency_s=1e-6)
    assert step_s(fused, DECODE, slow) == pytest.approx(1e-5 + 1000 / 1e9 + 4000 / 4e12)


def test_nothing_hides_the_latency_of_a_pass():
    base = predict_pass(WORK, DECODE, RATES).total_s
    assert predict_pass(WORK, DECODE, rates(pass_latency_s=0.5)).total_s == pytest.approx(base + 0.5)


def test_free_tokens_end_where_the_compute_lane_reaches_the_link():
    free = free_tokens(WORK, RATES)
    times = [predict_pass(WORK, PassShape(n, 1, 0), RATES) for n in (free, free + 1)]
    assert times[0].total_s == times[0].link_s < times[1].total_s
    assert free_tokens(RESIDENT, RATES) == 0
    assert free_tokens(WORK, rates(pass_latency_s=0.5)) == free  # which neither lane hides
