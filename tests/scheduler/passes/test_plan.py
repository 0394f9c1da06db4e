"""PassPlan: each plan that is made is safe, and validate() finds each way to break the contract.

An oracle of another kind than the proof judges what is safe (plan_oracle.py).
"""

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from penstock.engine.config import EngineConfig
from penstock.engine.model.families import FAMILIES
from penstock.engine.model.shard import tp_sizes
from penstock.engine.model.spec import ModelSpec, RopeSpec
from penstock.engine.model.steps import activation_bytes, model_steps
from penstock.engine.planning.engine_plan import EnginePlan, make_engine_plan
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.cost.timeline import predict_timeline, timeline_s
from penstock.scheduler.passes.build import (
    default_ring_bytes,
    lay_out_ring,
    make_plan,
    minimum_ring_bytes,
    usual_ring_bytes,
)
from penstock.scheduler.passes.check import validate
from penstock.scheduler.passes.pass_plan import (
    Acquire,
    Compute,
    Decompress,
    Fork,
    GroupId,
    Join,
    PassPlan,
    Prefetch,
    Release,
    RingLayout,
    Slot,
)
from penstock.scheduler.residency.spread import counts_within, spread

from tests.support.layouts import by_group
from tests.support.plan_oracle import is_hazardous

MANY = settings(max_examples=200)  # the properties together: 5 s on a free core
RATES = Rates(1.0, 1.0, 1.0, 0.0, 1.0, "test")


def steps_of(groups):
    """Steps with two readers for each group, a step without weights between them, and one activation through all."""
    steps = [Compute("embedding", -1, None, (("x", "+w"),))]
    for group in groups:
        steps.append(Compute(f"first {group}", group.layer_idx, group, (("x", "rw"),)))
        steps.append(Compute(f"between {group}", group.layer_idx, None, (("x", "r"),)))
        steps.append(Compute(f"second {group}", group.layer_idx, group, (("x", "rw"),)))
    return [*steps, Compute("sample", len(groups), None, (("x", "rx"),))]


