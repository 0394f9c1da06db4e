"""Requests that come and go at random, so that rows of every kind share passes, have the tokens that each has alone."""

import random

import pytest
from penstock.engine.output import Sequence
from penstock.scheduler.batching.batch import Batch, RowKind
from penstock.scheduler.batching.request import Request

from penstock import LLM, SamplingParams
from tests.support.watches import BeginPass

OPTIONS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 5, "max_num_batched_tokens": 12, "page_size": 4}
FULL = OPTIONS | {"max_model_len": 48}
WAYS = {
    "resident": FULL,
    "padded": FULL | {"debug": {"as_on_gpu": True}},
    "streamed": FULL | {"resident": "none", "debug": {"lanes": "random", "poison": True}},
    "sinks": OPTIONS | {"attention_sinks": 3, "attention_window": 13},
}


def requests(seed: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(seed)
    prompts = [rng.choices(range(1, 500), k=rng.choice([1, 2, rng.randint(3, 30)])) for _ in range(11)]
    ways = ({"temperature": 0}, {"temperature": 1.0, "seed": seed})
    lengths = [rng.randint(1, 10) for _ in prompts]
    return [(p, SamplingParams(max_tokens=n, ignore_eos=True, **rng.choice(ways))) for p, n in zip(prompts, lengths)]


def run_in_company(llm: LLM, asked: list[tuple[list[int], SamplingParams]], seed: int) -> list[Sequence]:
    """Adds the requests between passes, and aborts every fifth while it runs."""
    rng, sequences = random.Random(seed), []
    while len(sequences) < len(asked) or llm.loop.has_unfinished:
        for prompt, params in asked[len(sequences) : len(sequences) + rng.randint(0, 3)]:
            sequences.append(
                Sequence(Request(10**6 + len(sequences), prompt, params, seed=params.seed or 0), 0, llm.tokenizer, {})
            )
            llm.loop.add(sequences[-1])
        llm.loop.advance()
        for number in range(4, len(sequences), 5):
            if rng.random() < 0.3:
                llm.loop.abort(sequences[number].request.id, "nobody listens")
        llm.loop.scheduler.check_integrity()
    return sequences


@pytest.mark.parametrize("way", WAYS)
def test_a_request_in_any_company_is_itself_alone(way):
    asked, batches = requests(seed=3), []
    with LLM("demo", **WAYS[way]) as llm:
        alone = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt, params in asked]
        llm.reset_prefix_cache()
        llm.engine.watches.add(BeginPass(batches.append))
        sequences = run_in_company(llm, asked, seed=5)
    for number, (sequence, expected) in enumerate(zip(sequences, alone, strict=True)):
        tokens = list(sequence.output().token_ids)
        assert tokens == list(expected)[: len(tokens)] and (number % 5 == 4 or len(tokens) == len(expected))
    assert any({row.kind for row in batch.rows} == set(RowKind) for batch in batches), "no pass had rows of every kind"
    assert any(is_short_prompt(batch) for batch in batches)


def is_short_prompt(batch: Batch) -> bool:
    """Tells whether a prompt of one token starts beside longer chunks."""
    return (
        any(row.kind is RowKind.ONE_TOKEN and not row.start for row in batch.rows)
        and len(batch.rows) < batch.num_tokens
    )
