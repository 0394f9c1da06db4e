"""Rewrites the steps of a pass: neighbours that one kernel does together become one instruction.

PURE. A fused step's name joins its parts with "+", so that trace, table and STEPS tell what it holds; it is the same
pass, never a second forward. The fused step reads the norm's weights and so stands behind that group's acquire.
"""

from functools import reduce

from scheduler.step_plan import Compute

FUSED = (
    ("attn_residual", "ffn_norm"),
    ("ffn_residual", "attn_norm"),  # of the next layer
    ("ffn_residual", "final_norm"),
)
FUSED_OVER_RANKS = (
    ("attn_allreduce", "attn_residual", "ffn_norm"),
    ("ffn_allreduce", "ffn_residual", "attn_norm"),
    ("ffn_allreduce", "ffn_residual", "final_norm"),
)


def fuses_over_ranks(tp_size: int, hidden_size: int) -> bool:
    """Whether reduces join their residuals. On four H200s a row of 2048 takes 3.3 us and not 4.2, 4096 the same or
    0.6 less, 8192 6.3 and not 4.9: one program pushes and polls the whole row, where the reduce alone has several."""
    return tp_size > 1 and hidden_size <= 4096


def fuse(steps: list[Compute], over_ranks: bool) -> list[Compute]:
    """The same steps with every run of FUSED joined; `over_ranks`: with every run of FUSED_OVER_RANKS."""
    runs = FUSED_OVER_RANKS if over_ranks else FUSED
    fused: list[Compute] = []
    for step in steps:
        fused.append(step)
        for run in runs:
            if tuple(last.step for last in fused[-len(run) :]) == run:
                fused[-len(run) :] = [reduce(join, fused[-len(run) :])]
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
