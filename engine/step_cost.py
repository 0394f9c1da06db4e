"""Seconds of each compute step of a plan, by roofline: what `predict_timeline` replays beside the measured trace.

PURE. A step costs what its weights, FLOPs, KV, activations or reduce cost at the profile's rates, and never less
than a launch. Unknown steps (a rewrite's, a new family's) count as element-wise ones.
"""

import math
from collections.abc import Callable

from engine.model.spec import DTYPE_BYTES
from engine.model.steps import activation_widths, sums_over_ranks
from engine.planning import EnginePlan, kv_token_bytes
from parallel.shard import shard_heads
from scheduler.pass_work import PassShape
from scheduler.step_plan import Compute
from scheduler.time_model import GB, reduce_s

MATRICES = {
    "attn_qkv": ("qkv",),
    "attn_output": ("o",),
    "attn_output_beside": ("o",),
    "ffn_up": ("gate_up", "up"),
    "ffn_down": ("down",),
    "head": ("head",),
}


def step_seconds(plan: EnginePlan, shape: PassShape) -> Callable[[Compute], float]:
    """The cost function of a pass of this shape on one rank; predict_timeline takes it."""
    rates, spec = plan.rates, plan.spec
    bytes_s, flops_s = rates.memory_gb_s * GB, rates.gemm_tflops * 1e12
    weights = {(g.group, w.name): math.prod(w.shape) for g in plan.layout.groups for w in g.weights}
    widths = activation_widths(spec, plan.tp_size)
    element = DTYPE_BYTES[plan.dtype]
    heads = shard_heads(spec.num_heads, spec.num_kv_heads, plan.tp_size, 0).num_heads
    num = {"tokens": shape.num_tokens, "rows": shape.num_rows}

    def touched_bytes(step: Compute) -> int:
        """Activations, once for each letter that reads or writes."""
        moved = ((num[widths[name][0]] * widths[name][1], sum(c in "rw" for c in e)) for name, e in step.effects)
        return element * sum(size * times for size, times in moved)

    def attention_s() -> float:
        kv_bytes = (shape.context_tokens + shape.num_tokens) * kv_token_bytes(spec, plan.dtype, plan.tp_size)
        flops = 4 * heads * spec.head_dim * shape.attended_pairs
        return max(kv_bytes / spec.num_layers / bytes_s, flops / flops_s)

    def seconds(step: Compute) -> float:
        summing_s = 0.0
        if sums_over_ranks(step) and plan.tp_size > 1:
            summing_s = reduce_s(shape.num_tokens * spec.hidden_size * element, rates)
        if step.step.endswith("allreduce"):
            return summing_s
        elements = sum(weights.get((step.group, name), 0) for name in MATRICES.get(step.step, ()))
        per = shape.num_rows if step.step == "head" else shape.num_tokens
        cost = max((elements * element + touched_bytes(step)) / bytes_s, 2 * elements * per / flops_s)
        cost += attention_s() if step.step == "attention" else 0.0
        return summing_s + max(cost, rates.step_latency_s)

    return seconds
