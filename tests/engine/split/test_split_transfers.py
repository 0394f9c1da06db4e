"""Predicted transfers of a split execution: the figures of Llama-3.2-1B, and the shares and remedies that follow from
them.
"""

from pathlib import Path

import pytest
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.model.steps import model_steps
from penstock.engine.split.report import difference, transfer_table
from penstock.engine.split.transfers import ATTENTION_OPERATIONS, REMEDIES, PassRow, SplitConfig, predict, prefill
from penstock.parallel.ledger import Site, Transfer
from penstock.scheduler.units import MIB

SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes"
WHOLE = (PassRow(1024, 1024, True),)


@pytest.fixture(scope="module")
def spec():
    path = str(SHAPES / "Llama-3.2-1B.json")
    return read_spec(read_config(path), path)


def moved(spec, config, *passes):
    return predict(model_steps(spec), spec, passes or (WHOLE,), config)


def remedied(spec, name):
    config, chunk_tokens = REMEDIES[name]
    return moved(spec, config, *prefill(1024, chunk_tokens))


def test_the_original_figures(spec):
    ledger = remedied(spec, "original")
    assert ledger.total.num_calls == 98
    assert ledger.total.sent_bytes / MIB == pytest.approx(3328.02, abs=0.005)
    assert ledger.total.received_bytes / MIB == pytest.approx(3656.50, abs=0.02)
    assert ledger.total.total_bytes / MIB == pytest.approx(6984.52, abs=0.02)
    assert ledger.at(Site("attention_scores", 3)) == Transfer(1, 16 * MIB, 128 * MIB)
    assert ledger.at(Site("attention_values", 3)) == Transfer(1, 136 * MIB, 8 * MIB)
    attention_bytes = ledger.operation(*ATTENTION_OPERATIONS).total_bytes
    assert attention_bytes == 4608 * MIB and f"{attention_bytes / ledger.total.total_bytes:.1%}" == "66.0%"
    scores_bytes = 2 * ledger.operation("attention_scores").received_bytes
    assert scores_bytes == 4096 * MIB and f"{scores_bytes / ledger.total.total_bytes:.1%}" == "58.6%"


@pytest.mark.parametrize(
    ("name", "num_calls", "total_mib"),
    [
        ("K, V not repeated", 98, 6984.50 - 16 * 2 * 6),  # K and V of 8 heads are 2 MiB each, not 8
        # the masked upper right of 3 in 8 scores, twice, is saved; K and V of 256, 512, 768 tokens go once more
        ("K, V not repeated, chunks of 256", 4 * 97 + 1, 6984.50 - 16 * 2 * 6 - 4096 * 3 / 8 + 16 * 2 * 1.5 * 2),
        ("bfloat16 wire", 98, 6984.50 / 2),
        ("fused attention", 82, 6984.50 - 4096 - 16 * 12),
        ("bfloat16 wire, fused attention", 82, (6984.50 - 4096 - 16 * 12) / 2),
    ],
)
def test_what_each_remedy_leaves(spec, name, num_calls, total_mib):
    left = remedied(spec, name).total
    assert left.num_calls == num_calls
    assert left.total_bytes / MIB == pytest.approx(total_mib, abs=0.01)


def test_token_ids_do_not_shrink_with_the_wire(spec):
    embedding = Site("embedding", -1)
    assert moved(spec, SplitConfig("bfloat16")).at(embedding) == Transfer(1, 1024 * 8, 4 * MIB)


def test_rows_attend_by_calls_of_their_own_and_share_the_others(spec):
    rows = (PassRow(5, 5, True), PassRow(3, 40, False), PassRow(1, 9, True))
    ledger = moved(spec, SplitConfig(), rows)
    assert ledger.at(Site("attention_scores", 0)).num_calls == 3
    assert ledger.at(Site("attention_scores", 0)).received_bytes == 4 * 32 * (5 * 5 + 3 * 40 + 1 * 9)
    assert ledger.at(Site("attn_qkv", 0)) == Transfer(1, 9 * 2048 * 4, 9 * 3072 * 4)
    assert ledger.at(Site("head", 16)) == Transfer(1, 2 * 2048 * 4, 2 * 128256 * 4)


def test_a_chunk_that_does_not_sample_makes_no_call_to_the_head(spec):
    ledger = moved(spec, SplitConfig(), (PassRow(5, 5, False),))
    assert "head" not in {site.operation for site in ledger.sites}


def test_the_table_folds_layers_that_are_alike(spec):
    ledger = moved(spec, SplitConfig())
    folded, whole = transfer_table(ledger).splitlines(), transfer_table(ledger, folded=False).splitlines()
    assert len(folded) == 1 + 8 + 1 and len(whole) == 1 + 98 + 1
    assert folded[-1].split() == whole[-1].split() and folded[-1].split()[:2] == ["all", "98"]
    assert sum("0 to 15" in line for line in folded) == 6


def test_a_difference_is_named(spec):
    predicted, counted = moved(spec, SplitConfig()), moved(spec, SplitConfig())
    assert predicted == counted and difference(predicted, counted) == "counted equals predicted, byte for byte"
    counted.add(Site("ffn_up", 7), 1, 0)
    assert predicted != counted and "ffn_up" in difference(predicted, counted)
    lines = [line.split() for line in transfer_table(predicted, counted).splitlines()]
    assert [line[1] for line in lines if line[0] == "ffn_up"] == ["0", "7", "8"]


def test_passes_add_up(spec):
    next_token = (PassRow(1, 1025, True),)
    both = moved(spec, SplitConfig(), WHOLE, next_token).total
    assert both == moved(spec, SplitConfig()).total + moved(spec, SplitConfig(), next_token).total


def test_chunks_of_a_prompt():
    assert prefill(5) == prefill(5, 9) == [[PassRow(5, 5, True)]]
    assert prefill(5, 2) == [[PassRow(2, 2, False)], [PassRow(2, 4, False)], [PassRow(1, 5, True)]]


@pytest.mark.parametrize("wrong", [{"wire_dtype": "float16"}, {"attention": "flash"}])
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SplitConfig(**wrong)
