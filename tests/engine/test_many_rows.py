"""Thousands of rows in a pass, padded as on a GPU: tables, mailbox, work of attention and sampler for all of them."""

import random

import torch
from penstock.engine.compute.sampler import SampleOutput
from penstock.engine.runtime.graph import Mailbox

from penstock import LLM, SamplingParams
from tests.support.llm_runs import tokens_of

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 32, "enable_prefix_caching": False}
CHOICES = (
    {"temperature": 0},
    {"temperature": 1.5, "seed": 7},
    {"temperature": 0.8, "seed": 8, "top_k": 9, "frequency_penalty": 0.5},
    {"temperature": 0, "logprobs": 1, "repetition_penalty": 1.3},
)
NUM_ROWS, NUM_DISTINCT = 2100, 31


def test_every_row_of_thousands_is_as_alone():
    """Compares tokens of 2,100 rows, in decode passes that shrink as rows end, with 31 requests alone."""
    rng = random.Random(0)
    prompts = [rng.choices(range(500), k=rng.randint(1, 4)) for _ in range(NUM_DISTINCT)]
    params = [SamplingParams(max_tokens=2 + i % 5, ignore_eos=True, **CHOICES[i % 4]) for i in range(NUM_DISTINCT)]
    with LLM("demo", max_num_seqs=1, **OPTIONS) as llm:
        alone = [tokens_of(llm.generate([one], [own]))[0] for one, own in zip(prompts, params)]
    order = rng.choices(range(NUM_DISTINCT), k=NUM_ROWS)
    with LLM("demo", max_num_seqs=2200, debug={"as_on_gpu": True, "poison": True}, **OPTIONS) as llm:
        found = tokens_of(llm.generate([prompts[i] for i in order], [params[i] for i in order]))
        assert {size.num_tokens for size in llm.engine.worker.runner.buckets} >= {2200, 1664, 832}
        assert llm.loop.scheduler.counts.num_passes < 10  # all at once
    assert found == [alone[i] for i in order]


def test_a_letter_takes_no_more_rows_than_its_pass_has():
    """Sends letters of several sizes, one behind another, and reads each."""
    mailbox = Mailbox(5, 3, torch.device("cpu"))
    for number, num_rows in enumerate((5, 2, 3, 1, 5, 4)):
        tokens = torch.arange(num_rows) + 10 * number
        scores = torch.arange(num_rows * 3, dtype=torch.int32).view(-1, 3) + number
        before = mailbox.letters[num_rows:].clone()
        mailbox.send(SampleOutput(tokens, scores if number % 2 else None))
        came = mailbox.expect(num_rows, scored=bool(number % 2)).wait()
        assert torch.equal(came.tokens, tokens) and torch.equal(mailbox.letters[num_rows:], before)
        assert (came.scores is None) == (number % 2 == 0) and (came.scores is None or torch.equal(came.scores, scores))
