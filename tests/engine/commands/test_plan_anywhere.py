"""`penstock plan` starts nothing: it runs in a cluster's environment, and shows names as they are."""

import json

import pytest
from penstock.engine import streams
from penstock.engine.commands import cli
from penstock.engine.planning.find_model import find_model
from penstock.scheduler.cost.time_model import PROFILES


@pytest.mark.parametrize(
    "environment, flags, tp_size",
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, [], 1),  # a pod's, without torchrun
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["-tp", "4"], 4),
        ({"RANK": "x", "WORLD_SIZE": "y", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, [], 1),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, [], 2),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["-tp", "4"], 4),
    ],
)
def test_the_environment_of_a_launcher_stops_no_plan(capsys, monkeypatch, environment, flags, tp_size):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["plan", "--model", "demo", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["tp_size"] == tp_size


HALF = {"RANK": "1", "WORLD_SIZE": "2"}
WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "environment, flags, words",
    [
        (HALF, [], "RANK and WORLD_SIZE are set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (WHOLE | {"WORLD_SIZE": "two"}, [], "WORLD_SIZE='two': expected a number"),
        (HALF, ["-tp", "2"], None),  # it was not asked
        (WHOLE, [], None),
        ({}, [], None),
    ],
)
def test_an_environment_that_is_passed_over_is_said(capsys, monkeypatch, environment, flags, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["plan", "--model", "demo", *flags]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: planned for one rank")]
    assert len(said) == (words is not None) and all(words in line for line in said)
    assert cli.main(["plan", "--model", "demo", "--json", *flags]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [f"note: {note}" for note in notes if note.startswith("planned for one rank")] == said


def test_a_network_interface_is_nothing_to_a_plan(capsys, monkeypatch):
    for name, value in (WHOLE | {"GLOO_SOCKET_IFNAME": "nope0"}).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["plan", "--model", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tp_size"] == 2


@pytest.mark.parametrize(
    "environment, waits",
    [({"RANK": "3", "WORLD_SIZE": "4"}, 0), (WHOLE, 0), (WHOLE | {"RANK": "1", "LOCAL_RANK": "1"}, 1)],
    ids=["pod", "rank 0", "rank 1"],
)
def test_only_ranks_of_torchrun_wait_for_rank_0_which_may_have_found_the_same(capsys, monkeypatch, environment, waits):
    waited = []
    monkeypatch.setattr(streams, "wait_for_launcher", lambda: waited.append(capsys.readouterr().err))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["plan", "--model", "nowhere"]) == 2
    assert waited == [""] * waits
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("penstock: error: ") and "no such file or directory" in line


def test_terminal_escapes_in_a_path_and_a_profile_are_seen(capsys, tmp_path):
    model = tmp_path / "a\x1b[31m"
    model.write_text(find_model("demo").joinpath("config.json").read_text())
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(PROFILES["h200"] | {"source": "mine\x1b[2J"}))
    assert cli.main(["plan", "--model", str(model), "--device-profile", str(profile)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and r"a\x1b[31m (llama)" in shown and r"rates (mine\x1b[2J)" in shown
