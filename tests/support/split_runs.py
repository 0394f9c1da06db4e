"""The same requests for the plain engine and for a split execution."""

import torch
from penstock.engine.llm import LLM
from penstock.engine.split.llm import SplitLLM
from penstock.engine.split.transfers import SplitConfig
from penstock.scheduler.batching.request import SamplingParams

from tests.support.oracle.cases import prompts
from tests.support.oracle.engine_runs import capture_logits

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


def split(path: str, **config) -> SplitLLM:
    return SplitLLM(path, SplitConfig(**config), **OPTIONS)
