"""Rewrites the steps of a pass: neighbours that one kernel does together become one instruction.

Torch-free. Only the tables below say what is fused; ops.STEPS has a step for each of their rows. A fused step's name
joins its parts, so that trace and table tell what it holds; it is the same pass, never a second forward. It reads the
norm's weights and so stands behind that group's acquire.
"""

from functools import reduce

from penstock.scheduler.passes.pass_plan import Compute, fused_name

Runs = tuple[tuple[str, ...], ...]
FUSED: Runs = (  # a residual, and a norm
    ("attn_residual", "ffn_norm"),
    ("ffn_residual", "attn_norm"),  # of the next layer
    ("ffn_residual", "final_norm"),
)
FUSED_OVER_RANKS: Runs = (  # and the reduce before them
    ("attn_allreduce", "attn_residual", "ffn_norm"),
    ("ffn_allreduce", "ffn_residual", "attn_norm"),
    ("ffn_allreduce", "ffn_residual", "final_norm"),
)
WHOLE_HEAD = ("head", "logits_gather")  # on one rank there is nothing to gather
FUSED_ON_ONE_RANK: Runs = (*FUSED, WHOLE_HEAD)

MOST_FUSED_WIDTH = 4096


def fused_runs(tp_size: int, hidden_size: int) -> Runs:
    """The runs of steps whose fusion pays. Reduces join their residuals up to MOST_FUSED_WIDTH: on four H200s a row of
    2048 takes 3.3 us fused and 4.2 apart, one of 4096 the same or 0.6 less, one of 8192 6.3 fused and 4.9 apart: fused,
    one program pushes and polls a whole row, where the reduce alone has several."""
    if tp_size == 1:
        return FUSED_ON_ONE_RANK
    return FUSED_OVER_RANKS if hidden_size <= MOST_FUSED_WIDTH else FUSED


def fuse(steps: list[Compute], runs: Runs) -> list[Compute]:
    """The same steps with every run of these names joined."""
    fused: list[Compute] = []
    for step in steps:
        fused.append(step)
        for run in runs:
            if tuple(last.step for last in fused[-len(run) :]) == run:
                fused[-len(run) :] = [reduce(join, fused[-len(run) :])]
    return fused


def join(first: Compute, second: Compute) -> Compute:
    """One instruction that does both steps, with the layer and the group of the step that reads weights. An activation
    that lives only between them is left out."""
    assert first.group is None or second.group in (None, first.group), f"{first} and {second} read different groups"
    owner = second if second.group is not None else first
    before, after = dict(first.effects), dict(second.effects)
    inner = {name for name in before if "+" in before[name] and "x" in after.get(name, "")}
    names = [name for name in {**before, **after} if name not in inner]
    effects = tuple((name, _merged(before.get(name), after.get(name))) for name in names)
    assert first.of_rows == second.of_rows, f"{first} and {second} compute different rows"
    return Compute(fused_name(first.step, second.step), owner.layer_idx, owner.group, effects, owner.of_rows)


def _merged(first: str | None, second: str | None) -> str:
    """The joined effect of two steps on one activation. One that the first destroys and the second creates lives
    through both."""
    if first is None or second is None:
        return first or second
    assert ("x" in first) == ("+" in second), f"effects {first} and {second} do not follow each other"
    kept = [("+", "+" in first), ("r", "r" in first + second), ("w", "w" in first + second), ("x", "x" in second)]
    return "".join(letter for letter, there in kept if there)
