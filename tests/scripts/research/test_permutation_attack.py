"""The attack on random checkpoints of a small vocabulary, which shows what leaks where, and its table on the demo
model."""

import itertools
import json
import random
import sys

import pytest
import torch
from penstock.engine.model.families import read_config, read_spec
from penstock.parallel.ledger import Site

from scripts.bench.entry import run_script
from scripts.research import permutation_attack
from scripts.research.permutation_attack import (
    ANY_ROW,
    IN_ORDER,
    L1,
    SORTED,
    attacker_llm,
    candidates_of,
    distances,
    measure,
    observe,
    recovered,
)
from tests.support.gguf_models import SMALL, write_model
from tests.support.oracle.checkpoints import write_checkpoint
from tests.support.rounding import LOUD, assert_apart, model_apart

pytestmark = pytest.mark.soak  # research, on parts that do not change with the engine

TOKENS = random.Random(1).sample(range(128), k=10)  # no token comes twice, so there is one right order
LAYERS = [0, 2]
NUM_ATTACKS = 4 + 3 + 3  # on a layer


@pytest.fixture(autouse=True)
def same_key(monkeypatch):
    """A permutation may happen to leave many rows where they are; this key's do not."""
    monkeypatch.setattr("penstock.engine.split.host_side.secrets.token_bytes", bytes)


@pytest.fixture(scope="module", params=["llama_biases", "neox_parallel"])
def model(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, request.param)
    return str(folder)


def test_a_gguf_file_leaks_as_well(tmp_path):
    write_model(tmp_path / "m.gguf", "llama", sizes=SMALL)
    rows = measure(str(tmp_path / "m.gguf"), [TOKENS], [0])
    (clear,) = [r for r in rows if (r["site"], r["permuted"], r["matching"]) == ("QKV input", False, L1)]
    assert len(rows) == NUM_ATTACKS and clear["positions"] == 1


def test_what_leaks_where(model):
    """Shares (positions, multiset) are checked for every attack that is meant to find all, and for those that are
    not."""
    rows = measure(model, [TOKENS], LAYERS)
    found = {(r["site"], r["layer"], r["permuted"], r["matching"]): (r["positions"], r["multiset"]) for r in rows}
    assert len(found) == len(rows) == len(LAYERS) * NUM_ATTACKS
    # functions of the token alone; with parallel residual attention and MLP read the same x
    alone = {("QKV input", 0), *([("MLP input", 0)] if "neox_parallel" in model else [])}
    for site, layer_idx in itertools.product(("QKV input", "attention states", "MLP input"), LAYERS):
        clear = found[site, layer_idx, False, L1]
        permuted = {
            matching: found.get((site, layer_idx, True, matching)) for matching in (L1, SORTED, ANY_ROW, IN_ORDER)
        }
        assert clear == (1, 1), "in the clear all is found"
        assert permuted[L1][0] <= 0.5, "permuted, plain L1 does not find all"
        if site == "attention states":
            assert permuted[SORTED] == (1, 1), "head_dim is undone by sorting"
        elif (site, layer_idx) in alone:
            assert permuted[L1][1] == permuted[ANY_ROW][1] == 1, "rows hide no token"
            assert permuted[ANY_ROW][0] < 0.5, "and the order where nothing depends on it"
        else:
            assert permuted[ANY_ROW] == (1, 1), "but nowhere else"
        if site == "QKV input":
            assert permuted[IN_ORDER] == (1, 1), "attention's values show the order"


@pytest.fixture(scope="module")
def apart(model) -> float:
    """Says how far a state may be from another run's, for the order of sums, as a share of the largest number in it."""
    return model_apart(read_spec(read_config(model), model), len(TOKENS))