@st.composite
def cases(draw, least=1):
    """Cases (all groups, the streamed ones with bytes, a ring) over random sizes and residencies."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=least, max_size=9))
    groups = [GroupId(i // 2, "attn" if i % 2 == 0 else "ffn") for i in range(len(sizes))]
    stays = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    streamed = [(g, 256 * n) for g, n, stay in zip(groups, sizes, stays, strict=True) if not stay]
    assume(len(streamed) >= least)
    most = max(default_ring_bytes(streamed), minimum_ring_bytes(streamed)) // 256
    ring_bytes = 256 * draw(st.integers(minimum_ring_bytes(streamed) // 256, most + 3))
    return groups, streamed, lay_out_ring(streamed, ring_bytes, draw(st.integers(1, 3)))


def rejected(plan: PassPlan) -> bool:
    try:
        validate(plan)
    except ValueError:
        return True
    return False


def mutant(plan: PassPlan, index: int, *instead) -> PassPlan:
    return PassPlan((*plan.instructions[:index], *instead, *plan.instructions[index + 1 :]), plan.ring)


def where(plan: PassPlan, kind) -> list[int]:
    return [i for i, instruction in enumerate(plan.instructions) if isinstance(instruction, kind)]


@MANY
@given(cases())
def test_each_plan_made_is_safe(case):
    groups, streamed, ring = case
    plan = make_plan(steps_of(groups), ring)
    validate(plan)
    assert not is_hazardous(plan)
    copies = [i for i in plan.instructions if isinstance(i, Prefetch)]
    assert sorted(c.group for c in copies) == sorted(g for g, _ in streamed)
    assert plan.streamed_bytes == sum(nbytes for _, nbytes in streamed)
    first = [g for g, _ in ring.slots[: ring.num_wrapped]]
    assert (
        [c.group for c in copies if c.wrapped] == first == [c.group for c in plan.prologue if isinstance(c, Prefetch)]
    )


def pass_over_link(fraction, ring_of) -> float:
    """Ratio of the predicted time of a pass to that of its copies alone, with Llama-3-8B's sizes in MiB, where compute
    takes 15 % of the time of the copies."""
    sizes = {"attn": 80, "ffn": 336}
    groups = [(GroupId(i, name), nbytes) for i in range(32) for name, nbytes in sizes.items()]
    counts = counts_within(groups, int(fraction * sum(nbytes for _, nbytes in groups)))
    resident = spread([group for group, _ in groups], counts)
    groups.append((GroupId(32, "head"), 1002))
    streamed = [(g, nbytes) for g, nbytes in groups if g not in resident]
    plan = make_plan(steps_of([g for g, _ in groups]), lay_out_ring(streamed, ring_of(streamed)))
    copies_s = plan.streamed_bytes / 1e9
    step_s = 0.15 * copies_s / sum(nbytes for _, nbytes in groups) / 2  # for each MiB of a group with two readers
    sizes_of = dict(groups)
    return timeline_s(predict_timeline(plan, lambda s: step_s * sizes_of.get(s.group, 0), RATES)) / copies_s


@pytest.mark.parametrize("fraction", [0, 0.1, 0.25, 0.5, 0.75, 0.9])
def test_the_default_ring_keeps_the_link_busy(fraction):
    assert 0.9999 < pass_over_link(fraction, default_ring_bytes) < 1.005
    assert pass_over_link(fraction, minimum_ring_bytes) > 1.01  # and the smallest does not: the figure means something


@MANY
@given(cases(least=2), st.data())
def test_a_dropped_wait_for_free_is_rejected_where_it_matters(case, data):
    plan = make_plan(steps_of(case[0]), case[2])
    waiting = [(i, group) for i in where(plan, Prefetch) for group in plan.instructions[i].after]
    assume(waiting)
    index, group = data.draw(st.sampled_from(waiting))
    copy = plan.instructions[index]
    broken = mutant(plan, index, replace(copy, after=tuple(g for g in copy.after if g != group)))
    assert rejected(broken) == is_hazardous(broken)


@MANY
@given(cases(least=2), st.data())
def test_an_acquire_that_does_not_wait_is_rejected(case, data):
    plan = make_plan(steps_of(case[0]), case[2])
    absent = [i for i in where(plan, Acquire) if not plan.instructions[i].present]
    assume(absent)
    index = data.draw(st.sampled_from(absent))
    broken = mutant(plan, index, replace(plan.instructions[index], present=True))
    assert rejected(broken) and is_hazardous(broken)


@MANY
@given(cases(), st.data())
def test_a_missing_instruction_is_rejected(case, data):
    """Drops the fork, the join, a copy (wrapped or not), an acquire or a release."""
    plan = make_plan(steps_of(case[0]), case[2])
    index = data.draw(st.sampled_from(where(plan, (Fork, Join, Prefetch, Acquire, Release))))
    assert rejected(mutant(plan, index))


@MANY
@given(cases(), st.data())
def test_a_release_before_the_last_reader_is_rejected(case, data):
    plan = make_plan(steps_of(case[0]), case[2])
    index = data.draw(st.sampled_from(where(plan, Release)))
    release = plan.instructions[index]
    last = max(i for i in where(plan, Compute) if plan.instructions[i].group == release.group)
    moved = [i for i in plan.instructions if i != release]
    moved.insert(last, release)
    assert rejected(PassPlan(tuple(moved), plan.ring))


@MANY
@given(cases(), st.data())
def test_an_event_waited_for_before_it_is_recorded_is_rejected(case, data):
    plan = make_plan(steps_of(case[0]), case[2])
    waiters = [i for i, instruction in enumerate(plan.instructions) if instruction.waits]
    index = data.draw(st.sampled_from(waiters))
    waiter = plan.instructions[index]
    recorder = max(i for i, other in enumerate(plan.instructions) if other.records in waiter.waits)
    moved = [*plan.instructions[:index], *plan.instructions[index + 1 :]]
    moved.insert(recorder, waiter)
    assert rejected(PassPlan(tuple(moved), plan.ring))


@MANY
@given(cases(least=2), st.data())
def test_a_slot_reused_early_is_rejected(case, data):
    """Moves a copy away from where the layout says, or moves the layout itself and leaves the waits as they were."""
    groups, streamed, ring = case
    plan = make_plan(steps_of(groups), ring)
    index = data.draw(st.sampled_from(where(plan, Prefetch)))
    copy = plan.instructions[index]
    offsets = [s.offset for _, s in ring.slots if s.offset != copy.slot.offset]
    offsets = [offset for offset in offsets if offset + copy.slot.nbytes <= ring.ring_bytes]
    assume(offsets)
    slot = Slot(data.draw(st.sampled_from(offsets)), copy.slot.nbytes)
    assert rejected(mutant(plan, index, replace(copy, slot=slot)))

    def moved(instruction):
        return replace(instruction, slot=slot) if getattr(instruction, "group", None) == copy.group else instruction

    instructions = [moved(i) if isinstance(i, Prefetch | Acquire | Release) else i for i in plan.instructions]
    layout = replace(ring, slots=tuple((g, slot if g == copy.group else s) for g, s in ring.slots))
    broken = PassPlan(tuple(instructions), layout)
    if is_hazardous(broken):
        assert rejected(broken)


@MANY
@given(cases(least=2), st.data())
def test_a_wrong_wrap_around_is_rejected(case, data):
    plan = make_plan(steps_of(case[0]), case[2])
    join = where(plan, Join)[0]
    copies = where(plan, Prefetch)
    assume(len(copies) > 1)
    earlier = plan.instructions[data.draw(st.sampled_from(copies[:-1]))].group
    assert rejected(mutant(plan, join, Join(earlier)))  # joined too early
    wrapped = [i for i in copies if plan.instructions[i].wrapped]
    index = data.draw(st.sampled_from(wrapped))
    copy = plan.instructions[index]
    other = data.draw(st.sampled_from([entry for entry in plan.ring.slots if entry[0] != copy.group]))
    assert rejected(mutant(plan, index, replace(copy, group=other[0], slot=other[1])))  # another group wraps
    more = replace(plan.ring, num_wrapped=min(plan.ring.num_wrapped + 1, len(plan.ring.slots)))
    if more.num_wrapped > plan.ring.num_wrapped:
        assert rejected(PassPlan(plan.instructions, more))


@MANY
@given(cases(least=2), st.data())
def test_whatever_the_proof_accepts_is_safe(case, data):
    """Swaps two instructions, or drops one or a wait: no hazard is ever accepted."""
    plan = make_plan(steps_of(case[0]), case[2])
    instructions = list(plan.instructions)
    for _ in range(data.draw(st.integers(1, 3))):
        a, b = (data.draw(st.integers(0, len(instructions) - 1)) for _ in range(2))
        instructions[a], instructions[b] = instructions[b], instructions[a]
    broken = PassPlan(tuple(instructions), plan.ring)
    assert rejected(broken) or not is_hazardous(broken)


def test_mutations_are_not_vacuous():
    """Drops each wait of a plain case: every one of them matters."""
    groups = [GroupId(i // 2, ("attn", "ffn")[i % 2]) for i in range(8)]
    streamed = [(g, 512) for g in groups]
    plan = make_plan(steps_of(groups), lay_out_ring(streamed, default_ring_bytes(streamed)))
    waits = [(i, g) for i in where(plan, Prefetch) for g in plan.instructions[i].after]
    assert len(waits) >= 5
    for index, _ in waits:
        broken = mutant(plan, index, replace(plan.instructions[index], after=()))
        assert is_hazardous(broken) and rejected(broken)


@pytest.mark.parametrize(
    "sizes, nbytes",
    [
        ([], 0),
        ([3, 4, 5], 12),
        ([1, 9, 8, 7, 1, 1, 1], 24),  # three in a row, of which one is read, one is there, and one arrives
        ([5, 6, 1, 1, 1, 7, 8], 26),  # the last one, the one before it, and the first two of the next pass
    ],
)
def test_the_usual_ring_by_hand(sizes, nbytes):
    assert usual_ring_bytes(sizes) == nbytes
    assert default_ring_bytes([(GroupId(i, "ffn"), size) for i, size in enumerate(sizes)]) == nbytes


def test_nothing_streams():
    groups = [GroupId(0, "attn"), GroupId(0, "ffn")]
    plan = make_plan(steps_of(groups), RingLayout(0, 0, ()))
    assert all(isinstance(i, Compute) for i in plan.instructions) and plan.prologue == ()


def test_a_group_without_a_reader_is_refused():
    ring = lay_out_ring([(GroupId(0, "attn"), 256), (GroupId(9, "ffn"), 256), (GroupId(9, "x"), 256)], 256)
    with pytest.raises(ValueError, match="no step reads"):
        make_plan(steps_of([GroupId(0, "attn")]), ring)


@st.composite
def specs(draw) -> ModelSpec:
    """Small models of any shape; all of them have qwen3's tensor names."""
    num_kv_heads, head_dim, num_layers = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 8)), draw(st.integers(1, 5))
    flags = ("gated", "qkv_bias", "o_bias", "ffn_up_bias", "ffn_down_bias", "qk_norm", "parallel_residual", "tied")
    return ModelSpec(
        family="qwen3",
        num_layers=num_layers,
        hidden_size=draw(st.integers(1, 96)),
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=draw(st.integers(1, 200)),
        vocab_size=draw(st.integers(1, 300)),
        max_position=draw(st.integers(1, 128)),
        norm=draw(st.sampled_from(("rms", "layer"))),
        norm_eps=1e-6,
        activation="silu",
        windows=(None,) * num_layers,
        rope=RopeSpec("default", 1e4, head_dim),
        dtype=draw(st.sampled_from(("float32", "bfloat16"))),
        names=FAMILIES["qwen3"].names,
        **{flag: draw(st.booleans()) for flag in flags},
    )


