"""Decode passes as a GPU has them, over the same buckets, tables, arena and mailbox, on a CPU: what padding holds never
reaches a real row."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from penstock.engine.compute.arena import ActivationArena
from penstock.engine.compute.context import PassContext
from penstock.engine.llm import LLM
from penstock.engine.runtime.pass_runner import PassRunner, RunAs
from penstock.engine.runtime.watch import Watch
from penstock.scheduler.batching.batch import Batch, is_decode
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.pass_plan import Compute, Instruction
from torch import Tensor

from tests.support.oracle.checkpoints import write_checkpoints

VARIANTS = ("qwen3", "neox_parallel")
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OPTIONS = {"device": "cpu", "dtype": "float32", "page_size": 4, "max_model_len": 32, "debug": {"poison": True}}
AS_ON_GPU = OPTIONS | {"debug": {"poison": True, "as_on_gpu": True}}
LARGE = 1e30  # in logits, whose NaN is refused in any row
FILLS = ((float("nan"), 0), (-3.0, 77))  # of padded rows: their activations, and their token


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"), VARIANTS, **TINY)


@dataclass
class Filling(Watch):
    """Fills the padded rows of an engine's decode passes with `value`, whatever a step has made of them, and their
    inputs with `token`; without a value they keep what they have. `logits` are those of the real rows, pass by pass;
    `sizes` are the real and all rows of each."""

    value: float | None = None
    token: int = 0
    logits: list[Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    num_rows: int | None = None  # of the decode pass that runs

    def begin_pass(self, batch: Batch | None) -> None:
        self.num_rows = len(batch.rows) if batch is not None and is_decode(batch) else None

    def around(self, instruction: Instruction, ctx: PassContext | None, run: Callable[[], None]) -> None:
        if self.num_rows is None or not isinstance(instruction, Compute):
            return run()
        if instruction.step == "embedding":
            self.sizes.append((self.num_rows, len(ctx.inputs.tokens)))
            self.fill_inputs(ctx)
        run()
        for name, effect in instruction.effects:
            if "x" not in effect and set(effect) & set("+w"):
                if self.value is not None:
                    ctx.act[name][self.num_rows :] = LARGE if name == "logits" else self.value
                if name == "logits":
                    self.logits.append(ctx.act[name][: self.num_rows].clone())

    def fill_inputs(self, ctx: PassContext) -> None:
        if self.value is None:
            return
        inputs, sampler, kv = ctx.inputs, ctx.model.sampler, ctx.model.kv
        for values in (inputs.tokens, inputs.sampled_positions):
            values[self.num_rows :] = self.token
        sampler.last_tokens[sampler.pad_row] = self.token
        kv.data[:, :, : kv.page_size] = self.value
        inputs.context.work.partials.fill_(self.value)


def asked_for(num_prompts: int, seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and outputs of several lengths, so that rows come and go; greedy, drawn and filtered."""
    rng = random.Random(seed)
    prompts = [rng.choices(range(128), k=rng.randint(1, 4)) for _ in range(num_prompts)]
    ways = ({"temperature": 0}, {"temperature": 1.0, "seed": seed}, {"temperature": 0.8, "top_p": 0.9, "seed": seed})
    lengths = [rng.randint(4, 9) for _ in prompts]
    return prompts, [SamplingParams(max_tokens=n, ignore_eos=True, **rng.choice(ways)) for n in lengths]


def tokens_of(llm: LLM, asked: tuple) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(*asked)]


@pytest.mark.tolerance
@settings(max_examples=12, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    max_num_seqs=st.integers(1, 12),
    budget=st.integers(1, 24),
    num_prompts=st.integers(1, 14),
    resident=st.sampled_from(["all", "none", 0.5]),
    seed=st.integers(0, 99),
)
@example(variant="qwen3", max_num_seqs=8, budget=5, num_prompts=7, resident="all", seed=0)
@example(variant="qwen3", max_num_seqs=8, budget=7, num_prompts=7, resident="none", seed=0)
@example(variant="neox_parallel", max_num_seqs=12, budget=12, num_prompts=11, resident="none", seed=1)
def test_what_padding_holds_never_reaches_a_real_row(
    checkpoints, variant, max_num_seqs, budget, num_prompts, resident, seed
):
    """Logits keep their bits, and tokens are those of passes without padding; or the budget is refused."""
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget, "resident": resident}
    model = str(checkpoints / variant)
    try:
        llm = LLM(model, **OPTIONS | limits)
    except ValueError as refused:
        assert budget < max_num_seqs and "max_num_batched_tokens" in str(refused) and "max_num_seqs" in str(refused)
        return
    with llm:
        asked = asked_for(num_prompts, seed)
        unpadded = tokens_of(llm, asked)
    with LLM(model, **AS_ON_GPU | limits) as llm:
        plain = Filling()
        with llm.engine.watched_by(plain):
            assert tokens_of(llm, asked) == unpadded
        assert len(plain.logits) > 0
        for value, token in FILLS:
            filled = Filling(value, token)
            with llm.engine.watched_by(filled):
                assert tokens_of(llm, asked) == unpadded
            pairs = zip(plain.logits, filled.logits, strict=True)
            assert all(torch.equal(first, second) for first, second in pairs)


def test_padding_was_there(checkpoints):
    """The cases of the property do happen: fewer rows than their bucket, with padded rows filled as intended."""
    with LLM(str(checkpoints / "qwen3"), max_num_seqs=8, max_num_batched_tokens=32, **AS_ON_GPU) as llm:
        filling = Filling(*FILLS[0])
        with llm.engine.watched_by(filling):
            tokens_of(llm, asked_for(7, seed=0))
        assert (7, 8) in filling.sizes
        buckets = llm.engine.worker.runner.buckets
        assert {size.num_tokens for size in buckets if not size.num_chunks} == {size for _, size in filling.sizes}


def arena(most_tokens: int = 6, most_rows: int = 2, nbytes: int = 256 + 128) -> ActivationArena:
    """x (T, 8) and logits (N, 16) float32 behind it."""
    widths = {"x": ("tokens", 8), "logits": ("rows", 16)}
    where = {"x": 0, "logits": 256}
    return ActivationArena(where, nbytes, widths, most_tokens, most_rows, torch.float32, torch.device("cpu"))


def test_an_activation_is_never_cut_longer_than_it_was_planned():
    """Nothing is written to the gap behind it, or further on in the arena."""
    made = arena()
    views = made.cut(6, 2)
    assert views["x"].shape == (6, 8) and views["logits"].shape == (2, 16)
    views["x"].fill_(1.0)
    views["logits"].fill_(2.0)
    assert made.cut(6, 2)["x"].eq(1.0).all()
    with pytest.raises(AssertionError, match="^7 tokens, and the arena has room for 6"):
        made.cut(7, 2)
    with pytest.raises(AssertionError, match="^3 rows, and the arena has room for 2"):
        made.cut(6, 3)


def test_an_arena_holds_what_it_was_planned_for():
    with pytest.raises(AssertionError, match="^logits was planned for fewer rows"):
        arena(nbytes=256 + 127)


def test_a_bucket_is_never_larger_than_the_activations(checkpoints):
    with LLM(str(checkpoints / "qwen3"), max_num_seqs=4, max_num_batched_tokens=6, **OPTIONS) as llm:
        executor = llm.engine.worker.executor
        PassRunner(executor, RunAs.PADDED, 4, 32)
        for most in (5, 7):
            with pytest.raises(AssertionError, match="a bucket would be larger than the activations"):
                PassRunner(executor, RunAs.PADDED, most, 32)
