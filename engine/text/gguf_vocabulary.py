"""Makes the tokenizer that a GGUF file's metadata describes (keys tokenizer.ggml.*).

`model` says how text is cut into tokens: "gpt2" is byte-level BPE with `merges`, whose words `pre` names; "llama" is
SentencePiece's BPE with `scores`. A `pre` that is not in PRE_TOKENIZERS is refused: other words give other tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from penstock.engine.text.bpe import Kind, Piece, scored_bpe, special_tokens, split
from penstock.engine.text.library_errors import library_errors
from penstock.scheduler.units import show_value
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

_KEY = "tokenizer.ggml."
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class PreTokenizer:
    """The words of a byte-level BPE: those of each pattern in turn, cut from what those before it left; without any
    pattern GPT-2's. `digits`: each digit is a word. `whole`: a word that is a token is one, whatever the merges say.
    `begins`: BOS comes first where the file does not say. `composed`: text is made NFC."""

    patterns: tuple[str, ...] = ()
    digits: bool = False
    whole: bool = False
    begins: bool = False
    composed: bool = False

    def made(self) -> pre_tokenizers.PreTokenizer:
        parts = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        parts += map(split, self.patterns)
        return pre_tokenizers.Sequence(
            [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.patterns)]
        )


# as the models' own tokenizer.json have them; llama.cpp's names
_CONTRACTION, _WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS, _SPACES = r" ?[^\s\p{L}\p{N}]+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf"{_SIGNS}[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGNS}[\r\n/]*|{_SPACES}"
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_LLAMA3 = PreTokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",), whole=True, begins=True)
_QWEN2 = PreTokenizer((rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}",), composed=True)
PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact"), PreTokenizer(digits=True)),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}")),
    "gpt-2": PreTokenizer(),
    "tekken": PreTokenizer((_TEKKEN,), whole=True, begins=True),
}


def has_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Tells whether a file's metadata have a vocabulary."""
    return any(f"{_KEY}{name}" in metadata for name in ("model", "tokens"))


def read_vocabulary(file: str, metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str], dict]:
    """The tokenizer of a file's metadata, its special tokens by name (bos_token ...), and whether a text begins with
    BOS and ends with EOS (add_bos_token, add_eos_token). Raises ValueError naming the file and the key at fault."""
    values = _Values(file, metadata)
    model = values.get("model", str)
    if model not in ("gpt2", "llama"):
        raise ValueError(f"{file}: {_KEY}model: {show_value(model)} is not read; read are 'gpt2' and 'llama'")
    tokens, kinds = _tokens(values)
    scores = values.array("scores", (float, int), len(tokens)) if model == "llama" else []
    numbers = {name: values.get(f"{key}_token_id", int, None) for name, key in _NAMED.items()}
    for name, number in numbers.items():
        if number is not None and not 0 <= number < len(tokens):
            raise ValueError(
                f"{file}: {_KEY}{_NAMED[name]}_token_id: {number} is no id: there are {len(tokens)} tokens"
            )
    named = {name: tokens[number] for name, number in numbers.items() if number is not None}
    if model == "llama":
        begins, pieces = True, [Piece(*each) for each in zip(tokens, kinds, scores)]
        with library_errors(f"{file}: {_KEY}tokens: no tokenizer can be made of them"):
            backend = scored_bpe(pieces, named.get("unk_token"), values.get("add_space_prefix", bool, True))
    else:
        pre = _pre_tokenizer(values)
        begins, backend = pre.begins, _byte_level(values, tokens, kinds, pre)
    return backend, named, _adds(values, named, begins)


def _adds(values: "_Values", named: Mapping[str, str], begins: bool) -> dict[str, bool]:
    """Says whether a text begins with BOS and ends with EOS."""
    adds = {"add_bos_token": values.get("add_bos_token", bool, begins)}
    adds |= {"add_eos_token": values.get("add_eos_token", bool, False)}
    for key, does in adds.items():
        name = key.removeprefix("add_")
        if does and name not in named:
            raise ValueError(f"{values.file}: {_KEY}{key} is true, and no {name}_id is given")
    return adds


class _Values:
    """The metadata's values of tokenizer.ggml.*, checked."""

    def __init__(self, file: str, metadata: Mapping[str, Any]):
        self.file, self._metadata = file, metadata

    def get(self, name: str, kind: type, *default: Any) -> Any:
        value = self._metadata.get(_KEY + name)
        if value is None and default:
            return default[0]
        if type(value) is not kind:
            found = "is missing" if value is None else f"{show_value(value)} is none"
            words = {str: "a text", int: "an integer", bool: "true or false"}
            raise ValueError(f"{self.file}: {_KEY}{name}: {found}; expected {words[kind]}")
        return value

    def array(self, name: str, kinds: tuple[type, ...], length: int | None = None) -> list:
        values = self._metadata.get(_KEY + name)
        if not isinstance(values, list) or not values or not set(map(type, values)) <= set(kinds):
            raise ValueError(
                f"{self.file}: {_KEY}{name}: expected an array of {' or '.join(k.__name__ for k in kinds)}"
            )
        if length not in (None, len(values)):
            raise ValueError(f"{self.file}: {_KEY}{name}: has {len(values)} values for {length} tokens")
        return values


def _tokens(values: _Values) -> tuple[list[str], list[int]]:
    """The texts of all tokens, and their kinds."""
    tokens = values.array("tokens", (str,))
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise ValueError(f"{values.file}: {_KEY}tokens: {show_value(twice)} is there twice")
    return tokens, values.array("token_type", (int,), len(tokens))


def _pre_tokenizer(values: _Values) -> PreTokenizer:
    name = values.get("pre", str, None)
    if name not in PRE_TOKENIZERS:
        found = "is missing" if name is None else f"{show_value(name)} is not known"
        known = f"without it tokens would be wrong; known are {', '.join(PRE_TOKENIZERS)}"
        raise ValueError(f"{values.file}: {_KEY}pre {found}: {known}. --tokenizer DIRECTORY takes another tokenizer")
    return PRE_TOKENIZERS[name]


def _byte_level(values: _Values, tokens: list[str], kinds: list[int], pre: PreTokenizer) -> tokenizers.Tokenizer:
    """Makes no Piece of plain text: of 128k of them Python's collector would look at all that is imported, twice."""
    merges = [tuple(merge.split(" ")) for merge in values.array("merges", (str,))]
    if not all(len(merge) == 2 for merge in merges):
        wrong = next(merge for merge in merges if len(merge) != 2)
        raise ValueError(f"{values.file}: {_KEY}merges: {show_value(' '.join(wrong))} is no pair")
    vocab = {text: number for number, text in enumerate(tokens)}
    with library_errors(f"{values.file}: {_KEY}merges: no tokenizer can be made of them"):
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.whole))
    backend.normalizer = normalizers.NFC() if pre.composed else None
    backend.pre_tokenizer, backend.decoder = pre.made(), decoders.ByteLevel()
    pieces = [Piece(text, kind) for text, kind in zip(tokens, kinds) if kind != Kind.NORMAL]
    own = [AddedToken(piece.text, normalized=False) for piece in pieces if piece.kind == Kind.USER_DEFINED]
    backend.add_tokens([*special_tokens(pieces), *own])
    return backend
