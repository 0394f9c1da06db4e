"""The fields of requests: which of them are read, and as which of JSON's types; which are refused, and at which value
they are not.

A field that is null counts as absent. One that is in neither table is ignored: it changes neither tokens nor text.
"""

from collections.abc import Callable, Mapping
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}

# SamplingParams' own fields by the same name, which checks their values
SAMPLING = {
    "n": ("integer",),
    "temperature": ("number",),
    "top_p": ("number",),
    "top_k": ("integer",),
    "min_p": ("number",),
    "max_tokens": ("integer",),
    "stop": ("string", "array"),
    "stop_token_ids": ("array",),
    "seed": ("integer",),
    "repetition_penalty": ("number",),
    "presence_penalty": ("number",),
    "frequency_penalty": ("number",),
    "ignore_eos": ("boolean",),
    "priority": ("integer",),
    "cache_salt": ("string",),
}
_COMMON = SAMPLING | {
    "model": ("string",),
    "stream": ("boolean",),
    "stream_options": ("object",),
    "add_special_tokens": ("boolean",),
}
COMPLETION = _COMMON | {"prompt": ("string", "array"), "logprobs": ("integer",), "echo": ("boolean",)}
_TEMPLATE = {
    "messages": ("array",),
    "tools": ("array",),
    "tool_choice": ("string", "object"),
    "add_generation_prompt": ("boolean",),
    "continue_final_message": ("boolean",),
    "chat_template_kwargs": ("object",),
}
CHAT = _COMMON | _TEMPLATE
CHAT |= {"max_completion_tokens": ("integer",), "logprobs": ("boolean",), "top_logprobs": ("integer",)}
TOKENIZE = _TEMPLATE | {
    "model": ("string",),
    "prompt": ("string",),
    "add_special_tokens": ("boolean",),
    "return_token_strs": ("boolean",),
}
DETOKENIZE = {"model": ("string",), "tokens": ("array",)}


def _empty(value: Any) -> bool:
    return value in ([], {}, "", False)


def _never(value: Any) -> bool:
    return False


def _is(neutral: Any) -> Callable[[Any], bool]:
    return lambda value: value == neutral and type(value) is type(neutral)


def _number(neutral: float) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, bool) and value == neutral


def _no_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(bias, int | float) and bias == 0 for bias in value.values())


# Fields that would change tokens or text and are not built, each with its neutral values: those that change nothing.
REFUSED: Mapping[str, Callable[[Any], bool]] = {
    "logit_bias": _no_bias,
    "suffix": _empty,
    "prompt_embeds": _empty,
    "functions": _empty,
    "response_format": lambda value: value == {"type": "text"},
    "structured_outputs": _empty,
    "guided_json": _is(""),  # an empty schema asks for any JSON
    "guided_regex": _empty,
    "guided_choice": _empty,
    "guided_grammar": _empty,
    "guided_whitespace_pattern": _empty,
    "structural_tag": _empty,
    "grammar": _empty,
    "json_schema": _is(""),
    "regex": _empty,
    "min_tokens": _number(0),
    "bad_words": _empty,
    "allowed_token_ids": _empty,
    "use_beam_search": _empty,
    "length_penalty": _number(1),
    "truncate_prompt_tokens": _never,
    "skip_special_tokens": _is(True),
    "spaces_between_special_tokens": _is(True),
    "include_stop_str_in_output": _is(False),
    "return_tokens_as_token_ids": _is(False),
    "chat_template": _empty,
    "documents": _empty,
    "audio": _empty,
    "modalities": lambda value: value in ([], ["text"]),
    "web_search_options": _empty,
    "logits_processors": _empty,
    "min_new_tokens": _number(0),
    "num_beams": _number(1),
    "early_stopping": _is(False),
    "thinking_token_budget": _never,
    "repetition_detection": _empty,
    "vllm_xargs": _empty,
    "ebnf": _empty,
    "typical_p": _number(1),
    "tfs_z": _number(1),
    "top_a": _number(0),
    "mirostat": _number(0),
    "dry_multiplier": _number(0),
    "xtc_probability": _number(0),
    "no_repeat_ngram_size": _number(0),
}
