"""Inputs: lines that are taken and refused, with their numbers, before anything is loaded; reading them later."""

import json

import pytest
from penstock.engine.batch.input_lines import check_lines
from penstock.engine.batch.rows import MOST_LINE_BYTES, RowReader

from tests.support.batch_jobs import line, write_lines


def check(file, is_text=False, **defaults):
    return check_lines(file, RowReader(str(file), defaults, ("demo", "other name"), is_text).read)


def reads(file, lines, index, is_text=False):
    with open(file, "rb") as stream:
        return RowReader(str(file), {}, ("demo",), is_text).read(lines.read(stream, index), lines.numbers[index])


def test_rows_are_counted_without_blank_lines_and_keep_their_numbers(tmp_path):
    texts = [line("a", prompt="x", max_tokens=3, n=2), "", "  ", line("b", prompt=["x", [1, 2]], model="other name")]
    chat = line("c", "/v1/chat/completions", messages=[{"role": "user", "content": "é"}])
    lines = check(write_lines(tmp_path / "in.jsonl", [*texts, chat]))
    assert list(lines.numbers) == [1, 4, 5]
    assert (list(lines.most_tokens), list(lines.num_sequences)) == ([3, 16, 0], [2, 2, 1])
    assert reads(tmp_path / "in.jsonl", lines, 2).asked.messages == [{"role": "user", "content": "é"}]


def test_defaults_stand_in_for_what_a_body_leaves_out(tmp_path):
    texts = [line("a", prompt="x"), line("b", prompt="x", max_tokens=3)]
    assert list(check(write_lines(tmp_path / "in", texts), max_tokens=7).most_tokens) == [7, 3]


def test_a_file_of_text_has_a_prompt_a_line(tmp_path):
    file = tmp_path / "in.txt"
    file.write_bytes('\ufeffDer Fluß\r\n\n  {"a"\n'.encode())
    lines = check(file, is_text=True)
    rows = [reads(file, lines, index, is_text=True) for index in range(len(lines))]
    assert [(row.custom_id, row.asked.prompts) for row in rows] == [("line-1", ["Der Fluß"]), ("line-3", ['  {"a"'])]


GOOD = line("good", prompt="x")


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes"),
        ("[]", "expected an object with custom_id, method, url, body"),
        (json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions"}), "body: is missing"),
        (line("", prompt="x"), "custom_id='': expected a text of 1 to 512 characters"),
        (line("\ud800", prompt="x"), "custom_id='\\ud800': expected a text of 1 to 512 characters"),
        (line("a", method="GET", prompt="x"), "method='GET': expected POST"),
        (line("a", url="/v1/embeddings", input="x"), "url='/v1/embeddings': expected /v1/completions or"),
        (line("a", prompt="x", temperature=-1), "body: temperature=-1: expected a finite number of at least 0"),
        (line("a", prompt="x", max_tokens="9"), "body: max_tokens='9': expected integer"),
        (line("a", prompt="x", logit_bias={"5": 1}), "body: logit_bias={'5': 1}: is not supported"),
        (line("a", max_tokens=5), "body: prompt: is missing"),
        (line("a", prompt="x", stream=True), "body: stream: a batch job does not stream its answers"),
        (line("a", prompt="x", model="gpt-4"), "body: the model 'gpt-4' is not served; there is demo, other name"),
        (line("a", "/v1/chat/completions", messages=[]), "body: messages: expected a list of messages"),
        (line("good", prompt="y"), "custom_id 'good' is there already, in line 1"),
    ],
)
def test_a_bad_line_in_the_middle_is_refused_by_its_number(tmp_path, bad, message):
    file = write_lines(tmp_path / "in.jsonl", [GOOD, bad, line("last", prompt="x")])
    with pytest.raises(ValueError) as refused:
        check(file)
    assert str(refused.value).startswith(f"{file}, line 2: {message}") and "\n" not in str(refused.value)


def test_further_lines_at_fault_are_named_too(tmp_path):
    file = write_lines(tmp_path / "in.jsonl", [GOOD, "{", *["[]"] * 7])
    with pytest.raises(ValueError, match=r"line 2: is not JSON.*; 7 more at fault: line 3, 4, 5, 6, 7, \.\.\.$"):
        check(file)


def test_lines_that_repeat_an_id_are_counted_with_the_others(tmp_path):
    streamed, again = line("a", prompt="x", stream=True), [line(name, prompt="y") for name in ("last", "good", "good")]
    file = write_lines(tmp_path / "in.jsonl", [GOOD, GOOD, streamed, line("last", prompt="x"), "[]", *again])
    message = r"line 2: custom_id 'good' is there already, in line 1; 5 more at fault: line 3, 5, 6, 7, 8$"
    with pytest.raises(ValueError, match=message):
        check(file)
    write_lines(file, [GOOD, "{", GOOD])
    with pytest.raises(ValueError, match=r"line 2: is not JSON.*; 1 more at fault: line 3$"):
        check(file)


@pytest.mark.parametrize(
    "content, message", [(b"\n \n", "has no line with a request"), (b"\xff\xfe", "line 1: is not")]
)
def test_a_file_without_requests_is_refused(tmp_path, content, message):
    file = tmp_path / "in.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check(file)


def test_a_line_beyond_all_bounds_is_refused_and_not_read_whole(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(GOOD.encode() + b"\n" + b"x" * (2 * MOST_LINE_BYTES + 5) + b"\n{\n")
    message = f"line 2: has more than {MOST_LINE_BYTES} bytes, the most that are read; 1 more at fault: line 3$"
    with pytest.raises(ValueError, match=message):
        check(file)


def test_a_line_that_changes_after_the_check_is_refused(tmp_path):
    texts = [line(str(number), prompt="x") for number in range(3)]
    file = write_lines(tmp_path / "in.jsonl", texts)
    lines = check(file)
    write_lines(file, [texts[0], texts[1].replace('"x"', '"y"'), texts[2]])
    assert reads(file, lines, 2).custom_id == "2"
    with pytest.raises(ValueError, match=r"in.jsonl, line 2: has changed since the job began$"):
        reads(file, lines, 1)
