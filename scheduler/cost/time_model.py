"""The cost of a pass, predicted before it runs, from its bytes, FLOPs and reduces.

Torch-free. Rates come from a profile (assumed) or a probe (measured), and every prediction carries their source. Copies
run beside compute, so the longer of the two lanes counts; the compute lane is the sum of its steps, of what is
decompressed, and of what it waits for at the ring's end; the wrapped copies cover sampling, so only `pass_latency_s` is
left over. timeline.py replays the plan
itself, with the same cost of a step (`step_s`):

    latency + cache + sqrt(memory^2 + compute^2)

`latency` is a graph node's, or the time of the step's all-reduce; `cache` is the time of what attention reads from the
KV cache and copies out of it, by kernels of its own; `memory` is the time of all other reads and writes at the memory
rate, `compute` that of its FLOPs at the GEMM rate. The root rounds the roofline's corner: a GEMM
cannot keep both units busy all the time, and where its bytes alone would take as long as its FLOPs it takes 1.4 times
as long (tests/engine/planning/test_predictions.py compares with what was measured). Steps that the host launches one by
one take no less than their launches, and such a pass no less than the host (`host_s`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from penstock.scheduler.cost.pass_work import PassShape, PassWork, StepWork
from penstock.scheduler.units import GB

KERNELS_A_GROUP = 3  # kernels that decompress a group, one a weight: a norm and two matrices
# What a row costs the host in a pass that it launches step by step (to schedule it, to bind it, to take in its token),
# in steps. 1,454 rows beside prompts took 17 us each where a step of 8B took 65, and both are Python.
ROW_STEPS = 0.25
# What a sum over ranks costs the host where it launches the pass, beside its step, in steps: it is a call of its own
# then. H200s took 31 to 65 us for sums of up to 4 MiB where a step took 104.
REDUCE_STEPS = 0.5
# The share of the memory rate at which the decompressor writes, where it was not measured (1.7 bytes move for one that
# is written). H200s had 0.37 to 0.47: decompress_gb_s and memory_gb_s of benchmarks/*compressed*.json.
DECOMPRESS_SHARE = 0.42


@dataclass(frozen=True)
class Rates:
    """The figures of one rank's hardware while all ranks are active. Rates are in 1e9 bytes/s and 1e12 FLOP/s, times in
    seconds.

    `gemm_tflops` is what GEMMs of many tokens sustain. `step_latency_s` is the least time of a step that the host
    launches, `node_latency_s` what each step of a decode pass costs beside its work, as a node of a CUDA graph (None
    where there are no graphs), `reduce_latency_s` that of an all-reduce, `pass_latency_s` the part of a pass that
    nothing hides. `decompress_gb_s` counts bytes written by the decompressor (None where it was not measured: see
    `decompressing_gb_s`). `memory_bytes` is the device's memory; a CPU has None. `link_note` says behind
    `link_gb_s` how many ranks copy at once; nothing where nobody knows.
    """

    link_gb_s: float
    memory_gb_s: float
    gemm_tflops: float
    reduce_latency_s: float
    reduce_gb_s: float
    source: str
    step_latency_s: float = 0.0
    node_latency_s: float | None = None
    pass_latency_s: float = 0.0
    decompress_gb_s: float | None = None
    memory_bytes: int | None = None
    link_note: str = ""

    @property
    def decompressing_gb_s(self) -> float:
        """The measured rate of decompression, or else a share of the memory rate."""
        return self.decompress_gb_s or DECOMPRESS_SHARE * self.memory_gb_s


# h200, measured on several of them with torch 2.11: link_gb_s by the number of ranks that copy at once, since their
# links share the host; memory_gb_s and node_latency_s fit the linears of a captured decode pass on 1 and 4 ranks (a
# kernel that only reads: 4130 to 4380 GB/s); gemm_tflops those of 2000 tokens; the reduces those of 4 KiB to 64 MiB on
# four ranks in a graph; step_latency_s and pass_latency_s what the host takes for an eager step (36 to 96 us, from run
# to run) and between two passes.
PROFILES: dict[str, dict[str, Any]] = {
    "h200": {
        "link_gb_s": [55.1, 53.1, 48.1, 40.4],
        "memory_gb_s": 4250.0,
        "gemm_tflops": 720.0,
        "reduce_latency_s": 4e-6,
        "reduce_gb_s": 200.0,
        "step_latency_s": 6e-5,
        "node_latency_s": 1.5e-6,
        "pass_latency_s": 2e-4,
        "decompress_gb_s": 2050.0,
        "memory_bytes": 141 * GB,
    },
    "cpu": {
        "link_gb_s": [8.0, 5.0],
        "memory_gb_s": 15.0,
        "gemm_tflops": 0.1,
        "reduce_latency_s": 2e-4,
        "reduce_gb_s": 1.0,
        "step_latency_s": 2e-5,
        "pass_latency_s": 1e-3,
        "decompress_gb_s": 0.1,
    },
}


def with_link(rates: Rates, link_gb_s: float | None) -> Rates:
    """The rates, with the link rate replaced if one is given."""
    if link_gb_s is None:
        return rates
    return replace(rates, link_gb_s=link_gb_s, source=f"{rates.source}, link as given", link_note="")


def profile_rates(values: Mapping[str, Any], where: str, num_ranks: int) -> Rates:
    """The rates of a rank among `num_ranks` of a host, from a profile's values: the fields of Rates but `link_note`.

    `link_gb_s` may be a list: the rate of each of 1, 2, ... ranks that copy at once. If there are more ranks than it
    has entries, they share the sum of the last entry. The field `probe`, with the figures behind a measured profile, is
    ignored. Raises ValueError, beginning with `where` and naming the field, if one is missing, unknown or bad.
    """
    values = {name: value for name, value in values.items() if name != "probe"}
    known = {field.name for field in fields(Rates)} - {"link_note"}
    optional = {"step_latency_s", "node_latency_s", "pass_latency_s", "decompress_gb_s", "memory_bytes"}
    for name in values.keys() - known:
        raise ValueError(f"{where}: unknown field {name!r}; known: {', '.join(sorted(known))}")
    links, note = values.get("link_gb_s"), ""
    if isinstance(links, list) and links and all(_is_rate(link, zero=False) for link in links):
        values["link_gb_s"], note = _shared_link(links, num_ranks)
    for name in known - {"source"}:
        value = values.get(name)
        if value is None and name in optional:
            continue
        if not _is_rate(value, zero=name.endswith("_latency_s")):
            raise ValueError(
                f"{where}: {name}={value!r}: expected a {'number' if value is None else 'positive number'}"
            )
    return Rates(**values, link_note=note)


def _shared_link(links: list[float], num_ranks: int) -> tuple[float, str]:
    """The rate of each of `num_ranks` that copy at once, and `link_note`."""
    if num_ranks == 1:
        return links[0], "alone"
    if num_ranks <= len(links):
        return links[num_ranks - 1], f"with {num_ranks} ranks of a host copying at once ({links[0]:g} alone)"
    return links[-1] * len(links) / num_ranks, f"if {num_ranks} ranks of a host share what {len(links)} get at once"


def _is_rate(value: Any, zero: bool) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (value > 0 or (zero and value == 0)) and value < float("inf")


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass by what they are spent on, their total, and the bound: link, memory, compute, launch, reduce or
    decompress, whichever takes longest by itself. `lane_s` are those of the compute lane."""

    link_s: float
    memory_s: float
    compute_s: float
    launch_s: float
    reduce_s: float
    decompress_s: float
    total_s: float
    bound: str
    lane_s: float = 0.0

    @property
    def bound_s(self) -> float:
        return getattr(self, f"{self.bound}_s")


