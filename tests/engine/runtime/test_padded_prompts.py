"""Passes with prompts as a GPU has them, padded to a bucket, on a CPU: which batches are padded, and what padding
holds never reaches a real row."""

import random
from collections.abc import Callable

import pytest
import torch
from penstock.engine.compute import attention, bind
from penstock.engine.compute.context import PassContext
from penstock.engine.kernels import prompt_attention
from penstock.engine.kernels.segments import Segments
from penstock.engine.llm import LLM
from penstock.engine.runtime.bucket_sizes import BucketSizes
from penstock.engine.runtime.watch import Watch
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.pass_plan import Compute, Instruction

from tests.support.kernel_registry import KERNELS

OPTIONS = {"device": "cpu", "dtype": "float32", "page_size": 4, "max_model_len": 96, "max_num_seqs": 6}
SEGMENTS = Segments(num_kv_heads=8, max_context=8192, num_cached=800_000)
LARGE = 1e30  # in logits, whose NaN is refused in any row


def batch(*rows: tuple[int, int]) -> Batch:
    """A batch of rows (start, number of tokens)."""
    made = [BatchRow(i, (7,) * num, start, (1,) * 64, True, None) for i, (start, num) in enumerate(rows)]
    return Batch.of(made)


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        ([(0, 2)], (64, 0, 32, 32, 0)),
        ([(0, 65)], (128, 0, 32, 32, 0)),
        ([(0, 300)], (320, 0, 32, 32, 0)),
        ([(0, 512)], (512, 0, 32, 32, 0)),
        ([(0, 513)], (640, 256, 32, 256, 646)),
        ([(40, 1), (0, 60), (0, 3)], (64, 64, 32, 64, 256)),  # its rows of one token count among its tokens
        ([(40, 1), (0, 60), (0, 4)], (128, 128, 32, 128, 512)),
        ([(0, 1024)], (1024, 256, 32, 256, 646)),
        ([(0, 1000), (0, 1000)], (2048, 256, 32, 256, 646)),
        ([(0, 3)] * 33, None),  # more prompts than there is room for
        ([(0, 700), (0, 700), (0, 700)], None),
        ([(40, 1)] * 3, (8, 8, 0, 8, 8)),  # a decode pass
        ([(40, 1), (600, 1)], (8, 8, 0, 8, 128)),  # one row is cut into three
        ([(16, 8), (0, 30)], (64, 0, 32, 32, 0)),  # a chunk that continues
    ],
)
def test_which_batches_are_padded_to_what(rows, size):
    given = batch(*rows)
    assert BucketSizes(8192, 256, SEGMENTS).find(given) == size
    assert given.shape.is_padded == (size is not None)  # as the time model sees it


def test_a_row_that_is_not_sampled_is_in_no_decode_pass():
    row = BatchRow(0, (7,), 40, (1,) * 64, False, None)
    assert BucketSizes(8192, 256, SEGMENTS).find(Batch((row,))) is None


@pytest.mark.parametrize(
    "most_tokens, max_num_seqs", [(1, 1), (2, 1), (6, 6), (100, 6), (700, 256), (8192, 512), (8192, 2500)]
)
def test_no_size_is_larger_than_what_the_activations_hold(most_tokens, max_num_seqs):
    """There are at most 40 sizes with prompts, and each batch that is padded has one of these."""
    sizes = BucketSizes(most_tokens, max_num_seqs, SEGMENTS)
    prompts = sizes.with_chunks
    assert all(size.num_tokens <= min(most_tokens, 2048) == prompts[-1].num_tokens for size in prompts)
    assert all(size.num_sampled <= max_num_seqs and size.num_chunks > 0 for size in prompts)
    assert len(set(prompts)) == len(prompts) <= 40 and bool(prompts) == (most_tokens > 1)
    assert sizes.most_tokens == max(max_num_seqs, min(most_tokens, 2048))
    for num_tokens in range(2, most_tokens + 1):
        assert sizes.find(batch((0, num_tokens))) in [*prompts, *[None] * (num_tokens > 2048)]


