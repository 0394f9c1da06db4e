"""A directory's tokenizer is the one that transformers makes of it: ids and text, whichever files say what."""

import json
import os
import shutil

import pytest
import transformers
from penstock.engine.text.tokenizer import Tokenizer

from tests.support.tokenizer_backends import byte_fallback, byte_level

TEXTS = [
    *("hello world", "a</s>b", "a </s> b", "<s>hello</s>  <s> world </s>", " a", "  a", "", " ", "</s>", "é🎉 日"),
    *("a<pad>b", "a <pad> b", "hello<tool>world", "hello <tool> world", "worldly <word>s <word> d", "hello", "ell"),
]


def token(content: str, **flags) -> dict:
    return {"content": content, **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False), **flags}


def added(*tokens: dict) -> dict:
    """An added_tokens_decoder whose tokens follow those of `pieces`."""
    return {"added_tokens_decoder": {str(number): each for number, each in tokens}}


LLAMA = {"tokenizer_class": "LlamaTokenizer"}
OLD = {**LLAMA, **{f"{name}_token": token(text, normalized=True, __type="AddedToken") for name, text in [
    ("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>")]}}  # fmt: skip
YI = LLAMA | added(
    *((number, token(text, normalized=True, special=True)) for number, text in enumerate(["<unk>", "<s>", "</s>"]))
)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
SPECIAL_TOOL = added((272, token("<tool>", special=True, lstrip=True, rstrip=True)))
CASES = {
    "Llama 1": (byte_fallback(normalized=True), {"tokenizer_config.json": OLD}),
    "Llama 1, fast": (
        byte_fallback(normalized=True),
        {"tokenizer_config.json": OLD | {"tokenizer_class": "LlamaTokenizerFast"}},
    ),
    "Yi": (byte_fallback(normalized=True), {"tokenizer_config.json": YI | {"legacy": True}}),
    "no space before": (byte_fallback(normalized=True), {"tokenizer_config.json": YI | {"add_prefix_space": False}}),
    "Llama 2": (byte_fallback(), {"tokenizer_config.json": LLAMA | {"legacy": False}}),
    "Llama 2, legacy": (byte_fallback(), {"tokenizer_config.json": LLAMA | {"legacy": True}}),
    "a Mistral": (byte_fallback(), {"tokenizer_config.json": LLAMA, "config.json": {"model_type": "mistral"}}),
    "a Llama": (byte_fallback(normalized=True), {"tokenizer_config.json": OLD, "config.json": {"model_type": "llama"}}),
    "class in config.json": (byte_fallback(normalized=True), {"config.json": {"model_type": "llama"} | LLAMA}),
    "the file alone": (byte_fallback(normalized=True), {}),
    "normalized, of no class": (byte_fallback(normalized=True), {"tokenizer_config.json": FAST}),
    "a pad token": (
        byte_fallback(),
        {"tokenizer_config.json": FAST | {"pad_token": "<pad>", "model_max_length": 10**30}},
    ),
    "a token of its own": (byte_fallback(), {"tokenizer_config.json": FAST | {"tool_token": "<tool>"}}),
    "tokens without names": (byte_level(), {"tokenizer_config.json": FAST | {"additional_special_tokens": ["<tool>"]}}),
    "tokens with own names": (
        byte_level(),
        {"tokenizer_config.json": FAST | {"extra_special_tokens": {"tool_token": "<tool>"}}},
    ),
    "only in the decoder": (byte_fallback(), {"tokenizer_config.json": FAST | SPECIAL_TOOL}),
    "single words": (
        byte_level(),
        {"tokenizer_config.json": FAST | added((300, token("<word>", single_word=True, special=False)))},
    ),
    "other flags": (
        byte_fallback(),
        {"tokenizer_config.json": FAST | added((2, token("</s>", special=True, lstrip=True, rstrip=True)))},
    ),
    "the decoder wins": (
        byte_level(),
        {"tokenizer_config.json": FAST | SPECIAL_TOOL, "special_tokens_map.json": {"pad_token": token("<pad>")}},
    ),
    "a name for the file's own": (
        byte_fallback(normalized=True),
        {"tokenizer_config.json": FAST | SPECIAL_TOOL | {"eos_token": "</s>", "pad_token": "<pad>"}},
    ),
    "a map": (
        byte_level(),
        {"tokenizer_config.json": FAST, "special_tokens_map.json": {"pad_token": token("<pad>", lstrip=True)}},
    ),
    "a map with a list": (
        byte_level(),
        {"tokenizer_config.json": FAST, "special_tokens_map.json": {"additional_special_tokens": ["<tool>"]}},
    ),
    "added_tokens.json": (
        byte_level(),
        {"tokenizer_config.json": FAST | {"pad_token": "<pad>"}, "added_tokens.json": {"<tool>": 301, "<pad>": 300}},
    ),
    "a word that is special": (byte_level(), {"tokenizer_config.json": FAST | {"eos_token": "hello"}}),
    "special tokens are text": (byte_level(), {"tokenizer_config.json": FAST | {"split_special_tokens": True}}),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_and_text_are_those_of_transformers(tmp_path, name):
    backend, files = CASES[name]
    backend.save(str(tmp_path / "tokenizer.json"))
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
        stream = ours.stream([])
        assert "".join([*map(stream.push, ids), stream.finish()]) == ours.decode(ids)
    everything = [1, 2, *range(len(theirs) - 6, len(theirs)), 2]
    assert ours.decode(everything) == theirs.decode(everything, skip_special_tokens=True)


def test_normalized_special_tokens_are_found_and_not_shown(tmp_path):
    backend, files = CASES["Llama 1"]
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(files["tokenizer_config.json"]))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a</s>b")
    assert ids[0] == 1 and ids[-2] == 2 and len(ids) == 5
    assert tokenizer.decode(ids) == "ab"


