"""Describes what a rank's device memory holds beside weights, ring and KV cache, and how much of it there is.

Torch-free. Activations, logits and what sampling keeps follow from the number of sequences in a pass, which may be
planned, so everything here is a function of that number. Layers are alike, so two of them say where activations lie.
"""

import functools
from dataclasses import dataclass, replace

from penstock.engine.config import EngineConfig
from penstock.engine.kernels.matmul_tiles import partial_bytes
from penstock.engine.kernels.segments import LEAST_SEGMENT, partials_size
from penstock.engine.model.fusion import fuse, fused_runs
from penstock.engine.model.layout import ModelLayout
from penstock.engine.model.shard import local_vocab_size, shard_heads
from penstock.engine.model.spec import DTYPE_BYTES, ModelSpec
from penstock.engine.model.steps import (
    COPIED_ROWS,
    KEYS_AT_ONCE,
    activation_bytes,
    model_steps,
    most_rows,
    select_early,
)
from penstock.engine.planning.step_cost import kv_token_bytes
from penstock.scheduler.batching.pages import pages_for
from penstock.scheduler.cost.pass_work import MOST_PADDED_CHUNKS
from penstock.scheduler.passes.build import lay_out_decompressed, make_plan
from penstock.scheduler.passes.check import lay_out_activations
from penstock.scheduler.passes.pass_plan import Compute, PassPlan, RingLayout
from penstock.scheduler.residency.demand import Claims
from penstock.scheduler.units import MIB, show_bytes

# What a GPU's memory holds beside what is planned by name: assumed, since no probe measures it.
CONTEXT_BYTES = 640 * MIB  # CUDA context and loaded kernels
COLLECTIVES_BYTES = 512 * MIB  # NCCL's and symmetric memory's buffers, where there are ranks
GRAPHS_BYTES = 256 * MIB
GEMM_WORKSPACE_BYTES = 64 * MIB
STAGING_BYTES = 64 * MIB  # of KV pages on their way to host memory or back, if a page is not more
PENALTY_STATE_BYTES = 4  # a row and vocabulary entry: occurrences
COPIED_LOGITS_BYTES = 2 * 4 + 1  # likewise, of rows copied at a time: penalised logits, a filter's and a byte beside
SCORED_TOKEN_BYTES = 192  # of a prompt's token: log probabilities, and what asks for them
ROW_BYTES = 1024  # of a row beside that and its page table: parameters, tokens and log probabilities


