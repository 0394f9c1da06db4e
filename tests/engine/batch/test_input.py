"""Inputs: lines that are taken and refused, with their numbers, before anything is loaded; reading them later."""

import json

import pytest
from penstock.engine.batch.input_lines import MOST_REASONS, check_lines
from penstock.engine.batch.rows import MOST_LINE_BYTES, RowReader
from penstock.engine.server.fields import SAMPLING

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
        (line("a", prompt="x", max_tokens="9"), "body: max_tokens='9': expected an integer"),
        (line("a", prompt="x", stop=9), "body: stop=9: expected a string or an array"),
        (line("a", prompt="x", stream_options={"include_usage": 1}), "body: stream_options: include_usage: expected a"),
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


def refusal(file) -> list[str]:
    """The message and the notes of the error that a file is refused by, without the file's name."""
    with pytest.raises(ValueError) as refused:
        check(file)
    told = [str(refused.value), *getattr(refused.value, "__notes__", ())]
    assert all(each.startswith(str(file)) for each in told)
    return [each.removeprefix(f"{file}, ") for each in told]


def test_each_reason_is_told_once_with_the_lines_that_it_holds_for(tmp_path):
    texts = [
        GOOD,
        line("a", prompt="x", temperature=-1),
        line("b", prompt="x", top_p=-1),
        line("c", prompt="x", temperature=-2),
        *('{"custom_id": "d" "method": "POST"}', '{"custom_id": "quite long", "method" "POST"}'),
        line("e", prompt="x", top_k=0.5),
        *(line("f", prompt="x", logit_bias={str(number): 5}) for number in range(7)),
        *(line("g", prompt="x", model=name) for name in ("one", "it's another")),
    ]
    told = refusal(write_lines(tmp_path / "in=1: 2.jsonl", texts))
    assert [(each.split(": expected")[0], each.partition(" more alike: line ")[2]) for each in told[:4]] == [
        ("line 2: body: temperature=-1", "4"),
        ("line 3: body: top_p=-1", ""),
        ("line 5: is not JSON: Expecting ',' delimiter: line 1 column 19 (char 18); 1 more alike: line 6", "6"),
        ("line 7: body: top_k=0.5", ""),
    ]
    refused, not_served = told[4:]
    assert refused.startswith("line 8: body: logit_bias={'0': 5}: is not supported")
    assert refused.endswith("; 6 more alike: line 9, 10, 11, 12, 13, ...")
    assert not_served.startswith("line 15: body: the model 'one' ") and not_served.endswith("; 1 more alike: line 16")


def test_what_is_told_of_many_lines_and_many_reasons_is_short(tmp_path):
    texts = [line(str(at), prompt="x", **{name: {}}) for at, name in enumerate([*SAMPLING] * 100)]
    told = refusal(write_lines(tmp_path / "in.jsonl", texts))
    assert len(told) == MOST_REASONS + 1
    *named, others = told
    assert all("; 99 more alike: line " in each and each.endswith(", ...") for each in named)
    num_others = len(texts) - 100 * MOST_REASONS
    assert num_others > 0 and others.endswith(f"in.jsonl: lines at fault for other reasons: {num_others}")


def test_lines_that_repeat_an_id_are_told_with_the_others(tmp_path):
    streamed, again = line("a", prompt="x", stream=True), [line(name, prompt="y") for name in ("last", "good", "good")]
    file = write_lines(tmp_path / "in.jsonl", [GOOD, GOOD, streamed, line("last", prompt="x"), "[]", *again])
    repeated, streams, empty = refusal(file)
    assert repeated == "line 2: custom_id 'good' is there already, in line 1; 3 more alike: line 6, 7, 8"
    assert streams.startswith("line 3: body: stream: ") and empty.startswith("line 5: expected an object")
    write_lines(file, [GOOD, "{", GOOD])
    bad, repeated = refusal(file)
    assert bad.startswith("line 2: is not JSON") and repeated.startswith("line 3: custom_id 'good' ")


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
    long, bad = refusal(file)
    assert long == f"line 2: has more than {MOST_LINE_BYTES} bytes, the most that are read"
    assert bad.startswith("line 3: is not JSON")


def test_a_line_that_changes_after_the_check_is_refused(tmp_path):
    texts = [line(str(number), prompt="x") for number in range(3)]
    file = write_lines(tmp_path / "in.jsonl", texts)
    lines = check(file)
    write_lines(file, [texts[0], texts[1].replace('"x"', '"y"'), texts[2]])
    assert reads(file, lines, 2).custom_id == "2"
    with pytest.raises(ValueError, match=r"in.jsonl, line 2: has changed since the job began$"):
        reads(file, lines, 1)
