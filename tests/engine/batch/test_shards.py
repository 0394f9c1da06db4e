"""A job that is split over processes, whose outputs are merged: each row once, or a refusal that says what is
missing."""

import dataclasses

import pytest
from penstock.engine.batch.job import read_job
from penstock.engine.commands.cli import main

from tests.support.batch_jobs import (
    begin_in_fork,
    line,
    mixed_lines,
    rows_of,
    run_here,
    same_job,
    status_of,
    write_lines,
)


@pytest.fixture(scope="module")
def shards(llm, tmp_path_factory):
    """The input, the output of one process for all, and those of two that ran at once, one with a file of errors."""
    folder = tmp_path_factory.mktemp("shards")
    given = write_lines(folder / "in.jsonl", [*mixed_lines(11), line("long", prompt=[5] * 99)])
    assert run_here(llm, given, folder / "whole.jsonl", "--order", "input") == 1
    parts = [folder / "part 0.jsonl", folder / "part 1.jsonl"]
    flags = [("--shard", "0/2"), ("--shard", "1/2", "--errors", str(folder / "err 1.jsonl"))]
    pids = [
        begin_in_fork(lambda part=part, flags=flags: run_here(llm, given, part, *flags))
        for part, flags in zip(parts, flags)
    ]
    assert [status_of(pid) for pid in pids] == [0, 1]
    return given, folder / "whole.jsonl", parts


def without_created(file) -> list[dict]:
    rows = rows_of(file)
    for row in rows:
        row["response"]["body"].pop("created", None)
    return rows


def merged(*parts, into) -> int:
    return main(["batch", "--merge", *map(str, parts), "-o", str(into)])


def test_two_processes_give_what_one_gives(shards, tmp_path):
    """But for the time at which each of them began."""
    _, whole, parts = shards
    assert {len(rows_of(part)) for part in parts} == {6, 5}
    assert merged(*reversed(parts), into=tmp_path / "all.jsonl") == 1, "a row failed"
    assert without_created(tmp_path / "all.jsonl") == without_created(whole)


@pytest.mark.parametrize(
    "choose, message",
    [
        (lambda folder, whole, one, two: [one], "--merge: shard 1/2 is missing"),
        (lambda folder, whole, one, two: [one, one], "is shard 0/2, as "),
        (lambda folder, whole, one, two: [whole, one], "part 0.jsonl: is one of 2 shards, and "),
        (lambda folder, whole, one, two: [one, folder / "none.jsonl"], "none.jsonl.job: No such file"),
        (lambda folder, whole, one, two: [one.parent / "in.jsonl"], "in.jsonl: is no output of a batch job: "),
    ],
)
def test_parts_that_are_no_whole_are_refused(shards, tmp_path, capsys, choose, message):
    _, whole, parts = shards
    assert merged(*choose(tmp_path, whole, *parts), into=tmp_path / "all.jsonl") == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_part_of_another_job_is_refused_by_what_differs(shards, tmp_path, capsys):
    _, _, (one, two) = shards
    job, other = read_job(two), tmp_path / "other.jsonl"
    for change in ({"seed": 1}, {"defaults": job.facts["defaults"] | {"max_tokens": 7}}):
        dataclasses.replace(job, facts=job.facts | change).keep(other)
        other.touch()
        assert merged(one, other, into=tmp_path / "all.jsonl") == 2
        said = capsys.readouterr().err
        assert f"--merge {other}: is of another job than {one}: its " in said
        assert (
            "its seed was 0, and is 1\n" if "seed" in change else "its max tokens was not given, and is 7\n"
        ) in said


def test_rows_that_have_not_run_are_missed(shards, tmp_path, capsys):
    _, _, (one, two) = shards
    short = tmp_path / one.name
    same_job(one, short)
    short.write_bytes(b"".join(one.read_bytes().splitlines(keepends=True)[:-2]))
    assert merged(short, two, into=tmp_path / "all.jsonl") == 2
    assert "--merge: 2 of 12 rows have not run yet" in capsys.readouterr().err
    assert not (tmp_path / "all.jsonl").exists()


def test_a_row_that_two_shards_have_is_refused(shards, tmp_path, capsys):
    """Beside one that is missing: the number of rows is right."""
    _, _, (one, two) = shards
    both = tmp_path / two.name
    same_job(two, both)
    both.write_bytes(one.read_bytes().splitlines(keepends=True)[0] + two.read_bytes())
    assert merged(one, both, into=tmp_path / "all.jsonl") == 2
    assert "is there twice" in capsys.readouterr().err and not (tmp_path / "all.jsonl").exists()


def test_what_is_there_is_not_written_over_by_a_merge(shards, tmp_path, capsys):
    _, _, (one, two) = shards
    (tmp_path / "mine").write_text("my letters")
    for into, message in ((two, "is one of the parts"), (tmp_path / "mine", "is there already; give another one")):
        kept = into.read_bytes()
        assert merged(one, two, into=into) == 2
        assert message in capsys.readouterr().err and into.read_bytes() == kept


def test_a_row_of_another_shard_is_refused(llm, shards, tmp_path, capsys):
    given, _, (one, two) = shards
    output = tmp_path / "out.jsonl"
    same_job(one, output)
    output.write_bytes(two.read_bytes())
    assert run_here(llm, given, output, "--shard", "0/2") == 2
    assert "which is no line of this job" in capsys.readouterr().err and output.read_bytes() == two.read_bytes()
