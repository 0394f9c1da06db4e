"""KV pages that move to host memory and back: with graphs and eager, resident and streamed, and bit by bit."""

import random

import pytest
import torch
from penstock.engine.compute.kv_cache import KVCache
from penstock.engine.runtime.lanes import CudaLanes
from penstock.engine.runtime.page_moves import PageMover
from penstock.scheduler.batching.host_pages import Move

from penstock import LLM, SamplingParams
from tests.support.rows_giving_way import (
    FEW_PAGES,
    OPTIONS,
    PROMPTS,
    assert_as_alone,
    assert_rows_gave_way,
    each_alone,
    generate_twice_each,
)

pytestmark = pytest.mark.gpu
# Rates at which the link never binds and computing costs much, so that pages move.
RATES = {"device_profile": "cpu", "link_gb_s": 1e4}
ON_GPU = OPTIONS | RATES | {"device": "cuda", "gpu_memory": "2GiB", "kv_host_memory": "4MiB"}


@pytest.fixture(scope="module")
def alone():
    return each_alone("cuda")


@pytest.mark.parametrize("resident", ["all", "none"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_each_request_is_as_alone(alone, resident, enforce_eager):
    options = {"resident": resident, "enforce_eager": enforce_eager, "debug": {"poison": True}}
    with LLM("demo", **ON_GPU, **FEW_PAGES, **options) as llm:
        assert (llm.engine.worker.runner.graphs is None) == enforce_eager
        for _ in range(3):
            assert_as_alone(generate_twice_each(llm), alone)
        assert_rows_gave_way(llm)
        moves = llm.loop.scheduler.counts.to_dict()["moves"]
        moved = llm.engine.transfers[0]["kv_pages"]["total"]
        assert moves["num_out"] > 20 and moves["num_in"] > 5
        assert (moved["received_bytes"], moved["sent_bytes"]) == (moves["out_bytes"], moves["in_bytes"])


def test_pages_that_came_back_change_no_token():
    """Prefixes that are more than the cache holds, in turn, in bf16 and in graphs: what is read is what was written."""
    prompts = [text * 16 for text in PROMPTS]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    options = ON_GPU | {"dtype": "bfloat16", "max_model_len": 128, "num_pages": 33, "max_num_seqs": 2}
    with LLM("demo", **options) as llm:
        first = [llm.generate(prompt, params)[0] for prompt in prompts]
        again, third = ([llm.generate(prompt, params)[0] for prompt in prompts] for _ in range(2))
        assert llm.loop.scheduler.counts.moves.num_in > 10
    assert any(one.num_cached_tokens > 8 for one in again)
    assert [one.outputs[0].token_ids for one in third] == [one.outputs[0].token_ids for one in again]
    assert [one.outputs[0].text for one in first]


@pytest.mark.parametrize("num_staged", [1, 3])
def test_moves_are_as_if_one_after_another(num_staged):
    """Passes that write all pages, or compute for long, come right before and behind the moves."""
    device, rng = torch.device("cuda"), random.Random(0)
    cache = KVCache(8, 40, 16, 8, 128, torch.bfloat16, device)
    mover = PageMover(cache.pages, 64, num_staged, CudaLanes(device), poison=True)
    busy, held = torch.randn(4096, 4096, device=device), {}
    for _ in range(20):
        cache.data.copy_(torch.randn(cache.data.shape, device=device))
        busy @ busy
        pages, moves = {page: cache.pages[page].clone() for page in range(40)}, []
        for _ in range(rng.randrange(30)):
            page, host_page = rng.randrange(1, 40), rng.randrange(64)
            move = Move(page, host_page, is_out=host_page not in held or rng.random() < 0.5)
            if move.is_out:
                held[host_page] = pages[page]
            else:
                pages[page] = held[host_page]
            moves.append(move)
        mover.run(moves)
        seen = cache.data.clone()
        cache.data.zero_()  # the next pass writes at once what was moved out
        got = seen.view(16, 40, -1).transpose(0, 1)
        assert all(torch.equal(got[page], expected) for page, expected in pages.items())
    torch.cuda.synchronize()
    for host_page, expected in held.items():
        assert torch.equal(mover.host[host_page], expected.cpu())
    mover.close()
