"""The examples of docs/scale.md, run as they stand, beside a `penstock` that does nothing but end as it is told."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs/scale.md").read_text()
# what it was asked goes into LOG; it ends with STATUS, or with 143 once it gets SIGTERM
PENSTOCK = """#!/bin/sh
trap 'exit 143' TERM
echo penstock "$@" >> $LOG
[ "$STATUS" ] && exit $STATUS
while :; do sleep 0.05; done
"""
OTHER = """#!/bin/sh
echo $(basename $0) "$@" >> $LOG
"""
RAY = """
def init(): pass
def get(results): return results
def remote(**options):
    def decorated(function):
        function.remote = function
        return function
    return decorated
"""


def example(heading: str) -> str:
    """The first block of code below a heading."""
    return re.search(r"```\w*\n(.*?)```", PAGE.split(f"\n## {heading}\n")[1], re.DOTALL)[1]


@pytest.fixture
def start(tmp_path):
    """Starts a command beside the stubs, which log what they are asked."""
    for name, content in {"penstock": PENSTOCK, "scontrol": OTHER, "ray.py": RAY}.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)

    def begin(*command: str, status: str = "", **environment: str) -> subprocess.Popen:
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path), "LOG": str(tmp_path / "log")}
        return subprocess.Popen(command, env=os.environ | own | {"STATUS": status} | environment)

    return begin


def asked(tmp_path) -> list[str]:
    log = tmp_path / "log"
    return log.read_text().splitlines() if log.exists() else []


def sleeps(pid: int) -> bool:
    """Tells whether a process waits: a script, for the job that it has begun."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def told_to_stop(job: subprocess.Popen, tmp_path) -> int:
    """The exit status of a script that gets SIGTERM while its job runs."""
    while not (asked(tmp_path) and sleeps(job.pid)):
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    return job.wait(timeout=60)


SLURM = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_JOB_ID": "77"}
SHARD = "--model /models/Llama-3-70B -i /data/requests.jsonl -o /data/part-3.jsonl --shard 3/8"


@pytest.mark.parametrize("status, expected", [("0", 0), ("1", 0), ("2", 2), ("70", 70)])
@pytest.mark.parametrize("where", ["Slurm", "Kubernetes"])
def test_a_shards_status_becomes_its_jobs(start, tmp_path, where, status, expected):
    job = start(*script(where), status=status, **SLURM, JOB_COMPLETION_INDEX="3")
    assert job.wait(timeout=60) == expected
    (line,) = asked(tmp_path)
    assert line == f"penstock batch{' -tp 4' if where == 'Slurm' else ''} {SHARD}"


@pytest.mark.parametrize("where", ["Slurm", "Kubernetes"])
def test_a_shard_that_is_told_to_stop_runs_again(start, tmp_path, where):
    job = start(*script(where), **SLURM, JOB_COMPLETION_INDEX="3")
    assert told_to_stop(job, tmp_path) == 143
    assert asked(tmp_path)[1:] == (["scontrol requeue 77_3"] if where == "Slurm" else [])


def script(where: str) -> list[str]:
    if where == "Slurm":
        return ["bash", "-c", example("A Slurm array")]
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(example("A Kubernetes Job"))
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    rules = {rule["action"]: rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"]}
    assert (spec["completionMode"], spec["completions"]) == ("Indexed", 8)
    assert {action: codes["values"] for action, codes in rules.items()} == {"Ignore": [143], "FailJob": [2]}
    assert all(codes["containerName"] == container["name"] for codes in rules.values())
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    return [*container["command"], *container["args"]]


def test_ray_runs_each_shard_and_merges(start, tmp_path):
    assert start(sys.executable, "-c", example("Ray tasks"), status="1").wait(timeout=60) == 0
    *shards, merge = asked(tmp_path)
    assert [line.split("--shard ")[1] for line in shards] == [f"{index}/8" for index in range(8)]
    parts = " ".join(f"/data/part-{index}.jsonl" for index in range(8))
    assert merge == f"penstock batch --merge {parts} -o /data/answers.jsonl"
    assert start(sys.executable, "-c", example("Ray tasks"), status="2").wait(timeout=60) != 0
