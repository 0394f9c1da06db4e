"""The benchmark scripts.bench.split on the demo model: the ways of a split execution beside the plain engine."""

import json
import sys

import pytest
from penstock.engine.output import CompletionOutput, Logprob
from penstock.engine.split.transfers import FUSED, REPEATED, SplitConfig

from scripts.bench import split as benchmark_split
from scripts.bench.split import WAYS, logprob_difference


def test_every_way_is_there():
    assert len(WAYS) == len(set(WAYS)) == 2 * 3 * 2 + 3
    assert sum(way.process for way in WAYS) == 6 and sum(way.permute != () for way in WAYS) == 3


def test_the_record(monkeypatch, capsys, tmp_path):
    ways = [SplitConfig(attention=FUSED, process=True), SplitConfig("bfloat16", REPEATED)]
    monkeypatch.setattr(benchmark_split, "WAYS", ways)
    file = tmp_path / "record.json"
    arguments = ("--max-tokens", "3", "--prompt", "Return the", "--prompt", "import", "--output-json", str(file))
    monkeypatch.setattr(sys, "argv", ["benchmark_split", *arguments])
    benchmark_split.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(file.read_text()) == record and record["benchmark"] == "split"
    fused, repeated = record["rows"]
    num_layers, num_passes = record["model_shape"]["num_layers"], 3
    calls_of_linears = num_passes * (num_layers * 4 + 2)
    assert fused["num_calls"] == calls_of_linears + num_passes * num_layers * 2  # two rows
    assert repeated["num_calls"] == calls_of_linears + num_passes * num_layers * 2 * 2
    assert 0 < repeated["received_bytes"] < fused["received_bytes"]
    assert (fused["logprob_difference"], fused["same_texts"]) == (0.0, 2)
    assert 0.0 < repeated["logprob_difference"] < 0.2 and repeated["num_texts"] == 2
    for row in record["rows"]:
        assert row["call_s"] == pytest.approx(row["seconds"] / row["num_calls"])
        assert row["over_plain"] == pytest.approx(row["seconds"] / record["plain_s"])


def test_a_difference_counts_until_texts_part():
    def output(*tokens: tuple[int, float]) -> CompletionOutput:
        logprobs = [{token: Logprob(logprob, 1, None)} for token, logprob in tokens]
        return CompletionOutput(0, "", [token for token, _ in tokens], logprobs=logprobs)

    plain = output((3, -1.0), (5, -2.0), (7, -1.0))
    assert logprob_difference(output((3, -1.5), (5, -1.75), (8, -9.0)), plain) == 0.5
    assert logprob_difference(output((4, -1.5)), plain) == 0.0


def test_texts_that_end_early_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark_split", "--max-tokens", "600", "--prompt", "Return the"])
    monkeypatch.setattr(benchmark_split, "generate", lambda *_: ([CompletionOutput(0, "", [7] * 509)], 1.0))
    with pytest.raises(ValueError, match="--max-tokens 600: demo has room for 509 behind a prompt"):
        benchmark_split.main()
