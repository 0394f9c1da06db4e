"""One start of an engine in this process, which must have begun for it: the seconds of each phase until a first token.

    process start -> imports -> plan -> device -> weights -> engine -> first token, and then: captures

`imports` ends where a script's main begins; `plan` has read the config and checked the source of the weights; `device`
has met the other ranks; `engine` has allocated ring, KV cache and activations, and waited for the other ranks. Graphs
are captured when a decode pass first needs them: `captures` is what the first pass over max_num_seqs rows takes longer
than the second, with the compilation of its kernels. Bytes and rates are rank 0's.
"""

import os
import time
from pathlib import Path
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.engine.runtime.engine import Engine
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.pages import RESERVED_PAGE

from scripts.bench.engine_record import describe
from scripts.bench.workload import greedy, random_jobs

Phase = dict[str, Any]
_START_TIME = 19  # of the fields of /proc/self/stat that come after the command's name: clock ticks since boot


def process_start_s() -> float:
    """The moment at which this process began, on the clock of time.perf_counter; a clock tick (10 ms) is its grain."""
    stat = Path("/proc/self/stat").read_text()
    ticks = int(stat.rpartition(")")[2].split()[_START_TIME])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age_s


def measure_start(config: EngineConfig, input_len: int, imported_at_s: float) -> dict | None:
    """Starts the engine and generates a token from a prompt of `input_len` tokens. On rank 0 a record with `phases` and
    `startup_s`, of LLM(...) and the captures; None on the other ranks."""
    began_at_s = process_start_s()
    with LLM(**config.to_dict()) as llm:
        ready_at_s = time.perf_counter()
        (job,) = random_jobs(1, input_len, 1, llm.engine.plan.spec.vocab_size, config.seed)
        without_errors(llm.generate(job.prompt, greedy(job)))
        first_token_at_s = time.perf_counter()
        captures_s = measure_captures(llm.engine, llm.engine.plan.max_num_seqs)
        if llm.engine.topology.rank > 0:
            return None
        weights = llm.engine.worker.weights
        ends = {
            "imports": imported_at_s,
            "plan": llm.engine.planned_at_s,
            "device": weights.began_at_s,
            "weights": weights.ended_at_s,
            "engine": ready_at_s,
            "first token": first_token_at_s,
        }
        phases = cut_phases(began_at_s, ends)
        phases["weights"]["bytes"] = weights.host_bytes + weights.resident_bytes
        if captures_s is not None:
            num_graphs = len(llm.engine.worker.runner.graphs.passes)
            phases["captures"] = {"seconds": captures_s, "num_graphs": num_graphs}
        startup_s = ready_at_s - imported_at_s + (captures_s or 0.0)
        read = {"bytes_read_per_rank": weights.bytes_read, "input_len": input_len}
        return describe(llm, "startup") | read | {"startup_s": startup_s, "phases": phases}


def cut_phases(began_at_s: float, ends: dict[str, float]) -> dict[str, Phase]:
    """The seconds of each phase, which begins where the one before it ends, and from the beginning to its end."""
    begins = (began_at_s, *ends.values())
    return {
        name: {"seconds": end_s - begin_s, "since_start_s": end_s - began_at_s}
        for begin_s, (name, end_s) in zip(begins, ends.items())
    }


def measure_captures(engine: Engine, num_rows: int) -> float | None:
    """Seconds to capture greedy decode passes of up to `num_rows` rows; None without graphs, on all ranks. Where other
    ranks have an LLM of their own, all call this together."""
    if engine.worker.runner.graphs is None:
        return None
    with engine.together():
        if engine.topology.rank > 0:
            engine.follow()
            return None
        first_s, second_s = full_pass_s(engine, num_rows), full_pass_s(engine, num_rows)
        engine.finish([])
    return first_s - second_s


def full_pass_s(engine: Engine, num_rows: int) -> float:
    """Seconds of a decode pass over that many rows, none of which is a request's: they write to the reserved page."""
    rows = [BatchRow(row, (0,), 0, (RESERVED_PAGE,), samples=True, sampling=None) for row in range(num_rows)]
    start = time.perf_counter()
    engine.submit(Batch(tuple(rows)))
    engine.collect()
    return time.perf_counter() - start
