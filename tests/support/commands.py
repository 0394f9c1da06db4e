"""Penstock's command line as a user runs it: in processes of its own, and with faults put into ranks.

    done = Command(folder, "generate", "-tp", "2", "--prompt", "Return the").finish()

A `fault` is Python text that is run in each rank when the executor's module has been imported: as `rank`, `Executor`
and `failing()`, which notes the time, it has what it needs. A fault `in_passes` is run by a watch (pass_faults.py), one
`in_front` in the front of a server.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support import pass_faults

ROOT = Path(__file__).resolve().parents[2]
GONE_S = 10.0
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PENSTOCK = ("-m", "penstock")
LAUNCH_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_SITE = """
import os, signal, sys, time
from tests.support.after_import import AfterImport

def in_rank(module):
    with open(f"{FOLDER}/rank_of{os.getpid()}", "w") as file:
        file.write(os.environ.get("RANK", "0"))
    open(f"{FOLDER}/pid{os.getpid()}", "w").close()
    given = {"failing": failing, "folder": FOLDER}
    exec(FAULT, given | {"rank": int(os.environ.get("RANK", 0)), "Executor": module.Executor})

def failing():
    with open(f"{FOLDER}/failed_at", "w") as file:
        file.write(str(time.time()))

AfterImport("penstock.engine.runtime.executor", in_rank)
AfterImport("penstock.engine.server.server", lambda module: exec(IN_FRONT, {}))
"""
# Runs FAIL on rank FAILING in the 12th pass: all ranks must have met by then.
_IN_A_PASS = """
import itertools, os, signal
passes = itertools.count(1)
def begin_pass(batch):
    if batch is not None and next(passes) == 12 and rank == {rank}:
        failing()
        {fail}
"""
SLOW = """
import time
def begin_pass(batch):
    time.sleep(0.05)
"""


def fault_in_a_pass(rank: int, fail: str) -> str:
    return _IN_A_PASS.format(rank=rank, fail=fail)


def _hear_interrupts() -> None:
    """A suite that was started in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_ranks(num_ranks: int, *arguments: str | Path, timeout: float) -> None:
    """A script, or `-m` and a module, of the tests or of Penstock under torchrun; raises if a rank fails."""
    launcher = [sys.executable, *TORCHRUN[:-1], str(num_ranks)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [*launcher, *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=timeout)


class Command:
    """A running `penstock ARGUMENTS`, or another `program`, in `folder`; after `finish` its exit code and output."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        launcher: tuple[str, ...] = (),
        program: tuple[str, ...] = PENSTOCK,
        fault: str = "",
        in_passes: str = "",
        in_front: str = "",
        **environment: str,
    ):
        self.folder = folder
        site = folder / "site"
        site.mkdir()
        texts = f"FOLDER, FAULT, IN_FRONT = {str(folder)!r}, {fault!r}, {in_front!r}\n"
        (site / "sitecustomize.py").write_text(texts + _SITE)
        env = {name: value for name, value in os.environ.items() if name not in LAUNCH_NAMES}
        path = os.pathsep.join(map(str, (site, ROOT)))
        if in_passes:
            environment |= {pass_faults.TEXT: in_passes, pass_faults.FOLDER: str(folder)}
            arguments += ("--watch", pass_faults.NAME) if program == PENSTOCK else ()
        self.process = subprocess.Popen(
            [sys.executable, *launcher, *program, *map(str, arguments)],
            cwd=folder,
            env=env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=_hear_interrupts,
        )

    def finish(self, stdin: str = "") -> "Command":
        """Waits for its end, and then until every rank is gone: no longer than GONE_S after the failure."""
        stdout, stderr = self.process.communicate(stdin.encode(), timeout=110)
        self.stdout, self.stderr = stdout.decode(), stderr.decode()
        self.exit_code = self.process.returncode
        self.wait_until_gone(self.failed_at())
        return self

    def wait_until_gone(self, since: float) -> None:
        while alive := [pid for pid in self.pids() if is_alive(pid)]:
            assert time.time() - since < GONE_S, f"still there: {alive}"
            time.sleep(0.02)

    def pids(self) -> list[int]:
        """The process ids of all ranks that came as far as the executor."""
        return [int(path.name[3:]) for path in self.folder.glob("pid*")]

    def failed_at(self) -> float:
        file = self.folder / "failed_at"
        return float(file.read_text()) if file.exists() else time.time()

    def kill(self) -> None:
        """Ends all that a failed test may have left."""
        for pid in [self.process.pid, *self.pids()] if self.process.poll() is None else self.pids():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