@st.composite
def engine_plans(draw) -> tuple[EngineConfig, EnginePlan]:
    """Engines of any residency, ring and tp_size. "auto" gets a budget between what it takes to stream all and what it
    takes to keep all."""
    spec = draw(specs())
    tp_size = draw(st.sampled_from(tp_sizes(spec.num_heads)))
    max_num_seqs = draw(st.integers(1, 16))
    config = EngineConfig(
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 64)),
        max_num_seqs=max_num_seqs,
        page_size=draw(st.sampled_from((1, 8, 16))),
    )

    def plan(**changes) -> EnginePlan:
        return make_engine_plan(replace(config, **changes), spec, tp_size, None, RATES)

    sizes = [nbytes for _, nbytes in plan(resident="none").demand.groups]
    ring = draw(st.none() | st.integers(max(sizes), sum(sizes) + 512))
    resident = draw(st.sampled_from(("all", "none", "auto")) | st.floats(0, 1))
    chosen = {"ring": ring, "resident": resident}
    if resident == "auto":
        least, most = (plan(ring=ring, resident=end).residency.claimed_bytes for end in ("none", "all"))
        chosen["gpu_memory"] = draw(st.integers(least, max(least, most)))
    return replace(config, **chosen), plan(**chosen)


def bytes_alive(plan: PassPlan, ranges: dict[str, range]) -> list[dict[str, range]]:
    """Bytes of all activations that are alive in each instruction, with those that it creates or destroys."""
    alive, found = set(), []
    for step in where(plan, Compute):
        effects = plan.instructions[step].effects
        alive |= {name for name, _ in effects}
        found.append({name: ranges[name] for name in alive})
        alive -= {name for name, effect in effects if "x" in effect}
    return found


