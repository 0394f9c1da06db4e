"""Streamed == resident in every bit on two ranks, and what each of them holds, copies, multiplies and reduces. The
expected sizes are worked out here from the config, apart from the engine's own layout. One launch serves all."""

import json

import pytest

from tests.support.forked_ranks import fork_ranks
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.streaming_runs import MODELS, RANK_CASES

RANKS, LAYERS, HIDDEN, HEAD_DIM, FFN, VOCAB = 2, 3, 128, 16, 160, 128  # of both models
QUERY_HEADS, KV_HEADS = 8, {"llama_gqa": 4, "neox_parallel": 8}
CASES = [f"{resident}-{ring}-{lanes}" for resident, ring, lanes in RANK_CASES]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Facts of every case, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for model in MODELS:
        write_checkpoint(folder / model, model)
    done = fork_ranks(RANKS, "-m", "tests.support.streaming_runs", folder, timeout=200)
    assert done.all_ended, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def weights(model: str, num_ranks: int) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of one rank's weights by group: matrices (out, in), and vectors."""
    neox = model == "neox_parallel"
    heads, kv_heads, ffn = QUERY_HEADS // num_ranks, KV_HEADS[model] // num_ranks, FFN // num_ranks
    norm = [(HIDDEN,)] * (2 if neox else 1)
    qkv, up = (heads + 2 * kv_heads) * HEAD_DIM, ffn if neox else 2 * ffn
    biases = ([(qkv,), (HIDDEN,)], [(up,), (HIDDEN,)]) if neox else ([], [])
    return {
        "attn": [*norm, (qkv, HIDDEN), (HIDDEN, heads * HEAD_DIM), *biases[0]],
        "ffn": [*norm, (up, HIDDEN), (HIDDEN, ffn), *biases[1]],
        "head": [*norm, (VOCAB // num_ranks, HIDDEN)],
        "embed": [(VOCAB // num_ranks, HIDDEN)],
    }


def span_bytes(shapes: list[tuple[int, ...]]) -> int:
    """float32, each tensor padded to 256 bytes."""
    elements = (shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes)
    return sum(-(-4 * number // 256) * 256 for number in elements)


def model_bytes(model: str, num_ranks: int) -> int:
    size = {group: span_bytes(shapes) for group, shapes in weights(model, num_ranks).items()}
    return LAYERS * (size["attn"] + size["ffn"]) + size["head"] + size["embed"]


@pytest.mark.parametrize("model", MODELS)
def test_bits_do_not_depend_on_streaming(ranks, model):
    digests = {facts[f"{model}-{case}"]["digest"] for facts in ranks for case in CASES}
    assert len(digests) == 1


def test_models_differ(ranks):
    assert len({ranks[0][f"{model}-{CASES[0]}"]["digest"] for model in MODELS}) == len(MODELS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_copied_bytes(ranks, model, case):
    size = {group: span_bytes(shapes) for group, shapes in weights(model, RANKS).items()}
    order = [f"{layer_idx}.{name}" for layer_idx in range(LAYERS) for name in ("attn", "ffn")] + ["head"]
    for facts in (facts[f"{model}-{case}"] for facts in ranks):
        streamed = [group for group in order if group in facts["copied"]]
        assert (streamed == order) == case.startswith("none") and (streamed == []) == case.startswith("all")
        expected = {group: size[group.split(".")[-1]] * facts["num_passes"] for group in streamed}
        for group in streamed[: facts["wrapped"]]:
            expected[group] += size[group.split(".")[-1]]  # the prologue
        assert facts["copied"] == expected
        host = [size[group.split(".")[-1]] for group in streamed]
        assert facts["host_bytes"] == (sum(host) + size["embed"] if host else 0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_a_rank_holds_its_shard_and_the_replicated_part(ranks, model, case):
    """The vectors are replicated (norms, and biases of row-parallel projections), all else is held once."""
    held = [facts[f"{model}-{case}"]["host_bytes"] + facts[f"{model}-{case}"]["resident_bytes"] for facts in ranks]
    assert held == [model_bytes(model, RANKS)] * RANKS
    groups = weights(model, 1)
    replicated = span_bytes([(HIDDEN,)] * sum(shape == (HIDDEN,) for shape in groups["attn"] + groups["ffn"])) * LAYERS
    replicated += span_bytes([shape for shape in groups["head"] if len(shape) == 1])
    padding = sum(held) - model_bytes(model, 1) - (RANKS - 1) * replicated
    assert 0 <= padding <= LAYERS * 256 * RANKS and (padding == 0 or model == "neox_parallel")  # of the up bias


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_local_gemms(ranks, model, case):
    """A rank multiplies by its own part of each matrix, once a pass."""
    for facts in (facts[f"{model}-{case}"] for facts in ranks):
        groups, passes = weights(model, RANKS), facts["num_passes"]
        expected = [
            [shape[1], shape[0], passes * (1 if name == "head" else LAYERS)]
            for name in ("attn", "ffn", "head")
            for shape in groups[name]
            if len(shape) == 2
        ]
        assert facts["gemms"] == sorted(expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_reduces(ranks, model, case):
    """Two a layer, one where the residual is parallel, and the embedding's; of the hidden states and nothing else."""
    of_layers = ["ffn_allreduce"] if model == "neox_parallel" else ["attn_allreduce", "ffn_allreduce"]
    for facts in (facts[f"{model}-{case}"] for facts in ranks):
        times = {"embed_allreduce": 1, **dict.fromkeys(of_layers, LAYERS)}
        assert facts["reduces"] == {label: number * facts["num_passes"] for label, number in times.items()}
        hidden_bytes = facts["num_tokens"] * HIDDEN * 4
        assert facts["reduced_bytes"] == {label: number * hidden_bytes for label, number in times.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_rank_0_hears_what_each_rank_has_moved(ranks, model, case):
    """Ledgers hold these bytes and no others, with copies and all-reduces apart."""
    transfers = ranks[0][f"{model}-{case}"]["transfers"]
    assert [told["rank"] for told in transfers] == list(range(RANKS))
    assert [facts[f"{model}-{case}"]["transfers"] for facts in ranks[1:]] == [[]]
    for told, facts in zip(transfers, (facts[f"{model}-{case}"] for facts in ranks)):
        weights, reduces = told["weights"], told["all_reduces"]
        assert weights["total"]["sent_bytes"] == sum(facts["copied"].values())
        assert {name: moved["sent_bytes"] for name, moved in reduces["operations"].items()} == facts["reduced_bytes"]
        by_site = sorted(facts["ledger"]["sites"], key=str)
        assert sorted([*weights["sites"], *reduces["sites"]], key=str) == by_site and by_site


def test_a_pass_that_samples_nothing_leaves_out_the_sums_behind_the_last_attention(tmp_path):
    """One with a chunk that continues behind keys that are not rotated, and so is not padded. The GPU tests' own ranks
    count: what they predict is what every pass of each way has."""
    checkpoints, case = tmp_path / "checkpoints", "neox_parallel sinks"
    write_checkpoint(checkpoints / "neox_parallel", "neox_parallel")
    done = fork_ranks(RANKS, "-m", "tests.support.gpu.bitwise_ranks", checkpoints, tmp_path, case, timeout=100)
    assert done.all_ended, done.stderr
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    assert [report[case]["same"] for report in reports] == [{"streamed": True, "eager": True}] * RANKS
