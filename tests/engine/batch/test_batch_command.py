"""`penstock batch` on the demo model: what it writes, what it refuses in one line, and how a job goes on."""

import json
import os
import re
import resource
import signal
import sys

import pytest
from penstock.engine.batch import meter, progress, run
from penstock.engine.batch.run import BatchRun
from penstock.engine.commands.cli import main
from penstock.engine.loop import Loop
from penstock.engine.server import encoding
from penstock.engine.streams import guarded_streams

from penstock import SamplingParams
from tests.support.batch_jobs import line, mixed_lines, rows_of, run_here, same_job, write_lines

LONG = "x" * 9000  # in a field that is ignored: a row is read from the file when its turn comes, not from a buffer
ROWS = [text.replace('"body": {', f'"body": {{"user": "{LONG}", ') for text in mixed_lines(24)]


@pytest.fixture(scope="module")
def reference(llm, tmp_path_factory):
    """A job that nothing disturbed: its input, and its output."""
    folder = tmp_path_factory.mktemp("reference")
    given = write_lines(folder / "in.jsonl", ROWS)
    assert run_here(llm, given, folder / "out.jsonl") == 0
    return given, folder / "out.jsonl"


def test_rows_are_openais_and_what_generate_gives(llm, reference):
    job = json.loads(reference[1].with_name("out.jsonl.job").read_text())
    rows = {row["custom_id"]: row for row in rows_of(reference[1])}
    assert sorted(rows) == sorted(json.loads(text)["custom_id"] for text in ROWS)
    seeded = [(number, json.loads(text)["body"]) for number, text in enumerate(ROWS, 1) if "seed" in text]
    for number, body in seeded:
        row, name = rows[f"row {number - 1}"], f"{job['job'][:16]}_{number}"
        params = SamplingParams(max_tokens=body["max_tokens"], temperature=body["temperature"], seed=body["seed"])
        output = llm.generate([body["prompt"]], params)[0]
        (given,) = output.outputs
        assert (row["id"], row["error"]) == (f"batch_req_{name}", None)
        response, answer = row["response"], row["response"]["body"]
        assert (response["status_code"], response["request_id"]) == (200, f"req_{name}")
        assert (answer["id"], answer["created"], answer["model"]) == (f"cmpl-{name}", job["created"], "demo")
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (given.text, given.finish_reason)
        tokens = (len(output.prompt_token_ids), len(given.token_ids))
        assert answer["usage"] == dict(
            zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*tokens, sum(tokens)))
        )
    assert len(seeded) >= 4


def test_the_summary_counts_and_the_job_is_done_once(llm, reference, said):
    rows = rows_of(reference[1])
    assert run_here(llm, *reference) == 0
    summary, lines = said()
    assert summary == {"status": "done", "rows": 24, "done": 24, "failed": 0, "done_before": 24}
    assert lines[-1] == "penstock batch: 24 of 24 rows were done before"
    assert rows_of(reference[1]) == rows


