"""Scripts end as the command line does."""

import importlib
import os
import re
import runpy
import subprocess
import sys

import pytest

from scripts.bench.entry import run_script
from tests.support.commands import ROOT, TORCHRUN
from tests.support.scripts import refused

SCRIPTS = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path.read_text()
    for path in (ROOT / "scripts").rglob("*.py")
    if "__main__" in path.read_text()
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_a_mistake_in_one_line(name):
    """The line comes without a page of usage, and without a traceback."""
    assert re.search(r"sys\.exit\((run_rank\(lambda: )?run_script\(main\)", SCRIPTS[name])
    assert "ArgumentParser(" not in SCRIPTS[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_answers_as_a_module(monkeypatch, capsys, name):
    """The command is `python -m scripts.bench.latency --help`; the page that it shows names the script in no other
    way."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out
    assert f"-m {name}" in SCRIPTS[name]


NO_GGUF = {  # and why
    "check_numerics": ((), "which transformers reads too"),
    "bench.batch": (
        ("--num-prompts", "1", "--input-len", "1", "--output-len", "1", "--compare", "vllm"),
        "--compare vllm: it is given a config.json",
    ),
    "bench.startup": (("--checkpoint",), "--checkpoint: it is written as safetensors"),
    "bench.latency": (("--compare", "transformers"), "--compare: the others read a directory of safetensors"),
}


@pytest.mark.parametrize("name", NO_GGUF)
def test_a_script_that_reads_no_gguf_file_says_why(monkeypatch, capsys, name):
    arguments, why = NO_GGUF[name]
    script = importlib.import_module(f"scripts.{name}")
    message = refused(monkeypatch, capsys, script, "--model", "models/m.gguf", *arguments)
    assert "models/m.gguf" in message and why in message


@pytest.mark.parametrize("page", ["README.md", "Makefile", ".ci/run", "docs", "scripts"])
def test_no_page_runs_a_script_by_its_file(page):
    """Then its folder would be on the path, and the checkout would not."""
    pages = [ROOT / page] if (ROOT / page).is_file() else [*(ROOT / page).rglob("*.md"), *(ROOT / page).rglob("*.py")]
    by_file = re.compile(r"(?:python3?|torchrun)\b[^\n]*[ /]scripts/[\w/]+\.py")
    assert pages and [match[0] for file in pages for match in by_file.finditer(file.read_text())] == []


@pytest.mark.parametrize(
    "error, text",
    [
        (ValueError("--n 0: expected\nmore"), r"--n 0: expected\nmore"),
        (FileNotFoundError(2, "No such file or directory", "a\x1b[2J"), r"a\x1b[2J: No such file or directory"),
        (MemoryError("the system refuses 3 TiB"), "the system refuses 3 TiB"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, error, text):
    def fail() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["/some/where/script.py"])
    assert run_script(fail) == 2
    assert capsys.readouterr().err == f"script.py: error: {text}\n"


# Rank 0 of a launch in which only the others have a mistake works on, until the launcher ends it.
MISTAKEN = """
import os, sys, time
from penstock.parallel import failure
from scripts.bench.entry import run_script
failure.LAUNCHER_WAIT_S = float(sys.argv[2])
def main():
    if sys.argv[1] == "alone" and os.environ["RANK"] == "0":
        time.sleep(100)
    raise ValueError("--n 0: expected more")
sys.exit(run_script(main))
"""


@pytest.mark.timeout(100)
@pytest.mark.parametrize("who, wait_s", [("all", "90"), ("alone", "0.1")])
def test_ranks_say_a_mistake_once_whoever_has_it(tmp_path, who, wait_s):
    """Rank 0 says a mistake of all ranks, and the launcher ends the other rank, which waits for that. (The waits are so
    long that a slow machine makes no difference.)"""
    script = tmp_path / "mistaken.py"
    script.write_text(MISTAKEN)
    command = [sys.executable, *TORCHRUN, script, who, wait_s]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("mistaken.py: error: --n 0: expected more\n") == 1


def test_a_bug_keeps_its_traceback_and_a_status_passes():
    with pytest.raises(KeyError):
        run_script(lambda: {}["x"])
    with pytest.raises(OSError, match="Bad file descriptor"):
        run_script(lambda: (_ for _ in ()).throw(OSError(9, "Bad file descriptor")))
    assert run_script(lambda: None) == 0 and run_script(lambda: 3) == 3
