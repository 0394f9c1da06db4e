"""Faults to put into a built engine: what a bug in loading, streaming, rotation, an addition or a reduce would do.

Each is a function of the LLM, to be called before it generates. They change weights, collectives or the plan and leave
the code of the steps alone; nothing is validated afterwards. Those of kernels are in kernel_faults.py.
"""

from collections.abc import Callable
from dataclasses import replace

from penstock.engine.compute.ops import StepContext
from penstock.engine.llm import LLM
from penstock.engine.model.steps import model_steps
from penstock.engine.weights.views import views
from penstock.scheduler.passes.pass_plan import Acquire, Compute, GroupId, Instruction, Prefetch
from torch import Tensor

from tests.support.engine_proof import run_steps
from tests.support.layouts import by_group

Fault = Callable[[LLM], None]
Change = Callable[[Instruction, StepContext, Callable[[], None]], None]


def around(change: Change) -> Fault:
    """`change(instruction, ctx, do)` runs in place of every instruction; do() is the real one."""

    def fault(llm: LLM) -> None:
        executor = llm.engine.worker.executor
        real = executor.do
        executor.do = lambda instruction: change(instruction, executor.context, lambda: real(instruction))

    return fault


def around_step(step: str, layer_idx: int, change: Callable[[StepContext, Callable[[], None]], None]) -> Fault:
    """The same for one step of one layer; layer_idx None means all layers."""

    def at_step(instruction: Instruction, ctx: StepContext, do: Callable[[], None]) -> None:
        mine = isinstance(instruction, Compute) and instruction.step == step
        if mine and layer_idx in (None, instruction.layer_idx):
            change(ctx, do)
        else:
            do()

    return around(at_step)


def edit_plan(edit: Callable[[Instruction], Instruction]) -> Fault:
    def fault(llm: LLM) -> None:
        executor = llm.engine.worker.executor
        executor.plan = replace(executor.plan, instructions=tuple(map(edit, executor.plan.instructions)))

    return fault


def edit_weight(group: GroupId, name: str, edit: Callable[[Tensor, StepContext], None]) -> Fault:
    """Changes a streamed group's weight in the host arena, in place."""

    def fault(llm: LLM) -> None:
        executor = llm.engine.worker.executor
        layout = by_group(llm.engine.plan.layout)[group]
        edit(views(layout, executor.host_spans[group])[name], executor.context)

    return fault


def skipped_prefetch(group: GroupId) -> Fault:
    """The group's slot keeps what was in it before: zeros at first, not what an engine of the same model left there."""

    def fault(llm: LLM) -> None:
        llm.engine.worker.executor.ring.zero_()
        around(lambda i, ctx, do: None if isinstance(i, Prefetch) and i.group == group else do())(llm)

    return fault


def stale_layer(group: GroupId, other: GroupId) -> Fault:
    """Another layer's bytes are copied."""

    def fault(llm: LLM) -> None:
        executor = llm.engine.worker.executor
        executor.host_spans = {**executor.host_spans, group: executor.host_spans[other]}

    return fault


def early_read(group: GroupId) -> Fault:
    """Nothing waits for the copy of `group` before it is read."""
    return edit_plan(lambda i: replace(i, present=True) if isinstance(i, Acquire) and i.group == group else i)


def early_write(group: GroupId) -> Fault:
    """The copy of `group` does not wait until the slot's former holders are free."""
    return edit_plan(lambda i: replace(i, after=()) if isinstance(i, Prefetch) and i.group == group else i)


def half_lost(layer_idx: int, name: str) -> Fault:
    """Half of an o or down projection does not count."""
    group = GroupId(layer_idx, {"o": "attn", "down": "ffn"}[name])
    return edit_weight(group, name, lambda weight, ctx: weight[:, weight.shape[1] // 2 :].zero_())


def head_dropped(layer_idx: int) -> Fault:
    """What the first head of this rank has attended to does not count."""
    group = GroupId(layer_idx, "attn")
    return edit_weight(group, "o", lambda weight, ctx: weight[:, : ctx.spec.head_dim].zero_())


def kv_heads_rolled(layer_idx: int) -> Fault:
    """Every KV head is the next one's."""

    def edit(weight: Tensor, ctx: StepContext) -> None:
        heads = weight.view(-1, ctx.spec.head_dim, weight.shape[1])  # (H + 2K, E, D)
        for part in heads[ctx.num_heads :].chunk(2):
            part.copy_(part.roll(1, 0))

    return edit_weight(GroupId(layer_idx, "attn"), "qkv", edit)


def rope_shifted(which: str, layer_idx: int | None = None) -> Fault:
    """Positions are one too high: for "q" only, in "later" passes only (so that older keys are not), or for "all",
    which nobody can see, since rotations are relative."""

    def change(ctx: StepContext, do: Callable[[], None]) -> None:
        inputs, attn = ctx.inputs, ctx.act["attn"]
        if which == "later" and int(inputs.positions[0]) == 0:
            return do()
        before = attn.clone()
        ctx.inputs = replace(inputs, positions=inputs.positions + 1)
        do()
        ctx.inputs = inputs
        if which == "q":
            shifted = ctx.heads()[:, : ctx.num_heads].clone()
            attn.copy_(before)
            do()
            ctx.heads()[:, : ctx.num_heads].copy_(shifted)

    return around_step("rope", layer_idx, change)


def lost_reduce(step: str, layer_idx: int) -> Fault:
    """This rank takes part in the reduce and goes on with its own part only."""
    activation = "x" if step == "embed_allreduce" else "x_"

    def change(ctx: StepContext, do: Callable[[], None]) -> None:
        own = ctx.act[activation].clone()
        do()
        ctx.act[activation].copy_(own)

    return around_step(step, layer_idx, change)


def other_residual(llm: LLM) -> None:
    """GPT-NeoX as if its config said the other value of use_parallel_residual."""
    spec = replace(llm.engine.plan.spec, parallel_residual=not llm.engine.plan.spec.parallel_residual)
    run_steps(llm, spec, model_steps(spec))


def attention_added_first(layer_idx: int) -> Fault:
    """`ffn + (attn + x)` in one parallel layer, where transformers has `(ffn + attn) + x`."""
    return around_step("parallel_add", layer_idx, lambda ctx, do: ctx.act["x"].add_(ctx.act["y"]))


def residual_added_last(layer_idx: int) -> Fault:
    """`(ffn + attn) + x` in one serial layer, where transformers has `ffn + (attn + x)`."""
    kept: dict[str, Tensor] = {}

    def change(instruction: Instruction, ctx: StepContext, do: Callable[[], None]) -> None:
        step = instruction.step if isinstance(instruction, Compute) and instruction.layer_idx == layer_idx else None
        if step == "attn_residual":
            kept.update(x=ctx.act["x"].clone(), attn=ctx.act["x_"].clone())
        if step == "ffn_residual":
            ctx.act["x"].copy_(kept["x"] + (ctx.act["x_"] + kept["attn"]))
        else:
            do()

    return around(change)
