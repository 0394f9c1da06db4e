"""Streamed == resident in every bit, whatever the residency, the ring, the order of the lanes or the KV pages; and
the counters show what was copied, so that nothing passes because nothing streamed."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from penstock.engine.compute.context import PassContext
from penstock.engine.llm import LLM
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.pass_plan import Compute, Instruction, Prefetch

from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.streaming_runs import OPTIONS, PROMPTS, RINGS, Run, generate, ring_bytes
from tests.support.watches import Around, BeginPass

MODELS = ("llama_gqa", "llama_tied", "neox_parallel", "neox_serial")
RESIDENCIES = ("none", 0.3, 0.5, 0.8)
LANES = [("earliest", 0), ("latest", 0), *(("random", seed) for seed in range(2))]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def in_order(lanes: str) -> dict[str, Any]:
    return OPTIONS | {"debug": {"lanes": lanes, "poison": True}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a variant's checkpoint, written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def directory(variant: str) -> str:
        if not (folder / variant).exists():
            write_checkpoint(folder / variant, variant)
        return str(folder / variant)

    return directory


@pytest.fixture(scope="module")
def resident(checkpoint):
    """The run that all others must equal: everything resident."""
    runs: dict[str, Run] = {}

    def run(variant: str) -> Run:
        if variant not in runs:
            with LLM(checkpoint(variant), resident="all", **OPTIONS) as llm:
                runs[variant] = generate(llm)
                assert llm.engine.ledger == TransferLedger() and not llm.engine.plan.residency.streamed
        return runs[variant]

    return run


def assert_copied(llm: LLM, num_prologues: int = 1) -> None:
    """Every streamed group crossed once a pass, the first ones once more for each time the ring was filled anew; and
    that is all that one rank moves."""
    plan, num_passes = llm.engine.plan.residency, llm.engine.worker.executor.counters.num_passes
    predicted = TransferLedger()
    for index, (group, nbytes) in enumerate(plan.streamed):
        for _ in range(num_passes + (num_prologues if index < plan.ring.num_wrapped else 0)):
            predicted.add(Site(group.name, group.layer_idx), nbytes)
    assert predicted.total.sent_bytes > 0 and llm.engine.ledger == predicted
    assert llm.engine.worker.executor.copied == predicted


FEW = [("none", "minimum"), ("none", "default"), (0.5, "between")]
STREAMED = [
    *itertools.product(MODELS[:1], RESIDENCIES, RINGS),
    *((model, *one) for model in MODELS[1:] for one in FEW),
    *(
        pytest.param(MODELS[1], *one, marks=pytest.mark.soak)
        for one in itertools.product(RESIDENCIES, RINGS)
        if one not in FEW
    ),
]


@pytest.mark.parametrize("variant, residency, ring", STREAMED)
def test_streamed_equals_resident(checkpoint, resident, variant, residency, ring):
    model = checkpoint(variant)
    ring_size = ring_bytes(model, ring, residency)
    for lanes, seed in LANES:
        with LLM(model, resident=residency, ring=ring_size, seed=seed, **in_order(lanes)) as llm:
            assert generate(llm).same_bits(resident(variant)), (lanes, seed)
            assert_copied(llm)
            assert len(llm.engine.worker.executor.ring) == ring_size
            assert (llm.engine.worker.weights.resident_bytes > 0) == (residency != "none")


def test_rings_differ(checkpoint):
    """The smallest ring lets nothing overlap; the largest holds everything at once."""
    sizes = [ring_bytes(checkpoint("llama_gqa"), ring, "none") for ring in RINGS]
    assert sizes == sorted(set(sizes))


def test_demo_model_streamed():
    with LLM("demo", resident="all", **OPTIONS) as llm:
        expected = generate(llm)
    with LLM("demo", resident="none", **in_order("random")) as llm:
        assert generate(llm).same_bits(expected)
        assert_copied(llm)


@pytest.mark.parametrize("residency", ["all", "none"])
def test_page_order(checkpoint, resident, residency):
    runs = [resident("llama_gqa")]
    for seed in range(3):
        options = OPTIONS | {"page_size": 4, "debug": {"page_order_seed": seed, "poison": True}}
        with LLM(checkpoint("llama_gqa"), resident=residency, **options) as llm:
            runs.append(generate(llm))
            llm.loop.scheduler.check_integrity()
    assert all(run.same_bits(runs[0]) for run in runs)
    for one, other in itertools.combinations(runs, 2):
        assert any(a.tolist() != b.tolist() for a, b in zip(one.addresses, other.addresses)), "the pages lay alike"


@pytest.mark.parametrize("residency", ["all", "none"])
def test_batch_of_four_page_pools(checkpoint, residency):
    generator = random.Random(7)
    prompts = [generator.choices(range(128), k=generator.randrange(17, 25)) for _ in range(16)]  # 2 pages each
    options = OPTIONS | {"max_num_seqs": 16}
    with LLM(checkpoint("llama_gqa"), resident=residency, num_pages=1 + 8, **options) as llm:
        running = []
        schedule = llm.loop.scheduler.schedule

        def watched():
            batch = schedule()
            running.append(llm.loop.scheduler.num_running)
            llm.loop.scheduler.check_integrity()
            return batch

        llm.loop.scheduler.schedule = watched
        together = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
        assert max(running) == 4 and llm.loop.scheduler.num_free_pages == 8
        alone = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    assert together == alone and all(len(tokens) == 8 for tokens in together)


def test_passes_of_any_kind_follow_each_other(checkpoint, resident):
    """Chunks, mixed passes and decodes, of one request or several, on one filling of the ring."""
    expected = resident("llama_gqa")
    with LLM(checkpoint("llama_gqa"), resident=0.3, **in_order("random")) as llm:
        shapes = []
        note = BeginPass(lambda batch: shapes.append((batch.num_tokens, len(batch.rows), batch.num_sampled)))
        llm.engine.watches.add(note)
        for prompt in (PROMPTS[0], PROMPTS[2], PROMPTS[1][:1]):
            assert generate(llm).same_bits(expected)
            llm.generate([prompt], GREEDY)
        assert_copied(llm)
    kinds = {(tokens > rows, rows > 1, sampled < rows) for tokens, rows, sampled in shapes}
    assert {(False, False, False), (False, True, False), (True, False, False), (True, True, True)} <= kinds


def is_step(step: str, layer_idx: int):
    return lambda i: isinstance(i, Compute) and (i.step, i.layer_idx) == (step, layer_idx)


def is_copy(layer_idx: int, wrapped: bool):
    return lambda i: isinstance(i, Prefetch) and (i.group.layer_idx, i.wrapped) == (layer_idx, wrapped)


@pytest.mark.parametrize("num_pass", [1, 3])
@pytest.mark.parametrize("ring", ["minimum", "default"])
@pytest.mark.parametrize(
    "where",
    [is_step("ffn_down", 1), is_step("sample", 3), is_copy(2, False), is_copy(0, True)],
    ids=["ffn_down", "sample", "copy", "copy for the next pass"],
)
def test_after_an_exception(checkpoint, resident, where, ring, num_pass):
    """The pass leaves the ring in some state: it is filled anew, and the outputs are the same."""
    model = checkpoint("llama_gqa")
    options = {"ring": ring_bytes(model, ring, "none"), "resident": "none", **in_order("latest")}
    with LLM(model, **options) as llm:
        executor = llm.engine.worker.executor

        def broken(instruction: Instruction, ctx: PassContext | None, do: Callable[[], None]) -> None:
            if executor.counters.num_passes + 1 == num_pass and where(instruction):
                raise OSError("injected")
            do()

        with llm.engine.watched_by(Around(broken)), pytest.raises(OSError, match="injected"):
            generate(llm)
        llm.loop.scheduler.check_integrity()
        assert not llm.loop.scheduler.has_unfinished and not executor.ring_is_filled
        executor.ledger.clear()
        executor.counters.num_passes = 0
        for _ in range(2):
            assert generate(llm).same_bits(resident("llama_gqa"))
        assert_copied(llm)
