"""Two hosts with a GPU each, which are two agents of torchrun on one machine: what ranks compute by NCCL over the
network, share and write."""

import json
import subprocess
import sys

import pytest
from penstock.engine.runtime.trace import read_intervals

from penstock import LLM
from tests.support.commands import ROOT
from tests.support.gpu.enough import needs_ranks
from tests.support.host_runs import ON, PARAMS, PROMPT

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@needs_ranks(2)
def test_two_hosts(tmp_path):
    module = ["-m", "tests.support.host_runs", tmp_path, "cuda"]
    command = [sys.executable, "-m", "tests.support.two_agents", "1", *module]
    subprocess.run(command, cwd=ROOT, check=True, timeout=100)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    with LLM("demo", **ON["cuda"]) as llm:
        (output,) = llm.generate(PROMPT, PARAMS)
        alone_gb_s = llm.engine.rates.link_gb_s
    for rank in ranks:
        assert rank["collectives"] == "Nccl" and rank["num_hosts"] == 2
        assert rank["tokens"] == output.outputs[0].token_ids
        assert rank["ranks_that_share_memory"] == [1] and rank["link_gb_s"] == alone_gb_s
    assert {rank for rank, _ in read_intervals(str(tmp_path / "host0" / "trace.json"))} == {0, 1}
    assert [path.name for path in tmp_path.glob("host*/*")] == ["trace.json"]
