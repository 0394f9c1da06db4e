"""A sequence whose logits are NaN, or that can never run, ends with an error of its own; the others have the bits of a
run in which a stop ended it there: with passes in turn, ahead and prepared, on one rank and two, in a split execution.
"""

import dataclasses
import json

import pytest
import torch
from penstock.engine.compute.sampler import SampleOutput
from penstock.engine.output import CompletionOutput, RequestOutput, Sequence, describe_errors, without_errors
from penstock.engine.runtime.graph import Mailbox
from penstock.engine.split.llm import SplitLLM
from penstock.engine.split.transfers import FUSED, SCORES, SplitConfig
from penstock.scheduler.batching import limits
from penstock.scheduler.batching.message import RowMessages

from penstock import LLM, SamplingParams
from tests.support.failing_rows import (
    OPTIONS,
    PARAMS,
    PROMPTS,
    WARNS,
    assert_at_rest,
    assert_fails_alone_twice,
    assert_others_are_as_if_stopped,
    choose_token,
    ending_at,
    fill_all_pages,
    poison,
    run,
)
from tests.support.kernel_registry import KERNELS
from tests.support.llm_runs import WAYS, tokens_of
from tests.support.oracle.checkpoints import write_checkpoint

ON_CPU = OPTIONS | {"device": "cpu", "dtype": "float32"}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    write_checkpoint(folder := tmp_path_factory.mktemp("checkpoints") / "clean", "llama_gqa")
    return folder


@pytest.fixture(scope="module")
def tokens(checkpoint):
    """The token that is NaN, and the one at which a stop ends its sequence instead."""
    with LLM(checkpoint, **ON_CPU) as llm:
        return choose_token(llm.generate(PROMPTS, PARAMS))


@pytest.fixture(scope="module")
def poisoned(checkpoint, tokens):
    return poison(checkpoint, checkpoint.parent / "poisoned", tokens[0])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_row_fails_alone(checkpoint, tokens, poisoned, way):
    """Twice over. What pages hold from their last owner, be it NaN everywhere, does not reach the next."""
    with LLM(checkpoint, **ON_CPU | way) as llm:
        stopped, filled = run(llm, ending_at(tokens[1])), fill_all_pages(llm)
    with WARNS, LLM(poisoned, **ON_CPU | way) as llm:
        assert_fails_alone_twice(llm, stopped, filled)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_row_fails_alone_in_the_decode_passes_of_a_gpu(checkpoint, tokens, poisoned, monkeypatch, lookahead):
    """Padded, over the paged cache, with tokens by letter; kernels by their references. Log probabilities, which are
    taken behind such a pass, and penalties do not mind a row without a token."""
    for kernel in KERNELS.values():
        if kernel.names:
            kernel.put_in(monkeypatch, kernel.reference)
    as_on_gpu = ON_CPU | {"debug": {"as_on_gpu": True, "lookahead": lookahead}}
    with LLM(checkpoint, **as_on_gpu) as llm:
        stopped, filled = run(llm, ending_at(tokens[1])), fill_all_pages(llm)
    with WARNS, LLM(poisoned, **as_on_gpu) as llm:
        assert_fails_alone_twice(llm, stopped, filled)
        assert llm.engine.worker.runner.mailbox.num_sent > 10


@pytest.mark.parametrize("attention", [FUSED, SCORES])
def test_a_row_fails_alone_in_a_split_execution(checkpoint, tokens, poisoned, attention):
    """In this process: the device side's weights are as much the model's own."""
    split, options = SplitConfig(attention=attention), OPTIONS | {"dtype": "float32"}
    with SplitLLM(checkpoint, split, **options) as llm:
        stopped, filled = run(llm, ending_at(tokens[1])), fill_all_pages(llm)
    with WARNS, SplitLLM(poisoned, split, **options) as llm:
        assert_fails_alone_twice(llm, stopped, filled)


@pytest.fixture(scope="module")
def on_ranks(poisoned):
    """An LLM of the poisoned model on so many ranks, launched once."""
    made = {}

    def make(tp_size: int) -> LLM:
        if tp_size not in made:
            with WARNS:
                made[tp_size] = LLM(poisoned, tensor_parallel_size=tp_size, **ON_CPU)
        return made[tp_size]

    yield make
    for llm in made.values():
        llm.close()


