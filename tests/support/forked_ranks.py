"""Ranks of one launch on a CPU, as torchrun starts them, of a script or a module of the tests:

    done = fork_ranks(2, "-m", "tests.support.streaming_runs", folder, timeout=100)
    assert done.all_ended, done.stderr

With `hosts` they are as many on each of so many hosts, in order: none sees that these are one.

Importing torch is most of the work of a short rank, so ranks are forked from a process that has imported it once: this
file, run as a script. It has no other thread, which a fork would lose. The store where ranks meet is that of the tests'
own process, as it is the agent's under torchrun.
"""

import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import penstock.engine.llm  # noqa: F401  (what ranks are forked with)
import safetensors.torch  # noqa: F401
from penstock.parallel import processes
from torch.distributed import TCPStore

from tests.support.commands import LAUNCH_NAMES, ROOT

_POLL_S = 0.01


class Ended(NamedTuple):
    """`all_ended`: every rank ended by itself, with exit code 0. What they wrote stands rank by rank."""

    all_ended: bool
    stdout: str
    stderr: str


def fork_ranks(num_ranks: int, *arguments: str | Path, timeout: float, cwd: Path = ROOT, hosts: int = 1) -> Ended:
    """Runs a script, or `-m` and a module, with its arguments on each rank. If one fails, or after `timeout` seconds,
    all are ended."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_NAMES}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(num_ranks)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_WORLD_SIZE": str(num_ranks // hosts)}
    with tempfile.TemporaryDirectory() as folder:
        job = {"arguments": [*map(str, arguments)], "environment": environment, "cwd": str(cwd)}
        job |= {"timeout": timeout, "folder": folder, "hosts": hosts}
        codes = _codes_of(job)
        stdout, stderr = (
            [Path(folder, f"{stream}{rank}").read_text(errors="replace") for rank in range(num_ranks)]
            for stream in (1, 2)
        )
    told = (f"rank {rank}, exit code {code}:\n{text}" for rank, (code, text) in enumerate(zip(codes, stderr)))
    return Ended(codes == [0] * num_ranks, "".join(stdout), "".join(told))


def _codes_of(job: dict[str, Any]) -> list[int]:
    """The exit codes of a job's ranks. If the wait for them is broken off, they and their forker are ended."""
    forker = _forker()
    try:
        forker.stdin.write(json.dumps(job) + "\n")
        forker.stdin.flush()
        return json.loads(forker.stdout.readline())
    except BaseException:
        os.killpg(forker.pid, signal.SIGKILL)
        forker.wait()
        _forker.cache_clear()
        raise


@functools.cache
def _forker() -> subprocess.Popen:
    """The process that forks, in a group with its ranks. It ends with this process, for its standard input does."""
    command = [sys.executable, "-m", "tests.support.forked_ranks"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def _fork_for_ever() -> None:
    (threads,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Threads:")]
    assert threads.split() == ["Threads:", "1"], threads
    for line in sys.stdin:
        job = json.loads(line)
        pids = [_fork(job, rank) for rank in range(int(job["environment"]["WORLD_SIZE"]))]
        print(json.dumps(_wait(pids, time.monotonic() + job["timeout"])), flush=True)


def _fork(job: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(_run(job, rank))
    return pid


def _run(job: dict[str, Any], rank: int) -> int:
    """Runs what is asked for in a forked process, and returns its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(os.open(f"{job['folder']}/{stream}{rank}", os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"], RANK=str(rank))
    host, local_rank = divmod(rank, int(os.environ["LOCAL_WORLD_SIZE"]))
    os.environ["LOCAL_RANK"] = str(local_rank)
    if job["hosts"] > 1:
        be_on_host(f"host {host}")
    module = job["arguments"][0] == "-m"
    sys.argv = job["arguments"][module:]
    try:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def be_on_host(host: str) -> None:
    """Lets this process, which has imported what asks for it, take that for the identity of its host."""
    found = processes.host_id
    for module in list(sys.modules.values()):
        if getattr(module, "host_id", None) is found:
            module.host_id = lambda: host


def _wait(pids: list[int], deadline: float) -> list[int]:
    """The exit codes of all; when one has failed, or at the deadline, all others are killed."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in (pid for pid in pids if pid not in codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > deadline:
            for pid in (pid for pid in pids if pid not in codes):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    _fork_for_ever()
