"""A published model, SmolLM2-135M-Instruct as a GGUF file of four bits a weight, has the gguf package's floats and
answers as it does in transformers.

`make test` fetches the file. The reference computes in fp32 with the dequantised weights; it is given the answers and
has to choose each of their tokens itself.
"""

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from penstock.engine.kernels.block_parts import in_parts
from penstock.engine.kernels.dequantise import dequantise
from penstock.engine.model.layout import model_layout
from penstock.engine.weights.gguf_checkpoint import GGUFCheckpoint
from penstock.engine.weights.read_model import read_model

from penstock import LLM, SamplingParams
from tests.support.kernel_proof import DEVICE
from tests.support.oracle.dequantised import dequantised_llama, dequantised_weights

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


@pytest.fixture(scope="module")
def weights(real_model):
    return dequantised_weights(real_model)


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


@pytest.mark.parametrize("tp_size", [1, 3, 9])
def test_every_weight_has_the_bits_of_the_gguf_package(real_model, weights, tp_size):
    """On the ranks of every number that it can be cut for, by the device's dequantiser."""
    spec, seen, kinds = read_model(real_model).spec, Counter(), set()
    layouts = [model_layout(spec, spec.names, "float32", tp_size, rank) for rank in range(tp_size)]
    groups = (group for layout in layouts for group in (*layout.groups, layout.embed))
    with GGUFCheckpoint.open_model(real_model, spec) as source:
        for rows in (rows for group in groups for rows in group.rows if rows.format.is_quantised):
            kind = rows.format
            data = torch.zeros(rows.num_rows, kind.row_bytes(rows.num_cols), dtype=torch.uint8)
            for piece in rows.pieces:
                part = data[piece.to_row : piece.to_row + piece.num_rows]
                source.read_piece(piece, part[:, piece.to_col : piece.to_col + piece.num_cols])
            floats = torch.empty(rows.num_rows, rows.num_cols, device=DEVICE)
            dequantise(kind.name, in_parts(kind.name, data).to(DEVICE), floats)
            for piece in rows.pieces:
                first, col, num_cols = (
                    size // kind.nbytes * kind.block for size in (piece.to_col, piece.col, piece.num_cols)
                )
                ours = floats[piece.to_row : piece.to_row + piece.num_rows, first : first + num_cols]
                theirs = weights[piece.tensor][piece.row : piece.row + piece.num_rows, col : col + num_cols]
                assert torch.equal(ours.cpu(), theirs), piece
                seen[piece.tensor] += ours.numel()
            kinds.add(kind.name)
    assert kinds == {"Q4_1", "Q8_0"} and seen.keys() == {name for name, _ in spec.formats}
    assert all(count >= weights[name].numel() for name, count in seen.items())


def test_answers_are_those_of_transformers(answers, gaps):
    assert len(set(answers.values())) == 1
    others = gaps(answers["none"])
    print("prompts that go another way at a near tie:", others)
    assert len(others) <= 1 and all(gap < CLOSE for gap in others.values()), others


def test_the_capital_of_france_is_paris(answers):
    assert "Paris" in answers["none"][PROMPTS.index(FRANCE)].text
    assert len({answer.tokens for answer in answers["none"]}) == len(PROMPTS) == 20
    assert all(answer.tokens for answer in answers["none"])
