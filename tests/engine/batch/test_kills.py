"""A job that is killed, whenever: what is on disk are whole rows, and the same command goes on to the same bytes."""

import random
from pathlib import Path

import pytest

from tests.support.batch_jobs import (
    begin_in_fork,
    kill_in_a_pass,
    kill_in_a_write,
    line,
    mixed_lines,
    run_here,
    same_job,
    status_of,
    write_lines,
)

NUM_ROWS = 40


def disturbed(llm, given, output, chosen: random.Random, kind: str, *flags: str) -> int:
    """The status of a run in a process of its own, which is killed in a pass or inside a write, as `kind` says."""
    number, share = chosen.randint(1, 9), chosen.random()

    def work() -> int:
        kill_in_a_write(number, share) if kind == "write" else kill_in_a_pass(number)
        return run_here(llm, given, output, *flags)

    return status_of(begin_in_fork(work))


def lines_in(folder: Path) -> tuple[int, int]:
    """The whole lines of the output and of the file of rows that failed, and how many of the two have a torn one."""
    contents = [file.read_bytes() for file in folder.glob("*.jsonl")]
    return sum(each.count(b"\n") for each in contents), sum(bool(each) and each[-1:] != b"\n" for each in contents)


def go_through(llm, tmp_path, num_kills: int, seed: int, *flags: str) -> None:
    """Of a job whose output and whose `flags` name files of its own folder."""
    failing = [line(f"long {number}", prompt=[5] * 99) for number in range(NUM_ROWS // 4)]
    texts = [*mixed_lines(NUM_ROWS, seed), *failing]
    random.Random(seed).shuffle(texts)
    given = write_lines(tmp_path / "in.jsonl", texts)
    folders = whole, folder = tmp_path / "whole", tmp_path / "killed"
    for each in folders:
        each.mkdir()
    outputs = [each / "out.jsonl" for each in folders]
    files = [[flags[0], str(each / flags[1])] if flags else [] for each in folders]
    assert run_here(llm, given, outputs[0], *files[0]) == 1
    same_job(*outputs)
    chosen, seen, num_torn, killed = random.Random(seed), 0, 0, 0
    while killed < num_kills:
        status = disturbed(llm, given, outputs[1], chosen, ("write", "pass")[killed % 2], *files[1])
        if status == 1:  # it was done before the moment came: another job of the same kind
            for file in folder.glob("*.jsonl"):
                file.unlink()
            seen = 0
            continue
        assert status == -9
        killed += 1
        before, (seen, has_torn) = seen, lines_in(folder)
        assert seen >= before, "a row was lost"
        num_torn += has_torn
    assert run_here(llm, given, outputs[1], "--order", "input", *files[1]) == 1
    assert {file.name for file in folder.glob("*.jsonl")} == {file.name for file in whole.glob("*.jsonl")}
    for file in whole.glob("*.jsonl"):
        assert sorted((folder / file.name).read_bytes().splitlines()) == sorted(file.read_bytes().splitlines())
    assert num_torn >= num_kills // 4, "no kill came inside a write"


WAYS = pytest.mark.parametrize("flags", [(), ("--errors", "err.jsonl")], ids=["one file", "errors apart"])


@WAYS
def test_a_job_that_is_killed_four_times_has_the_same_rows(llm, tmp_path, flags):
    go_through(llm, tmp_path, 4, 1, *flags)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
@WAYS
def test_a_job_that_is_killed_twenty_times_has_the_same_rows(llm, tmp_path, seed, flags):
    go_through(llm, tmp_path, 20, seed, *flags)


@pytest.mark.parametrize("flag", ["--retry-errors", "--order=input"])
def test_a_kill_while_the_output_is_written_anew_leaves_the_old_one(llm, tmp_path, flag):
    texts = [*mixed_lines(6), line("long", prompt=[5] * 99)]
    given, output = write_lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl"
    assert run_here(llm, given, output) == 1
    kept = output.read_bytes()

    def work() -> int:
        kill_in_a_write(0, 0.5)
        return run_here(llm, given, output, flag)

    assert status_of(begin_in_fork(work)) == -9
    assert output.read_bytes() == kept and (tmp_path / "out.jsonl.job.rows").exists()
    assert run_here(llm, given, output, flag) == 1
    assert sorted(output.read_bytes().splitlines()) == sorted(kept.splitlines())
    assert not (tmp_path / "out.jsonl.job.rows").exists()
