"""LLM in Python, as vLLM's users know it, on one rank: prompts, parameters, outputs, stops, logprobs; each with passes
one after another, with the next one submitted before the tokens of the one before it are known, and with the next one
prepared by then, and run or withdrawn."""

import dataclasses
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from penstock.engine.planning.find_model import find_model

from penstock import LLM, SamplingParams
from tests.support.llm_runs import LONG, OPTIONS, REQUESTS, WAYS, tokens_of

GREEDY = SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def llm(request):
    with LLM("demo", **OPTIONS | request.param) as llm:
        yield llm


def test_one_string(llm):
    (output,) = llm.generate("Return the", GREEDY)
    assert output.prompt == "Return the" and output.finished
    assert output.prompt_token_ids == llm.tokenizer.encode("Return the")
    (sequence,) = output.outputs
    assert sequence.index == 0 and sequence.finish_reason == "length" and sequence.stop_reason is None
    assert len(sequence.token_ids) == 16  # vLLM's default
    whole = llm.tokenizer.decode(output.prompt_token_ids + sequence.token_ids)
    assert "Return the" + sequence.text == whole and len(sequence.text) > 16
    assert sequence.logprobs is None and sequence.cumulative_logprob is None


def test_token_ids_and_strings_mean_the_same(llm):
    ids = llm.tokenizer.encode("Return the")
    (text,) = llm.generate("Return the", GREEDY)
    assert tokens_of(llm.generate(ids, GREEDY)) == tokens_of([text])
    mixed = llm.generate([ids, "Return the", tuple(ids)], GREEDY)
    assert tokens_of(mixed) == 3 * tokens_of([text])
    assert [output.prompt for output in mixed] == [None, "Return the", None]
    assert [output.prompt_token_ids for output in mixed] == [ids] * 3
    assert mixed[0].outputs[0].text == text.outputs[0].text


def test_token_ids_of_numpy_and_torch(llm):
    """Arrays of one dim are prompts, of two dims several; scalars are integers."""
    ids = llm.tokenizer.encode("Return the")
    (expected,) = llm.generate(ids, GREEDY)
    arrays = [np.array(ids), np.array(ids, dtype=np.uint16), torch.tensor(ids)]
    scalars = [[np.int64(token) for token in ids], list(torch.tensor(ids)), tuple(np.array(ids, dtype=np.int32))]
    for prompt in arrays + scalars:
        (output,) = llm.generate(prompt, GREEDY)
        assert output == expected and {type(token) for token in output.prompt_token_ids} == {int}
    outputs = llm.generate([*arrays, *scalars], GREEDY) + llm.generate(np.array([ids, ids]), GREEDY)
    assert tokens_of(outputs) == 8 * tokens_of([expected])
    stops = np.array([2047, expected.outputs[0].token_ids[3]])
    (output,) = llm.generate(ids, SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=stops))
    assert output.outputs[0].stop_reason == stops[1] and type(output.outputs[0].stop_reason) is int


def test_no_prompts(llm):
    assert llm.generate([]) == llm.generate([], []) == []


def test_default_parameters_sample_16_tokens(llm):
    first, second = llm.generate("Return the"), llm.generate("Return the")
    for output in first + second:
        assert (len(output.outputs[0].token_ids) == 16) == (output.outputs[0].finish_reason == "length")
    assert tokens_of(first) != tokens_of(second)  # a request's noise is its own


def test_outputs_come_in_the_order_of_prompts(llm):
    """Seven prompts on four rows end out of order; each has its own parameters."""
    ended = []
    outputs = llm.generate(
        [prompt for prompt, _ in REQUESTS],
        [SamplingParams(**own, ignore_eos=True) for _, own in REQUESTS],
        on_text=lambda prompt, index, text: ended.append(prompt) if text is None else None,
    )
    assert ended != sorted(ended) and len(ended) == 8
    assert [output.request_id for output in outputs] == [str(index) for index in range(len(REQUESTS))]
    for output, (prompt, own) in zip(outputs, REQUESTS):
        assert prompt in (output.prompt, output.prompt_token_ids)
        assert len(output.outputs) == own.get("n", 1)
        assert {len(sequence.token_ids) for sequence in output.outputs} == {own.get("max_tokens", 16)}
        assert all((sequence.logprobs is not None) == ("logprobs" in own) for sequence in output.outputs)


