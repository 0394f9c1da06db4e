"""`vllm run-batch` on a file of rows, in a process of its own. Its progress bar says when its first row began and its
last one ended; before that it loads."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from scripts.bench.vllm_side import Vllm, asynchronous, flags_of

MODULE = "vllm.entrypoints.openai.run_batch"
BAR = "Running batch"
MOST_KEPT = 200  # lines of what it said


def run_vllm_batch(vllm: Vllm, model: Path, given: Path, output: Path, num_rows: int) -> dict[str, Any]:
    """Runs the rows of a file: `seconds`, `output_tokens` and `output_tokens_s`; or `error`, its last line, if it did
    not answer each."""
    command = [vllm.python, "-m", MODULE, "-i", str(given), "-o", str(output), "--model", str(model)]
    command += ["--load-format", "dummy", *flags_of(vllm.options)]
    began_s = time.perf_counter()
    process = subprocess.Popen(
        command, env=asynchronous(vllm), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    times_s, said = [], []
    for line in process.stdout:
        said = [*said[-MOST_KEPT:], line]
        if BAR in line:
            times_s.append(time.perf_counter())
    result = {"version": vllm.version, "options": vllm.options}
    answers = read_answers(output)
    if process.wait() or len(answers) != num_rows or len(times_s) < 2:
        last = next((line.strip() for line in reversed(said) if line.strip()), "no output")
        return result | {"error": f"ended with status {process.returncode} and {len(answers)} answers: {last[:300]}"}
    tokens, seconds = sum(body["usage"]["completion_tokens"] for body in answers), times_s[-1] - times_s[0]
    result |= {"load_s": times_s[0] - began_s, "seconds": seconds, "output_tokens": tokens}
    return result | ({"output_tokens_s": tokens / seconds} if seconds else {})


def read_answers(output: Path) -> list[dict[str, Any]]:
    """The bodies of the rows that were answered."""
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    return [row["response"]["body"] for row in rows if not row["error"]]