@pytest.mark.tolerance
def test_candidates_are_what_the_device_side_sees(model, apart):
    """The row of the true token, behind the true prefix, is what was seen at each site, and no other token's row is."""
    seen = observe(model, TOKENS, ())
    with attacker_llm(model, 128, len(TOKENS)) as llm:
        candidates = candidates_of(llm, 128)
        for index in (0, 1, 7):
            states = candidates(tuple(TOKENS[:index]))
            assert set(states) == set(seen.inputs) and len(states) == 3 * 3
            for site, rows in seen.inputs.items():
                distance = distances(states[site], rows[index : index + 1])[:, 0]
                others = torch.cat([distance[: TOKENS[index]], distance[TOKENS[index] + 1 :]])
                bound = apart * rows[index].numel() * float(rows.abs().max())
                assert_apart(distance[TOKENS[index]], bound)
                assert others.min() > LOUD * bound


@pytest.mark.tolerance
def test_what_was_seen_is_permuted(model, apart):
    clear, permuted = observe(model, TOKENS, ()), observe(model, TOKENS, ("rows", "head_dim"))
    for site, states in clear.inputs.items():
        bound = apart * float(states.abs().max())
        assert (states - permuted.inputs[site]).abs().max() > LOUD * bound
        in_heads = site.operation == "attention"
        distance = distances(states, permuted.inputs[site], in_heads)
        assert sorted(distance.argmin(1).tolist()) == list(range(len(TOKENS)))
        assert_apart(distance.amin(1), states[0].numel() * bound)
        assert (distance.argmin(1).tolist() == list(range(len(TOKENS)))) == in_heads
    states = clear.inputs[Site("attn_qkv", 1)]
    assert_apart((permuted.in_order(1) - states).abs(), apart * float(states.abs().max()))


def test_ids_and_values_give_the_prompt_without_a_search_of_the_vocabulary(model):
    """The embedding gets the ids, in another order."""
    permuted, ids = observe(model, TOKENS, ("rows", "head_dim")), sorted(TOKENS)
    with attacker_llm(model, 128, len(TOKENS)) as llm:
        states = candidates_of(llm, 128)(())[Site("attn_qkv", 0)][ids]
    assert [ids[index] for index in distances(permuted.in_order(0), states).argmin(1)] == TOKENS


def test_shares_count_a_token_as_often_as_it_is_there():
    assert recovered([5, 5, 7], [5, 7, 5]) == (1, 3)
    assert recovered([5, 5, 5], [5, 7, 9]) == (1, 1)
    assert recovered([1, 2, 3], [4, 5, 6]) == (0, 0)


@pytest.fixture
def script(monkeypatch, capsys):
    def run(*arguments: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["permutation_attack.py", *arguments])
        assert run_script(permutation_attack.main) == status
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


def test_the_table_on_the_demo_model(script):
    shown = script("--model", "demo", "--prompt", "Return", "--layers", "0").splitlines()
    lines = {line.split(" | ")[0].strip("| "): [cell.strip(" |") for cell in line.split(" | ")] for line in shown}
    assert lines["site"][2:] == [
        *("in the clear: L1", "permuted: L1", "permuted: any row", "permuted: rows in order", "permuted: sorted L1")
    ]
    whole = "100% / 100%"
    assert lines["QKV input"][2] == lines["attention states"][2] == lines["MLP input"][2] == whole
    assert lines["QKV input"][5] == lines["attention states"][6] == lines["MLP input"][4] == whole
    assert "not confidentiality" in shown[-2]


def test_figures_as_a_record(script, model, tmp_path):
    prompts, path = ("--token-ids", "5", "9", "--token-ids", "3"), tmp_path / "record.json"
    shown = script("--model", model, *prompts, "--layers", "1", "--output-json", str(path)).splitlines()
    record = json.loads(path.read_text())
    assert json.loads(shown[-1]) == record and record["benchmark"] == "permutation_attack"
    assert record["prompt_tokens"] == [2, 1] and len(record["rows"]) == NUM_ATTACKS
    for row in record["rows"]:
        assert set(row) == {"site", "layer", "permuted", "matching", "positions", "multiset"} and row["layer"] == 1
        assert row["permuted"] or row["positions"] == row["multiset"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "4"), "--layers 4: demo has layers 0 to 3"),
        (("--model", "nowhere"), "nowhere"),
        (("--token-ids", "5", "5000"), "token id 5000"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, script):
    shown = script(*arguments, status=2)
    assert message in shown and len(shown.splitlines()) == 1