def test_n_sequences_have_consecutive_seeds(llm):
    (output,) = llm.generate("Return the", SamplingParams(n=3, seed=5, ignore_eos=True))
    assert [sequence.index for sequence in output.outputs] == [0, 1, 2]
    alone = [llm.generate("Return the", SamplingParams(seed=seed, ignore_eos=True)) for seed in (5, 6, 7)]
    assert tokens_of([output]) == [tokens_of(one)[0] for one in alone]
    assert len(set(map(tuple, tokens_of([output])))) == 3


def test_text_is_given_out_as_it_grows(llm):
    pieces = []
    outputs = llm.generate(
        [LONG, "Return the"],
        SamplingParams(temperature=0, ignore_eos=True, n=2),
        on_text=lambda *one: pieces.append(one),
    )
    for number, output in enumerate(outputs):
        for sequence in output.outputs:
            own = [text for prompt, index, text in pieces if (prompt, index) == (number, sequence.index)]
            assert own[-1] is None and own.count(None) == 1 and len(own) > 5
            assert "".join(own[:-1]) == sequence.text


def test_stop_string_across_the_borders_of_tokens(llm):
    (plain,) = llm.generate("Return the", SamplingParams(temperature=0, ignore_eos=True, max_tokens=40))
    ids, text = plain.outputs[0].token_ids, plain.outputs[0].text
    ends = [len(llm.tokenizer.decode(plain.prompt_token_ids + ids[:i])) - len("Return the") for i in range(1, 41)]
    crossing = [
        (text[end - 2 : end + 2], index)
        for index, end in enumerate(ends[:-1])
        if text.find(text[end - 2 : end + 2]) == end - 2 > 8
    ]
    assert len(crossing) > 3
    for stop, index in crossing[:4]:
        given = []
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=40, stop=["never there", stop])
        (output,) = llm.generate("Return the", params, on_text=lambda _, index, piece, given=given: given.append(piece))
        (sequence,) = output.outputs
        assert (sequence.finish_reason, sequence.stop_reason) == ("stop", stop)
        assert sequence.text == text[: text.index(stop)] == "".join(given[:-1])  # what was shown is never taken back
        completed_by = next(i for i, end in enumerate(ends) if end >= text.index(stop) + len(stop))
        assert completed_by > index and sequence.token_ids == ids[: completed_by + 1]


def test_a_stop_string_wins_over_the_length_reached_with_it(llm):
    (plain,) = llm.generate("Return the", GREEDY)
    text = plain.outputs[0].text
    stop = next(text[-i:] for i in range(2, len(text)) if text.index(text[-i:]) == len(text) - i)
    (output,) = llm.generate("Return the", SamplingParams(temperature=0, ignore_eos=True, stop=stop))
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert output.outputs[0].text == text.removesuffix(stop)


def test_stop_token_ids(llm):
    (plain,) = llm.generate("Return the", GREEDY)
    ids = plain.outputs[0].token_ids
    token = next(token for index, token in enumerate(ids) if index > 3 and token not in ids[:index])
    (output,) = llm.generate("Return the", SamplingParams(temperature=0, ignore_eos=True, stop_token_ids=[2047, token]))
    (sequence,) = output.outputs
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", token)
    assert sequence.token_ids == ids[: ids.index(token) + 1]  # the token stays, its text does not
    assert "Return the" + sequence.text == llm.tokenizer.decode(output.prompt_token_ids + sequence.token_ids[:-1])


def test_a_stop_string_that_is_a_special_token(llm, tmp_path):
    """A special token is no part of the text, and ends it as its id does. A stop that has more than the token never
    ends it, and says so; one that is spelled by the text's own tokens ends it as ever."""
    (plain,) = llm.generate("Return the", GREEDY)
    ids = plain.outputs[0].token_ids
    token = next(token for index, token in enumerate(ids) if index > 3 and token not in ids[:index])
    name = llm.tokenizer.backend.id_to_token(token)
    model = copy_of_demo(tmp_path / "model")
    fields = json.loads((model / "tokenizer.json").read_text())
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": token, "content": name})
    (model / "tokenizer.json").write_text(json.dumps(fields))
    with LLM(model, **OPTIONS) as other:
        (whole,) = other.generate(plain.prompt_token_ids, GREEDY)
        assert name not in whole.outputs[0].text and whole.outputs[0].token_ids == ids
        stops = SamplingParams(temperature=0, ignore_eos=True, stop=["never there", name])
        (ended,) = other.generate(plain.prompt_token_ids, stops)
        assert ended.outputs[0].token_ids == ids[: ids.index(token) + 1]
        assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", name)
        assert whole.outputs[0].text.startswith(ended.outputs[0].text) and len(ended.outputs[0].text) > 3
        message = rf"stop={re.escape(repr(name + '!'))} has the special token {re.escape(repr(name))}, .*\[{token}\]"
        with pytest.warns(UserWarning, match=message):
            (output,) = other.generate(plain.prompt_token_ids, dataclasses.replace(stops, stop=name + "!"))
        assert output == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (output,) = llm.generate("Return the", dataclasses.replace(stops, stop="<|eot_id|>"))
    assert output == plain


