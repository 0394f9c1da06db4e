"""Greedy generation with attention sinks on the ranks of one launch, each with

    -m tests.support.oracle.sink_runs FOLDER CASES

CASES are in JSON: by name the model, the options of its LLM, the prompt and the fields of its parameters. Rank 0 writes
FOLDER/NAME.json after each.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from penstock.engine.llm import LLM
from penstock.engine.output import CompletionOutput, Logprob
from penstock.scheduler.batching.request import SamplingParams

from tests.support.forked_ranks import fork_ranks

LAUNCH_TIMEOUT_S = 250


def run_on_ranks(num_ranks: int, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, CompletionOutput]:
    """The outputs of the cases, by name; of each the tokens and the log probabilities."""
    done = fork_ranks(num_ranks, "-m", __name__, folder, json.dumps(cases), timeout=LAUNCH_TIMEOUT_S)
    assert done.all_ended, done.stderr
    return {name: _read(folder / f"{name}.json") for name in cases}


def _read(file: Path) -> CompletionOutput:
    token_ids, logprobs = json.loads(file.read_text())
    by_id = [{token: Logprob(logprob, rank, None) for token, logprob, rank in row} for row in logprobs]
    return CompletionOutput(0, "", token_ids, logprobs=by_id)


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, case in cases.items():
        with LLM(case["model"], **case["options"]) as llm:
            (output,) = llm.generate([case["prompt"]], SamplingParams(**case["params"]))[0].outputs
        if os.environ["RANK"] == "0":
            rows = [[(token, one.logprob, one.rank) for token, one in by_id.items()] for by_id in output.logprobs]
            (folder / f"{name}.json").write_text(json.dumps([output.token_ids, rows]))


if __name__ == "__main__":
    main()
