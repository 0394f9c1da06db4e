"""`penstock generate` over two ranks, as processes: text that flows, one voice, traces."""

import json
import os
import time

import pytest

from tests.support.commands import SLOW, TORCHRUN, Command

pytestmark = pytest.mark.timeout(120)
GREEDY = ("--temperature", "0", "--ignore-eos")
# Ranks move alike: so that one's figures are not another's, each counts something of its own in every pass.
COUNTS_MORE = """
from penstock.parallel.ledger import Site
def around(instruction, ctx, run):
    if str(instruction) == "embedding":
        ctx.model.collectives.ledger.add(Site("own", rank), 1 + rank)
    run()
"""


@pytest.fixture
def command(tmp_path):
    running = []

    def start(*arguments: str, **settings) -> Command:
        running.append(Command(tmp_path, *arguments, **settings))
        return running[-1]

    yield start
    for one in running:
        one.kill()


@pytest.mark.alone
def test_text_flows_and_a_trace_is_left(command, tmp_path):
    """Each pass takes 50 ms or more: what comes out of the pipe has to come in many pieces over the whole time."""
    options = ("-tp", "2", "--resident", "none", "--max-tokens", "32", "--trace", "trace.json", *GREEDY)
    started = command("generate", *options, in_passes=SLOW)
    started.process.stdin.write(b"Return the\n")
    started.process.stdin.close()
    pieces = []
    while piece := os.read(started.process.stdout.fileno(), 4096):
        pieces.append((time.monotonic(), piece))
    started.process.stdin = None
    done = started.finish()
    assert done.exit_code == 0, done.stderr
    times = [at for at, _ in pieces]
    assert len(pieces) >= 15 and times[-1] - times[0] > 1.0
    assert max(after - before for before, after in zip(times, times[1:])) < 0.8 * (times[-1] - times[0])
    assert b"".join(piece for _, piece in pieces).decode().endswith("\n")
    assert len(done.pids()) == 2
    before, after = done.stderr.splitlines()
    assert before.startswith("demo on 2 ranks (cpu): ") and after.startswith("32 tokens in ")
    assert_trace(tmp_path / "trace.json", num_passes=32)


def assert_trace(file, num_passes: int) -> None:
    assert [path.name for path in file.parent.glob(file.name + "*")] == [file.name]  # the ranks' parts are gone
    trace = json.loads(file.read_text())
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {"ph", "pid", "tid", "name", "ts", "dur"} <= set(spans[0])
    for rank in (0, 1):
        pid = next(pid for (pid, tid), name in names.items() if tid is None and name == f"rank {rank}")
        lanes = {names[pid, tid]: [s for s in spans if (s["pid"], s["tid"]) == (pid, tid)] for tid in (0, 1)}
        assert set(lanes) == {"compute", "copy"}
        passes = {span["args"]["pass"] for span in lanes["compute"]}
        assert passes >= set(range(num_passes))
        for lane, expected in (("compute", "attn_qkv 3"), ("copy", "prefetch 3.ffn")):
            assert all(span["dur"] >= 0 and span["ts"] >= 0 for span in lanes[lane])
            assert sum(span["name"] == expected for span in lanes[lane]) >= num_passes


@pytest.mark.parametrize("options", [("-tp", "2"), ()], ids=["self-launched", "torchrun"])
def test_rank_0_alone_speaks_and_says_what_each_rank_moved(command, options):
    """Under torchrun both ranks have the same standard input: rank 0 reads it for all."""
    launcher = () if options else TORCHRUN
    more = ("--resident", "none", "--max-tokens", "4", "--json", "--verbose", *GREEDY)
    more += ("--device-profile", "cpu")  # what would be measured might cut the prompts
    started = command("generate", *options, *more, launcher=launcher, in_passes=COUNTS_MORE)
    done = started.finish(stdin="Return the\nRaise an error\nTest\n")
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["Return the", "Raise an error", "Test"]
    assert [len(line["outputs"][0]["token_ids"]) for line in lines] == [4, 4, 4]
    assert len(done.pids()) == 2
    assert done.stderr.count("predicted decode pass") == 1 and done.stderr.count("passes took") == 1
    assert "rank 0 of 2: cpu" in done.stderr  # each where it runs, when asked; what another one says is its launcher's
    assert ("rank 1 of 2: cpu" in done.stderr) == bool(launcher)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith('{"transfers":')]
    transfers = json.loads(line)["transfers"]
    assert [one["rank"] for one in transfers] == [0, 1]
    for rank, one in enumerate(transfers):
        reduces = one["all_reduces"]["operations"]
        assert reduces.pop("own") == {"num_calls": 4, "sent_bytes": 4 * (1 + rank), "received_bytes": 0}
        assert {"num_calls": 4, "sent_bytes": 4 * (1 + rank), "operation": "own", "layer_idx": rank}.items() <= (
            one["all_reduces"]["sites"][0].items()
        )
        calls = {name: moved["num_calls"] for name, moved in reduces.items()}
        assert calls == {"embed_allreduce": 4, "attn_allreduce": 16, "ffn_allreduce": 16}
        copies = 4 * (4 * 2 + 1) + 2  # those of the passes, and of the prologue
        assert one["weights"]["total"]["num_calls"] == copies and one["weights"]["total"]["sent_bytes"] > 2**20