def test_end_of_sequence_and_ignore_eos(llm, tmp_path):
    """The demo model with another end-of-sequence: the fifth new token of a greedy answer."""
    (plain,) = llm.generate("Return the", GREEDY)
    ids = plain.outputs[0].token_ids
    eos = next(token for index, token in enumerate(ids) if index > 3 and token not in ids[:index])
    model = copy_of_demo(tmp_path / "model")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"eos_token_id": 1', f'"eos_token_id": [{eos}]'))
    with LLM(model, **OPTIONS) as other:  # a Path is as good as a string
        ended, going_on = (
            other.generate("Return the", [SamplingParams(temperature=0)]),
            other.generate("Return the", GREEDY),
        )
    assert tokens_of(ended) == [ids[: ids.index(eos) + 1]]
    assert (ended[0].outputs[0].finish_reason, ended[0].outputs[0].stop_reason) == ("stop", None)
    assert tokens_of(going_on) == [ids] and going_on[0].outputs[0].finish_reason == "length"


def copy_of_demo(directory: Path) -> Path:
    return Path(shutil.copytree(find_model("demo"), directory))


def test_max_tokens_and_the_longest_sequence(llm):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 7, 1000, None)]
    outputs = llm.generate(["Return the"] * 4, params)
    room = OPTIONS["max_model_len"] - len(outputs[0].prompt_token_ids)
    assert [len(tokens) for tokens in tokens_of(outputs)] == [1, 7, room, room]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    longest = [0] * (OPTIONS["max_model_len"] - 1)
    assert len(tokens_of(llm.generate([longest], params[3]))[0]) == 1


def test_logprobs(llm):
    (output,) = llm.generate(
        "Return the", SamplingParams(seed=3, temperature=1.5, ignore_eos=True, logprobs=3, max_tokens=30)
    )
    (sequence,) = output.outputs
    assert len(sequence.logprobs) == len(sequence.token_ids) == 30
    for token, position in zip(sequence.token_ids, sequence.logprobs):
        assert token in position and len(position) in (3, 4)
        ranked = sorted(position.values(), key=lambda one: one.rank)
        assert [one.rank for one in ranked[:3]] == [1, 2, 3]
        values = [one.logprob for one in ranked]
        assert values == sorted(values, reverse=True) and all(value < 0 for value in values)
        assert position[token].rank <= 3 or len(position) == 4
        assert position[token].decoded_token == llm.tokenizer.decode([token])
    chosen = [position[token].logprob for token, position in zip(sequence.token_ids, sequence.logprobs)]
    assert sequence.cumulative_logprob == sum(chosen)
    assert len({len(position) for position in sequence.logprobs}) == 2  # at 1.5 some tokens are outside the first three


def test_logprobs_of_the_sampled_token_only_and_of_all_that_count(llm):
    params = [SamplingParams(temperature=0, ignore_eos=True, logprobs=n) for n in (0, 20)]
    (none, _), (most, _) = (llm.generate(["Return the"] * 2, asked) for asked in (params, params[::-1]))
    for token, only, many in zip(none.outputs[0].token_ids, none.outputs[0].logprobs, most.outputs[0].logprobs):
        assert list(only) == [token] and only[token].rank == many[token].rank == 1
        assert only[token].logprob == many[token].logprob  # the first row of two
        assert len(many) == 20 and 0.2 < sum(math.exp(one.logprob) for one in many.values()) <= 1


def test_those_that_may_become_longest_begin_first(llm, monkeypatch):
    begun = []
    monkeypatch.setattr(llm.loop, "add", lambda sequence, add=llm.loop.add: (begun.append(sequence), add(sequence)))
    longest = llm.loop.scheduler.max_model_len
    most = [2, 5, None, 2]
    params = [SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True) for tokens in most]
    outputs = llm.generate([[7]] * 3 + [[7, 8]], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5, longest - 1, 2]
    assert [sequence.request.params.max_tokens for sequence in begun] == [None, 5, 2, 2]
    assert [len(sequence.request.prompt_token_ids) for sequence in begun[2:]] == [1, 2]  # else as they were given
