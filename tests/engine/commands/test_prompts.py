"""Prompts of a file, a pipe or standard input: read the same way, with a bound, refused by file and line."""

import io
import os
import re
import sys
import threading
import tracemalloc

import pytest
from penstock.engine.commands import prompts
from penstock.engine.commands.prompts import read_prompts
from penstock.scheduler.units import MIB

JSONL = b'{"prompt": "a\\u2028b"}\n\n{"prompt_token_ids": [0, 7]}'


@pytest.fixture(params=["file", "standard input", "pipe"])
def read(request, tmp_path, monkeypatch):
    """Reads content in each of the ways; and what messages call it."""

    def from_file(content: bytes) -> tuple[list, str]:
        (tmp_path / "prompts").write_bytes(content)
        return lambda: read_prompts([], str(tmp_path / "prompts")), str(tmp_path / "prompts")

    def from_stdin(content: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
        return lambda: read_prompts([], None), "-"

    def from_pipe(content: bytes):
        ours, theirs = os.pipe()
        writer = threading.Thread(target=write, args=(theirs, content))
        writer.start()
        request.addfinalizer(writer.join)
        request.addfinalizer(lambda: os.close(ours))
        return lambda: read_prompts([], f"/dev/fd/{ours}"), f"/dev/fd/{ours}"

    return {"file": from_file, "standard input": from_stdin, "pipe": from_pipe}[request.param]


def write(pipe: int, content: bytes) -> None:
    with open(pipe, "wb") as stream:
        stream.write(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (JSONL, ["a\u2028b", [0, 7]]),
        (b"\xef\xbb\xbf" + JSONL, ["a\u2028b", [0, 7]]),
        (b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n"), ["a\u2028b", [0, 7]]),
        ("\ufeffé one\r\n\r\n two\rthree\u2028four".encode(), ["é one", " two", "three\u2028four"]),
    ],
)
def test_a_byte_order_mark_and_line_ends_are_no_part_of_a_prompt(read, content, expected):
    run, _ = read(content)
    assert run() == expected


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\\ud800"}', "line 2", "prompt is not valid Unicode (a lone surrogate)"),
        (b'{"prompt_token_ids": [1, true]}', "line 1", 'expected an object with "prompt" (text) or'),
        (b'{"prompt_token_ids": [1.0]}', "line 1", 'expected an object with "prompt" (text) or'),
        (b'{"prompt_token_ids": [NaN]}', "line 1", 'expected an object with "prompt" (text) or'),
        (b'{"prompt_token_ids": [1' + b"0" * 5000 + b"]}", "line 1", "prompt_token_ids.0 is 1000"),
        (b'{"prompt": true}', "line 1", 'expected an object with "prompt" (text) or'),
        (b'{"prompt": "a"}\n\n[1]', "line 3", 'expected an object with "prompt" (text) or'),
        (b'{"prompt": "a"}\n' + b"[" * 100_000, "line 2", "is nested deeper than 64"),
        (b'{"prompt": "a", "prompt": "b"}', "line 1", "'prompt' is there twice"),
        (b'{"prompt": "a\0"}', "line 1", "has a NUL byte; expected text in UTF-8"),
        (b"one\ntwo\nthr\0ee", "line 3", "has a NUL byte; expected text in UTF-8"),
        ("one".encode("utf-16-le"), "line 1", "has a NUL byte; expected text in UTF-8"),
        (b"\xff", "", "'utf-8' codec can't decode byte 0xff"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "", "is a git-lfs pointer"),
        (b"\xef\xbb\xbf \n", "", "no prompt: give"),
    ],
)
def test_what_is_no_prompt_is_refused_by_file_and_line(read, content, where, message):
    run, name = read(content)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        run()
    text = str(refused.value)
    assert "\n" not in text and len(text) < 400 and where in text
    assert message.startswith("no prompt") or name in text


def test_a_bound_holds_what_has_no_end(read, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_BYTES", 10)
    run, name = read(b"0123456789")
    assert run() == ["0123456789"]
    run, name = read(b"0123456789\n")
    with pytest.raises(ValueError, match=f"--prompts-file {name}: has more than 10 bytes"):
        run()


def test_there_are_bounds_of_prompts_and_token_ids(read, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_PROMPTS", 2)
    monkeypatch.setattr(prompts, "MOST_COMMAS", 3)
    for content, what in ((b"a,,,,\n\nb\nc", "2 prompts"), (b'{"prompt_token_ids": [1, 2, 3]}\n' * 2, "3 values")):
        run, name = read(content)
        with pytest.raises(ValueError, match=f"^--prompts-file {name}: has more than {what}"):
            run()


def test_what_does_not_end_or_waits_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    named = os.open(tmp_path / "pipe", os.O_RDWR)
    kinds = [("/dev/zero", "a device"), (tmp_path, "a directory"), (tmp_path / "pipe", "a pipe")]
    try:
        for path, kind in [*kinds, (f"/dev/fd/{named}", "a pipe")]:
            with pytest.raises(ValueError, match=f"^{path}: is {kind}, and a file is expected"):
                read_prompts([], str(path))
    finally:
        os.close(named)
    with pytest.raises(ValueError, match="--prompts-file .*/nowhere: No such file"):
        read_prompts([], str(tmp_path / "nowhere"))


def test_lines_are_read_one_after_another(tmp_path):
    """A list of all lines of a file takes thirty times its bytes; this one is refused at its first."""
    (tmp_path / "braces").write_bytes(b"{\n" * 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match="braces, line 1: "):
        read_prompts([], str(tmp_path / "braces"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MIB


def test_zeros_on_standard_input_have_an_end(monkeypatch):
    monkeypatch.setattr(prompts, "MOST_BYTES", 2**22)
    with open("/dev/zero", "rb") as zeros:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(zeros))
        with pytest.raises(ValueError, match="--prompts-file -: has more than 4194304 bytes"):
            read_prompts([], "-")


def test_standard_input_that_is_closed_has_no_prompts(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="no prompt: give"):
        read_prompts([], "-")
