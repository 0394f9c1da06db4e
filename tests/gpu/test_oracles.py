"""The oracles again on a GPU, in bf16: streamed == resident, bit for bit; tp 2 agrees with tp 1; the link was used."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from penstock.engine.compute.sampler import EVERYTHING, Asked
from penstock.engine.kernels import embedding
from penstock.engine.llm import LLM
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.output import RequestOutput
from penstock.engine.planning.find_model import find_model
from penstock.engine.runtime.executor import Counters
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.residency.decide import Residency

from tests.support.commands import run_ranks
from tests.support.gpu.enough import needs_ranks
from tests.support.rounding import assert_apart, model_apart
from tests.support.streaming_runs import fill_alike
from tests.support.watches import keep_logits

pytestmark = pytest.mark.gpu
PROMPTS = [[0, 5, 9], list(range(3, 120)), [0, 7]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SMALL = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "gpu_memory": "4GiB"}
RANK_SCRIPT = """
import os, sys, torch
from tests.gpu.test_oracles import generate

for dtype in ("float32", "bfloat16"):
    run = generate(dtype=dtype, resident="none", weights_compression="none")
    copied_bytes = run.copied.total.sent_bytes
    torch.save([run.tokens, run.logits, copied_bytes], f"{sys.argv[1]}/{dtype}.{os.environ['RANK']}")
"""


def apart(dtype: str) -> float:
    """Says how far logits of these prompts may be from another run's, as a share of the largest, for the order of
    sums."""
    spec, longest = read_spec(read_config(path := find_model("demo")), path), max(map(len, PROMPTS))
    return model_apart(spec, longest + GREEDY.max_tokens, getattr(torch, dtype))


class Run(NamedTuple):
    """Tokens and logits of every pass, and what the run did."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    counters: Counters
    copied: TransferLedger
    residency: Residency


def generate(**options) -> Run:
    logits = []
    with LLM("demo", **(SMALL | options)) as llm:
        fill_alike(llm)
        executor = llm.engine.worker.executor
        llm.engine.watches.add(keep_logits(logits))
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
        if llm.engine.topology.rank == 0:
            assert llm.engine.transfers[0]["weights"] == executor.copied.to_dict()
        return Run(tokens, logits, executor.counters, executor.copied, llm.engine.plan.residency)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_streamed_is_resident_bitwise(dtype):
    tokens, logits, _, copied, _ = generate(resident="all", dtype=dtype)
    assert copied == TransferLedger()
    rings = [None, 1_500_000 * (2 if dtype == "float32" else 1), "32MiB"]
    for resident in ("none", 0.5):
        for ring in rings:
            gathered = embedding.calls["triton"]
            options = {
                "resident": resident,
                "ring": ring,
                "debug": {"poison": True},
                "dtype": dtype,
                "weights_compression": "none",
            }
            streamed, streamed_logits, counters, copied, residency = generate(**options)
            assert streamed == tokens
            assert all(torch.equal(a, b) for a, b in zip(logits, streamed_logits, strict=True))
            predicted = TransferLedger()
            for index, (group, nbytes) in enumerate(residency.streamed):
                for _ in range(counters.num_passes + (index < residency.ring.num_wrapped)):  # and in the prologue
                    predicted.add(Site(group.name, group.layer_idx), nbytes)
            assert copied == predicted
            assert counters.steps["embedding"] == counters.num_passes
            assert embedding.calls["triton"] > gathered  # from the tied head's host span; replays are not calls


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("resident", ["all", "none", 0.5])
def test_graph_is_eager_bitwise(resident, dtype):
    """At the same padded shape: three rows in a bucket of three, then fewer as rows end."""
    options = {"resident": resident, "dtype": dtype, "weights_compression": "none"}
    eager = generate(**options, enforce_eager=True)
    graph = generate(**options)
    assert graph.tokens == eager.tokens
    assert all(torch.equal(a, b) for a, b in zip(graph.logits, eager.logits, strict=True))
    assert graph.copied == eager.copied and graph.counters.steps == eager.counters.steps


@pytest.mark.parametrize("resident", ["all", "none"])
def test_a_short_prompt_is_a_graph_where_nothing_streams(resident):
    """It is one of those that were captured at start, and no other is captured for it."""
    with LLM("demo", **SMALL, dtype="bfloat16", resident=resident) as llm:
        runner = llm.engine.worker.runner
        before = set(runner.graphs.passes)
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))
        assert set(runner.graphs.passes) == before == set(runner.all_graphs)
        replayed, decode = runner.graphs.latest, runner.sizes.decode
    assert replayed is None if resident == "none" else replayed[0] not in decode


SAMPLED = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=12, ignore_eos=True),
]


