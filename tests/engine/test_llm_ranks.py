"""LLM over two ranks gives what one rank gives, in fp32: self-launched, and as torchrun launches them."""

import gc
import json
import math

import pytest
import torch.distributed as dist
from penstock.engine.output import RequestOutput

from penstock import LLM, SamplingParams
from tests.support.forked_ranks import fork_ranks
from tests.support.held import assert_no_more_than, held
from tests.support.llm_runs import LONG, MESSAGE, OPTIONS, REQUESTS, run_requests, tokens_of
from tests.support.rounding import assert_apart, logprobs_apart, model_apart
from tests.support.watches import EndPass

pytestmark = pytest.mark.timeout(120)
GREEDY = SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def measured() -> tuple[list[dict], float]:
    """The outputs of one rank, twice over, and how far a log probability may be from it for the order of sums."""
    sizes = []
    with LLM("demo", **OPTIONS) as llm:
        spec = llm.engine.plan.spec
        note = EndPass(lambda batch, logits: sizes.append(float(logits.abs().max())) if len(logits) else None)
        with llm.engine.watched_by(note):
            outputs = [*run_requests(llm), *run_requests(llm)]
    return outputs, logprobs_apart(max(sizes), spec.vocab_size, model_apart(spec, OPTIONS["max_model_len"]))


@pytest.fixture(scope="module")
def one_rank(measured) -> list[dict]:
    return measured[0]


@pytest.fixture(scope="module")
def bound(measured) -> float:
    return measured[1]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """The files that the ranks of one launch wrote."""
    folder = tmp_path_factory.mktemp("torchrun")
    done = fork_ranks(2, "-m", "tests.support.llm_runs", folder, timeout=100)
    assert done.all_ended, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def assert_same(outputs: list[dict], expected: list[dict], bound: float) -> None:
    """Every field equal, but for the last bits of log probabilities, up to `bound` of each."""
    assert len(outputs) == len(expected)
    for output, other in zip(outputs, expected):
        rest = dict.fromkeys(("outputs", "prompt_logprobs"))
        assert output | rest == other | rest
        assert (output["prompt_logprobs"] is not None) == (other["prompt"] == LONG)
        for position, position_two in zip(output["prompt_logprobs"] or (), other["prompt_logprobs"] or (), strict=True):
            assert_apart_at(position, position_two, bound)
        for one, two in zip(output["outputs"], other["outputs"], strict=True):
            numbers = dict.fromkeys(("logprobs", "cumulative_logprob"))
            assert one | numbers == two | numbers
            assert (one["logprobs"] is None) == (two["logprobs"] is None)
            if one["logprobs"] is not None:
                difference = abs(one["cumulative_logprob"] - two["cumulative_logprob"])
                assert_apart(difference, math.sqrt(len(one["token_ids"])) * bound)  # each errs by itself
            for position, position_two in zip(one["logprobs"] or (), two["logprobs"] or ()):
                assert_apart_at(position, position_two, bound)


def assert_apart_at(position: dict | None, other: dict | None, bound: float) -> None:
    """Asserts that the same tokens have log probabilities at one position, none farther than `bound` from its other."""
    one, two = ({int(token): own["logprob"] for token, own in (each or {}).items()} for each in (position, other))
    assert one.keys() == two.keys() and (position is None) == (other is None)
    for token, logprob in one.items():
        assert_apart(abs(logprob - two[token]), bound)


