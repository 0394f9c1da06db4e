"""The kernels of the engine: for each, the way to run it, its reference, its counter, and the steps that call it.

A new kernel is a row of KERNELS; engine_proof.py holds it to its reference and to its calls in real runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
from penstock.engine.compute import attention
from penstock.engine.compute.context import PassContext
from penstock.engine.compute.inputs import Chunks, PagedContext
from penstock.engine.kernels import (
    argmax,
    decode_attention,
    decode_inputs,
    decode_work,
    decompress_weights,
    dequantise,
    draw,
    embedding,
    filter,
    gated_activation,
    linear,
    logprobs,
    occurrences,
    penalty,
    prompt_attention,
    reduce_residual_norm,
    residual_norm,
    rope_append,
    stored_embedding,
    stored_linear,
    stored_matmul,
)
from penstock.engine.kernels.prompt_attention import Pages
from penstock.engine.kernels.stored_linear import StoredRun
from penstock.engine.planning.step_cost import MATRICES
from penstock.engine.runtime.executor import Executor
from penstock.engine.weights.kept_group import Blocks, Lossless
from penstock.parallel import push_reduce, two_step_reduce
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.pass_plan import Compute, Decompress, Instruction
from torch import Tensor

Condition = Callable[[Compute, PassContext], int]
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=1.5, seed=3)  # tokens differ from each other, and depend on every logit
FILTERED = replace(DRAWN, top_p=0.8)
ALL = replace(FILTERED, top_k=60, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=3)  # of the sampler's stages
SHORT = replace(DRAWN, max_tokens=2)  # for kernels that take seconds in the interpreter


@dataclass(frozen=True)
class EngineKernel:
    """A kernel in the engine. `kernel` and `reference` have one signature, and the engine finds them by `names`. If
    `reference` is None, other kernels or a library are the reference. Each step with a part of `steps` in its name
    calls the kernel as often as `condition` says, by default once. If `exact`, the kernel gives the reference's very
    bits."""

    module: ModuleType  # its `calls` count
    steps: tuple[str, ...]
    condition: Condition = lambda step, ctx: True
    kernel: Callable | None = None
    reference: Callable | None = None
    names: tuple[tuple[ModuleType, str], ...] = ()
    exact: bool = False
    params: SamplingParams = DRAWN  # of a request that needs the kernel

    def calls_at(self, instruction: Instruction, ctx: PassContext, executor: Executor) -> int:
        """The number of times that the instruction, which is about to run, has to call the kernel."""
        if isinstance(instruction, Decompress):
            group = executor.compressed[instruction.group].group
            formats = (
                [rows.format for each in group.weights for rows in each.rows] if "decompress" in self.steps else []
            )
            return sum(isinstance(each, Lossless) and not each.layout.raw for each in formats)
        if not isinstance(instruction, Compute) or not set(self.steps) & set(instruction.parts):
            return 0
        if instruction.of_rows and not ctx.inputs.sampled_rows:
            return 0
        return int(self.condition(instruction, ctx))

    def put_in(self, patch: pytest.MonkeyPatch, run: Callable) -> None:
        """Makes the engine call `run` wherever it would have called the kernel or its reference."""
        for module, name in self.names:
            patch.setattr(module, name, run)


class _Dequantise(EngineKernel):
    """The row of dequantise: a call for each run of quantised rows of which floats are read."""

    def calls_at(self, instruction: Instruction, ctx: PassContext, executor: Executor) -> int:
        if not isinstance(instruction, Decompress):
            return 0
        group, num_tokens = executor.compressed[instruction.group].group, len(ctx.inputs.tokens)
        floats = [each for each in group.weights if num_tokens > each.as_stored]
        return sum(isinstance(rows.format, Blocks) for each in floats for rows in each.rows)


class _StoredLinear(EngineKernel):
    """The row of stored_linear: a call for each run of rows of a weight that is read as it is stored."""

    def calls_at(self, instruction: Instruction, ctx: PassContext, executor: Executor) -> int:
        num_tokens = len(ctx.inputs.tokens) if isinstance(instruction, Compute) else 0
        if not num_tokens:
            return 0
        weights = executor.views.get(instruction.group, {})
        names = [name for part in instruction.parts for name in MATRICES.get(part, ())]
        read = [weights[name] for name in names if name in weights]
        matrices = [each for each in read if not isinstance(each, Tensor) and num_tokens <= each.as_stored]
        return sum(self.has(num_tokens, run) for each in matrices for run in each.runs)

    def has(self, num_tokens: int, run: StoredRun) -> bool:
        return num_tokens <= run.few_tokens


class _StoredMatmul(_StoredLinear):
    """The row of stored_matmul: likewise, for more tokens."""

    def has(self, num_tokens: int, run: StoredRun) -> bool:
        return num_tokens > run.few_tokens


def _kernel(module: ModuleType, stem: str, *steps: str, row: type = EngineKernel, **rest) -> EngineKernel:
    """Makes the row of a module that chooses by device between _STEM_triton and STEM_reference."""
    names = (f"_{stem}_triton", f"{stem}_reference")
    ways = dict(zip(("kernel", "reference"), (getattr(module, name) for name in names)))
    return row(module, steps, **{**ways, "names": tuple((module, name) for name in names), **rest})


def _is_bucket(step: Compute, ctx: PassContext) -> bool:
    return isinstance(ctx.inputs.context, PagedContext)


def _paged(step: Compute, ctx: PassContext) -> bool:
    return _is_bucket(step, ctx) or ctx.inputs.context.paged is not None


def _chunks(step: Compute, ctx: PassContext) -> int:
    context = ctx.inputs.context
    return 0 if isinstance(context, PagedContext) else len(context.continuing) + (context.starting is not None)


def _few_rows(step: Compute, ctx: PassContext) -> bool:
    return linear.has_kernel(ctx.act["x_"])


def _is_greedy(step: Compute, ctx: PassContext) -> bool:
    return bool(ctx.inputs.sampled_rows) and not _draws(step, ctx)


def _draws(step: Compute, ctx: PassContext) -> bool:
    """Penalised rows are drawn from too: at temperature 0."""
    return bool(ctx.inputs.sampled_rows) and bool(ctx.asked.stages & {"draw", "penalty"})


def _notes(step: Compute, ctx: PassContext) -> int:
    """Computed tokens are noted, and sampled ones."""
    return 1 + bool(ctx.inputs.sampled_rows) if "penalty" in ctx.asked.stages else 0


def _asks(*stages: str) -> Condition:
    return lambda step, ctx: bool(ctx.inputs.sampled_rows) and ctx.asked.stages >= {*stages}


def _fits(step: Compute, ctx: PassContext) -> bool:
    return ctx.model.collectives.size > 1 and push_reduce.fits_rows(ctx.act["x"])


def _fits_shares(step: Compute, ctx: PassContext) -> bool:
    x, size = ctx.act["x"], ctx.model.collectives.size
    return size > 1 and not push_reduce.fits(x) and two_step_reduce.fits_shares(x, size)


def _as_the_engine(x: Tensor, *rest) -> None:
    (_LINEAR if linear.has_kernel(x) else _CUBLAS)(x, *rest)


def _attend_by_reference(*arguments, **reading) -> None:
    decode_attention.decode_attention_reference(*arguments[:9], **reading)  # without work


def _attend_chunks_by_kernel(
    q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, window: int | None, pages: Pages | None = None
) -> None:
    prompt_attention._attend_blocks_triton(q, k, v, chunks.blocks, window, pages)


def _embed_by_reference(table: Tensor, tokens: Tensor, first: int, out: Tensor) -> None:
    _EMBED(table.to(out.device), tokens, first, out)


_BY_ROWS = attention.attend_chunks_
_LINEAR, _CUBLAS, _EMBED = linear._linear_triton, linear.linear_reference, embedding.embed_rows_reference
KERNELS: dict[str, EngineKernel] = {
    "embedding": _kernel(
        *(embedding, "embed_rows", "embedding"),
        condition=lambda step, ctx: isinstance(ctx.model.embed, Tensor) and not ctx.model.embed.is_cuda,
        reference=_embed_by_reference,
        exact=True,
    ),
    "residual_norm": _kernel(
        *(residual_norm, "residual_norm", "attn_norm", "ffn_norm", "final_norm"),
        condition=lambda step, ctx: "allreduce" not in step.step or not _fits(step, ctx),
    ),
    "rope_append": _kernel(rope_append, "rope_append", "rope"),
    "decode_attention": EngineKernel(
        *(decode_attention, ("attention",), _paged),
        kernel=decode_attention._decode_attention_triton,
        reference=_attend_by_reference,
        names=((attention, "decode_attention"),),
    ),
    "prompt_attention": EngineKernel(
        *(prompt_attention, ("attention",), _chunks),
        kernel=_attend_chunks_by_kernel,
        reference=_BY_ROWS,
        names=((attention, "attend_chunks_"),),
    ),
    "gated_activation": _kernel(gated_activation, "gated_activation", "activation"),
    "linear": _kernel(
        *(linear, "linear", "attn_qkv", "attn_output", "attn_output_beside", "ffn_up", "ffn_down", "head"),
        condition=_few_rows,
        kernel=_as_the_engine,
        params=SHORT,
    ),
    "argmax": _kernel(argmax, "argmax_rows", "sample", condition=_is_greedy, exact=True, params=GREEDY),
    "draw": _kernel(draw, "draw_rows", "sample", condition=_draws),
    "filter": _kernel(filter, "find_limits", "sample", condition=_asks("draw", "filter"), params=FILTERED),
    "penalty": _kernel(penalty, "penalise_rows", "sample", condition=_asks("penalty"), exact=True, params=ALL),
    "occurrences": _kernel(occurrences, "note_tokens", "sample", condition=_notes, exact=True, params=ALL),
    "logprobs": _kernel(logprobs, "score_rows", "sample", condition=_asks("logprobs"), exact=True, params=ALL),
    # before the pass's first step
    "decode_inputs": _kernel(decode_inputs, "derive_inputs", "embedding", condition=_is_bucket, exact=True),
    "decode_work": _kernel(decode_work, "list_work", "embedding", condition=_paged, exact=True),
    "dequantise": _kernel(dequantise, "dequantise", row=_Dequantise, exact=True, params=SHORT),
    "stored_embedding": _kernel(
        *(stored_embedding, "embed_stored_rows", "embedding"),
        condition=lambda step, ctx: not isinstance(ctx.model.embed, Tensor),
        exact=True,
        params=SHORT,
    ),
    "stored_linear": _kernel(stored_linear, "stored_linear", row=_StoredLinear, params=SHORT),
    "stored_matmul": _kernel(stored_matmul, "stored_matmul", row=_StoredMatmul, params=SHORT),
    "decompress_weights": _kernel(decompress_weights, "decompress_weights", "decompress", exact=True, params=SHORT),
    "push_reduce": EngineKernel(push_reduce, ("embed_allreduce",), _fits),
    "two_step_reduce": EngineKernel(
        two_step_reduce, ("embed_allreduce", "attn_allreduce", "ffn_allreduce"), _fits_shares
    ),
    "reduce_residual_norm": EngineKernel(
        reduce_residual_norm,
        ("attn_allreduce", "ffn_allreduce"),
        lambda step, ctx: step.step.endswith("norm") and _fits(step, ctx),
    ),
}
# of quantised models alone; by a dtype in which they have them
STORED = {
    "dequantise": "float32",
    "stored_embedding": "float32",
    "stored_linear": "float32",
    "stored_matmul": "bfloat16",
}
# one process never launches them: tests/gpu/test_kernel_ranks.py
OVER_RANKS = ("push_reduce", "two_step_reduce", "reduce_residual_norm")
