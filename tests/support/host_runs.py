"""Ranks of the demo model on several hosts, as a module for each rank as under torchrun:

    -m tests.support.host_runs FOLDER

Each rank works in a folder of its host's, FOLDER/hostN, asks for a trace there, and writes FOLDER/rankN.json.
"""

import json
import os
import sys
from pathlib import Path

from penstock.engine.weights import host_store
from penstock.parallel.launch import run_rank

from penstock import LLM, SamplingParams

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "resident": "none"}
PROMPT = [0, 376, 268]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def main() -> None:
    folder, rank, counted = Path(sys.argv[1]), int(os.environ["RANK"]), []
    host = folder / f"host{rank // int(os.environ['LOCAL_WORLD_SIZE'])}"
    host.mkdir(exist_ok=True)
    os.chdir(host)
    check = host_store.check_host_memory
    host_store.check_host_memory = lambda nbytes, ranks: (counted.append(ranks), check(nbytes, ranks))
    with LLM("demo", trace="trace.json", **OPTIONS) as llm:
        (output,) = llm.generate(PROMPT, PARAMS)
        launch = llm.engine.launch
        facts = {
            "tokens": output.outputs[0].token_ids,
            "num_hosts": len(set(launch.hosts)),
            "ranks_that_share_memory": counted,
            "link_gb_s": llm.engine.rates.link_gb_s,
            "collectives": type(llm.engine.collectives).__name__,
        }
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(run_rank(main))
