"""The rewrite that fuses reduce, residual and norm: every family's plan stays valid, with the same activations."""

import pytest
from penstock.engine.compute.ops import STEPS
from penstock.engine.model.families import FAMILIES, read_spec
from penstock.engine.model.fusion import FUSED, FUSED_ON_ONE_RANK, FUSED_OVER_RANKS, fuse, join
from penstock.engine.model.steps import model_steps, sums_over_ranks
from penstock.scheduler.passes.build import default_ring_bytes, lay_out_ring, make_plan, minimum_ring_bytes
from penstock.scheduler.passes.check import lifetimes
from penstock.scheduler.passes.pass_plan import Acquire, Compute, GroupId, RingLayout

LAYERS = 3
CONFIGS = [{"model_type": name, "num_hidden_layers": LAYERS} for name in FAMILIES]
CONFIGS.append({**CONFIGS[list(FAMILIES).index("gpt_neox")], "use_parallel_residual": False})


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config['model_type']}-{config.get('use_parallel_residual', '')}")
def steps(request):
    return model_steps(read_spec(request.param, "config.json"))


@pytest.fixture(params=[FUSED, FUSED_ON_ONE_RANK, FUSED_OVER_RANKS], ids=["pairs", "one_rank", "over_ranks"])
def runs(request):
    return request.param


def rings(steps):
    """Rings of four residencies: nothing streams; all groups do, in an ample ring and in the smallest; every second
    group does."""
    groups = [(g, 512) for g in dict.fromkeys(s.group for s in steps) if g is not None]
    return [
        RingLayout(0, 0, ()),
        lay_out_ring(groups, default_ring_bytes(groups)),
        lay_out_ring(groups, minimum_ring_bytes(groups)),
        lay_out_ring(groups[::2], default_ring_bytes(groups[::2])),
    ]


def test_each_plan_validates(steps, runs):
    """Makes plans: make_plan proves events, ring and lifetimes, and that a fused step's weights are acquired before."""
    fused = fuse(steps, runs)
    for ring in rings(steps):
        plan = make_plan(fused, ring)
        for index, instruction in enumerate(plan.instructions):
            if isinstance(instruction, Compute) and instruction.group in dict(ring.slots):
                assert any(isinstance(i, Acquire) and i.group == instruction.group for i in plan.instructions[:index])


def test_nothing_is_lost(steps, runs):
    """Compares the parts of the fused names, which are the steps in order; every residual has found its norm."""
    fused = fuse(steps, runs)
    assert [part for step in fused for part in step.parts] == [step.step for step in steps]
    assert not any(step.step.endswith("residual") for step in fused)
    num_residuals = sum(step.step.endswith("residual") for step in steps)
    saved = {FUSED: num_residuals, FUSED_ON_ONE_RANK: num_residuals + 1, FUSED_OVER_RANKS: 2 * num_residuals}[runs]
    assert len(steps) - len(fused) == saved >= LAYERS
    assert {step.step for step in fused} <= set(STEPS)
    assert sum(map(sums_over_ranks, fused)) == sum(map(sums_over_ranks, steps)) == num_residuals + 1
    if runs is FUSED_OVER_RANKS:
        assert [step.step for step in fused if step.step.endswith("allreduce")] == ["embed_allreduce"]
    norms = {(s.step, s.layer_idx, s.group) for s in steps if s.step.endswith("norm")}
    assert norms == {(s.parts[-1], s.layer_idx, s.group) for s in fused if s.parts[-1].endswith("norm")}
    assert fuse(fused, runs) == fused


def test_activations_live_as_long(steps, runs):
    """Compares lifetimes: x_ no longer dies between residual and norm; where nothing is gathered there is no `part`,
    and `rows` lives to the end of the joined step; every other activation has the lifetimes that it had."""
    plain, fused = (make_plan(s, RingLayout(0, 0, ())) for s in (steps, fuse(steps, runs)))
    named = [
        {name: [(at(plan, s), at(plan, t)) for s, t in spans] for name, spans in lifetimes(plan).items()}
        for plan in (plain, fused)
    ]
    assert set(plain.activations) - set(fused.activations) == ({"part"} if runs is FUSED_ON_ONE_RANK else set())
    for name in set(fused.activations) - {"x_", "rows"}:
        assert named[0][name] == named[1][name]


def at(plan, index):
    """Number of steps of the unfused pass that are done when the instruction ends."""
    return sum(len(i.parts) for i in plan.instructions[: index + 1])


def test_effects_of_a_pair():
    steps = fuse(model_steps(read_spec(CONFIGS[0], "config.json")), FUSED)
    by_name = {step.step: step for step in steps}
    assert by_name["attn_residual+ffn_norm"].effects == (("x", "rw"), ("x_", "rw"))
    assert by_name["ffn_residual+final_norm"].effects == (("x", "rwx"), ("x_", "rw"))
    crossing = next(step for step in steps if step.step == "ffn_residual+attn_norm")
    assert (crossing.layer_idx, crossing.group) == (1, GroupId(1, "attn"))


def test_effects_over_ranks():
    """Joins over ranks: the parts' sum is written to x_, which lives on as the norm's result; the group of the step is
    the norm's."""
    steps = fuse(model_steps(read_spec(CONFIGS[0], "config.json")), FUSED_OVER_RANKS)
    step = next(step for step in steps if step.step == "ffn_allreduce+ffn_residual+attn_norm")
    assert dict(step.effects) == {"x_": "rw", "x": "rw"}
    assert (step.layer_idx, step.group) == (1, GroupId(1, "attn"))


def test_steps_that_do_not_follow_each_other_cannot_be_joined():
    first = Compute("a", 0, None, (("x", "rx"),))
    for effect in ("r", "rw"):
        with pytest.raises(AssertionError, match="follow"):
            join(first, Compute("b", 0, None, (("x", effect),)))
    with pytest.raises(AssertionError, match="different groups"):
        join(Compute("a", 0, GroupId(0, "attn"), ()), Compute("b", 0, GroupId(0, "ffn"), ()))
