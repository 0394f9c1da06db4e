"""The numbers by which torch lets ranks meet for symmetric memory, as parallel/symmetric.py expects them: a meeting of
one rank alone takes as many as one of all, and a later group of the process goes on counting."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.commands import ROOT

pytestmark = pytest.mark.gpu


def test_all_meetings_of_a_process_are_counted_alike():
    command = [sys.executable, "-m", "tests.support.gpu.meetings"]
    environment = os.environ | {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}  # as in a launch
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120, stdout=subprocess.PIPE)
    groups = json.loads(done.stdout.splitlines()[-1])
    assert groups == [[[0, 1, 2, 3, 4, 5], [6, 7]], [[8, 9, 10, 11, 12, 13], [14, 15]]]
