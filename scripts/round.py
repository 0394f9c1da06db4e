"""Runs steps of a round on GPUs one after another, each within a limit of its own and all within --seconds: tests, and
the benchmarks whose records stand in benchmarks/.

scripts/round_steps.py has the steps; NAME may be a pattern. A step may take twice its expected seconds, and is left out
where less than these are left. What runs longer is ended with all processes that it has started, and the next step
begins. FOLDER gets a log of each step, the records under the names that they have in benchmarks/, and summary.txt;
round.tar.gz in it has all of them, and is written anew after each step. With --small every step runs on a CPU, in the
demo model's shape, which shows that its flags are right. Steps have the environment of the round, with PENSTOCK_COMMIT
and what NCCL needs.

    python -m scripts.round --list
    python -m scripts.round traffic '*_2ranks' --out results --vllm ~/vllm/bin/python
"""

import contextlib
import fnmatch
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from penstock.engine.commands.flags import Parser

from scripts.bench.entry import run_script
from scripts.round_steps import STEPS, Command, Step

ROOT = Path(__file__).resolve().parents[1]
MARKER = "ROUND_STEP"  # in the environment of all that a step starts
TIMED_OUT = 124  # as `timeout` has it
TERM_S, TRACE_S, KILL_S = 4.0, 2.0, 1.0  # to end by SIGTERM; to print where it is; to be gone
ENDING_S = TERM_S + TRACE_S + KILL_S + 1.0  # of the round, to end its last step and pack
SHOWN_LINES, SHOWN_ERRORS, SHOWN_WIDTH = 16, 5, 180
SMALL = {"intermediate_size": 768, "max_position_embeddings": 8192}  # blocks of GGUF and long rows want this much


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="steps, in their order; a pattern is all that match")
    parser.add_argument("--list", action="store_true", help="show the steps, and exit")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for logs, records and round.tar.gz")
    parser.add_argument("--seconds", type=float, default=575.0, metavar="S", help="of all steps (default: 575)")
    parser.add_argument("--small", action="store_true", help="run all on a CPU, in the demo model's shape")
    text = "a Python interpreter that has vLLM, or a folder of packages, for steps that compare with it"
    parser.add_argument("--vllm", metavar="PATH", help=text)
    args = parser.parse_args()
    if args.list:
        return print_steps()
    steps = chosen(args.names)
    if args.out is None:
        raise ValueError("--out: expected a folder for logs and records")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # a step never outlives the round
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # processes are aborted to show where they are
    return run_round(steps, args)


def print_steps() -> int:
    print(f"{'step':32}{'GPUs':>5}{'s':>5}  what it shows")
    for step in STEPS.values():
        print(f"{step.name:32}{step.gpus:5}{step.seconds:5}  {step.shows}{' (--vllm)' if step.needs_vllm else ''}")
    return 0


def chosen(names: Sequence[str]) -> list[Step]:
    """The steps of these names and patterns, each once. Raises ValueError for one that no step has."""
    found = {}
    for name in names:
        matching = fnmatch.filter(STEPS, name)
        if not matching:
            raise ValueError(f"{name}: no such step; --list shows them")
        found |= {one: STEPS[one] for one in matching}
    if not found:
        raise ValueError("expected the name of a step; --list shows them")
    return list(found.values())


def run_round(steps: Sequence[Step], args: Namespace) -> int:
    """Runs the steps, and returns 1 if one failed or was left out."""
    began_s = time.monotonic()
    end_s, failed = began_s + args.seconds - ENDING_S, False
    for step in steps:
        left_s = end_s - time.monotonic()
        code, lines = 1, []
        if step.needs_vllm and not args.vllm and not args.small:
            said = "left out, without --vllm"
        elif left_s < (0 if args.small else step.seconds):
            said = f"left out, {max(left_s, 0):.0f} s are left of the {step.seconds} s that it takes"
        else:
            step_began_s, limit_s = time.monotonic(), left_s if args.small else min(left_s, 2 * step.seconds)
            code = run_step(step, args, limit_s)
            said = f"rc {code}, {time.monotonic() - step_began_s:.0f} s of {limit_s:.0f}"
            lines = tail_of(args.out / f"{step.name}.log", code)
        failed = failed or code != 0
        say([f"{step.name}: {said}", *lines], args.out)
    say([f"all: {time.monotonic() - began_s:.0f} s"], args.out)
    return int(failed)


