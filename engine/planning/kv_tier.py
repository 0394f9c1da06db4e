"""The second tier of the KV cache in numbers: pages of host memory, and what moving them takes of device memory.

Torch-free.
"""

from penstock.engine.config import EngineConfig
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.planning.predictions import pass_work
from penstock.scheduler.cost.moving import Moving
from penstock.scheduler.units import show_bytes


def moving(config: EngineConfig, plan: EnginePlan) -> Moving:
    """The costs of moving pages in passes of this plan, at its rates."""
    return Moving(pass_work(plan), plan.rates, plan.max_num_batched_tokens)


def num_host_pages(config: EngineConfig, plan: EnginePlan) -> int:
    """Pages of host memory that each rank takes: as many as were asked for, or none where the link binds."""
    if config.kv_host_memory is None or not moving(config, plan).pays_both_ways(plan.max_num_seqs):
        return 0
    return config.kv_host_memory // plan.demand.page_bytes


def describe_host_pages(config: EngineConfig, plan: EnginePlan) -> str:
    """A line of the plan; empty if nothing was asked for."""
    if config.kv_host_memory is None:
        return ""
    num_pages = num_host_pages(config, plan)
    nbytes, remark = show_bytes(num_pages * plan.demand.page_bytes), f"{num_pages} pages of {config.page_size} tokens"
    if not num_pages:
        binds = moving(config, plan).link_binds(plan.max_num_seqs)
        why = "the link is what binds" if binds else "to compute them again is as fast"
        remark = f"no page will move: {why}"
    return f"KV in host memory a rank  {nbytes:>12}   {remark}"
