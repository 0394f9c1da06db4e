"""Makes a model's tokenizer from its files, as transformers' AutoTokenizer does: a vocabulary (tokenizer.json,
tekken.json, tokenizer.model, or the metadata of a GGUF file), the tokens that other files add to it, and whether BOS
and EOS are put around a text.

Chat templates are not read here (chat_files.py).
"""

import json
import os.path
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from penstock.engine.text.added_tokens import (
    CONFIG_FILE,
    added_texts,
    as_written,
    named_texts,
    read_fields,
    read_token_config,
    tokens_to_add,
)
from penstock.engine.text.bpe import SPACE
from penstock.engine.text.gguf_vocabulary import has_vocabulary, read_vocabulary
from penstock.engine.text.library_errors import library_errors
from penstock.engine.text.sentencepiece_file import read_sentencepiece
from penstock.engine.text.tekken_file import read_tekken
from penstock.engine.user_files import parse_json, read_bytes
from penstock.engine.weights.gguf_file import is_gguf, read_gguf
from tokenizers import processors

FILE = "tokenizer.json"
_TEKKEN_FILE, _MODEL_FILE = "tekken.json", "tokenizer.model"
FILES = f"{FILE}, {_TEKKEN_FILE} or {_MODEL_FILE}"  # of a directory, the first that is there
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_NEVER_LLAMA = ("mistral", "qwen2")  # the models for which transformers does not believe tokenizer_class
_ADDS = ("add_bos_token", "add_eos_token")


class Parts(NamedTuple):
    """A tokenizer of the library, the file that messages name, and its special tokens by the names that chat templates
    give them (bos_token ...)."""

    backend: tokenizers.Tokenizer
    file: Path
    named: dict[str, str]


def sought(path: str | Path) -> str:
    """The places of a vocabulary, for messages: files of a directory, or keys of a GGUF file."""
    return "keys tokenizer.ggml.*" if is_gguf(path) else FILES


def find_vocabulary(path: Path) -> Path | None:
    """The file of a directory that has its vocabulary, or a GGUF file with one; None if there is none."""
    if is_gguf(path):
        return path if has_vocabulary(read_gguf(path).metadata) else None
    return next((path / name for name in (FILE, _TEKKEN_FILE, _MODEL_FILE) if os.path.lexists(path / name)), None)


def load_parts(file: Path) -> Parts:
    """The tokenizer of a vocabulary that find_vocabulary found. Raises ValueError naming the file at fault."""
    if is_gguf(file):
        backend, named, adds = read_vocabulary(str(file), read_gguf(file).metadata)
        backend.post_processor = _around(backend, named, adds)
        return Parts(backend, file, named)
    directory = file.parent
    backend, config = _read_directory(file, read_token_config(directory))
    tokens, named = tokens_to_add(directory, config, backend), named_texts(directory, config)
    if file.name != FILE:  # else SentencePiece's would be sought with a space before them
        tokens = list(map(as_written, tokens))
    with library_errors(f"{directory / CONFIG_FILE}: tokens that cannot be added"):
        backend.add_tokens(tokens)
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    adds = {name: config[name] for name in _ADDS if name in config}
    if adds and file.name != FILE:  # tokenizer.json says itself what is added
        backend.post_processor = _around(backend, named, adds)
    return Parts(backend, file, named)


def _read_directory(file: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer of the vocabulary alone, and the config with what the vocabulary says beneath it."""
    if file.name != FILE:
        is_tekken = file.name == _TEKKEN_FILE
        backend, named = read_tekken(file) if is_tekken else read_sentencepiece(file, added_texts(config))
        return backend, named | config
    content = read_bytes(file)
    if _is_llama(file.parent, config) and (fields := _llama_fields(content, str(file), config)):
        content, config = json.dumps(fields).encode(), _LLAMA_TOKENS | config
    with library_errors(f"{file}: not a tokenizer.json"):
        return tokenizers.Tokenizer.from_str(content.decode()), config


def _around(
    backend: tokenizers.Tokenizer, named: dict[str, str], adds: dict[str, Any]
) -> processors.TemplateProcessing:
    """Puts BOS before a text and EOS after it, as the files say; what they leave open is not done."""
    bos, eos = (named.get(f"{name}_token") if adds.get(f"add_{name}_token") else None for name in ("bos", "eos"))
    special = {text: backend.token_to_id(text) for text in (bos, eos) if text is not None}
    whole = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    return processors.TemplateProcessing(single=whole, special_tokens=list(special.items()))


def _is_llama(directory: Path, config: dict[str, Any]) -> bool:
    """Tells whether transformers makes a LlamaTokenizer of this directory."""
    model = read_fields(directory / "config.json")
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
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if begins_with_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return fields | {
        "normalizer": None,
        "pre_tokenizer": spaces,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _prepends_space(normalizer: Any) -> bool:
    if not isinstance(normalizer, dict):
        return False
    parts = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    return isinstance(parts, list) and {"type": "Prepend", "prepend": SPACE} in parts
