"""The script check_numerics finds nothing wrong with the engine, and names layer and step of a fault put into it."""

import functools
import sys

import pytest
import torch
from penstock.engine.model.families import read_config, read_spec
from penstock.scheduler.passes.pass_plan import GroupId

from scripts import check_numerics
from scripts.check_numerics import TOLERANCES, Row, compare, first_fault
from tests.support.oracle.cases import NUM_LAYERS, RUN, TOKENS
from tests.support.oracle.checkpoints import VARIANTS, write_checkpoint
from tests.support.oracle.faults import (
    around_step,
    half_lost,
    kv_heads_rolled,
    rope_shifted,
    skipped_prefetch,
    stale_layer,
)
from tests.support.rounding import model_apart, sums_apart


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a variant's checkpoint, written once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def directory(variant: str) -> str:
        path = folder / variant
        if not path.exists():
            write_checkpoint(path, variant)
        return str(path)

    return directory


def named(rows: list[Row]) -> tuple[int, str] | None:
    first = first_fault(rows)
    return first and (first.layer_idx, first.step)


def apart(path: str, dtype: str) -> float:
    """The difference that the order of sums may make to a step, or in float32 to all up to it: each of two ways to a
    step rounds two results of the dtype at most, one computed from the other."""
    if dtype != "float32":
        return sums_apart(2, 1.0, getattr(torch, dtype))
    return model_apart(read_spec(read_config(path), path), len(TOKENS) + RUN["max_tokens"])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_script_allows_what_rounding_makes_and_little_more(checkpoint, dtype):
    assert 1 < TOLERANCES[dtype] / apart(checkpoint("llama_gqa"), dtype) < 3


@pytest.mark.tolerance
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_differs(checkpoint, variant):
    path = checkpoint(variant)
    bound = apart(path, "float32")
    rows = compare(path, TOKENS, tolerance=bound, **RUN)
    assert first_fault(rows) is None
    parallel = variant.startswith("neox") and variant != "neox_serial"
    assert len(rows) == NUM_LAYERS * (10 if parallel else 11) + 3
    assert all(row.bits_equal for row in rows if row.step.endswith("residual"))
    assert 0 < max(row.drift for row in rows) <= bound  # zero everywhere: nothing of ours would have been compared


@pytest.mark.tolerance
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["llama_gqa", "qwen3", "neox_parallel", "neox_serial"])
def test_nothing_differs_in_half_precision(checkpoint, variant, dtype):
    path = checkpoint(variant)
    assert first_fault(compare(path, TOKENS, dtype, tolerance=apart(path, dtype), **RUN)) is None


@pytest.mark.parametrize("variant", ["mistral_window", "neox_parallel"])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (stale_layer(GroupId(1, "attn"), GroupId(0, "attn")), (1, "attn_norm")),
        (skipped_prefetch(GroupId(2, "ffn")), (2, "ffn_norm")),
        (half_lost(2, "o"), (2, "attn_output")),
        (half_lost(0, "down"), (0, "ffn_down")),
        (kv_heads_rolled(1), (1, "attn_qkv")),
        (rope_shifted("q", 1), (1, "rope")),
        (rope_shifted("later"), (0, "rope")),
        (rope_shifted("all"), (0, "rope")),  # which no logit shows
        (around_step("attention", 2, lambda ctx, do: (ctx.model.kv.data[2, 1].neg_(), do())), (2, "attention")),
        (around_step("activation", 1, lambda ctx, do: None), (1, "activation")),
    ],
    ids=lambda value: f"{value[0]}.{value[1]}" if isinstance(value, tuple) else "",
)
def test_names_the_step(checkpoint, variant, fault, expected):
    assert named(compare(checkpoint(variant), TOKENS, **RUN, mutate=fault)) == expected


@pytest.mark.tolerance
def test_command(checkpoint, monkeypatch, capsys):
    command = ["check_numerics.py", "--model", checkpoint("llama_gqa"), "--token-ids", *map(str, TOKENS)]
    monkeypatch.setattr(sys, "argv", command)
    assert check_numerics.main() == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["layer", "step", "drift", "step", "bits"]
    assert [line.split()[1] for line in table[2:5]] == ["embedding", "attn_norm", "attn_qkv"]
    assert table[-1] == "first layer and step that differ: none"
    faulty = functools.partial(compare, mutate=half_lost(2, "o"))
    monkeypatch.setattr(check_numerics, "compare", faulty)
    assert check_numerics.main() == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("first layer and step that differ: layer 2, attn_output")
    monkeypatch.setattr(sys, "argv", [*command, "--tolerance", "1e3"])
    assert check_numerics.main() == 0


def test_command_with_text(monkeypatch, capsys):
    """The demo model has a tokenizer, and bf16 weights that the engine converts."""
    command = ["check_numerics.py", "--prompt", "Return the", "--dtype", "float32", "--resident", "0.5"]
    monkeypatch.setattr(sys, "argv", command)
    assert check_numerics.main() == 0


def test_command_refuses_text_without_tokenizer(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_numerics.py", "--model", checkpoint("llama_gqa")])
    with pytest.raises(ValueError, match="no tokenizer: give --token-ids"):
        check_numerics.main()


def test_nan_differs():
    nan, ones = torch.full((2, 2), torch.nan), torch.ones(2, 2)
    assert not check_numerics.relative_error(nan, ones) <= 1e9
    assert not check_numerics.relative_error(ones, nan) <= 1e9
