"""Reads prompts from the command line, a file or standard input."""

import io
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from penstock.engine.user_files import check_no_pointer, check_regular, has_lone_surrogate, parse_json
from penstock.scheduler.units import MIB

Prompt = str | list[int]
# Of a file of prompts. As text its bytes may be four times as many, and each prompt and token id takes memory and time.
MOST_BYTES = 64 * MIB
MOST_PROMPTS = 2**18
MOST_COMMAS = 6_000_000  # of JSONL: about as many as there are token ids
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
    prompts: list[Prompt] = []
    is_json, num_commas = False, 0
    for number, line in _lines(file):
        if not prompts:
            is_json = line.lstrip().startswith("{")
        num_commas += line.count(",") if is_json else 0
        if len(prompts) == MOST_PROMPTS or num_commas > MOST_COMMAS:
            what = f"{MOST_PROMPTS} prompts" if len(prompts) == MOST_PROMPTS else f"{MOST_COMMAS} values"
            raise ValueError(f"--prompts-file {file}: has more than {what}, the most that are read; give it in parts")
        prompts.append(_parse(line, f"{file}, line {number}") if is_json else line)
    return prompts


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, without their ends, and their numbers from 1 on. They end as Python's text files
    have it: JSON strings and prose may hold U+2028 and its like."""
    number = 0
    try:
        for number, line in enumerate(io.TextIOWrapper(_read(file), encoding="utf-8-sig"), 1):
            if "\0" in line:
                raise ValueError(f"--prompts-file {file}: line {number} has a NUL byte; expected text in UTF-8")
            if line.strip():
                yield number, line.removesuffix("\n")
    except OSError as error:
        raise ValueError(f"--prompts-file {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        where = f"after line {number}: " if number else ""
        raise ValueError(f"--prompts-file {file}: {where}{error}") from None


def _read(file: str) -> io.BytesIO:
    """The bytes of a file, of standard input, or of a pipe that the shell opened, as for `<(command)`."""
    if file == "-":
        return io.BytesIO() if sys.stdin is None else _bounded(sys.stdin.buffer, file)  # None: it was closed
    if not _is_open_pipe(file):
        check_regular(Path(file))
    with open(file, "rb") as stream:
        return _bounded(stream, file)


def _is_open_pipe(file: str) -> bool:
    """Tells whether this is a pipe without a name (/dev/fd/63): one with a name has to wait for its writer."""
    return stat.S_ISFIFO(os.stat(file).st_mode) and not os.path.exists(os.path.realpath(file))


def _bounded(stream: BinaryIO, file: str) -> io.BytesIO:
    """Reads a whole stream. Raises ValueError beyond MOST_BYTES: it may have no end."""
    content = io.BytesIO()
    while piece := stream.read(_PIECE_BYTES):
        content.write(piece)
        if content.tell() > MOST_BYTES:
            raise ValueError(f"--prompts-file {file}: has more than {MOST_BYTES} bytes, the most that are read")
    check_no_pointer(Path(file), content.getbuffer()[:_PIECE_BYTES].tobytes())
    content.seek(0)
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
