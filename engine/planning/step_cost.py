"""Describes what one rank does in each compute step of a plan: bytes, FLOPs and reduces, which the time model turns
into seconds.

Torch-free. A fused step does what its parts do: its name joins theirs. Unknown steps (a new family's) count as
element-wise ones.
"""

import math
from collections.abc import Callable

from penstock.engine.model.group_layout import GroupLayout
from penstock.engine.model.layout import ModelLayout
from penstock.engine.model.shard import shard_heads
from penstock.engine.model.spec import DTYPE_BYTES, ModelSpec
from penstock.engine.model.steps import SCORE, activation_widths, sums_over_ranks
from penstock.scheduler.cost.pass_work import StepWork
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.passes.pass_plan import Compute

MATRICES = {
    "attn_qkv": ("qkv",),
    "attn_output": ("o",),
    "attn_output_beside": ("o",),
    "ffn_up": ("gate_up", "up"),
    "ffn_down": ("down",),
    "head": ("head",),
}


# Bytes that would take as long at the memory rate as to multiply one weight that is read as it is stored: memory does
# not bind there. H200s took 1.8 (Q4_0) and 2.3 (Q8_0) at one token, and 4 at four.
STORED_WEIGHT_BYTES = 3


def step_work(spec: ModelSpec, layout: ModelLayout, dtype: str, tp_size: int) -> Callable[[Compute], StepWork]:
    """Gives the work of a step on one rank of `tp_size`."""
    element = DTYPE_BYTES[dtype]
    groups = {group.id: group for group in layout.groups}
    sizes = {(g.id, w.name): math.prod(w.shape) for g in layout.groups for w in g.weights}
    widths = activation_widths(spec, tp_size)
    pair_flops = 4 * shard_heads(spec.num_heads, spec.num_kv_heads, tp_size, 0).num_heads * spec.head_dim
    layer_kv_bytes = kv_token_bytes(spec, dtype, tp_size) // spec.num_layers

    def touched_bytes(step: Compute, unit: str) -> int:
        """Bytes of the activations with a row for each of `unit`, counted once for each letter that reads or writes."""
        letters = {name: sum(letter in "rw" for letter in effect) for name, effect in step.effects}
        return element * sum(widths[name][1] * n for name, n in letters.items() if widths[name][0] == unit)

    def work(step: Compute) -> StepWork:
        parts = step.parts
        is_reduce = sums_over_ranks(step) and len(parts) == 1
        if (tp_size == 1 and is_reduce) or step.step == SCORE:  # that one only where a row asks for it
            return StepWork(step.step)  # nothing is launched
        names = [name for part in parts for name in MATRICES.get(part, ()) if (step.group, name) in sizes]
        elements = sum(sizes[step.group, name] for name in names)
        few_tokens, few_bytes = _as_stored(groups[step.group], names) if names else (0, 0)
        attends, moved = "attention" in parts, {unit: touched_bytes(step, unit) for unit in ("tokens", "rows")}
        if is_reduce:
            moved["tokens"] = 0  # counted in the rate of reduces
        if step.of_rows:
            moved = {"tokens": 0, "rows": sum(moved.values())}
        return StepWork(
            step=step.step,
            weight_bytes=elements * element,
            token_bytes=moved["tokens"],
            row_bytes=moved["rows"],
            kv_token_bytes=layer_kv_bytes if attends else 0,
            token_flops=0 if step.of_rows else 2 * elements,
            row_flops=2 * elements if step.of_rows else 0,
            attention_flops=pair_flops if attends else 0,
            reduce_token_bytes=spec.hidden_size * element if sums_over_ranks(step) and tp_size > 1 else 0,
            few_tokens=few_tokens,
            few_bytes=few_bytes,
        )

    return work


def _as_stored(group: GroupLayout, names: list[str]) -> tuple[int, int]:
    """Tokens of the largest pass that reads these weights as they are stored, 0 if none does, and the bytes that would
    take as long then."""
    few_tokens = min(group.as_stored(name) for name in names)
    num_weights = sum(rows.num_rows * rows.num_cols for name in names for rows in group.rows_of(name))
    return few_tokens, STORED_WEIGHT_BYTES * num_weights if few_tokens else 0


def dequantise_work(group: GroupLayout, rates: Rates) -> StepWork:
    """The work of making floats of a quantised group, as bytes that would take as long at the memory rate: they are
    written at the rate of the lossless decompressor, which reads about as much for each. A pass of few tokens leaves
    out what it reads as it is stored."""
    sizes = {weight.name: weight.parts[0].nbytes for weight in group.weights if weight.name in group.quantised}
    few_tokens = min(filter(None, map(group.as_stored, sizes)), default=0)
    left = sum(nbytes for name, nbytes in sizes.items() if not group.as_stored(name))
    share = rates.memory_gb_s / rates.decompressing_gb_s
    return StepWork(
        "decompress", weight_bytes=int(sum(sizes.values()) * share), few_tokens=few_tokens, few_bytes=int(left * share)
    )


def kv_token_bytes(spec: ModelSpec, dtype: str, tp_size: int) -> int:
    """Bytes of the keys and values of one token on one rank."""
    kv_heads = len(shard_heads(spec.num_heads, spec.num_kv_heads, tp_size, 0).kv_heads)
    return 2 * spec.num_layers * kv_heads * spec.head_dim * DTYPE_BYTES[dtype]
