"""Measures how much of their attention a model's queries give to the first tokens of a sequence: whether it has sinks.

A model has attention sinks (Xiao et al. 2023) if queries put much of their softmax on the first tokens, whatever these
say; evicting them then breaks the model. The shares are computed while the engine runs: before each attention step,
from its own q and the keys that it has cached, in a sequence of which nothing is evicted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from penstock.engine.compute.attention import causal_mask, row_contexts
from penstock.engine.compute.context import PassContext
from penstock.engine.llm import LLM
from penstock.engine.runtime.watch import Watch
from penstock.scheduler.passes.pass_plan import Compute, Instruction
from torch import Tensor

SINKS = 0.3  # we speak of sinks from this share of all attention on
TRACE = 2.0  # and of a trace of sinks from so many times the uniform share on


@contextmanager
def watched_masses(llm: LLM, num_first: int) -> Iterator[list[list[Tensor]]]:
    """Yields a list for each layer. With each pass over one sequence each list grows by (T, H, num_first): the share
    that each query and head gives to each of the first tokens."""
    masses: list[list[Tensor]] = [[] for _ in range(llm.engine.plan.spec.num_layers)]

    class KeepMasses(Watch):
        def around(self, instruction: Instruction, ctx: PassContext | None, run: Callable[[], None]) -> None:
            if isinstance(instruction, Compute) and instruction.step == "attention":
                layer_idx = instruction.layer_idx
                masses[layer_idx].append(first_masses(ctx, layer_idx, num_first).cpu().clone())  # not a view of all
            run()

    with llm.engine.watched_by(KeepMasses()):
        yield masses


def first_masses(ctx: PassContext, layer_idx: int, num_first: int) -> Tensor:
    """Computes the shares (T, H, num_first) in a pass over one row, whose q and k are rotated and whose attention is
    yet to come."""
    heads, model = ctx.heads(), ctx.model
    ((_, row, keys, _),) = row_contexts(heads, model.kv.layer(layer_idx), ctx.inputs.context)
    q = heads[:, : model.num_heads].float()  # (T, H, E)
    keys = keys.float().repeat_interleave(model.num_heads // model.num_kv_heads, dim=1)  # (C, H, E)
    scores = torch.einsum("the,che->thc", q, keys) * model.spec.head_dim**-0.5
    mask = causal_mask(row, model.spec.windows[layer_idx], q.device)
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)[..., :num_first]


def summarise(masses: list[Tensor], first_query: int) -> list[dict[str, Any]]:
    """A row for each layer, of its (T, H, N) masses: means over the queries from `first_query` on, which has to be far
    enough from the first tokens not to see them as its neighbours."""
    rows = []
    for layer_idx, mass in enumerate(masses):
        num_queries, _, num_first = mass.shape
        by_head = mass[first_query:].sum(-1).mean(0)  # (H,)
        uniform = num_first / torch.arange(first_query + 1, num_queries + 1)  # what equal shares of all would give
        rows.append(
            {
                "layer": layer_idx,
                "mass": by_head.mean().item(),
                "of_the_first": mass[first_query:, :, 0].mean().item(),
                "largest_head": by_head.max().item(),
                "uniform": uniform.mean().item(),
            }
        )
    return rows


def verdict(rows: list[dict[str, Any]]) -> str:
    """A sentence that says what the figures mean."""
    mass, uniform = (sum(row[key] for row in rows) / len(rows) for key in ("mass", "uniform"))
    largest = max(rows, key=lambda row: row["largest_head"])
    if mass >= SINKS:
        meaning = "a model with sinks"
    elif largest["largest_head"] >= SINKS:
        meaning = "a model with sinks in single heads only"
    elif mass >= TRACE * uniform:
        meaning = "a trace of sinks, far from a model that depends on them"
    else:
        meaning = "a model without sinks"
    return (
        f"the first tokens get {mass:.1%} of the attention of far queries, {mass / uniform:.1f} times what equal shares"
        f" would give ({uniform:.1%}), and {largest['largest_head']:.1%} in the head with the most (layer"
        f" {largest['layer']}): {meaning}"
    )
