"""Passes with prompts as a GPU has them, padded to a bucket, on a CPU: which batches are padded, and what padding
holds never reaches a real row."""

import random
from collections.abc import Callable

import pytest
import torch
from penstock.engine.compute.context import PassContext
from penstock.engine.llm import LLM
from penstock.engine.runtime.prompt_bucket import find_size
from penstock.engine.runtime.watch import Watch
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.passes.pass_plan import Compute, Instruction

OPTIONS = {"device": "cpu", "dtype": "float32", "page_size": 4, "max_model_len": 96, "max_num_seqs": 6}
LARGE = 1e30  # in logits, whose NaN is refused in any row


def batch(*rows: tuple[int, int]) -> Batch:
    """A batch of rows (start, number of tokens)."""
    made = [BatchRow(i, (7,) * num, start, (1,) * 64, True, None) for i, (start, num) in enumerate(rows)]
    return Batch.of(made)


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        ([(0, 2)], (0, 64)),
        ([(0, 65)], (0, 128)),
        ([(0, 513)], (0, 640)),
        ([(40, 1), (0, 60), (0, 4)], (6, 64)),  # as many rows of one token as there may be sequences
        ([(0, 1024)], None),  # attends by itself
        ([(0, 1000), (0, 1000)], (0, 2048)),
        ([(0, 700), (0, 700), (0, 700)], None),
        ([(40, 1)], None),  # no prompt
        ([(16, 8), (0, 30)], None),  # a chunk that continues
    ],
)
def test_which_batches_are_padded_to_what(rows, size):
    assert find_size(batch(*rows), max_num_seqs=6, most_tokens=8192, whole_tokens=range(1024, 9000)) == size


def test_a_pass_is_never_padded_beyond_what_the_activations_hold():
    assert find_size(batch((0, 65)), max_num_seqs=6, most_tokens=100, whole_tokens=range(0)) is None


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
        assert filling.num_passes >= 3 and any(rows for rows, _ in llm.engine.worker.runner.prompt_buckets)
