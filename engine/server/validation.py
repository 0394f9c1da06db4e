"""Checks requests: the JSON of a body becomes prompts or messages and SamplingParams, or an error that names the field.

The one validator of the server's routes and of jobs in files. It needs no library of the server's, no model and no
tokenizer: what only those can tell (too long, no such token) is found when the prompt is encoded.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from penstock.engine.server.errors import ApiError, refused
from penstock.engine.server.fields import CHAT, COMPLETION, DETOKENIZE, REFUSED, SAMPLING, TOKENIZE, TYPES
from penstock.engine.server.requests import Chat, Completion, Tokenize
from penstock.engine.text.chat_template import ChatOptions
from penstock.scheduler.batching.request import MAX_LOGPROBS, SamplingParams
from penstock.scheduler.units import show_value

MOST_PROMPTS = 1024
MOST_SEQUENCES = 1024  # n of each prompt
# They are compared with each token, while a pass waits.
MOST_STOPS, MOST_STOP_CHARACTERS, MOST_STOP_IDS = 16, 256, 1024
_PATTERN = re.compile(r"(?:prompt \d+: )?(\w+)[=:]")  # the field that SamplingParams' and PromptReader's errors name

Body = Mapping[str, Any]


def read_completion(body: Any, defaults: Body) -> Completion:
    """A request for a completion; `defaults` stand in for SamplingParams' fields that are absent. Raises ApiError."""
    given = _fields(body, COMPLETION)
    prompts = _prompts(given)
    top = given.get("logprobs")
    params = _params(given, defaults, logprobs=top, prompt_logprobs=top if given.get("echo") else None)
    _check_best_of(body, params)
    if len(prompts) * params.n > MOST_SEQUENCES:
        raise refused(f"{len(prompts)} prompts times n={params.n}: expected at most {MOST_SEQUENCES} sequences", "n")
    if params.prompt_logprobs is not None and given.get("stream") and params.n > 1:
        raise refused(f"echo: log probabilities of a prompt are streamed with n=1 only, not n={params.n}", "echo")
    return Completion(
        params=params,
        prompts=prompts,
        echo=given.get("echo", False),
        add_special=given.get("add_special_tokens", True),
        **_delivery(given),
    )


def read_chat(body: Any, defaults: Body) -> Chat:
    """A request for a chat completion. Raises ApiError."""
    given = _fields(body, CHAT)
    if body.get("echo"):
        raise refused("echo: is for /v1/completions", "echo")
    top = given.get("top_logprobs", 0)
    if top and not given.get("logprobs"):
        raise refused("top_logprobs: expected logprobs true with it", "top_logprobs")
    if not 0 <= top <= MAX_LOGPROBS:
        raise refused(f"top_logprobs={show_value(top)}: expected an integer from 0 to {MAX_LOGPROBS}", "top_logprobs")
    lengths = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
    given = given | ({"max_tokens": lengths[0]} if lengths else {})
    params = _params(given, {"max_tokens": None} | defaults, logprobs=top if given.get("logprobs") else None)
    _check_best_of(body, params)
    if params.n > MOST_SEQUENCES:
        raise refused(f"n={params.n}: expected at most {MOST_SEQUENCES}", "n")
    return Chat(
        params=params,
        messages=_messages(given),
        options=_options(given),
        add_special=given.get("add_special_tokens", False),
        **_delivery(given),
    )


def read_tokenize(body: Any) -> Tokenize:
    """A request for token ids. Raises ApiError."""
    given = _fields(body, TOKENIZE)
    if ("prompt" in given) == ("messages" in given):
        raise refused("prompt, messages: expected one of them", "prompt")
    messages = _messages(given) if "messages" in given else None
    return Tokenize(
        model=given.get("model"),
        text=given.get("prompt"),
        messages=messages,
        options=_options(given),
        add_special=given.get("add_special_tokens", messages is None),
        with_texts=given.get("return_token_strs", False),
    )


def read_detokenize(body: Any) -> tuple[str | None, list[int]]:
    """A request for the text of token ids: the model, and the ids. Raises ApiError."""
    given = _fields(body, DETOKENIZE)
    tokens = given.get("tokens")
    if tokens is None or not all(type(token) is int and token >= 0 for token in tokens):
        raise refused("tokens: expected a list of token ids", "tokens")
    return given.get("model"), tokens


def naming_field(error: ValueError, otherwise: str, code: str | None = None) -> ApiError:
    """The API's error for one of SamplingParams, of PromptReader or of a template, whose text begins with the field
    that is at fault, if that is not `otherwise`."""
    match = _PATTERN.match(str(error))
    named = match[1] if match and match[1] in (COMPLETION | CHAT) else otherwise
    return refused(re.sub("or None$", "or null", str(error)), named, code)  # the words of JSON


