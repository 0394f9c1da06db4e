"""Rounds on GPUs: every command is one that its module takes, at full size and in miniature, and a step ends with all
that it started."""

import importlib
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path

import pytest
from penstock.engine.commands import cli
from penstock.engine.commands.flags import Parser, config_from_args

from scripts import round as rounds
from scripts.bench import batch, traffic
from scripts.round_steps import STEPS, Command, Step
from tests.support.commands import ROOT
from tests.support.scripts import refused

COMMANDS = [
    pytest.param(command, id=f"{step.name}-{index}")
    for step in STEPS.values()
    for index, command in enumerate(step.commands)
]
RECORDS = [command.record for step in STEPS.values() for command in step.commands if command.record]


class Parsed(Exception):
    """A script has parsed its flags: it would run with these."""


def parse(self, words=None):
    args, unknown = self.parse_known_args(words)
    raise Parsed(args, unknown)


def check_flags(monkeypatch, module: str, words: list[str]) -> None:
    """Lets the module parse the words, with what it checks of them before it runs."""
    if module == "pytest":
        return check_tests([word for word in words if word.startswith("tests/")])
    if module == "penstock":
        ran = []
        monkeypatch.setattr(cli.COMMANDS[words[0]].module + ".run", lambda args, config: ran.append(config) or 0)
        assert cli.main(words) == 0 and ran
        return None
    if module == "scripts.bench.batch":  # hands on what it does not know
        parser = Parser(allow_abbrev=False)
        batch.add_arguments(parser)
        _, handed_on = parser.parse_known_args(words)
        return check_flags(monkeypatch, "penstock", ["batch", "demo", "-i", "in", "-o", "out", *handed_on])
    monkeypatch.setattr(Parser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(module).main()
    args, unknown = parsed.value.args
    assert unknown == []
    if hasattr(args, "resident"):
        config_from_args(args)
    if hasattr(args, "rows"):
        traffic.chosen(args.rows)
    return None


def check_tests(wanted: list[str]) -> None:
    assert wanted
    for one in wanted:
        file, _, name = one.partition("::")
        assert (ROOT / file).exists()
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def launched(words: list[str]) -> tuple[str, list[str]]:
    """The module and its arguments, without what launches ranks of it."""
    assert words[0] == "-m"
    if words[1] in ("torch.distributed.run", "tests.support.two_agents"):
        words = words[words.index("-m", 1) :]
    return words[1].replace("tests.support.gpu.sharing", "pytest"), words[2:]


@pytest.mark.parametrize("small, vllm", [(False, None), (False, "some/vllm"), (True, None)])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_its_module_takes(monkeypatch, tmp_path, command, small, vllm):
    monkeypatch.chdir(ROOT)
    words = rounds.words_of(command, Namespace(out=tmp_path, small=small, vllm=vllm), str(tmp_path))
    assert not any("{" in word for word in words) and (vllm in words) == (
        "{vllm}" in command.words and vllm is not None
    )
    assert not small or not any(word.startswith("benchmarks/shapes") for word in words)
    check_flags(monkeypatch, *launched(words))


@pytest.mark.parametrize(
    "words", ["scripts.bench.link --pieces 4", "scripts.bench.traffic --model demo --resident some"]
)
def test_a_flag_that_is_mistyped_is_found(monkeypatch, words):
    module, *flags = words.split()
    with pytest.raises((AssertionError, ValueError)):
        check_flags(monkeypatch, module, flags)


def test_no_record_is_written_twice():
    assert len(RECORDS) == len(set(RECORDS)) > 20


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_every_step_runs_in_miniature(tmp_path):
    """But for those on four GPUs, whose commands differ from those on two by that number alone."""
    args = Namespace(out=tmp_path, seconds=1100.0, small=True, vllm=None)
    steps = [step for step in STEPS.values() if step.gpus <= 2]
    assert rounds.run_round(steps, args) == 0, (tmp_path / "summary.txt").read_text()
    records = {command.record for step in steps for command in step.commands if command.record}
    assert {path.stem for path in tmp_path.glob("*.json")} >= records


def test_a_step_in_miniature_leaves_its_record_and_log(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["round", "stored_k*", "--small", "--out", str(tmp_path / "out")])
    assert rounds.main() == 0
    with tarfile.open(tmp_path / "out/round.tar.gz") as packed:
        assert {"stored_kernels.json", "stored_kernels.log", "summary.txt"} <= set(packed.getnames())
        summary = packed.extractfile("summary.txt").read().decode()
    first, *_, last = summary.splitlines()
    assert first.startswith("stored_kernels: rc 0, ") and last.startswith("all: ")
    assert capsys.readouterr().out == summary


def test_mistakes(monkeypatch, capsys, tmp_path):
    assert "fast: no such step" in refused(monkeypatch, capsys, rounds, "traffic", "fast", "--out", str(tmp_path))
    assert "--out: expected a folder" in refused(monkeypatch, capsys, rounds, "traffic")
    assert "expected the name of a step" in refused(monkeypatch, capsys, rounds, "--out", str(tmp_path))


def test_all_steps_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["round", "--list"])
    assert rounds.main() == 0
    _, *lines = capsys.readouterr().out.splitlines()
    for line, step in itertools.zip_longest(lines, STEPS.values()):
        assert line.split()[:3] == [step.name, str(step.gpus), str(step.seconds)] and step.shows in line


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Writes a module that steps can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda name, text: (tmp_path / f"{name}.py").write_text(text)


