"""The same requests for the plain engine and for a split execution."""

import math

import torch
from penstock.engine.llm import LLM
from penstock.engine.split.llm import SplitLLM
from penstock.engine.split.transfers import SplitConfig
from penstock.scheduler.batching.request import SamplingParams

from tests.support.oracle.cases import PROMPT_LENGTHS, prompts
from tests.support.oracle.engine_runs import capture_logits
from tests.support.rounding import model_apart

# three rows of 5, 37 and 90 tokens: chunks, passes with rows of different kinds, then decode passes
OPTIONS = {"max_num_batched_tokens": 48, "max_num_seqs": 3, "page_size": 8, "max_model_len": 160}
OPTIONS["debug"] = {"page_order_seed": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def generate(llm: LLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (prompts, n), chosen greedily, and logits (prompts, n, vocab)."""
    logits = capture_logits(llm)
    outputs = llm.generate(prompts(), GREEDY)
    tokens = torch.tensor([output.outputs[0].token_ids for output in outputs])
    return tokens, torch.stack([torch.stack(logits[row]) for row in sorted(logits)])


def apart(llm: LLM, wire: torch.dtype = torch.float32) -> float:
    """Says how far logits may be from the plain engine's for these requests, as a share of the largest: for the order
    of sums, or for results that the split execution, alone of the two, rounds to `wire`."""
    both = model_apart(llm.engine.plan.spec, max(PROMPT_LENGTHS) + GREEDY.max_tokens, wire)
    return both if wire == torch.float32 else both / math.sqrt(2)


def split(path: str, **config) -> SplitLLM:
    return SplitLLM(path, SplitConfig(**config), **OPTIONS)
