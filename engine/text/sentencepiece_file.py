"""Reads a tokenizer.model, SentencePiece's file, as a tokenizer of the library.

It needs the packages sentencepiece and protobuf, which `pip install penstock[tokenizers]` brings. Read is BPE whose
text is taken as it is; a Unigram model, or one that rewrites text first, is refused.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import tokenizers
from penstock.engine.text.bpe import Kind, Piece, scored_bpe
from penstock.engine.text.library_errors import library_errors
from penstock.engine.user_files import read_bytes

_BPE = 2
_MODEL_TYPES = {1: "Unigram", 3: "Word", 4: "Char"}
_NAMED = ("bos", "eos", "unk", "pad")


def read_sentencepiece(file: Path, added: Collection[str] = ()) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of a file, and its special tokens by name (bos_token ...). The pieces of `added` are tokens that
    other files add. Raises ValueError naming the file."""
    proto = _parse(file)
    _refuse_others(file, proto)
    if len({each.piece for each in proto.pieces}) < len(proto.pieces) or any(
        each.type == Kind.UNUSED for each in proto.pieces
    ):
        raise ValueError(f"{file}: has a piece twice, or one that is marked unused, which is not read")
    pieces = [Piece(each.piece, Kind.UNUSED if each.piece in added else each.type, each.score) for each in proto.pieces]
    spec = proto.trainer_spec
    named = {f"{name}_token": getattr(spec, f"{name}_id") for name in _NAMED}
    named = {name: pieces[number].text for name, number in named.items() if 0 <= number < len(pieces)}
    with library_errors(f"{file}: no tokenizer can be made of it"):
        backend = scored_bpe(pieces, named.get("unk_token"), proto.normalizer_spec.add_dummy_prefix)
    return backend, named


def _parse(file: Path) -> Any:
    content = read_bytes(file)
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        what = "reading it needs the packages sentencepiece and protobuf"
        raise ValueError(f"{file}: {what} ({error}): pip install 'penstock[tokenizers]'") from None
    proto = sentencepiece_model_pb2.ModelProto()
    with library_errors(f"{file}: is no model of SentencePiece"):
        proto.ParseFromString(content)
    if not proto.pieces:
        raise ValueError(f"{file}: is no model of SentencePiece: it has no pieces")
    return proto


def _refuse_others(file: Path, proto: Any) -> None:
    kind, normalizer = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind != _BPE:
        raise ValueError(
            f"{file}: is a {_MODEL_TYPES.get(kind, kind)} model, and only BPE is read: give a tokenizer.json"
        )
    rewrites = {
        "normalizes text by a table (precompiled_charsmap)": bool(normalizer.precompiled_charsmap),
        "takes spaces away (remove_extra_whitespaces)": normalizer.remove_extra_whitespaces,
        "keeps spaces as they are (escape_whitespaces is false)": not normalizer.escape_whitespaces,
        "puts spaces behind words (treat_whitespace_as_suffix)": proto.trainer_spec.treat_whitespace_as_suffix,
    }
    for what, does in rewrites.items():
        if does:
            raise ValueError(f"{file}: {what}, which is not read: give a tokenizer.json")