def round_of(tmp_path: Path, *steps: Step, seconds: float = 60.0) -> list[str]:
    rounds.run_round(steps, Namespace(out=tmp_path, seconds=seconds, small=False, vllm=None))
    return (tmp_path / "summary.txt").read_text().splitlines()


def step_of(name: str, *modules: str, seconds: int = 10, needs_vllm: bool = False) -> Step:
    return Step(name, 1, seconds, "", tuple(map(Command, modules)), needs_vllm)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_step_that_fails_says_so_and_the_next_ones_run(module, tmp_path):
    module("fails", "print('first'); raise ValueError('of this')")
    module("works", "print('second'); print('{}')")
    lines = round_of(tmp_path, step_of("both", "fails", "works"), step_of("one", "works"))
    assert lines[0].startswith("both: rc 1, ")
    assert lines[-3].startswith("one: rc 0, ") and lines[-2] == "    second" and lines[-1].startswith("all: ")
    assert "    ValueError: of this" in lines and "    first" in lines and "    {}" not in lines


def test_what_has_no_time_or_no_vllm_is_left_out(module, tmp_path):
    module("works", "print('ran')")
    steps = step_of("long", "works", seconds=100), step_of("other", "works", needs_vllm=True), step_of("one", "works")
    long, other, one, *_ = round_of(tmp_path, *steps)
    assert "long: left out" in long and "of the 100 s" in long
    assert other == "other: left out, without --vllm"
    assert one.startswith("one: rc 0, ")


def test_a_step_is_ended_at_its_limit(module, monkeypatch, tmp_path):
    monkeypatch.setattr(rounds, "TERM_S", 0.1)
    module("hangs", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)")
    began_s = time.monotonic()
    hung, *_ = round_of(tmp_path, step_of("hung", "hangs", seconds=1))
    assert hung.startswith("hung: rc 124, ") and time.monotonic() - began_s > 2
    assert rounds.marked(f"{os.getpid()}-hung") == []


def test_what_a_step_leaves_is_ended(module, tmp_path):
    """Also a process in a session of its own that takes no SIGTERM."""
    child = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(tmp_path / "temporary")!r}, "w").write(os.environ["TMPDIR"])
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
time.sleep(1000)
"""
    module("child", child)
    parent = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-m", "child"], start_new_session=True)
while not os.path.exists({str(tmp_path / "pid")!r}) or not os.path.getsize({str(tmp_path / "pid")!r}):
    time.sleep(0.01)
"""
    module("parent", parent)
    left, *_ = round_of(tmp_path, step_of("left", "parent"), seconds=200.0)
    pid = int((tmp_path / "pid").read_text())
    assert left.startswith("left: rc 0, ") and f"left processes: {pid}" in (tmp_path / "left.log").read_text()
    while is_alive(pid):  # it has been killed, and may still be on its way
        time.sleep(0.01)
    assert not Path((tmp_path / "temporary").read_text()).exists()


def test_a_step_does_not_outlive_the_round(module, tmp_path):
    pid = tmp_path / "pid"
    module("hangs", f"import os, time; print(os.getpid(), file=open({str(pid)!r}, 'w'), flush=True); time.sleep(1000)")
    program = f"""
import sys
from scripts import round
from scripts.round_steps import Command, Step
round.STEPS = {{"hung": Step("hung", 1, 300, "", (Command("hangs"),))}}
sys.argv = ["round", "hung", "--out", {str(tmp_path / "out")!r}]
round.main()
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        while not pid.exists() or not pid.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not is_alive(int(pid.read_text()))
