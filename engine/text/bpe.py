"""Makes tokenizers of the library from vocabularies as others store them: pieces with scores (SentencePiece's BPE), or
bytes by rank (tiktoken's). Each gives the ids that its own library gives.

Both state no merges: a pair is joined if what it makes is a piece, the best piece first. So every cut of a piece into
two pieces is a merge, in the order of the pieces that they make.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"  # how SentencePiece writes a space
_PRIVATE = 0xF0000


class Kind(IntEnum):
    """The kinds of pieces, as SentencePiece and GGUF number them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece of a vocabulary; its id is its index."""

    text: str
    kind: int
    score: float = 0.0


def special_tokens(pieces: Iterable[Piece]) -> list[AddedToken]:
    """The pieces that are no text."""
    return [
        AddedToken(piece.text, normalized=False, special=True)
        for piece in pieces
        if piece.kind in (Kind.CONTROL, Kind.UNKNOWN)
    ]


def scored_bpe(pieces: Sequence[Piece], unknown: str | None, begins_with_space: bool) -> Tokenizer:
    """The BPE tokenizer of SentencePiece's pieces. `begins_with_space`: a space is put before a text, also before one
    that follows a special token, and is taken away when it is decoded.

    The user's own symbols are parts of a text, and no merges lead to them: a character of private use stands for each
    inside of the tokenizer."""
    own = sorted((piece.text for piece in pieces if piece.kind == Kind.USER_DEFINED), key=len, reverse=True)
    letters = {text: chr(_PRIVATE + number) for number, text in enumerate(own)}
    vocab = {letters.get(piece.text, piece.text): number for number, piece in enumerate(pieces)}
    normal = sorted((piece for piece in pieces if piece.kind == Kind.NORMAL), key=lambda piece: -piece.score)
    merges = [merge for piece in normal for merge in _cuts(piece.text, vocab)]
    has_bytes = any(piece.kind == Kind.BYTE for piece in pieces)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    first = [normalizers.Prepend(SPACE)] if begins_with_space else []
    backend.normalizer = normalizers.Sequence(
        [*first, normalizers.Replace(" ", SPACE), *(normalizers.Replace(*each) for each in letters.items())]
    )
    last = [decoders.Strip(" ", 1, 0)] if begins_with_space else []
    shown = [decoders.Replace(letter, text) for text, letter in letters.items()]
    backend.decoder = decoders.Sequence(
        [*shown, decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    backend.add_tokens(special_tokens(pieces))
    return backend


def ranked_bpe(ranks: Mapping[bytes, int], special: Sequence[str]) -> models.BPE:
    """The BPE model of bytes by rank. The first ids are those of the special tokens, ranks follow them."""
    letters = byte_letters()
    texts = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    pieces = sorted(ranks, key=ranks.__getitem__)
    merges = [(texts[left], texts[right]) for piece in pieces for left, right in _cuts(piece, ranks)]
    vocab = {texts[piece]: rank + len(special) for piece, rank in ranks.items()}
    return models.BPE(vocab | {text: number for number, text in enumerate(special)}, merges, ignore_merges=True)


def _cuts(piece: str | bytes, vocab: Mapping) -> list[tuple]:
    """The cuts of a piece into two pieces, by their ids."""
    cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
    known = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    return sorted(known, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))


def byte_letters() -> list[str]:
    """The letter for each byte that byte-level BPE writes it as: itself where it can be seen, else one from U+0100
    on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer whose pieces are the matches of a pattern, and what is between them."""
    return pre_tokenizers.Split(Regex(pattern), "isolated")
