"""Bad values for every flag of every subcommand, made from the parsers themselves, and every kind of unfit file for all
that a command line names: status 2 and one line that names the flag or the file, before anything is loaded, within 10 s
of this process's own time and 2 GiB of memory. Most run in this process, some in processes of their own."""

import argparse
import io
import itertools
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from penstock.engine.commands import cli
from penstock.engine.config import parse_resident
from penstock.engine.planning.find_model import find_model
from penstock.engine.runtime import start_engine
from penstock.engine.user_files import MAX_JSON_BYTES
from penstock.parallel.launch import Launch
from penstock.scheduler.cost.time_model import PROFILES
from penstock.scheduler.units import GIB, KIB, MIB

from scripts.bench.peak_memory import NOW, reset_peak, resident_bytes
from tests.support.commands import ROOT

COMMANDS = [name for name, command in cli.COMMANDS.items() if command.does]
HANGS_S = 120  # a guard against what never ends; no bound on speed
MOST_S, MOST_BYTES = 10, 2 * GIB  # of processor time, which other processes do not add to; of resident memory
IMPORTED_BYTES = GIB // 2  # of these, what a process of the command line has when it begins to read
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
    "lookahead": ("-1", "2"),
    "watch": ("nowhere", ":Watch"),
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
    "port": ("-1", "65536"),
    "max_num_queued_reqs": ("-1", "9999999999"),
    "max_queue_wait": ("0", "-1"),
    "shutdown_timeout": ("-1", "1e9"),
    "permute": ("", "columns"),
    "permute_key": ("zz", "00"),
}
NEEDED = {"generate": ("--prompt", "a"), "split": ("--prompt", "a"), "serve": ("--port", "0")}
NEEDED["batch"] = ("-i", "in.jsonl", "-o", "out.jsonl")
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
EMOJI = "\U0001f600".encode()
NAMES = 1_900_000
# What is only just read, and refused at its end, by the piece that it repeats; an emoji makes all text take four times
# its bytes.
LARGE = {
    "emoji": (b'{"' + EMOJI + b'": "', b"a" * MIB, (MAX_JSON_BYTES // MIB - 1), b"\\n"),
    "lines": (EMOJI, b"aa\n", 44_000_000, b""),
    "objects": (b"", b'{"prompt": "a"}\n', 260_000, b"{}"),
    "text": (EMOJI, b"word ", 62 * MIB // 5, b""),
    "prompt": (b'{"prompt": "' + EMOJI, b"word ", 60 * MIB // 5, b'"}'),
    "tokens": (b"", b'{"prompt_token_ids": [' + b"300," * 999_999 + b"3]}\n", 5, b"{}"),
}
TEXTS = ("text", "prompt")  # refused when the length of sequences is known, which is planned
SPARSE_BYTES = 16 * GIB
KINDS = ("missing", "directory", "fifo", "/dev/zero", *FILES, "sparse", "emoji")
INDEX = "model.safetensors.index.json"  # nobody asks for it where there is one file with all weights
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", INDEX, "tokenizer.json")


# The peak of resident memory in KiB; what wait4 tells has that of the process that started it in it. And the time.
WITH_PEAK = """
import re, sys, time
from penstock.__main__ import main
sys.argv[0] = "penstock"
try:
    sys.exit(main())
finally:
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
    open("peak", "w").write(f"{peak} {time.process_time()}")
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
    parser, *_ = cli._parsers(command)
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
        if not values and action.nargs in (None, "+"):
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
        rows += [
            Row((name, *NEEDED.get(name, ()), "--model", path), named)
            for name in ("generate", "chat", "batch", "serve", "split", "profile")
        ]
        rows += [
            Row((*command, "--prompts-file", path), (*named, "no prompt")) for command in (("generate",), ("split",))
        ]
        rows += [
            Row((name, *NEEDED.get(name, ()), "--device-profile", path), named)
            for name in ("generate", "chat", "batch", "serve", "profile")
        ]
        if kind not in ("empty", "deep", "huge"):  # of which each is a text, and so a template
            rows.append(Row(("generate", "--chat", "a", "--chat-template", path), named))
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
    rows.append(Row(("plan", "--device-profile", f"{FOLDER}/names"), ("names",)))
    rows += [
        Row(("generate", "--prompts-file", f"{FOLDER}/{kind}"), (kind,))
        for kind in LARGE
        if kind not in ("emoji", *TEXTS)
    ]
    return rows


ROWS = [*value_rows(), *file_rows()]
PROCESSES = {"generate": 1, "split": 1, "profile": 1, "probe": 1, "plan": 1}  # each takes a torch of its own


def spread(command: str, count: int) -> list[Row]:
    """So many rows of a subcommand, its last one and others in even steps before it."""
    rows = [row for row in ROWS if row.arguments[0] == command]
    return rows[:: -(len(rows) // count)][:count]


AS_PROCESSES = [row for command, count in PROCESSES.items() for row in spread(command, count)]
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
    for kind, (start, piece, count, end) in LARGE.items():
        (folder / kind).write_bytes(start + piece * count + end)
    with open(folder / "names", "wb") as file:
        file.write(b'{"' + EMOJI + b'": 0')
        file.writelines(b', "%07d": "%07d"' % (number, number) for number in range(NAMES))
    with open(folder / "sparse", "wb") as file:
        file.truncate(SPARSE_BYTES)
    header = (folder / "emoji").read_bytes()
    (folder / "header").write_bytes(struct.pack("<Q", len(header)) + header)
    for name, kind in itertools.product(MODEL_FILES, KINDS):
        model = folder / f"{name}-{kind}".replace("/dev/zero", "zero")
        model.mkdir()
        for file in find_model("demo").iterdir():
            if file.name != name and not (name == INDEX and file.suffix == ".safetensors"):
                (model / file.name).symlink_to(file)
        if kind != "missing":
            has_header = (name, kind) == ("model.safetensors", "emoji")
            (model / name).symlink_to(folder / ("header" if has_header else kind))  # /dev/zero stays what it is
    return folder


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """A worker that is built, ranks that meet or a child that is launched fail the test; what is written lies apart."""

    def begin(*_, **__) -> None:
        pytest.fail("something was allocated, launched or measured before the mistake was found")

    monkeypatch.setattr(start_engine, "connect", begin)
    monkeypatch.setattr("penstock.parallel.group.connect", begin)
    monkeypatch.setattr(Launch, "start", begin)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)


def assert_one_line(row: Row, out: str, err: str) -> None:
    # a server listens before it loads, and says so
    (line,) = [line for line in err.splitlines() if line and not line.startswith("penstock serve: ")]
    assert out == "" and line.startswith("penstock: error: ") and "Traceback" not in line
    assert line.isprintable() and len(line) < 3000
    assert any(name in line for name in row.names), line


@pytest.fixture
def within_bounds(folder) -> Iterator[None]:
    """The test takes no more time and memory than a command line may."""
    reset_peak()
    before, start = resident_bytes(NOW), time.process_time()
    assert resident_bytes() - before < 16 * MIB  # the reset works here
    yield
    assert time.process_time() - start <= MOST_S
    assert resident_bytes() - before <= MOST_BYTES - IMPORTED_BYTES


def flags_of(row: Row) -> set[str]:
    return {text.split("=")[0] for text in row.arguments if text.startswith("-")}


def test_there_are_three_hundred_over_every_subcommand_and_flag():
    assert len(AS_PROCESSES) == 5 and len(IN_PROCESS) >= 290
    for command in COMMANDS:
        seen = set().union(*(flags_of(row) for row in ROWS if row.arguments[0] == command))
        for action in flags(command):
            assert seen & set(action.option_strings) or not action.option_strings, (command, action.dest)
    assert {"h200", "cpu"} == set(PROFILES)  # names are no files


def test_every_kind_of_file_is_given_to_every_flag_that_reads_one():
    for command, flag in itertools.product(COMMANDS, ("--model", "--device-profile", "--prompts-file")):
        if any(flag in action.option_strings for action in flags(command)):
            given = {row.arguments[-1] for row in ROWS if row.arguments[0] == command and row.arguments[-2] == flag}
            missing = [kind for kind in KINDS if not given & {kind, f"{FOLDER}/{kind}"}]
            assert not missing, (command, flag, missing)


@pytest.mark.timeout(HANGS_S)
@pytest.mark.parametrize("row", IN_PROCESS, ids=str)
def test_a_bad_command_line_is_refused_in_one_line(row, nothing_begins, within_bounds, folder, capfd):
    assert cli.main(row.within(folder)) == 2
    assert_one_line(row, *capfd.readouterr())


@pytest.mark.timeout(HANGS_S)
@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_that_no_sequence_holds_is_refused_before_it_is_encoded(kind, within_bounds, folder, capfd):
    row = Row(("generate", "--model", "demo", "--device", "cpu", "--prompts-file", f"{FOLDER}/{kind}"), ("prompt 0:",))
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
    peak, seconds = (tmp_path / "peak").read_text().split()
    assert int(peak) * KIB <= MOST_BYTES and float(seconds) <= MOST_S