def predict_pass(work: PassWork, shape: PassShape, rates: Rates) -> PassTime:
    """The time of one pass: the longer of the two lanes, and the latency that neither hides."""
    steps = _sum_steps(work.steps, shape, rates)
    parts = {
        "link": link_s(work.streamed_bytes, rates),
        "memory": steps.memory_s,
        "compute": steps.compute_s,
        "launch": (steps.num - work.num_reduces) * _latency_s(work, shape, rates),
        "reduce": steps.reduce_s,
        "decompress": decompress_s(work.decompressed_bytes, work.num_decompressed, rates),
    }
    all_steps_s = max(steps.total_s, steps.num_launches * launch_s(shape, rates))
    return PassTime(
        **{f"{name}_s": value for name, value in parts.items()},
        total_s=max(
            pass_s(work.streamed_bytes, all_steps_s, parts["decompress"], rates, work.waited_bytes),
            host_s(work, shape, rates),
        ),
        bound=max(parts, key=parts.get),
        lane_s=all_steps_s + parts["decompress"],
    )


def pass_s(
    streamed_bytes: int, all_steps_s: float, all_decompress_s: float, rates: Rates, waited_bytes: int = 0
) -> float:
    """Seconds of a pass, given those of all its steps and of all its decompressing, which wait for so many bytes."""
    compute_s = all_steps_s + all_decompress_s + link_s(waited_bytes, rates)
    return max(link_s(streamed_bytes, rates), compute_s) + rates.pass_latency_s


def link_s(nbytes: int, rates: Rates) -> float:
    """Seconds of a copy of `nbytes` from the host."""
    return nbytes / (rates.link_gb_s * GB)


def steps_s(steps: Sequence[tuple[StepWork, int]], shape: PassShape, rates: Rates) -> float:
    """Seconds of all steps of a pass: of their work, or of their launches where these take longer."""
    all_of = _sum_steps(steps, shape, rates)
    return max(all_of.total_s, all_of.num_launches * launch_s(shape, rates))


class StepsTime(NamedTuple):
    """The steps of a pass that launch something: their number, and as how many they count where the host launches them;
    their seconds, and what these are spent on."""

    num: int
    num_launches: float
    total_s: float
    memory_s: float
    compute_s: float
    reduce_s: float


