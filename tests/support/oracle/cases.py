"""Lists which variants run at which tp_size, residency and dtype; and how the engine is set up for each."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.oracle.variants import VARIANTS

TP_SIZES = (1, 2, 4)
ROPE_ONLY = (  # variants that shard as another one does: two ranks are enough for them
    *("llama_theta", "llama_linear", "llama_llama3", "llama_yarn", "llama_yarn_mscale", "llama_dynamic"),
    *("qwen2_yarn", "neox_partial_rotary", "neox_linear"),
)
# What stands for all where the order of sums is the question: how angles come about changes no sum but theirs.
SUMS_ALIKE = tuple(variant for variant in VARIANTS if variant == "llama_yarn" or variant not in ROPE_ONLY)
MEET_ALL = ("llama_gqa", "neox_parallel")  # variants that meet every residency on every number of ranks
RESIDENCIES = ("all", "none", 0.5)
LANES = ("earliest", "latest", "random")
PROMPT_LENGTHS = (5, 37, 90)
MAX_NUM_BATCHED_TOKENS = 48
_SMALLEST_VOCAB = 128
# What scripts/check_numerics.py runs in tests: `compare(checkpoint, TOKENS, **RUN)`.
NUM_LAYERS = 3  # of every variant
TOKENS = random.Random(3).choices(range(_SMALLEST_VOCAB), k=40)
RUN = {
    "max_tokens": 4,
    "device": "cpu",
    "resident": "none",
    "debug": {"lanes": "random"},
    "max_num_batched_tokens": 24,
    "max_num_seqs": 4,
}


@dataclass(frozen=True)
class Case:
    variant: str
    tp_size: int
    resident: str | float
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def id(self) -> str:
        return f"{self.variant}-tp{self.tp_size}-{self.resident}-{self.dtype}"

    @property
    def checkpoint(self) -> str:
        """The name of the directory with the checkpoint that it runs."""
        return f"{self.variant}-{self.dtype}"

    @property
    def max_tokens(self) -> int:
        """Number of tokens. More ranks take longer and differ only in sums, which are many in every token; on one rank
        residencies differ in nothing but where weights lie."""
        return (64 if self.resident == "none" else 16) if self.tp_size == 1 else {2: 16}.get(self.tp_size, 8)

    @property
    def num_passes(self) -> int:
        """Number of passes: 5 + 37 + 6 of 90 tokens, then 2 + 46, then 2 + 38, so that the longest prompt samples first
        in the third pass."""
        return 3 + self.max_tokens - 1

    @property
    def options(self) -> dict[str, Any]:
        """Options of the engine. Page sizes and lane orders take turns, so that each meets several residencies and
        tp_sizes."""
        turn = list(VARIANTS).index(self.variant) + self.tp_size // 2 + RESIDENCIES.index(self.resident)
        return {
            "device": self.device,
            "tensor_parallel_size": self.tp_size,
            "resident": self.resident,
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
            "max_num_seqs": len(PROMPT_LENGTHS),
            "page_size": (8, 16)[turn % 2],
            "debug": {"page_order_seed": turn, "lanes": LANES[turn // 2 % len(LANES)], "poison": True},
        }


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, _SMALLEST_VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def fp32_cases() -> list[Case]:
    """Cases in fp32: on one rank every variant with each residency; on more ranks the residencies take turns, but two
    variants meet all; on four ranks only variants that shard in a way of their own."""
    cases = [Case(variant, 1, resident) for variant in VARIANTS for resident in RESIDENCIES]
    for n in TP_SIZES[1:]:
        for turn, variant in enumerate(VARIANTS):
            if n == TP_SIZES[-1] and variant in ROPE_ONLY:
                continue
            turns = RESIDENCIES if variant in MEET_ALL else [RESIDENCIES[(turn + n // 2) % len(RESIDENCIES)]]
            cases += [Case(variant, n, resident) for resident in turns]
    return cases


def usual_cases() -> list[Case]:
    """Those of the cases in fp32 that need no soak: on one rank every variant streams whole, and "all" and a half take
    turns; on two a change of angles alone, which no rank cuts, is tried once for each family that has some."""
    once = ("llama_yarn", "qwen2_yarn", "neox_partial_rotary")
    turns = {variant: (RESIDENCIES[0], RESIDENCIES[2])[turn % 2] for turn, variant in enumerate(VARIANTS)}

    def is_usual(case: Case) -> bool:
        if case.variant in MEET_ALL:
            return True
        if case.tp_size == 1:
            return case.resident in ("none", turns[case.variant])
        return case.variant not in ROPE_ONLY or case.variant in once

    return list(filter(is_usual, fp32_cases()))


def half_cases() -> list[Case]:
    """Cases in bf16 and fp16: one variant of each family on one rank, two of them on two."""
    variants = ("llama_llama3", "mistral_window", "qwen2", "qwen3", "neox_parallel", "neox_serial")
    dtypes = ("bfloat16", "float16")
    cases = [Case(v, 1, "none", dtype) for v in variants for dtype in dtypes]
    return cases + [Case(v, 2, 0.5, dtype) for v in ("qwen3", "neox_parallel") for dtype in dtypes]
