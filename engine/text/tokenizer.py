"""Turns text into token ids and back, with the `tokenizers` library alone.

`Tokenizer` is made from a model's files (tokenizer_files.py); `TextStream` gives out text as its tokens arrive;
`StopStrings` cuts that text at the first stop string, also one that lies across tokens. Chat templates are not rendered
here.
"""

import functools
import os.path
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import tokenizers
from penstock.engine.text.library_errors import library_errors, raise_library_error
from penstock.engine.text.tokenizer_files import FILE, find_vocabulary, load_parts

CONTEXT_TOKENS = 64  # of the prompt that a stream decodes: a long prompt costs no more than a short one
MOST_HELD = 32  # tokens that a stream holds back because they make no character
MOST_BYTES = 4  # of a character in UTF-8, each of which may be a token
REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no UTF-8


class Tokenizer:
    """A tokenizer of the library; `file` names it in messages, and `named` has its special tokens by the names that
    chat templates give them (bos_token ...)."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        file: str | Path = FILE,
        named: Mapping[str, str] = MappingProxyType({}),
    ):
        self.backend, self.file, self.named = backend, file, named
        # a file may carry the limits of its training; prompts are never cut nor padded behind the user's back
        backend.no_truncation()
        backend.no_padding()

    @staticmethod
    def is_there(path: str | Path) -> bool:
        """Tells whether a directory has a tokenizer's file, or a GGUF file a vocabulary."""
        return find_vocabulary(Path(path)) is not None

    @staticmethod
    def load(path: str | Path) -> "Tokenizer | None":
        """The tokenizer of a checkpoint's directory or a GGUF file, or None if there is none.

        Raises ValueError that names the file if one of the tokenizer's files cannot be read as what it is.
        """
        file = find_vocabulary(Path(path))
        return None if file is None else Tokenizer(*load_parts(file))

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens, which text never has, by what they are written as."""
        added = self.backend.get_added_tokens_decoder().items()
        return {token.content: token_id for token_id, token in added if token.special}

    @functools.cached_property
    def most_bytes(self) -> int:
        """UTF-8 bytes of text that one token may stand for, at most. A normalizer may shorten text, which is taken to
        be at most fourfold."""
        longest = max(len(token.encode()) for token in self.backend.get_vocab(with_added_tokens=True))
        return longest if self.backend.normalizer is None else 4 * longest

    def encode(self, text: str, vocab_size: int | None = None, add_special: bool = True) -> list[int]:
        """Token ids; with `add_special` also the special tokens that the file's post-processor adds. Raises ValueError
        that names the file if it cannot encode this text, or has an id in it that no model of `vocab_size` ids
        knows."""
        with library_errors(f"{self.file}: cannot encode a text of {len(text)} characters"):
            ids = self.backend.encode(text, add_special_tokens=add_special).ids
        if vocab_size is not None and max(ids, default=0) >= vocab_size:
            token = self.backend.id_to_token(max(ids))
            known = f"the model's ids are 0..{vocab_size - 1}: is it this model's tokenizer?"
            raise ValueError(f"{self.file}: token {token!r} of the prompt has id {max(ids)}, and {known}")
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; bytes that are no UTF-8 become U+FFFD. Unknown ids give no text. Raises
        ValueError that names the file if it cannot decode these ids."""
        try:
            return self.backend.decode(token_ids, skip_special_tokens=True)
        except BaseException as error:
            raise_library_error(f"{self.file}: cannot decode {len(token_ids)} tokens", error)

    def has_text(self, token_id: int) -> bool:
        """Tells whether `decode` does more with this token than to skip it."""
        token = self.backend.id_to_token(token_id)
        return token is not None and token not in self.special_ids

    def stream(self, prompt_ids: Sequence[int]) -> "TextStream":
        """A decoder of the tokens that follow this prompt."""
        return TextStream(self, prompt_ids)


