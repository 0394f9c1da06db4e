"""Describes what each step computes. `STEPS` maps the names in a PassPlan to functions of a PassContext.

Shapes: T tokens in the batch, or its sampled rows behind their selection, N sampled rows, D hidden, H/K local query/KV
heads, E head dim, I local FFN width, V local vocab. An operation cannot tell whether its weights stream: it gets them
as views by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from penstock.engine.compute.attention import attend_
from penstock.engine.compute.context import PassContext
from penstock.engine.compute.inputs import MixedContext
from penstock.engine.kernels.embedding import embed_rows
from penstock.engine.kernels.gated_activation import gated_activation
from penstock.engine.kernels.linear import linear
from penstock.engine.kernels.reduce_residual_norm import reduce_residual_norm
from penstock.engine.kernels.residual_norm import residual_norm
from penstock.engine.kernels.rope_append import rope_append
from penstock.engine.kernels.stored_embedding import embed_stored_rows
from penstock.engine.kernels.stored_linear import StoredMatrix, stored_linear
from penstock.engine.kernels.stored_matmul import stored_matmul
from penstock.engine.model.fusion import FUSED, FUSED_OVER_RANKS, WHOLE_HEAD
from penstock.engine.model.steps import SCORE, SELECT, SELECT_ATTENDED
from penstock.scheduler.passes.pass_plan import fused_name
from torch import Tensor

Weights = Mapping[str, Tensor | StoredMatrix]


def project(weights: Weights, name: str, x: Tensor, out: Tensor, num_tokens: int) -> None:
    """Computes out = x @ w.T (+ bias) in a pass of so many tokens, which decides in which form a quantised weight is
    read."""
    weight, bias = weights[name], weights.get(name + "_bias")
    if isinstance(weight, Tensor):
        linear(x, weight, bias, out)
    elif num_tokens > weight.as_stored:
        linear(x, weight.floats, bias, out)
    else:
        for run in weight.runs:
            (stored_linear if num_tokens <= run.few_tokens else stored_matmul)(x, run, bias, out)


def _project(ctx: PassContext, weights: Weights, name: str, x: Tensor, out: Tensor) -> None:
    project(weights, name, x, out, ctx.inputs.num_tokens)


def embedding(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    table, tokens, first, out = ctx.model.embed, ctx.inputs.tokens, ctx.model.first_vocab, ctx.act["x"]
    if isinstance(table, Tensor):
        embed_rows(table, tokens, first, out)
    else:
        embed_stored_rows(table.kind, table.data, tokens, first, out)


def _norm_step(name: str, delta: str | None = None) -> Callable:
    """The step x_ = norm(x); with `delta`, the name of an activation, x += delta comes first."""

    def step(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
        x, spec = ctx.act["x"], ctx.model.spec
        added = ctx.act[delta] if delta else None
        residual_norm(x, added, weights[name], weights.get(name + "_bias"), spec.norm_eps, ctx.act["x_"], spec.norm)

    return step


def _reduce_step(activation: str, label: str) -> Callable:
    def step(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
        ctx.model.collectives.all_reduce(ctx.act[activation], label)

    return step


def _reduce_norm_step(label: str, name: str) -> Callable:
    """The step x_ = norm(x += the sum of x_ over ranks): one kernel for few rows, two for more."""
    reduce, norm = _reduce_step("x_", label), _norm_step(name, delta="x_")

    def step(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
        x, part, spec = ctx.act["x"], ctx.act["x_"], ctx.model.spec
        peers = ctx.model.collectives.peer_buffers(part, label)
        if peers is None:
            reduce(ctx, weights, layer_idx)
            norm(ctx, weights, layer_idx)
        else:
            bias = weights.get(name + "_bias")
            reduce_residual_norm(peers, x, part, weights[name], bias, spec.norm_eps, part, spec.norm)

    return step


def attn_qkv(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    _project(ctx, weights, "qkv", ctx.act["x_"], ctx.act["attn"])


def rope(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    """Norms of q and k where the family has them, rotation, and the append to the KV cache."""
    cache = ctx.model.kv.layer(layer_idx)
    rope_append(
        ctx.act["attn"],
        ctx.model.rope,
        ctx.inputs.positions,
        ctx.inputs.addresses,
        cache.keys,
        cache.values,
        ctx.model.num_heads,
        ctx.model.num_kv_heads,
        weights.get("q_norm"),
        weights.get("k_norm"),
        ctx.model.spec.norm_eps,
        appends_rotated=cache.key_rope is None,
    )


def attention(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    """Attention of each token; the result overwrites q. The last layer may leave out what nobody reads (`of_lasts`)."""
    context, spec = ctx.inputs.context, ctx.model.spec
    if layer_idx == spec.num_layers - 1 and isinstance(context, MixedContext):
        context = context.of_lasts or context
    attend_(ctx.heads(), ctx.model.kv.layer(layer_idx), context, spec.windows[layer_idx])


def _attn_output_step(out: str) -> Callable:
    def step(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
        heads = ctx.act["attn"][:, : ctx.model.num_heads * ctx.model.spec.head_dim]  # (T, H E)
        _project(ctx, weights, "o", heads, ctx.act[out])

    return step


def residual(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    ctx.act["x"].add_(ctx.act["x_"])


def ffn_up(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    _project(ctx, weights, "gate_up" if ctx.model.spec.gated else "up", ctx.act["x_"], ctx.act["ffn"])


def activation(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    """The FFN's activation; the result lies in the first I columns."""
    gated_activation(ctx.act["ffn"], ctx.model.spec.activation, ctx.model.spec.gated)


