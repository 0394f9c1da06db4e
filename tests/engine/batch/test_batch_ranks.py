"""`penstock batch` over two ranks, under torchrun and by -tp: stopped by a signal to all ranks, and gone on with."""

import pytest

from tests.support.batch_jobs import MODEL, mixed_lines, rows_of, run_here, same_job, write_lines
from tests.support.commands import TORCHRUN, Command

pytestmark = pytest.mark.timeout(240)
# A launcher sends its signal to every rank; those that only compute go on until rank 0 says that it is over.
ALL_HEAR_SIGTERM = """
import itertools, os, signal
passes = itertools.count(1)
def begin_pass(batch):
    if batch is not None and next(passes) == 12:
        os.kill(os.getpid(), signal.SIGTERM)
"""


def test_two_ranks_are_stopped_and_go_on_to_the_bytes_of_one(llm, tmp_path):
    given = write_lines(tmp_path / "in.jsonl", mixed_lines(12))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run_here(llm, given, whole) == 0
    same_job(whole, output)
    arguments = ("batch", *MODEL, "--max-num-seqs", "2", "-i", given, "-o", output)
    commands = [("under torchrun", {"launcher": TORCHRUN, "in_passes": ALL_HEAR_SIGTERM}, arguments)]
    commands += [("by -tp", {}, (*arguments, "-tp", "2")), ("done already", {"launcher": TORCHRUN}, arguments)]
    for name, settings, each in commands:
        (tmp_path / name).mkdir()
        done = Command(tmp_path / name, *each, **settings)
        try:
            done.finish()
        finally:
            done.kill()
        assert len(done.pids()) == 2, done.stderr
        if "in_passes" in settings:
            assert done.exit_code != 0 and "exitcode  : 143" in done.stderr, done.stderr
            assert "rows done: the same command goes on" in done.stderr
            assert "RankFailed" not in done.stderr
            assert 0 < len(rows_of(output)) < 12
        else:
            assert done.exit_code == 0, done.stderr
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
