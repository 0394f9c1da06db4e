"""The form of requests once they are checked (validation.py), before any text is encoded."""

from dataclasses import dataclass, field
from typing import Any

from penstock.engine.text.chat_template import ChatOptions
from penstock.engine.text.prompts import Prompt
from penstock.scheduler.batching.request import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The part that completions and chats have in common. `streams` and what follows it say how the answer is sent."""

    model: str | None
    params: SamplingParams
    streams: bool = False
    sends_usage: bool = False  # in a chunk of its own at the end
    sends_usage_always: bool = False  # in each chunk
    add_special: bool = True


@dataclass(frozen=True, kw_only=True)
class Completion(Generation):
    """A request for /v1/completions."""

    prompts: list[Prompt]
    echo: bool = False

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.params.n


@dataclass(frozen=True, kw_only=True)
class Chat(Generation):
    """A request for /v1/chat/completions."""

    messages: list[dict[str, Any]]
    options: ChatOptions
    add_special: bool = False

    @property
    def num_sequences(self) -> int:
        return self.params.n


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """A request for /tokenize: a text, or messages."""

    model: str | None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    options: ChatOptions = field(default_factory=ChatOptions)
    add_special: bool = True
    with_texts: bool = False
