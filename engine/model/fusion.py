"""Rewrites the steps of a pass: neighbours that one kernel does together become one instruction.

PURE. A fused step's name joins its parts with "+", so that trace, table and STEPS tell what it holds; it is the same
pass, never a second forward. The fused step reads the norm's weights and so stands behind that group's acquire.
"""

from itertools import pairwise

from scheduler.step_plan import Compute

FUSED = {
    ("attn_residual", "ffn_norm"),
    ("ffn_residual", "attn_norm"),  # of the next layer
    ("ffn_residual", "final_norm"),
}


def fuse(steps: list[Compute]) -> list[Compute]:
    """The same steps with every pair of FUSED joined."""
    fused: list[Compute] = []
    absorbed = False  # the step is the second part of the one before it
    for step, following in pairwise([*steps, None]):
        joins = following is not None and (step.step, following.step) in FUSED
        if not absorbed:
            fused.append(join(step, following) if joins else step)
        absorbed = joins and not absorbed
    return fused


def join(first: Compute, second: Compute) -> Compute:
    """One instruction that does both, with the layer and the group of the part that reads weights."""
    assert first.group is None or first.group == second.group, f"{first} and {second} read different groups"
    owner = second if second.group is not None else first
    before, after = dict(first.effects), dict(second.effects)
    effects = tuple((name, _merged(before.get(name), after.get(name))) for name in {**before, **after})
    return Compute(f"{first.step}+{second.step}", owner.layer_idx, owner.group, effects)


def _merged(first: str | None, second: str | None) -> str:
    """What two effects on one activation come to. Destroyed by the first part and created by the second, it lives
    through both."""
    if first is None or second is None:
        return first or second
    assert ("x" in first) == ("+" in second), f"effects {first} and {second} do not follow each other"
    kept = [("+", "+" in first), ("r", "r" in first + second), ("w", "w" in first + second), ("x", "x" in second)]
    return "".join(letter for letter, there in kept if there)
