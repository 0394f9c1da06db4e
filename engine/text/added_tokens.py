"""The tokens that a directory's files add to its vocabulary, as transformers adds them: tokenizer_config.json, and the
older special_tokens_map.json and added_tokens.json."""

from pathlib import Path
from typing import Any

import tokenizers
from penstock.engine.text.library_errors import library_errors
from penstock.engine.user_files import read_json
from tokenizers import AddedToken

CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE, _ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA = ("extra_special_tokens", "additional_special_tokens")


def read_fields(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if the file is not there."""
    return read_json(file, keep_too_large=True) if file.exists() else {}  # model_max_length is often 1e30


def read_token_config(directory: Path) -> dict[str, Any]:
    """The fields of tokenizer_config.json; without added_tokens_decoder, as it was of old, those of
    special_tokens_map.json too."""
    config = read_fields(directory / CONFIG_FILE)
    return config if config.get("added_tokens_decoder") is not None else config | read_fields(directory / _MAP_FILE)


def named_texts(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that have a name of everyone's (bos_token ...), as text. Raises ValueError naming the file."""
    given = {name: config[name] for name in _NAMED if isinstance(config.get(name), str | dict)}
    return {name: _token(token, f"{directory / CONFIG_FILE}: {name}").content for name, token in given.items()}


def added_texts(config: dict[str, Any]) -> set[str]:
    """The texts of added_tokens_decoder, as far as it is one."""
    own = config.get("added_tokens_decoder")
    tokens = own.values() if isinstance(own, dict) else ()
    return {token["content"] for token in tokens if isinstance(token, dict) and isinstance(token.get("content"), str)}


def as_written(token: AddedToken) -> AddedToken:
    """The token, but sought in a text as that stands, before it is normalized."""
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
    return AddedToken(token.content, normalized=False, **flags)


def tokens_to_add(directory: Path, config: dict[str, Any], backend: tokenizers.Tokenizer) -> list[AddedToken]:
    """All added tokens by id, changed as the files say, then special tokens that are not among them. `config` is that
    of read_token_config, above what the vocabulary's own file says. Raises ValueError naming the file."""
    own, file = config.get("added_tokens_decoder"), directory / CONFIG_FILE
    named, extra = _named_tokens(config, str(file)), _extra_tokens(config, str(file))
    if own is None:
        by_id = _older_tokens(directory / _ADDED_FILE, named | extra) | backend.get_added_tokens_decoder()
    else:
        by_id = _by_id(own, f"{file}: added_tokens_decoder")
    tokens = {token.content: token for _, token in sorted(by_id.items())}
    for text in tokens.keys() & named.keys():
        tokens[text].special = True
    known = {token.content for token in backend.get_added_tokens_decoder().values()} | tokens.keys()
    return [*tokens.values(), *(token for text, token in (named | extra).items() if text not in known)]


def _by_id(tokens: Any, where: str) -> dict[int, AddedToken]:
    if not isinstance(tokens, dict) or not all(name.isdecimal() and len(name) < 10 for name in tokens):
        raise ValueError(f"{where}: expected tokens by their ids")
    return {int(name): _token(token, f"{where}.{name}") for name, token in tokens.items()}


def _older_tokens(file: Path, special: dict[str, AddedToken]) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json, which has ids by text."""
    ids = read_fields(file)
    if not all(type(number) is int for number in ids.values()):
        raise ValueError(f"{file}: expected the ids of tokens by their text")
    return {
        number: AddedToken(text, normalized=text not in special, special=text in special)
        for text, number in ids.items()
    }


def _named_tokens(config: dict[str, Any], where: str) -> dict[str, AddedToken]:
    """Special tokens by their text: bos_token and its like, then any other NAME_token, which is the model's own."""
    own = [name for name in config if name.endswith("_token") and name not in _NAMED]
    given = {name: config[name] for name in (*_NAMED, *own) if isinstance(config.get(name), str | dict)}
    given |= {
        name: token for field in _EXTRA if isinstance(config.get(field), dict) for name, token in config[field].items()
    }
    tokens = [_token(token, f"{where}: {name}", special=True) for name, token in given.items()]
    return {token.content: token for token in tokens}


def _extra_tokens(config: dict[str, Any], where: str) -> dict[str, AddedToken]:
    """Special tokens without a name, by their text."""
    lists = [config[field] for field in _EXTRA if isinstance(config.get(field), list)]
    tokens = [_token(token, f"{where}: {_EXTRA[0]}", special=True) for each in lists[:1] for token in each]
    return {token.content: token for token in tokens}


def _token(token: Any, where: str, **more: bool) -> AddedToken:
    """A token as the files write it: its text, or the fields of an AddedToken."""
    fields = {"content": token} if isinstance(token, str) else token
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
        raise ValueError(f'{where}: expected a text, or an object with its "content"')
    flags = {name: value for name, value in fields.items() if name != "__type"}
    if not all(type(value) is bool for name, value in flags.items() if name not in ("content", "id")):
        raise ValueError(f"{where}: expected true or false for all but its content")
    with library_errors(where):
        return AddedToken(**{name: value for name, value in (flags | more).items() if name != "id"})
