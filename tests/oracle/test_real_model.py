"""A published model, SmolLM2-135M-Instruct as a GGUF file of four bits a weight, answers as it does in transformers.

`make test` fetches the file. The reference computes in fp32 with the dequantised weights; it is given the answers and
has to choose each of their tokens itself.
"""

from typing import NamedTuple

import pytest
import torch

from penstock import LLM, SamplingParams
from tests.support.oracle.dequantised import dequantised_llama

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]  # half a minute where the machine does nothing else
FRANCE = "What is the capital of France?"
PROMPTS = (
    *(FRANCE, "And what is the capital of Italy?", "Name three colors.", "Write a haiku about the sea."),
    *("What is 2 + 2?", "Explain gravity to a child.", "Translate 'good morning' into Spanish.", "Who wrote Hamlet?"),
    *("List the days of the week.", "What do bees make?", "Give me a recipe for pancakes.", "Why is the sky blue?"),
    *("What is Python used for?", "Say hello in French.", "How many legs has a spider?", "What is photosynthesis?"),
    *("Tell me a joke.", "What is the largest planet?", "Count from one to ten.", "What is \u6771\u4eac \U0001f5fc?"),
)
GREEDY = SamplingParams(temperature=0, max_tokens=8)
SMALL = {"max_model_len": 64, "max_num_seqs": 20, "max_num_batched_tokens": 1024, "num_pages": 81}
CLOSE = 1e-4  # of the reference's two largest logits: either may be chosen


class Answer(NamedTuple):
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def answer_all(file: str, tp_size: int, resident: str) -> tuple[Answer, ...]:
    with LLM(file, tensor_parallel_size=tp_size, resident=resident, dtype="float32", **SMALL) as llm:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in PROMPTS], GREEDY)
    return tuple(Answer(tuple(o.prompt_token_ids), tuple(o.outputs[0].token_ids), o.outputs[0].text) for o in outputs)


@pytest.fixture(scope="module", params=[1, 3])
def answers(request, real_model):
    """The answers of so many ranks, with all weights resident and with all of them streamed."""
    return {resident: answer_all(str(real_model), request.param, resident) for resident in ("all", "none")}


@pytest.fixture(scope="module")
def gaps(real_model):
    """Says of answers, prompt by prompt, the gap between the reference's two largest logits where it would first choose
    another token; prompts where it never would are left out. Answers that were asked for before cost nothing."""
    reference, known = dequantised_llama(real_model), {}

    def of(given: tuple[Answer, ...]) -> dict[str, float]:
        if given not in known:
            texts = [torch.tensor([*answer.prompt, *answer.tokens[:-1]]) for answer in given]
            with torch.inference_mode():  # padded behind, where no token looks
                logits = reference(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)).logits
            known[given] = {
                prompt: gap
                for prompt, answer, rows in zip(PROMPTS, given, logits, strict=True)
                if (gap := first_gap(rows[len(answer.prompt) - 1 :], answer.tokens)) is not None
            }
        return known[given]

    return of


def first_gap(logits: torch.Tensor, tokens: tuple[int, ...]) -> float | None:
    for row, token in zip(logits, tokens):
        if row.argmax() != token:
            first, second = row.topk(2).values.tolist()
            return first - second
    return None


def test_answers_are_those_of_transformers(answers, gaps):
    assert len(set(answers.values())) == 1
    others = gaps(answers["none"])
    print("prompts that go another way at a near tie:", others)
    assert len(others) <= 1 and all(gap < CLOSE for gap in others.values()), others


def test_the_capital_of_france_is_paris(answers):
    assert "Paris" in answers["none"][PROMPTS.index(FRANCE)].text
    assert len({answer.tokens for answer in answers["none"]}) == len(PROMPTS) == 20
    assert all(answer.tokens for answer in answers["none"])
