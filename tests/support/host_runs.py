"""Ranks of the demo model on several hosts, as a module for each rank as under torchrun:

    -m tests.support.host_runs FOLDER DEVICE

Each rank works in a folder of its host's, FOLDER/hostN, asks for a trace there, and writes FOLDER/rankN.json. Which
agent of torchrun started a rank stands for its host.
"""

import json
import os
import sys
from pathlib import Path

from penstock.engine.weights import host_store
from penstock.parallel.launch import run_rank

from penstock import LLM, SamplingParams
from tests.support.forked_ranks import be_on_host

OPTIONS = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "resident": "none"}
ON = {"cpu": OPTIONS | {"device": "cpu"}, "cuda": OPTIONS | {"device": "cuda", "gpu_memory": "2GiB"}}
PROMPT = [0, 376, 268]
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def main() -> None:
    folder, rank, counted = Path(sys.argv[1]), int(os.environ["RANK"]), []
    if "GROUP_RANK" in os.environ:
        be_on_host(f"host {os.environ['GROUP_RANK']}")
    host = folder / f"host{rank // int(os.environ['LOCAL_WORLD_SIZE'])}"
    host.mkdir(exist_ok=True)
    os.chdir(host)
    check = host_store.check_host_memory
    host_store.check_host_memory = lambda nbytes, ranks: (counted.append(ranks), check(nbytes, ranks))
    with LLM("demo", trace="trace.json", **ON[sys.argv[2]]) as llm:
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