@MANY
@given(engine_plans())
def test_each_engine_plan_is_safe(case):
    config, plan = case
    residency, pass_plan = plan.residency, plan.pass_plan
    validate(pass_plan)
    assert not is_hazardous(pass_plan)
    assert [i for i in pass_plan.instructions if isinstance(i, Compute)] == model_steps(plan.spec)

    streamed = [group.id for group in plan.layout.groups if group.id not in residency.resident]
    assert sorted(i.group for i in pass_plan.instructions if isinstance(i, Prefetch)) == sorted(streamed)
    assert all(slot.nbytes == by_group(plan.layout)[group].nbytes for group, slot in pass_plan.ring.slots)
    assert pass_plan.ring.ring_bytes <= (config.ring or sum(slot.nbytes for _, slot in pass_plan.ring.slots))
    assert config.gpu_memory is None or residency.claimed_bytes <= config.gpu_memory

    sizes = activation_bytes(plan.spec, plan.dtype, plan.tp_size, plan.max_num_batched_tokens, config.max_num_seqs)
    ranges = {name: range(at, at + sizes[name]) for name, at in plan.activation_offsets.items()}
    assert all(r.start >= 0 and r.stop <= plan.activations_bytes for r in ranges.values())
    for together in bytes_alive(pass_plan, ranges):
        for a, b in combinations(together.values(), 2):
            assert a.stop <= b.start or b.stop <= a.start


