"""Finds a model's chat template: in a file that a user names, beside its tokenizer, or in a GGUF file's metadata.

In a directory chat_template.jinja counts (with additional_chat_templates/*.jinja), else `chat_template` of
tokenizer_config.json, a text or a list of templates with names. Of several "default" is taken, with tools "tool_use".
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.engine.text.added_tokens import CONFIG_FILE, read_fields
from penstock.engine.text.chat_template import ChatTemplate
from penstock.engine.user_files import read_bytes
from penstock.engine.weights.gguf_file import is_gguf, read_gguf
from penstock.scheduler.units import MIB

DEFAULT, FOR_TOOLS = "default", "tool_use"
_FILE, _MORE_FILES, _GGUF_KEY = "chat_template.jinja", "additional_chat_templates", "tokenizer.chat_template"
_MOST_BYTES = MIB
_MOST_FILES = 64


def find_template(
    path: Path, named: Mapping[str, str], file: str | None = None, with_tools: bool = False
) -> ChatTemplate:
    """The template of a directory or GGUF file, or that of `file`. `named` are the tokenizer's special tokens. Raises
    ValueError if there is none, or none that is the default."""
    if file is not None:
        return ChatTemplate(_read(Path(file)), file, named)
    found = _of_gguf(path) if is_gguf(path) else _of_directory(path)
    name = FOR_TOOLS if with_tools and FOR_TOOLS in found else DEFAULT
    if name in found:
        return ChatTemplate(*found[name], named)
    if found:
        raise ValueError(f"{path}: has chat templates {', '.join(sorted(found))}, and none that is the default")
    what = f"key {_GGUF_KEY}" if is_gguf(path) else f"{_FILE}, or chat_template in {CONFIG_FILE}"
    raise ValueError(f"{path}: has no chat template ({what}): give --chat-template FILE")


def _read(file: Path) -> str:
    try:
        return read_bytes(file, _MOST_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8: {error}") from None


def _of_directory(directory: Path) -> dict[str, tuple[str, str]]:
    """Each template by name, with the file that has it."""
    files = {DEFAULT: directory / _FILE} if (directory / _FILE).exists() else {}
    more = sorted((directory / _MORE_FILES).glob("*.jinja"))[:_MOST_FILES]
    files |= {file.stem: file for file in more}
    if files:
        return {name: (_read(file), str(file)) for name, file in files.items()}
    file = directory / CONFIG_FILE
    return _of_config(read_fields(file).get("chat_template"), f"{file}: chat_template")


def _of_config(given: Any, where: str) -> dict[str, tuple[str, str]]:
    if given is None:
        return {}
    listed = [{"name": DEFAULT, "template": given}] if isinstance(given, str) else given
    if not isinstance(listed, list) or not all(
        isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str)
        for each in listed
    ):
        raise ValueError(f"{where}: expected a text, or a list of objects with name and template")
    return {each["name"]: (each["template"], where) for each in listed}


def _of_gguf(file: Path) -> dict[str, tuple[str, str]]:
    metadata = read_gguf(file).metadata
    texts = {key: value for key, value in metadata.items() if key == _GGUF_KEY or key.startswith(f"{_GGUF_KEY}.")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{file}: {key}: expected a text")
    return {key[len(_GGUF_KEY) + 1 :] or DEFAULT: (value, f"{file}: {key}") for key, value in texts.items()}