@pytest.mark.timeout(120)
def test_a_row_fails_alone_on_two_ranks(checkpoint, tokens, on_ranks):
    with LLM(checkpoint, **ON_CPU) as llm:
        stopped, filled = llm.generate(PROMPTS, ending_at(tokens[1])), fill_all_pages(llm)
    llm = on_ranks(2)
    for _ in range(2):
        assert_others_are_as_if_stopped(llm.generate(PROMPTS, PARAMS), stopped)
        assert_at_rest(llm)
        assert fill_all_pages(llm) == filled


@pytest.mark.timeout(120)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_impossible_request_found_late_fails_alone(on_ranks, monkeypatch, tp_size):
    llm = on_ranks(tp_size)
    expected = llm.generate(PROMPTS, GREEDY)
    needed, told = limits.most_pages, []

    def too_many_for_one(request, *others) -> int:
        return needed(request, *others) + 1000 * (request.prompt_token_ids == PROMPTS[1])

    monkeypatch.setattr(limits, "most_pages", too_many_for_one)
    outputs = llm.generate(PROMPTS, GREEDY, on_text=lambda *one: told.append(one))
    (one,) = outputs[1].outputs
    assert (one.finish_reason, one.token_ids) == ("error", []) and "need 1011 pages of 4 tokens" in one.error
    assert told[0] == (1, 0, None) and len(told) == 4  # there is no tokenizer: no text, but each end
    assert [outputs[index] for index in (0, 2, 3)] == [expected[index] for index in (0, 2, 3)]
    monkeypatch.undo()
    assert llm.generate(PROMPTS, GREEDY) == expected
    assert_at_rest(llm)


def once(monkeypatch, owner: object, name: str, is_due, do) -> None:
    """Makes a method do something else once, when `is_due` of its arguments first holds."""
    real, told = getattr(owner, name), []

    def changed(*given):
        if told or not is_due(*given):
            return real(*given)
        told.append(given)
        return do()

    monkeypatch.setattr(owner, name, changed)


def divide() -> None:
    raise ZeroDivisionError("a secret path")


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_row_whose_text_cannot_be_made_fails_alone(checkpoint, monkeypatch, way):
    """Tokeniser, stop strings and log probabilities: the others have the bits of a run in which a stop string, which is
    found in a text, ended it there."""

    def is_due(sequence, *_) -> bool:
        return sequence.request.prompt_token_ids == PROMPTS[0] and len(sequence.request.output_token_ids) == 5

    with LLM(checkpoint, **ON_CPU | way) as llm:

        def changed(name: str, do) -> list[RequestOutput]:
            llm.reset_prefix_cache()
            with monkeypatch.context() as patch:
                once(patch, Sequence, name, is_due, do)
                return llm.generate(PROMPTS, PARAMS)

        stopped = changed("push", lambda: "a stop string")
        assert stopped[0].outputs[0].stop_reason == "a stop string"
        for name in ("push", "take_text", "add_logprobs"):
            failed = changed(name, divide)
            one = failed[0].outputs[0]
            assert (one.finish_reason, one.token_ids) == ("error", stopped[0].outputs[0].token_ids)
            assert one.error == "its text could not be made (ZeroDivisionError)"
            assert failed[1:] == stopped[1:]
            assert_at_rest(llm)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_rows_of_a_pass_that_cannot_be_scheduled_fail_and_those_that_wait_go_on(checkpoint, monkeypatch, way):
    """There are three rows for four prompts. Whatever the passes under way give is for nobody."""
    with LLM(checkpoint, **ON_CPU | way) as llm:
        alone = llm.generate([PROMPTS[3]], PARAMS[3])
        llm.reset_prefix_cache()
        counts = iter(range(100))
        with monkeypatch.context() as patch:
            once(patch, llm.loop.scheduler.composer, "compose", lambda: next(counts) == 6, divide)
            outputs = llm.generate(PROMPTS, PARAMS)
        ends = [output.outputs[0].finish_reason for output in outputs]
        assert ends == ["error", "error", "error", "length"]
        assert outputs[0].outputs[0].error == "its pass could not be scheduled (ZeroDivisionError)"
        assert tokens_of(outputs[3:]) == tokens_of(alone)
        assert_at_rest(llm)
        assert llm.generate(PROMPTS, PARAMS)[3].outputs[0].token_ids == alone[0].outputs[0].token_ids
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(llm.loop.scheduler, "schedule", lambda: 1 / 0)  # with nobody to blame
            llm.generate(PROMPTS, PARAMS)
        assert_at_rest(llm)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_row_whose_prompt_cannot_be_scored_fails_alone(checkpoint, monkeypatch, way):
    params = [dataclasses.replace(own, prompt_logprobs=1) for own in PARAMS]
    with LLM(checkpoint, **ON_CPU | way) as llm:
        expected = llm.generate(PROMPTS, params)
        with monkeypatch.context() as patch:
            once(
                patch,
                Sequence,
                "add_prompt_logprobs",
                lambda one, _: one.request.prompt_token_ids == PROMPTS[3],
                divide,
            )
            outputs = llm.generate(PROMPTS, params)
        assert_at_rest(llm)
    (failed,) = outputs[3].outputs
    assert (failed.finish_reason, failed.token_ids, outputs[3].prompt_logprobs) == ("error", [], [None])
    assert tokens_of(outputs[:3]) == tokens_of(expected[:3])
    assert [len(output.prompt_logprobs) for output in outputs[:3]] == [len(prompt) for prompt in PROMPTS[:3]]


