"""One start of an engine in this process, which must have begun for it: the seconds of each phase until a first token.

    process start -> imports -> plan -> device -> weights -> engine -> captures -> first token

`imports` ends where a script's main begins; `plan` has read the config and checked the source of the weights; `device`
has met the other ranks; `engine` has allocated ring, KV cache and activations, and waited for the other ranks;
`captures` has made the graphs of passes, and compiled their kernels; with `capture="lazy"` it is empty, and the first
token waits for the graphs that it needs. Bytes and rates are rank 0's; `peak_host_bytes` of `weights` are those that
loading added to its process at the peak, the weights that lie there among them.
"""

import os
import time
from pathlib import Path
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.output import without_errors
from penstock.engine.runtime.progress import Progress

from scripts.bench.engine_record import describe
from scripts.bench.peak_memory import reset_peak, resident_bytes
from scripts.bench.workload import greedy, random_jobs

Phase = dict[str, Any]
_START_TIME = 19  # of the fields of /proc/self/stat that come after the command's name: clock ticks since boot


class Loading(Progress):
    """The progress of a start, and the host memory that loading added to this process at its peak."""

    def begin_loading(self, total_bytes: int) -> None:
        super().begin_loading(total_bytes)
        reset_peak()
        self._before_bytes = self.peak_bytes = resident_bytes()

    def add(self, nbytes: int) -> None:
        super().add(nbytes)
        if self.loaded_bytes == self.total_bytes:
            self.peak_bytes = resident_bytes()

    @property
    def added_bytes(self) -> int:
        return self.peak_bytes - self._before_bytes


def process_start_s() -> float:
    """The moment at which this process began, on the clock of time.perf_counter; a clock tick (10 ms) is its grain."""
    stat = Path("/proc/self/stat").read_text()
    ticks = int(stat.rpartition(")")[2].split()[_START_TIME])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter() - age_s


def measure_start(config: EngineConfig, input_len: int, imported_at_s: float) -> dict | None:
    """Starts the engine and generates a token from a prompt of `input_len` tokens. On rank 0 a record with `phases` and
    `startup_s`, of LLM(...); None on the other ranks."""
    began_at_s, loading = process_start_s(), Loading()
    with LLM(**config.to_dict(), progress=loading) as llm:
        ready_at_s, graphs = time.perf_counter(), llm.engine.worker.runner.graphs
        captures_s, num_graphs = (graphs.seconds, len(graphs.passes)) if graphs else (0.0, 0)
        (job,) = random_jobs(1, input_len, 1, llm.engine.plan.spec.vocab_size, config.seed)
        without_errors(llm.generate(job.prompt, greedy(job)))
        first_token_at_s = time.perf_counter()
        if llm.engine.topology.rank > 0:
            return None
        weights = llm.engine.worker.weights
        ends = {
            "imports": imported_at_s,
            "plan": llm.engine.planned_at_s,
            "device": weights.began_at_s,
            "weights": weights.ended_at_s,
            "engine": ready_at_s - captures_s,
            "captures": ready_at_s,
            "first token": first_token_at_s,
        }
        phases = cut_phases(began_at_s, ends)
        phases["weights"]["bytes"] = weights.host_bytes + weights.resident_bytes
        phases["weights"]["peak_host_bytes"] = loading.added_bytes
        phases["captures"]["num_graphs"] = num_graphs
        startup_s = ready_at_s - imported_at_s
        read = {"bytes_read_per_rank": weights.bytes_read, "input_len": input_len}
        return describe(llm, "startup") | read | {"startup_s": startup_s, "phases": phases}


def cut_phases(began_at_s: float, ends: dict[str, float]) -> dict[str, Phase]:
    """The seconds of each phase, which begins where the one before it ends, and from the beginning to its end."""
    begins = (began_at_s, *ends.values())
    return {
        name: {"seconds": end_s - begin_s, "since_start_s": end_s - began_at_s}
        for begin_s, (name, end_s) in zip(begins, ends.items())
    }
