"""Requests that come and go at random, between passes and while one runs, and have the tokens that each has alone."""

import dataclasses
import random

from penstock.engine.loop import Loop
from penstock.engine.output import Sequence
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.request import Request

from penstock import LLM, SamplingParams
from tests.support.fake_engine import BusyEngine
from tests.support.watches import BeginPass

# Engines with pages for all of their rows, and for a third of them, with host memory for some of the rest.
ROOMY = {"dtype": "float32", "max_num_batched_tokens": 16, "page_size": 4, "max_model_len": 64}
ROOMY |= {"max_num_seqs": 8, "scheduling_policy": "priority"}
CROWDED = ROOMY | {"num_pages": 20, "kv_host_memory": "1MiB"}
SAMPLING = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 2},
)


def requests(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts and parameters; every fourth of these ends by the value of a token, which nobody foresees."""
    rng, asked = random.Random(seed), []
    for number in range(14):
        prompt = rng.choices(range(1, 500), k=rng.choice([1, 2, rng.randint(3, 30)]))
        stop = rng.sample(range(2048), 512) if number % 4 == 3 else None
        own = {"max_tokens": rng.randint(1, 10), "seed": rng.randrange(2**32), "stop_token_ids": stop}
        asked.append((prompt, SamplingParams(**own, ignore_eos=True, **rng.choice(SAMPLING))))
    return asked


def crowd(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Such requests, most of which begin alike and get longer outputs, and of which some are urgent."""
    rng, asked = random.Random(seed), requests(seed) + requests(seed + 1)
    begins = rng.choices(range(1, 500), k=16)
    return [
        (
            begins[: rng.choice([0, 8, 16])] + prompt[:14],
            dataclasses.replace(params, max_tokens=params.max_tokens + 24, priority=rng.randint(-1, 2)),
        )
        for prompt, params in asked
    ]


class Company:
    """Requests that are added at random, of which every fifth is aborted at a random time."""

    def __init__(self, llm: LLM, asked: list[tuple[list[int], SamplingParams]], seed: int):
        self.asked, self.rng = asked, random.Random(seed)
        self.engine = BusyEngine(llm.engine, self.come_and_go)
        self.loop = Loop(llm.loop.scheduler, self.engine)
        self.sequences: list[Sequence] = []
        self.batches: list[Batch] = []

    def come_and_go(self) -> None:
        for _ in range(self.rng.choice([0, 0, 1, 2, 3])):
            if len(self.sequences) < len(self.asked):
                self.add(len(self.sequences), *self.asked[len(self.sequences)])
        for number in range(4, len(self.sequences), 5):
            if self.rng.random() < 0.1:
                self.loop.abort(self.sequences[number].request.id, "nobody listens")

    def add(self, number: int, prompt: list[int], params: SamplingParams) -> None:
        self.sequences.append(Sequence(Request(number, prompt, params, seed=params.seed), 0, None, {}))
        self.loop.add(self.sequences[-1])

    def run(self) -> None:
        with self.engine.watched_by(BeginPass(self.batches.append)):
            while len(self.sequences) < len(self.asked) or self.loop.has_unfinished:
                self.come_and_go()
                self.loop.advance()
                self.loop.scheduler.check_integrity()


def assert_same(sequences: list[Sequence], alone: list[list[int]]) -> None:
    """Asserts that tokens are those of the request alone; of one that may have been aborted, the first of them."""
    for number, (sequence, expected) in enumerate(zip(sequences, alone, strict=True)):
        output = sequence.output()
        aborted = number % 5 == 4 and output.finish_reason == "abort"
        assert output.token_ids == expected[: len(output.token_ids)]
        assert aborted or (len(output.token_ids) == len(expected) and output.error is None)


def each_alone(llm: LLM, asked: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """The tokens of each request, alone."""
    return [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt, params in asked]


def run_in_company(llm: LLM, seed: int) -> Company:
    """Runs requests alone, then as they come and go, and compares."""
    asked = requests(seed)
    alone = each_alone(llm, asked)
    llm.reset_prefix_cache()
    company = Company(llm, asked, seed)
    company.run()
    assert_same(company.sequences, alone)
    return company


def run_in_a_crowd(llm: LLM, seed: int, alone: list[list[int]]) -> None:
    """Runs a crowd in an engine that is CROWDED. Asserts that each has the tokens that it has alone, that rows gave
    way, prompts found pages of others and pages moved both ways, and that none is lost."""
    company = Company(llm, crowd(seed), seed)
    company.run()
    assert_same(company.sequences, alone)
    scheduler = llm.loop.scheduler
    counts, moves = scheduler.counts, scheduler.counts.moves
    assert counts.num_preemptions > 2 and counts.num_hit_tokens > 30 and moves.num_out > 50 and moves.num_in > 2
    assert {one.output().finish_reason for one in company.sequences} == {"length", "stop", "abort"}
    assert scheduler.num_free_pages == CROWDED["num_pages"] - 1
