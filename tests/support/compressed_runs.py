"""The same requests with plain and with compressed weights, and all that can be counted about them; in this process, or
on ranks, each with

    -m tests.support.compressed_runs FOLDER VARIANT ...

FOLDER holds a checkpoint for each VARIANT, or VARIANT.gguf; each rank writes FOLDER/rankN.json,
{variant: {case: facts}}.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.model.weight_formats import AS_STORED
from penstock.engine.planning.device_profile import plan_rates
from penstock.engine.planning.engine_plan import EnginePlan, make_engine_plan
from penstock.engine.weights.read_model import read_model

from tests.support import streaming_runs
from tests.support.streaming_runs import copied_bytes, generate

OPTIONS = {**streaming_runs.OPTIONS, "dtype": "bfloat16", "num_pages": 40}
PREPARED = {"poison": True, "lookahead": 1}  # where weights stream, passes are prepared as on a GPU
CASES = {
    "plain": {"resident": "all", "weights_compression": "none"},
    "streamed": {"resident": "none", "weights_compression": "lossless", "debug": PREPARED | {"lanes": "random"}},
    "resident": {"resident": "all", "weights_compression": "lossless"},
    "mixed": {"resident": 0.5, "weights_compression": "lossless", "debug": PREPARED | {"lanes": "latest"}},
}
TIGHT = ("resident", "mixed")  # these have memory for compressed groups only


def plan_of(model: str, tp_size: int, memory_bytes: int | None = None, **options) -> EnginePlan:
    """The plan of a case; `memory_bytes` is that of a GPU, None on a CPU."""
    config = EngineConfig(model, **{**OPTIONS, **options})
    spec = read_model(model).spec
    return make_engine_plan(config, spec, tp_size, memory_bytes, plan_rates(config, tp_size, config.device))


def least_memory(model: str, tp_size: int, memory_bytes: int | None = None, **options) -> int:
    """The fewest bytes in which the case fits, to a KiB."""

    def fits(num_kib: int) -> bool:
        try:
            return bool(plan_of(model, tp_size, memory_bytes, **{**options, "gpu_memory": num_kib * 2**10}))
        except ValueError:
            return False

    low, high = 0, 2**22
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * 2**10


def run(model: str, case: str, tp_size: int = 1) -> dict[str, Any]:
    options = dict(CASES[case])
    if model.endswith(".gguf"):  # its stored bits are read as on a GPU, but in passes of so many tokens
        options["debug"] = {**options.get("debug", {}), "as_on_gpu": True}
        options["max_num_batched_tokens"] = AS_STORED["bfloat16"] + 16
    if case in TIGHT:
        options["gpu_memory"] = least_memory(model, tp_size, **options)
    with LLM(model, **{**OPTIONS, **options}) as llm:
        digest = generate(llm).digest()
        plan, counters, weights = llm.engine.plan, llm.engine.worker.executor.counters, llm.engine.worker.weights
        compressed, residency = plan.residency.compressed, plan.residency
        sizes = {group.id: group.nbytes for group in plan.layout.groups}
        stored = {group.id: group.stored_bytes for group in plan.layout.groups}
        return {
            "digest": digest,
            "num_passes": counters.num_passes,
            "num_groups": len(sizes),
            "streamed_bytes": residency.streamed_bytes,
            "quantised": [str(group.id) for group in plan.layout.groups if group.is_quantised],
            "compressed": sorted(map(str, compressed)),
            "compressed_resident": len(compressed & residency.resident),
            "compressed_bytes": sum(weights.compressed[group].nbytes for group in compressed),
            "plain_bytes": sum(stored[group] for group in compressed),
            "copied": copied_bytes(llm.engine.worker.executor),
            "decompressed": {str(group): nbytes for group, nbytes in counters.decompressed_bytes.items()},
            "expected_copied": {
                str(group): weights.host_spans[group].nbytes
                * (counters.num_passes + (index < residency.ring.num_wrapped))
                for index, (group, _) in enumerate(residency.streamed)
            },
            "expected_decompressed": {str(group): sizes[group] * counters.num_passes for group in compressed},
        }


def main(folder: Path, variants: list[str]) -> None:
    """Runs all cases on one rank of a launch."""
    tp_size = int(os.environ["WORLD_SIZE"])
    facts = {name: {case: run(str(folder / name), case, tp_size) for case in CASES} for name in variants}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
