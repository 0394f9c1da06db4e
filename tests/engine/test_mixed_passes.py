"""Requests that come and go at random, between passes and while one runs, so that rows of every kind share passes, have
the tokens that each has alone."""

import itertools

import pytest
from penstock.engine.compute import attention
from penstock.engine.compute.context import PassContext
from penstock.engine.compute.inputs import Chunks
from penstock.engine.kernels import gated_activation
from penstock.scheduler.batching.batch import Batch, RowKind
from penstock.scheduler.passes.pass_plan import Compute, Instruction

from penstock import LLM, SamplingParams
from tests.support.company import CROWDED, ROOMY, crowd, each_alone, run_in_a_crowd, run_in_company
from tests.support.watches import After

OPTIONS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 5, "max_num_batched_tokens": 12, "page_size": 4}
FULL = OPTIONS | {"max_model_len": 48}
RANDOM_LANES = {"lanes": "random", "poison": True}
WAYS = {
    "resident": FULL,
    "ahead": FULL | {"debug": {"lookahead": 1}},
    "padded": FULL | {"debug": {"as_on_gpu": True, "lookahead": 1}},
    "long": FULL | {"debug": {"as_on_gpu": True}},
    "streamed": FULL | {"resident": "none", "debug": RANDOM_LANES},
    "prepared": FULL | {"resident": "none", "debug": RANDOM_LANES | {"lookahead": 1}},
    "sinks": OPTIONS | {"attention_sinks": 3, "attention_window": 13},
}
CROWDED_WAYS = {
    "padded": {"debug": RANDOM_LANES | {"as_on_gpu": True, "lookahead": 1}},
    "prepared": {"resident": "none", "link_gb_s": 1e4, "debug": RANDOM_LANES | {"lookahead": 1}},
}
CROWD = 5


@pytest.fixture(scope="module", params=WAYS)
def llm(request):
    with LLM("demo", **WAYS[request.param]) as llm:
        if request.param == "long":
            pad_nothing_with_prompts(llm)
        yield llm


def pad_nothing_with_prompts(llm: LLM) -> None:
    """Lets all passes with prompts run as a GPU runs those that are too long to be padded."""
    llm.engine.worker.runner.sizes.num_tokens = []


def test_a_request_in_any_company_is_itself_alone(llm):
    companies = [run_in_company(llm, seed) for seed in (1, 3)]
    batches = [batch for company in companies for batch in company.batches]
    assert any({row.kind for row in batch.rows} == set(RowKind) for batch in batches), "no pass had rows of every kind"
    assert any(is_short_prompt(batch) for batch in batches)
    reasons = {one.output().finish_reason for company in companies for one in company.sequences}
    assert reasons == {"length", "stop", "abort"}
    prepares = llm.engine.lookahead > 0 and llm.engine.plan.residency.streamed_bytes > 0
    assert any(company.engine.num_run < company.engine.num_announced for company in companies) == prepares


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4, 44))
def test_a_request_in_any_company_is_itself_alone_soak(llm, seed):
    run_in_company(llm, seed)


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    with LLM("demo", device="cpu", **ROOMY) as llm:
        return each_alone(llm, crowd(CROWD))


@pytest.mark.parametrize("way", CROWDED_WAYS)
def test_in_a_crowd_too_a_request_is_itself_alone(way, alone):
    """Rows give way to others and to urgent ones, prompts begin alike, and pages move to host memory and back: where
    weights stream, by rates at which the link never binds."""
    with LLM("demo", device="cpu", **CROWDED, **CROWDED_WAYS[way]) as llm:
        run_in_a_crowd(llm, CROWD, alone)


def test_what_follows_the_last_attention_computes_sampled_rows_alone():
    """And is left out of a pass in which no row samples, and which is not padded: as one with a chunk that continues
    where pages hold keys that are not rotated."""
    widths, num_activations = [], []

    def note(instruction: Instruction, ctx: PassContext | None) -> None:
        if isinstance(instruction, Compute) and instruction.step == "ffn_down":
            widths.append((instruction.of_rows, len(ctx.act["x"]), len(ctx.inputs.tokens)))
        if isinstance(instruction, Compute) and instruction.step == "sample":
            num_activations.append(gated_activation.calls["reference"])

    with LLM("demo", **WAYS["padded"]) as llm:
        llm.engine.worker.runner.sizes.pages = False
        num_layers = llm.engine.plan.spec.num_layers
        with llm.engine.watched_by(After(note)):
            before = gated_activation.calls["reference"]
            llm.generate([[7] * 30], SamplingParams(max_tokens=2, temperature=0))
    made = [after - earlier for earlier, after in itertools.pairwise([before, *num_activations])]
    assert made == [num_layers, num_layers - 1, num_layers, num_layers]  # the second chunk samples nothing, eagerly
    last = [rows for of_rows, *rows in widths if of_rows]
    padded, left_out, sampling, decoding = last
    assert padded[0] < padded[1] and left_out == [0, 12] and sampling == [1, 6] and decoding[0] == decoding[1]
    assert all(rows == tokens for of_rows, rows, tokens in widths if not of_rows)


def test_in_the_last_layer_of_a_long_pass_sampled_tokens_attend_alone(monkeypatch):
    """Unless tokens of a prompt are scored. The second pass samples nothing."""
    attend, attended = attention.attend_chunks_, []

    def note(q, k, v, chunks: Chunks, *others) -> None:
        attended.append([row.num_queries for row in chunks.ranges])
        attend(q, k, v, chunks, *others)

    monkeypatch.setattr(attention, "attend_chunks_", note)
    with LLM("demo", **WAYS["long"]) as llm:
        pad_nothing_with_prompts(llm)
        before, last = llm.engine.plan.spec.num_layers - 1, 1
        llm.generate([[7] * 30, [8] * 3, [9] * 2], SamplingParams(max_tokens=1, temperature=0))
        sampling, chunk = [[6], [3, 2]], [[12]]
        assert attended == 2 * before * chunk + before * sampling + last * [[1], [1, 1]]
        attended.clear()
        llm.generate([[5] * 8], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
        assert attended == (before + last) * [[8]]


def is_short_prompt(batch: Batch) -> bool:
    """Tells whether a prompt of one token starts beside longer chunks."""
    return (
        any(row.kind is RowKind.ONE_TOKEN and not row.start for row in batch.rows)
        and len(batch.rows) < batch.num_tokens
    )