def _sum_steps(steps: Sequence[tuple[StepWork, int]], shape: PassShape, rates: Rates) -> StepsTime:
    """The steps of a pass together. Each is looked at once: it is asked for every pass that runs."""
    num, num_launches, total_s, memory_s, compute_s, reduces_s = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for step, count in steps:
        if step.runs(shape):
            cache_s, moves_s, gemm_s, own_reduce_s = parts = _parts_s(step, shape, rates)
            num += count
            num_launches += count * (1 + REDUCE_STEPS) if own_reduce_s else count
            total_s += count * _step_s(parts, rates)
            memory_s += count * (cache_s + moves_s)
            compute_s += count * gemm_s
            reduces_s += count * own_reduce_s
    return StepsTime(num, num_launches, total_s, memory_s, compute_s, reduces_s)


def launch_s(shape: PassShape, rates: Rates, streams: bool = False) -> float:
    """Seconds that the host takes to launch a step while a GPU works on earlier ones; 0 in a graph. Where weights
    stream, fewer passes are graphs."""
    return 0.0 if _is_graph(shape, rates, streams) or rates.node_latency_s is None else rates.step_latency_s


def host_s(work: PassWork, shape: PassShape, rates: Rates) -> float:
    """Seconds that a pass takes the host, which prepares the next one meanwhile; 0 in a graph, before which it is
    ahead. A group that is decompressed is launched as a step is."""
    launched_s = launch_s(shape, rates, streams=work.streamed_bytes > 0)
    if not launched_s:
        return 0.0
    steps = work.num_steps(shape) + REDUCE_STEPS * work.num_reduces
    return launched_s * (steps + work.num_decompressed + ROW_STEPS * shape.num_rows)


def step_s(work: StepWork, shape: PassShape, rates: Rates) -> float:
    """Seconds of one step of a pass: its latency, and the time of what it moves and computes. A CPU launches nothing
    ahead, so a step there takes no less than its latency."""
    return _step_s(_parts_s(work, shape, rates), rates) if work.runs(shape) else 0.0


def _step_s(parts_s: tuple[float, float, float, float], rates: Rates) -> float:
    cache_s, moves_s, gemm_s, own_reduce_s = parts_s
    device_s = cache_s + math.hypot(moves_s, gemm_s) + (own_reduce_s or rates.node_latency_s or 0.0)
    return device_s if rates.node_latency_s is not None else max(device_s, rates.step_latency_s)


def _parts_s(work: StepWork, shape: PassShape, rates: Rates) -> tuple[float, float, float, float]:
    """Seconds of what a step reads from the cache, of what else it moves, of what it computes and of its all-reduce,
    each by itself."""
    memory_bytes_s = rates.memory_gb_s * GB
    return (
        work.cache_bytes(shape) / memory_bytes_s,
        work.other_bytes(shape) / memory_bytes_s,
        work.gemm_flops(shape) / (rates.gemm_tflops * 1e12),
        _reduce_s(work, shape, rates),
    )


def decompress_s(nbytes: int, num_groups: int, rates: Rates) -> float:
    """Seconds of decompressing so many groups to `nbytes` together: a group has KERNELS_A_GROUP nodes of a graph, or
    takes as long as a step takes the host where there are no graphs."""
    latency_s = rates.step_latency_s if rates.node_latency_s is None else KERNELS_A_GROUP * rates.node_latency_s
    return nbytes / (rates.decompressing_gb_s * GB) + num_groups * latency_s


def reduce_s(nbytes: int, rates: Rates) -> float:
    """Seconds of one all-reduce of `nbytes`."""
    return rates.reduce_latency_s + nbytes / (rates.reduce_gb_s * GB)


def _reduce_s(work: StepWork, shape: PassShape, rates: Rates) -> float:
    return reduce_s(work.reduce_bytes(shape), rates) if work.is_reduce else 0.0


def _is_graph(shape: PassShape, rates: Rates, streams: bool) -> bool:
    return (shape.is_decode or (shape.is_padded and not streams)) and rates.node_latency_s is not None


def _latency_s(work: PassWork, shape: PassShape, rates: Rates) -> float:
    """The least seconds of a step without a reduce."""
    return rates.node_latency_s if _is_graph(shape, rates, work.streamed_bytes > 0) else rates.step_latency_s


def free_tokens(work: PassWork, rates: Rates) -> int:
    """T*: the tokens of a pass (prefill without context) that cost no time because the link binds; 0 if nothing
    streams."""
    if not work.streamed_bytes:
        return 0
    low, high = 0, 1 << 24
    copies_s = link_s(work.streamed_bytes, rates)
    quiet = replace(rates, pass_latency_s=0.0)
    while low < high:
        middle = (low + high + 1) // 2
        fits = predict_pass(work, PassShape(middle, 1, 0), quiet).total_s <= copies_s
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
