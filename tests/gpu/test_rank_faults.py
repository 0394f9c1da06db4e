"""A rank on a GPU is killed, stopped or fails alone, in graphs that stream, in a capture, in large sums and in those of
NCCL: the other one says why within 10 s, and its process can go on."""

import json
import subprocess
import sys

import pytest

from tests.support.commands import ROOT
from tests.support.gpu.enough import needs_ranks
from tests.support.gpu.fault_ranks import CASES, TIMES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]
MOST_S = 10.0


@needs_ranks(2)
@pytest.mark.parametrize("when", TIMES)
def test_the_other_rank_says_why_and_goes_on(tmp_path, when):
    cases = [case for case in CASES if case.endswith(f", {when}")]
    command = [sys.executable, "-m", "tests.support.gpu.fault_ranks", tmp_path, *cases]
    subprocess.run(command, cwd=ROOT, check=True, timeout=180)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["cases"]) == cases and len(cases) == 3 and report["before"] == report["after"]
    for case, found in report["cases"].items():
        assert found["raised"] == "RankFailed" and "rank 1 " in found["text"], (case, found)
        assert found["seconds"] < MOST_S, (case, found)
