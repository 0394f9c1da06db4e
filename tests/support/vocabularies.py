"""Small vocabularies of each kind, trained here on LINES, and their own libraries as oracles.

LINES are 200 lines of many scripts, with emoji, code, runs of spaces and texts of special tokens.
"""

import base64
import io
import json
from functools import cache
from pathlib import Path

import gguf
import sentencepiece
import tokenizers
from penstock.engine.text.bpe import byte_letters
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

LINES = Path(__file__).with_name("multilingual.txt").read_text(encoding="utf-8").split("\n")[:-1]
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NORMAL, UNKNOWN, SPECIAL, OWN, BYTE = 1, 2, 3, 4, 6


@cache
def sentencepiece_model(kind: str = "bpe", **options) -> bytes:
    """A tokenizer.model of SentencePiece's own trainer, as Llama's are made."""
    model = io.BytesIO()
    settings = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings |= {"user_defined_symbols": "<tool>", "control_symbols": "<pad>", "character_coverage": 0.98}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES[::2] * 3),
        model_writer=model,
        model_type=kind,
        vocab_size=2500,
        hard_vocab_limit=False,
        minloglevel=3,
        **settings | options,
    )
    return model.getvalue()


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    parts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the words of models' own tokenizer.json, by the names that GGUF gives them
WORDS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": _split(TikTokenConverter().pattern),
    "qwen2": _split(PRETOKENIZE_REGEX),
    "tekken": _split(TEKKEN),
    "deepseek-coder": _split("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}


@cache
def byte_level(name: str) -> tokenizers.Tokenizer:
    """A byte-level BPE that was trained on the words of this name, as a model's tokenizer.json has it."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    backend.pre_tokenizer, backend.decoder = WORDS[name], decoders.ByteLevel()
    backend.normalizer = normalizers.NFC() if name == "qwen2" else None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=list(CONTROL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES * 3, trainer)
    backend.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return backend


def tokens_of(backend: tokenizers.Tokenizer) -> list[str]:
    """Its tokens by id."""
    vocab = backend.get_vocab(with_added_tokens=True)
    return sorted(vocab, key=vocab.__getitem__)


def write_byte_level(file: Path, name: str, **fields) -> Path:
    """The GGUF file of byte_level(name); `fields` as for write_gguf."""
    backend = byte_level(name)
    tokens = tokens_of(backend)
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    kinds = [SPECIAL if token in CONTROL else OWN if token == "<tool>" else NORMAL for token in tokens]
    given = {"pre": name, "merges": merges, "bos_token_id": 1, "eos_token_id": 2} | fields
    return write_gguf(file, "gpt2", tokens, kinds, **given)


def write_gguf(file: Path, model: str, tokens: list[str], kinds: list[int], **fields) -> Path:
    """A GGUF file that has a vocabulary alone. `fields` are those of tokenizer.ggml; None leaves one out. Chat
    templates are none of those."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    adders = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    for name, value in fields.items():
        key = f"tokenizer.{name}" if name.startswith("chat_template") else f"tokenizer.ggml.{name}"
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def tekken() -> tuple[dict, dict[bytes, int]]:
    """The content of a tekken.json with the tokens of byte_level("tekken"), and the ranks of their bytes."""
    byte = {letter: value for value, letter in enumerate(byte_letters())}
    texts = [text for text in tokens_of(byte_level("tekken")) if text not in (*CONTROL, "<tool>")]
    ranks = {bytes(byte[letter] for letter in text): rank for rank, text in enumerate(texts)}
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    listed = [{"rank": rank, "token_bytes": base64.b64encode(piece).decode()} for piece, rank in ranks.items()]
    sizes = {"default_vocab_size": len(ranks) + 20, "default_num_special_tokens": 20}
    return {
        "config": {"pattern": TEKKEN, "version": "v7", **sizes},
        "vocab": [*listed, {"rank": len(ranks), "token_bytes": base64.b64encode(b"padding").decode()}],
        "special_tokens": [{"rank": rank, "token_str": text} for rank, text in enumerate(special)],
    }, ranks
