"""Traces on a GPU: a captured pass has an interval for every instruction, in order, together as long as the pass."""

import statistics

import pytest
import torch
from penstock.engine.llm import LLM
from penstock.engine.profile.traced_run import pass_s
from penstock.engine.runtime.trace import Trace, label, read_intervals
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY

pytestmark = pytest.mark.gpu
PROMPTS = [[0, 5, 9], list(range(3, 60))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
OPTIONS = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "gpu_memory": "4GiB"}
RESOLUTION_S = 2e-6  # of events


def tokens_of(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("resident", ["all", "none", 0.5])
def test_every_pass_has_its_instructions(tmp_path, resident, enforce_eager):
    trace = str(tmp_path / "trace.json")
    with LLM("demo", **OPTIONS, resident=resident, enforce_eager=enforce_eager) as llm:
        untraced = tokens_of(llm)
    with LLM("demo", **OPTIONS, resident=resident, enforce_eager=enforce_eager, trace=trace) as llm:
        graphs = llm.engine.worker.runner.graphs
        assert (graphs is None) == enforce_eager
        assert tokens_of(llm) == untraced
        assert enforce_eager or graphs.passes
        shapes, instructions = list(llm.engine.trace.shapes), llm.engine.plan.pass_plan.instructions
        launching = {work.step for work, _ in llm.engine.plan.steps}
    intervals = read_intervals(trace)[0, False]
    starts = []
    for index, shape in enumerate(shapes):
        mine = [interval for interval in intervals if interval.pass_index == index]
        assert [interval.name for interval in mine] == [label(i) for i in instructions], (index, shape)
        assert all(interval.end_s >= interval.start_s for interval in mine)
        for lane in (COMPUTE, COPY):
            own = [interval for interval in mine if interval.lane == lane]
            assert all(a.end_s <= b.start_s + RESOLUTION_S for a, b in zip(own, own[1:]))
        copied = {s.name.split()[1]: s.end_s for s in mine if s.lane == COPY and "next pass" not in s.name}
        for interval in mine:
            if interval.name.startswith("acquire") and interval.name.split()[1] in copied:
                assert interval.end_s >= copied[interval.name.split()[1]] - RESOLUTION_S, interval
        starts.append(min(interval.start_s for interval in mine))
    assert starts == sorted(set(starts)) and any(shape.is_decode for shape in shapes)
    for step in launching:
        assert sum(s.end_s - s.start_s for s in intervals if s.name.split()[0] == step) > 0, step


@pytest.mark.parametrize("resident", ["all", "none"])
def test_the_intervals_of_a_graph_are_as_long_as_the_graph(tmp_path, resident):
    """Between two events around a replay lie the intervals and the few kernels that derive the inputs before them."""
    with LLM("demo", **OPTIONS, resident=resident, trace=str(tmp_path / "trace.json")) as llm:
        tokens_of(llm)
        graphs, trace = llm.engine.worker.runner.graphs, llm.engine.trace
        key, batch = next(iter(graphs.passes)), Batch(())
        shares = []  # the launch may be late, where other processes have the GPU: not each time
        for _ in range(10):
            known = len(trace.intervals())
            around = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            trace.begin_pass(batch)
            around[0].record()
            take = graphs.next_take(key)
            take.graph.replay()
            around[1].record()
            take.note_replay(llm.engine.watches)
            torch.cuda.synchronize()
            intervals = trace.intervals()[known:]
            graph_s = around[0].elapsed_time(around[1]) / 1e3
            shares.append(pass_s(intervals) / graph_s)
            assert pass_s(intervals) <= graph_s + RESOLUTION_S
            compute_s = sum(interval.end_s - interval.start_s for interval in intervals if interval.lane == COMPUTE)
            assert compute_s == pytest.approx(pass_s(intervals), abs=len(intervals) * 1e-7, rel=0.02)
        assert max(shares) > 0.5


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_passes_in_a_row_follow_each_other_on_each_lane(tmp_path, enforce_eager):
    """Nothing is waited for between them, and still each pass has times of its own."""
    trace = str(tmp_path / "trace.json")
    with LLM("demo", **OPTIONS, resident="none", enforce_eager=enforce_eager, trace=trace) as llm:
        tokens_of(llm)
        kept: Trace = llm.engine.trace
        num_warm, num_read = len(kept.shapes), len(kept.known)
        assert (num_read > 0) == (not enforce_eager), "graphs are read as they run, eager passes in the end"
        tokens_of(llm)
        shapes = list(kept.shapes)
    intervals = read_intervals(trace)[0, False]
    pairs = [i for i in range(num_warm, len(shapes) - 1) if shapes[i].is_decode and shapes[i + 1].is_decode]
    assert len(pairs) > 8
    for index in pairs:
        for lane in (COMPUTE, COPY):
            before, after = ([s for s in intervals if (s.pass_index, s.lane) == (i, lane)] for i in (index, index + 1))
            assert len(before) == len(after) > 0
            assert max(s.end_s for s in before) <= min(s.start_s for s in after) + RESOLUTION_S, (index, lane)
    copies = {i: [s for s in intervals if (s.pass_index, s.lane) == (i, COPY)] for i in range(num_warm, len(shapes))}
    gaps_s = [copies[i + 1][0].start_s - copies[i][-1].end_s for i in pairs]
    print(f"copy lane idle between passes, median: {statistics.median(gaps_s) * 1e6:.1f} us")
    assert all(copies[i][-1].name.endswith("(next pass)") for i in pairs) and min(gaps_s) > -RESOLUTION_S
