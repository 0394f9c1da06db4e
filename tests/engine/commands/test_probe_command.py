"""`penstock probe` on a CPU: alone, self-launched and under torchrun; what it leaves, and that the planner takes it."""

import json

import pytest
from penstock.engine.commands import cli
from penstock.engine.planning.device_profile import cache_directory, load_profile

from tests.support.commands import Command
from tests.support.forked_ranks import fork_ranks

pytestmark = pytest.mark.timeout(120)


def test_the_suite_has_a_cache_of_its_own(tmp_path_factory):
    assert cache_directory().is_relative_to(tmp_path_factory.getbasetemp())


def test_alone_in_words_and_the_planner_takes_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["probe", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "1 rank of " in shown.out and "no GPU: the link is a copy within host memory" in shown.out
    assert f"kept in {tmp_path}/penstock/cpu-1.json" in shown.err
    rates = load_profile(str(tmp_path / "penstock" / "cpu-1.json"))
    assert rates.link_gb_s > 0.1 and rates.memory_gb_s > 0.1 and rates.gemm_tflops > 0 and rates.step_latency_s > 0
    assert cli.main(["plan", "--model", "demo", "--device", "cpu", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["rates"]
    assert planned["source"].startswith("measured: ") and planned["link_gb_s"] == rates.link_gb_s


def test_an_output_of_its_own_is_a_profile_and_leaves_the_cache(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "mine.json"
    assert cli.main(["probe", "--device", "cpu", "--dtype", "float32", "--json", "--output", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text()) and printed["probe"]["dtype"] == "float32"
    assert not (tmp_path / "cache").exists()
    assert cli.main(["plan", "--model", "demo", "--device-profile", str(file)]) == 0
    assert "rates (measured: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "demo"], "unrecognized arguments: --model demo"),
        (["--device", "cpu", "--output", "/dev/null/x.json"], "--output /dev/null/x.json: no such directory"),
        (["--device", "cpu", "--output", ""], "--output .: is a directory, and a file is expected"),
    ],
)
def test_mistakes_are_one_line_and_status_two(capsys, arguments, message):
    assert cli.main(["probe", *arguments]) == 2
    assert f"penstock: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("launcher", ["self-launch", "torchrun"])
def test_two_ranks(tmp_path, monkeypatch, launcher):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("probe", "--device", "cpu", "--json")
    if launcher == "torchrun":
        done = fork_ranks(2, "-m", "penstock", *arguments, timeout=100)
        assert done.all_ended, done.stderr
    else:
        command = Command(tmp_path, *arguments, "-tp", "2")
        try:
            done = command.finish()
        finally:
            command.kill()
        assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()  # one voice
    profile = json.loads(line)
    assert profile == json.loads((tmp_path / "cache" / "penstock" / "cpu-2.json").read_text())
    probe = profile["probe"]
    assert profile["link_gb_s"] == [probe["link_alone_gb_s"][0], min(probe["link_together_gb_s"])]
    for name in ("link_alone_gb_s", "link_together_gb_s", "memory_gb_s", "gemm_tflops"):
        assert len(probe[name]) == 2 and min(probe[name]) > 0, name
    assert [row["bytes"] for row in probe["reduces"]] == [4096, 16384, 65536, 262144, 2**20]
    assert all(row["eager_s"] > 1e-5 for row in probe["reduces"])
    assert "rank 1 of 2: cpu" in done.stderr and done.stderr.count("kept in") == 1
