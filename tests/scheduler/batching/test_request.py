"""SamplingParams refuse every bad value by name; Request derives its state from what it holds."""

import dataclasses
import math

import pytest
from penstock.scheduler.batching.request import FinishReason, Request, RequestState, RowSampling, SamplingParams

NAN, INF = math.nan, math.inf
BAD_VALUES = {
    "n": ("an integer from 1 to 16384", [0, -1, 1.0, True, "1", None, 16385, 10**6, 2**31]),
    "temperature": ("finite number of at least 0", [-0.1, NAN, INF, "hot", None, True, 10**400]),
    "top_p": ("above 0, at most 1", [0, -0.5, 1.01, NAN, INF, None, "0.9", True]),
    "top_k": ("positive integer of at most 2147483647, or 0 or -1", [-2, 1.5, True, None, "5", 2**31]),
    "min_p": ("from 0 to 1", [-0.01, 1.01, NAN, None, False]),
    "max_tokens": ("from 1 to 2147483647, or None", [0, -5, 2.0, True, "16", NAN, 2**31]),
    "stop": ("string that is not empty", ["", [""], ["a", ""], [1], 5, ["a", None], b"a"]),
    "stop_token_ids": (
        "list of token ids (integers from 0 to 2147483647)",
        [[-1], [1.0], [True], ["a"], 5, "ab", [2**31], [None]],
    ),
    "seed": ("integer of 64 bits", [2**64, -(2**63) - 1, 1.0, "1", True]),
    "repetition_penalty": ("finite number above 0", [0, -1.0, NAN, INF, None, True]),
    "presence_penalty": ("from -2 to 2", [-2.1, 2.1, NAN, None, True]),
    "frequency_penalty": ("from -2 to 2", [-2.1, 2.1, INF, None, "1"]),
    "logprobs": ("from 0 to 20", [-1, 21, 1.0, True, "5"]),
    "prompt_logprobs": ("from 0 to 20", [-1, 21, 1.0, True, "5"]),
    "ignore_eos": ("True or False", [None, 1, "yes"]),
    "priority": ("from -2147483647 to 2147483647", [2**31, -(2**31), 1.0, True, None, "1"]),
    "cache_salt": ("a string that is not empty, or None", ["", 5, True, b"a"]),
}
GOOD_VALUES = {
    "n": [1, 7, 16384],
    "temperature": [0, 0.0, 1e-9, 2, 100.0],
    "top_p": [1e-6, 1, 1.0],
    "top_k": [1, 128256],
    "min_p": [0, 1],
    "max_tokens": [1, None, 10**6, 2**31 - 1],
    "seed": [0, 2**64 - 1, -(2**63), None],
    "repetition_penalty": [0.1, 1, 5.0],
    "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2.0, 2],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [None, 0, 20],
    "ignore_eos": [True, False],
    "priority": [-(2**31) + 1, 0, 7],
    "cache_salt": [None, "a", "two words"],
}


@pytest.mark.parametrize(
    "name, value, expected",
    [(name, value, expected) for name, (expected, values) in BAD_VALUES.items() for value in values],
)
def test_bad_value_is_refused_by_name(name, value, expected):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    shown = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}..."
    assert str(error.value).startswith(f"{name}={shown}: expected ")
    assert expected in str(error.value)


@pytest.mark.parametrize("name", [name for name in BAD_VALUES if name not in ("stop", "stop_token_ids", "ignore_eos")])
def test_a_number_that_python_does_not_write_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name}=\(a number of over 4300 digits\): expected "):
        SamplingParams(**{name: 10**5000})


def test_every_field_is_in_the_table_of_bad_values():
    assert {field.name for field in dataclasses.fields(SamplingParams)} == set(BAD_VALUES)


@pytest.mark.parametrize("name, value", [(n, v) for n, values in GOOD_VALUES.items() for v in values])
def test_good_value_is_kept(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 16,
        "stop": (),
        "stop_token_ids": (),
        "seed": None,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": None,
        "prompt_logprobs": None,
        "ignore_eos": False,
        "priority": 0,
        "cache_salt": None,
    }


def test_values_are_normalised():
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b c"]).stop == ("a", "b c")
    assert SamplingParams(stop=[]).stop == SamplingParams(stop=None).stop == ()
    assert SamplingParams(stop_token_ids=[3, 1]).stop_token_ids == (3, 1)
    assert isinstance(SamplingParams(temperature=1).temperature, float)
    assert hash(SamplingParams(stop=["a"])) == hash(SamplingParams(stop="a"))


@pytest.mark.parametrize("temperature, greedy", [(0, True), (9e-6, True), (1e-5, False), (1.0, False)])
def test_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_params_are_frozen_and_know_their_names():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(beam_width=4)


def test_finish_reasons_are_plain_strings():
    assert [f"{reason}" for reason in FinishReason] == ["stop", "length", "abort", "error"]
    assert FinishReason.STOP == "stop"


def test_request_state_follows_row_and_finish_reason():
    request = Request(0, [1, 2], SamplingParams())
    assert request.state is RequestState.WAITING
    request.row = 0
    assert request.state is RequestState.RUNNING
    request.finish_reason = FinishReason.STOP
    assert request.state is RequestState.FINISHED


def test_request_tokens():
    request = Request(0, [1, 2, 3], SamplingParams(), output_token_ids=[4, 5])
    assert request.tokens == [1, 2, 3, 4, 5] and request.num_tokens == 5
    for start in range(6):
        for end in range(start, 6):
            assert request.tokens_between(start, end) == request.tokens[start:end]


def test_most_tokens():
    def most(max_tokens):
        return Request(0, [1] * 10, SamplingParams(max_tokens=max_tokens)).most_tokens(20)

    assert (most(1), most(10), most(11), most(None)) == (11, 20, 20, 20)


def test_unresolved_seed_is_an_error_of_ours():
    with pytest.raises(AssertionError, match="seed -1"):
        Request(0, [1], SamplingParams(), seed=-1)


def test_row_sampling_of_a_greedy_request_has_no_filters():
    params = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.5)
    sampling = RowSampling.of(Request(0, [1], params, seed=9))
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.seed, sampling.num_logprobs) == (1.5, 9, -1)


def test_row_sampling_takes_every_parameter():
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logprobs=5,
    )
    expected = RowSampling(0.7, 0.9, 40, 0.05, 1.1, 0.2, -0.3, 2**64 - 1, 5)
    assert RowSampling.of(Request(0, [1], params, seed=2**64 - 1)) == expected