@pytest.mark.timeout(120)
def test_a_row_that_cannot_be_told_to_the_ranks_fails_alone(on_ranks, monkeypatch):
    llm = on_ranks(2)
    expected = llm.generate(PROMPTS, GREEDY)
    for num_before, is_due in ((0, lambda side, row: row.start == 0), (3, lambda side, row: row.start == 39)):
        llm.reset_prefix_cache()
        with monkeypatch.context() as patch:
            real = RowMessages._pack_row

            def pack(side, row, due=is_due, real=real):
                is_mine = row.pages and row.index == number(PROMPTS[1]) and due(side, row)
                return [2**31] if is_mine else real(side, row)

            def number(prompt) -> int | None:
                seated = (one for one in llm.loop.scheduler.seated if one.prompt_token_ids == prompt)
                return next((one.row for one in seated), None)

            patch.setattr(RowMessages, "_pack_row", pack)
            outputs = llm.generate(PROMPTS, GREEDY)
        (one,) = outputs[1].outputs
        assert (one.finish_reason, len(one.token_ids)) == ("error", num_before)
        assert one.error == "it could not be told to the ranks (OverflowError)"
        assert tokens_of([outputs[index] for index in (0, 2, 3)]) == tokens_of([expected[index] for index in (0, 2, 3)])
        assert_at_rest(llm)
    assert tokens_of(llm.generate(PROMPTS, GREEDY)) == tokens_of(expected)


def test_errors_are_carried_as_json():
    sequences = [CompletionOutput(0, "a", [5], "length"), CompletionOutput(1, "", [], "error", error="it is NaN")]
    output = RequestOutput("3", None, [1, 2], sequences)
    assert RequestOutput.from_dict(json.loads(json.dumps(output.to_dict()))) == output
    assert describe_errors([output]) == ["prompt 3, output 1: it is NaN"]
    with pytest.raises(ValueError, match="^prompt 3, output 1: it is NaN$"):
        without_errors([output])
    well = dataclasses.replace(output, outputs=sequences[:1])
    assert without_errors([well]) == [well]


def test_a_letter_says_which_rows_have_no_token_and_how_likely_the_others_are():
    mailbox = Mailbox(4, 2, torch.device("cpu"))
    for number, tokens in enumerate(([7, -1, 3, 0], [-1, 5, -1])):
        scores = None if number == 0 else torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)
        mailbox.send(SampleOutput(torch.tensor(tokens), scores))
        came = mailbox.expect(len(tokens) - 1, scored=scores is not None).wait()
        assert came.tokens.tolist() == tokens[:-1]
        assert came.scores is scores or came.scores.tolist() == [[1, 2], [3, 4]]
