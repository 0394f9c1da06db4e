"""Bad values for every flag of every subcommand, made from the parsers themselves, and every kind of unfit file for all
that a command line names: status 2 and one line that names the flag or the file, before anything is loaded. Most
run in this process, some in processes of their own, whose memory is bounded as well."""

import argparse
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from penstock.engine.commands import cli
from penstock.engine.config import parse_resident
from penstock.engine.planning.find_model import find_model
from penstock.engine.runtime import engine as rank_module
from penstock.parallel.launch import Launch
from penstock.scheduler.cost.time_model import PROFILES
from penstock.scheduler.units import GIB

from tests.support.commands import ROOT

COMMANDS = [name for name, command in cli.COMMANDS.items() if command.does]
HANGS_S = 60  # a guard against what never ends; no bound on speed
FOLDER = "FOLDER"  # stands in a row for the folder of the unfit files

# What no flag of that type takes. A dash at the beginning is a flag for argparse, so `=` joins them.
TEXTS = ("", "\x1b[31m\n", "x" * 5000)
HUGE = ("1" + "0" * 30, "-1" + "0" * 30, "9" * 5000)
BAD = {
    int: ("x", "", "1.5", "1e3", "nan", *HUGE, "\x1b[2J"),
    float: ("nan", "x", "", "inf", "-inf", "1e400", "-1e400", "9" * 5000, "\x1b[2J"),
    parse_resident: ("most", "", "nan", "inf", "1.5", "-0.1", "9" * 5000),
    "choices": ("AUTO", *TEXTS),
    "bytes": ("lots", "", "0", "-1", "nan", "1e400GiB", "9" * 18 + "TiB", "9" * 5000, "0.0001B"),
    "switch": ("1", "true"),
}
# Bounds that the types do not say: a value that is just too small, and one that would take all time or memory.
BOUNDS = {
    "tensor_parallel_size": ("0", "1000000000"),
    "max_model_len": ("0", "2147483648"),
    "max_num_seqs": ("0", "1000000"),
    "max_num_batched_tokens": ("-1", "1000000000"),
    "attention_sinks": ("-1", "2147483648"),
    "attention_window": ("0", "2147483648"),
    "page_size": ("0", "1099511627776"),
    "num_pages": ("0", "2147483648"),
    "seed": ("18446744073709551616",),
    "page_order_seed": ("-9223372036854775809",),
    "gpu_memory_utilization": ("0", "1.01"),
    "link_gb_s": ("0", "-1", "1e30"),
    "sampling_n": ("0", "1000000"),
    "sampling_max_tokens": ("0", "2147483648"),
    "sampling_logprobs": ("-1", "21"),
    "sampling_temperature": ("-0.1",),
    "sampling_top_p": ("0", "1.1"),
    "sampling_top_k": ("-2", "2147483648"),
    "stop_token_ids": ("-1", "2147483648"),
    "input_len": ("1", "2147483648"),
    "output_len": ("1", "2147483648"),
    "batch_size": ("0", "2147483648"),
    "context": ("0", "1000000000000"),
    "permute": ("", "columns"),
    "permute_key": ("zz", "00"),
}
NEEDED = {"generate": ("--prompt", "a"), "split": ("--prompt", "a")}
BYTES = ("gpu_memory", "ring")
WRITERS = (("probe", "--output"), ("profile", "--plot"), ("generate", "--prompt", "a", "--trace"))

FILES = {
    "empty": b"",
    "junk": bytes(range(128, 256)) * 8,
    "deep": b'{"a":' * 100_000,
    "huge": b'{"num_hidden_layers": 1' + b"0" * 5000 + b', "prompt_token_ids": [1' + b"0" * 5000 + b"]}",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n",
    "unreadable": b"\xff\xfe",  # without its mode, which stops nobody who is root
}
KINDS = ("missing", "directory", "fifo", "/dev/zero", *FILES)
INDEX = "model.safetensors.index.json"  # nobody asks for it where there is one file with all weights
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", INDEX, "tokenizer.json")


# The peak of resident memory in KiB; what wait4 tells has that of the process that started it in it.
WITH_PEAK = """
import re, sys
from penstock.__main__ import main
sys.argv[0] = "penstock"
try:
    sys.exit(main())
finally:
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
    open("peak", "w").write(peak)
"""


class Row(NamedTuple):
    """`names`: what the message names, one of these."""

    arguments: tuple[str, ...]
    names: tuple[str, ...]

    def within(self, folder: Path) -> list[str]:
        return [text.replace(FOLDER, str(folder)) for text in self.arguments]

    def __str__(self) -> str:
        return "-".join(text if len(text) < 80 else f"{text[:20]}({len(text)})" for text in self.arguments)


def flags(command: str) -> list[argparse.Action]:
    parser, _ = cli._parsers(command)
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [action for action in commands.choices[command]._actions if not action.dest.startswith("help")]


def bad_values(action: argparse.Action) -> tuple[str, ...]:
    if action.nargs == 0:
        return BAD["switch"]
    if action.choices:
        return BAD["choices"]
    kind = "bytes" if action.dest in BYTES else getattr(action.type, "__wrapped__", action.type)
    return (*BOUNDS.get(action.dest, ()), *BAD.get(kind, ()))


