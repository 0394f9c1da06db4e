"""Prompts from the command line, a file or standard input."""

import json
import sys
from pathlib import Path

Prompt = str | list[int]


def read_prompts(texts: list[str], file: str | None) -> list[Prompt]:
    """`texts`, then those of `file` ("-" is standard input), which is also read where neither is given and it is no
    terminal. Raises ValueError, naming file and line, if there is no prompt or one cannot be read."""
    if file is None and not texts and sys.stdin is not None and not sys.stdin.isatty():
        file = "-"
    prompts: list[Prompt] = [*texts, *(_read_file(file) if file is not None else ())]
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT, --prompts-file FILE, or standard input")
    return prompts


def _read_file(file: str) -> list[Prompt]:
    """One prompt a line, or JSONL where the first line begins with a brace."""
    try:
        text = _read_stdin() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"--prompts-file {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file}: {error}") from None
    # not splitlines(): JSON strings and prose may hold U+2028 and its like
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("{"):
        return [_parse(line, f"{file}, line {number}") for number, line in lines]
    return [line for _, line in lines]


def _read_stdin() -> str:
    return "" if sys.stdin is None else sys.stdin.read()  # None: it was closed


def _parse(line: str, where: str) -> Prompt:
    """`{"prompt": text}` or `{"prompt_token_ids": [ids]}`; other fields are the user's own."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    given = [fields.get(key) for key in ("prompt", "prompt_token_ids")] if isinstance(fields, dict) else []
    prompt = next((value for value in given if value is not None), None)
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)):
        return prompt
    raise ValueError(f'{where}: expected an object with "prompt" (text) or "prompt_token_ids" (a list of integers)')
