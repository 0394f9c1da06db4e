"""What each step computes. `STEPS` maps the names in a PassPlan to functions of a StepContext.

Shapes: T tokens in the batch, N sampled rows, D hidden, H/K local query/KV heads, E head dim, I local FFN width,
V local vocab. An operation cannot tell whether its weights stream: it gets them as views by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from penstock.engine.compute.attention import attend_
from penstock.engine.compute.inputs import PassInputs
from penstock.engine.kernels.embedding import embed_rows
from penstock.engine.kernels.gated_activation import gated_activation
from penstock.engine.kernels.linear import linear
from penstock.engine.kernels.reduce_residual_norm import reduce_residual_norm
from penstock.engine.kernels.residual_norm import residual_norm
from penstock.engine.kernels.rope_append import rope_append
from penstock.engine.model.fusion import FUSED, FUSED_OVER_RANKS, WHOLE_HEAD
from penstock.engine.model.spec import ModelSpec
from penstock.parallel.collectives import Collectives
from penstock.scheduler.passes.pass_plan import fused_name
from torch import Tensor


@dataclass
class StepContext:
    """What an operation sees. `act` holds the activations, cut to this pass's T or N rows; `kv` and `sampler` are the
    engine's KVCache and Sampler."""

    spec: ModelSpec
    num_heads: int  # H
    num_kv_heads: int  # K
    first_vocab: int  # first token id of this rank's part of the vocabulary
    embed: Tensor  # (V, D), on the device or in registered host memory
    rope: Tensor  # (2, L, F)
    kv: object
    sampler: object
    collectives: Collectives
    inputs: PassInputs | None = None
    act: Mapping[str, Tensor] | None = None
    asked: object = None  # what the batch's rows ask the sampler for
    sampled: object = None  # the pass's SampleOutput

    def heads(self) -> Tensor:
        """The activation attn as (T, H + 2K, E): q, k and v."""
        attn = self.act["attn"]
        return attn.view(len(attn), self.num_heads + 2 * self.num_kv_heads, self.spec.head_dim)


Weights = Mapping[str, Tensor]


def project(weights: Weights, name: str, x: Tensor, out: Tensor) -> None:
    """Computes out = x @ w.T (+ bias). Weights have the format "plain": one tensor by the weight's own name."""
    linear(x, weights[name], weights.get(name + "_bias"), out)


def embedding(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    embed_rows(ctx.embed, ctx.inputs.tokens, ctx.first_vocab, ctx.act["x"])


def _norm_step(name: str, delta: str | None = None) -> Callable:
    """The step x_ = norm(x); with `delta`, the name of an activation, x += delta comes first."""

    def step(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
        x, spec = ctx.act["x"], ctx.spec
        added = ctx.act[delta] if delta else None
        residual_norm(x, added, weights[name], weights.get(name + "_bias"), spec.norm_eps, ctx.act["x_"], spec.norm)

    return step


def _reduce_step(activation: str, label: str) -> Callable:
    def step(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
        ctx.collectives.all_reduce(ctx.act[activation], label)

    return step


def _reduce_norm_step(label: str, name: str) -> Callable:
    """The step x_ = norm(x += the sum of x_ over ranks): one kernel for few rows, two for more."""
    reduce, norm = _reduce_step("x_", label), _norm_step(name, delta="x_")

    def step(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
        x, part, spec = ctx.act["x"], ctx.act["x_"], ctx.spec
        peers = ctx.collectives.peer_buffers(part, label)
        if peers is None:
            reduce(ctx, weights, layer_idx)
            norm(ctx, weights, layer_idx)
        else:
            bias = weights.get(name + "_bias")
            reduce_residual_norm(peers, x, part, weights[name], bias, spec.norm_eps, part, spec.norm)

    return step


def attn_qkv(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    project(weights, "qkv", ctx.act["x_"], ctx.act["attn"])


def rope(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    """Applies the norms of q and k where the family has them, rotates both, and appends k and v to the KV cache."""
    cache = ctx.kv.layer(layer_idx)
    rope_append(
        ctx.act["attn"],
        ctx.rope,
        ctx.inputs.positions,
        ctx.inputs.addresses,
        cache.keys,
        cache.values,
        ctx.num_heads,
        ctx.num_kv_heads,
        weights.get("q_norm"),
        weights.get("k_norm"),
        ctx.spec.norm_eps,
        appends_rotated=cache.key_rope is None,
    )


def attention(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    """Overwrites q with its attention."""
    attend_(ctx.heads(), ctx.kv.layer(layer_idx), ctx.inputs.context, ctx.spec.windows[layer_idx])


def _attn_output_step(out: str) -> Callable:
    def step(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
        heads = ctx.act["attn"][:, : ctx.num_heads * ctx.spec.head_dim]  # (T, H E)
        project(weights, "o", heads, ctx.act[out])

    return step


def residual(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    ctx.act["x"].add_(ctx.act["x_"])


def ffn_up(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    project(weights, "gate_up" if ctx.spec.gated else "up", ctx.act["x_"], ctx.act["ffn"])


def activation(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    """Applies the FFN's activation; the result lies in the first I columns."""
    gated_activation(ctx.act["ffn"], ctx.spec.activation, ctx.spec.gated)


def ffn_down(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    project(weights, "down", ctx.act["ffn"][:, : weights["down"].shape[1]], ctx.act["x_"])


def parallel_add(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    ctx.act["x_"].add_(ctx.act["y"])


def select_rows(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    torch.index_select(ctx.act["x_"], 0, ctx.inputs.select, out=ctx.act["rows"])


def _head_step(out: str) -> Callable:
    def step(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
        project(weights, "head", ctx.act["rows"], ctx.act[out])

    return step


def logits_gather(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    if ctx.inputs.sampled_rows:
        ctx.collectives.all_gather_columns(ctx.act["part"], ctx.act["logits"])


def sample(ctx: StepContext, weights: Weights, layer_idx: int) -> None:
    """Samples a token for each sampled row, after trimming the padding of the vocabulary."""
    inputs = ctx.inputs
    if not inputs.sampled_rows:
        return
    logits = ctx.act["logits"][:, : ctx.spec.vocab_size]
    ctx.sampled = ctx.sampler(logits, inputs.sampled_rows_device, inputs.sampled_positions, ctx.asked)


STEPS: dict[str, Callable[[StepContext, Weights, int], None]] = {
    "embedding": embedding,
    "embed_allreduce": _reduce_step("x", "embed_allreduce"),
    "attn_norm": _norm_step("attn_norm"),
    "attn_qkv": attn_qkv,
    "rope": rope,
    "attention": attention,
    "attn_output": _attn_output_step("x_"),
    "attn_output_beside": _attn_output_step("y"),
    "attn_allreduce": _reduce_step("x_", "attn_allreduce"),
    "attn_residual": residual,
    "ffn_norm": _norm_step("ffn_norm"),
    "ffn_up": ffn_up,
    "activation": activation,
    "ffn_down": ffn_down,
    "parallel_add": parallel_add,
    "ffn_allreduce": _reduce_step("x_", "ffn_allreduce"),
    "ffn_residual": residual,
    "final_norm": _norm_step("final_norm"),
    "select_rows": select_rows,
    "head": _head_step("part"),
    "logits_gather": logits_gather,
    "sample": sample,
    # the fused steps of fusion.py
    **{fused_name(residual, norm): _norm_step(norm, delta="x_") for residual, norm in FUSED},
    **{fused_name(*run): _reduce_norm_step(run[0], run[-1]) for run in FUSED_OVER_RANKS},
    fused_name(*WHOLE_HEAD): _head_step("logits"),
}
