"""Activations: broken lifetimes are rejected, and no two that are alive together share a byte of the arena."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.scheduler.passes.build import make_plan
from penstock.scheduler.passes.check import lay_out_activations, lifetimes
from penstock.scheduler.passes.pass_plan import Compute, RingLayout


@pytest.mark.parametrize(
    "effects, message",
    [
        ((("x", "rw"),), "touches x at the wrong time"),
        ((("x", "+w"),), "with x alive"),
    ],
)
def test_broken_lifetimes_are_rejected(effects, message):
    with pytest.raises(ValueError, match=message):
        make_plan([Compute("only", 0, None, effects)], RingLayout(0, 0, ()))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 9)), min_size=1, max_size=7))
def test_activations_alive_together_never_overlap(lives):
    names = {f"a{i}": (min(a, b), max(a, b) + 1, size) for i, (a, b, size) in enumerate(lives)}
    steps = []
    for t in range(11):
        effects = [(n, "+w") for n, (a, _, _) in names.items() if a == t]
        effects += [(n, "rx") for n, (_, b, _) in names.items() if b == t]
        steps.append(Compute(f"t{t}", 0, None, tuple(effects)))
    plan = make_plan(steps, RingLayout(0, 0, ()))
    sizes = {n: size for n, (_, _, size) in names.items()}
    offsets, spans = lay_out_activations(plan, sizes), lifetimes(plan)
    for a in names:
        for b in names:
            together = spans[a][0][0] <= spans[b][0][1] and spans[b][0][0] <= spans[a][0][1]
            apart = offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
            assert a == b or not together or apart
