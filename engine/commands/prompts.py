"""Reads prompts from the command line, a file or standard input."""

import os
import re
import stat
import sys
from pathlib import Path
from typing import BinaryIO

from penstock.engine.user_files import check_no_pointer, check_regular, has_lone_surrogate, parse_json
from penstock.scheduler.units import MIB

Prompt = str | list[int]
MOST_BYTES = 128 * MIB  # of a file of prompts; as text they may be four times as many
_PIECE_BYTES = MIB


def read_prompts(texts: list[str], file: str | None) -> list[Prompt]:
    """Prompts: `texts`, then those of `file` ("-" is standard input, which is also read if neither is given and it is
    no terminal). Raises ValueError, naming file and line, if there is no prompt or one cannot be read."""
    if file is None and not texts and sys.stdin is not None and not sys.stdin.isatty():
        file = "-"
    prompts: list[Prompt] = [*texts, *(_read_file(file) if file is not None else ())]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, --prompts-file FILE, or standard input")
    return prompts


def _read_file(file: str) -> list[Prompt]:
    """Reads one prompt a line, or JSONL if the first line begins with a brace."""
    try:
        text = _read(file).decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--prompts-file {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file}: {error}") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"--prompts-file {file}: line {line} has a NUL byte; expected text in UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # not splitlines(): JSON strings and prose may hold U+2028 and its like
    lines = enumerate((match[0] for match in re.finditer(r"(?m)^.*$", text)), 1)
    prompts = ((number, line) for number, line in lines if line.strip())
    if re.match(r"\s*\{", text):
        return [_parse(line, f"{file}, line {number}") for number, line in prompts]
    return [line for _, line in prompts]


def _read(file: str) -> bytearray:
    """The bytes of a file, of standard input, or of a pipe that the shell opened, as for `<(command)`."""
    if file == "-":
        return bytearray() if sys.stdin is None else _bounded(sys.stdin.buffer, file)  # None: it was closed
    if not _is_open_pipe(file):
        check_regular(Path(file))
    with open(file, "rb") as stream:
        return _bounded(stream, file)


def _is_open_pipe(file: str) -> bool:
    """Whether this is a pipe without a name (/dev/fd/63): one with a name has to wait for its writer."""
    return stat.S_ISFIFO(os.stat(file).st_mode) and not os.path.exists(os.path.realpath(file))


def _bounded(stream: BinaryIO, file: str) -> bytearray:
    """Reads a whole stream. Raises ValueError beyond MOST_BYTES: it may have no end."""
    content = bytearray()
    while piece := stream.read(_PIECE_BYTES):
        content += piece
        if len(content) > MOST_BYTES:
            raise ValueError(f"--prompts-file {file}: has more than {MOST_BYTES} bytes, the most that are read")
    check_no_pointer(Path(file), content[:_PIECE_BYTES])
    return content


def _parse(line: str, where: str) -> Prompt:
    """Parses `{"prompt": text}` or `{"prompt_token_ids": [ids]}`; other fields are the user's own."""
    fields = parse_json(line, where)
    given = [fields.get(key) for key in ("prompt", "prompt_token_ids")] if isinstance(fields, dict) else []
    prompt = next((value for value in given if value is not None), None)
    if isinstance(prompt, str):
        if has_lone_surrogate(prompt):
            raise ValueError(f"{where}: prompt is not valid Unicode (a lone surrogate)")
        return prompt
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):  # True is no integer here
        return prompt
    raise ValueError(f'{where}: expected an object with "prompt" (text) or "prompt_token_ids" (a list of integers)')
