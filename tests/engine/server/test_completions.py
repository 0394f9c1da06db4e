"""/v1/completions gives what LLM.generate gives, in OpenAI's form."""

import asyncio

import httpx
import pytest
from penstock.engine.server import encoding

from penstock import SamplingParams
from tests.support.serving import chunks_of

PATH = "/v1/completions"
PROMPT = "Return the number of"
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def outputs(alone):
    """Gives the outputs of LLM.generate, one for each choice."""

    def generate(prompts, **params):
        alone.reset_prefix_cache()
        results = alone.generate(prompts, SamplingParams(**params))
        return [output for result in results for output in result.outputs]

    return generate


def test_an_answer_has_the_text_of_generate_and_counts_tokens(served, outputs):
    (expected,) = outputs(PROMPT, **GREEDY)
    answer = served.answer(PATH, model="demo", prompt=PROMPT, **GREEDY)
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "text": expected.text,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    prompt_tokens = len(served.llm.encode(PROMPT))
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 6, "total_tokens": prompt_tokens + 6}
    assert answer["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-") and answer["model"] == "demo"


def test_prompts_are_texts_or_token_ids_or_lists_of_either(served, outputs):
    ids = served.llm.encode(PROMPT)
    (alone,) = outputs(PROMPT, **GREEDY)
    (other,) = outputs("def", **GREEDY)
    for prompt, expected in (
        (PROMPT, [alone]),
        (ids, [alone]),
        ([PROMPT], [alone]),
        ([ids], [alone]),
        ([PROMPT, "def"], [alone, other]),
        (["def", ids], [other, alone]),
    ):
        choices = served.answer(PATH, prompt=prompt, **GREEDY)["choices"]
        assert [(c["index"], c["text"]) for c in choices] == [(i, e.text) for i, e in enumerate(expected)]


@pytest.mark.parametrize("num_prompts, few, waits", [(1, 8192, False), (2, 8192, True), (1, 0, True)])
def test_few_token_ids_wait_for_no_thread(served, monkeypatch, num_prompts, few, waits):
    """Of one prompt; more of them, or of prompts, may take long."""
    called, in_worker = [], served.service.in_worker

    def note(call, *arguments):
        called.append(call)
        return in_worker(call, *arguments)

    monkeypatch.setattr(served.service, "in_worker", note)
    monkeypatch.setattr(encoding, "FEW_IDS", few)
    choices = served.answer(PATH, prompt=num_prompts * [served.llm.encode(PROMPT)], **GREEDY)["choices"]
    assert len(choices) == num_prompts and called == waits * [encoding.sequences_of]


def test_choices_are_those_of_each_prompt_in_turn(served, outputs):
    params = {"temperature": 1.0, "max_tokens": 4, "seed": 7, "n": 3, "ignore_eos": True}
    expected = outputs(["def", PROMPT], **params)
    answer = served.answer(PATH, prompt=["def", PROMPT], **params)
    assert [choice["text"] for choice in answer["choices"]] == [output.text for output in expected]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["completion_tokens"] == 24
    assert answer["usage"]["prompt_tokens"] == len(served.llm.encode("def")) + len(served.llm.encode(PROMPT))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.9, "top_p": 0.8, "seed": 3},
        {"temperature": 1.1, "top_k": 20, "seed": 4, "min_p": 0.02},
        {"temperature": 0, "repetition_penalty": 1.4},
        {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0, "stop": [" the", "\n"]},
        {"temperature": 0, "stop": "e"},
        {"temperature": 0, "stop_token_ids": list(range(0, 2048, 3))},
        {"temperature": 0, "priority": -3, "cache_salt": "mine"},
    ],
    ids=lambda params: "-".join(params),
)
def test_every_sampling_field_has_its_effect(served, outputs, params):
    (expected,) = outputs(PROMPT, max_tokens=12, **params)
    (choice,) = served.answer(PATH, prompt=PROMPT, max_tokens=12, **params)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    assert choice["stop_reason"] == expected.stop_reason


def test_log_probabilities_are_those_of_generate(served, outputs):
    (expected,) = outputs(PROMPT, logprobs=3, **GREEDY)
    (choice,) = served.answer(PATH, prompt=PROMPT, logprobs=3, **GREEDY)["choices"]
    told = choice["logprobs"]
    assert told["token_logprobs"] == [p[t].logprob for p, t in zip(expected.logprobs, expected.token_ids)]
    assert [max(top.values()) for top in told["top_logprobs"]] == told["token_logprobs"]  # greedy, as lm-eval sees it
    assert "".join(told["tokens"]) == choice["text"] and all(len(top) == 3 for top in told["top_logprobs"])
    assert told["text_offset"][:2] == [0, len(told["tokens"][0])]


def test_a_prompt_may_be_given_back(served, outputs):
    (plain,) = outputs(PROMPT, **GREEDY)
    for prompt in (PROMPT, served.llm.encode(PROMPT)):
        (choice,) = served.answer(PATH, prompt=prompt, echo=True, **GREEDY)["choices"]
        assert choice["text"] == PROMPT + plain.text


