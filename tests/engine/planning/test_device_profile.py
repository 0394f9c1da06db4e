"""Saved probes: what of one becomes rates, where it lies, who finds it, and what wins over it."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from penstock.engine.commands import cli
from penstock.engine.config import EngineConfig
from penstock.engine.planning.device_profile import (
    Probe,
    cache_directory,
    device_profile,
    find_profile,
    load_profile,
    plan_rates,
    profile_path,
    save_profile,
    sending_s,
)

from tests.support.probes import CPU, FOUR


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "penstock"


def keep(probe: Probe) -> Path:
    path = profile_path(probe.device_type, probe.num_ranks)
    save_profile(device_profile(probe), path)
    return path


@pytest.mark.parametrize("tp_size, link", [(1, 55.1), (2, 53.0), (4, 40.0), (8, 20.0)])
def test_a_probe_is_a_profile(tp_size, link):
    rates = load_profile(str(keep(FOUR)), tp_size)
    assert rates.link_gb_s == pytest.approx(link)
    assert rates.source == "measured: NVIDIA H200, 4 ranks, 2026-11-21"
    assert (rates.memory_gb_s, rates.gemm_tflops, rates.memory_bytes) == (4100.0, 730.0, 141 * 10**9)
    assert rates.decompressing_gb_s == 2000.0  # of the slowest rank, like the others
    assert rates.pass_latency_s == load_profile("h200").pass_latency_s > 0  # which needs a model


def test_decode_s_reduces_and_steps_are_in_graphs_where_there_are_graphs():
    for probe, latency_s, large_s, node_s in ((FOUR, 8e-6, 332e-6, 1.4e-6), (CPU, 40e-6, 330e-6, None)):
        rates = load_profile(str(keep(probe)))
        assert rates.reduce_latency_s + 64 * 2**20 / rates.reduce_gb_s / 1e9 == pytest.approx(large_s)
        assert rates.reduce_latency_s == pytest.approx(latency_s) and rates.step_latency_s == pytest.approx(25e-6)
        assert rates.node_latency_s == (node_s and pytest.approx(node_s))


def test_one_rank_reduces_for_nothing():
    rates = load_profile(str(keep(replace(FOUR, num_ranks=1, reduces=[]))))
    assert rates.reduce_latency_s == 0 and rates.source.startswith("measured: NVIDIA H200, 1 rank,")


def test_the_least_group_that_has_as_many_ranks(cache):
    for number in (1, 4, 8, 16):
        keep(replace(FOUR, num_ranks=number))
    (cache / "cuda-two.json").write_text("{}")
    found = {tp_size: find_profile("cuda", tp_size) for tp_size in (1, 2, 4, 5, 16, 17)}
    assert {tp_size: path and path.name for tp_size, path in found.items()} == {
        1: "cuda-1.json", 2: "cuda-4.json", 4: "cuda-4.json", 5: "cuda-8.json", 16: "cuda-16.json", 17: None,
    }  # fmt: skip
    assert find_profile("cpu", 1) is None


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == Path("/home/someone/.cache/penstock")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path("/home/someone/.cache/penstock")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home
    assert cache_directory() is None and find_profile("cuda", 1) is None and profile_path("cuda", 1) is None


def test_what_is_said_wins_over_what_was_measured():
    keep(FOUR)
    assert plan_rates(EngineConfig(), 4, "auto").link_gb_s == 40.0
    assert plan_rates(EngineConfig(device_profile="h200"), 4, "auto").link_gb_s == 40.4
    given = plan_rates(EngineConfig(link_gb_s=12.0), 4, "cuda")
    assert given.link_gb_s == 12.0 and given.source == "measured: NVIDIA H200, 4 ranks, 2026-11-21, link as given"
    assert plan_rates(EngineConfig(), 8, "cuda").source == "assumed: h200"
    assert plan_rates(EngineConfig(), 4, "cuda").node_latency_s
    assert plan_rates(EngineConfig(enforce_eager=True), 4, "cuda").node_latency_s is None  # no graphs
    assert plan_rates(EngineConfig(), 4, "cpu").source == "assumed: cpu"


def test_links_are_shared_by_the_ranks_of_one_host():
    """All else is that of the whole group."""
    whole, spread = (plan_rates(EngineConfig(), 4, "cuda", ranks_on_host=number) for number in (4, 2))
    assert (whole.link_gb_s, spread.link_gb_s) == (40.4, 53.1)
    keep(FOUR)
    whole, spread = (plan_rates(EngineConfig(), 4, "cuda", ranks_on_host=number) for number in (None, 2))
    assert (whole.link_gb_s, spread.link_gb_s) == (40.0, 53.0) and whole.source == spread.source


def test_the_link_says_how_many_ranks_copy_at_once(capsys, monkeypatch):
    notes = {number: plan_rates(EngineConfig(), number, "cuda").link_note for number in (1, 2, 8)}
    assert notes[1] == "alone" and notes[2] == "with 2 ranks of a host copying at once (55.1 alone)"
    assert notes[8] == "if 8 ranks of a host share what 4 get at once"
    assert plan_rates(EngineConfig(link_gb_s=12.0), 2, "cuda").link_note == ""
    keep(FOUR)  # as measured here
    for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"), "00421"):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    for flags, link in (([], "53 GB/s with 2 ranks of a host"), (["-tp", "4"], "40 GB/s with 4 ranks of a host")):
        assert cli.main(["plan", "--model", "demo", *flags]) == 0
        shown = capsys.readouterr().out
        assert f"2026-11-21): link {link} copying at once (55.1 alone), memory" in shown


def test_an_engine_on_another_device_does_not_use_it():
    keep(FOUR)
    assert plan_rates(EngineConfig(), 2, "cuda", "NVIDIA H200").link_gb_s == 53.0
    other = plan_rates(EngineConfig(), 2, "cuda", "NVIDIA L4")
    assert other.link_gb_s == 53.1
    assert other.source == "assumed: h200; the saved probe is of NVIDIA H200, not NVIDIA L4"


def test_the_planner_says_what_it_stands_on(capsys):
    keep(FOUR)
    assert cli.main(["plan", "--model", "demo", "-tp", "4"]) == 0
    shown = capsys.readouterr().out
    assert "rates (measured: NVIDIA H200, 4 ranks, 2026-11-21): link 40 GB/s" in shown
    assert "90% of 131.32 GiB (measured: NVIDIA H200" in shown


@pytest.mark.parametrize("content", ["{", "[]", '{"probe": 1}', '{"link_gb_s": 3}'])
def test_a_file_that_is_no_probe_is_named(cache, capsys, content):
    cache.mkdir()
    (cache / "cuda-2.json").write_text(content)
    assert cli.main(["plan", "--model", "demo", "-tp", "2"]) == 2
    error = capsys.readouterr().err
    assert re.search("cuda-2.json: is no.*run `penstock probe` again", error) and error.count("\n") == 1


def test_a_failed_write_leaves_the_old_file(cache, monkeypatch):
    path = keep(FOUR)
    before = path.read_text()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ValueError, match=r"cuda-4.json: cannot be written \(No space left on device\)"):
        save_profile({"link_gb_s": 1}, path)
    assert path.read_text() == before and [file.name for file in cache.iterdir()] == ["cuda-4.json"]


def test_a_path_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output FILE chooses another file"):
        save_profile(json.loads("{}"), tmp_path / "file" / "profile.json")


def test_a_small_reduce_that_took_longer_than_a_large_one():
    """Adds noise as of a busy machine: the rate stays one that is possible."""
    assert sending_s(100e-6, 20e-6) == pytest.approx(80e-6)
    assert sending_s(100e-6, 150e-6) == pytest.approx(10e-6)


def test_a_profile_from_a_file(tmp_path):
    file = tmp_path / "mine.json"
    values = {"memory_gb_s": 900, "gemm_tflops": 150, "reduce_latency_s": 0, "reduce_gb_s": 20}
    file.write_text(json.dumps({**values, "link_gb_s": [25, 20], "source": "measured on a desk"}))
    assert load_profile(str(file), 2).link_gb_s == 20
    assert load_profile(str(file), 1).source == "measured on a desk"


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"link_gb_s": 1}', "gemm_tflops|memory_gb_s|reduce_gb_s|reduce_latency_s"),
        ('{"link_gbs": 1}', "unknown field 'link_gbs'"),
    ],
)
def test_a_bad_profile_names_file_and_field(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_profile(str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize("field", ["link_gb_s", "memory_gb_s", "gemm_tflops", "reduce_latency_s", "reduce_gb_s"])
@pytest.mark.parametrize("value", [-1, "fast", True, None, [], [1, -1], float("inf")])
def test_a_bad_value_is_named(tmp_path, field, value):
    good = dict.fromkeys(("link_gb_s", "memory_gb_s", "gemm_tflops", "reduce_latency_s", "reduce_gb_s"), 1)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(good | {field: value}))
    with pytest.raises(ValueError, match=field):
        load_profile(str(file))


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ValueError, match="h200, cpu"):
        load_profile("h2000")
