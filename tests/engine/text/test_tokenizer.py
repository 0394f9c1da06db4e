"""Tokenizer, streams and stop strings against decoding and searching the whole text."""

import os.path
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from penstock.engine.text.tokenizer import StopStrings, Tokenizer

from tests.support.tokenizer_backends import byte_fallback, byte_level

DEMO = Path(__file__).parents[3] / "engine" / "demo_model"
TEXTS = [
    "hello world, hello there!",
    "naïve café — 日本語のテキスト",
    "👩‍👩‍👧‍👦 family 🎉🎉 done",
    "a\n\n  b\tc ",
    "x\ufffdy",
    "",
]


def demo() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))


BACKENDS = [
    byte_level,
    byte_fallback,
    pytest.param(demo, marks=pytest.mark.skipif(not DEMO.joinpath("tokenizer.json").exists(), reason="no demo")),
]


@pytest.fixture(params=BACKENDS, scope="module")
def tokenizer(request) -> Tokenizer:
    return Tokenizer(request.param())


def streamed(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    stream = tokenizer.stream(prompt)
    return [*map(stream.push, output), stream.finish()]


def in_context(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> str:
    """Text that the output adds; a character that the prompt left unfinished counts as added."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + output)
    assert whole.startswith(before.rstrip("\ufffd"))
    return whole[len(os.path.commonprefix((before, whole))) :]


def test_encode_and_decode(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] in (0, 1), "the post-processor's special token comes first"
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("prompt", TEXTS)
@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_decode(tokenizer, prompt, text):
    prompt_ids, output = tokenizer.encode(prompt), tokenizer.encode(text)[1:]
    texts = streamed(tokenizer, prompt_ids, output)
    assert "".join(texts) == in_context(tokenizer, prompt_ids, output)


def test_stream_of_every_cut(tokenizer):
    """A prompt may end inside a character, an output as well, and special tokens may stand between."""
    ids = tokenizer.encode("hé 🎉 日 本a é")  # with byte_fallback, an unfinished character spoils its neighbour
    ids[4:4] = [1]
    for start in range(len(ids) + 1):
        for end in range(start, len(ids) + 1):
            prompt, output = ids[:start], ids[start:end]
            assert "".join(streamed(tokenizer, prompt, output)) == in_context(tokenizer, prompt, output)


def test_stream_gives_text_as_soon_as_it_is_whole(tokenizer):
    prompt, output = tokenizer.encode("hello"), tokenizer.encode(" ab🎉c")[1:]
    texts = streamed(tokenizer, prompt, output)
    assert texts[-1] == "" and "".join(texts).endswith("ab🎉c")
    assert all("\ufffd" not in text for text in texts)
    assert sum(text != "" for text in texts) >= 3
    assert tokenizer.decode(output[:-2]) != "" and "".join(texts[: len(output) - 1]).endswith("🎉")


def test_stream_after_a_long_prompt(tokenizer):
    prompt, output = tokenizer.encode("hello 🎉 " * 100), tokenizer.encode("world 日本")[1:]
    for length in range(len(prompt) - 8, len(prompt)):
        cut = prompt[:length]
        assert "".join(streamed(tokenizer, cut, output)) == in_context(tokenizer, cut, output)
    only_special = prompt + [1] * 100
    assert "".join(streamed(tokenizer, only_special, output)) == in_context(tokenizer, only_special, output)


@pytest.mark.parametrize("backend", [byte_level, demo])
def test_stream_of_random_tokens(backend):
    """Byte-level text never changes backwards, so even garbage streams exactly."""
    if backend is demo and not DEMO.joinpath("tokenizer.json").exists():
        pytest.skip("no demo")
    tokenizer, rng = Tokenizer(backend()), random.Random(0)
    size = tokenizer.backend.get_vocab_size()
    for _ in range(300):
        ids = [rng.randrange(size) for _ in range(rng.randrange(1, 12))]
        prompt, output = ids[: len(ids) // 2], ids[len(ids) // 2 :]
        assert "".join(streamed(tokenizer, prompt, output)) == in_context(tokenizer, prompt, output)


def test_stream_outlives_revised_text():
    """A bad byte spoils the good ones before it, with byte_fallback; text that was given out stays."""
    tokenizer = Tokenizer(byte_fallback())
    byte, letter = (lambda value: 3 + value), tokenizer.backend.token_to_id("a")
    good = [byte(value) for value in "é".encode()]
    texts = streamed(tokenizer, tokenizer.encode("h"), [*good, byte(0xFF), letter, letter, *good])
    assert "".join(texts).startswith("é") and "".join(texts).endswith("aaé")


class CountingBackend:
    """A tokenizer of the library that counts the tokens that it decodes."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self.num_calls = self.num_tokens = 0

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def decode(self, token_ids, **options) -> str:
        self.num_calls += 1
        self.num_tokens += len(token_ids)
        return self._backend.decode(token_ids, **options)


def odd_tokens(name: str, backend: tokenizers.Tokenizer) -> list[int]:
    """Thousands of tokens that make no text, or no characters."""
    vocab = backend.get_vocab()
    byte = vocab["<0xFF>"] if "<0xFF>" in vocab else vocab["ÿ"]  # as ByteLevel writes this byte
    one = {"special": [1], "unknown": [10**6], "bytes": [byte], "mixed": [1, byte, 10**6]}[name]
    return (one * 3000)[:3000]


@pytest.mark.parametrize("name", ["special", "unknown", "bytes", "mixed"])
def test_a_token_costs_the_same_however_many_came_before(tokenizer, name):
    """Tokens without text are neither decoded nor held, and those that make no character only for a while."""
    output = odd_tokens(name, tokenizer.backend)
    num_bytes = sum(tokenizer.decode([token]) != "" for token in output)
    counting = CountingBackend(tokenizer.backend)
    stream = Tokenizer(counting).stream(tokenizer.encode("hello"))
    counting.num_calls = counting.num_tokens = 0
    texts = list(map(stream.push, output))
    assert counting.num_calls <= 2 * num_bytes and counting.num_tokens <= 64 * num_bytes
    assert len("".join(texts)) >= num_bytes - 64, "text was held back"
    assert "".join(texts) + stream.finish() == "\ufffd" * num_bytes


@pytest.mark.parametrize("special", [1, 10**6])
def test_text_goes_on_after_many_tokens_without_any(tokenizer, special):
    prompt, first, then = (tokenizer.encode(text) for text in ("hello 🎉", " ab🎉", "é 日本"))
    output = first[1:-1] + [special] * 500 + first[-1:] + [special] * 500 + then[1:]  # inside a character, and after it
    for start in ([], prompt, prompt[:-1], [special] * 300, prompt + [special] * 300):
        assert "".join(streamed(tokenizer, start, output)) == in_context(tokenizer, start, output)


def test_bytes_that_make_no_character_are_given_out_exactly():
    """Also where the text that is given out ends inside a character."""
    tokenizer, rng = Tokenizer(byte_level()), random.Random(1)
    vocab = tokenizer.backend.get_vocab()
    byte = {value: vocab[letter] for value, letter in zip(b"\xff\xe6\x97\xf0\x9f", "ÿæĹðŁ")}
    smile, sun = tokenizer.encode("🎉")[1:], [byte[0xE6], byte[0x97], vocab["¥"]]
    for _ in range(200):
        garbage = rng.choices(list(byte.values()), k=rng.randrange(20, 90))
        output = garbage + rng.choice([smile, sun, []]) + rng.choices(list(byte.values()), k=rng.randrange(60))
        texts = streamed(tokenizer, tokenizer.encode("hello"), output)
        assert "".join(texts) == in_context(tokenizer, tokenizer.encode("hello"), output)


def test_an_id_that_the_model_does_not_know_is_refused_by_its_token(tokenizer):
    ids = tokenizer.encode("hello")
    assert tokenizer.encode("hello", max(ids) + 1) == ids and tokenizer.encode("", 2) in ([0], [1])
    with pytest.raises(
        ValueError, match=rf"^tokenizer.json: token '.+' .* id {max(ids)}, .* ids are 0\.\.{max(ids) - 1}:"
    ):
        tokenizer.encode("hello", max(ids))


def test_unknown_ids_give_no_text(tokenizer):
    assert tokenizer.decode([10**6]) == ""


def test_load(tmp_path):
    assert Tokenizer.load(tmp_path) is None
    file = tmp_path / "tokenizer.json"
    backend = byte_level()
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=64)
    backend.save(str(file))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello world, hello there")) == "hello world, hello there"
    assert len(tokenizer.encode("a")) == 2, "padded"
    for text in ("", "{", "[]", '{"version": "1.0"}', file.read_text()[:1000], "\x00\xff"):
        file.write_text(text)
        with pytest.raises(ValueError, match="tokenizer.json"):
            Tokenizer.load(tmp_path)


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    found = min(((text.find(stop), len(stop), stop) for stop in stops if stop in text), default=None)
    return (text, None) if found is None else (text[: found[0]], found[2])


def run_stops(chunks: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    strings, emitted = StopStrings(stops), ""
    for chunk in chunks:
        text, matched = strings.push(chunk)
        emitted += text
        if matched is not None:
            assert strings.push("more") == ("", matched) == strings.flush()
            return emitted, matched
    text, matched = strings.flush()
    return emitted + text, matched


@settings(max_examples=500)
@given(
    st.lists(st.text("abc", max_size=5), max_size=10),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4).map(tuple),
)
def test_stop_strings_equal_search_in_the_whole_text(chunks, stops):
    assert run_stops(chunks, stops) == first_stop("".join(chunks), stops)


@settings(max_examples=200)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3).map(tuple))
def test_stop_strings_hold_back_only_what_could_be_one(text, stops):
    strings, emitted = StopStrings(stops), ""
    for end, char in enumerate(text, 1):
        delta, matched = strings.push(char)
        emitted += delta
        if matched is not None:
            return
        held = text[len(emitted) : end]
        assert emitted + held == text[:end]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_stop_strings_across_tokens():
    strings = StopStrings(("</end>", "\n\n"))
    assert [strings.push(text) for text in ("one", " <", "/e", "x", "\n", "two </", "end", "> three")] == [
        ("one", None),
        (" ", None),
        ("", None),
        ("</ex", None),
        ("", None),
        ("\ntwo ", None),
        ("", None),
        ("", "</end>"),
    ]


def test_stop_strings_wait_for_an_earlier_beginning():
    strings = StopStrings(("abcd", "bc"))
    assert strings.push("abc") == ("", None)
    assert strings.push("d") == ("", "abcd")
    strings = StopStrings(("abcd", "bc"))
    assert strings.push("abc") == ("", None)
    assert strings.flush() == ("a", "bc")
    assert StopStrings(()).push("text") == ("text", None)
