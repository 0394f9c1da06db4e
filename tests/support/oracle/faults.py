"""Faults to put into a built engine: what a bug in loading, streaming, rotation, an addition or a reduce would do.

Each is a function of the LLM, to be called before it generates. They change weights, collectives or the plan and leave
the code of the steps alone; nothing is validated afterwards. Those of kernels are in kernel_faults.py.
"""

from collections.abc import Callable
from dataclasses import replace

from penstock.engine.compute.context import ModelContext, PassContext
from penstock.engine.llm import LLM
from penstock.engine.model.steps import model_steps
from penstock.engine.runtime.watch import Watch
from penstock.engine.weights.views import views
from penstock.scheduler.passes.pass_plan import Acquire, Compute, GroupId, Instruction, Prefetch
from torch import Tensor

from tests.support.engine_proof import run_steps
from tests.support.layouts import by_group
from tests.support.watches import Around, Change

Fault = Callable[[LLM], None]


def around(change: Change) -> Fault:
    """Runs `change(instruction, ctx, do)` instead of every instruction; do() runs the real one."""

    def fault(llm: LLM) -> None:
        llm.engine.watches.add(Around(change))

    return fault


def watch_step(step: str, layer_idx: int | None, change: Callable[[PassContext, Callable[[], None]], None]) -> Watch:
    """`change(ctx, do)` runs in place of one step of one layer; layer_idx None means all layers."""

    def at_step(instruction: Instruction, ctx: PassContext, do: Callable[[], None]) -> None:
        mine = isinstance(instruction, Compute) and instruction.step == step
        if mine and layer_idx in (None, instruction.layer_idx):
            change(ctx, do)
        else:
            do()

    return Around(at_step)


def around_step(step: str, layer_idx: int | None, change: Callable[[PassContext, Callable[[], None]], None]) -> Fault:
    """The same, from now on."""
    return lambda llm: llm.engine.watches.add(watch_step(step, layer_idx, change))


def edit_plan(edit: Callable[[Instruction], Instruction]) -> Fault:
    def fault(llm: LLM) -> None:
        executor = llm.engine.worker.executor
        executor.pass_plan = replace(executor.pass_plan, instructions=tuple(map(edit, executor.pass_plan.instructions)))

    return fault


def edit_weight(group: GroupId, name: str, edit: Callable[[Tensor, ModelContext], None]) -> Fault:
    """Changes a streamed group's weight in the host arena, in place."""

    def fault(llm: LLM) -> None:
        executor = llm.engine.worker.executor
        layout = by_group(llm.engine.plan.layout)[group]
        edit(views(layout, executor.host_spans[group])[name], executor.model)

    return fault


def skipped_prefetch(group: GroupId) -> Fault:
    """Skips the copy of a group, whose slot keeps what was in it: zeros at first, not what an engine of the same model
    left there."""

    def fault(llm: LLM) -> None:
        llm.engine.worker.executor.ring.zero_()
        around(lambda i, ctx, do: None if isinstance(i, Prefetch) and i.group == group else do())(llm)

    return fault


def stale_layer(group: GroupId, other: GroupId) -> Fault:
    """Copies another layer's bytes."""

    def fault(llm: LLM) -> None:
        executor = llm.engine.worker.executor
        executor.host_spans = {**executor.host_spans, group: executor.host_spans[other]}

    return fault


def early_read(group: GroupId) -> Fault:
    """Drops the wait for the copy of `group` before it is read."""
    return edit_plan(lambda i: replace(i, present=True) if isinstance(i, Acquire) and i.group == group else i)


def early_write(group: GroupId) -> Fault:
    """Drops the wait of the copy of `group` until the slot's former holders are free."""
    return edit_plan(lambda i: replace(i, after=()) if isinstance(i, Prefetch) and i.group == group else i)


def half_lost(layer_idx: int, name: str) -> Fault:
    """Loses half of an o or down projection."""
    group = GroupId(layer_idx, {"o": "attn", "down": "ffn"}[name])
    return edit_weight(group, name, lambda weight, model: weight[:, weight.shape[1] // 2 :].zero_())


def head_dropped(layer_idx: int) -> Fault:
    """Drops what the first head of this rank has attended to."""
    group = GroupId(layer_idx, "attn")
    return edit_weight(group, "o", lambda weight, ctx: weight[:, : ctx.spec.head_dim].zero_())


def kv_heads_rolled(layer_idx: int) -> Fault:
    """Swaps KV heads: each is the next one's."""

    def edit(weight: Tensor, model: ModelContext) -> None:
        heads = weight.view(-1, model.spec.head_dim, weight.shape[1])  # (H + 2K, E, D)
        for part in heads[model.num_heads :].chunk(2):
            part.copy_(part.roll(1, 0))

    return edit_weight(GroupId(layer_idx, "attn"), "qkv", edit)


def rope_shifted(which: str, layer_idx: int | None = None) -> Fault:
    """Makes positions one too high: for "q" only, in "later" passes only (so that older keys are right), or for "all",
    which nobody can see, since rotations are relative."""

    def change(ctx: PassContext, do: Callable[[], None]) -> None:
        inputs, attn = ctx.inputs, ctx.act["attn"]
        if which == "later" and int(inputs.positions[0]) == 0:
            return do()
        before = attn.clone()
        ctx.inputs = replace(inputs, positions=inputs.positions + 1)
        do()
        ctx.inputs = inputs
        if which == "q":
            shifted = ctx.heads()[:, : ctx.model.num_heads].clone()
            attn.copy_(before)
            do()
            ctx.heads()[:, : ctx.model.num_heads].copy_(shifted)

    return around_step("rope", layer_idx, change)


def lost_reduce(step: str, layer_idx: int) -> Watch:
    """This rank takes part in the reduce and goes on with its own part only."""
    activation = "x" if step == "embed_allreduce" else "x_"

    def change(ctx: PassContext, do: Callable[[], None]) -> None:
        own = ctx.act[activation].clone()
        do()
        ctx.act[activation].copy_(own)

    return watch_step(step, layer_idx, change)


def other_residual(llm: LLM) -> None:
    """Runs GPT-NeoX as if its config said the other value of use_parallel_residual."""
    spec = replace(llm.engine.plan.spec, parallel_residual=not llm.engine.plan.spec.parallel_residual)
    run_steps(llm, spec, model_steps(spec))


def attention_added_first(layer_idx: int) -> Fault:
    """Adds `ffn + (attn + x)` in one parallel layer, where transformers has `(ffn + attn) + x`."""
    return around_step("parallel_add", layer_idx, lambda ctx, do: ctx.act["x"].add_(ctx.act["y"]))


def residual_added_last(layer_idx: int) -> Fault:
    """Adds `(ffn + attn) + x` in one serial layer, where transformers has `ffn + (attn + x)`."""
    kept: dict[str, Tensor] = {}

    def change(instruction: Instruction, ctx: PassContext, do: Callable[[], None]) -> None:
        step = instruction.step if isinstance(instruction, Compute) and instruction.layer_idx == layer_idx else None
        if step == "attn_residual":
            kept.update(x=ctx.act["x"].clone(), attn=ctx.act["x_"].clone())
        if step == "ffn_residual":
            ctx.act["x"].copy_(kept["x"] + (ctx.act["x_"] + kept["attn"]))
        else:
            do()

    return around(change)
