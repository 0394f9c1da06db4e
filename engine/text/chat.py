"""Makes token ids of conversations: a template renders them, and the text of messages is never a control token.

A template writes control tokens as text, and so may whoever writes a message. Which of them came from where is lost
once a text is rendered. So in every text of a message the first character of what could be a special token is replaced,
for the rendering, by a character of private use that stands nowhere else. The special tokens that the tokenizer finds
then are the template's own; with the characters put back, everything between them is encoded as text alone.

Where no message has such a text, which is nearly always, a conversation is rendered and encoded as transformers does.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from penstock.engine.text.chat_template import ChatOptions, ChatTemplate, read_conversations
from penstock.engine.text.tokenizer import Tokenizer
from tokenizers import AddedToken

_PRIVATE = range(0x100000, 0x10FFFE)  # a plane of private use
_MARK = "\U000ffffd\u2063control token\u2063\U000ffffd"  # stands for a token of the template's


class RenderedChat(NamedTuple):
    """A conversation as a model gets it: the text and its token ids."""

    text: str
    token_ids: list[int]


class ChatReader:
    """Reads conversations for one model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self._tokenizer, self._template = tokenizer, template
        self._without_special: tuple[tokenizers.Tokenizer, int] | None = None

    def read(self, messages: Any, options: ChatOptions, check: Callable[[int, str], None]) -> list[RenderedChat]:
        """The conversations of a call. Raises ValueError, as read_conversations and ChatTemplate.render do, where the
        tokenizer cannot encode a text, and as `check` does, which gets each text with its index before that."""
        conversations = read_conversations(messages)
        special = () if self._tokenizer.backend.encode_special_tokens else tuple(self._tokenizer.special_ids)
        letters = _letters(conversations, special)
        marked = [_mark(each, special, letters) for each in conversations] if letters else conversations
        texts = self._template.render(marked, options)
        for index, text in enumerate(texts):
            check(index, text)
        return [self._encode(text, letters) for text in texts]

    def _encode(self, text: str, letters: Mapping[str, str]) -> RenderedChat:
        backs = str.maketrans({private: letter for letter, private in letters.items() if private in text})
        whole = text.translate(backs)
        if not backs:
            return RenderedChat(whole, self._tokenizer.encode(whole, add_special=False))
        pieces, ids, at = [], [], 0
        for start, end, token in self._special_in(text):
            pieces += [text[at:start].translate(backs), _MARK]
            ids.append(token)
            at = end
        pieces.append(text[at:].translate(backs))
        return RenderedChat(whole, self._encode_as_text("".join(pieces), ids))

    def _special_in(self, text: str) -> list[tuple[int, int, int]]:
        """Finds where the special tokens of a text stand, from and to which character, and their ids."""
        encoding = self._tokenizer.backend.encode(text, add_special_tokens=False)
        special = set(self._tokenizer.special_ids.values())
        return [(*span, token) for span, token in zip(encoding.offsets, encoding.ids) if token in special]

    def _encode_as_text(self, text: str, marked: list[int]) -> list[int]:
        """Ids of a text in which special tokens are text, and each mark is the next id of `marked`."""
        if self._without_special is None:
            backend = tokenizers.Tokenizer.from_str(self._tokenizer.backend.to_str())
            backend.add_tokens([AddedToken(_MARK, normalized=False, special=False)])
            backend.encode_special_tokens = True
            self._without_special = backend, backend.token_to_id(_MARK)
        backend, mark = self._without_special
        ids, left = backend.encode(text, add_special_tokens=False).ids, iter(marked)
        if {*ids} & {*self._tokenizer.special_ids.values()}:
            raise ValueError(f"{self._tokenizer.file}: a message has the text of a special token, and would be one")
        if ids.count(mark) != len(marked):
            raise ValueError("a message has the text that stands for control tokens here")
        return [next(left) if token == mark else token for token in ids]


def _strings(value: Any) -> Iterator[str]:
    """The texts in a message, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            yield from _strings(part)


def _starts(text: str, special: tuple[str, ...]) -> set[int]:
    """Finds where in a text a special token begins, or could where another text follows at its end."""
    found = set()
    if not any(letter in text for letter in _first_letters(special)):  # nearly always, and special tokens may be many
        return found
    for token in special:
        at = text.find(token)
        while at >= 0:
            found.add(at)
            at = text.find(token, at + 1)
    beginnings = _beginnings(special)
    for end in {text, text.rstrip()}:
        found |= {
            at for at in range(max(0, len(end) - max(map(len, special), default=0)), len(end)) if end[at:] in beginnings
        }
    return found


@functools.cache
def _first_letters(special: tuple[str, ...]) -> frozenset[str]:
    """The first characters of special tokens."""
    return frozenset(token[:1] for token in special)


@functools.cache
def _beginnings(special: tuple[str, ...]) -> frozenset[str]:
    """All that special tokens begin with."""
    return frozenset(token[:size] for token in special for size in range(1, len(token)))


def _letters(conversations: list[list[dict[str, Any]]], special: tuple[str, ...]) -> dict[str, str]:
    """Characters of private use, which no message has, for those that must be replaced; empty if there are none."""
    first = {text[at] for text in _strings(conversations) for at in _starts(text, special)}
    if not first:
        return {}
    used = set(json.dumps(conversations, ensure_ascii=False))
    free = (chr(number) for number in _PRIVATE if chr(number) not in used)
    return dict(zip(sorted(first), free))


def _mark(value: Any, special: tuple[str, ...], letters: Mapping[str, str]) -> Any:
    """The value with its texts marked; of the names of fields only those that have a special token, which are nobody's
    but the writer's."""
    if isinstance(value, str):
        starts = _starts(value, special)
        return "".join(letters[letter] if at in starts else letter for at, letter in enumerate(value))
    if isinstance(value, dict):
        own = {name for name in value if any(token in name for token in special)}
        names = [_mark(name, special, letters) if name in own else name for name in value]
        return dict(zip(names, (_mark(part, special, letters) for part in value.values())))
    return [_mark(part, special, letters) for part in value] if isinstance(value, list) else value
