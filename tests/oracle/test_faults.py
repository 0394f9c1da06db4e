"""The comparison of logits with transformers, by which the engine is judged, fails for every fault put into the engine.

A fault must move the logits by LOUD times what another order of sums may, or be refused as NaN; without it the very
same run passes. What each fault does is said in faults.py.
"""

import math
import random

import pytest
import torch
from penstock.engine.compute.context import PassContext
from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.engine.runtime.watch import Watch
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.build import minimum_ring_bytes
from penstock.scheduler.passes.pass_plan import GroupId, Instruction

from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.oracle.compare import apart
from tests.support.oracle.faults import (
    Fault,
    early_read,
    early_write,
    half_lost,
    head_dropped,
    kv_heads_rolled,
    lost_reduce,
    rope_shifted,
    skipped_prefetch,
    stale_layer,
)
from tests.support.rounding import LOUD, assert_apart
from tests.support.watches import After

VARIANTS = ("llama_gqa", "qwen3", "neox_parallel")
PROMPT = random.Random(5).choices(range(128), k=40)
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
OPTIONS = {"device": "cpu", "dtype": "float32", "resident": "none", "max_num_batched_tokens": 24, "max_num_seqs": 4}
ATTN, FFN, HEAD = GroupId(1, "attn"), GroupId(1, "ffn"), GroupId(3, "head")
FAULTS: dict[str, Fault] = {
    "stale attn": stale_layer(ATTN, GroupId(0, "attn")),
    "stale ffn": stale_layer(FFN, GroupId(2, "ffn")),
    "attn not copied": skipped_prefetch(ATTN),
    "ffn not copied": skipped_prefetch(FFN),
    "next pass not copied": skipped_prefetch(GroupId(0, "attn")),
    "head not copied": skipped_prefetch(HEAD),
    "half of o lost": half_lost(1, "o"),
    "half of down lost": half_lost(1, "down"),
    "a head dropped": head_dropped(1),
    "KV heads rolled": kv_heads_rolled(1),
    "q off by one": rope_shifted("q", 1),
    "q off by one everywhere": rope_shifted("q"),
    "later passes off by one": rope_shifted("later"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directory and the transformers model of a variant, made once."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(variant: str):
        if variant not in made:
            made[variant] = str(folder / variant), write_checkpoint(folder / variant, variant)
        return made[variant]

    return get


def logits_of(llm: LLM) -> tuple[torch.Tensor, list[int]]:
    """The logits of every sampled token (n, vocab), and the tokens. Raises ValueError if they were refused as NaN."""
    logits: list[torch.Tensor] = []

    def capture(instruction: Instruction, ctx: PassContext | None) -> None:
        if getattr(instruction, "step", None) == "logits_gather":
            logits.append(ctx.act["logits"][:, : llm.engine.plan.spec.vocab_size].clone())

    with llm.engine.watched_by(After(capture)):
        tokens = without_errors(llm.generate([PROMPT], GREEDY))[0].outputs[0].token_ids
    return torch.cat(logits), tokens


@torch.inference_mode()
def error_of(llm: LLM, reference) -> float:
    """The error max|difference| / max|logit| against transformers over the sequence that the engine itself made, as a
    multiple of the one that another order of sums may make; inf where the engine refuses its own logits as NaN."""
    try:
        ours, tokens = logits_of(llm)
    except ValueError as error:
        assert "the logits are NaN" in str(error)
        return math.inf
    theirs = reference(torch.tensor([PROMPT + tokens[:-1]])).logits[0, -len(ours) :]
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    return error / apart(reference, len(PROMPT + tokens))


def run(model, fault: Fault | None = None, **options) -> float:
    directory, reference = model
    with LLM(directory, **OPTIONS | options) as llm:
        if fault is not None:
            fault(llm)
        return error_of(llm, reference)


@pytest.fixture(scope="module")
def plain(models):
    """The error of a variant without a fault, of which no bit depends on the ring or on the order of the lanes."""
    found = {}

    def get(variant: str) -> float:
        if variant not in found:
            found[variant] = run(models(variant))
        return found[variant]

    return get


@pytest.mark.tolerance
@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_without_a_fault(plain, variant):
    assert_apart(plain(variant), 1.0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fails_with_a_fault(models, variant, fault):
    assert run(models(variant), FAULTS[fault]) > LOUD


@pytest.mark.tolerance
def test_a_rotation_of_everything_is_no_fault(models):
    """Shifts all positions, which moves nothing: off by one is to be looked for between queries and keys."""
    assert_apart(run(models("llama_gqa"), rope_shifted("all")), 1.0)


@pytest.fixture(scope="module")
def smallest_ring(models):
    """Bytes of a ring with room for one group, so that every slot is another group's a moment later."""

    def ring_bytes(variant: str) -> int:
        with LLM(models(variant)[0], **OPTIONS) as llm:
            return minimum_ring_bytes(llm.engine.plan.residency.streamed)

    return ring_bytes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [ATTN, FFN, HEAD], ids=str)
@pytest.mark.parametrize("lanes", ["latest", "random"])
def test_slot_read_early(models, plain, smallest_ring, variant, group, lanes):
    """Drops a wait: stale bytes show it, and beyond doubt where freed slots are poisoned. Copies that are always early
    hide it; the other orders of the lanes show it."""
    ring, poisoned = smallest_ring(variant), {"lanes": lanes, "poison": True}
    assert run(models(variant), ring=ring, debug=poisoned) == plain(variant)
    assert run(models(variant), early_read(group), ring=ring, debug={"lanes": lanes}) > LOUD
    assert run(models(variant), early_read(group), ring=ring, debug=poisoned) == math.inf
    early = poisoned | {"lanes": "earliest"}
    assert run(models(variant), early_read(group), ring=ring, debug=early) == plain(variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [ATTN, FFN, GroupId(2, "ffn")], ids=str)
@pytest.mark.parametrize("lanes", ["latest", "random"])
def test_slot_read_early_in_the_usual_ring(models, variant, group, lanes):
    """Tries a few orders at random, since one may be harmless."""
    poisoned = {"lanes": lanes, "poison": True}
    errors = (run(models(variant), early_read(group), debug=poisoned, seed=seed) for seed in range(4))
    assert math.inf in errors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lanes", ["earliest", "random"])
def test_slot_written_early(models, plain, smallest_ring, variant, lanes):
    """Copies the next group over the one that is being read."""
    ring = smallest_ring(variant)
    assert run(models(variant), early_write(FFN), ring=ring, debug={"lanes": lanes}) > LOUD
    assert run(models(variant), early_write(FFN), ring=ring, debug={"lanes": "latest"}) == plain(variant)


@pytest.fixture(scope="module")
def two_ranks(models):
    directory, reference = models("llama_gqa")
    with LLM(directory, **OPTIONS, tensor_parallel_size=2) as llm:
        yield llm, reference


NOTHING_LOST = pytest.param(None, marks=pytest.mark.tolerance)


@pytest.mark.parametrize(
    "lost", [NOTHING_LOST, ("embed_allreduce", -1), ("attn_allreduce", 1), ("ffn_allreduce", 2)], ids=str
)
def test_missing_reduce_on_one_rank(two_ranks, lost):
    """Loses on rank 0 the other rank's half of an o or down projection, or of the embedding."""
    llm, reference = two_ranks
    with llm.engine.watched_by(lost_reduce(*lost) if lost else Watch()):
        error = error_of(llm, reference)
    assert error > LOUD if lost else error <= 1
