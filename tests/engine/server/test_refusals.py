"""Requests that are refused: with which status, code and field, and never by a server error."""

import json
from dataclasses import replace

import pytest
from penstock.engine.planning.find_model import find_model
from penstock.engine.server.access import MOST_BODY_BYTES
from penstock.engine.server.encoding import TEMPLATE_FAILED, api_errors, without_paths
from penstock.engine.server.errors import ApiError
from penstock.engine.server.fields import REFUSED
from penstock.engine.server.validation import (
    MOST_PROMPTS,
    MOST_SEQUENCES,
    MOST_STOP_CHARACTERS,
    MOST_STOP_IDS,
    MOST_STOPS,
    read_chat,
    read_completion,
)
from penstock.engine.text import chat_template
from penstock.engine.text.model_prompts import ModelPrompts

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
WRONG = {  # by field: values that are refused on both routes
    "temperature": [-1, "hot", True, [0]],
    "top_p": [0, 1.1, "1"],
    "top_k": [-2, 1.5, 2**31],
    "min_p": [-0.1, 2],
    "n": [0, 1.5, "2", 20000],
    "seed": [2**64, -(2**63) - 1, 0.5],
    "max_tokens": [0, -1, 1.5, 2**31],
    "stop": [[""], "", [1], {"a": 1}, ["a"] * (MOST_STOPS + 1), "a" * (MOST_STOP_CHARACTERS + 1)],
    "stop_token_ids": [[-1], [2**31], [2048], "1", [True], [5] * (MOST_STOP_IDS + 1)],
    "presence_penalty": [2.1, -2.1],
    "frequency_penalty": [3],
    "repetition_penalty": [0, -1],
    "ignore_eos": [1, "true"],
    "priority": [2**31, "first"],
    "cache_salt": ["", 1],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, [], {"include_usage": 1}],
    "add_special_tokens": [0],
    "model": [1],
    "best_of": [2, "1"],
    "logit_bias": [{"1": 5}, [1], {"1": "a"}],
    "suffix": ["end"],
    "functions": [[{"name": "f"}]],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, "text", {"schema": {"$ref": "#"}}],
    "structured_outputs": [{"regex": "a"}, {"regex": "(a+)+$" * 10_000}],
    "guided_json": [{"type": "object"}, {"$ref": "#"}],
    "guided_regex": ["a", "((a*)*)*b" * 10_000],
    "guided_choice": [[str(number) for number in range(100_000)]],
    "min_tokens": [1],
    "bad_words": [["a"]],
    "allowed_token_ids": [[1]],
    "use_beam_search": [True],
    "length_penalty": [0.5],
    "truncate_prompt_tokens": [5, 0, -1],
    "skip_special_tokens": [False],
    "include_stop_str_in_output": [True],
    "prompt_embeds": ["a"],
    "chat_template": ["{{ messages }}"],
    "modalities": [["audio"]],
    "thinking_token_budget": [0, 5],
    "early_stopping": [True, "never"],
    "num_beams": [4],
    "mirostat": [2],
    "dry_multiplier": [0.8],
    "vllm_xargs": [{"a": 1}],
}
IN_COMPLETIONS = {
    "prompt": [None, [], [[]], [2048], [-1], [2**63], [[1], "a", 1], {"a": 1}, [True], [1.5], ["\ud800"]],
    "logprobs": [21, -1, True],
    "echo": ["yes"],
}
IMAGE = {"type": "image_url", "image_url": {"url": "http://a/b.png"}}
IN_COMPLETIONS["prompt"] += [["a"] * (MOST_PROMPTS + 1)]
IN_CHAT = {
    "messages": [None, [], "Hello", [1], [{"content": "a"}], [{"role": "user", "content": 5}], [HELLO]],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "top_logprobs": [3, 21],
    "logprobs": [1],
    "echo": [True],
    "chat_template_kwargs": [{"messages": []}, [1]],
}
IN_CHAT["messages"] += [[{"role": "user", "content": [IMAGE]}], [{"role": "user", "content": ["Hello"]}]]
CASES = [
    *((COMPLETIONS, field, value) for field, values in (WRONG | IN_COMPLETIONS).items() for value in values),
    *((CHAT, field, value) for field, values in (WRONG | IN_CHAT).items() for value in values),
]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
JSON = {"content-type": "application/json"}
GOOD = {COMPLETIONS: {"prompt": "def"}, CHAT: {"messages": HELLO}}


