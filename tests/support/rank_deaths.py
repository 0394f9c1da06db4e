"""A user's script on two ranks or more, one of which dies in one of four ways at one of seven times. It catches what
LLM raises.

    python tests/support/rank_deaths.py '{"case": {...}, "folder": ...}', or under torchrun

A rank that gets an exception leaves FOLDER/answerN.json. `Case.faults()` is for commands.Command.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from penstock import LLM, SamplingParams
from tests.support import pass_faults

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2, "resident": "none"}
PROMPT = [0, 376, 268]
DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo_model"
if pass_faults.TEXT in os.environ:
    OPTIONS |= {"debug": {"watch": pass_faults.NAME}}
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
MOST_WAIT_S = 30.0
STAY_S = 150.0  # longer than anybody waits for the others: nothing may come of its end

# What goes wrong, and in a rank that raises in the course of being a child and lives on: a close that hangs.
_DO = {
    "raise": "raise KeyError('the shard is bent')",
    "stay": "import os\n    from penstock.parallel.launch import Launch as it\n"
    "    if 'PENSTOCK_SELF_LAUNCHED' in os.environ: it.close = it.leaving = lambda self: time.sleep(150)\n"
    "    raise KeyError('the shard is bent')",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "stop": "os.kill(os.getpid(), signal.SIGSTOP)",
}
_FAIL = """
import os, signal, time
if os.path.exists(folder + "/failed_at"):
    rank = -1  # of another launch: once is enough
def fail(after_s=0.0):
    time.sleep(after_s)
    failing()
    {do}
"""
# The others are as far as the victim: by then all have imported what they need, which may take long.
_WAIT = """
def fail_with_all_there(*_):
    while sum(name.startswith("pid") for name in os.listdir(folder)) < {num_ranks}:
        time.sleep(0.05)
    fail()
"""
_WHEN = {
    # Rank 0 of a self-launch listens, and does not open the store that the others come to.
    "store": _WAIT
    + """
import penstock.parallel.rendezvous
if rank == {victim}:
    penstock.parallel.rendezvous._open_store = fail_with_all_there
""",
    # It has said who it is, and nobody hears it yet.
    "joining": _WAIT
    + """
from penstock.parallel.pulse import Pulse
if rank == {victim}:
    setattr(Pulse, "join" if rank else "host", fail_with_all_there)
""",
    # As it reads its own options.
    "meeting": _WAIT
    + """
import penstock.engine.config
if rank == {victim}:
    penstock.engine.config.EngineConfig.__post_init__ = fail_with_all_there
""",
    "loading": """
import penstock.engine.weights.host_store as host_store
if rank == {victim}:
    host_store._Reader.begin = lambda *_: fail()
""",
}
# Which agent of torchrun started a rank stands for its host.
_HOST = """
import os
from tests.support.forked_ranks import be_on_host
be_on_host("host " + os.environ["GROUP_RANK"])
"""
_IN_A_PASS = """
passes = []
def begin_pass(batch):
    if batch is not None:
        passes.append(batch)
    if len(passes) == 4 and rank == {victim}:
        fail()
"""
# The second call: the victim fails as it comes, while the other is elsewhere (idle) or waits in that call (between).
# Under torchrun rank 1 awaits two messages a call.
_SECOND = """
import sys
calls, build = [], Executor.__init__
def build_and_put(self, *given, **named):
    build(self, *given, **named)
    Executor.__init__ = build
    Engine, name = sys.modules["penstock.engine.runtime.engine"].Engine, "_await"
    if rank == 0:
        Engine, name = sys.modules["penstock.engine.llm"].LLM, "_agree"
    do = getattr(Engine, name)
    def do_or_fail(self, *what):
        calls.append(what)
        if rank == {victim} and len(calls) == (3 if {torchrun} and rank else 2):
            with (self if rank else self.engine).together():
                fail({after_s})
        return do(self, *what)
    setattr(Engine, name, do_or_fail)