def value_rows() -> list[Row]:
    """Two values for each flag of each subcommand, others from one flag to the next; one that takes any text is left
    without its value."""
    rows, turn = [], itertools.count()
    for command, action in [(name, action) for name in COMMANDS for action in flags(name)]:
        if not action.option_strings:
            continue
        flag, values = action.option_strings[0], bad_values(action)
        names = (flag, f"{action.dest.removeprefix('sampling_')}=", f"{action.dest}:", f"{action.dest} ")
        start = (command, *NEEDED.get(command, ()))
        if not values and action.nargs is None:
            rows.append(Row((*start, flag), names))
        for value in dict.fromkeys(values[next(turn) % len(values)] for _ in range(2 if values else 0)):
            rows.append(Row((*start, f"{flag}={value}"), names))
    return rows


def file_rows() -> list[Row]:
    """Every kind of unfit file for every file that is read or written; of a model's files in a directory of their own,
    which holds the demo model else."""
    rows = []
    for kind in KINDS:
        path = kind if kind.startswith("/") else f"{FOLDER}/{kind}"
        named = (path, kind)
        rows.append(Row(("plan", "--model", path), named))
        rows.append(Row(("plan", "--device-profile", path), named))
        rows.append(Row(("generate", "--prompts-file", path), (*named, "no prompt")))
        for name in MODEL_FILES:
            if kind == "missing" and name in ("generation_config.json", INDEX):  # nor is it missed
                continue
            if kind == "huge" and name == "generation_config.json":  # neither of its huge fields is read
                continue
            command = ("plan",) if name == "config.json" else ("generate", "--prompt", "a")
            rows.append(Row((*command, "--model", f"{FOLDER}/{name}-{kind}".replace("/dev/zero", "zero")), (name,)))
        if kind in ("directory", "fifo", "/dev/zero"):
            rows += [Row((*writes, path), named) for writes in WRITERS]
    rows += [Row((*writes, f"{FOLDER}/no/file"), writes[-1:]) for writes in WRITERS]
    rows.append(Row(("generate", "--prompt", "a", "--tokenizer", f"{FOLDER}/directory"), ("tokenizer",)))
    return rows


ROWS = [*value_rows(), *file_rows()]
AS_PROCESSES = ROWS[:: len(ROWS) // 20][:20]
IN_PROCESS = [row for row in ROWS if row not in AS_PROCESSES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every kind of FILES, and a copy of the demo model for each file of it that is spoilt."""
    folder = tmp_path_factory.mktemp("unfit")
    (folder / "directory").mkdir()
    os.mkfifo(folder / "fifo")
    for kind, content in FILES.items():
        (folder / kind).write_bytes(content)
    (folder / "unreadable").chmod(0)
    for name, kind in itertools.product(MODEL_FILES, KINDS):
        model = folder / f"{name}-{kind}".replace("/dev/zero", "zero")
        model.mkdir()
        for file in find_model("demo").iterdir():
            if file.name != name and not (name == INDEX and file.suffix == ".safetensors"):
                (model / file.name).symlink_to(file)
        if kind != "missing":
            (model / name).symlink_to(folder / kind)  # an absolute kind, a device, stays what it is
    return folder


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """A worker that is built, ranks that meet or a child that is launched fail the test; what is written lies apart."""

    def begin(*_, **__) -> None:
        pytest.fail("something was allocated, launched or measured before the mistake was found")

    monkeypatch.setattr(rank_module, "Worker", begin)
    monkeypatch.setattr(rank_module, "connect", begin)
    monkeypatch.setattr("penstock.parallel.group.connect", begin)
    monkeypatch.setattr(Launch, "start", begin)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)


def assert_one_line(row: Row, out: str, err: str) -> None:
    (line,) = [line for line in err.splitlines() if line]
    assert out == "" and line.startswith("penstock: error: ") and "Traceback" not in line
    assert line.isprintable() and len(line) < 3000
    assert any(name in line for name in row.names), line


def test_there_are_three_hundred_over_every_subcommand_and_flag():
    assert len(AS_PROCESSES) == 20 and len(IN_PROCESS) >= 280
    for command in COMMANDS:
        for action in flags(command):
            seen = [row for row in ROWS if row.arguments[0] == command and any(
                text.split("=")[0] in action.option_strings for text in row.arguments)]  # fmt: skip
            assert seen or not action.option_strings or action.dest in ("tokenizer", "out"), (command, action.dest)
    assert {"h200", "cpu"} == set(PROFILES)  # names are no files


@pytest.mark.timeout(HANGS_S)
@pytest.mark.parametrize("row", IN_PROCESS, ids=str)
def test_a_bad_command_line_is_refused_in_one_line(row, folder, nothing_begins, capfd):
    assert cli.main(row.within(folder)) == 2
    assert_one_line(row, *capfd.readouterr())


@pytest.mark.parametrize("row", AS_PROCESSES, ids=str)
def test_and_by_a_process_of_bounded_memory(row, folder, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITH_PEAK, *row.within(folder)]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 2
    assert_one_line(row, done.stdout, done.stderr)
    assert int((tmp_path / "peak").read_text()) * 1024 < 2 * GIB
