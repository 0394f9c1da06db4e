"""The trusted side of a split execution: it walks the same PassPlan, with norms, RoPE, residuals, KV cache, activations
and sampling here, and each embedding, linear layer, attention matmul and head as a call to the device side.

Shapes: T tokens of a row, C its context tokens, H/K query/KV heads, E head dim.
"""

import torch
from penstock.engine.compute.arena import ActivationArena, aligned_bytes
from penstock.engine.compute.attention import causal_mask, gather
from penstock.engine.compute.inputs import RowRange
from penstock.engine.compute.kv_cache import make_cache
from penstock.engine.compute.ops import StepContext
from penstock.engine.compute.rope import rope_table
from penstock.engine.compute.sampler import Sampler
from penstock.engine.config import EngineConfig
from penstock.engine.model.steps import activation_widths
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.runtime.executor import Executor
from penstock.engine.runtime.lanes import InterleavedLanes
from penstock.engine.runtime.trace import Tracer
from penstock.engine.split.channel import Channel
from penstock.engine.split.device_side import CPU, load_part
from penstock.engine.split.transfers import FUSED, REPEATED, is_call, linear_activations, site
from penstock.parallel.collectives import Collectives
from penstock.parallel.ledger import Site
from penstock.scheduler.passes.pass_plan import Compute, Instruction
from torch import Tensor


class SplitExecutor(Executor):
    """Runs the host side's steps of a plan as they are, and turns the device side's into calls. `attention` is a key of
    ATTENTION_WAYS."""

    def __init__(self, channel: Channel, attention: str, **parts):
        super().__init__(**parts)
        assert not any(len(step.parts) > 1 for step in self.plan.steps), "a fused step may belong to both sides"
        self.channel, self.attention = channel, attention

    def do(self, instruction: Instruction) -> None:
        if isinstance(instruction, Compute) and is_call(instruction):
            self.counters.steps[instruction.step] += 1
            self._call(instruction)
        else:
            super().do(instruction)

    def _call(self, step: Compute) -> None:
        act, inputs = self.context.act, self.context.inputs
        if step.step == "embedding":
            self.channel.call(site(step), [inputs.tokens], act["x"])
        elif step.step == "attention":
            self._attend_rows(step.layer_idx)
        else:
            reads, width, writes = linear_activations(self.context.spec, step)
            if len(act[writes]):  # where no row samples, the head has nothing to do
                self.channel.call(site(step), [act[reads][:, :width]], act[writes])

    def _attend_rows(self, layer_idx: int) -> None:
        """Attends row by row; the result overwrites q."""
        heads, context = self.context.heads(), self.context.inputs.context
        k, v = gather(self.context.kv.layer(layer_idx), context)  # (C of all rows, K, E)
        for row in context.ranges:
            tokens = slice(row.first_query, row.first_query + row.num_queries)
            attended = slice(row.first_context, row.first_context + row.num_context)
            self._attend(layer_idx, row, heads[tokens, : self.context.num_heads], k[attended], v[attended])

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
        mask = causal_mask(row, self.context.spec.windows[layer_idx], q.device)  # (T, C)
        scaled = (scores.float() * head_dim**-0.5).masked_fill_(~mask, -torch.inf)
        probabilities = scaled.softmax(-1).to(q.dtype)
        self.channel.call(Site("attention_values", layer_idx), [probabilities, v], q)


class HostSide:
    """Loads the norms and nothing else; `executor` runs batches once this is built. It owns the channel."""

    def __init__(
        self, config: EngineConfig, plan: EnginePlan, channel: Channel, attention: str, collectives: Collectives
    ):
        spec, residency, dtype = plan.spec, plan.residency, getattr(torch, plan.dtype)
        self.channel = channel
        self._weights, named = load_part(config, plan, trusted=True)
        rope = rope_table(spec.rope, residency.max_model_len, dtype, CPU)
        tracer, widths = Tracer(), activation_widths(spec, tp_size=1)
        most = (config.max_num_batched_tokens, plan.max_num_seqs)
        context = StepContext(
            spec=spec,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            first_vocab=0,
            embed=torch.empty(0, spec.hidden_size, dtype=dtype),  # the device side has it
            rope=rope,
            kv=make_cache(plan, config.page_size, spec.num_kv_heads, rope),
            sampler=Sampler(plan.max_num_seqs, spec.vocab_size, CPU),
            collectives=collectives,
        )
        self.executor = SplitExecutor(
            channel,
            attention,
            plan=plan.pass_plan,
            context=context,
            views=named,
            host_spans={},
            ring=aligned_bytes(0, CPU),
            arena=ActivationArena(plan.activation_offsets, plan.activations_bytes, widths, *most, dtype, CPU),
            lanes=InterleavedLanes(config.debug.lanes, config.seed, tracer),
            tracer=tracer,
            compressed={},
        )

    def close(self) -> None:
        """Ends the device side; idempotent."""
        self.channel.close()
        self.executor = None
        self._weights.close()