@dataclass(frozen=True)
class MemoryClaims:
    """The memory claims of one rank of `tp_size`, in passes of up to `most_tokens`."""

    config: EngineConfig
    spec: ModelSpec
    dtype: str
    tp_size: int
    on_gpu: bool
    layout: ModelLayout
    most_tokens: int

    @property
    def has_kernels(self) -> bool:
        """Tells whether kernels of a GPU run: neighbouring steps are fused, and weights read as they are stored."""
        return self.on_gpu or self.config.debug.as_on_gpu

    @functools.cached_property
    def _steps(self) -> list[Compute]:
        """The steps of a pass over two layers."""
        num_layers = min(self.spec.num_layers, 2)
        return engine_steps(
            replace(self.spec, num_layers=num_layers, windows=self.spec.windows[:num_layers]),
            self.tp_size,
            self.has_kernels,
        )

    @functools.cached_property
    def _lifetimes(self) -> PassPlan:
        return make_plan(self._steps, RingLayout(0, 0, ()))

    def activations(self, num_seqs: int) -> tuple[dict[str, int], int]:
        """Byte offsets of the activations in their arena, and its bytes."""
        sizes = self._sizes(num_seqs)
        offsets = lay_out_activations(self._lifetimes, sizes)
        return offsets, max(offset + sizes[name] for name, offset in offsets.items())

    def _sizes(self, num_seqs: int) -> dict[str, int]:
        return activation_bytes(self.spec, self.dtype, self.tp_size, self.most_tokens, num_seqs)

    def fixed(self, num_seqs: int) -> Claims:
        """Named parts of memory that no split changes."""
        spec, tp_size = self.spec, self.tp_size
        vocab_size = local_vocab_size(spec.vocab_size, tp_size) * tp_size
        # One activation that an operation made before it is copied in, or what scoring prompts makes, behind which no
        # operation makes any; logits as float32; what is kept of rows.
        temporaries = max(*self._sizes(num_seqs).values(), self._scored_bytes)
        temporaries += min(num_seqs, COPIED_ROWS) * vocab_size * COPIED_LOGITS_BYTES
        temporaries += num_seqs * (vocab_size * PENALTY_STATE_BYTES + self._table_bytes + ROW_BYTES)
        temporaries += min(num_seqs, MOST_PADDED_CHUNKS) * self._table_bytes
        if self.config.attention_window is not None:  # copies, products and angles of the keys rotated at a time
            temporaries += 2 * KEYS_AT_ONCE * kv_token_bytes(spec, self.dtype, tp_size) // spec.num_layers
        temporaries += num_seqs * self._item_bytes  # each row may begin one segment more than its cached tokens fill
        workspace = temporaries + (GEMM_WORKSPACE_BYTES + self._partial_sums if self.on_gpu else 0)
        claims = [("activations", self.activations(num_seqs)[1]), ("workspace", workspace)]
        if self.on_gpu:
            claims += [("context", CONTEXT_BYTES), ("graphs", GRAPHS_BYTES)]
            claims += [("collectives", COLLECTIVES_BYTES)] if tp_size > 1 else []
        if self.config.kv_host_memory is not None:
            claims += [("KV staging", 2 * num_staged_pages(self.config, self.page_bytes) * self.page_bytes)]
        return tuple(claims)

    @property
    def _scored_bytes(self) -> int:
        """Bytes of what is computed for log probabilities of prompts, beside logits (ops.score_prompts)."""
        rows = most_rows(self.most_tokens, 1)["scored rows"]
        part = local_vocab_size(self.spec.vocab_size, self.tp_size) if self.tp_size > 1 else 0
        rows_bytes = rows * (self.spec.hidden_size + part) * DTYPE_BYTES[self.dtype]
        return rows_bytes + (self.most_tokens + rows) * SCORED_TOKEN_BYTES

    @property
    def _partial_sums(self) -> int:
        """Bytes of sums that a linear over stored weights has in memory, at most (stored_matmul.py)."""
        sizes = {(rows.format, rows.num_rows, rows.num_cols) for group in self.layout.groups for rows in group.rows}
        stored = [(kind, size) for kind, *size in sizes if kind.as_stored > kind.few_tokens]
        return max((partial_bytes(kind.name, *size, kind.as_stored) for kind, size in stored), default=0)

    @property
    def _table_bytes(self) -> int:
        """Bytes of a row's page table (Staging), at its longest."""
        longest = min(self.config.max_model_len or self.spec.max_position, self.spec.max_position)
        return 4 * pages_for(longest, self.config.page_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of a KV page in all layers (KVCache)."""
        return self.config.page_size * kv_token_bytes(self.spec, self.dtype, self.tp_size)

    @property
    def gathered_page_bytes(self) -> int:
        """Bytes of a page in a copy of what chunks attend to that continue (attention.gather): one layer at a time, and
        no more tokens than the longest row has (Binder.max_context), or GATHERED_TOKENS."""
        return self.page_bytes // self.spec.num_layers

    @property
    def partials_page_bytes(self) -> int:
        """Bytes that decode attention leaves of a page's tokens, in segments of the fewest tokens: one layer at a time
        (Cutting.partials)."""
        return -(-self.config.page_size * self._item_bytes // LEAST_SEGMENT)

    @property
    def _item_bytes(self) -> int:
        """Bytes that a segment of a row leaves."""
        num_heads = shard_heads(self.spec.num_heads, self.spec.num_kv_heads, self.tp_size, 0).num_heads
        return 4 * partials_size(1, num_heads, self.spec.head_dim) if self.on_gpu else 0

    def decompression_buffer(self, names: frozenset[str]) -> int:
        """Bytes of the decompression buffer if groups of these names are compressed or quantised."""
        sizes = {group.id.name: group.nbytes for group in self.layout.groups}
        groups = {step.group for step in self._steps if step.group is not None and step.group.name in names}
        slots = lay_out_decompressed(self._steps, {group: sizes[group.name] for group in groups})
        return max((slot.end for slot in slots.values()), default=0)


def num_staged_pages(config: EngineConfig, page_bytes: int) -> int:
    """KV pages that a slot of staging memory holds, of two. Raises ValueError if host memory has no room for one."""
    asked = config.kv_host_memory
    if asked < page_bytes:
        raise ValueError(
            f"kv_host_memory={asked}: expected room for a KV page at least, which has {page_bytes} bytes on a rank"
        )
    return max(1, min(STAGING_BYTES // 2, asked) // page_bytes)


def engine_steps(spec: ModelSpec, tp_size: int, fuses: bool) -> list[Compute]:
    """The steps of a pass as the engine runs them."""
    steps = model_steps(spec)
    return fuse(select_early(steps), fused_runs(tp_size, spec.hidden_size)) if fuses else steps


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a rank's GPU, the least of all ranks. `free_bytes` is what other processes leave; the engine's own
    memory counts as free."""

    total_bytes: int
    free_bytes: int


def memory_budget(config: EngineConfig, device: DeviceMemory | None) -> int | None:
    """Bytes that a rank may use: gpu_memory, else the utilization's share of the device's memory, but no more than is
    free; None, without a limit, for a CPU.

    Raises ValueError if gpu_memory is more than there is, or than is free.
    """
    if device is None:
        return config.gpu_memory
    if config.gpu_memory is None:
        return min(int(device.total_bytes * config.gpu_memory_utilization), device.free_bytes)
    if config.gpu_memory > device.free_bytes:
        asked, there = show_bytes(config.gpu_memory), show_bytes(device.total_bytes)
        free = "" if device.free_bytes == device.total_bytes else f", of which {show_bytes(device.free_bytes)} are free"
        raise ValueError(f"gpu_memory={asked}: the device has {there}{free}")
    return config.gpu_memory


def describe_memory(config: EngineConfig, device: DeviceMemory | None) -> str | None:
    """A sentence if other processes hold memory that the plan would have used, else None."""
    if device is None or config.gpu_memory is not None:
        return None
    share = int(device.total_bytes * config.gpu_memory_utilization)
    if share <= device.free_bytes:
        return None
    held = show_bytes(device.total_bytes - device.free_bytes)
    return (
        f"other processes hold {held} of a GPU's memory: planned with the {show_bytes(device.free_bytes)} that are"
        f" free, not with {show_bytes(share)}"
    )