def ffn_down(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    down = weights["down"]
    width = down.shape[1] if isinstance(down, Tensor) else down.width
    _project(ctx, weights, "down", ctx.act["ffn"][:, :width], ctx.act["x_"])


def parallel_add(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    ctx.act["x_"].add_(ctx.act["y"])


def score_prompts(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    """Log probabilities of the prompts' tokens for which rows ask. Logits are there for some of them at a time."""
    if ctx.inputs.scored is None:
        return
    asked, memory, sampler = ctx.inputs.scored, ctx.act["prompt_logits"], ctx.model.sampler
    num_scored = len(asked.select)
    ctx.prompt_scores = asked.select.new_empty(num_scored, sampler.scores_width, dtype=torch.int32)
    for start in range(0, num_scored, len(memory)):
        part = slice(start, start + len(memory))
        rows = ctx.act["x_"].index_select(0, asked.select[part])
        logits = memory[: len(rows)]
        _whole_head(ctx, weights, rows, logits)
        logits = logits[:, : ctx.model.spec.vocab_size]
        ctx.prompt_scores[part] = sampler.score(logits, asked.targets[part], asked.wanted[part])


def _whole_head(ctx: PassContext, weights: Weights, rows: Tensor, logits: Tensor) -> None:
    """Computes logits (R, V of all ranks) of rows (R, D)."""
    collectives = ctx.model.collectives
    if collectives.size == 1:
        _project(ctx, weights, "head", rows, logits)
    else:
        part = logits.new_empty(len(rows), logits.shape[1] // collectives.size)
        _project(ctx, weights, "head", rows, part)
        collectives.all_gather_columns(part, logits)


def select_rows(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    if ctx.inputs.select is not None:
        _leave(ctx, ctx.inputs.select, "x_")


def select_attended(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    """Leaves the rows whose logits are wanted: the sampled ones, then those that are scored."""
    inputs, scored = ctx.inputs, ctx.inputs.scored
    if inputs.select is None:
        return
    if scored is None:
        _leave(ctx, inputs.select, "attn", "x")
        ctx.inputs = replace(inputs, select=None)
        return
    left = torch.arange(len(inputs.select) + len(scored.select), device=scored.select.device)
    _leave(ctx, torch.cat((inputs.select, scored.select)), "attn", "x")
    sampled, others = left[: len(inputs.select)], left[len(inputs.select) :]
    ctx.inputs = replace(inputs, select=sampled, scored=replace(scored, select=others))


def _leave(ctx: PassContext, select: Tensor, *names: str) -> None:
    """Leaves these rows of the activations that are alive; those of the steps behind it have as many."""
    for name in names:
        ctx.act[name][: len(select)] = ctx.act[name].index_select(0, select)
    ctx.act = {name: activation[: len(select)] for name, activation in ctx.act.items()}


def _head_step(out: str) -> Callable:
    def step(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
        _project(ctx, weights, "head", ctx.act["x_"], ctx.act[out])

    return step


def logits_gather(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    if ctx.inputs.sampled_rows:
        ctx.model.collectives.all_gather_columns(ctx.act["part"], ctx.act["logits"])


def sample(ctx: PassContext, weights: Weights, layer_idx: int) -> None:
    """Counts the pass's tokens, for penalties, and samples one for each sampled row, after trimming the padding of the
    vocabulary."""
    inputs, sampler = ctx.inputs, ctx.model.sampler
    if "penalty" in ctx.asked.stages:
        sampler.observe(inputs.token_rows, inputs.tokens)
    if inputs.sampled_rows or ctx.prompt_scores is not None:
        logits = ctx.act["logits"][:, : ctx.model.spec.vocab_size]
        output = sampler(logits, inputs.sampled_rows_device, inputs.sampled_positions, ctx.asked)
        ctx.take(replace(output, prompt_scores=ctx.prompt_scores))


STEPS: dict[str, Callable[[PassContext, Weights, int], None]] = {
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
    SCORE: score_prompts,
    SELECT: select_rows,
    SELECT_ATTENDED: select_attended,
    "head": _head_step("part"),
    "logits_gather": logits_gather,
    "sample": sample,
    # the fused steps of fusion.py
    **{fused_name(residual, norm): _norm_step(norm, delta="x_") for residual, norm in FUSED},
    **{fused_name(*run): _reduce_norm_step(run[0], run[-1]) for run in FUSED_OVER_RANKS},
    fused_name(*WHOLE_HEAD): _head_step("logits"),
}
