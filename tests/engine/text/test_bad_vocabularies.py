"""Vocabularies that are damaged, or of a kind that is not read, are refused in one line that names file and field."""

import json
import re
import sys

import pytest
from penstock.engine.text.tokenizer import Tokenizer

from tests.support.vocabularies import (
    CONTROL,
    NORMAL,
    SPECIAL,
    sentencepiece_model,
    tekken,
    write_byte_level,
    write_gguf,
)


def refusal(place) -> str:
    with pytest.raises(ValueError) as refused:
        Tokenizer.load(place)
    text = str(refused.value)
    assert "\n" not in text and len(text) < 700
    return text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: sentencepiece_model("unigram"), "is a Unigram model, and only BPE is read: give a tokenizer.json"),
        (lambda: sentencepiece_model(normalization_rule_name="nmt_nfkc"), "normalizes text by a table"),
        (lambda: sentencepiece_model(remove_extra_whitespaces=True), "takes spaces away (remove_extra_whitespaces)"),
        (lambda: sentencepiece_model(treat_whitespace_as_suffix=True), "puts spaces behind words"),
        (lambda: sentencepiece_model()[:1000], "is no model of SentencePiece"),
        (lambda: b"IQ== 0\nIg== 1\n", "is no model of SentencePiece"),
        (lambda: b"", "is no model of SentencePiece: it has no pieces"),
        (lambda: sentencepiece_model() * 2, "has a piece twice"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    ],
    ids=range(9),
)
def test_a_tokenizer_model_that_is_not_read(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content())
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer.model'}: {message}")


def test_without_sentencepiece_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert refusal(tmp_path).endswith(": pip install 'penstock[tokenizers]'")


def with_field(content: dict, path: str, value) -> dict:
    *parents, last = path.split(".")
    for name in parents:
        content = content[int(name) if isinstance(content, list) else name]
    if value is None:
        del content[last]
    else:
        content[int(last) if isinstance(content, list) else last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("config", [], "config: expected an object"),
        ("config.pattern", 3, "pattern: expected a text"),
        ("config.pattern", "(", "no tokenizer can be made of it: "),
        ("config.default_vocab_size", "many", "default_vocab_size: expected a number"),
        ("config.default_num_special_tokens", 2, "config.default_num_special_tokens: expected a number, 5 at least"),
        ("special_tokens", None, "has no special_tokens: "),
        ("special_tokens.1", {"rank": 7, "token_str": "<s>"}, "special_tokens: expected objects with rank"),
        ("special_tokens.1", {"rank": [], "token_str": "<s>"}, "special_tokens: expected objects with rank"),
        ("special_tokens.1", {"rank": 1, "token_str": "<unk>"}, "special_tokens: expected objects with rank"),
        ("vocab", {}, "vocab: expected a list"),
        ("vocab.3", {"token_bytes": "%"}, "vocab.3: expected token_bytes, in base64"),
        ("vocab.3", {"token_bytes": ""}, "vocab.3: its token_bytes are empty"),
        ("vocab.3", 5, "vocab.3: expected token_bytes, in base64"),
    ],
)
def test_a_tekken_file_that_is_not_read(tmp_path, path, value, message):
    content, _ = tekken()
    with_field(content, path, value)
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tekken.json'}: {message}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre": None}, "tokenizer.ggml.pre is missing: without it tokens would be wrong; known are llama-bpe, "),
        ({"pre": "default"}, "tokenizer.ggml.pre 'default' is not known: "),
        ({"pre": 3}, "tokenizer.ggml.pre: 3 is none; expected a text"),
        ({"merges": ["a b", "abc"]}, "tokenizer.ggml.merges: 'abc' is no pair"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges: 'a b c' is no pair"),
        ({"merges": ["zz qq"]}, "tokenizer.ggml.merges: no tokenizer can be made of them: "),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges: expected an array of str"),
        ({"merges": None}, "tokenizer.ggml.merges: expected an array of str"),
        ({"bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id: 1000000 is no id: there are "),
        ({"eos_token_id": "2"}, "tokenizer.ggml.eos_token_id: '2' is none; expected an integer"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token: 1 is none; expected true or false"),
        ({"bos_token_id": None, "add_bos_token": True}, "tokenizer.ggml.add_bos_token is true, and no bos_token"),
    ],
)
def test_a_vocabulary_of_merges_in_gguf_that_is_not_read(tmp_path, fields, message):
    file = write_byte_level(tmp_path / "a.gguf", "smollm", **fields)
    assert refusal(file).startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    ("model", "tokens", "kinds", "scores", "message"),
    [
        ("bert", ["a"], [NORMAL], [0.0], "tokenizer.ggml.model: 'bert' is not read; read are 'gpt2' and 'llama'"),
        ("llama", ["a", "b", "a"], [NORMAL] * 3, [0.0] * 3, "tokenizer.ggml.tokens: 'a' is there twice"),
        ("llama", ["a", "b"], [NORMAL], [0.0] * 2, "tokenizer.ggml.token_type: has 1 values for 2 tokens"),
        ("llama", ["a", "b"], [NORMAL] * 2, [0.0], "tokenizer.ggml.scores: has 1 values for 2 tokens"),
        ("llama", ["a", "b"], [NORMAL] * 2, None, "tokenizer.ggml.scores: expected an array of float or int"),
        ("llama", [CONTROL[0]], [SPECIAL], [0.0], "tokenizer.ggml.add_bos_token is true, and no bos_token"),
    ],
)
def test_a_vocabulary_in_gguf_that_is_not_read(tmp_path, model, tokens, kinds, scores, message):
    file = write_gguf(tmp_path / "a.gguf", model, tokens, kinds, scores=scores)
    assert refusal(file).startswith(f"{file}: {message}")


def test_a_directory_without_a_vocabulary_has_no_tokenizer(tmp_path):
    assert Tokenizer.load(tmp_path) is None and not Tokenizer.is_there(tmp_path)
    missing = tmp_path / "none.gguf"
    assert re.match(f"{missing}: No such file", refusal(missing))
