"""SplitLLM is the LLM of a split execution. It takes the same prompts and sampling parameters and gives the same
outputs; `counted` has what crossed between its sides, `predicted` what was predicted to cross.
"""

import secrets
from typing import Any

import torch
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.runtime.engine import Engine
from penstock.engine.split.channel import Channel, InProcess, Subprocess
from penstock.engine.split.device_side import DeviceSide
from penstock.engine.split.host_side import HostSide
from penstock.engine.split.permutation import PermutedChannel
from penstock.engine.split.transfers import PassRow, SplitConfig, add_pass
from penstock.engine.weights.blocks import WeightSource
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.parallel.collectives import Solo
from penstock.parallel.launch import resolve_launch
from penstock.parallel.ledger import TransferLedger
from penstock.scheduler.batching.batch import Batch

# What a split execution does not leave open: both sides compute on the CPU, and hold all of their weights plain.
FIXED = {"tensor_parallel_size": 1, "device": "cpu", "resident": "all", "weights_compression": "none"}
DRAWN_KEY_BYTES = 32


class SplitEngine(Engine):
    """One rank whose worker is the host side, and whose device side is another process or this one."""

    def __init__(self, config: EngineConfig, split: SplitConfig):
        self.split = split
        self.predicted = TransferLedger()
        super().__init__(config, resolve_launch(config.tensor_parallel_size))

    def _join(self, prepared: tuple[EnginePlan, WeightSource]) -> None:
        self.plan, source = prepared
        if isinstance(source, Checkpoint):  # it was checked; each side opens its own
            source.close()
        self.collectives = Solo()
        channel = self._channel()
        try:
            self.worker = HostSide(self.config, self.plan, channel, self.split.attention, self.collectives)
        except BaseException:
            channel.close()
            raise

    def _channel(self) -> Channel:
        wire_dtype = getattr(torch, self.split.wire_dtype)
        if self.split.process:
            return Subprocess(self.config, wire_dtype, self.split.timeout_s, self.plan.layout.nbytes)
        return InProcess(DeviceSide(self.config, self.plan), wire_dtype)

    @property
    def ledger(self) -> TransferLedger:
        return self.worker.channel.ledger

    def own_transfers(self) -> dict[str, Any]:
        return {"rank": self.topology.rank, "calls": self.ledger.to_dict()}

    def submit(self, batch: Batch) -> None:
        rows = [PassRow.of(row) for row in batch.rows]
        add_pass(self.predicted, self.plan.pass_plan.steps, self.plan.spec, rows, self.split)
        super().submit(batch)


class PermutedEngine(SplitEngine):
    """A SplitEngine whose channel permutes, and is told before each pass which requests its rows belong to."""

    def _channel(self) -> PermutedChannel:
        given = self.split.permute_key
        key = secrets.token_bytes(DRAWN_KEY_BYTES) if given is None else bytes.fromhex(given)
        self.permuted = PermutedChannel(super()._channel(), self.split.permute, key)
        return self.permuted

    def submit(self, batch: Batch) -> None:
        self.permuted.begin_pass(batch)
        super().submit(batch)


class SplitLLM(LLM):
    """`options` are EngineConfig's fields, without those of FIXED. Raises ValueError as LLM does. What `split.permute`
    does is obfuscation, not confidentiality (permutation.py)."""

    def __init__(self, model: str = "demo", split: SplitConfig | None = None, **options):
        self._split, self._own_options = SplitConfig() if split is None else split, options
        super().__init__(model, **options | FIXED)

    def _config_of(self, options: dict[str, Any]) -> EngineConfig:
        if not isinstance(self._split, SplitConfig):
            raise ValueError(f"split={self._split!r}: expected a SplitConfig")
        for name in FIXED.keys() & self._own_options.keys():
            raise ValueError(f"{name}={self._own_options[name]!r}: a split execution has {FIXED[name]!r} there")
        return super()._config_of(options)

    def _start(self) -> SplitEngine:
        kind = PermutedEngine if self._split.permute else SplitEngine
        return kind(self.config, self._split)

    @property
    def counted(self) -> TransferLedger:
        """The ledger of what has crossed since this was made."""
        self._check_open()
        return self.engine.ledger

    @property
    def predicted(self) -> TransferLedger:
        """The ledger of what was predicted to cross in the passes that ran."""
        self._check_open()
        return self.engine.predicted
