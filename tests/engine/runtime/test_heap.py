"""Sees that what an LLM holds stands aside while it is open, and comes back when it is closed or dropped."""

import gc

import pytest
from penstock.engine.llm import LLM
from penstock.scheduler.batching.request import SamplingParams


@pytest.mark.parametrize("closes", [True, False])
def test_an_llm_is_set_aside_until_it_ends(closes):
    """So that a full collection looks at little, which it does in jobs of a few hundred requests."""
    gc.unfreeze()
    llm = LLM("demo", device="cpu", max_model_len=64, max_num_seqs=4)
    num_left = len(gc.get_objects())
    assert gc.get_freeze_count() > 10 * num_left
    llm.generate([[5, 6, 7]] * 6, SamplingParams(max_tokens=3))
    assert gc.get_freeze_count() > 10 * num_left
    if closes:
        llm.close()
    else:
        del llm
    assert gc.get_freeze_count() == 0
