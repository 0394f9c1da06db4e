"""The command `penstock profile --plot` on the demo model: a picture of the pass that was asked for, and the trace as
JSON."""

import json
import re

import pytest
from penstock.engine.commands import cli
from penstock.engine.profile import trace_plot
from penstock.engine.profile.trace_plot import COLOURS, kind, rows
from penstock.engine.runtime.trace import read_intervals
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY

OPTIONS = ("--device", "cpu", "--input-len", "24", "--output-len", "4")


@pytest.mark.parametrize("which, tokens", [("decode", 2), ("prefill", 48)])
def test_a_picture_of_a_pass(capsys, tmp_path, monkeypatch, which, tokens):
    drawn = []
    plain_draw = trace_plot.draw
    monkeypatch.setattr("penstock.engine.commands.profile.draw", lambda *args: (drawn.append(args), plain_draw(*args)))
    trace, picture = str(tmp_path / "t.json"), tmp_path / "picture.png"
    where = ("--trace", trace, "--plot", str(picture), "--pass", which, "--batch-size", "2")
    assert cli.main(["profile", "demo", "--resident", "none", *where, *OPTIONS]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (lanes, _, _, title, _), *_ = drawn
    assert [name for name, _ in lanes] == ["compute", "copy", "predicted compute", "predicted copy"]
    assert ("decode pass of 2 rows" if which == "decode" else f"prefill pass of {tokens} tokens") in title
    (index,) = {interval.pass_index for _, intervals in lanes for interval in intervals}
    file = read_intervals(trace)
    assert max(interval.pass_index for interval in file[0, False]) >= index > 4  # a warm pass
    measured = [interval.name for interval in file[0, False] if interval.pass_index == index and interval.lane == COPY]
    assert [interval.name for interval in dict(lanes)["copy"]] == measured
    assert sorted(s.name for s in dict(lanes)["predicted compute"]) == sorted(s.name for s in dict(lanes)["compute"])
    assert min(interval.start_s for _, intervals in lanes for interval in intervals) == 0
    said = capsys.readouterr()
    assert f"{picture}; all passes, for Perfetto: {trace}" in said.err
    idle = r"^the copy lane idles \d+\.\d{3} ms between consecutive decode passes \(median of 2\)$"
    assert re.search(idle, said.out, re.M)


def test_a_part_of_a_pass_without_copies(capsys, tmp_path, monkeypatch):
    """The profile as JSON is all that is on standard output."""
    monkeypatch.chdir(tmp_path)
    part = ("--plot", "part.png", "--start-ms", "0", "--end-ms", "2", "--json")
    assert cli.main(["profile", "demo", "--resident", "all", *part, *OPTIONS]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json", "part.png"}
    assert all(interval.lane == COMPUTE for interval in read_intervals("trace.json")[0, False])
    said = capsys.readouterr()
    assert {"decode", "prefill"} < json.loads(said.out).keys() and "copy lane" not in said.err  # nothing streams


def test_without_matplotlib_it_says_how_to_install_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trace_plot, "Figure", None)
    assert cli.main(["profile", "nowhere", "--plot", "p.png", *OPTIONS]) == 2  # before it looks for the model
    assert "pip install 'penstock[plot]'" in capsys.readouterr().err


def test_a_directory_that_is_not_there_is_refused_first(capsys, tmp_path):
    assert cli.main(["profile", "nowhere", "--plot", str(tmp_path / "no" / "p.png"), *OPTIONS]) == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "times, message",
    [
        (["--start-ms", "nan"], "--start-ms nan: expected a finite number"),
        (["--end-ms", "inf"], "--end-ms inf: expected a finite number"),
        (["--start-ms", "2", "--end-ms", "2"], "--start-ms 2: expected less than --end-ms 2"),
    ],
)
def test_times_that_cannot_be_drawn_are_refused_first(capsys, tmp_path, monkeypatch, times, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "nowhere", "--plot", "p.png", *times, *OPTIONS]) == 2
    assert capsys.readouterr().err == f"penstock: error: {message}\n"


@pytest.mark.parametrize("flag, value", [("--pass", "decode"), ("--start-ms", "0"), ("--end-ms", "1")])
def test_what_is_drawn_needs_a_picture(capsys, tmp_path, monkeypatch, flag, value):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "nowhere", flag, value, *OPTIONS]) == 2
    assert capsys.readouterr().err == f"penstock: error: {flag}: says what is drawn, and there is no --plot\n"


def test_a_prompt_longer_than_the_model_is_refused_before_others_are_made(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("penstock.engine.profile.traced_run.random", None)  # random makes the tokens
    assert cli.main(["profile", "demo", "--device", "cpu", "--input-len", "1048576"]) == 2
    assert ": has 1048576 tokens, and at most 511 fit" in capsys.readouterr().err


def test_every_instruction_has_a_colour():
    names = {
        "acquire 3.ffn": "wait", "prefetch 0.attn (next pass)": "attn weights", "prefetch head": "head",
        "attn_allreduce 1": "reduce", "attn_residual+ffn_norm 2": "attn", "rope 0": "attn", "ffn_up 9": "ffn",
        "sample 32": "other",
    }  # fmt: skip
    assert {name: kind(name) for name in names} == names
    assert set(names.values()) <= set(COLOURS)
    assert rows("", []) == []


def test_generate_still_leaves_a_trace(tmp_path):
    file = tmp_path / "g.json"
    options = ("--prompt", "Return", "--max-tokens", "2", "--device", "cpu", "--trace", str(file))
    assert cli.main(["generate", "demo", *options]) == 0
    assert {event["ph"] for event in json.loads(file.read_text())["traceEvents"]} == {"M", "X"}
