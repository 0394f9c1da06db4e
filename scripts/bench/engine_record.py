"""Facts that a record states about the engine that ran: machine, model shape, memory, and the rates measured."""

from pathlib import Path
from typing import Any

import torch
from penstock.engine.llm import LLM
from penstock.scheduler.units import GB

from scripts.bench.record import machine

SHAPE = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size")


def describe(llm: LLM, benchmark: str) -> dict[str, Any]:
    """Fields of a record, on rank 0, after the runs. Bytes and rates are one rank's, those of `transfers` every rank's;
    `compressed_groups` counts those that stay and those that stream; plain bytes are what groups would have
    uncompressed."""
    engine, config = llm.engine, llm.config
    device, executor, spec = engine.topology.device, engine.worker.executor, engine.plan.spec
    cuda, residency, weights = device.type == "cuda", engine.plan.residency, engine.worker.weights
    plain = {group.id: group.nbytes for group in engine.plan.layout.groups}
    return {
        "benchmark": benchmark,
        **machine(device, engine.topology.tp_size),
        "model": Path(config.model).stem,
        "model_shape": {name: getattr(spec, name) for name in SHAPE} | {"num_parameters": spec.num_parameters},
        "load_format": config.load_format,
        "dtype": engine.plan.dtype,
        "tp_size": engine.topology.tp_size,
        "collectives": type(engine.collectives).__name__,
        "resident": str(config.resident),
        "weights_compression": config.weights_compression,
        "quantised_as": sorted({kind for _, kind in spec.formats}),
        "compressed_groups": [
            len(residency.compressed & residency.resident),
            len(residency.compressed - residency.resident),
        ],
        "graphs": engine.worker.runner.graphs is not None,
        "max_num_seqs": engine.plan.max_num_seqs,
        "max_num_batched_tokens": engine.plan.max_num_batched_tokens,
        "max_model_len": residency.max_model_len,
        "attention_sinks": config.attention_sinks,
        "attention_window": config.attention_window,
        "kv_host_memory_bytes": config.kv_host_memory,
        "streamed_bytes_per_pass_and_rank": engine.work.streamed_bytes,
        "plain_streamed_bytes_per_pass_and_rank": sum(plain[group] for group, _ in residency.streamed),
        "decompressed_bytes_per_pass_and_rank": engine.work.decompressed_bytes,
        "ring_bytes": residency.ring.ring_bytes,
        "host_bytes_per_rank": weights.host_bytes,
        "resident_bytes_per_rank": weights.resident_bytes,
        "compressed_from_bytes_per_rank": weights.compressed_from_bytes,
        "compress_s": weights.compress_s,
        "transfers": [without_sites(one) for one in engine.transfers],
        "requests": llm.loop.scheduler.counts.to_dict(),
        "num_passes": executor.counters.num_passes,
        "rates": engine.rates.source,
        "link_gb_s": engine.rates.link_gb_s,
        "memory_gb_s": engine.rates.memory_gb_s,
        "gemm_tflops": engine.rates.gemm_tflops,
        "decompress_gb_s": engine.rates.decompress_gb_s,
        "step_latency_s": engine.rates.step_latency_s,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "claimed_device_memory_bytes": residency.claimed_bytes,
    }


def without_sites(transfers: dict[str, Any]) -> dict[str, Any]:
    """A rank's ledger by operation: a record has no use for every layer."""
    parts = {kind: transfers[kind] for kind in ("weights", "all_reduces", "kv_pages") if kind in transfers}
    totals = {kind: {name: part[name] for name in ("total", "operations")} for kind, part in parts.items()}
    return {"rank": transfers["rank"]} | totals


def say_machine(report: dict[str, Any]) -> None:
    """Prints the lines above a benchmark's table."""
    moved = f"{report['streamed_bytes_per_pass_and_rank'] / GB:.3f} GB a pass and rank over the link"
    if any(report["compressed_groups"]):
        moved += ", {} resident and {} streamed groups compressed".format(*report["compressed_groups"])
    print(f"{report['model']} ({report['dtype']}) on {report['hardware']}, resident {report['resident']}: {moved}")
    rates = f"link {report['link_gb_s']:.2f} GB/s, memory {report['memory_gb_s']:.0f} GB/s, "
    print(f"{report['rates']} rates a rank: {rates}{report['gemm_tflops']:.3g} TFLOP/s")
