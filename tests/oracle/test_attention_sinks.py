"""The engine with attention sinks, held to the oracle far past the trained length.

The oracle is fed the engine's own tokens. Where every token is the oracle's best, greedy generation by the oracle gives
the same tokens, by induction.
"""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from penstock.engine.llm import LLM
from penstock.engine.output import CompletionOutput
from penstock.scheduler.batching.request import SamplingParams
from torch import Tensor

from tests.support.oracle.cases import SUMS_ALIKE
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.oracle.compare import apart
from tests.support.oracle.sink_faults import CHUNK, SINKS, WINDOW, WRONG
from tests.support.oracle.sink_oracle import eviction_chunk, held_indices, sink_logits
from tests.support.oracle.sink_runs import run_on_ranks
from tests.support.oracle.variants import VARIANTS
from tests.support.rounding import LOUD, assert_apart, logprobs_apart

TRAINED = 64  # positions
TINY = {"num_hidden_layers": 2, "max_position_embeddings": TRAINED}
OPTIONS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4}
OPTIONS["debug"] = {"page_order_seed": 5, "poison": True}
NUM_LOGPROBS = 5
GREEDY = {"temperature": 0, "ignore_eos": True, "logprobs": NUM_LOGPROBS}
TOKENS = random.Random(9).choices(range(128), k=200)
PROMPT = TOKENS[:5]


@dataclass(frozen=True)
class Schedule:
    sinks: int
    window: int
    page_size: int

    @property
    def options(self) -> dict[str, int]:
        return {"attention_sinks": self.sinks, "attention_window": self.window, "page_size": self.page_size}

    def held(self, num_tokens: int) -> list[list[int]]:
        return held_indices(num_tokens, self.sinks, self.window, eviction_chunk(self.window, self.page_size))

    def apart(self, model) -> float:
        """Of logits over what is held, as a share of the largest."""
        return apart(model, self.sinks + self.window)

    def __str__(self) -> str:
        return f"{self.sinks}+{self.window}by{self.page_size}"