def test_chats_several_prompts_and_several_sequences(llm, tmp_path):
    message = {"role": "user", "content": "Return 5"}
    texts = [
        line(
            "chat", "/v1/chat/completions", messages=[message], max_completion_tokens=3, logprobs=True, ignore_eos=True
        ),
        line("many", prompt=["def", [5, 6]], n=2, max_tokens=9, temperature=0.9, echo=True, ignore_eos=True),
    ]
    assert run_here(llm, write_lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl") == 0
    chat, many = sorted((row["response"]["body"] for row in rows_of(tmp_path / "out.jsonl")), key=lambda b: b["id"])
    assert chat["object"] == "chat.completion" and chat["choices"][0]["message"]["role"] == "assistant"
    assert len(chat["choices"][0]["logprobs"]["content"]) == 3
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert many["usage"]["completion_tokens"] == 4 * 9
    assert len({choice["text"] for choice in many["choices"]}) == 4, "each sequence has a seed of its own"
    assert [choice["text"].startswith("def") for choice in many["choices"][:2]] == [True, True]


def test_the_load_is_said_before_it_begins_and_when_it_has_ended(llm, reference, tmp_path, said, monkeypatch):
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(llm, "lead", lambda: print("it loads", file=sys.stderr))
    assert run_here(llm, reference[0], output) == 0
    (loading, loads, ready) = said()[1][-3:]
    assert (loading, loads) == ("penstock batch: loading demo", "it loads")
    assert re.fullmatch(r"penstock batch: ready after \d+\.\d s", ready)


def test_order_input_sorts_once_all_have_run(llm, reference, tmp_path, said):
    output = tmp_path / "out.jsonl"
    same_job(reference[1], output)
    assert run_here(llm, reference[0], output, "--order", "input") == 0
    assert [row["custom_id"] for row in rows_of(output)] == [f"row {number}" for number in range(24)]
    assert sorted(output.read_bytes().splitlines()) == sorted(reference[1].read_bytes().splitlines())
    assert run_here(llm, reference[0], output, "--order", "input") == 0, "sorted already"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.job"]


def test_a_summary_that_nobody_can_have_changes_nothing_about_the_rows(llm, reference, tmp_path, said, monkeypatch):
    output = tmp_path / "out.jsonl"
    with open("/dev/full", "w") as full, guarded_streams():
        monkeypatch.setattr(sys.stdout, "_stream", full)
        assert run_here(llm, reference[0], output, "--order", "input") == 0
    assert [row["custom_id"] for row in rows_of(output)] == [f"row {number}" for number in range(24)]
    assert "penstock: error: standard output: No space left on device" in said()[1]


def test_plain_prompts_and_flags_as_defaults(llm, tmp_path):
    file = write_lines(tmp_path / "in.txt", ["Return the", "", "def f("])
    assert run_here(llm, file, tmp_path / "out.jsonl", "--max-tokens", "4", "--temperature", "0", "--ignore-eos") == 0
    rows = {row["custom_id"]: row["response"]["body"] for row in rows_of(tmp_path / "out.jsonl")}
    expected = llm.generate(["Return the", "def f("], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    assert [rows[name]["choices"][0]["text"] for name in ("line-1", "line-3")] == [o.outputs[0].text for o in expected]


FAILING = [line("ok", prompt="def", max_tokens=2), line("long", prompt=[5] * 70), line("id", prompt=[10**6])]


def test_rows_that_fail_are_rows_and_run_again_if_asked(llm, tmp_path, said):
    given, output = write_lines(tmp_path / "in.jsonl", FAILING), tmp_path / "out.jsonl"
    assert run_here(llm, given, output) == 1
    assert said()[0]["failed"] == 2
    rows = {row["custom_id"]: row for row in rows_of(output)}
    assert rows["ok"]["error"] is None
    assert rows["long"]["error"]["code"] == "context_length_exceeded"
    assert ": has 70 tokens, and at most 63 fit" in rows["long"]["error"]["message"]
    assert rows["long"]["response"]["status_code"] == 400
    assert rows["long"]["response"]["body"]["error"]["type"] == "invalid_request_error"
    first = output.read_bytes()
    assert run_here(llm, given, output) == 1 and output.read_bytes() == first
    said()
    assert run_here(llm, given, output, "--retry-errors") == 1
    assert said()[0]["done_before"] == 1
    assert sorted(output.read_bytes().splitlines()) == sorted(first.splitlines())


def test_rows_that_fail_go_to_a_file_of_their_own(llm, tmp_path, said):
    given, output, errors = write_lines(tmp_path / "in.jsonl", FAILING), tmp_path / "out.jsonl", tmp_path / "err.jsonl"
    assert run_here(llm, given, output, "--errors", errors) == 1
    assert [row["custom_id"] for row in rows_of(output)] == ["ok"]
    assert sorted(row["custom_id"] for row in rows_of(errors)) == ["id", "long"]
    said()
    assert run_here(llm, given, output, "--errors", errors, "--retry-errors") == 1
    assert said()[0]["done_before"] == 1 and len(rows_of(errors)) == 2
    assert run_here(llm, given, output) == 2
    assert "--errors was err.jsonl, and is None" in said()[1][-1]


@pytest.mark.parametrize("kind", ["when it is encoded", "in a pass"])
def test_one_row_that_fails_leaves_the_others_as_they_are(llm, reference, tmp_path, monkeypatch, kind):
    bodies = [json.loads(text)["body"] for text in ROWS]
    chosen = next(
        at for at, body in enumerate(bodies) if at % 4 == 3 and body["max_tokens"] > 4
    )  # its prompt is its own

    def sequences_of(prompts, asked):
        sequences = encoding.sequences_of(prompts, asked)
        if asked.prompts == [bodies[chosen]["prompt"]]:
            if kind == "when it is encoded":
                raise TypeError("no such text")
            (sequence,) = sequences
            sequence.push = lambda token: llm.loop.abort(sequence.request.id, "the logits are NaN")
        return sequences

    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(run, "sequences_of", sequences_of)
    same_job(reference[1], output)
    assert run_here(llm, reference[0], output) == 1
    rows, whole = ({row["custom_id"]: row for row in rows_of(file)} for file in (output, reference[1]))
    assert [name for name in whole if rows[name] != whole[name]] == [f"row {chosen}"]
    message = {"in a pass": "the logits are NaN"}.get(kind, "it cannot be encoded: TypeError('no such text')")
    assert rows[f"row {chosen}"]["error"] == {"code": "request_failed", "message": message}
    assert rows[f"row {chosen}"]["response"]["status_code"] == 500


def test_another_job_is_refused_in_one_line_and_its_output_kept(llm, reference, tmp_path, said):
    given, output = write_lines(tmp_path / "in.jsonl", ROWS[:3]), tmp_path / "out.jsonl"
    assert run_here(llm, given, output) == 0
    kept = output.read_bytes()
    said()
    write_lines(given, ROWS[:4])
    assert run_here(llm, given, output) == 2
    assert "is the output of another job: its input was " in said()[1][-1]
    write_lines(given, ROWS[:3])
    for flags, message in (
        (("--temperature", "0"), "its temperature was not given, and is 0.0 "),
        (("--served-model-name", "a-name-of-more-than-16-letters"), "and is 'a-name-of-more-than-16-letters' "),
        (("--seed", "5"), "its seed was 0, and is 5"),
        (("--shard", "1/2"), "--shard was 0/1, and is 1/2"),
    ):
        assert run_here(llm, given, output, *flags) == 2
        assert message in said()[1][-1]
    assert output.read_bytes() == kept
    assert run_here(llm, given, output, "--temperature", "0", "--force-new") == 0
    assert len(rows_of(output)) == 3 and output.read_bytes() != kept


def test_a_file_that_is_no_output_is_refused(llm, reference, tmp_path, said):
    output = write_lines(tmp_path / "out.jsonl", ["my letters"])
    assert run_here(llm, reference[0], output) == 2
    assert "is there already, and is no output of a batch job" in said()[1][-1]
    assert output.read_text() == "my letters\n" and [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_file_without_its_flag_is_told_from_the_model(tmp_path, said):
    assert main(["batch", "given.jsonl", "-o", str(tmp_path / "out.jsonl")]) == 2
    asked = "--input-file: is missing: give -i FILE; 'given.jsonl' was read as the model"
    assert said()[1] == [f"penstock: error: {asked}"]


def test_rows_of_another_job_or_twice_there_are_refused(llm, reference, tmp_path, said):
    output, lines = tmp_path / "out.jsonl", reference[1].read_bytes().splitlines(keepends=True)
    same_job(reference[1], output)
    for content, message in (
        (lines[0] + lines[0], "is there twice"),
        (lines[0].replace(b"batch_req_", b"batch_req_0", 1), "line 1: is no row of this job"),
        (lines[0].replace(b'", "custom', b'000", "custom', 1), "which is no line of this job"),
    ):
        output.write_bytes(content)
        assert run_here(llm, reference[0], output) == 2
        told = said()[1][-1]
        assert message in told and output.read_bytes() == content
        assert told.endswith(" (remove that line, give another -o, or --force-new to begin anew)")


def test_an_output_that_was_removed_runs_again_to_the_same_bytes(llm, reference, tmp_path):
    output = tmp_path / "out.jsonl"
    same_job(reference[1], output)
    assert run_here(llm, reference[0], output) == 0
    assert sorted(output.read_bytes().splitlines()) == sorted(reference[1].read_bytes().splitlines())


@pytest.mark.parametrize("how", ["full", "removed", "input changed", "stopped", "interrupted"])
def test_what_ends_a_job_is_one_line_and_it_goes_on_to_the_same_bytes(llm, reference, tmp_path, said, monkeypatch, how):
    given, output = write_lines(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    same_job(reference[1], output)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    advance, passes = Loop.advance, iter(range(10**6))

    def advancing(loop):
        if next(passes) == 8:
            if how == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (output.stat().st_size + 100, limits[1]))
            elif how == "removed":
                output.unlink()
            elif how == "input changed":
                given.write_bytes(given.read_bytes().replace(b"def", b"dfe"))
            else:
                os.kill(os.getpid(), signal.SIGTERM if how == "stopped" else signal.SIGINT)
        return advance(loop)

    monkeypatch.setattr(Loop, "advance", advancing)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        status = run_here(llm, given, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    summary, lines = said()
    expected = {
        "full": (2, "out.jsonl: File too large (the rows before it are kept: make room, and run the same command"),
        "removed": (2, "out.jsonl: was removed or replaced while the job ran; its rows have to run again"),
        "input changed": (2, "has changed since the job began"),
        "stopped": (143, "rows done: the same command goes on"),
        "interrupted": (143, "rows done: the same command goes on"),
    }[how]
    assert status == expected[0] and expected[1] in lines[-1], lines
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    if status == 143:
        assert next(passes) <= 10, "two passes later it has ended"
        assert summary["status"] == "stopped" and 0 < summary["done"] == len(rows_of(output)) < 24
    monkeypatch.setattr(Loop, "advance", advance)
    write_lines(given, ROWS)
    assert run_here(llm, given, output) == 0
    assert said()[0]["done_before"] > 0 or how == "removed"
    assert sorted(output.read_bytes().splitlines()) == sorted(reference[1].read_bytes().splitlines())


def test_a_bad_line_is_refused_before_anything_is_made(llm, tmp_path, said):
    given = write_lines(tmp_path / "in.jsonl", [ROWS[0], "{", ROWS[1]])
    assert run_here(None, given, tmp_path / "out.jsonl") == 2
    assert "in.jsonl, line 2: is not JSON" in said()[1][-1]
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--shard", "2/2"), "--shard 2/2: expected I/N, with I from 0 to N - 1"),
        (("--top-p", "2"), "top_p=2.0: expected a number above 0, at most 1"),
        (("--errors", "OUT"), "out.jsonl: is the file of --output-file too"),
        (("--errors", "OUT.job"), "out.jsonl.job: is the file of OUTPUT.job too"),
        (("-o", "IN", "--force-new"), "in.jsonl: is the file of --input-file too"),
        (("--errors", "LINK", "--force-new"), "link.jsonl: is the file of --input-file too"),
        (("-o", "."), "--output-file .: is a directory, and a file is expected"),
        (("-o", "-"), "--output-file -: expected a file, in which a job can find its rows again"),
        (("-i", "-"), "--input-file -: expected a file, in which a job can find its rows again"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(reference, tmp_path, said, flags, message):
    names = {"OUT": "out.jsonl", "OUT.job": "out.jsonl.job", "IN": "in.jsonl", "LINK": "link.jsonl"}
    given = tmp_path / "in.jsonl"
    given.write_bytes(reference[0].read_bytes())
    (tmp_path / "link.jsonl").symlink_to(given)
    flags = [str(tmp_path / names[flag]) if flag in names else flag for flag in flags]
    assert run_here(None, given, tmp_path / "out.jsonl", *flags) == 2
    assert message in said()[1][-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "link.jsonl"]
    assert given.read_bytes() == reference[0].read_bytes()


def test_a_job_file_of_another_version_is_refused_and_says_what_to_do(llm, reference, tmp_path, said):
    output = tmp_path / "out.jsonl"
    output.write_bytes(reference[1].read_bytes())
    kept = json.loads(reference[1].with_name("out.jsonl.job").read_text())
    for content, message in (
        (kept | {"version": 2}, "another version may have others (give another -o, or --force-new"),
        (kept | {"created": None}, "expected the fields job, created, facts, shard, num_shards, errors"),
        (kept | {"job": "0"}, "job: is not the hash of the facts; the file was changed (give another -o"),
    ):
        (tmp_path / "out.jsonl.job").write_text(json.dumps(content))
        assert run_here(llm, reference[0], output) == 2
        assert message in said()[1][-1]
    assert output.read_bytes() == reference[1].read_bytes()


def test_a_disk_that_has_no_room_for_the_job_itself_is_left_as_it_was(reference, tmp_path, said):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert run_here(None, reference[0], tmp_path / "out.jsonl") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out.jsonl.job: File too large" in said()[1][-1] and not list(tmp_path.iterdir())


def test_a_dry_run_predicts_without_an_engine_and_writes_nothing(reference, tmp_path, said):
    profile = ("--device-profile", "h200")
    assert run_here(None, reference[0], tmp_path / "out.jsonl", "--dry-run", *profile) == 0
    predicted, lines = said()
    bodies = [json.loads(text)["body"] for text in ROWS]
    assert (predicted["rows"], predicted["output_tokens"]) == (24, sum(body["max_tokens"] for body in bodies))
    assert 24 * 3 <= predicted["prompt_tokens"] <= 24 * 8
    assert predicted["num_at_once"] == 24
    assert predicted["passes"] == pytest.approx(max(body["max_tokens"] for body in bodies), abs=1)
    assert predicted["seconds"] == pytest.approx(predicted["passes"] * predicted["pass_s"], rel=0.2), (
        "the first has all prompts"
    )
    assert lines[-1].startswith("penstock batch: 24 rows, about ") and "h200" in lines[-1]
    assert not list(tmp_path.iterdir())
    model = ("--model", "demo", "--device", "cpu")
    assert main(["batch", *model, "-i", str(reference[0]), "--dry-run", *profile]) == 0, "it needs no output"
    assert main(["batch", *model, "-i", str(reference[0])]) == 2
    assert said()[1][-1] == "penstock: error: --output-file: is missing"


def test_a_job_takes_the_passes_that_a_dry_run_predicts(llm, tmp_path, said):
    texts = [line(str(number), prompt=[5, number + 5], n=2, max_tokens=8, ignore_eos=True) for number in range(20)]
    given = write_lines(tmp_path / "in.jsonl", texts)
    assert run_here(None, given, tmp_path / "out.jsonl", "--dry-run", "--max-num-seqs", "4") == 0
    predicted = said()[0]
    assert [predicted[name] for name in ("sequences", "num_at_once", "output_tokens")] == [40, 4, 40 * 8]
    assert run_here(llm, given, tmp_path / "out.jsonl") == 0
    done = said()[0]
    assert done["output_tokens"] == 40 * 8 and done["passes"] == pytest.approx(predicted["passes"], rel=0.1)


def test_a_dry_run_leaves_out_prompts_that_no_sequence_can_have(tmp_path, said):
    texts = [line(str(number), prompt=[5] * 8, max_tokens=8) for number in range(8)]
    predicted = []
    for name, more in (("short", []), ("long", [line("long", prompt=[5] * 10_000, max_tokens=8)])):
        given = write_lines(tmp_path / f"{name}.jsonl", texts + more)
        assert run_here(None, given, tmp_path / "out.jsonl", "--dry-run", "--max-num-seqs", "4") == 0
        predicted.append(said()[0])
    assert [one["prompt_tokens"] for one in predicted] == [8 * 8, 9 * 8]
    assert predicted[1]["seconds"] < 2 * predicted[0]["seconds"]


def test_the_run_is_told_of_each_second_and_says_when_it_ends(llm, tmp_path, monkeypatch):
    """A second is as short as a pass here; the job's end is known to the pass, since all lengths are fixed."""
    monkeypatch.setattr(meter, "SAMPLE_S", 0.0)
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    texts = [line(str(number), prompt=[5, number + 5], max_tokens=8, ignore_eos=True) for number in range(40)]
    told, show = [], BatchRun.seconds_left

    def seconds_left(run):
        seconds, measured = show(run), run.meter
        if seconds is not None:
            told.append((measured.num_passes, seconds / measured.pace / measured.predicted_s * measured.num_passes))
        return seconds

    monkeypatch.setattr(BatchRun, "seconds_left", seconds_left)
    assert run_here(llm, write_lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl") == 0
    total = told[-1][0]
    late = [(passes, left) for passes, left in told if passes > total / 4]
    assert len(late) > 20 and all(abs(passes + left - total) <= 0.15 * total + 2 for passes, left in late)
