"""The checks of every kernel inside the real engine: hidden states step by step, tokens, and that it ran at all.

A run goes the way of a GPU on any device: fused steps, and decode passes in buckets over the paged cache. Without a
GPU the kernels that a run names go through Triton's interpreter, and their references stand in for all others; on a GPU
all kernels run but those that a run names. What a kernel alone is held to is in kernel_proof.py.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
import torch
from penstock.engine.compute.arena import ActivationArena
from penstock.engine.compute.context import PassContext
from penstock.engine.llm import LLM
from penstock.engine.model.spec import ModelSpec
from penstock.engine.model.steps import activation_bytes, activation_widths
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.build import make_plan
from penstock.scheduler.passes.check import lay_out_activations
from penstock.scheduler.passes.pass_plan import Compute, Instruction
from torch import Tensor

from tests.support.kernel_proof import DEVICE
from tests.support.kernel_registry import DRAWN, KERNELS
from tests.support.rounding import model_apart
from tests.support.watches import Around

AS_ON_GPU = {"as_on_gpu": DEVICE == "cpu"}
PROMPT = [5, 17, 3, 99, 42, 8]


@dataclass
class Run:
    """A run of the engine. `states` are what each step wrote, in order, `due` the calls that the steps which ran had to
    make, `made` the rise of each kernel's counters, by kernel and kind."""

    spec: ModelSpec
    tokens: list[int] = field(default_factory=list)
    states: list[tuple[Compute, str, Tensor]] = field(default_factory=list)
    due: Counter = field(default_factory=Counter)
    made: dict[str, Counter] = field(default_factory=dict)


def run_with(model: str, *replaced: str, params: SamplingParams = DRAWN, **options) -> Run:
    """Generates with the `replaced` kernels as the other ones are not: see above. `options` are LLM's."""
    options |= {"device": DEVICE, "enforce_eager": True, "debug": AS_ON_GPU}
    with pytest.MonkeyPatch.context() as patch, LLM(model, **options) as llm:
        for name, kernel in KERNELS.items():
            if kernel.names and (DEVICE == "cpu") != (name in replaced):
                kernel.put_in(patch, kernel.reference)
            elif DEVICE == "cpu" and kernel.names:
                kernel.put_in(patch, kernel.kernel)
        return watched(llm, PROMPT, params)


def watched(llm: LLM, prompt: list[int], params: SamplingParams, states: bool = True) -> Run:
    run, before = Run(llm.engine.plan.spec), {name: Counter(kernel.module.calls) for name, kernel in KERNELS.items()}
    watch(llm, run, states)
    run.tokens = llm.generate([prompt], params)[0].outputs[0].token_ids
    run.made = {name: Counter(kernel.module.calls) for name, kernel in KERNELS.items()}
    for name, old in before.items():
        run.made[name].subtract(old)
    return run


def watch(llm: LLM, run: Run, states: bool) -> None:
    """Notes in `run` what every instruction has to call and, with `states`, what it writes. A captured pass runs its
    instructions when it is captured, not when it is replayed."""
    executor = llm.engine.worker.executor

    def noted(instruction: Instruction, ctx: PassContext | None, do: Callable[[], None]) -> None:
        for name, kernel in KERNELS.items():
            run.due[name] += kernel.calls_at(instruction, ctx, executor)
        do()
        if states and isinstance(instruction, Compute):
            for name, effect in instruction.effects:
                if "x" not in effect and set(effect) & set("+w"):
                    run.states.append((instruction, name, ctx.act[name].cpu().clone()))

    llm.engine.watches.add(Around(noted))


def run_steps(llm: LLM, spec: ModelSpec, steps: list[Compute]) -> None:
    """Makes the engine run these steps from now on, in an arena laid out for them."""
    executor, plan = llm.engine.worker.executor, llm.engine.plan
    compressed = {group.id: group.nbytes for group in plan.layout.groups if group.id in executor.compressed}
    executor.pass_plan = make_plan(steps, executor.pass_plan.ring, compressed)
    dtype, device = executor.arena.dtype, executor.arena.data.device
    most = (plan.max_num_batched_tokens, plan.max_num_seqs)
    sizes = activation_bytes(spec, str(dtype).removeprefix("torch."), 1, *most)
    offsets = lay_out_activations(executor.pass_plan, sizes)
    nbytes = max(offset + sizes[name] for name, offset in offsets.items())
    executor.arena = ActivationArena(offsets, nbytes, activation_widths(spec, 1), *most, dtype, device)


def apart(run: Run, dtype: str = "float32") -> float:
    """Says how far its states may be from those of a run that adds up in another order, as a share of the largest
    value."""
    return model_apart(run.spec, len(PROMPT) + len(run.tokens), getattr(torch, dtype))


def first_difference(run: Run, other: Run, bound: float) -> str | None:
    """The first step whose result differs by more than `bound`, as a share of the largest value; 0.0: any bit."""
    assert [(step, name) for step, name, _ in run.states] == [(step, name) for step, name, _ in other.states]
    for (step, name, state), (*_, theirs) in zip(run.states, other.states):
        if torch.equal(state, theirs):
            continue
        error = float((state.double() - theirs.double()).abs().max() / theirs.double().abs().max())
        if not error <= bound:
            return f"layer {step.layer_idx}, {step.step}: {name} differs by {error:.2g}"
    return None


def prove_states_and_tokens(run: Run, other: Run, bound: float) -> None:
    assert first_difference(run, other, bound) is None
    assert run.tokens == other.tokens


def prove_calls(run: Run, names: Iterable[str]) -> None:
    """Asserts that each kernel was called by every step that had to, and never gave way to its reference there."""
    for name in names:
        due, made = run.due[name], run.made[name]
        assert due > 0, f"{name}: no step that ran has to call it"
        assert made["triton"] == due, f"{name}: {made['triton']} of {due} calls"
        assert name == "linear" or made["reference"] == 0, f"{name}: {made['reference']} calls of the reference"
