"""Each kind of vocabulary gives the ids and text of its own library, on 200 lines; streamed text equals whole text."""

import json
import shutil

import pytest
import tiktoken
import transformers
from penstock.engine.text.bpe import byte_letters
from penstock.engine.text.tokenizer import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.mistral.tokenizer import MistralConverter

from tests.support.vocabularies import (
    BYTE,
    CONTROL,
    LINES,
    NORMAL,
    SPECIAL,
    TEKKEN,
    UNKNOWN,
    WORDS,
    byte_level,
    processor,
    sentencepiece_model,
    tekken,
    write_byte_level,
    write_gguf,
)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream([])
    return "".join([*map(stream.push, ids), stream.finish()])


def as_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which special tokens are text too, as libraries without them have it."""
    tokenizer.backend.encode_special_tokens = True
    try:
        return tokenizer.backend.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.backend.encode_special_tokens = False


def test_there_are_200_lines():
    assert len(LINES) == len(set(LINES)) == 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabularies")


@pytest.fixture(scope="module", params=["tokenizer.model", "GGUF"])
def scored(request, folder):
    """The pieces of SentencePiece in its own file, and in GGUF."""
    model = sentencepiece_model()
    if request.param == "tokenizer.model":
        (folder / "tokenizer.model").write_bytes(model)
        return Tokenizer.load(folder)
    pieces = processor(model)
    tokens = [pieces.id_to_piece(number) for number in range(len(pieces))]
    kinds = [kind_of(pieces, number) for number in range(len(pieces))]
    scores = [pieces.get_score(number) for number in range(len(pieces))]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": False}
    return Tokenizer.load(write_gguf(folder / "scores.gguf", "llama", tokens, kinds, scores=scores, **ids))


def kind_of(pieces, number: int) -> int:
    asked = ((pieces.is_unknown, UNKNOWN), (pieces.is_control, SPECIAL), (pieces.is_byte, BYTE))
    own = 4 if pieces.id_to_piece(number) == "<tool>" else NORMAL
    return next((kind for is_kind, kind in asked if is_kind(number)), own)


def test_scores_give_the_ids_and_the_text_of_sentencepiece(scored):
    oracle = processor(sentencepiece_model())
    for line in LINES:
        ids = oracle.encode(line)
        assert as_text(scored, line) == ids, line
        assert scored.decode(ids) == oracle.decode(ids) == streamed(scored, ids), line
    assert scored.encode("a<s>b") == [*oracle.encode("a"), 1, *oracle.encode("b")]
    assert scored.named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_without_a_space_before_and_without_byte_pieces(tmp_path):
    model = sentencepiece_model(byte_fallback=False, add_dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer, oracle = Tokenizer.load(tmp_path), processor(model)
    assert [as_text(tokenizer, line) for line in LINES] == [oracle.encode(line) for line in LINES]


@pytest.mark.parametrize("name", WORDS)
def test_merges_give_the_ids_and_the_text_of_the_models_own_tokenizer(folder, name):
    oracle = byte_level(name)
    tokenizer = Tokenizer.load(write_byte_level(folder / f"{name}.gguf", name, add_bos_token=False))
    for line in LINES:
        ids = oracle.encode(line).ids
        assert tokenizer.encode(line) == ids, line
        assert tokenizer.decode(ids) == oracle.decode(ids) == streamed(tokenizer, ids), line
    assert set(tokenizer.special_ids) == set(CONTROL)


def test_words_matter():
    """Each of these names cuts some of the lines otherwise than every other one."""
    cut = {name: [words.pre_tokenize_str(line) for line in LINES] for name, words in WORDS.items()}
    assert all(cut[name] != cut[other] for name in cut for other in cut if name != other)


@pytest.fixture(scope="module")
def tekken_folder(folder):
    content, _ = tekken()
    (folder / "tekken").mkdir()
    (folder / "tekken" / "tekken.json").write_text(json.dumps(content))
    return folder / "tekken"


def test_tekken_gives_the_ids_of_tiktoken_and_of_transformers(tekken_folder):
    tokenizer, (_, ranks) = Tokenizer.load(tekken_folder), tekken()
    oracle = tiktoken.Encoding("tekken", pat_str=TEKKEN, mergeable_ranks=ranks, special_tokens={})
    theirs = MistralConverter(str(tekken_folder / "tekken.json")).converted()
    for line in LINES:
        ids = [rank + 20 for rank in oracle.encode_ordinary(line)]
        assert as_text(tokenizer, line) == ids, line
        assert tokenizer.encode(line) == theirs.encode(line).ids, line
        assert tokenizer.decode(ids) == line == streamed(tokenizer, ids)
    assert tokenizer.encode("[INST]a<SPECIAL_7>")[::2] == [3, 7]
    assert tokenizer.named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


ADDS = [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {"add_eos_token": True}]
ADDS += [{"add_bos_token": False}, {"add_bos_token": None}]


@pytest.mark.parametrize("adds", ADDS, ids=str)
def test_bos_and_eos_come_as_transformers_adds_them(tmp_path, tekken_folder, adds):
    """A tokenizer.json says itself what is added, and tokenizer_config.json is not asked."""
    byte_level("gpt-2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tekken").mkdir()
    shutil.copy(tekken_folder / "tekken.json", tmp_path / "tekken")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | adds
    for folder in (tmp_path, tmp_path / "tekken"):
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert Tokenizer.load(folder).encode("hello world") == theirs("hello world")["input_ids"], folder


def test_bos_and_eos_of_a_tokenizer_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    plain = processor(sentencepiece_model()).encode("hello")
    for adds in ADDS:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(adds))
        bos, eos = ([number] * bool(adds.get(f"add_{name}_token")) for name, number in (("bos", 1), ("eos", 2)))
        assert Tokenizer.load(tmp_path).encode("hello") == [*bos, *plain, *eos]


@pytest.mark.parametrize(
    ("name", "fields", "before", "after"),
    [
        ("smollm", {}, [], []),
        ("llama-bpe", {}, [1], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_bos_and_eos_of_gguf(folder, name, fields, before, after):
    """As llama.cpp has it where the file does not say."""
    tokenizer = Tokenizer.load(write_byte_level(folder / "adds.gguf", name, **fields))
    assert tokenizer.encode("hello") == [*before, *byte_level(name).encode("hello").ids, *after]
    assert tokenizer.named == {"bos_token": CONTROL[1], "eos_token": CONTROL[2]}


def test_added_tokens_json_adds_to_a_tokenizer_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    count = len(processor(sentencepiece_model()))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": count, "<more>": count + 1}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<more>"]}))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a<extra><more>")
    assert ids[-2:] == [count, count + 1] and tokenizer.decode(ids[-2:]) == "<extra>"


def test_a_symbol_may_be_an_added_token(tmp_path):
    """A symbol of tokenizer.model keeps its id where tokenizer_config.json has it too, as a special token here."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    symbol = processor(sentencepiece_model()).piece_to_id("<tool>")
    added = {"added_tokens_decoder": {str(symbol): {"content": "<tool>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a<tool>")[-1] == symbol == tokenizer.special_ids["<tool>"]
    assert tokenizer.decode([symbol]) == ""


def test_letters_are_those_of_byte_level_bpe():
    letters = bytes_to_unicode()
    assert byte_letters() == [letters[byte] for byte in range(256)]
