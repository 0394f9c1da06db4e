"""What every kernel is held to inside the real engine: hidden states step by step, tokens, and that it ran at all.

A run goes the way of a GPU on any device: fused steps, and decode passes in buckets over the paged cache. Without a
GPU the kernels that a run names go through Triton's interpreter, and their references stand in for all others; on a GPU
all kernels run but those that a run names. What a kernel alone is held to is in kernel_proof.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import ModuleType

import pytest
import torch
from kernel_proof import DEVICE
from torch import Tensor

from engine.kernels import (
    argmax,
    decode_attention,
    decode_inputs,
    decode_weights,
    draw,
    embedding,
    filter,
    gated_activation,
    linear,
    reduce_residual_norm,
    residual_norm,
    rope_append,
)
from engine.llm import LLM
from engine.model import attention
from engine.model.fusion import FUSED_ON_ONE_RANK, fuse
from engine.model.inputs import PagedContext
from engine.model.ops import StepContext
from engine.model.spec import ModelSpec
from engine.model.steps import activation_bytes, activation_widths, model_steps
from engine.runtime.arena import ActivationArena
from engine.runtime.decode import DecodePasses
from engine.runtime.executor import Executor
from parallel import push_reduce
from scheduler.plan_build import make_plan
from scheduler.plan_check import lay_out_activations
from scheduler.request import SamplingParams
from scheduler.step_plan import Compute, Decode, Instruction

Condition = Callable[[Compute, StepContext], bool]
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=1.5, seed=3)  # tokens differ from each other, and hang on every logit
FILTERED = replace(DRAWN, top_p=0.8)
SHORT = replace(DRAWN, max_tokens=2)  # of kernels that take seconds where they are interpreted
PROMPT = [5, 17, 3, 99, 42, 8]


@dataclass(frozen=True)
class EngineKernel:
    """A kernel's place in the engine. `kernel` and `reference` have one signature, and the engine finds them by
    `names`; a reference of None is other kernels or a library. Each step with a part of `steps` in its name calls the
    kernel once, where `condition` holds. `exact`: the reference's very bits."""

    module: ModuleType  # whose `calls` count
    steps: tuple[str, ...]
    condition: Condition = lambda step, ctx: True
    kernel: Callable | None = None
    reference: Callable | None = None
    names: tuple[tuple[ModuleType, str], ...] = ()
    exact: bool = False
    params: SamplingParams = DRAWN  # of a request that takes it

    def calls_at(self, instruction: Instruction, executor: Executor) -> int:
        """How often the instruction, as it is about to run, has to call the kernel."""
        if isinstance(instruction, Decode):
            weights = executor.coded[instruction.group].code.weights if "decode" in self.steps else ()
            return sum(not weight.code.raw for weight in weights)
        if not isinstance(instruction, Compute) or not set(self.steps) & set(instruction.step.split("+")):
            return 0
        return int(self.condition(instruction, executor.context))

    def put_in(self, patch: pytest.MonkeyPatch, run: Callable) -> None:
        """The engine calls `run` wherever it would have called the kernel or its reference."""
        for module, name in self.names:
            patch.setattr(module, name, run)


def _kernel(module: ModuleType, stem: str, *steps: str, **rest) -> EngineKernel:
    """Of a module that chooses by device between _STEM_triton and STEM_reference."""
    names = (f"_{stem}_triton", f"{stem}_reference")
    ways = dict(zip(("kernel", "reference"), (getattr(module, name) for name in names)))
    return EngineKernel(module, steps, **{**ways, "names": tuple((module, name) for name in names), **rest})


def _paged(step: Compute, ctx: StepContext) -> bool:
    return isinstance(ctx.inputs.context, PagedContext)


def _few_rows(step: Compute, ctx: StepContext) -> bool:
    return len(ctx.act["rows"] if "head" in step.step else ctx.inputs.tokens) == 1


def _is_greedy(step: Compute, ctx: StepContext) -> bool:
    return bool(ctx.inputs.sampled_rows) and "draw" not in ctx.asked.stages


def _asks(*stages: str) -> Condition:
    return lambda step, ctx: bool(ctx.inputs.sampled_rows) and ctx.asked.stages >= {*stages}


def _fits(step: Compute, ctx: StepContext) -> bool:
    return ctx.collectives.size > 1 and push_reduce.fits_rows(ctx.act["x"])


def _on_few_rows(x: Tensor, *rest) -> None:
    (_LINEAR if 1 <= len(x) <= linear.SMALL_T else _CUBLAS)(x, *rest)


def _attend_by_reference(*arguments) -> None:
    decode_attention.decode_attention_reference(*arguments[:9])  # without workspace and segments


def _embed_by_reference(table: Tensor, tokens: Tensor, first: int, out: Tensor) -> None:
    _EMBED(table.to(out.device), tokens, first, out)


_LINEAR, _CUBLAS, _EMBED = linear._linear_triton, linear.linear_reference, embedding.embed_rows_reference
KERNELS: dict[str, EngineKernel] = {
    "embedding": _kernel(
        *(embedding, "embed_rows", "embedding"),
        condition=lambda step, ctx: not ctx.embed.is_cuda,
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
        kernel=decode_attention.decode_attention,
        reference=_attend_by_reference,
        names=((attention, "decode_attention"),),
    ),
    "gated_activation": _kernel(gated_activation, "gated_activation", "activation"),
    "linear": _kernel(
        *(linear, "linear", "attn_qkv", "attn_output", "attn_output_beside", "ffn_up", "ffn_down", "head"),
        condition=_few_rows,
        kernel=_on_few_rows,
        params=SHORT,
    ),
    "argmax": _kernel(argmax, "argmax_rows", "sample", condition=_is_greedy, exact=True, params=GREEDY),
    "draw": _kernel(draw, "draw_rows", "sample", condition=_asks("draw")),
    "filter": _kernel(filter, "find_limits", "sample", condition=_asks("draw", "filter"), params=FILTERED),
    # before the pass's first step
    "decode_inputs": _kernel(decode_inputs, "derive_inputs", "embedding", condition=_paged, exact=True),
    "decode_weights": _kernel(decode_weights, "decode_weights", "decode", exact=True, params=SHORT),
    "push_reduce": EngineKernel(push_reduce, ("embed_allreduce",), _fits),
    "reduce_residual_norm": EngineKernel(
        reduce_residual_norm,
        ("attn_allreduce", "ffn_allreduce"),
        lambda step, ctx: step.step.endswith("norm") and _fits(step, ctx),
    ),
}


