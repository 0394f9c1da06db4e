"""Attention sinks in the engine: what must hold without an oracle, which is in tests/oracle."""

import numpy
import pytest
import torch
from penstock.engine.compute.bind import Binder
from penstock.engine.compute.page_table import PageTable
from penstock.engine.compute.paged import Cutting
from penstock.engine.kernels.decode_work import reaches_of
from penstock.engine.kernels.segments import Segments
from penstock.engine.split.llm import SplitLLM
from penstock.engine.split.transfers import ATTENTION_WAYS, SplitConfig
from penstock.scheduler.batching.batch import Batch, BatchRow

from penstock import LLM, SamplingParams
from tests.support.engine_proof import apart, prove_calls, prove_states_and_tokens, run_with
from tests.support.kernel_proof import DEVICE
from tests.support.kernel_registry import DRAWN
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.streaming_runs import fill_alike

OPTIONS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 3, "max_num_batched_tokens": 64, "page_size": 4}
SINKS = {"attention_sinks": 3, "attention_window": 21}
PROMPTS = [[5, 17, 3, 99, 42, 8], [7] * 40, list(range(100, 170))]
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=1)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=60, ignore_eos=True, seed=5, logprobs=1)


def outputs_of(options: dict, prompts=PROMPTS, params=GREEDY) -> list:
    """Tokens and the very bits of their log probabilities, of passes that are filled alike."""
    with LLM("demo", **OPTIONS | options) as llm:
        fill_alike(llm)
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
    return [(output.token_ids, output.cumulative_logprob) for output in outputs]


@pytest.fixture(scope="module")
def windowed() -> list:
    return outputs_of({**SINKS, "resident": "all"})


def test_a_window_that_holds_everything_changes_no_bit():
    """Keys that are rotated when they are read are the keys that were rotated before."""
    whole = {"attention_sinks": 3, "attention_window": 509}
    assert outputs_of(whole) == outputs_of({"page_size": 16})


def test_a_window_that_does_not_changes_what_comes(windowed):
    plain = outputs_of({})
    short, *long = ([tokens for tokens, _ in outputs] for outputs in zip(windowed, plain))
    assert short[0][:18] == short[1][:18]  # as long as all is cached
    assert all(first != second for first, second in (short, *long))


@pytest.mark.parametrize(
    "options",
    [
        {"resident": "none", "debug": {"lanes": "random", "poison": True}},
        {"resident": 0.5, "debug": {"lanes": "latest", "poison": True, "page_order_seed": 4}},
        {"resident": "none", "tensor_parallel_size": 1, "max_num_batched_tokens": 63},
    ],
    ids=["streamed", "half streamed", "another budget"],
)
def test_streamed_is_resident_bit_for_bit(windowed, options):
    assert outputs_of({**SINKS, **options}) == windowed


@pytest.mark.tolerance
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_is_what_it_is_alone(params):
    """Tokens are equal, whatever its neighbours evict and however its prompt was cut; sums may be added in another
    order."""
    together = outputs_of({**SINKS, "resident": "all"}, params=params)
    for index, prompt in enumerate(PROMPTS):
        ((tokens, _),) = outputs_of({**SINKS, "max_num_batched_tokens": 7 + index}, [prompt], params)
        assert tokens == together[index][0]


@pytest.mark.tolerance
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_decode_passes_of_a_gpu_give_the_tokens(params):
    """Padded buckets over the paged cache."""
    plain = outputs_of(SINKS, params=params)
    padded = outputs_of(SINKS | {"debug": {"as_on_gpu": True}}, params=params)
    assert [tokens for tokens, _ in padded] == [tokens for tokens, _ in plain]


@pytest.mark.tolerance
@pytest.mark.parametrize("name", ["decode_attention", "decode_inputs", "rope_append"])
def test_kernels_are_their_references(tmp_path, name):
    """The engine gives the same hidden states, tokens and calls, past the first eviction."""
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    write_checkpoint(tmp_path, "neox_parallel", **tiny, max_position_embeddings=64)
    options = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "num_pages": 16, "dtype": "float32", "page_size": 4}
    options |= {"attention_sinks": 2, "attention_window": 5, "resident": "none"}
    first, other = (run_with(str(tmp_path), *names, params=DRAWN, **options) for names in ((), (name,)))
    prove_states_and_tokens(first, other, apart(first))
    prove_calls(other if DEVICE == "cpu" else first, [name])


def test_noise_is_drawn_by_the_position_in_the_sequence():
    """Noise does not depend on the address in the cache, which comes again and again."""
    row = BatchRow(1, (9,), start=100, pages=(4, 2, 3), samples=True, sampling=None, num_evicted=92)
    chunk = row._replace(tokens=(8, 9), start=99)  # which ends with the same token
    cutting = Cutting(Segments(2, 9, 36), (None,), reaches_of((None,), torch.device("cpu")), torch.empty(0))
    table = PageTable(numpy.zeros((1, 3), numpy.int32))
    binder = Binder(4, 1, torch.zeros(4, dtype=torch.int64), 9, cutting, table)
    one, two = (binder.bind(Batch((row,))) for row in (row, chunk))
    assert (one.positions.tolist(), two.positions.tolist()) == ([8], [7, 8])
    assert one.sampled_positions.tolist() == two.sampled_positions.tolist() == [101]
    assert (one.addresses.tolist(), two.addresses.tolist()) == ([3 * 4 + 1], [3 * 4, 3 * 4 + 1])
    assert one.context.paged.lengths.tolist() == [9] and one.context.paged.page_table.tolist() == [[4, 2, 3]]
    (gathered,) = two.context.continuing
    assert gathered.addresses.tolist() == [17, 18, 19, 8, 9, 10, 11, 12, 13]
    assert gathered.positions.tolist() == list(range(9))


def test_pages_do_not_grow():
    with LLM("demo", **OPTIONS, **SINKS) as llm:
        llm.generate(PROMPTS, GREEDY)
        assert llm.loop.scheduler.num_free_pages == llm.loop.scheduler.pool.num_usable
        kv = llm.engine.worker.executor.model.kv
        assert (
            llm.engine.plan.residency.num_pages == 3 * 7 + 1 == len(kv.data[0, 0]) // 4
        )  # 1 of sinks, 6 of the window
        assert llm.loop.scheduler.max_model_len == 2**31 - 1
    with LLM("demo", **OPTIONS, **SINKS, max_model_len=50) as llm:
        (output,) = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=None, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 44


@pytest.mark.parametrize("attention", ATTENTION_WAYS)
def test_a_split_execution_gives_the_tokens(windowed, attention):
    options = {name: value for name, value in OPTIONS.items() if name != "device"}
    with SplitLLM("demo", SplitConfig(attention=attention), **options, **SINKS) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        assert llm.counted == llm.predicted
    assert [output.outputs[0].token_ids for output in outputs] == [tokens for tokens, _ in windowed]