class Filling(Watch):
    """Fills what padding holds in passes with prompts, whatever a step has made of it; counts such passes."""

    def __init__(self):
        self.num_passes = 0

    def around(self, instruction: Instruction, ctx: PassContext | None, run: Callable[[], None]) -> None:
        run()
        if not isinstance(instruction, Compute) or len(ctx.inputs.tokens) <= OPTIONS["max_num_seqs"]:
            return
        pad_row = ctx.model.sampler.pad_row
        padded = {len(rows): rows == pad_row for rows in (ctx.inputs.token_rows, ctx.inputs.sampled_rows_device)}
        self.num_passes += instruction.step == "sample" and bool(padded[len(ctx.inputs.tokens)].any())
        for name, effect in instruction.effects:
            if "x" not in effect and set(effect) & set("+w"):
                act = ctx.act[name]
                act[padded[len(act)]] = LARGE if name in ("logits", "part") else torch.nan


@pytest.mark.parametrize("resident", ["all", "none"])
def test_what_padding_holds_never_reaches_a_real_row(resident):
    """Rows of one token stand beside prompts, which come as rows end; tokens are those of passes without padding."""
    rng = random.Random(3)
    prompts = [rng.choices(range(1, 1000), k=rng.randint(2, 40)) for _ in range(14)]
    params = [SamplingParams(temperature=0, max_tokens=rng.randint(2, 9), ignore_eos=True) for _ in prompts]
    params[3] = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=6, frequency_penalty=0.4)
    with LLM("demo", resident=resident, **OPTIONS) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with LLM("demo", resident=resident, debug={"as_on_gpu": True}, **OPTIONS) as llm:
        filling = Filling()
        with llm.engine.watched_by(filling):
            assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        buckets = llm.engine.worker.runner.buckets
        assert filling.num_passes >= 3 and any(size.num_single and size.num_chunks for size in buckets)


@pytest.mark.parametrize("resident", ["all", "none"])
def test_chunks_that_continue_read_pages_in_padded_passes(resident, monkeypatch):
    """Chunks of prompts that are cut, and prompts whose beginning is cached, beside rows of one token and prompts that
    start; tokens are those of passes without padding, which copy what these chunks attend to."""
    monkeypatch.setattr(bind, "LEAST_QUERIES", 0)
    rng = random.Random(4)
    shared = rng.choices(range(1, 1000), k=22)
    prompts = [(shared if i % 3 else []) + rng.choices(range(1, 1000), k=rng.randint(2, 40)) for i in range(14)]
    params = [SamplingParams(temperature=0, max_tokens=rng.randint(2, 9), ignore_eos=True) for _ in prompts]
    cut = OPTIONS | {"resident": resident, "max_num_batched_tokens": 24}
    took = {}
    for as_on_gpu in (False, True):
        before = dict(attention.calls)
        with LLM("demo", debug={"as_on_gpu": as_on_gpu}, **cut) as llm:
            tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
            cached = llm.loop.scheduler.counts.num_hit_tokens
        took[as_on_gpu] = tokens, {way: attention.calls[way] - before[way] for way in ("behind", "gathered")}
        assert cached > 0
    (plain, copies), (padded, pages) = took[False], took[True]
    assert padded == plain
    assert copies["gathered"] > 0 == copies["behind"] and pages["behind"] > 0 == pages["gathered"]


@pytest.mark.parametrize("as_on_gpu", [False, True], ids=["eager", "padded"])
def test_tiles_give_the_bits_of_addresses(as_on_gpu, monkeypatch):
    """In the engine, through the kernel; one prompt is cut, and continues."""
    kernel, rng = KERNELS["prompt_attention"], random.Random(5)
    kernel.put_in(monkeypatch, kernel.kernel)
    prompts = [rng.choices(range(1, 1000), k=length) for length in (150, 20, 133)]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=2)
    options = OPTIONS | {"max_model_len": 160, "max_num_batched_tokens": 256, "debug": {"as_on_gpu": as_on_gpu}}
    took, tuning = {}, prompt_attention._tuning
    for tiles in (False, True):
        monkeypatch.setattr(prompt_attention, "_tuning", lambda q, tiles=tiles: tuning(q) | {"TILES": tiles})
        before = dict(prompt_attention.calls)
        with LLM("demo", **options) as llm:
            outputs = [output.outputs[0].logprobs for output in llm.generate(prompts, params)]
        took[tiles] = outputs, {way: prompt_attention.calls[way] - before[way] for way in before}
    (plain, addresses), (tiled, copies) = took[False], took[True]
    assert plain == tiled
    assert addresses["triton"] == copies["triton"] > 0 == addresses["tiles"] and copies["tiles"] > 0