@st.composite
def compressed_cases(draw):
    """Cases in which some groups, streamed or resident, are compressed, and the readers of neighbours interleave."""
    groups, streamed, ring = draw(cases(least=2))
    decompressed = {g: 256 * draw(st.integers(1, 4)) for g in groups if draw(st.booleans())}
    assume(decompressed)
    steps = steps_of(groups)
    if draw(st.booleans()):  # as in a parallel block: the next group's first reader comes before this one's last
        ring = lay_out_ring(streamed, sum(nbytes for _, nbytes in streamed))
        for first in range(3, len(steps) - 3, 6):
            steps[first], steps[first + 1] = steps[first + 1], steps[first]
    return steps, ring, decompressed


@MANY
@given(compressed_cases())
def test_each_plan_with_compressed_groups_is_safe(case):
    steps, ring, decompressed = case
    plan = make_plan(steps, ring, decompressed)
    assert not is_hazardous(plan)
    assert {i.group: i.slot.nbytes for i in plan.decompressions} == decompressed
    names = [str(i) for i in plan.instructions]
    for group, _ in ring.slots:
        if group in decompressed:  # its slot is free at once
            assert names.index(f"release {group}") == names.index(f"decompress {group}") + 1


@MANY
@given(compressed_cases(), st.data())
def test_each_broken_decompression_is_rejected(case, data):
    steps, ring, decompressed = case
    plan = make_plan(steps, ring, decompressed)
    index = data.draw(st.sampled_from(where(plan, Decompress)))
    decompress = plan.instructions[index]
    others = [i.slot for i in plan.decompressions if i is not decompress]
    mutants = [
        mutant(plan, index, decompress, decompress),  # twice
        *(mutant(plan, index, replace(decompress, slot=slot)) for slot in others),  # where another one may be in use
    ]
    for broken in mutants[1:]:
        assert rejected(broken) == is_hazardous(broken)
    assert rejected(mutants[0])


@given(compressed_cases(), st.data())
def test_a_slot_released_before_it_is_decompressed_is_rejected(case, data):
    steps, ring, decompressed = case
    plan = make_plan(steps, ring, decompressed)
    released = [i for i in where(plan, Release) if isinstance(plan.instructions[i - 1], Decompress)]
    assume(released)
    index = data.draw(st.sampled_from(released))
    decompress, release = plan.instructions[index - 1 : index + 1]
    swapped = (*plan.instructions[: index - 1], release, decompress, *plan.instructions[index + 1 :])
    assert rejected(PassPlan(swapped, plan.ring))


def test_the_decompression_buffer_holds_one_group_at_a_time():
    """Plans serial layers: the largest group's bytes are enough."""
    groups = [GroupId(i, name) for i in range(4) for name in ("attn", "ffn")]
    decompressed = {group: 1024 if group.name == "ffn" else 256 for group in groups}
    assert make_plan(steps_of(groups), RingLayout(0, 0, ()), decompressed).decompression_buffer_bytes == 1024


@MANY
@given(compressed_cases())
def test_a_slot_that_steps_read_too_is_held_to_the_last_of_them(case):
    """As of quantised groups, of which some steps read what is stored; a release before its steps is rejected."""
    steps, ring, decompressed = case
    plan = make_plan(steps, ring, decompressed, partly=frozenset(decompressed))
    assert all(i.is_partial for i in plan.decompressions) and not is_hazardous(plan)
    order = list(plan.instructions)
    for group in decompressed.keys() & dict(ring.slots).keys():
        release = next(i for i in where(plan, Release) if order[i].group == group)
        reads = [i for i in where(plan, Compute) if order[i].group == group]
        assert release == max(reads) + 1
        early = order[: min(reads)] + [order[release]] + order[min(reads) : release] + order[release + 1 :]
        assert rejected(PassPlan(tuple(early), plan.ring))
