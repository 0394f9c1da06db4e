"""Encodes checked requests with the model's tokenizer and chat template. That may take a second, and waits for other
processes, so it runs in a worker thread (or a job's own), but for what `is_quick`.

The errors are the API's, and name no path of this machine.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.output import Sequence
from penstock.engine.server.answers import Echo
from penstock.engine.server.errors import ApiError, refused
from penstock.engine.server.requests import Chat, Completion, Tokenize
from penstock.engine.server.validation import naming_field
from penstock.engine.text.added_tokens import CONFIG_FILE, read_fields
from penstock.engine.text.chat import RenderedChat
from penstock.engine.text.chat_files import find_template
from penstock.engine.text.chat_template import ChatOptions, TemplateFault
from penstock.engine.text.model_prompts import ModelPrompts
from penstock.engine.text.model_text import tokenizer_path
from penstock.engine.text.prompts import Prompt
from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.weights.gguf_file import is_gguf
from penstock.scheduler.batching.request import TooLong

TOO_LONG = "context_length_exceeded"
FEW_IDS = 8192  # which take less than a millisecond to check
TEMPLATE_FAILED = "messages: the model's chat template fails at them"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of an object, in a library's words


def is_quick(asked: Completion | Chat) -> bool:
    """Tells whether a request is one sequence of few token ids, without a text to encode: it is made in less time than
    another thread's turn takes to come."""
    if not isinstance(asked, Completion) or asked.num_sequences > 1:
        return False
    return isinstance(asked.prompts[0], list) and len(asked.prompts[0]) <= FEW_IDS


def sequences_of(model: ModelPrompts, asked: Completion | Chat) -> list[Sequence]:
    """The sequences of a request, n of each prompt, in the order of its choices. Raises ApiError."""
    field = "prompt" if isinstance(asked, Completion) else "messages"
    with api_errors(model.config, field):
        if isinstance(asked, Completion):
            prompts = [_encoded(model, prompt, asked.add_special) for prompt in asked.prompts]
        else:
            prompts = [_rendered(model, asked.messages, asked.options, asked.add_special)]
        sequences = model.sequences(prompts, asked.params)
        for sequence in sequences:
            model.limits.check(sequence.request)
        return sequences


def echoes_of(model: ModelPrompts, asked: Completion, sequences: list[Sequence]) -> list[Echo]:
    """The prompts of a request as they are given back, one for each choice; the first of a prompt's choices has its log
    probabilities. Raises ApiError."""
    with api_errors(model.config, "prompt"):
        texts = [prompt if isinstance(prompt, str) else text_of(model, prompt) for prompt in asked.prompts]
    firsts = sequences[:: asked.params.n]
    echoes = [Echo(text, first) for text, first in zip(texts, firsts, strict=True)]
    return [echo for echo in echoes for _ in range(asked.params.n)]


def token_ids_of(model: ModelPrompts, asked: Tokenize) -> list[int]:
    """The token ids of a text or of messages. Raises ApiError."""
    with api_errors(model.config, "messages" if asked.text is None else "prompt"):
        if asked.text is not None:
            return model.encode(asked.text, asked.add_special)
        return _rendered(model, asked.messages, asked.options, asked.add_special).token_ids


def text_of(model: ModelPrompts, token_ids: list[int]) -> str:
    """The text of token ids, without special tokens. Raises ApiError."""
    with api_errors(model.config, "tokens"):
        model.check_ids(token_ids)
        return need_tokenizer(model).decode(token_ids)


def need_tokenizer(model: ModelPrompts) -> Tokenizer:
    """The model's tokenizer. Raises ApiError if there is none."""
    if model.tokenizer is None:
        raise refused("this model has no tokenizer")
    return model.tokenizer


@contextlib.contextmanager
def api_errors(config: EngineConfig, field: str) -> Iterator[None]:
    """A context in which a ValueError becomes the API's error, of that field unless it names another. Of a template
    that fails by itself no words are told."""
    try:
        yield
    except TemplateFault as fault:
        raise ApiError(400, TEMPLATE_FAILED, "messages", place=fault.place) from None
    except ValueError as error:
        told = naming_field(error, field, TOO_LONG if isinstance(error, TooLong) else None)
        told.message = _ADDRESS.sub("", without_paths(told.message, config))
        raise told from None


def without_paths(text: str, config: EngineConfig) -> str:
    """The text without the folders of the model's files, which are the server's business."""
    folder = str(tokenizer_path(config))
    names = {
        config.chat_template: "the chat template",
        f"{folder}/": "",
        folder: "the model",
        config.model: "the model",
    }
    for path, shown in names.items():
        text = text.replace(path, shown) if path and "/" in path else text
    return text


def _encoded(model: ModelPrompts, prompt: Prompt, add_special: bool) -> Prompt:
    if add_special or not isinstance(prompt, str):
        return prompt
    return RenderedChat(prompt, model.encode(prompt, add_special=False))


def _rendered(
    model: ModelPrompts, messages: list[dict[str, Any]], options: ChatOptions, add_special: bool
) -> RenderedChat:
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages: expected a list of objects")
    (chat,) = model.render([messages], **vars(options))
    if not add_special:
        return chat
    before, after = _put_around(model.tokenizer)
    return RenderedChat(chat.text, [*before, *chat.token_ids, *after])


def _put_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    plain, whole = (tokenizer.encode("a", add_special=special) for special in (False, True))
    start = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def tokenizer_facts(model: ModelPrompts) -> dict[str, Any]:
    """The facts of a tokenizer that clients ask for: class, special tokens, chat template. Raises ApiError if there is
    none."""
    named, path = need_tokenizer(model).named, tokenizer_path(model.config)
    try:
        template = find_template(path, named, model.config.chat_template).source
    except ValueError:
        template = None
    kind = None if is_gguf(path) else read_fields(path / CONFIG_FILE).get("tokenizer_class")
    tokens = {name: named.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return {"tokenizer_class": kind or type(model.tokenizer).__name__, **tokens, "chat_template": template}