class TextStream:
    """The text of an output, token by token.

    All that `push` and `finish` return, joined, is what decode(prompt + output) has after decode(prompt). A character
    is given out when its last byte has come; bytes that never make one are given out when text follows, when there are
    many of them, or at the end. (A decoder with byte_fallback can revise text: bad bytes after good ones spoil the
    whole run. What was given out stays, and the stream goes on with the tokens that were still held back.)

    Each token is decoded in a short context, whatever the tokens are: those without text are not even held.

        prompt and output | forgotten | given, their text is `before` | held, no character yet |
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        context = list(prompt_ids[-CONTEXT_TOKENS:])
        if not tokenizer.decode(context):
            context = list(filter(tokenizer.has_text, prompt_ids))[-CONTEXT_TOKENS:]
        self._restart(context)

    def push(self, token_id: int) -> str:
        """The text that this token completes: often "", for a part of a character or a special token."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._held.append(token_id)
        text = self._tokenizer.decode(self._given + self._held)
        if text.endswith(REPLACEMENT) or self._before.startswith(text):
            return self._settle(text) if len(self._held) == MOST_HELD else ""
        if not text.startswith(self._before.rstrip(REPLACEMENT)):  # text that was given out would change
            return self._restart(self._held)
        return self._give(len(self._held), text)

    def finish(self) -> str:
        """The text that is still held back; the stream ends here."""
        return _after(self._before, self._tokenizer.decode(self._given + self._held))

    def _settle(self, text: str) -> str:
        """The part of `text`, that of the tokens in hand, which no later token can change: characters are short."""
        if self._before.startswith(text):
            self._held = []
            return ""
        for num_open in range(MOST_BYTES, 2 * MOST_BYTES):  # at most three of these are inside a character
            settled = self._tokenizer.decode(self._given + self._held[:-num_open])
            if text.startswith(settled):
                break
        return self._give(len(self._held) - num_open, settled)

    def _give(self, count: int, text: str) -> str:
        """The new part of `text`, which the first `count` held tokens have after those that were given before."""
        new = _after(self._before, text)
        self._restart(self._held[:count], self._held[count:])
        return new

    def _restart(self, given: list[int], held: Sequence[int] = ()) -> str:
        """Forgets all tokens but these. Returns the text of the given ones."""
        self._given, self._held = given, list(held)
        self._before = self._tokenizer.decode(given)
        return self._before


class StopStrings:
    """Cuts streamed text before the first stop string, the one that begins earliest, wherever tokens end.

    text | given out | held back: could begin a stop string |
    """

    def __init__(self, stops: tuple[str, ...]):
        assert all(stops), "a stop string is empty"
        self._stops = stops
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to give out, and the stop string once it is found; after that nothing comes out.

        Of stop strings that begin at the same character the shortest wins, and a match waits while text before it could
        still become a stop string.
        """
        if not self._stops:
            return text, None
        if self._matched is not None:
            return "", self._matched
        self._held += text
        found, stop = self._first_match()
        pending = self._first_pending()
        if stop is not None and found <= pending:
            return self._cut(found, stop)
        text, self._held = self._held[:pending], self._held[pending:]
        return text, None

    def flush(self) -> tuple[str, str | None]:
        """The rest of the text at its end, and the stop string if a match was still waiting."""
        if self._matched is not None:
            return "", self._matched
        return self._cut(*self._first_match())

    def _cut(self, end: int, stop: str | None) -> tuple[str, str | None]:
        text, self._held, self._matched = self._held[:end], "", stop
        return text, stop

    def _first_match(self) -> tuple[int, str | None]:
        """The index at which the first stop string begins, and that string; (length of the text, None) if there is
        none."""
        matches = [(self._held.find(stop), len(stop), stop) for stop in self._stops if stop in self._held]
        start, _, stop = min(matches, default=(len(self._held), 0, None))
        return start, stop

    def _first_pending(self) -> int:
        """The index from which on the held text could be the beginning of a stop string; its length if there is
        none."""
        text = self._held
        longest = max(map(len, self._stops), default=0)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)


def _after(before: str, text: str) -> str:
    """The part of `text` after the beginning that it shares with `before`."""
    shared = before if text.startswith(before) else os.path.commonprefix((before, text))
    return text[len(shared) :]