def error_of(response, status: int) -> dict:
    """The error of a response, whose form is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert "/" not in error["message"].replace("/v1/", "").replace("application/json", "")
    return error


def test_what_cannot_be_meant_is_refused_and_the_field_is_named(served):
    num_passes = served.llm.engine.times.num_passes
    wrong = []
    for path, field, value in CASES:
        response = served.call("POST", path, content=json.dumps(GOOD[path] | {field: value}), headers=JSON)
        if response.status_code != 400:
            wrong.append((path, field, value, response.status_code))
        elif error_of(response, 400)["param"] != (None if value == ["\ud800"] else field):
            wrong.append((path, field, value, response.json()))
    assert not wrong
    assert served.llm.engine.times.num_passes == num_passes


def test_what_is_expected_is_said_in_words_of_json(served):
    for field, value in (("max_tokens", 0), ("seed", 2**64), ("stop", [""]), ("stop_token_ids", [-1])):
        message = error_of(served.post(COMPLETIONS, prompt="def", **{field: value}), 400)["message"]
        assert message.endswith(", or null") and "None" not in message


def test_what_changes_nothing_is_taken(served):
    neutral = {
        "best_of": 1, "logit_bias": {"5": 0}, "suffix": "", "functions": [], "response_format": {"type": "text"},
        "min_tokens": 0, "use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True, "bad_words": [],
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k",
        "parallel_tool_calls": True, "reasoning_effort": "high", "no_such_field": [1], "tools": [], "max_tokens": 1,
        "guided_json": None,
    }  # fmt: skip
    for path in GOOD:
        served.answer(path, **GOOD[path], **neutral)
    tools = [{"type": "function", "function": {"name": "f"}}]
    served.answer(CHAT, messages=HELLO, tools=tools, tool_choice="none", max_tokens=1)


def test_defaults_stand_in_for_what_is_absent():
    defaults = {"temperature": 0.0, "top_k": 20}
    for read, good in ((read_completion, GOOD[COMPLETIONS]), (read_chat, GOOD[CHAT])):
        params = read(good | {"temperature": None, "top_k": 5}, defaults).params
        assert (params.temperature, params.top_k) == (0.0, 5)
    assert read_completion(GOOD[COMPLETIONS], {}).params.max_tokens == 16
    assert read_chat(GOOD[CHAT], {}).params.max_tokens is None


def test_every_field_that_is_refused_has_a_neutral_value():
    assert not [name for name, is_neutral in REFUSED.items() if is_neutral({"other": [1]})]


def test_ids_that_the_model_does_not_have_are_refused(served):
    """Also where they are to become text."""
    vocab_size = served.llm.engine.plan.spec.vocab_size
    for token in (vocab_size, vocab_size + 100, 2**31, 2**63, -1):
        for path, body in ((COMPLETIONS, {"prompt": [5, token]}), ("/detokenize", {"tokens": [5, token]})):
            error = error_of(served.post(path, **body), 400)
            assert error["param"] in ("prompt", "tokens") and "Python" not in error["message"]
    assert served.answer("/detokenize", tokens=[5, vocab_size - 1])["prompt"]


def test_caps_are_the_largest_that_is_taken(served):
    served.answer(COMPLETIONS, prompt="def", stop=["\0" * MOST_STOP_CHARACTERS] * MOST_STOPS, logprobs=20, max_tokens=1)
    assert len(read_completion({"prompt": ["def"] * 512, "n": MOST_SEQUENCES // 512}, {}).prompts) == 512
    error = error_of(served.post(COMPLETIONS, prompt=["def"] * 512, n=3), 400)
    assert error["param"] == "n"
    served.answer(COMPLETIONS, prompt=[5] * 255, max_tokens=1)
    served.answer(COMPLETIONS, prompt=[2047], max_tokens=1)


def test_a_prompt_that_is_too_long_has_its_code(served):
    for path, body in (
        (COMPLETIONS, {"prompt": [5] * 256}),
        (COMPLETIONS, {"prompt": "a" * 2**21}),
        (COMPLETIONS, {"prompt": ["def", "word " * 400]}),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 400}]}),
    ):
        assert error_of(served.post(path, **body), 400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"5", b'"a"', b"\xff", b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "\x00"}',
        b'{"prompt": "def", "temperature": NaN}', b'{"prompt": "def", "temperature": 1e400}',
        b'{"prompt": "def", "temperature": Infinity}', b'{"prompt": "def", "seed": ' + b"1" * 5000 + b"}",
        b"[" * 50_000, b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", b'{"prompt": "\\ud800"}',
        b'{"prompt": "def", "stop": "\\ud83d"}', b'{"prompt": "def", "cache_salt": "\\udfff"}',
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)  # fmt: skip
def test_a_body_that_is_no_request_is_refused(served, body):
    error_of(served.call("POST", COMPLETIONS, content=body, headers=JSON), 400)


def test_nul_and_whole_surrogate_pairs_are_text(served):
    served.answer(COMPLETIONS, prompt="a\0b", max_tokens=1)
    body = b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}'
    assert served.call("POST", COMPLETIONS, content=body, headers=JSON).is_success


def test_a_body_that_is_too_large_is_refused_as_it_comes(served):
    async def endless():
        taken = 0
        while True:
            assert taken <= MOST_BODY_BYTES + 2**20, "it was read to its end"
            taken += 2**20
            yield b" " * 2**20

    error_of(served.call("POST", COMPLETIONS, content=endless(), headers=JSON), 413)
    told = {"content-length": str(2**40), **JSON}
    error_of(served.call("POST", COMPLETIONS, content=b"", headers=told), 413)


def test_only_json_is_taken(served):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error_of(served.call("POST", COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": kind}), 400)
    response = served.call(
        "POST", COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": "application/json; charset=utf-8"}
    )
    assert response.is_success


def test_routes_models_and_methods_that_are_not_there(served):
    assert error_of(served.post(COMPLETIONS, prompt="a", model="gpt-4"), 404)["code"] == "model_not_found"
    assert error_of(served.call("GET", "/v1/models/no-such"), 404)["code"] == "model_not_found"
    for path in ("/v1/nothing", "/v1/models/", "/v1/completions/", "/docs"):
        error_of(served.call("GET", path), 404)
    assert served.call("GET", COMPLETIONS).headers["allow"] == "POST"
    error_of(served.call("GET", COMPLETIONS), 405)
    error_of(served.call("OPTIONS", COMPLETIONS), 405)
    assert "access-control-allow-origin" not in served.call("GET", "/v1/models", headers={"origin": "http://a"}).headers


def test_an_error_is_one_line_however_long_a_value_is(served):
    for body in ({"prompt": {"a" * 10**6: 1}}, {"prompt": "a", "model": "b" * 10**6}, {"prompt": [[1.5] * 10**6]}):
        error = served.post(COMPLETIONS, **body).json()["error"]
        assert len(error["message"]) < 2100 and error["message"].isprintable()


def test_the_routes_are_described(served):
    paths = served.call("GET", "/openapi.json").json()["paths"]
    fields = paths[COMPLETIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert "min_p" in fields and {COMPLETIONS, CHAT, "/tokenize", "/health", "/v1/models/{model_id}"} <= set(paths)
    assert served.call("HEAD", "/health").status_code == 200


def test_models_are_listed(served):
    (card,) = served.call("GET", "/v1/models").json()["data"]
    assert card["id"] == card["root"] == "demo" and card["max_model_len"] == 256 and card["parent"] is None
    assert served.call("GET", "/v1/models/demo").json() == card


def test_no_folder_of_the_server_is_told(served, tmp_path):
    config = replace(served.service.config, chat_template=str(tmp_path / "strict.jinja"))
    told = without_paths(f"{tmp_path}/strict.jinja: conversation 0: roles must alternate", config)
    assert told == "the chat template: conversation 0: roles must alternate"
    folder = find_model("demo")
    assert without_paths(f"{folder}/tokenizer.json: cannot encode", config) == "tokenizer.json: cannot encode"


TEMPLATES = {  # what a client is told of each: its own words, or none of Python's
    "{{ raise_exception('roles must alternate') }}": "the chat template: conversation 0: roles must alternate",
    "{{ x.y }}": TEMPLATE_FAILED,
    "{{ messages[0].content + 1 }}": TEMPLATE_FAILED,
    "{{ {}[messages[0].content].x }}": TEMPLATE_FAILED,
    "{{ ''.__class__.__mro__ }}": TEMPLATE_FAILED,
    "{{ 2.0 ** 9999 }}": TEMPLATE_FAILED,
    "{% if %}": TEMPLATE_FAILED,
    "{{ messages[0].content }}" + LOOP: "the chat template: cannot be rendered: takes more than 1 s of CPU time",
}


def test_a_template_that_fails_is_refused_in_its_own_words_or_in_none(served, tmp_path, monkeypatch, caplog):
    """Prints what failed where, without a word of a request; and the next request is answered."""
    monkeypatch.setattr(chat_template, "CPU_S", 1)
    monkeypatch.setattr(chat_template, "CPU_S_EACH", 0)
    model, secret = served.service.model, [{"role": "user", "content": "a secret"}]
    for number, (template, message) in enumerate(TEMPLATES.items()):
        file = tmp_path / f"{number}.jinja"
        file.write_text(template)
        config = replace(model.config, chat_template=str(file))
        own = ModelPrompts(config, model.tokenizer, served.llm.engine.plan.spec.vocab_size, model.limits)
        monkeypatch.setattr(served.service, "model", own)
        error = error_of(served.post(CHAT, messages=secret), 400)
        assert (error["message"], error["param"]) == (message, "messages")
        served.answer(COMPLETIONS, prompt="def", max_tokens=1)
    printed = [record.getMessage() for record in caplog.records]
    kinds = ["UndefinedError", "TypeError", "UndefinedError", "SecurityError", "OverflowError", "a syntax error"]
    assert printed == [f"{TEMPLATE_FAILED}: {kind} in line 1" for kind in kinds]


def test_no_address_of_the_servers_memory_is_told(served):
    told = "TypeError: can only concatenate str (not <Macro object at 0x7f00deadBEEF>) to str"
    with pytest.raises(ApiError) as raised, api_errors(served.service.config, "messages"):
        raise ValueError(told)
    assert raised.value.message == told.replace(" at 0x7f00deadBEEF", "")


def test_a_refusal_is_logged_by_its_code_and_field_alone(served):
    served.kept.records.clear()
    served.post(COMPLETIONS, prompt="secret", suffix="secret")
    served.post(CHAT, model="secret", messages=HELLO)
    served.post("/tokenize")  # nobody's text
    first, second = served.kept.records
    assert first.pop("came") <= second.pop("came")
    assert first == {"route": "completions", "status": 400, "error": "invalid", "param": "suffix"}
    assert second == {"route": "chat/completions", "status": 404, "error": "model_not_found", "param": "model"}
