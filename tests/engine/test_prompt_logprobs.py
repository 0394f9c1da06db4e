"""Log probabilities of prompts: those of transformers and of `logprobs`, in chunks and slices, streamed and resident,
beside rows that ask for none, with the prefix cache, and through rows that give way."""

import random
from dataclasses import replace

import pytest
import torch
from penstock.engine.model import steps
from penstock.engine.output import RequestOutput
from penstock.engine.split.llm import SplitLLM
from penstock.scheduler.passes.pass_plan import Compute

from penstock import LLM, SamplingParams
from tests.support.llm_runs import WAYS
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.watches import After, BeginPass

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "page_size": 4}
SMALL = OPTIONS | {"max_num_seqs": 3, "max_num_batched_tokens": 16}  # long prompts come in chunks, beside other rows
PROMPTS = [random.Random(length).choices(range(128), k=length) for length in (37, 9, 1, 50, 2)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PARAMS = [
    replace(GREEDY, prompt_logprobs=5),
    GREEDY,
    replace(GREEDY, prompt_logprobs=0),
    SamplingParams(seed=3, max_tokens=4, ignore_eos=True, prompt_logprobs=20, logprobs=2),
    replace(GREEDY, prompt_logprobs=1, repetition_penalty=1.3),
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint, and transformers' log probabilities of each prompt (P, V)."""
    made = write_checkpoint(folder := tmp_path_factory.mktemp("checkpoint"), "llama_gqa")
    with torch.inference_mode():
        logits = [made(torch.tensor([prompt])).logits[0].float() for prompt in PROMPTS]
    return folder, [one.log_softmax(-1) for one in logits]


@pytest.fixture(params=[128, 5], ids=["whole", "slices"])
def slices(request, monkeypatch):
    """The rows whose logits are there at a time: more than a pass has, or fewer."""
    monkeypatch.setattr(steps, "SCORED_ROWS", request.param)


def assert_right(output: RequestOutput, params: SamplingParams, expected: torch.Tensor) -> None:
    """Asserts that the log probabilities are those of transformers (P, V), in its order."""
    tokens, found = output.prompt_token_ids, output.prompt_logprobs
    assert len(found) == len(tokens) and found[0] is None
    for token, position, row in zip(tokens[1:], found[1:], expected):
        own, top = position[token], row.topk(params.prompt_logprobs)
        assert own.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
        assert own.rank == int((row >= row[token]).sum())
        assert len(position) == params.prompt_logprobs + (token not in top.indices)
        for rank, (value, index) in enumerate(zip(top.values.tolist(), top.indices.tolist()), 1):
            assert position[index].rank == rank and position[index].logprob == pytest.approx(value, abs=TOLERANCE)


@pytest.mark.parametrize("way", [*WAYS.values(), {"debug": {"as_on_gpu": True}}], ids=[*WAYS, "as_on_gpu"])
def test_they_are_transformers_own(model, slices, way):
    """And who asks for none has none, and the tokens that it has without those who do."""
    folder, expected = model
    with LLM(folder, **SMALL | way) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        plain = llm.generate(PROMPTS, [replace(own, prompt_logprobs=None) for own in PARAMS])
    assert [one.outputs[0].token_ids for one in outputs] == [one.outputs[0].token_ids for one in plain]
    assert all(one.prompt_logprobs is None for one in [*plain, outputs[1]])
    for output, params, rows in zip(outputs, PARAMS, expected):
        if params.prompt_logprobs is not None:
            assert_right(output, params, rows)


def test_streamed_and_resident_are_equal_bit_for_bit(model):
    def outputs(resident: str) -> list[RequestOutput]:
        with LLM(model[0], **SMALL, resident=resident, debug={"lanes": "random", "poison": True}) as llm:
            return [llm.generate(prompt, own)[0] for prompt, own in zip(PROMPTS, PARAMS)]

    assert outputs("none") == outputs("all")


def test_they_are_what_logprobs_gives_there(model):
    """The greedy tokens of an output, given as a prompt; a token's own value is the first of the top ones, bit for
    bit."""
    with LLM(model[0], **SMALL) as llm:
        ((output,),) = (one.outputs for one in llm.generate(PROMPTS[1:2], replace(GREEDY, logprobs=4)))
        (again,) = llm.generate([PROMPTS[1] + output.token_ids], replace(GREEDY, prompt_logprobs=4))
    for token, ours, theirs in zip(output.token_ids, again.prompt_logprobs[len(PROMPTS[1]) :], output.logprobs):
        assert ours[token].rank == theirs[token].rank == 1 and ours.keys() == theirs.keys()
        assert ours[token].logprob == max(one.logprob for one in ours.values())
        assert all(ours[one].logprob == pytest.approx(theirs[one].logprob, abs=TOLERANCE) for one in ours)


def test_nothing_is_computed_for_those_who_do_not_ask(model):
    scored, kinds = [], []

    def note(instruction, ctx) -> None:
        if isinstance(instruction, Compute) and instruction.step == "score_prompts":
            scored.append(0 if ctx.prompt_scores is None else len(ctx.prompt_scores))

    with LLM(model[0], **SMALL) as llm, llm.engine.watched_by(After(note)):
        with llm.engine.watched_by(BeginPass(lambda batch: kinds.append(any(row.samples for row in batch.rows)))):
            llm.generate(PROMPTS, GREEDY)
            assert not any(scored)
            scored.clear(), kinds.clear()
            llm.generate([PROMPTS[3]], [replace(GREEDY, prompt_logprobs=1, n=3, seed=1)])
    assert sum(scored) == len(PROMPTS[3]) - 1  # by the first of the three alone
    assert kinds[0] is False and scored[0] == 16  # a pass that samples nothing gives them too


def test_what_is_cached_is_computed_for_those_who_ask(model):
    """Its pages are not taken over; they stay, for those who do not ask."""
    asks, expected = replace(GREEDY, prompt_logprobs=2), model[1][3]
    with LLM(model[0], **OPTIONS) as llm:
        for params, is_found in ((asks, False), (asks, False), (GREEDY, True), (asks, False)):
            (output,) = llm.generate([PROMPTS[3]], params)
            assert (output.num_cached_tokens > 0) == is_found
            if params is asks:
                assert_right(output, params, expected)


@pytest.mark.parametrize("is_on", [True, False])
def test_they_are_kept_where_rows_give_way(model, is_on):
    """The first has computed a part of its prompt when a more urgent one takes its row, and what it has is not computed
    for it once more."""
    asks, urgent = replace(GREEDY, prompt_logprobs=2), replace(GREEDY, priority=-1, prompt_logprobs=0)
    scored = []
    options = OPTIONS | {"max_num_seqs": 1, "max_num_batched_tokens": 16, "scheduling_policy": "priority"}
    with LLM(model[0], **options, enable_prefix_caching=is_on) as llm:
        (first,), (second,) = llm.sequences(PROMPTS[3], asks), llm.sequences(PROMPTS[0], urgent)
        with llm.engine.watched_by(BeginPass(lambda batch: scored.append(sum(row.num_scored for row in batch.rows)))):
            llm.loop.add(first)
            llm.loop.advance(), llm.loop.advance()
            llm.loop.add(second)
            while llm.loop.has_unfinished:
                llm.loop.advance()
        assert llm.loop.scheduler.counts.num_preemptions == 1
        llm.loop.scheduler.check_integrity()
    assert sum(scored) == len(PROMPTS[3]) - 1 + len(PROMPTS[0]) - 1
    for sequence, params, rows in ((first, asks, model[1][3]), (second, urgent, model[1][0])):
        tokens = sequence.request.prompt_token_ids
        assert_right(RequestOutput("0", None, tokens, prompt_logprobs=sequence.prompt_logprobs), params, rows)


def test_a_split_execution_refuses_them():
    with SplitLLM("demo") as llm, pytest.raises(ValueError, match="^prompt 0: prompt_logprobs=1: a split execution"):
        llm.generate("def", SamplingParams(prompt_logprobs=1))


def test_their_memory_is_bounded_and_planned(model):
    """It is that of some rows' logits, among the activations, however many tokens a pass has."""
    with LLM(model[0], **OPTIONS, max_num_batched_tokens=4096) as llm:
        (output,) = llm.generate([PROMPTS[3]], replace(GREEDY, prompt_logprobs=1))
        memory = llm.engine.worker.executor.arena.cut(4096, 1)["prompt_logits"]
        assert memory.shape == (steps.SCORED_ROWS, 128) and "prompt_logits" in llm.engine.plan.activation_offsets
    assert_right(output, replace(GREEDY, prompt_logprobs=1), model[1][3])
