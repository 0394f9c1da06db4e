"""Rows of an input file: a line of OpenAI's batch format, or a plain prompt, becomes a checked request.

{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Return", "max_tokens": 8}}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.engine.server.errors import ApiError, model_not_found
from penstock.engine.server.requests import Chat, Completion
from penstock.engine.server.validation import read_chat, read_completion
from penstock.engine.user_files import has_lone_surrogate, parse_json
from penstock.scheduler.units import MIB, show_value

READERS = {"/v1/completions": read_completion, "/v1/chat/completions": read_chat}
FIELDS = ("custom_id", "method", "url", "body")
MOST_ID = 512  # characters
MOST_LINE_BYTES = 32 * MIB  # of a line: as many as a request to a server may have
KEY_CHARACTERS = 1024  # of a prompt, by which rows that begin alike are found


@dataclass(frozen=True)
class Row:
    """A row: the number of its line in the file, from 1 on, and what it asks for."""

    number: int
    custom_id: str
    asked: Completion | Chat

    @property
    def num_sequences(self) -> int:
        """The sequences of its answer: n of each prompt."""
        prompts = self.asked.prompts if isinstance(self.asked, Completion) else [self.asked.messages]
        return len(prompts) * self.asked.params.n

    @property
    def prefix(self) -> str:
        """The beginning of its prompt: rows that begin alike follow each other when they are sorted by it."""
        asked = self.asked
        start = asked.prompts[0] if isinstance(asked, Completion) else asked.messages
        return (start if isinstance(start, str) else json.dumps(start))[:KEY_CHARACTERS]


@dataclass(frozen=True)
class RowReader:
    """Reads the lines of one file, which messages name. `defaults` stand in for sampling parameters that a body leaves
    out; `names` are those by which a body may ask for the model. A file of plain text has a prompt a line."""

    file: str
    defaults: Mapping[str, Any]
    names: tuple[str, ...]
    is_text: bool = False

    def read(self, line: bytes, number: int) -> Row:
        """The row of a line. Raises ValueError, naming the line and the field, for one that cannot be meant."""
        where = f"{self.file}, line {number}"
        if len(line) > MOST_LINE_BYTES:
            raise ValueError(f"{where}: has more than {MOST_LINE_BYTES} bytes, the most that are read")
        if self.is_text:
            prompt = _text(line, where)
            return Row(number, f"line-{number}", self._asked(where, read_completion, {"prompt": prompt}))
        fields = parse_json(line, where)
        custom_id = _checked(fields, where)
        return Row(number, custom_id, self._asked(where, READERS[fields["url"]], fields["body"]))

    def _asked(self, where: str, read: Any, body: Any) -> Completion | Chat:
        try:
            asked = read(body, self.defaults)
            if asked.model is not None and asked.model not in self.names:
                raise model_not_found(asked.model, list(self.names))
        except ApiError as error:
            raise ValueError(f"{where}: body: {error.message}") from None
        if asked.streams:
            raise ValueError(f"{where}: body: stream: a batch job does not stream its answers")
        return asked


def _checked(fields: Any, where: str) -> str:
    """The custom_id of a line whose other fields are as they have to be."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(FIELDS)}")
    for name in FIELDS:
        if fields.get(name) is None:
            raise ValueError(f"{where}: {name}: is missing")
    custom_id, url = fields["custom_id"], fields["url"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MOST_ID or has_lone_surrogate(custom_id):
        raise ValueError(f"{where}: custom_id={show_value(custom_id)}: expected a text of 1 to {MOST_ID} characters")
    if fields["method"] != "POST":
        raise ValueError(f"{where}: method={show_value(fields['method'])}: expected POST")
    if not isinstance(url, str) or url not in READERS:
        raise ValueError(f"{where}: url={show_value(url)}: expected {' or '.join(READERS)}")
    return custom_id


def _text(line: bytes, where: str) -> str:
    try:
        text = line.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {error}") from None
    if "\0" in text:
        raise ValueError(f"{where}: has a NUL byte; expected text in UTF-8")
    return text
