"""Describes what one rank does in each compute step of a plan: bytes, FLOPs and reduces, which the time model turns
into seconds.

Torch-free. A fused step does what its parts do: its name joins theirs. Unknown steps (a new family's) count as
element-wise ones.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from penstock.engine.kernels.matmul_tiles import NEAREST, tile_index
from penstock.engine.model.group_layout import GroupLayout, Weight
from penstock.engine.model.layout import ModelLayout
from penstock.engine.model.shard import shard_heads
from penstock.engine.model.spec import DTYPE_BYTES, ModelSpec
from penstock.engine.model.steps import SCORE, SCORED_ROWS, activation_widths, sums_over_ranks
from penstock.engine.model.weight_formats import WeightFormat
from penstock.scheduler.cost.pass_work import PassShape, StepWork
from penstock.scheduler.cost.time_model import Rates, decompress_s, step_s
from penstock.scheduler.passes.pass_plan import Compute, Decompress, GroupId
from penstock.scheduler.units import GB

MATRICES = {
    "attn_qkv": ("qkv",),
    "attn_output": ("o",),
    "attn_output_beside": ("o",),
    "ffn_up": ("gate_up", "up"),
    "ffn_down": ("down",),
    "head": ("head",),
}


GATHER = "logits_gather"
AFTER_SCORES = {"head", GATHER}  # steps of sampled rows alone, which tokens that are scored have left


# What an H200 took in the matrices of the 8B shape, by format (tests/engine/planning/test_stored_cost.py compares with
# the records). Other formats are taken to be as their NEAREST one.
# Bytes that would take as long at the memory rate as to multiply one weight that is read as it is stored, without the
# step's latency: in registers by 1, 2, 3 (not timed: the mean) and 4 tokens, in the largest matrix. In a pass smaller
# ones take as long a weight, though Q8_0 alone took a third longer there at one token.
FEW_BYTES = {
    "Q4_0": (0.90, 1.32, 1.89, 2.45), "Q8_0": (1.13, 1.51, 2.08, 2.65), "Q4_K": (1.33, 1.81, 2.50, 3.18),
    "Q6_K": (1.39, 1.84, 2.35, 2.85), "Q5_0": (1.19, 1.61, 2.14, 2.66), "Q2_K": (1.09, 1.71, 2.42, 3.12),
}  # fmt: skip
# And through tensor cores by the tokens of a tile (matmul_tiles.py), in all matrices together.
MATMUL_BYTES = {"Q4_0": (1.7, 2.1, 3.7), "Q8_0": (2.3, 2.5, 2.8), "Q4_K": (2.4, 2.7, 3.9), "Q6_K": (2.9, 3.5, 4.6)}
# How many times as fast as the lossless decompressor floats are written that linears then read: what these took longer
# than over bf16.
WRITTEN = {"Q4_0": 1.44, "Q8_0": 1.20, "Q4_K": 1.15, "Q6_K": 0.93, "Q5_0": 1.39, "Q2_K": 1.28}
# How many a CPU makes a second, in plain torch: one core and two of a server made 0.4 to 1.6 billion, in bf16 and fp32
# alike, and 3.1 to 4.5 of Q8_0.
TORCH_WEIGHTS_S, TORCH_Q8_0_WEIGHTS_S = 1e9, 3.5e9


def stored_weight_bytes(kind: WeightFormat, num_tokens: int) -> float:
    """The bytes for any number of tokens that reads a weight as it is stored; memory does not bind there."""
    if num_tokens <= kind.few_tokens:
        return _of_kind(FEW_BYTES, kind)[num_tokens - 1]
    return _of_kind(MATMUL_BYTES, kind)[tile_index(num_tokens)]


def _of_kind(measured: Mapping[str, Any], kind: WeightFormat) -> Any:
    return measured[kind.name if kind.name in measured else NEAREST[kind.name]]


def step_work(spec: ModelSpec, layout: ModelLayout, dtype: str, tp_size: int) -> Callable[[Compute], StepWork]:
    """Gives the work of a step on one rank of `tp_size`."""
    element = DTYPE_BYTES[dtype]
    groups = {group.id: group for group in layout.groups}
    sizes = {(g.id, w.name): math.prod(w.shape) for g in layout.groups for w in g.weights}
    widths = activation_widths(spec, tp_size)
    pair_flops = 4 * shard_heads(spec.num_heads, spec.num_kv_heads, tp_size, 0).num_heads * spec.head_dim
    layer_kv_bytes = kv_token_bytes(spec, dtype, tp_size) // spec.num_layers
    gathered_bytes = widths["logits"][1] * element  # of a row; a gather sends half of what an all-reduce does

    def touched_bytes(step: Compute, unit: str) -> int:
        """Bytes of the activations with a row for each of `unit`, counted once for each letter that reads or writes."""
        letters = {name: sum(letter in "rw" for letter in effect) for name, effect in step.effects}
        return element * sum(widths[name][1] * n for name, n in letters.items() if widths[name][0] == unit)

    def work(step: Compute) -> StepWork:
        parts = step.parts
        is_reduce = sums_over_ranks(step) and len(parts) == 1
        if tp_size == 1 and is_reduce:
            return StepWork(step.step)  # nothing is launched
        if step.step == SCORE:
            return _score_work(step, sizes[step.group, "head"] * element, widths, element)
        names = [name for part in parts for name in MATRICES.get(part, ()) if (step.group, name) in sizes]
        elements = sum(sizes[step.group, name] for name in names)
        attends, moved = "attention" in parts, {unit: touched_bytes(step, unit) for unit in ("tokens", "rows")}
        if is_reduce:
            moved["tokens"] = 0  # counted in the rate of reduces
        if step.of_rows:
            moved = {"tokens": 0, "rows": sum(moved.values())}
        has_scored = step.of_rows and not AFTER_SCORES & set(parts)
        return StepWork(
            step=step.step,
            weight_bytes=elements * element,
            token_bytes=moved["tokens"],
            row_bytes=moved["rows"],
            kv_token_bytes=layer_kv_bytes if attends else 0,
            token_flops=0 if step.of_rows else 2 * elements,
            row_flops=2 * elements if step.of_rows else 0,
            attention_flops=pair_flops if attends else 0,
            scored_bytes=moved["rows"] if has_scored else 0,
            scored_flops=2 * elements if has_scored else 0,
            reduce_token_bytes=spec.hidden_size * element if sums_over_ranks(step) and tp_size > 1 else 0,
            reduce_row_bytes=gathered_bytes // 2 if step.step == GATHER and tp_size > 1 else 0,
            few_bytes=_as_stored(groups[step.group], names) if names else (),
        )

    return work


def _score_work(step: Compute, head_bytes: int, widths: Mapping[str, tuple[str, int]], element: int) -> StepWork:
    """The work of log probabilities of prompts: the head, which is read once for SCORED_ROWS tokens, writes logits that
    are read twice."""
    (_, hidden), (_, vocab) = widths["x_"], widths["prompt_logits"]
    scored_bytes = head_bytes // SCORED_ROWS + element * (3 * hidden + 3 * vocab)
    return StepWork(step.step, scored_bytes=scored_bytes, scored_flops=2 * head_bytes // element)


def _as_stored(group: GroupLayout, names: list[str]) -> tuple[int, ...]:
    """The bytes that would take as long as to read these weights as they are stored, in passes of 1, 2, ... tokens as
    far as they do."""
    num_weights = Counter()
    for rows in (rows for name in names for rows in group.rows_of(name)):
        num_weights[rows.format] += rows.num_rows * rows.num_cols

    def read_bytes(num_tokens: int) -> int:
        return round(sum(stored_weight_bytes(kind, num_tokens) * count for kind, count in num_weights.items()))

    return tuple(map(read_bytes, range(1, min(map(group.as_stored, names)) + 1)))


def dequantise_work(group: GroupLayout, rates: Rates) -> StepWork:
    """The work of making floats of a quantised group, as bytes that would take as long at the memory rate; rows that
    are floats are copied beside, as fast as the lossless decompressor writes. A pass of few tokens leaves out what it
    reads as it is stored."""
    quantised = [weight for weight in group.weights if weight.name in group.quantised]
    moved = {weight.name: rates.memory_gb_s * GB * _written_s(group, weight, rates) for weight in quantised}
    few_tokens = min(filter(None, map(group.as_stored, moved)), default=0)
    left = sum(nbytes for name, nbytes in moved.items() if not group.as_stored(name))
    return StepWork("decompress", weight_bytes=int(sum(moved.values())), few_bytes=(int(left),) * few_tokens)


def _written_s(group: GroupLayout, weight: Weight, rates: Rates) -> float:
    """Seconds in which the floats of a weight are written."""
    row_bytes = weight.parts[0].nbytes / weight.num_rows

    def row_s(kind: WeightFormat) -> float:
        if kind.is_quantised and not kind.as_stored:  # no kernels are there
            return weight.num_cols / (TORCH_Q8_0_WEIGHTS_S if kind.name == "Q8_0" else TORCH_WEIGHTS_S)
        times_as_fast = _of_kind(WRITTEN, kind) if kind.is_quantised else 1.0
        return row_bytes / (times_as_fast * rates.decompressing_gb_s * GB)

    return sum(rows.num_rows * row_s(rows.format) for rows in group.rows_of(weight.name))


def step_seconds_of(
    spec: ModelSpec,
    layout: ModelLayout,
    dtype: str,
    tp_size: int,
    rates: Rates,
    shape: PassShape,
    compressed: AbstractSet[GroupId],
) -> Callable[[Compute | Decompress], float]:
    """Gives the seconds of a step, or of a partial decompression, in a pass of this shape."""
    work = step_work(spec, layout, dtype, tp_size)
    quantised = [group for group in layout.groups if group.is_quantised]
    floats = {group.id: dequantise_work(group, rates) for group in quantised}
    lossless_s = {group.id: decompress_s(group.float_bytes, 1, rates) for group in quantised if group.id in compressed}

    def seconds(step: Compute | Decompress) -> float:
        if isinstance(step, Decompress):
            return step_s(floats[step.group], shape, rates) + lossless_s.get(step.group, 0.0)
        return step_s(work(step), shape, rates)

    return seconds


def kv_token_bytes(spec: ModelSpec, dtype: str, tp_size: int) -> int:
    """Bytes of the keys and values of one token on one rank."""
    kv_heads = len(shard_heads(spec.num_heads, spec.num_kv_heads, tp_size, 0).kv_heads)
    return 2 * spec.num_layers * kv_heads * spec.head_dim * DTYPE_BYTES[dtype]