def test_a_byte_level_file_that_names_llama_stays_as_it_is(tmp_path):
    """Files as deepseek-llm's: transformers rebuilds the tokenizer with Llama's spaces, and loses all spaces."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello world, hello there")) == "hello world, hello there"


BASE = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
NO_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": BPE | {"unk_token": "<unk>"}}, r"cannot encode a text of 2 characters: Unk token `<unk>` not found"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "u"}}, "cannot encode .*UNK"),
        ({"model": BPE, "post_processor": NO_BOS}, "cannot encode a text of 2 characters: no entry found"),
        ({"model": BPE, "pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot encode .*chunk size"),
        ({"model": BPE | {"dropout": 1.5}}, "not a tokenizer.json: Dropout"),
        ({"model": BPE, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA"}}, "not a tokenizer.json: "),
    ],
)
def test_what_the_library_cannot_do_is_one_line_that_names_the_file(tmp_path, fields, message):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**BASE, "post_processor": None, **fields}))
    with pytest.raises(ValueError, match=f"^{file}: {message}") as refused:
        Tokenizer.load(tmp_path).encode("ac")
    assert "\n" not in str(refused.value)


def test_a_text_that_cannot_be_decoded_names_the_file(tmp_path):
    decoder = {"type": "Strip", "content": "a", "start": 5, "stop": 5}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**BASE, "model": BPE, "post_processor": None, "decoder": decoder})
    )
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json: cannot decode 2 tokens: "):
        tokenizer.decode([0, 1])
    with pytest.raises(ValueError, match="tokenizer.json: cannot decode"):
        tokenizer.stream([]).push(0)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", POINTER, "is a git-lfs pointer"),
        ("tokenizer.json", '{"model": ' + "[" * 100_000, "not a tokenizer.json: recursion limit"),
        ("tokenizer_config.json", POINTER, "is a git-lfs pointer"),
        ("tokenizer_config.json", "[" * 100_000, "is nested deeper"),
        ("tokenizer_config.json", "[1]", "is not a JSON object"),
        (
            "tokenizer_config.json",
            json.dumps(LLAMA | {"added_tokens_decoder": []}),
            "added_tokens_decoder: expected tok",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder: expected tokens by"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"7": 1}}',
            r"added_tokens_decoder\.7: expected a text, or",
        ),
        ("tokenizer_config.json", '{"bos_token": {"content": "a", "lstrip": 3}}', "bos_token: expected true or false"),
        ("tokenizer_config.json", '{"extra_special_tokens": [1]}', "extra_special_tokens: expected a text, or"),
        ("special_tokens_map.json", "{", "is not JSON"),
        ("added_tokens.json", '{"a": "b"}', "expected the ids of tokens by their text"),
    ],
)
def test_a_file_that_is_none_of_a_tokenizer_is_refused_by_name(tmp_path, file, content, message):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path / file}: {message}") as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_what_is_no_file_is_not_opened(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        directory = tmp_path / name
        directory.mkdir()
        byte_level().save(str(directory / "tokenizer.json"))
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)
        with pytest.raises(ValueError, match=f"{name}: is a pipe, and a file is expected"):
            Tokenizer.load(directory)
        shutil.rmtree(directory)
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "blob")
    with pytest.raises(ValueError, match="tokenizer.json: No such file"):
        Tokenizer.load(tmp_path)
