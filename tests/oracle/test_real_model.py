"""A published model, SmolLM2-135M-Instruct as a GGUF file of four bits a weight, answers as it does in transformers.

`make test-real` fetches the file. The reference computes in fp32 with the dequantised weights; it is given each answer
and has to choose each of its tokens itself.
"""

from typing import NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM

from penstock import LLM, SamplingParams
from tests.support.oracle.dequantised import dequantised_llama

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]  # on two cores that other work shares
FRANCE = "What is the capital of France?"
PROMPTS = (
    *(FRANCE, "And what is the capital of Italy?", "Name three colors.", "Write a haiku about the sea."),
    *("What is 2 + 2?", "Explain gravity to a child.", "Translate 'good morning' into Spanish.", "Who wrote Hamlet?"),
    *("List the days of the week.", "What do bees make?", "Give me a recipe for pancakes.", "Why is the sky blue?"),
    *("What is Python used for?", "Say hello in French.", "How many legs has a spider?", "What is photosynthesis?"),
    *("Tell me a joke.", "What is the largest planet?", "Count from one to ten.", "What is \u6771\u4eac \U0001f5fc?"),
)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
CLOSE = 1e-4  # of the reference's two largest logits: either may be chosen


class Answer(NamedTuple):
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str


def answer_all(file: str, tp_size: int, resident: str) -> list[Answer]:
    with LLM(file, tensor_parallel_size=tp_size, resident=resident, dtype="float32", max_model_len=256) as llm:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in PROMPTS], GREEDY)
    return [Answer(tuple(o.prompt_token_ids), tuple(o.outputs[0].token_ids), o.outputs[0].text) for o in outputs]


@pytest.fixture(scope="module", params=[1, 3])
def answers(request, real_model):
    """The answers with all weights resident, and with all of them streamed."""
    return {resident: answer_all(str(real_model), request.param, resident) for resident in ("all", "none")}


@pytest.fixture(scope="module")
def reference(real_model):
    return dequantised_llama(real_model)


def differs(reference: LlamaForCausalLM, answer: Answer) -> float | None:
    """The gap of the reference's two largest logits where it would choose another token; None if it never would."""
    with torch.no_grad():
        logits = reference(torch.tensor([[*answer.prompt, *answer.tokens[:-1]]])).logits[0, len(answer.prompt) - 1 :]
    for row, token in zip(logits, answer.tokens, strict=True):
        if row.argmax() != token:
            first, second = row.topk(2).values.tolist()
            return first - second
    return None


def test_answers_are_those_of_transformers(answers, reference):
    assert answers["all"] == answers["none"]
    gaps = {prompt: differs(reference, answer) for prompt, answer in zip(PROMPTS, answers["all"], strict=True)}
    others = {prompt: gap for prompt, gap in gaps.items() if gap is not None}
    print("prompts that go another way at a near tie:", others)
    assert len(others) <= 1 and all(gap < CLOSE for gap in others.values()), others


def test_the_capital_of_france_is_paris(answers):
    assert "Paris" in answers["all"][PROMPTS.index(FRANCE)].text
    assert len({answer.tokens for answer in answers["all"]}) == len(PROMPTS) == 20
