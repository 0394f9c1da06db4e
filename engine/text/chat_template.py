"""Renders conversations by a model's chat template, within bounds (template_process.py).

A conversation is a list of messages, which are JSON's objects with a role and a content. The text that comes out begins
with BOS if the template says so: it is encoded without the special tokens that a tokenizer adds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.engine.text.template_processes import TemplateProcesses
from penstock.engine.user_files import has_lone_surrogate, parse_json
from penstock.scheduler.units import GIB, MIB, show_value

Message = Mapping[str, Any]
MOST_CHARACTERS = 64 * MIB  # of all texts of a call
MEMORY_BYTES = 2 * GIB
CPU_S, CPU_S_EACH = 10, 1  # of a call, and of each conversation in it
_NOT_GIVEN = {"messages", "tools", "documents", "chat_template", "tokenize"}
_NOT_GIVEN |= {"add_generation_prompt", "continue_final_message"}
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # stands where a last message that is to be continued ends


class TemplateFault(ValueError):
    """Says that a template fails by itself, with the words of the error, which may show texts of a conversation;
    `place` says what failed where, without them."""

    def __init__(self, told: str, place: str):
        super().__init__(told)
        self.place = place


@dataclass(frozen=True)
class ChatOptions:
    """Says how conversations are rendered; names and defaults are transformers' and vLLM's. `add_generation_prompt`:
    the model's turn begins at the end. `continue_final_message`: the last message is left open instead."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("continue_final_message: give add_generation_prompt=False with it")
        for name in self.chat_template_kwargs:
            if name in _NOT_GIVEN:
                raise ValueError(f"chat_template_kwargs: {name} has a meaning of its own and cannot be given there")


@dataclass(frozen=True)
class ChatTemplate:
    """A template; `where` is the file, or the file and key, that messages name. `named` are the special tokens that it
    may use by name."""

    source: str
    where: str
    named: Mapping[str, str] = field(default_factory=dict)
    processes: TemplateProcesses = field(default_factory=TemplateProcesses, repr=False, compare=False)

    def render(self, conversations: Sequence[Sequence[Message]], options: ChatOptions) -> list[str]:
        """The text of each conversation. Raises ValueError naming the template, and the conversation, for messages that
        it cannot have, and beyond the bounds; TemplateFault where the template fails by itself."""
        if not conversations:
            return []
        variables = [self._variables(messages, options) for messages in conversations]
        request = {"template": self.source, "conversations": variables, "most_characters": MOST_CHARACTERS}
        request |= {"memory_bytes": MEMORY_BYTES, "cpu_s": CPU_S + CPU_S_EACH * len(conversations)}
        try:
            text = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"tools, chat_template_kwargs: are not JSON: {error}") from None
        answer = self._answer(text, request["cpu_s"])
        if "texts" not in answer:
            which = f": conversation {answer['index']}" if "index" in answer else ""
            told = f"{self.where}{which}: {' '.join(answer['error'].split())}"
            raise TemplateFault(told, answer["place"]) if "place" in answer else ValueError(told)
        if not options.continue_final_message:
            return answer["texts"]
        return [self._open_ended(index, text) for index, text in enumerate(answer["texts"])]

    def _variables(self, messages: Sequence[Message], options: ChatOptions) -> dict[str, Any]:
        if not _iterates_content(self.source):
            messages = [_with_joined_parts(message) for message in messages]
        if _takes_objects(self.source):
            messages = [_with_arguments(message) for message in messages]
        if options.continue_final_message:
            messages = [*messages[:-1], _tagged(messages[-1])]
        own = {"messages": messages, "tools": options.tools, "documents": None}
        own["add_generation_prompt"] = options.add_generation_prompt
        return {**self.named, **options.chat_template_kwargs, **own}

    def _answer(self, request: str, cpu_s: int) -> dict[str, Any]:
        """The answer of a process that renders."""
        answer, exit_code, stderr = self.processes.ask(request)
        if not answer:
            if exit_code < 0:
                raise ValueError(f"{self.where}: cannot be rendered: takes more than {cpu_s} s of CPU time")
            ended = f"its process ended with {exit_code}"
            *_, what = ended, *stderr.strip().splitlines()
            raise TemplateFault(f"{self.where}: cannot be rendered: {what}", ended)
        return json.loads(answer)

    def _open_ended(self, index: int, text: str) -> str:
        """The text before the tag, as transformers cuts it: a template may have taken the space after it away."""
        at = text.rfind(_TAG.strip())
        if at < 0:
            raise ValueError(f"{self.where}: conversation {index}: its last message is not in the text that it makes")
        return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


def _iterates_content(source: str) -> bool:
    """Tells whether a template reads the parts of a content by itself."""
    return re.search(r"\bfor\s+\w+\s+in\s+[\w.\[\]'\"]*content\b", source) is not None


def _with_joined_parts(message: Message) -> Message:
    """The message with the texts of its parts as one: such a template would show a list as Python does."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if not all(isinstance(part.get("text"), str) for part in content):
        raise ValueError("content: this model's chat template takes text alone, and a part is none")
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _takes_objects(source: str) -> bool:
    """Tells whether a template goes through the arguments of tool calls, or writes them as JSON. Clients send them as
    JSON already; a template that adds them to a text takes them so."""
    return re.search(r"\barguments\b", source) is not None and (
        re.search(r"\barguments\b['\"\]]*\s*\|\s*tojson|\|\s*items\b|\.items\(\)", source) is not None
    )


def _with_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as objects."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_parsed(call) for call in calls]}


def _with_parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    text = function["arguments"].strip()
    arguments = {} if text in ("", "null") else parse_json(text, "tool_calls: arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"tool_calls: arguments: {show_value(text)} is no JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def _tagged(message: Message) -> dict[str, Any]:
    content = message.get("content", "")
    if isinstance(content, str):
        return {**message, "content": content + _TAG}
    parts = list(content)
    for at in reversed(range(len(parts))):
        if "text" in parts[at]:
            parts[at] = {**parts[at], "text": parts[at]["text"] + _TAG}
            return {**message, "content": parts}
    raise ValueError("continue_final_message: the last message has no text to continue")


def read_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """The conversations of a call: one as a list of messages, or a list of such lists. A field that is null is left
    out. Raises ValueError naming conversation and message."""
    if isinstance(messages, list | tuple) and messages and isinstance(messages[0], Mapping):
        messages = [messages]
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages={show_value(messages)}: expected a list of messages, or a list of such lists")
    return [_read_conversation(f"conversation {index}", each) for index, each in enumerate(messages)]


def _read_conversation(where: str, messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{where}: {show_value(messages)}: expected a list of messages, one at least")
    return [_read_message(f"{where}, message {index}", message) for index, message in enumerate(messages)]


def _read_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where}: {show_value(message)}: expected an object with a role and a content")
    try:
        text = json.dumps(message, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    if has_lone_surrogate(text):
        raise ValueError(f"{where}: is not valid Unicode (a lone surrogate)")
    fields = {name: value for name, value in json.loads(text).items() if value is not None}
    content = fields.get("content", "")
    if not isinstance(content, str) and not (isinstance(content, list) and all(isinstance(p, dict) for p in content)):
        raise ValueError(f"{where}: content: expected a text, or a list of parts")
    return fields