USUAL = Schedule(4, 40, 16)
SCHEDULES = [
    Schedule(4, 40, 4),  # chunks of two pages
    Schedule(16, 32, 16),  # the sinks fill a page
    Schedule(6, 40, 8),  # the sinks share a page
    Schedule(13, 40, 8),  # the sinks share their second page
    Schedule(0, 40, 8),
    Schedule(4, 43, 8),  # the cache ends inside a page
    Schedule(1, 16, 16),  # a page is all that goes
    Schedule(5, 59, 1),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directory and the transformers model of a variant, made once."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(variant: str):
        if variant not in made:
            made[variant] = str(folder / variant), write_checkpoint(folder / variant, variant, **TINY)
        return made[variant]

    return get


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(**GREEDY, max_tokens=max_tokens)


def generate(directory: str, schedule: Schedule, prompts: list[list[int]], params, **options: Any):
    """Sequences of each prompt."""
    with LLM(directory, **OPTIONS | schedule.options | options) as llm:
        return [output.outputs for output in llm.generate(prompts, params)]


def fed(prompt: list[int], output: CompletionOutput) -> list[int]:
    """Tokens of the sequence but the last, which nothing attended to."""
    return prompt + output.token_ids[:-1]


def reference_logits(model, schedule: Schedule, prompt: list[int], output: CompletionOutput) -> Tensor:
    """The reference's logits (generated, vocab)."""
    tokens = fed(prompt, output)
    return sink_logits(model, tokens, schedule.held(len(tokens)))[len(prompt) - 1 :]


def wrong_choices(model, schedule: Schedule, output: CompletionOutput, reference: Tensor) -> list[int]:
    """The indices of greedy tokens that are neither the reference's best nor the second of two as good as equal."""
    values, tokens = reference.topk(2, dim=-1)
    near = values[:, 0] - values[:, 1] < 2 * schedule.apart(model) * reference.abs().amax(-1)
    chosen = torch.tensor(output.token_ids)
    right = (chosen == tokens[:, 0]) | near & (chosen == tokens[:, 1])
    return (~right).nonzero().flatten().tolist()


def logprob_error(model, schedule: Schedule, output: CompletionOutput, reference: Tensor) -> float:
    """The largest |difference| over the sequence, of all tokens whose log probabilities were asked for, as a multiple
    of the one that another order of sums may make."""
    assert len(output.logprobs) == len(reference) and all(len(top) >= NUM_LOGPROBS for top in output.logprobs)
    entries = [
        (row, token, entry.logprob) for row, by_id in enumerate(output.logprobs) for token, entry in by_id.items()
    ]
    rows, tokens, ours = zip(*entries)
    error = float((torch.tensor(ours) - reference.log_softmax(-1)[rows, tokens]).abs().max())
    return error / logprobs_apart(float(reference.abs().max()), reference.shape[-1], schedule.apart(model))


def check(model, schedule: Schedule, prompt: list[int], output: CompletionOutput, num_tokens: int) -> None:
    assert len(output.token_ids) == num_tokens
    reference = reference_logits(model, schedule, prompt, output)
    assert not (wrong := wrong_choices(model, schedule, output, reference)), f"another token at {wrong[:10]}"
    assert_apart(logprob_error(model, schedule, output, reference), 1.0)


def check_greedy(models, variant: str, schedule: Schedule, num_tokens: int, **options: Any) -> None:
    directory, model = models(variant)
    ((output,),) = generate(directory, schedule, [PROMPT], greedy(num_tokens), **options)
    check(model, schedule, PROMPT, output, num_tokens)


@pytest.mark.parametrize("num_tokens", [500, pytest.param(3000, marks=pytest.mark.soak)], ids=["hundreds", "thousands"])
def test_many_times_what_is_held(models, num_tokens):
    """Generates many times the tokens that are held: some thirty evictions, behind which nothing but the tokens
    changes."""
    check_greedy(models, "llama_gqa", USUAL, num_tokens, resident="none")


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
def test_thousands_of_tokens_on_a_gpu(models, enforce_eager):
    check_greedy(models, "llama_gqa", USUAL, 3000, device="cuda", resident="none", enforce_eager=enforce_eager)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules(models, schedule):
    check_greedy(models, "llama_gqa", schedule, 150, resident="none" if schedule.page_size == 8 else "all")


# Variants that are as another one but for the angles, of which every kind is tried.
SAME_KINDS = ("llama_theta", "qwen2_yarn", "neox_linear")


def marks_of(variant: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.tolerance] * (variant in SUMS_ALIKE) + [pytest.mark.soak] * (variant in SAME_KINDS)


@pytest.mark.parametrize("variant", [pytest.param(one, marks=marks_of(one)) for one in VARIANTS])
def test_variants(models, variant):
    """Generates in every variant, with eight evictions or more. Where layers have windows of their own no more is held
    than fits into these, so that sinks are always in sight."""
    _, model = models(variant)
    schedule = Schedule(2, 14, 4) if getattr(model.config, "sliding_window", None) else Schedule(3, 45, 8)
    check_greedy(models, variant, schedule, 110, resident="none")


@dataclass(frozen=True)
class OnRanks:
    """A case on several ranks."""

    variant: str
    num_ranks: int
    resident: str | float
    schedule: Schedule = Schedule(3, 45, 8)
    num_tokens: int = 100

    def __str__(self) -> str:
        return f"{self.variant}-{self.num_ranks}-{self.resident}"

    def told(self, directory: str) -> dict[str, Any]:
        """The case as sink_runs.py is told it."""
        options = OPTIONS | self.schedule.options | {"resident": self.resident}
        params = GREEDY | {"max_tokens": self.num_tokens}
        return {"model": directory, "options": options, "prompt": PROMPT, "params": params}


ON_RANKS = [
    OnRanks("neox_parallel", 2, "all"),
    OnRanks("qwen3", 2, 0.5),
    OnRanks("mistral_window", 2, "none", Schedule(2, 14, 4)),
    OnRanks("llama_gqa", 2, "none", USUAL, 200),  # many times what is held
    OnRanks("llama_gqa", 4, "none"),
]


@pytest.fixture(scope="module")
def output_of(models, tmp_path_factory):
    """The output of a case on several ranks. One launch serves all that have as many."""
    made = {}

    def get(case: OnRanks) -> CompletionOutput:
        if case not in made:
            told = {str(one): one.told(models(one.variant)[0]) for one in ON_RANKS if one.num_ranks == case.num_ranks}
            outputs = run_on_ranks(case.num_ranks, tmp_path_factory.mktemp("ranks"), told)
            made.update((one, outputs[str(one)]) for one in ON_RANKS if one.num_ranks == case.num_ranks)
        return made[case]

    return get


@pytest.mark.parametrize(
    "case", [pytest.param(one, id=str(one), marks=[pytest.mark.soak] * (one.num_ranks > 2)) for one in ON_RANKS]
)
def test_on_several_ranks(models, output_of, case):
    """They differ from one only in sums, which are many in every token."""
    _, model = models(case.variant)
    check(model, case.schedule, PROMPT, output_of(case), case.num_tokens)


@pytest.mark.tolerance
@pytest.mark.parametrize("max_num_batched_tokens", [7, 16, 64, 8192])
@pytest.mark.parametrize("schedule", [USUAL, Schedule(3, 37, 4), Schedule(0, 40, 8)], ids=str)
def test_prompt_longer_than_the_cache(models, schedule, max_num_batched_tokens):
    directory, model = models("llama_gqa")
    ((output,),) = generate(
        directory, schedule, [TOKENS], greedy(30), resident="all", max_num_batched_tokens=max_num_batched_tokens
    )
    check(model, schedule, TOKENS, output, 30)


@pytest.mark.parametrize("schedule", [Schedule(4, 40, 8), Schedule(3, 21, 4)], ids=str)
def test_prompts_of_every_length_in_one_batch(models, schedule):
    """Generates for prompts of up to twice the cache, more of them than there are rows, so that rows are used again."""
    directory, model = models("llama_gqa")
    prompts = [TOKENS[:n] for n in range(1, 2 * (schedule.sinks + schedule.window))]
    options = {"resident": "all", "max_num_seqs": 24, "max_num_batched_tokens": 100}
    outputs = generate(directory, schedule, prompts, greedy(12), **options)
    for prompt, (output,) in zip(prompts, outputs):
        check(model, schedule, prompt, output, 12)


def test_sampled_together_and_alone(models):
    """Samples rows at different stages of their schedules, two of them of one prompt: a row's tokens depend on no other
    row."""
    directory, model = models("llama_gqa")
    schedule, options = Schedule(4, 40, 8), {"resident": "none", "max_num_batched_tokens": 48}
    lengths, num_tokens, seeds = (3, 61, 150, 44), (200, 90, 120, 31), (11, 22, 33, 44)
    prompts = [TOKENS[-n:] for n in lengths]
    shared = {"temperature": 1.0, "ignore_eos": True, "logprobs": NUM_LOGPROBS}
    asked = [
        SamplingParams(n=2 if index == 1 else 1, max_tokens=n, seed=seed, **shared)
        for index, (n, seed) in enumerate(zip(num_tokens, seeds))
    ]
    with LLM(directory, **OPTIONS | schedule.options | options) as llm:
        for prompt, params, together in zip(prompts, asked, llm.generate(prompts, asked)):
            for index, output in enumerate(together.outputs):
                own = SamplingParams(max_tokens=params.max_tokens, seed=params.seed + index, **shared)
                (alone,) = llm.generate([prompt], own)[0].outputs
                assert output.token_ids == alone.token_ids
                assert len(output.token_ids) == params.max_tokens
                reference = reference_logits(model, schedule, prompt, output)
                assert_apart(logprob_error(model, schedule, output, reference), 1.0)


def test_comparison_passes_without_sinks(models):
    """Compares with an engine without sinks: both agree as long as nothing would be evicted."""
    directory, model = models("llama_gqa")
    with LLM(directory, **OPTIONS) as llm:
        (output,) = llm.generate([PROMPT], greedy(40))[0].outputs
    check(model, Schedule(4, TRAINED - 4, 16), PROMPT, output, 40)


@pytest.fixture(scope="module")
def generated(models):
    """Outputs of the engine by the schedule that the wrong references miss."""
    schedule = Schedule(SINKS, WINDOW, page_size=CHUNK)
    assert eviction_chunk(WINDOW, CHUNK) == CHUNK
    directory, model = models("llama_gqa")
    ((output,),) = generate(directory, schedule, [PROMPT], greedy(300), resident="all")
    check(model, schedule, PROMPT, output, 300)
    return output


@pytest.mark.parametrize("mistake", WRONG)
def test_comparison_fails_with_a_wrong_reference(models, generated, mistake):
    _, model = models("llama_gqa")
    schedule = Schedule(SINKS, WINDOW, page_size=CHUNK)
    reference = WRONG[mistake](model, fed(PROMPT, generated))[len(PROMPT) - 1 :]
    assert logprob_error(model, schedule, generated, reference) > LOUD
    assert wrong_choices(model, schedule, generated, reference)
