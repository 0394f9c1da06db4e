"""Makes a checkpoint's tokenizer from its files, as transformers' AutoTokenizer does: tokenizer.json, the tokens that
tokenizer_config.json and the older special_tokens_map.json and added_tokens.json add to it, and Llama's own spaces.

It does not know chat templates, nor the files of tokenizers that have no tokenizer.json.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from penstock.engine.user_files import parse_json, read_bytes, read_json
from tokenizers import AddedToken

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_MAP_FILE, _ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_NEVER_LLAMA = ("mistral", "qwen2")  # the models for which transformers does not believe tokenizer_class
_SPACE = "\u2581"
_MOST_ERROR = 300  # characters of what the library says


def load_backend(directory: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a directory that has a tokenizer.json. Raises ValueError naming the file at fault."""
    file = directory / FILE
    content = read_bytes(file)
    config = _read(directory / CONFIG_FILE)
    if _is_llama(directory, config) and (fields := _llama_fields(content, str(file), config)):
        content, config = json.dumps(fields).encode(), _LLAMA_TOKENS | config
    with library_errors(f"{file}: not a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_str(content.decode())
    tokens = _tokens_to_add(directory, config, backend)
    with library_errors(f"{directory / CONFIG_FILE}: tokens that cannot be added"):
        backend.add_tokens(tokens)
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    return backend


@contextlib.contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Makes a ValueError of one line, beginning with `where`, of any error of the library: plain Exceptions, and
    PanicExceptions of its own failed assertions, which are no Exceptions."""
    try:
        yield
    except BaseException as error:
        raise_library_error(where, error)


def raise_library_error(where: str, error: BaseException) -> NoReturn:
    """Raises the ValueError that `library_errors` makes of `error`, or `error` itself where it is not the library's."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error
    text = " ".join(str(error).split())
    raise ValueError(f"{where}: {text[:_MOST_ERROR]}") from error


def _read(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; none if the file is not there."""
    return read_json(file, keep_too_large=True) if file.exists() else {}  # model_max_length is often 1e30


def _is_llama(directory: Path, config: dict[str, Any]) -> bool:
    """Tells whether transformers makes a LlamaTokenizer of this directory."""
    model = _read(directory / "config.json")
    return (config.get("tokenizer_class") or model.get("tokenizer_class")) in _LLAMA and (
        model.get("model_type") not in _NEVER_LLAMA
    )


def _llama_fields(content: bytes, where: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Fields of a tokenizer.json whose spaces are no normalizer's, as LlamaTokenizer has them; None if they are none
    here. A normalizer puts a space before each piece of text: then "normalized" tokens, the special ones of older
    files, are sought with a space before them and not found."""
    fields = parse_json(content, where)
    if not isinstance(fields, dict) or not _prepends_space(fields.get("normalizer")):
        return None
    begins_with_space = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if begins_with_space else "never"
    decoders = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if begins_with_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    spaces = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}
    return fields | {
        "normalizer": None,
        "pre_tokenizer": spaces,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _prepends_space(normalizer: Any) -> bool:
    if not isinstance(normalizer, dict):
        return False
    parts = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    return isinstance(parts, list) and {"type": "Prepend", "prepend": _SPACE} in parts


def _tokens_to_add(directory: Path, config: dict[str, Any], backend: tokenizers.Tokenizer) -> list[AddedToken]:
    """All added tokens by id, changed as the other files say, then special tokens that are not among them."""
    own, file = config.get("added_tokens_decoder"), directory / CONFIG_FILE
    if own is None:
        config = config | _read(directory / _MAP_FILE)
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
    ids = _read(file)
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
