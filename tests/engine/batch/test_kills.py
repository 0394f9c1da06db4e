"""A job that is killed, whenever: what is on disk are whole rows, and the same command goes on to the same bytes."""

import random

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


def go_through(llm, tmp_path, num_kills: int, seed: int) -> None:
    given = write_lines(tmp_path / "in.jsonl", mixed_lines(NUM_ROWS, seed))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run_here(llm, given, whole) == 0
    same_job(whole, output)
    chosen, seen, num_torn, killed = random.Random(seed), 0, 0, 0
    while killed < num_kills:
        status = disturbed(llm, given, output, chosen, ("write", "pass")[killed % 2])
        if status == 0:  # it was done before the moment came: another job of the same kind
            output.unlink()
            seen = 0
            continue
        assert status == -9
        killed += 1
        content = output.read_bytes() if output.exists() else b""
        rows, _, tail = content.rpartition(b"\n")
        num_torn += bool(tail)
        assert len(rows.splitlines()) >= seen, "a row was lost"
        seen = len(rows.splitlines())
    assert run_here(llm, given, output, "--order", "input") == 0
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    assert num_torn >= num_kills // 4, "no kill came inside a write"


def test_a_job_that_is_killed_four_times_has_the_same_rows(llm, tmp_path):
    go_through(llm, tmp_path, num_kills=4, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_a_job_that_is_killed_twenty_times_has_the_same_rows(llm, tmp_path, seed):
    go_through(llm, tmp_path, num_kills=20, seed=seed)


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
