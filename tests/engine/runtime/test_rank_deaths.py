"""A rank dies: every other one ends, or raises the first cause. Ways to die x times x launchers; some of them run in
CI, all under `make soak`. That it takes 10 s at most is held on the clock of those who wait (test_limits.py): here a
busy machine may take longer, so that HANG_S only tells slow from never.

Before a rank comes to the meeting the others do not know it: one that is killed then torchrun's own agent answers for,
and one that is stopped then nobody can hear of, unless it is rank 0 of a self-launch, or its child.
"""

import itertools
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.support.commands import TORCHRUN, Command, is_alive
from tests.support.rank_deaths import Case

pytestmark = [pytest.mark.soak, pytest.mark.timeout(200)]
START_S, HANG_S = 110.0, 60.0
AT_ONCE = 3
TWO_AGENTS = ("-m", "tests.support.two_agents")
SCRIPT = Path(__file__).parents[2] / "support" / "rank_deaths.py"
LAUNCHERS, FAULTS, TIMES = (
    ("self", "torchrun"),
    ("raise", "stay", "kill", "stop"),
    ("idle", "loading", "pass", "between"),
)
CASES = [Case(*one) for one in itertools.product(LAUNCHERS, FAULTS, TIMES)]
CASES += [Case("torchrun", fault, "meeting", victim) for fault in FAULTS for victim in (0, 1)]
CASES += [
    Case("self", *one, victim=0) for one in itertools.product(("stay", "kill", "stop"), ("loading", "pass", "between"))
]
CASES += [Case("torchrun", "stop", "joining", victim) for victim in (0, 1)]
CASES += [Case("self", "stop", when, victim=0) for when in ("store", "joining")]
CASES += [
    Case(launcher, fault, "pass", num_ranks=3)
    for launcher, fault in (("self", "stay"), ("self", "stop"), ("torchrun", "stay"), ("torchrun", "stop"))
]
CASES += [Case("torchrun", "stop", "joining", victim, num_ranks=3) for victim in (0, 2)]
CASES += [Case("hosts", "kill", "pass"), *(Case("hosts", fault, "pass", victim=3, num_ranks=4) for fault in FAULTS)]
IN_CI = {
    "self-rank1-raise-between",
    "self-rank1-stay-pass",
    "self-rank1-kill-loading",
    "self-rank1-stop-pass",
    "self-rank1-stop-idle",
    "self-rank0-stop-pass",
    "torchrun-rank1-stay-meeting",
    "torchrun-rank1-stay-pass",
    "torchrun-3ranks-rank0-stop-joining",
    "torchrun-rank1-kill-between",
    "torchrun-rank1-stop-pass",
    "hosts-rank1-kill-pass",
}


# where all ranks can go on, another LLM is made
CASES = [replace(one, again=one.when == "pass" and (one.launcher == "self" or one.fault == "stay")) for one in CASES]


def marked(case: Case):
    return pytest.param(case, id=case.name, marks=[pytest.mark.alone] if case.name in IN_CI else [])


class Deaths:
    """The runs of the selected cases, in their order. AT_ONCE of them go on together: they wait most of the time, and
    nothing is held here that a busy machine changes."""

    def __init__(self, folder: Path, selected: list[Case]):
        self.folder, self.selected, self.running = folder, selected, {}

    def get(self, case: Case) -> Command:
        """The run of a case; the next ones are started too."""
        first = self.selected.index(case)
        for one in self.selected[first : first + AT_ONCE]:
            if one not in self.running:
                self.running[one] = self._start(one)
        return self.running[case]

    def _start(self, case: Case) -> Command:
        folder = self.folder / case.name
        folder.mkdir()
        told = json.dumps({"case": asdict(case), "folder": str(folder)})
        launcher = {"torchrun": (*TORCHRUN[:-1], str(case.num_ranks)), "hosts": (*TWO_AGENTS, str(case.num_ranks // 2))}
        return Command(folder, SCRIPT, told, launcher=launcher.get(case.launcher, ()), program=(), **case.faults())


@pytest.fixture(scope="module")
def deaths(request, tmp_path_factory):
    params = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    selected = [case for case in params if isinstance(case, Case)]
    deaths = Deaths(tmp_path_factory.mktemp("deaths"), selected)
    yield deaths
    for run in deaths.running.values():
        run.kill()


@pytest.fixture
def run(deaths, case):
    yield deaths.get(case)
    deaths.running[case].kill()


@pytest.mark.parametrize("case", [*map(marked, CASES)])
def test_every_other_rank_ends_or_says_why(run, case):
    wait_until(lambda: (run.folder / "failed_at").exists(), START_S, run)
    ranks = {int((run.folder / f"rank_of{pid}").read_text()): pid for pid in run.pids()}
    for rank in case.others:
        assert_ends_or_says_why(case, rank, ranks[rank], run.folder / f"answer{rank}.json", run)
    if case.launcher == "self" and case.victim > 0:
        assert not is_alive(ranks[case.victim])


def assert_ends_or_says_why(case: Case, rank: int, pid: int, answer: Path, run: Command) -> None:
    again_s = 30 if case.again else 0  # to make another one
    wait_until(lambda: answer.exists() or not is_alive(pid), HANG_S + again_s, run)
    if answer.exists():
        said = json.loads(answer.read_text())
        assert said["error"] == "RankFailed" and case.cause() in said["text"]
        assert len(said.get("again", ())) == (8 if case.again else 0)
    else:
        assert rank not in case.must_answer, run.finish().stderr


def wait_until(is_so, seconds: float, run: Command) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline or run.process.poll() is not None and not is_so():
            run.kill()
            raise AssertionError(f"not within {seconds:.1f} s: {run.process.communicate()[1].decode()}")
        time.sleep(0.05)