@dataclass
class Run:
    """`states`: what each step wrote, in order; `due`: calls that the steps which ran had to make; `made`: the rise of
    each kernel's counters, by kernel and kind."""

    tokens: list[int] = field(default_factory=list)
    states: list[tuple[Compute, str, Tensor]] = field(default_factory=list)
    due: Counter = field(default_factory=Counter)
    made: dict[str, Counter] = field(default_factory=dict)


def run_with(model: str, *replaced: str, params: SamplingParams = DRAWN, **options) -> Run:
    """Generates with the `replaced` kernels as the other ones are not: see above. `options` are LLM's."""
    with pytest.MonkeyPatch.context() as patch, LLM(model, device=DEVICE, enforce_eager=True, **options) as llm:
        if DEVICE == "cpu":
            as_on_a_gpu(llm)
        for name, kernel in KERNELS.items():
            if kernel.names and (DEVICE == "cpu") != (name in replaced):
                kernel.put_in(patch, kernel.reference)
            elif DEVICE == "cpu" and kernel.names:
                kernel.put_in(patch, kernel.kernel)
        return watched(llm, PROMPT, params)


def watched(llm: LLM, prompt: list[int], params: SamplingParams, states: bool = True) -> Run:
    run, before = Run(), {name: Counter(kernel.module.calls) for name, kernel in KERNELS.items()}
    watch(llm, run, states)
    run.tokens = llm.generate([prompt], params)[0].outputs[0].token_ids
    run.made = {name: Counter(kernel.module.calls) for name, kernel in KERNELS.items()}
    for name, old in before.items():
        run.made[name].subtract(old)
    return run


def watch(llm: LLM, run: Run, states: bool) -> None:
    """Notes in `run` what every instruction has to call and, with `states`, what it writes. A captured pass runs its
    instructions when it is captured, not when it is replayed."""
    executor = llm.rank.worker.executor
    do = executor.do

    def noted(instruction: Instruction) -> None:
        for name, kernel in KERNELS.items():
            run.due[name] += kernel.calls_at(instruction, executor)
        do(instruction)
        if states and isinstance(instruction, Compute):
            for name, effect in instruction.effects:
                if "x" not in effect and set(effect) & set("+w"):
                    run.states.append((instruction, name, executor.context.act[name].cpu().clone()))

    executor.do = noted


def as_on_a_gpu(llm: LLM) -> None:
    """A CPU's engine fuses steps as a GPU's does, and decodes in padded buckets over the paged cache."""
    executor, spec = llm.rank.worker.executor, llm.rank.plan.spec
    run_steps(llm, spec, fuse(model_steps(spec), FUSED_ON_ONE_RANK))
    limits = (llm.config.max_num_seqs, llm.rank.plan.residency.max_model_len)
    executor.decode = DecodePasses(executor, *limits, use_graphs=False)


def run_steps(llm: LLM, spec: ModelSpec, steps: list[Compute]) -> None:
    """The engine runs these steps from now on, in an arena laid out for them."""
    executor, config = llm.rank.worker.executor, llm.config
    decoded = {group.group: group.nbytes for group in llm.rank.plan.layout.groups if group.group in executor.coded}
    executor.plan = make_plan(steps, executor.plan.ring, decoded)
    dtype, device = executor.arena.dtype, executor.arena.data.device
    most = (config.max_num_batched_tokens, config.max_num_seqs)
    sizes = activation_bytes(spec, str(dtype).removeprefix("torch."), 1, *most)
    offsets = lay_out_activations(executor.plan, sizes)
    nbytes = max(offset + sizes[name] for name, offset in offsets.items())
    executor.arena = ActivationArena(offsets, nbytes, activation_widths(spec, 1), dtype, device)


def first_difference(run: Run, other: Run, tolerance: float) -> str | None:
    """The first step whose result differs by more than `tolerance`, as a share of the largest value; 0.0: any bit."""
    assert [(step, name) for step, name, _ in run.states] == [(step, name) for step, name, _ in other.states]
    for (step, name, state), (*_, theirs) in zip(run.states, other.states):
        if torch.equal(state, theirs):
            continue
        error = float((state.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        if not error <= tolerance:
            return f"layer {step.layer_idx}, {step.step}: {name} differs by {error:.2g}"
    return None


def prove_states_and_tokens(run: Run, other: Run, tolerance: float) -> None:
    assert first_difference(run, other, tolerance) is None
    assert run.tokens == other.tokens


def prove_calls(run: Run, names: Iterable[str]) -> None:
    """Each kernel was called by every step that had to, and never gave way to its reference there."""
    for name in names:
        due, made = run.due[name], run.made[name]
        assert due > 0, f"{name}: no step that ran has to call it"
        assert made["triton"] == due, f"{name}: {made['triton']} of {due} calls"
        assert name == "linear" or made["reference"] == 0, f"{name}: {made['reference']} calls of the reference"