@pytest.mark.tolerance
def test_self_launched_ranks(one_rank, bound, monkeypatch):
    """One launch: the same requests twice over (seeds of the engine's own go on), an error that ends it, another
    launch in the same process."""
    with LLM("demo", tensor_parallel_size=2, **OPTIONS) as llm:
        assert_same([*run_requests(llm), *run_requests(llm)], one_rank, bound)
        assert llm.engine.collectives.size == 2 and llm.engine.ledger.operation("attn_allreduce").num_calls > 0
        with pytest.raises(ValueError, match="prompt 0: token id 99999 is not in 0..2047"):
            llm.generate([[0, 99999]])  # refused before the other rank hears of it
        with monkeypatch.context() as patch:
            patch.setattr(RequestOutput, "to_dict", lambda _: pytest.fail("outputs as JSON, which no rank reads"))
            assert tokens_of(llm.generate("Return the", GREEDY)) == [one_rank[0]["outputs"][0]["token_ids"]]
        with pytest.raises(ZeroDivisionError) as caught:
            llm.generate([LONG, "Return the"], GREEDY, on_text=lambda prompt, *_: 1 // prompt)
        assert [output.outputs[0].finish_reason for output in caught.value.outputs] == ["abort", "length"]
        assert tokens_of(caught.value.outputs)[1] == one_rank[0]["outputs"][0]["token_ids"]
        assert tokens_of(llm.generate("Return the", GREEDY)) == [one_rank[0]["outputs"][0]["token_ids"]]
        monkeypatch.setattr(llm.loop.scheduler, "update", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate(LONG, GREEDY)
        with pytest.raises(RuntimeError, match="an earlier error"):
            llm.generate(LONG, GREEDY)
    assert not dist.is_initialized()
    before = held()
    with LLM("demo", tensor_parallel_size=2, **OPTIONS) as llm:
        assert_same(run_requests(llm), one_rank[: len(REQUESTS)], bound)
    assert not dist.is_initialized()
    assert_no_more_than(before)


def test_torchrun_gives_every_rank_the_same_outputs(torchrun, one_rank, bound):
    own = {"raised": None, "options_of_one": None}
    assert torchrun[0] | own == torchrun[1] | own
    assert_same(torchrun[0]["first"], one_rank[: len(REQUESTS)], bound)
    assert_same(torchrun[0]["second"], one_rank[: len(REQUESTS)], bound)


def test_what_on_text_raises_under_torchrun_is_rank_0s_alone(torchrun, one_rank):
    """Both have the same outputs, of which one was aborted, and go on together."""
    assert [rank["raised"] for rank in torchrun] == [True, False]
    aborted, other = torchrun[0]["aborted"]
    assert (aborted["outputs"][0]["finish_reason"], other["outputs"][0]["finish_reason"]) == ("abort", "length")
    assert aborted["outputs"][0]["error"].startswith("on_text raised ZeroDivisionError(")
    assert other["outputs"][0]["token_ids"] == one_rank[0]["outputs"][0]["token_ids"]


def test_a_chat_under_torchrun_is_answered_on_all_ranks_alike(torchrun):
    """Also by ranks that give no messages; one that makes another call than a chat is refused."""
    with LLM("demo", **OPTIONS) as llm:
        expected = tokens_of(llm.chat([MESSAGE], GREEDY))
    for rank in torchrun:
        assert rank["chats"] == [expected, expected]
        assert "(chat): refused by rank 1: conversation 0: 'Hello': expected a list" in rank["no_message"]
        assert "rank 1 calls generate instead" in rank["chat_or_not"]


def test_mistakes_under_torchrun_are_found_on_all_ranks_alike(torchrun):
    for rank in torchrun:
        assert rank["unlike_world"] == "tensor_parallel_size=4, but torchrun started WORLD_SIZE=2 ranks"
        assert rank["bad_prompt"] == "prompt 0: token id 99999 is not in 0..2047"
        assert len(rank["again"][0]["outputs"][0]["token_ids"]) == 16


def test_mistakes_of_one_rank_are_refused_on_all(torchrun, one_rank):
    """All ranks refuse with the same message, which names the call; no rank gets another call's outputs afterwards."""
    alike = "under torchrun all ranks make the same calls"
    for rank in torchrun:
        assert rank["refused_by_one"] == (
            "call 5 (generate): refused by rank 1: prompt 0: token id 99999 is not in 0..2047"
        )
        assert rank["refused_by_rank_0"].startswith(
            "call 6 (generate): refused by rank 0: prompts=5: expected a string"
        )
        assert rank["other_prompts"] == (
            f"call 7 (generate): rank 1 was given other prompts or parameters than rank 0; {alike}"
        )
        assert rank["other_call"] == f"call 8 (generate): rank 1 calls measure instead; {alike}"
        assert rank["no_value"].startswith("call 9 (generate): refused by rank 1: NotImplementedError(")
        assert rank["measured"] == "nothing was raised"
        assert rank["follows"] == rank["own"] == [one_rank[0]["outputs"][0]["token_ids"]]


def test_ranks_that_are_configured_differently_are_refused_on_all(torchrun):
    """Ranks could compute with different weights, in silence. Another engine can be made afterwards."""
    alike = "under torchrun all ranks are configured alike"
    for rank in torchrun:
        assert rank["other_config"] == f"load_format='auto' on rank 0, but 'dummy' on rank 1: {alike}"
        assert rank["other_trace"] == f"trace=None on rank 0, but 'a file' on rank 1: {alike}"


def test_options_that_one_rank_is_refused_end_the_others_too(torchrun):
    """Its own error there, RankFailed with it on the other; the next LLM is made."""
    words = {
        "other_size": "ValueError: tensor_parallel_size=4, but torchrun started WORLD_SIZE=2 ranks",
        "no_number": "ValueError: max_model_len='many': expected int or None",
        "no_option": "TypeError: LLM has no option no_such",
        "no_tokenizer": "ValueError: tokenizer='nowhere': no such file or directory",
        "no_split": "ValueError: split='fused': expected a SplitConfig",
        "interface": "ValueError: GLOO_SOCKET_IFNAME=nope0: this host has no network interface 'nope0'",
        "rank_0": "ValueError: resident=7: expected auto, all, none or a fraction between 0 and 1",
    }
    for name, expected in words.items():
        refused, other = torchrun if name == "rank_0" else torchrun[::-1]
        kind, text = refused["options_of_one"][name]
        assert f"{kind}: {text}".startswith(expected)
        kind, text = other["options_of_one"][name]
        assert kind == "RankFailed" and text.startswith(f"rank {int(name != 'rank_0')} failed:\n") and expected in text


def test_options_that_all_ranks_are_refused_are_the_same_error_on_all(torchrun):
    for rank in torchrun:
        assert set(rank["bad_option"]) == {"resident=7: expected auto, all, none or a fraction between 0 and 1"}
        kind, text = rank["held"]["second"]
        assert kind == "ValueError" and text.startswith("this process belongs to a process group already")


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_an_llm_that_is_dropped_ends_its_ranks(one_rank):
    """An engine ends as garbage, without close(), and after a failure; then another one can be made."""
    llm = LLM("demo", tensor_parallel_size=2, **OPTIONS)
    (child,) = llm._launch._children._children
    assert tokens_of(llm.generate("Return the", GREEDY)) == [one_rank[0]["outputs"][0]["token_ids"]]
    with pytest.raises(ValueError, match="close it"):
        LLM("demo", tensor_parallel_size=2, **OPTIONS)
    del llm
    gc.collect()
    assert child.process.poll() == 0
    llm = LLM("demo", tensor_parallel_size=2, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(LONG, GREEDY, on_text=interrupt)
    failed, llm = llm, LLM("demo", tensor_parallel_size=2, **OPTIONS)  # that one is still there
    assert tokens_of(llm.generate("Return the", GREEDY)) == [one_rank[0]["outputs"][0]["token_ids"]]
    with pytest.raises(RuntimeError, match="an earlier error"):
        failed.generate(LONG, GREEDY)
    llm.close()
    assert not dist.is_initialized()