def say(lines: Sequence[str], out: Path) -> None:
    """Prints the lines, keeps them in summary.txt, and packs what is there."""
    print(*lines, sep="\n", flush=True)
    with (out / "summary.txt").open("a") as summary:
        print(*lines, sep="\n", file=summary)
    packing = out / "packing"  # the last whole archive stays until there is another
    with tarfile.open(packing, "w:gz") as archive:
        for path in sorted(out.iterdir()):
            if path.suffix in (".json", ".log", ".txt"):
                archive.add(path, path.name)
    packing.replace(out / "round.tar.gz")


def run_step(step: Step, args: Namespace, limit_s: float) -> int:
    """Runs a step's commands, the later ones even if one failed, and returns the exit status of the first that did."""
    began_s, codes = time.monotonic(), []
    with (args.out / f"{step.name}.log").open("wb") as file, scratch() as (on_disk, in_memory):
        environment = os.environ | {
            MARKER: f"{os.getpid()}-{step.name}",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": on_disk,
        }
        for command in step.commands:
            words = words_of(command, args, in_memory)
            file.write(f"$ python {shlex.join(words)}\n".encode())
            file.flush()
            left_s = limit_s - (time.monotonic() - began_s)
            codes.append(run([sys.executable, *words], environment, file, left_s))
    return next((code for code in codes if code), 0)


@contextlib.contextmanager
def scratch() -> Iterator[tuple[str, str]]:
    """A folder for temporary files, and one in memory if that can be had; a step that is ended leaves some."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(prefix="round-", ignore_cleanup_errors=True) as on_disk,
        tempfile.TemporaryDirectory(prefix="round-", dir=shm, ignore_cleanup_errors=True) as in_memory,
    ):
        yield on_disk, in_memory


def words_of(command: Command, args: Namespace, in_memory: str) -> list[str]:
    """The arguments of Python."""
    compare = ["--compare", "vllm", "--vllm", args.vllm] if args.vllm else []
    given = f"{command.words} {command.small}" if args.small else command.words
    words = ["-m"]
    for word in shlex.split(given):
        words += compare if word == "{vllm}" else [word.format(out=args.out, shm=in_memory)]
    if command.record:
        words += ["--output-json", str(args.out / f"{command.record}.json")]
    if args.small:
        shape = str(small_shape(args.out))
        words = [re.sub(r"^benchmarks/shapes/.*\.json$", lambda _: shape, word) for word in words]
    return words


def small_shape(out: Path) -> Path:
    """A config.json of about the demo model's shape."""
    config = json.loads((ROOT / "engine/demo_model/config.json").read_text()) | SMALL
    path = out / "small_shape.json"
    path.write_text(json.dumps(config))
    return path


def run(command: Sequence[str], environment: dict[str, str], log: BinaryIO, limit_s: float) -> int:
    """Runs a command, and returns its exit status, or TIMED_OUT; nothing that it has started is left then."""
    if limit_s <= 0:
        return TIMED_OUT
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        end(process)
        sweep(environment[MARKER], log)


def end(process: subprocess.Popen) -> None:
    """Ends a process and its group: by SIGTERM, or by SIGKILL where that takes too long."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERM_S)


def sweep(marker: str, log: BinaryIO) -> None:
    """Ends what a step has left in groups of its own; Python shows first where it is."""
    left = marked(marker)
    if not left:
        return
    log.write(f"left processes: {' '.join(map(str, left))}\n".encode())
    log.flush()
    for sent, wait_s in ((signal.SIGABRT, TRACE_S), (signal.SIGKILL, KILL_S)):
        signal_all(marked(marker), sent)
        until_s = time.monotonic() + wait_s
        while marked(marker) and time.monotonic() < until_s:
            time.sleep(0.05)


def marked(marker: str) -> list[int]:
    """The processes with this marker in their environment."""
    wanted, found = f"{MARKER}={marker}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # gone, or of another user
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def signal_all(pids: Sequence[int], sent: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sent)


def tail_of(log: Path, code: int) -> list[str]:
    """The last lines of a log, without JSON, below the first errors of others if there was a failure."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip() and line[0] not in "{$"]
    lines, last = lines[:-SHOWN_LINES], lines[-SHOWN_LINES:]
    errors = [line for line in lines if re.search(r"error: |Error: |^FAILED", line)] if code else []
    return [f"    {line[:SHOWN_WIDTH]}" for line in (*errors[:SHOWN_ERRORS], *last)]


if __name__ == "__main__":
    sys.exit(run_script(main))
