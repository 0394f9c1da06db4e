"""Files that a user names: what is no file, is too large or no sound JSON is refused by one line that names it."""

import os
import re

import pytest
from penstock.engine import user_files
from penstock.engine.user_files import (
    MAX_JSON_DEPTH,
    TooLarge,
    check_output,
    open_file,
    parse_json,
    read_bytes,
    read_json,
)


def write(tmp_path, text: str | bytes):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_is_read_with_and_without_a_byte_order_mark(tmp_path):
    assert read_json(write(tmp_path, '{"a": [1, -2.5, 1e-400, Infinity]}')) == {"a": [1, -2.5, 0.0, float("inf")]}
    assert read_json(write(tmp_path, b'\xef\xbb\xbf{"a": 18446744073709551615}')) == {"a": 2**64 - 1}


def test_a_field_that_nobody_reads_may_hold_any_number(tmp_path):
    path = write(tmp_path, '{"a": 1, "longest": 1000000000000000019884624838656, "b": {"least": [-1e999]}}')
    content = read_json(path, keep_too_large=True)
    assert content == {"a": 1, "longest": float("inf"), "b": {"least": [float("-inf")]}}
    assert all(type(value) is TooLarge for value in (content["longest"], *content["b"]["least"]))
    assert repr(content["longest"]) == "10000000000000000198... (31 characters), a number that is too large"
    with pytest.raises(ValueError, match="longest is 1000.*too large"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1]", "is not a JSON object"),
        (b"\xff{}", "is not JSON"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"b": {}, "a": "x", "a": "y"}', "'a' is there twice"),
        ('{"a": {"b": 1' + "0" * 400 + "}}", r"a\.b is 1000.*too large"),
        ('{"a": [0, 1' + "0" * 5000 + "]}", r"a\.1 is 1000.*\(5001 characters\), a number that is too large"),
        ('{"a": 1e400}', r"a is 1e400, a number that is too large"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", f"nested deeper than {MAX_JSON_DEPTH}"),
        ("[" * 100_000, f"nested deeper than {MAX_JSON_DEPTH}"),
        ('{"a":' * 100_000, f"nested deeper than {MAX_JSON_DEPTH}"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer.*git lfs pull"),
    ],
)
def test_unsound_json_is_refused_by_file_and_field(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}") as refused:
        read_json(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_what_is_no_file_is_refused_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in [(tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device"), (tmp_path, "a directory")]:
        with pytest.raises(ValueError, match=f"^{path}: is {kind}, and a file is expected"):
            read_bytes(path)
    with pytest.raises(ValueError, match="missing.json: No such file"), open_file(tmp_path / "missing.json"):
        raise AssertionError("opened")
    with pytest.raises(ValueError, match="File name too long"):
        read_bytes(tmp_path / ("a" * 300))


def test_as_many_values_are_read_as_fit_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(user_files, "MAX_JSON_VALUES", 10)
    assert read_json(write(tmp_path, '{"a": [[], {}, 1, 2, 3]}')) == {"a": [[], {}, 1, 2, 3]}
    for text in ('{"a": [[], {}, 1, 2, 3, [], []]}', '{"a": [' + "1," * 10 + "1]}", "[" * 11):
        with pytest.raises(ValueError, match=r"config\.json: has more than 10 values"):
            read_json(write(tmp_path, text))


def test_a_field_is_named_by_its_whole_path():
    text = '{"a": [{"b": {}}, {"c": [1, {}, {"d": 1e999}]}], "e": 1}'
    with pytest.raises(ValueError, match=r"^x: a\.1\.c\.2\.d is 1e999, a number that is too large"):
        parse_json(text, "x")
    with pytest.raises(ValueError, match=r"^x: it is 1e999"):
        parse_json("1e999", "x")
    deepest = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert parse_json(deepest, "x") is not None
    with pytest.raises(ValueError, match=r"^x: 0\.0\..* is nested deeper"):
        parse_json(f"[{deepest}]", "x")


def test_a_file_is_read_up_to_a_bound(tmp_path):
    path = write(tmp_path, b"x" * 11)
    assert read_bytes(path, 11) == b"x" * 11
    with pytest.raises(ValueError, match="has more than 10 bytes"):
        read_bytes(path, 10)


def test_text_that_is_no_file_is_named_as_its_reader_says():
    with pytest.raises(ValueError, match="^prompts, line 3: is not JSON"):
        parse_json("{", "prompts, line 3")


def test_a_path_where_no_file_can_be_written_is_refused_by_flag(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("kept")
    for path, message in (
        (tmp_path, "is a directory, and a file is expected"),
        (tmp_path / "pipe", "is a pipe, and a file is expected"),
        ("/dev/null", "is a device, and a file is expected"),
        (tmp_path / "no" / "file", "no such directory"),
        (tmp_path / "file" / "file", "no such directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ValueError, match=f"^--output {re.escape(str(path))}: {message}$"):
            check_output("--output", path)
    check_output("--output", tmp_path / "new")
    check_output("--output", tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "file"}
    assert (tmp_path / "file").read_text() == "kept"