@pytest.mark.parametrize("n", [1, 2])
def test_an_echo_has_the_log_probabilities_of_its_prompt(served, alone, n):
    """Each choice has, the first token of a prompt none; what lm-eval cuts out of it is the engine's own, and greedy
    where the token is the likeliest."""
    params = SamplingParams(**GREEDY, logprobs=2, prompt_logprobs=2)
    (expected,) = alone.generate([PROMPT], params)
    answer = served.answer(PATH, prompt=PROMPT, echo=True, logprobs=2, n=n, **GREEDY)
    tokens, scored = expected.prompt_token_ids, expected.prompt_logprobs
    for choice in answer["choices"]:
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(tokens) + len(expected.outputs[0].token_ids)
        assert told["token_logprobs"][0] is None is told["top_logprobs"][0] and told["text_offset"][0] == 0
        of_prompt = [position[token].logprob for token, position in zip(tokens[1:], scored[1:])]
        assert told["token_logprobs"][1 : len(tokens)] == of_prompt
        assert "".join(told["tokens"]) == choice["text"]
        for (token, position), top in zip(zip(tokens[1:], scored[1:]), told["top_logprobs"][1:]):
            assert (position[token].rank == 1) == (position[token].logprob == max(top.values()))


def test_an_echo_is_streamed_with_its_log_probabilities(served):
    body = {"prompt": PROMPT, "echo": True, "logprobs": 1} | GREEDY
    (whole,) = served.answer(PATH, **body)["choices"]
    chunks = [chunk["choices"][0]["logprobs"] for chunk in served.stream(PATH, **body)]
    for name, told in whole["logprobs"].items():
        assert [one for chunk in chunks for one in chunk[name]] == told, name
    response = served.call("POST", PATH, json=body | {"stream": True, "n": 2})
    assert response.status_code == 400 and response.json()["error"]["param"] == "echo"


def test_the_default_length_is_16_and_null_is_absent(served):
    answer = served.answer(PATH, prompt=PROMPT, ignore_eos=True, max_tokens=None, stop=None, seed=None, logprobs=None)
    assert answer["usage"]["completion_tokens"] == 16


def test_cached_tokens_are_counted_and_a_salt_keeps_them_apart(served):
    prompt = PROMPT * 8
    cached = [
        served.answer(PATH, prompt=prompt, cache_salt=salt, **GREEDY)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("one", "one", "two")
    ]
    assert cached[0] == cached[2] == 0 and cached[1] >= 16


def test_special_tokens_are_put_around_a_prompt_unless_that_is_refused(served):
    with_bos, without = (
        served.answer(PATH, prompt=PROMPT, add_special_tokens=adds, **GREEDY)["usage"]["prompt_tokens"]
        for adds in (True, False)
    )
    tokenizer = served.llm.tokenizer
    assert without == len(tokenizer.encode(PROMPT, add_special=False))
    assert with_bos == len(tokenizer.encode(PROMPT, add_special=True))


def test_a_stream_is_one_chunk_a_token_and_the_text_of_the_whole(served, outputs):
    (expected,) = outputs(PROMPT, **GREEDY)
    chunks = served.stream(PATH, prompt=PROMPT, **GREEDY)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    assert len(chunks) == 6
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and "usage" not in chunks[0]


def test_a_stream_of_several_choices_has_each_of_them_whole(served, outputs):
    params = {"temperature": 1.0, "max_tokens": 5, "seed": 7, "n": 2, "ignore_eos": True, "logprobs": 1}
    expected = outputs(["def", PROMPT], **params)
    chunks = served.stream(PATH, prompt=["def", PROMPT], **params)
    choices = [chunk["choices"][0] for chunk in chunks]
    for index, output in enumerate(expected):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == output.text and len(mine) == 5
        told = [logprob for choice in mine for logprob in choice["logprobs"]["token_logprobs"]]
        assert told == [p[t].logprob for p, t in zip(output.logprobs, output.token_ids)]
        tokens = [token for choice in mine for token in choice["logprobs"]["tokens"]]
        offsets = [offset for choice in mine for offset in choice["logprobs"]["text_offset"]]
        assert offsets == [len("".join(tokens[:number])) for number in range(5)]


def test_a_stream_tells_usage_at_its_end_or_always(served):
    body = {"prompt": PROMPT, **GREEDY}
    chunks = served.stream(PATH, stream_options={"include_usage": True}, **body)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 6
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = served.stream(PATH, stream_options=options, **body)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6, 6]


def test_the_id_of_an_answer_is_a_header_too(served):
    """The official client looks for it there."""
    whole = served.post(PATH, prompt=PROMPT, **GREEDY)
    assert whole.headers["x-request-id"] == whole.json()["id"]
    stream = served.post(PATH, prompt=PROMPT, stream=True, **GREEDY)
    assert stream.headers["x-request-id"] == chunks_of(stream.text)[0]["id"]


def test_an_echo_is_in_the_first_chunk(served):
    first, *rest = served.stream(PATH, prompt=PROMPT, echo=True, **GREEDY)
    plain, *others = served.stream(PATH, prompt=PROMPT, **GREEDY)
    assert first["choices"][0]["text"] == PROMPT + plain["choices"][0]["text"]
    assert [chunk["choices"] for chunk in rest] == [chunk["choices"] for chunk in others]


def test_requests_at_once_answer_as_if_alone(served, outputs):
    """More of them than rows."""
    prompts = ["def", PROMPT, "class", "import", "Raise", "Test", "If the"]
    expected = [output.text for output in outputs(prompts, **GREEDY)]

    async def ask_all():
        transport = httpx.ASGITransport(served.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            asks = [client.post(PATH, json={"prompt": prompt, **GREEDY}) for prompt in prompts]
            return await asyncio.gather(*asks)

    texts = [response.json()["choices"][0]["text"] for response in served.run(ask_all())]
    assert texts == expected
