"""check_numerics finds nothing wrong with the engine, and names layer and step of what is put into it."""

import random
import sys

import pytest
import torch
from oracle.checkpoints import VARIANTS, write_checkpoint
from scripts import check_numerics
from scripts.check_numerics import Row, compare, first_fault

from engine.llm import LLM
from engine.model.steps import model_steps
from engine.runtime.arena import ActivationArena
from faults import ...
from scheduler.plan_build import make_plan

NUM_LAYERS = 3  # of every variant
TOKENS = random.Random(3).choices(range(128), k=40)
RUN = {"max_tokens": 4, "resident": "none", "lanes": "random", "poison": True, "max_num_batched_tokens": 24}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a variant's checkpoint, written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def directory(variant: str) -> str:
        path = folder / variant
        if not path.exists():
            write_checkpoint(path, variant)
        return str(path)

    return directory


def named(rows: list[Row]) -> tuple[int, str] | None:
    first = first_fault(rows)
    return first and (first.layer_idx, first.step)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_differs(checkpoint, variant):
    rows = compare(checkpoint(variant), TOKENS, **RUN)
    assert first_fault(rows) is None
    parallel = variant.startswith("neox") and variant != "neox_serial"
    assert len(rows) == NUM_LAYERS * (10 if parallel else 11) + 3
    assert all(row.bits_equal for row in rows if row.step.endswith("residual"))
    assert 0 < max(row.drift for row in rows) < 1e-5  # zero everywhere: nothing of ours would have been compared


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["llama_gqa", "qwen3", "neox_parallel", "neox_serial"])
def test_nothing_differs_in_half_precision(checkpoint, variant, dtype):
    assert first_fault(compare(checkpoint(variant), TOKENS, dtype, **RUN)) is None


def other_residual(llm: LLM) -> None:
    """GPT-NeoX as if its config said the other value of use_parallel_residual."""
    executor, spec = llm.rank.worker.executor, llm.rank.plan.spec
    spec = replace(spec, parallel_residual=not spec.parallel_residual)
    executor.plan = make_plan(model_steps(spec), executor.plan.ring)
    dtype = executor.arena.dtype
    executor.arena = ActivationArena(executor.plan, spec, dtype, 1, len(TOKENS), len(TOKENS), torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_names_serial_residual(checkpoint, dtype):
    rows = compare(checkpoint("neox_parallel"), TOKENS, dtype, **RUN, mutate=other_residual)
    assert named(rows) == (0, "attn_residual") and "no such step" in first_fault(rows).fault
    assert [row.fault is not None for row in rows[:6]] == [False] * 5 + [False]
    assert {row.layer_idx for row in rows if row.fault and row.step == "ffn_norm"} == {0, 1, 2}


def test_names_parallel_residual(checkpoint):
    rows = compare(checkpoint("neox_serial"), TOKENS, **RUN, mutate=other_residual)
    assert named(rows) == (0, "ffn_norm")
    assert {(row.layer_idx, row.step) for row in rows if row.fault and "our plan has no" in row.fault} == {
        (layer_idx, "attn_residual") for layer_idx in range(NUM_LAYERS)
    }


def other_order(layer_idx: int) -> Mutate:
    """`mlp + (attn + x)` in one layer, where transformers has `(mlp + attn) + x`."""

    def step(instruction, ctx, do) -> None:
        if (instruction.layer_idx, instruction.step) == (layer_idx, "parallel_add"):
            ctx.act["x"].add_(ctx.act["y"])
        else:
            do(instruction)

    return around_steps(step)


@pytest.mark.parametrize("layer_idx", range(NUM_LAYERS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_names_another_order_of_additions(checkpoint, dtype, layer_idx):
    rows = compare(checkpoint("neox_parallel"), TOKENS, dtype, **RUN, mutate=other_order(layer_idx))
    faults = [row for row in rows if row.fault]
    assert [(row.layer_idx, row.step) for row in faults] == [(layer_idx, "ffn_residual")]
    assert "order of additions" in faults[0].fault
    tolerance = check_numerics.TOLERANCES[dtype]
    assert 0 < faults[0].step_error < tolerance, "large enough to be seen without looking at bits"
