"""Jobs of many rows: memory hardly grows with them, and each is there once, in order."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def grown_bytes(folder: Path, num_rows: int) -> int:
    command = [sys.executable, "-m", "tests.support.many_rows_of_a_job", str(folder), str(num_rows)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(folder / f"{num_rows}.out") as rows:
        numbers = (int(json.loads(row)["custom_id"]) for row in rows)
        assert all(number == expected for number, expected in itertools.zip_longest(numbers, range(num_rows)))
    return json.loads(done.stdout.splitlines()[-1])["grown_bytes"]


def test_twenty_thousand_rows(tmp_path):
    """Some MB of them are windows, arrays and buffers, which a million rows would not need more of but the arrays."""
    assert grown_bytes(tmp_path, 20_000) <= 40e6


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_million_rows(tmp_path):
    assert grown_bytes(tmp_path, 1_000_000) <= 100e6
