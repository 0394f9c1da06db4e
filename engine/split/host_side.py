"""The trusted side of a split execution: it walks the same PassPlan, with norms, RoPE, residuals, KV cache, activations
and sampling here, and each embedding, linear layer, attention matmul and head as a call to the device side.

Shapes: T tokens of a row, C its context tokens, H/K query/KV heads, E head dim.
"""

import secrets
from dataclasses import dataclass
from typing import Any

import torch
from penstock.engine.compute.arena import aligned_bytes
from penstock.engine.compute.attention import causal_mask, row_contexts
from penstock.engine.compute.context import PassContext
from penstock.engine.compute.inputs import RowRange
from penstock.engine.config import EngineConfig
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.runtime.build import Ingredients, build_arena, build_lanes, build_model, build_runner
from penstock.engine.runtime.executor import Executor
from penstock.engine.runtime.pass_runner import PassRunner
from penstock.engine.runtime.watch import Watch, Watches
from penstock.engine.split.channel import Channel, InProcess, Subprocess
from penstock.engine.split.device_side import CPU, DeviceSide, load_part
from penstock.engine.split.permutation import PermutedChannel
from penstock.engine.split.transfers import (
    FUSED,
    REPEATED,
    PassRow,
    SplitConfig,
    add_pass,
    is_call,
    linear_activations,
    site,
)
from penstock.engine.weights.blocks import WeightSource
from penstock.engine.weights.host_store import LoadedWeights
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.passes.pass_plan import Compute
from torch import Tensor

DRAWN_KEY_BYTES = 32


class SplitExecutor(Executor):
    """Runs the host side's steps of a plan as they are, and turns the device side's into calls. `attention` is a key of
    ATTENTION_WAYS."""

    def __init__(self, channel: Channel, attention: str, **parts):
        super().__init__(**parts)
        assert not any(len(step.parts) > 1 for step in self.pass_plan.steps), "a fused step may belong to both sides"
        self.channel, self.attention = channel, attention

    def _compute(self, ctx: PassContext, step: Compute) -> None:
        if is_call(step):
            self._call(ctx, step)
        else:
            super()._compute(ctx, step)

    def _call(self, ctx: PassContext, step: Compute) -> None:
        act = ctx.act
        if step.step == "embedding":
            self.channel.call(site(step), [ctx.inputs.tokens], act["x"])
        elif step.step == "attention":
            self._attend_rows(ctx, step.layer_idx)
        else:
            reads, width, writes = linear_activations(self.model.spec, step)
            if len(act[writes]):  # no row samples: nothing for the head
                self.channel.call(site(step), [act[reads][:, :width]], act[writes])

    def _attend_rows(self, ctx: PassContext, layer_idx: int) -> None:
        """Attends row by row; the result overwrites q."""
        heads, cache = ctx.heads(), self.model.kv.layer(layer_idx)
        for tokens, row, k, v in row_contexts(heads, cache, ctx.inputs.context):
            self._attend(layer_idx, row, heads[tokens, : self.model.num_heads], k, v)

    def _attend(self, layer_idx: int, row: RowRange, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Overwrites q (T, H, E) with its attention over k and v (C, K, E)."""
        num_tokens, num_heads, head_dim = q.shape
        if self.attention == FUSED:
            self.channel.call(Site("attention", layer_idx), [q, k, v], q)
            return
        if self.attention == REPEATED:
            k, v = (each.repeat_interleave(num_heads // each.shape[1], dim=1) for each in (k, v))  # (C, H, E)
        scores = q.new_empty(num_heads, num_tokens, len(k))
        self.channel.call(Site("attention_scores", layer_idx), [q, k], scores)
        mask = causal_mask(row, self.model.spec.windows[layer_idx], q.device)  # (T, C)
        scaled = (scores.float() * head_dim**-0.5).masked_fill_(~mask, -torch.inf)
        probabilities = scaled.softmax(-1).to(q.dtype)
        self.channel.call(Site("attention_values", layer_idx), [probabilities, v], q)


class PassNotes(Watch):
    """Adds to `predicted` what each pass is to send, and tells a permuted channel whose its rows are."""

    def __init__(self, plan: EnginePlan, split: SplitConfig, permuted: PermutedChannel | None):
        self.plan, self.split, self.permuted = plan, split, permuted
        self.predicted = TransferLedger()

    def begin_pass(self, batch: Batch | None) -> None:
        if batch is None:
            return
        rows = [PassRow.of(row) for row in batch.rows]
        add_pass(self.predicted, self.plan.pass_plan.steps, self.plan.spec, rows, self.split)
        if self.permuted is not None:
            self.permuted.begin_pass(batch)


@dataclass(frozen=True)
class HostSide:
    """The worker of a split execution: it has the norms and no other weights. It owns the channel."""

    plan: EnginePlan
    weights: LoadedWeights
    executor: SplitExecutor
    runner: PassRunner
    channel: Channel
    notes: PassNotes

    def transfers(self) -> dict[str, Any]:
        """Says what crossed between the sides, for JSON."""
        return {"calls": self.channel.ledger.to_dict()}

    def close(self) -> None:
        """Ends the device side; idempotent."""
        self.channel.close()
        self.runner.close()
        self.weights.close()


def build_host_side(split: SplitConfig, given: Ingredients, source: WeightSource) -> HostSide:
    """Starts the device side, which opens the checked `source` itself, and builds the host's. Raises ValueError,
    MemoryError or DeviceSideFailed; nothing is left then."""
    plan = given.plan
    channel = open_channel(split, given.config, plan)
    try:
        weights, named = load_part(given.config, plan, trusted=True)
        embed = torch.empty(0, plan.spec.hidden_size, dtype=getattr(torch, plan.dtype))  # the device side has it
        notes = PassNotes(plan, split, channel if isinstance(channel, PermutedChannel) else None)
        executor = SplitExecutor(
            channel,
            split.attention,
            pass_plan=plan.pass_plan,
            model=build_model(given, embed),
            views=named,
            host_spans={},
            ring=aligned_bytes(0, CPU),
            arena=build_arena(given),
            lanes=build_lanes(given),
            watches=Watches(given.watches, notes),
            compressed={},
        )
        return HostSide(plan, weights, executor, build_runner(given, executor), channel, notes)
    except BaseException:
        channel.close()
        raise


def open_channel(split: SplitConfig, config: EngineConfig, plan: EnginePlan) -> Channel:
    wire_dtype = getattr(torch, split.wire_dtype)
    if split.process:
        channel = Subprocess(config, wire_dtype, split.timeout_s, plan.layout.nbytes)
    else:
        channel = InProcess(DeviceSide(config, plan), wire_dtype)
    if not split.permute:
        return channel
    key = secrets.token_bytes(DRAWN_KEY_BYTES) if split.permute_key is None else bytes.fromhex(split.permute_key)
    return PermutedChannel(channel, split.permute, key)
