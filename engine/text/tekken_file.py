"""Reads a tekken.json, Mistral's file, as a tokenizer of the library: byte-level BPE by rank, special tokens first.

Nothing in the file says that a text begins with BOS, so it does not, as in transformers.
"""

import base64
from pathlib import Path
from typing import Any

import tokenizers
from penstock.engine.text.bpe import ranked_bpe, split
from penstock.engine.text.library_errors import library_errors
from penstock.engine.user_files import read_json
from tokenizers import AddedToken, decoders, pre_tokenizers, processors

_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def read_tekken(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of a file, and its special tokens by name (bos_token ...). Raises ValueError naming the file and
    the field at fault."""
    content = read_json(file)
    config = _field(content, "config", dict, file)
    special = _special_tokens(content, config, file)
    ranks = _ranks(content, config, len(special), file)
    pattern = _field(config, "pattern", str, file)
    with library_errors(f"{file}: no tokenizer can be made of it"):
        backend = tokenizers.Tokenizer(ranked_bpe(ranks, special))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split(pattern), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, {name: text for name, text in _NAMED.items() if text in special}


def _field(content: dict[str, Any], name: str, kind: type, file: Path) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        words = {dict: "an object", list: "a list", str: "a text", int: "a number"}
        raise ValueError(f"{file}: {name}: expected {words[kind]}")
    return value


def _special_tokens(content: dict[str, Any], config: dict[str, Any], file: Path) -> list[str]:
    """The special tokens, whose ids are their indices. A file may state more of them than it names."""
    if "special_tokens" not in content:
        raise ValueError(f"{file}: has no special_tokens: files of before 2024-11 leave them to mistral-common")
    named = _field(content, "special_tokens", list, file)
    by_rank = {each.get("rank"): each.get("token_str") for each in named if _has_rank(each)}
    texts = [by_rank.get(rank) for rank in range(len(named))]
    if not all(isinstance(text, str) and text for text in texts) or len(set(texts)) < len(texts):
        raise ValueError(f"{file}: special_tokens: expected objects with rank, from 0 on, and token_str")
    count = config.get("default_num_special_tokens", len(texts))
    if type(count) is not int or not len(texts) <= count <= 2**20:
        raise ValueError(f"{file}: config.default_num_special_tokens: expected a number, {len(texts)} at least")
    return texts + [f"<SPECIAL_{number}>" for number in range(len(texts), count)]


def _has_rank(each: Any) -> bool:
    return isinstance(each, dict) and type(each.get("rank")) is int


def _ranks(content: dict[str, Any], config: dict[str, Any], num_special: int, file: Path) -> dict[bytes, int]:
    """The bytes of the tokens that the model has, with their ranks; the file may list more."""
    listed = _field(content, "vocab", list, file)
    if config.get("default_vocab_size") is not None:
        listed = listed[: max(0, _field(config, "default_vocab_size", int, file) - num_special)]
    ranks: dict[bytes, int] = {}
    for rank, each in enumerate(listed):
        text = each.get("token_bytes") if isinstance(each, dict) else None
        try:
            piece = base64.b64decode(text, validate=True)
        except (TypeError, ValueError):
            raise ValueError(f"{file}: vocab.{rank}: expected token_bytes, in base64") from None
        if not piece or ranks.setdefault(piece, rank) != rank:
            raise ValueError(f"{file}: vocab.{rank}: its token_bytes are empty, or are there twice")
    return ranks