def _fields(body: Any, types: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The fields that are read, and not null. Raises ApiError for one of a wrong type, or that is refused."""
    if not isinstance(body, dict):
        raise refused("expected a JSON object")
    for name, is_neutral in REFUSED.items():
        value = body.get(name)
        if value is not None and not is_neutral(value):
            raise refused(f"{name}={show_value(value)}: is not supported, and would change the answer", name)
    given = {name: body[name] for name in types if body.get(name) is not None}
    for name, value in given.items():
        if not any(_has_type(value, kind) for kind in types[name]):
            expected = " or ".join(f"{'an' if kind[0] in 'aeio' else 'a'} {kind}" for kind in types[name])
            raise refused(f"{name}={show_value(value)}: expected {expected}", name)
    return given


def _has_type(value: Any, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _params(given: Body, defaults: Body, **scores: int | None) -> SamplingParams:
    _check_stops(given)
    chosen = {**defaults, **{name: given[name] for name in SAMPLING if name in given}}
    try:
        return SamplingParams(**chosen, **scores)
    except ValueError as error:
        raise naming_field(error, "") from None


def _check_stops(given: Body) -> None:
    stops, ids = given.get("stop", []), given.get("stop_token_ids", [])
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > MOST_STOPS:
        raise refused(f"stop: {len(stops)} strings, and at most {MOST_STOPS} are taken", "stop")
    if any(isinstance(stop, str) and len(stop) > MOST_STOP_CHARACTERS for stop in stops):
        raise refused(f"stop: a string has more than {MOST_STOP_CHARACTERS} characters", "stop")
    if len(ids) > MOST_STOP_IDS:
        raise refused(f"stop_token_ids: {len(ids)} ids, and at most {MOST_STOP_IDS} are taken", "stop_token_ids")


def _check_best_of(body: Body, params: SamplingParams) -> None:
    best_of = body.get("best_of")
    if best_of not in (None, 0, 1, params.n):
        raise refused(f"best_of={show_value(best_of)}: expected n, which is {params.n}", "best_of")


def _delivery(given: Body) -> dict[str, Any]:
    """The fields of Generation that say how an answer is sent."""
    options, streams = given.get("stream_options", {}), given.get("stream", False)
    for name in ("include_usage", "continuous_usage_stats"):
        if not isinstance(options.get(name), bool | None):
            raise refused(f"stream_options: {name}: expected a boolean", "stream_options")
    if options and not streams:
        raise refused("stream_options: expected stream true with it", "stream_options")
    always = bool(options.get("continuous_usage_stats"))
    sends_usage = bool(options.get("include_usage"))
    return {
        "model": given.get("model"),
        "streams": streams,
        "sends_usage": sends_usage,
        "sends_usage_always": sends_usage and always,
    }


def _prompts(given: Body) -> list[Any]:
    prompt = given.get("prompt")
    if prompt is None:
        raise refused("prompt: is missing", "prompt")
    if isinstance(prompt, str) or (prompt and type(prompt[0]) is int):
        return [prompt]
    if not prompt:
        raise refused("prompt: is an empty list", "prompt")
    if len(prompt) > MOST_PROMPTS:
        raise refused(f"prompt: {len(prompt)} prompts, and at most {MOST_PROMPTS} are taken", "prompt")
    if not all(isinstance(each, str | list) for each in prompt):
        raise refused("prompt: expected a text, a list of token ids, or a list of such prompts", "prompt")
    return prompt


def _messages(given: Body) -> list[Any]:
    messages = given.get("messages")
    if not messages:
        raise refused("messages: expected a list of messages, one at least", "messages")
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    for part in itertools.chain.from_iterable(content for content in contents if isinstance(content, list)):
        kind = part.get("type", "text") if isinstance(part, dict) else part
        if kind != "text":
            raise refused(f"messages: a part of type {show_value(kind)}: only text is taken", "messages")
    return messages


def _options(given: Body) -> ChatOptions:
    """Says how messages are rendered. Tools without `tool_choice` none would ask for answers that are parsed, and other
    choices for a call in any case."""
    tools, choice = given.get("tools"), given.get("tool_choice")
    if tools and choice != "none":
        raise refused("tools: answers are not parsed for calls: expected tool_choice 'none' with them", "tools")
    if choice not in (None, "none", "auto"):
        raise refused(f"tool_choice={show_value(choice)}: expected 'none', or 'auto' without tools", "tool_choice")
    continues = given.get("continue_final_message", False)
    try:
        return ChatOptions(
            add_generation_prompt=given.get("add_generation_prompt", not continues),
            continue_final_message=continues,
            tools=tools or None,
            chat_template_kwargs=given.get("chat_template_kwargs", {}),
        )
    except ValueError as error:
        raise naming_field(error, "chat_template_kwargs") from None
