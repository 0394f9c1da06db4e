"""SplitLLM is the LLM of a split execution. It takes the same prompts and sampling parameters and gives the same
outputs; `counted` has what crossed between its sides, `predicted` what was predicted to cross.
"""

import functools
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.runtime.engine import Engine
from penstock.engine.runtime.start_engine import start_engine
from penstock.engine.split.host_side import build_host_side
from penstock.engine.split.transfers import SplitConfig
from penstock.parallel.ledger import TransferLedger

# What a split execution does not leave open: both sides compute on the CPU, and hold all of their weights plain.
FIXED = {"tensor_parallel_size": 1, "device": "cpu", "resident": "all", "weights_compression": "none"}


class SplitLLM(LLM):
    """An LLM whose device side is not trusted. `options` are EngineConfig's fields, without those of FIXED. Raises
    ValueError as LLM does, and for prompt_logprobs. What `split.permute` does is obfuscation, not confidentiality
    (permutation.py)."""

    scores_prompts = False

    def __init__(self, model: str = "demo", split: SplitConfig | None = None, **options):
        self._split, self._own_options = SplitConfig() if split is None else split, options
        super().__init__(model, **options | FIXED)

    def _config_of(self, options: dict[str, Any]) -> EngineConfig:
        if not isinstance(self._split, SplitConfig):
            raise ValueError(f"split={self._split!r}: expected a SplitConfig")
        for name in FIXED.keys() & self._own_options.keys():
            raise ValueError(f"{name}={self._own_options[name]!r}: a split execution always has {FIXED[name]!r}")
        return super()._config_of(options)

    def _start(self) -> Engine:
        return start_engine(self.config, self._launch, functools.partial(build_host_side, self._split))

    @property
    def counted(self) -> TransferLedger:
        """The ledger of what has crossed since this was made."""
        self._check_open()
        return self.engine.worker.channel.ledger

    @property
    def predicted(self) -> TransferLedger:
        """The ledger of what was predicted to cross in the passes that ran."""
        self._check_open()
        return self.engine.worker.notes.predicted