Executor.__init__ = build_and_put
"""


@dataclass(frozen=True)
class Case:
    """One death."""

    launcher: str  # self, torchrun, or hosts: torchrun on two hosts, each with half of the ranks
    fault: str
    when: str
    victim: int = 1
    again: bool = False
    num_ranks: int = 2

    @property
    def name(self) -> str:
        ranks = [f"{self.num_ranks}ranks"] if self.num_ranks > 2 else []
        return "-".join([self.launcher, *ranks, f"rank{self.victim}", self.fault, self.when])

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.num_ranks) if rank != self.victim]

    @property
    def must_answer(self) -> list[int]:
        """The ranks that no launcher ends before they can answer: torchrun ends those beside one that has ended."""
        return {"self": [0], "torchrun": [], "hosts": [*range(self.num_ranks // 2)]}[self.launcher]

    def faults(self) -> dict[str, str]:
        """Texts for commands.Command."""
        after_s = 1.5 if self.when == "between" else 0.0
        given = {"victim": self.victim, "num_ranks": self.num_ranks, "after_s": after_s}
        texts = _WHEN | {"pass": _IN_A_PASS}
        text = texts.get(self.when, _SECOND).format(**given, torchrun=self.launcher == "torchrun")
        kind = "in_passes" if self.when == "pass" else "fault"
        faults = {kind: _FAIL.format(do=_DO[self.fault]) + text}
        return faults | {"fault": _HOST + faults.get("fault", "")} if self.launcher == "hosts" else faults

    def cause(self) -> str:
        """The message that every other rank has to give."""
        if self.fault in ("raise", "stay"):
            return "KeyError: 'the shard is bent'"
        if self.fault == "stop":
            return f"rank {self.victim} was stopped (SIGSTOP)"
        return f"rank {self.victim} " + ("was killed by SIGKILL" if self.launcher == "self" else "ended without a word")


def main(case: Case, folder: Path) -> None:
    rank = int(os.environ.get("RANK", 0))
    try:
        use(case, folder, rank)
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error)}
        if case.again:
            with model(case, folder) as llm:
                answer["again"] = llm.generate(PROMPT, PARAMS)[0].outputs[0].token_ids
        (folder / f"answer{rank}.json").write_text(json.dumps(answer))
        wait_for_answers(case, folder, rank)
        if rank == case.victim and case.fault == "raise":
            raise
        time.sleep(STAY_S if rank == case.victim else 0)
        sys.exit(3)


def wait_for_answers(case: Case, folder: Path, rank: int) -> None:
    """Stays until the others beside this rank have answered, too: their launcher ends them when one has ended."""
    beside = [folder / f"answer{other}.json" for other in case.must_answer if rank in case.must_answer]
    deadline = time.monotonic() + MOST_WAIT_S
    while not all(answer.exists() for answer in beside) and time.monotonic() < deadline:
        time.sleep(0.05)


def model(case: Case, folder: Path) -> LLM:
    """The demo model; for three ranks one of six heads, with random weights."""
    if case.num_ranks != 3:
        return LLM("demo", case.num_ranks, **OPTIONS)
    config = json.loads((DEMO / "config.json").read_text())
    file = folder / f"config{os.getpid()}.json"
    file.write_text(json.dumps(config | {"num_attention_heads": 6, "num_key_value_heads": 3}))
    return LLM(file, case.num_ranks, load_format="dummy", **OPTIONS)


def use(case: Case, folder: Path, rank: int) -> None:
    llm = model(case, folder)
    llm.generate(PROMPT, PARAMS)
    if case.when == "idle" and rank != case.victim:
        while not (folder / "failed_at").exists():
            time.sleep(0.1)
        time.sleep(1.0)
    llm.generate(PROMPT, PARAMS)
    raise AssertionError("nothing was raised")


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    main(Case(**told["case"]), Path(told["folder"]))