ASKING = {  # what rows ask for, and the graph of their decode passes
    "greedy": ([{}, {}, {}], Asked()),
    "drawn": ([{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9}], EVERYTHING),
    "penalised": ([{}, {"frequency_penalty": 0.7}, {"presence_penalty": 0.5, "temperature": 1.2}], EVERYTHING),
    "scored": ([{}, {"logprobs": 0}, {"logprobs": 20}], EVERYTHING),
}


def with_logprobs(output: RequestOutput) -> tuple:
    (sequence,) = output.outputs
    return sequence.token_ids, sequence.logprobs


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("resident", ["all", "none"])
@pytest.mark.parametrize("asking", ASKING)
def test_what_rows_ask_in_graphs_is_eager_bitwise(asking, resident, dtype):
    """An eager pass runs the stages that its rows ask for, a graph all or none."""
    changes, graph = ASKING[asking]
    params = [dataclasses.replace(SAMPLED[0], seed=index, **own) for index, own in enumerate(changes)]
    runs = []
    for enforce_eager in (False, True):
        options = {"dtype": dtype, "resident": resident, "weights_compression": "none"}
        with LLM("demo", **SMALL, **options, enforce_eager=enforce_eager) as llm:
            fill_alike(llm)
            runs.append([with_logprobs(output) for output in llm.generate(PROMPTS, params)])
            if not enforce_eager:
                _, asked = llm.engine.worker.runner.graphs.latest
                assert asked == graph
    assert runs[0] == runs[1]


def test_sampled_rows_beside_greedy_ones_in_graphs():
    """Penalties, filters and log probabilities in one graph: a request beside them keeps its tokens."""
    params = [SAMPLED[0], dataclasses.replace(SAMPLED[1], logprobs=3), SAMPLED[2]]
    with LLM("demo", **SMALL, dtype="float32", enable_prefix_caching=False) as llm:
        runs = [[with_logprobs(output) for output in llm.generate(PROMPTS, params)] for _ in range(2)]
        alone = [with_logprobs(llm.generate([prompt], own)[0]) for prompt, own in zip(PROMPTS, params)]
    assert runs[0] == runs[1] and len({tuple(tokens) for tokens, _ in runs[0]}) == 3
    assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in runs[0]]


@pytest.mark.parametrize("resident", ["all", "none"])
def test_hundreds_of_passes_ahead(resident):
    """The tokens of a run with passes submitted ahead, or prepared where weights stream, rows ending at end-of-sequence
    and others admitted, are those of the same run in turn."""
    prompts = [[0, token, 9] for token in range(1, 25)]
    params = [SamplingParams(temperature=1.2, seed=seed, max_tokens=150) for seed in range(24)]
    runs = []
    for lookahead in (None, 0):
        with LLM("demo", **SMALL, dtype="float32", resident=resident, debug={"lookahead": lookahead}) as llm:
            runs.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
            assert llm.engine.times.num_passes > 200
            llm.loop.scheduler.check_integrity()
    assert runs[0] == runs[1] and len({len(tokens) for tokens in runs[0]}) > 3


def test_cpu_and_gpu_agree_in_fp32():
    cpu = generate(device="cpu", dtype="float32", resident="all", gpu_memory=None)
    gpu = generate(dtype="float32", resident="none")
    assert cpu.tokens == gpu.tokens
    for ours, reference in zip(gpu.logits, cpu.logits, strict=True):
        assert_apart((ours - reference).abs(), apart("float32") * float(reference.abs().max()))


def test_registered_memory_feeds_the_embedding_kernel():
    table = torch.randn(64, 96).pin_memory()
    tokens = torch.tensor([3, 70, 10, 63], device="cuda")
    out = torch.full((4, 96), float("nan"), device="cuda")
    expected = torch.full((4, 96), float("nan"))
    embedding.embed_rows(table, tokens, 8, out)
    embedding.embed_rows_reference(table, tokens.cpu(), 8, expected)
    assert torch.equal(out.cpu(), expected)


@needs_ranks(2)
def test_two_ranks_agree_with_one(tmp_path):
    """Logits of every pass, in bf16 up to the first near-tie, and tokens in fp32. Each rank moves its shard."""
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    run_ranks(2, script, tmp_path, timeout=240)
    for dtype in ("float32", "bfloat16"):
        tokens, logits, _, all_copied, _ = generate(dtype=dtype, resident="none", weights_compression="none")
        for rank in range(2):
            rank_tokens, rank_logits, copied = torch.load(tmp_path / f"{dtype}.{rank}")
            assert 0.5 <= copied / all_copied.total.sent_bytes <= 0.52
            assert dtype == "bfloat16" or rank_tokens == tokens
            for ours, theirs in zip(logits, rank_logits, strict=True):
                theirs = theirs[:, : ours.shape[1]]
                difference = (ours - theirs).float().abs().amax(-1)
                assert_apart(difference, apart(dtype) * ours.float().abs().amax(-1))
                if not torch.equal(ours.argmax(-1), theirs.argmax(-1)):
                    break  # a near-tie: from here on they compute different tokens
