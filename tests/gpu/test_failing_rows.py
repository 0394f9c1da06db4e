"""A sequence whose logits are NaN ends with an error of its own, and the others have the bits of a run in which a stop
ended it there: in graphs and eager, resident and streamed, in every dtype; on several GPUs the tokens of one."""

import json
import os
from pathlib import Path

import pytest
from penstock.engine.output import RequestOutput

from penstock import LLM
from tests.support.commands import run_ranks
from tests.support.failing_rows import (
    OPTIONS,
    PARAMS,
    PROMPTS,
    WARNS,
    assert_fails_alone_twice,
    assert_others_are_as_if_stopped,
    choose_token,
    ending_at,
    fill_all_pages,
    poison,
    run,
)
from tests.support.gpu.enough import needs_ranks
from tests.support.oracle.checkpoints import write_checkpoint

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 256, "intermediate_size": 384}
PAGES = {"num_pages": 1 + OPTIONS["max_num_seqs"] * OPTIONS["max_model_len"] // OPTIONS["page_size"]}
ON_GPU = OPTIONS | PAGES | {"gpu_memory": "2GiB", "weights_compression": "none"}
RANK_SCRIPT = """
import sys
from tests.gpu.test_failing_rows import run_rank
run_rank(*sys.argv[1:])
"""


def checkpoints(folder: Path, dtype: str) -> tuple[str, str, int]:
    """One that is well, one with a NaN, and the token at which a stop ends the sequence that fails."""
    write_checkpoint(folder / "clean", "llama_gqa", dtype, **SIZES)
    with LLM(folder / "clean", dtype=dtype, **ON_GPU) as llm:
        token, following = choose_token(llm.generate(PROMPTS, PARAMS))
    return str(folder / "clean"), poison(folder / "clean", folder / "poisoned", token), following


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_fails_alone(tmp_path, dtype):
    clean, poisoned, following = checkpoints(tmp_path, dtype)
    for resident in ("all", "none", 0.5):
        for enforce_eager in (False, True):
            options = ON_GPU | {"dtype": dtype, "resident": resident, "enforce_eager": enforce_eager}
            with LLM(clean, **options) as llm:
                stopped, filled = run(llm, ending_at(following)), fill_all_pages(llm)
            with WARNS, LLM(poisoned, **options) as llm:
                assert_fails_alone_twice(llm, stopped, filled)
                graphs = llm.engine.worker.runner.graphs
                assert bool(graphs and graphs.passes) != enforce_eager


@needs_ranks(2)
def test_a_row_fails_alone_on_two_ranks(tmp_path):
    clean, poisoned, following = checkpoints(tmp_path, "float32")
    with LLM(clean, dtype="float32", **ON_GPU) as llm:
        stopped, filled = llm.generate(PROMPTS, ending_at(following)), fill_all_pages(llm)
    (tmp_path / "rank.py").write_text(RANK_SCRIPT)
    run_ranks(2, tmp_path / "rank.py", poisoned, tmp_path, timeout=240)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for outputs in found["failed"]:
            assert_others_are_as_if_stopped([RequestOutput.from_dict(output) for output in outputs], stopped)
        assert found["filled"] == [filled] * 2


def run_rank(model: str, out: str) -> None:
    found = {"failed": [], "filled": []}
    with LLM(model, dtype="float32", resident="none", **ON_GPU) as llm:
        for _ in range(2):
            found["failed"].append([output.to_dict() for output in llm.generate(PROMPTS, PARAMS)])
            found["filled"].append(fill_all_pages(llm))
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
